"""`unique_lut`: the distinct values of weights that have few."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from palettax._typing import NBITS, Array, is_traced
from palettax.clustering.assignment import assign, assign_groups, lookup
from palettax.clustering.checks import check_finite, check_nbits, check_weights, float64_stays, lut_dtype
from palettax.clustering.fit import LutFit, fit_of
from palettax.clustering.points import distinct_count


@float64_stays
def unique_lut(weights: Float[Array, "*shape"], nbits: int | None = None) -> LutFit:
    """Take the distinct values of the weights as the lut: lossless, or not `converged`.

    lut = sort(distinct(weights)), repeating the last up to 2^nbits

    To XLA, which does the work, float32 numbers below 1.2e-38 are 0.

    Args:
        weights: (*shape), any float dtype, finite. -0 counts as 0.
        nbits: 1, 2, 3, 4, 6 or 8; None for the smallest that holds every distinct value, which needs concrete weights.

    Returns:
        `LutFit`; lut (2^nbits,) float32 (float64 for float64), ascending. With more distinct values than entries,
        `converged` is False and the lut holds the smallest values only.

    Raises:
        ValueError: integer or empty weights, NaN or infinities, a width Core ML can't hold, nbits=None under `jit`.

    Example:
        >>> import numpy as np, palettax as px
        >>> fit = px.unique_lut(np.array([0.3, 0.3, 0.5, 0.5], np.float32))
        >>> print(fit.lut, fit.indices, fit.converged)
        [0.3 0.5] [0 0 1 1] True
    """
    check_weights(weights)
    check_finite(weights)
    if nbits is None:
        nbits = smallest_nbits(weights)
    check_nbits(nbits)
    points = jnp.asarray(weights, lut_dtype(weights))
    k = 2**nbits
    distinct = jnp.unique(points.reshape(-1), size=k + 1, fill_value=points.max())
    lut = distinct[:k] + 0  # -0 becomes 0
    indices = assign(points, lut)
    inertia = jnp.sum((points - lookup(lut, indices)) ** 2)
    fits = (distinct[k] == distinct[k - 1]) & jnp.isfinite(points).all()
    return LutFit(lut, indices, inertia, jnp.zeros((), jnp.int32), fits)


def unique_groups(weights: Float[Array, "groups n"], nbits: int) -> LutFit:
    """`unique_lut` of every row; concrete rows stay on the host, where nothing is compiled for their shape."""
    if is_traced(weights):
        return jax.vmap(lambda row: unique_lut(row, nbits))(weights)
    points, k = weights.astype(lut_dtype(weights)), 2**nbits
    distinct = [np.unique(row) for row in points]
    lut = np.stack([np.pad(values[:k], (0, k - min(k, len(values))), mode="edge") for values in distinct])
    lut = lut + points.dtype.type(0)  # -0 becomes 0
    fits = np.array([len(values) <= k for values in distinct])
    return fit_of(points, lut, assign_groups(points, lut, None), fits)


def unique_vectors(vectors: Float[Array, "groups m d"], nbits: int | None) -> LutFit:
    """The distinct vectors of every group in lexicographic order, as `unique_lut` has numbers; on the host.

    Args:
        vectors: (groups, m, d), finite.
        nbits: of the index; None for the fewest that serve every group.

    Raises:
        ValueError: under `jit`.
    """
    if is_traced(vectors):
        raise ValueError("distinct vectors are unknown under jit; choose them outside")
    points = np.asarray(vectors, lut_dtype(vectors)) + 0  # -0 becomes 0
    found = [np.unique(group, axis=0, return_inverse=True) for group in points]
    k = 2 ** (nbits_for(max(len(rows) for rows, _ in found)) if nbits is None else nbits)
    lut = np.stack([np.pad(rows[:k], ((0, k - min(k, len(rows))), (0, 0)), mode="edge") for rows, _ in found])
    fits = np.array([len(rows) <= k for rows, _ in found])
    indices = np.stack([np.minimum(inverse.reshape(-1), k - 1).astype(np.uint8) for _, inverse in found])
    inertia = np.square(points - np.take_along_axis(lut, indices[..., None].astype(int), axis=1)).sum(axis=(1, 2))
    return LutFit(lut, indices, inertia, np.zeros(len(points), np.int32), fits)


def smallest_nbits(weights: Float[Array, "*shape"]) -> int:
    """The fewest bits whose entries hold every distinct value; the widest there is when none does."""
    if is_traced(weights):
        raise ValueError("nbits=None counts distinct values, which are unknown under jit; pass nbits")
    return nbits_for(distinct_count(np.asarray(weights).reshape(-1)))


def nbits_for(entries: int) -> int:
    """The fewest bits that Core ML holds and that index so many entries; the widest when none does."""
    return next((b for b in NBITS if entries <= 2**b), NBITS[-1])
