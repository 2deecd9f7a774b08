"""k-means of vectors, in JAX: one table a group, weighted by coordinate."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from palettax._typing import Array, PRNGKey, is_traced
from palettax.clustering.assignment import nearest, squared_errors
from palettax.clustering.fit import LutFit
from palettax.clustering.seeding import (
    distinct_points,
    equal_entries,
    plus_plus,
    sample_points,
    unit_of,
    unscaled,
)

LANES = 8
"""Running sums that a cell is added up in: neighbouring points then seldom wait for one another."""

SAMPLE, SAMPLE_PER_ENTRY = 8192, 64
"""The start is searched for on this many points at most, or on this many for each entry."""

START_STEPS, START_TOL = 20, 3e-4
"""Where Lloyd's iteration stops in a restart, of which all but the best are thrown away."""

BATCH = 32768
"""Vectors at a time when groups are small; a larger group is computed alone."""


def kmeans_vectors(
    vectors: Float[Array, "groups m d"],
    k: int,
    sensitivity: Float[Array, "groups m d"] | None,
    key: PRNGKey,
    *,
    max_steps: int = 100,
    tol: float = 2e-5,
    restarts: int = 10,
) -> LutFit:
    """Cluster the vectors of every group into k of small squared error, weighted by coordinate.

    minimise over lut and index:  Σ_i Σ_c sensitivity[i, c] · (vectors[i, c] - lut[index[i], c])²

    A restart is a greedy k-means++ start and a few of Lloyd's steps, on a weighted sample when there are many vectors.
    Lloyd's iteration on all vectors continues from the best. An entry without weight moves to the vector of greatest
    error. At most k distinct vectors in a group are reproduced exactly. A sensitivity of zero everywhere in a group
    counts as one everywhere. The fit is a constant to differentiation.

    Args:
        vectors: (groups, m, d), any float dtype. A group with NaN or infinity gets `converged=False` and a NaN lut.
        k: entries, 1 to 256.
        sensitivity: (groups, m, d) ≥ 0, or None for one everywhere.
        key: group g draws from `jax.random.split(key, groups)[g]`.
        max_steps: Lloyd steps over all vectors at most.
        tol: a step that lowers the inertia by at most this part of it is the last.
        restarts: starts, of which the best is kept.

    Returns:
        `LutFit` with a leading axis of groups; lut (groups, k, d) float32 (float64 for float64), its rows in
        lexicographic order, unused rows repeating the last used; indices (groups, m): the entry of least weighted
        error, among equals that of least plain error, then the lowest.

    Raises:
        ValueError: k is not from 1 to 256, or there are no restarts.

    Example:
        >>> import jax, numpy as np
        >>> vectors = np.array([[[0, 1], [0, 3], [9, 9]]], np.float32)
        >>> fit = kmeans_vectors(vectors, 2, None, jax.random.key(0))
        >>> fit.lut.tolist(), fit.indices.tolist()
        ([[[0.0, 2.0], [9.0, 9.0]]], [[0, 0, 1]])

    References:
        Lloyd, "Least squares quantization in PCM", IEEE Transactions on Information Theory 28, 1982.
        Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007 (greedy trials: section 7).
        Bachem et al., "Scalable k-means clustering via lightweight coresets", KDD 2018 (the sample).
        van Baalen et al., "GPTVQ: the blessing of dimensionality for LLM quantization", arXiv 2402.15319 (the weights).
    """
    if not 1 <= k <= 256:
        raise ValueError(f"k={k}; an index is one byte: choose from 1 to 256 entries")
    if restarts < 1:
        raise ValueError(f"restarts={restarts}; at least one start is needed")
    vectors, sensitivity = jax.lax.stop_gradient((vectors, sensitivity))
    if not is_traced(vectors):  # one program for all narrow floats
        vectors = jnp.asarray(vectors, jnp.promote_types(vectors.dtype, jnp.float32))
    return _fit_groups(vectors, sensitivity, key, tol, max_steps, k, restarts)


@partial(jax.jit, static_argnums=(5, 6))
def _fit_groups(
    vectors: Array,
    sensitivity: Array | None,
    key: PRNGKey,
    tol: float | jax.Array,
    max_steps: int | jax.Array,
    k: int,
    restarts: int,
) -> LutFit:
    groups, m, _ = vectors.shape

    def fit(group: tuple) -> LutFit:
        return fit_group(*group, k=k, tol=tol, max_steps=max_steps, restarts=restarts)

    # Few small groups at a time: together they fill the machine, and all of a batch wait for its slowest.
    calls = -(-groups // max(1, BATCH // m))
    batch = -(-groups // calls)
    group = (vectors, sensitivity, jax.random.split(key, groups))
    if groups == 1:  # compiles faster than a loop over one
        return jax.tree.map(lambda a: a[None], fit(jax.tree.map(lambda a: a[0], group)))
    if batch == 1:
        return jax.lax.map(fit, group)
    # Groups repeat to fill the last batch, so that one compiled batch does for all.
    batches = jax.tree.map(lambda a: a[jnp.arange(calls * batch) % groups].reshape(calls, batch, *a.shape[1:]), group)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:groups], jax.lax.map(jax.vmap(fit), batches))


def fit_group(
    vectors: Float[Array, "m d"],
    sensitivity: Float[Array, "m d"] | None,
    key: PRNGKey,
    *,
    k: int,
    tol: float | jax.Array,
    max_steps: int | jax.Array,
    restarts: int,
) -> LutFit:
    """`kmeans_vectors` of one group."""
    dtype = jnp.promote_types(vectors.dtype, jnp.float32)
    # Coordinates first: compiled loops then run over neighbouring points.
    points = vectors.T.astype(dtype)
    finite = jnp.isfinite(points).all()
    mass = None
    if sensitivity is not None:
        mass = sensitivity.T.astype(dtype)
        finite &= (mass >= 0).all() & jnp.isfinite(mass).all()
        mass = jnp.where(finite & (mass.max() > 0), mass, 1)
    points = jnp.where(finite, points, 0)
    # Scaling by powers of two is exact, and keeps squares of tiny weights from vanishing.
    scale = unit_of(points)
    heaviest = jnp.ones((), dtype) if mass is None else unit_of(mass)
    points *= scale
    mass = None if mass is None else mass * heaviest

    lut = _start(points, mass, k, key, restarts)
    distinct, few = distinct_points(points, k)
    best = _lloyd(points, mass, jnp.where(few, distinct, lut), max_steps, tol)
    ordered = jnp.stack(jax.lax.sort(tuple(best.lut.T), num_keys=points.shape[0]), axis=1)
    near, errors = nearest(points, mass, ordered, plain_ties=mass is not None)
    # Squares of tiny differences vanish: what is equal is found by comparing.
    near, errors = jnp.where(few, equal_entries(points, ordered), near), jnp.where(few, 0, errors)
    count = jnp.zeros(k, jnp.int32).at[near].add(1)
    last = jnp.max(jnp.where(count > 0, jnp.arange(k), 0))
    used = jnp.cumsum(count > 0) - 1
    lut = jnp.zeros_like(ordered) + ordered[last]
    lut = lut.at[jnp.where(count > 0, used, k)].set(ordered, mode="drop")
    inertia = unscaled(errors.sum(), heaviest, scale, scale)
    return LutFit(
        jnp.where(finite, lut / scale, jnp.nan),
        used[near].astype(jnp.uint8),
        jnp.where(finite, inertia, jnp.nan),
        best.steps,
        best.settled & finite,
    )


class _Lloyd(NamedTuple):
    lut: jax.Array
    near: jax.Array
    errors: jax.Array
    inertia: jax.Array
    means: jax.Array  # of the cells before
    speed: jax.Array  # steps since the last plain one
    steps: jax.Array
    settled: jax.Array


def _lloyd(points: jax.Array, mass: jax.Array | None, lut: jax.Array, max_steps: Any, tol: Any) -> _Lloyd:
    """Lloyd's iteration with Nesterov's momentum, until a plain step moves no index or gains at most `tol`.

    A step that gains nothing is taken back, and the next is plain: a plain step can't lose.
    """
    k, d = lut.shape

    def step(old: _Lloyd) -> _Lloyd:
        # A mean as a correction to its entry: entries that already are their cell's only value stay bit for bit.
        shift = points - old.lut.T[:, old.near]
        rows = [*shift, jnp.ones_like(shift[0])] if mass is None else [*(mass * shift), *mass]
        slots = old.near + k * (jnp.arange(points.shape[1]) % LANES)
        sums = jax.ops.segment_sum(jnp.stack(rows, axis=1), slots, LANES * k).reshape(LANES, k, -1).sum(axis=0)
        total = jnp.broadcast_to(sums[:, d:], (k, d))
        means = old.lut + jnp.where(total > 0, sums[:, :d] / jnp.where(total > 0, total, 1), 0)
        unused = (total == 0).all(axis=1)
        means = _refill(points, mass, means, unused, old.errors)
        onward = jnp.where(unused[:, None], 0, means - old.means)
        lut = means + old.speed / (old.speed + 3) * onward
        near, errors = nearest(points, mass, lut)
        inertia = errors.sum()
        better = inertia < old.inertia
        still = ~better | (near == old.near).all() | (old.inertia - inertia <= tol * old.inertia)
        new = _Lloyd(lut, near, errors, inertia, means, old.speed, old.steps, old.settled)
        new = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old._replace(means=means))
        speed = jnp.where(still, 0, old.speed + 1)
        return new._replace(speed=speed, steps=old.steps + 1, settled=still & (old.speed == 0))

    near, errors = nearest(points, mass, lut)
    inertia = errors.sum()
    state = _Lloyd(lut, near, errors, inertia, lut, jnp.zeros_like(inertia), jnp.zeros((), jnp.int32), inertia == 0)
    return jax.lax.while_loop(lambda s: ~s.settled & (s.steps < max_steps), step, state)


def _refill(
    points: jax.Array, mass: jax.Array | None, lut: jax.Array, unused: jax.Array, errors: jax.Array
) -> jax.Array:
    """Move unused entries, one after the other, to the point of greatest error that is left."""

    def fill(state: tuple) -> tuple:
        lut, unused, errors = state
        entry = points[:, jnp.argmax(errors)]
        slot = jnp.argmax(unused)
        return (
            lut.at[slot].set(entry),
            unused.at[slot].set(False),
            jnp.minimum(errors, squared_errors(points, mass, entry)),
        )

    return jax.lax.while_loop(lambda s: s[1].any() & (s[2].max() > 0), fill, (lut, unused, errors))[0]


def _start(points: jax.Array, mass: jax.Array | None, k: int, key: PRNGKey, restarts: int) -> jax.Array:
    """The table of least inertia after a few steps from k-means++, of several."""
    keys = jax.random.split(key, 1 + restarts)
    mass = jnp.ones_like(points) if mass is None else mass
    size = max(SAMPLE, SAMPLE_PER_ENTRY * k)
    if points.shape[1] > size:
        points, mass = sample_points(points, mass, size, keys[0])

    def run(key: PRNGKey) -> tuple[jax.Array, jax.Array]:
        fit = _lloyd(points, mass, plus_plus(points, mass, k, key), START_STEPS, START_TOL)
        return fit.lut, fit.inertia

    luts, inertias = jax.vmap(run)(keys[1:])
    return luts[jnp.argmin(inertias)]
