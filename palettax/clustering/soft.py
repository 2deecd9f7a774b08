"""`soft_kmeans_lut`: differentiable k-means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from palettax._typing import Array, is_traced
from palettax.clustering.adjoints import IMPLICIT, Adjoint
from palettax.clustering.attention import BLOCK, Points, Scalar, anchored, coldest, values_at
from palettax.clustering.buckets import BUCKETS, bucketed, interpolated
from palettax.clustering.checks import (
    check_finite,
    check_sensitivity,
    check_weights,
    float64_stays,
    lut_dtype,
    vectors_of,
)
from palettax.clustering.repair import repaired
from palettax.clustering.seeding import unit_of

SOLVED = "palettax table"
HOTTEST = 1e18
"""The largest temperature, in squared widths of a cell: infinity has no derivative."""


class SoftFit(NamedTuple):
    """A lookup table that can be trained, the values it gives, and how the fit went.

    Attributes:
        lut: (k,), or (k, vector_size) for vectors, as the one it started from; entries keep their places. Float32, or
            float64 for float64 weights.
        values: Σ attention · lut, of the weights' shape and dtype. Differentiable in the weights.
        num_steps: steps taken.
        converged: whether the last step moved no entry by more than `tol`. False where weights are not finite.
    """

    lut: Float[Array, "*lut"]
    values: Float[Array, "*shape"]
    num_steps: Int[Array, "*batch"]
    converged: Bool[Array, "*batch"]


@float64_stays
def soft_kmeans_lut(
    weights: Float[Array, "*shape"],
    lut: Float[Array, "*lut"],
    temperature: float | Float[Array, ""],
    *,
    sensitivity: Float[Array, "*shape"] | None = None,
    relative: bool = True,
    max_steps: int = 10,
    tol: float = 1e-4,
    adjoint: Adjoint = IMPLICIT,
) -> SoftFit:
    """Soft k-means: every weight is shared between all entries, the nearer the more, and all of it has a gradient.

        attention[i, j] = softmax over j of -(weight[i] - lut[j])² / τ
        step(lut)[j] = Σ_i sensitivity[i] · attention[i, j] · weight[i] / Σ_i sensitivity[i] · attention[i, j]
        values[i] = Σ_j attention[i, j] · lut[j]

    with the attention of the lut at which the steps end. (The squares of a vector are weighted by sensitivity over its
    mean in the vector, so that the nearest entry is that of least error.) τ is `temperature` times the variance of the
    weights (weighted by sensitivity) times k^(-2 / vector_size): about the squared error that k entries can reach, so
    that weights times a number give a lut and values times it. At 0 every weight takes its nearest entry, and a step is
    one of Lloyd's. From about 5 on entries begin to merge. A few weights far out widen the spread of all: give them a
    table of their own.

    Memory does not grow with k or with the number of steps. More than 65,536 scalars are counted in as many buckets,
    finest where attention turns from one entry to the next; values and sums are right to second order in their width.
    They lie about the lut at the start: a cold start far from where the steps end is less exact. 65,536 scalars or
    fewer, and vectors, are exact. Works under `jit`, `vmap` and `grad`; nothing is traced
    anew when only the temperature changes.

    Args:
        weights: (*shape), float16, bfloat16, float32 or float64. What a float16 becomes is computed in float32.
        lut: (k,), or (k, vector_size) for vectors, which are neighbours on the last axis. Where to start: such as what
            `kmeans_lut` gives, or the lut of the training step before.
        temperature: ≥ 0: a number, traced or not.
        sensitivity: (*shape), ≥ 0: what a squared error of each weight costs; None for one everywhere.
        relative: whether the temperature is relative to the spread of the weights; False: it is τ, in squared weights.
        max_steps: steps at most; `Unrolled` takes all of them.
        tol: steps end when no entry moves by more than this times sqrt(variance) · k^(-1 / vector_size).
        adjoint: `Implicit()`, `Unrolled()` or `OneStep()`: how the gradient goes through the steps.

    Returns:
        `SoftFit`.

    Raises:
        ValueError: integer or empty weights, NaN or infinities, a negative temperature (under `jit` the fit is NaN
            instead), a lut of more than 256 entries or of another rank, a vector size that does not divide the last
            axis, a negative tol, a sensitivity that is negative or of another shape, an unknown adjoint.

    Example:
        >>> import jax, palettax as px
        >>> weights = jax.random.normal(jax.random.key(0), (64, 64))
        >>> lut = px.kmeans_lut(weights, nbits=2).lut
        >>> fit = px.soft_kmeans_lut(weights, lut, 0.1)
        >>> fit.lut.shape, fit.values.shape
        ((4,), (64, 64))
        >>> jax.grad(lambda w: (px.soft_kmeans_lut(w, lut, 0.1).values ** 2).sum())(weights).shape
        (64, 64)

    References:
        Cho et al., "DKM: differentiable k-means clustering layer for neural network compression", arXiv 2108.12659.
        Jaffe et al., "IDKM: memory efficient neural network quantization via implicit, differentiable k-means",
        arXiv 2312.07759.
    """
    check_weights(weights)
    check_finite(weights)
    check_sensitivity(sensitivity, weights)
    check_nonnegative("temperature", temperature)
    check_nonnegative("tol", tol)
    if not hasattr(lut, "ndim") or lut.ndim not in (1, 2) or not 1 <= lut.shape[0] <= 256:
        raise ValueError(
            f"lut is {getattr(lut, 'shape', type(lut).__name__)}; give (k,), or (k, vector_size), with k from 1 to 256"
        )
    size = 1 if lut.ndim == 1 else lut.shape[1]
    rows, mass = (
        None if a is None else jnp.asarray(a if lut.ndim == 1 else vectors_of(a, size)).reshape(-1, size)
        for a in (weights, sensitivity)
    )
    way = Way(adjoint, max_steps, relative)
    fit = soft_row(rows, jnp.asarray(lut).reshape(-1, size), temperature, tol, mass, way=way)
    return fit._replace(lut=fit.lut.reshape(lut.shape), values=fit.values.reshape(weights.shape))


@dataclasses.dataclass(frozen=True)
class Way:
    """How soft k-means goes, known when it is compiled.

    Attributes:
        adjoint: how it is differentiated.
        max_steps: steps at most.
        relative: whether the temperature is relative to the spread of the weights.
        repair: whether entries that say nothing are moved before the first step.
        finish: what becomes of the table between the steps and the values, given whether an entry is to be zero.
    """

    adjoint: Adjoint = IMPLICIT
    max_steps: int = 10
    relative: bool = True
    repair: bool = False
    finish: Callable[[Array, Any], Array] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.adjoint, Adjoint):
            raise ValueError(f"adjoint={self.adjoint!r}; give Implicit(), Unrolled() or OneStep()")
        steps = self.max_steps
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
            raise ValueError(f"max_steps={steps!r}; it must be a positive integer")


def check_nonnegative(name: str, value: Any) -> None:
    """Refuse what is no number, and one below zero when it is known."""
    known = is_traced(value) or (np.asarray(value).dtype.kind in "fiu" and np.all(value >= 0))
    if np.ndim(value) or not known:
        raise ValueError(f"{name}={value}; it must be one number ≥ 0")


@partial(jax.jit, static_argnames="way")
def soft_groups(
    weights: Float[Array, "groups n d"],
    lut: Float[Array, "groups k d"],
    temperature: float | Scalar,
    tol: float | Scalar,
    sensitivity: Float[Array, "groups n d"] | None = None,
    anchor: Bool[Array, " groups"] | None = None,
    *,
    way: Way,
) -> SoftFit:
    """`soft_kmeans_lut` of every group, as many at a time as fit in a block; fields get a leading axis."""
    (groups, n, _), k = weights.shape, lut.shape[1]

    def fit(group: tuple) -> SoftFit:
        weights, lut, sensitivity, anchor = group
        return soft_row(weights, lut, temperature, tol, sensitivity, anchor, way=way)

    every = weights, lut, sensitivity, anchor
    if groups == 1:  # compiles faster than a loop over one
        return jax.tree.map(lambda a: a[None], fit(jax.tree.map(lambda a: a[0], every)))
    # For the derivative of a group its table is kept, and the rest computed again.
    fit = jax.checkpoint(fit, policy=jax.checkpoint_policies.save_only_these_names(SOLVED))
    return jax.lax.map(fit, every, batch_size=min(max(BLOCK // (n * k), 1), groups))


@partial(jax.jit, static_argnames="way")
def soft_row(
    weights: Float[jax.Array, "n d"],
    lut: Float[jax.Array, "k d"],
    temperature: float | Scalar,
    tol: float | Scalar,
    sensitivity: Float[jax.Array, "n d"] | None = None,
    anchor: Bool[Array, ""] | None = None,
    *,
    way: Way,
) -> SoftFit:
    """`soft_kmeans_lut` of one group, scalars being vectors of one; `anchor`: whether an entry stays at zero."""
    (n, d), k, dtype = weights.shape, lut.shape[0], lut_dtype(weights)
    rows = weights.T
    mass = None if sensitivity is None else _mass(sensitivity.T.astype(dtype))
    size = unit_of(jax.lax.stop_gradient(rows).astype(dtype))
    sized = rows.astype(dtype) * size
    middle = jax.lax.stop_gradient(_mean(sized, mass, axis=1))
    variance = _mean((sized - middle) ** 2, mass, axis=None)
    fixed = jax.lax.stop_gradient(variance)
    width = jnp.sqrt(jnp.where(fixed > 0, fixed, 1)) * k ** (-1 / d)
    temperature = jnp.minimum(jnp.asarray(temperature, dtype), HOTTEST)
    width = jnp.where(jnp.isfinite(fixed) & (temperature >= 0), width, jnp.nan)  # and with it all that is computed
    frame = Frame(size, middle, width)
    if way.relative:
        temperature = temperature * jnp.where(fixed > 0, variance / jnp.where(fixed > 0, fixed, 1), 1)
    else:
        temperature = temperature * (size / width) * (size / width)
    temperature = jnp.clip(temperature, coldest(dtype), HOTTEST)

    buckets = d == 1 and n > BUCKETS
    start = frame.place(lut.T).T
    if buckets:
        line = frame._replace(middle=middle[0, 0])
        points = bucketed(rows[0], None if mass is None else mass[0], start[:, 0], line.place)
    else:
        ones = jnp.ones(rows.shape, dtype) if mass is None else mass
        metric = None
        if mass is not None and d > 1:
            counts = mass.any(axis=0)
            metric = jnp.where(counts, mass / jnp.where(counts, mass.mean(axis=0), 1), 1)
        points = Points(frame.place(rows), ones, metric)
    if anchor is not None:
        points = points._replace(anchor=jnp.where(anchor, frame.place(jnp.zeros((1, 1), dtype))[0, 0], jnp.nan))
    if way.repair:
        start = repaired(points, start, temperature)
    start = anchored(points, start)
    entries, num_steps, converged = way.adjoint.solve(points, start, temperature, way.max_steps, tol)
    entries = checkpoint_name(entries, SOLVED)
    table = frame.back(entries.T, dtype).T
    read = table  # what values are read from
    if way.finish is not None:
        read = jnp.asarray(way.finish(table, anchor))
        entries = frame.place(read.T).T
    if buckets:
        unit = frame.width / frame.size
        values = interpolated(rows[0], entries[:, 0], temperature, read[:, 0], line.place, unit)[None]
    else:
        values = values_at(points, entries, temperature, read).astype(weights.dtype)
    return SoftFit(table, values.T, num_steps, converged)


class Frame(NamedTuple):
    """Where weights lie when they are centred and cells are about as wide as one: there, all weights are alike.

    A shift and a scale change nothing but the unit of the temperature.
    """

    size: Float[jax.Array, ""]
    middle: Float[jax.Array, "*middle"]
    width: Float[jax.Array, ""]

    def place(self, weights: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
        """From weights to places."""
        return (weights.astype(self.width.dtype) * self.size - self.middle) / self.width

    def back(self, places: Float[jax.Array, "*shape"], dtype: np.dtype) -> Float[jax.Array, "*shape"]:
        """From places to weights."""
        return ((places * self.width + self.middle) / self.size).astype(dtype)


def _mass(sensitivity: Float[jax.Array, "d n"]) -> Float[jax.Array, "d n"]:
    """Sensitivities up to one; ones if all are zero, NaN if one is negative, infinite or NaN."""
    largest = jax.lax.stop_gradient(sensitivity.max())
    sound = (sensitivity >= 0).all() & (largest < jnp.inf)
    share = jnp.where(largest > 0, jnp.abs(sensitivity) / jnp.where(largest > 0, largest, 1), 1)
    return jnp.where(sound, share, jnp.nan)


def _mean(values: Float[jax.Array, "d n"], mass: Float[jax.Array, "d n"] | None, axis: int | None) -> jax.Array:
    """The mean by mass; a coordinate without mass has mean zero."""
    if mass is None:
        return values.mean(axis=axis, keepdims=axis is not None)
    total = mass.sum(axis=axis, keepdims=axis is not None)
    return (mass * values).sum(axis=axis, keepdims=axis is not None) / jnp.where(total > 0, total, 1)
