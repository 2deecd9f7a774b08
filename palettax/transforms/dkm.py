"""`dkm` and `straight_through`: tables that follow the weights while they are trained."""

from __future__ import annotations

from typing import Any

from palettax._typing import PRNGKey
from palettax.clustering.adjoints import IMPLICIT, Adjoint, OneStep
from palettax.clustering.rounding import narrow_dtype
from palettax.clustering.soft import Way, check_nonnegative
from palettax.leaf import PER_TENSOR, Granularity
from palettax.transforms.base import PaletteTransformation
from palettax.transforms.trained import Following, Temperature, following


def dkm(
    nbits: int,
    *,
    temperature: Temperature = 1.0,
    relative: bool = True,
    granularity: Granularity = PER_TENSOR,
    milestone: int = 0,
    weight_threshold: int = 2048,
    lut_dtype: Any = None,
    levels: tuple[int, int] | None = None,
    zero_entry: bool = False,
    adjoint: Adjoint = IMPLICIT,
    max_steps: int = 10,
    tol: float = 1e-3,
    key: PRNGKey | None = None,
) -> PaletteTransformation:
    """Differentiable k-means: train weights so that few values are enough for them.

    `update` is what a training step calls on the weights before it uses them. It runs `soft_kmeans_lut` from the table
    of the update before and gives values that are soft in the table, with a gradient in all weights; `finalize` runs
    it once more and snaps every weight to its nearest entry.

    The first table is that of `kmeans`. Entries that repeat another or attract no weight are moved to where the error
    is largest. A leaf with NaN or infinities passes through `update` as it is, its table stays, and the state counts
    it in `skipped`; `finalize` raises. Weights that are to stay zero are a matter of `keep_zeros(dkm(...))`, a scale
    per channel of `with_channel_scale(dkm(...))`, leaves by path of `by_path`.

    Args:
        nbits: 1, 2, 3, 4, 6 or 8.
        temperature: how soft, ≥ 0, as in `soft_kmeans_lut`: 1 touches the weights between cells, 5 most of them, and 0
            is hard, without a gradient but by the means of the cells. The colder, the fewer weights have a gradient,
            and the larger those are: clip them below 0.1. A number, or any function of the count of updates (of
            batches, when gradients are accumulated): `optax.linear_schedule(3, 0.1, 1000)` anneals.
        relative: whether it is relative to the spread of each group; False: it is in squared weights.
        granularity: which weights share a table, and how many share an index.
        milestone: the update from which on there are tables; the ones before it leave all weights as they are.
        weight_threshold: leaves of at most this many weights stay dense.
        lut_dtype: what tables are rounded to in training as in storage, with straight-through gradients: float16,
            bfloat16, int8, uint8, float8_e4m3fn or float8_e5m2; None for the dtype of the weights.
        levels: for int8 and uint8, the lowest and the highest level that is used, about zero: (-7, 7) has 15; None for
            (-127, 127).
        zero_entry: whether every table keeps an entry that is zero; scalars only. `keep_zeros` does so where there are
            zeros to keep.
        adjoint: `Implicit()`, `Unrolled()` or `OneStep()`: how the gradient goes through the steps.
        max_steps: steps of soft k-means in an update, at most.
        tol: they end when no entry moves by more than this, in about widths of a cell.
        key: for vectors, which draw their first table at random; required there.

    Raises:
        ValueError: an argument outside what is said above; from the three functions, as `kmeans`, naming the leaf.

    Example:
        >>> import jax, optax, palettax as px
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> palette = px.dkm(nbits=2, temperature=optax.linear_schedule(3.0, 0.1, 1000))
        >>> state = palette.init(params)
        >>> def loss(params, state):
        ...     soft, state = palette.update(params, state)
        ...     return (soft["kernel"] ** 2).sum(), state
        >>> (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params, state)
        >>> palette.finalize(params, state)["kernel"].nbits
        2

    References:
        Cho et al., "DKM: differentiable k-means clustering layer for neural network compression", arXiv 2108.12659.
    """
    if not callable(temperature):
        check_nonnegative("temperature", temperature)
    return following(
        Following(
            nbits,
            temperature=temperature if callable(temperature) else lambda count: temperature,
            granularity=granularity,
            milestone=milestone,
            weight_threshold=weight_threshold,
            lut_dtype=narrow_dtype(lut_dtype),
            way=Way(adjoint, max_steps, relative, repair=True),
            tol=tol,
            key=key,
            levels=levels,
            zero_entry=zero_entry,
        )
    )


def straight_through(
    nbits: int,
    *,
    granularity: Granularity = PER_TENSOR,
    milestone: int = 0,
    weight_threshold: int = 2048,
    lut_dtype: Any = None,
    max_steps: int = 1,
    key: PRNGKey | None = None,
) -> PaletteTransformation:
    """Hard assignment whose gradient passes as if it were not there: the cheap baseline of `dkm`.

        values = lut[nearest(weights)],   ∂values/∂weights = 1

    The table of the update before takes `max_steps` of Lloyd's steps in each. `update` gives what `finalize` stores,
    bit for bit.

    Args:
        nbits: 1, 2, 3, 4, 6 or 8.
        granularity: which weights share a table, and how many share an index.
        milestone: the update from which on there are tables; the ones before it leave all weights as they are.
        weight_threshold: leaves of at most this many weights stay dense.
        lut_dtype: what tables are rounded to, as in `dkm`.
        max_steps: Lloyd steps in an update, at most.
        key: for vectors, which draw their first table at random; required there.

    Raises:
        ValueError: as `dkm`.

    Example:
        >>> import jax, palettax as px
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> palette = px.straight_through(nbits=2)
        >>> hard, state = palette.update(params, palette.init(params))
        >>> len(set(hard["kernel"].reshape(-1).tolist()))
        4

    References:
        Han et al., "Deep compression", arXiv 1510.00149. Bengio et al., "Estimating or propagating gradients through
        stochastic neurons", arXiv 1308.3432.
    """
    return following(
        Following(
            nbits,
            temperature=lambda count: 0.0,
            granularity=granularity,
            milestone=milestone,
            weight_threshold=weight_threshold,
            lut_dtype=narrow_dtype(lut_dtype),
            way=Way(OneStep(), max_steps, repair=True),
            tol=0.0,
            key=key,
            hard=True,
        )
    )
