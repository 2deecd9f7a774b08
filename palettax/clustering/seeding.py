"""What k-means in JAX starts from: units, distinct points, a sample of many, greedy k-means++."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from palettax._typing import PRNGKey
from palettax.clustering.assignment import squared_errors


def unit_of(values: jax.Array) -> jax.Array:
    """The power of two that brings the largest magnitude near one: exact, and squares of tiny values do not vanish."""
    limit = jnp.finfo(values.dtype).maxexp - 3
    exponent = jnp.frexp(jnp.abs(values).max())[1]
    return jnp.ldexp(jnp.ones((), values.dtype), -jnp.clip(exponent, -limit, limit))


def unscaled(value: jax.Array, *units: jax.Array) -> jax.Array:
    """The value over each of the units, one after the other: their product may be out of range."""
    for unit in units:
        value = jax.lax.optimization_barrier(value / unit)
    return value


def equal_entries(points: jax.Array, lut: jax.Array) -> jax.Array:
    """The lowest entry that is equal to each point; 0 where none is. Points are (d, n)."""

    def compare(place: int | jax.Array, near: jax.Array) -> jax.Array:
        entry = lut.shape[0] - 1 - place
        return jnp.where((points == lut[entry][:, None]).all(axis=0), entry, near)

    return jax.lax.fori_loop(0, lut.shape[0], compare, jnp.zeros(points.shape[1], jnp.int32))


def distinct_points(points: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The distinct points, the first of them repeated to make k; and whether k hold them all."""
    d, n = points.shape

    def add(state: tuple) -> tuple:
        lut, count, unseen = state
        entry = points[:, jnp.min(jnp.where(unseen, jnp.arange(n), n - 1))]
        return lut.at[count].set(entry, mode="drop"), count + 1, unseen & (points != entry[:, None]).any(axis=0)

    # A few points are enough to find that most groups have too many; the search of all then ends before it starts.
    few = True if n <= 1024 else distinct_points(points[:, :: -(-n // 1024)], k)[1]
    state = (jnp.zeros((k, d), points.dtype) + points[:, 0], jnp.where(few, 0, k + 1), jnp.ones(n, bool))
    lut, count, _ = jax.lax.while_loop(lambda s: s[2].any() & (s[1] <= k), add, state)
    return lut, count <= k


def sample_points(points: jax.Array, mass: jax.Array, size: int, key: PRNGKey) -> tuple[jax.Array, jax.Array]:
    """Points by their share in mass and in inertia, so that few heavy or remote ones are not missed, and their mass."""
    total = mass.sum(axis=1, keepdims=True)
    total = jnp.where(total > 0, total, 1)
    centre = (mass / total * points).sum(axis=1)
    errors = squared_errors(points, mass, centre)
    share = errors / jnp.where(errors.sum() > 0, errors.sum(), 1) + (mass / total).mean(axis=0)
    upto = jnp.cumsum(share)
    marks = (jnp.arange(size) + jax.random.uniform(key, (size,), points.dtype)) / size * upto[-1]
    chosen = jnp.searchsorted(upto, marks).clip(0, points.shape[1] - 1)
    return points[:, chosen], mass[:, chosen] / share[chosen]


def plus_plus(points: jax.Array, mass: jax.Array, k: int, key: PRNGKey) -> jax.Array:
    """Greedy k-means++: entries drawn by their part in the inertia, the best of a few each time."""
    n, trials = points.shape[1], 2 + int(math.log2(k))

    def add(j: jax.Array, state: tuple) -> tuple:
        lut, errors = state
        upto = jnp.cumsum(jnp.where(j == 0, mass.sum(axis=0), errors))
        drawn = jax.random.uniform(jax.random.fold_in(key, j), (trials,), points.dtype) * upto[-1]
        entries = points[:, jnp.searchsorted(upto, drawn, side="right").clip(0, n - 1)]
        left = jax.vmap(lambda e: jnp.minimum(errors, squared_errors(points, mass, e)), 1)(entries)
        # The first is drawn freely: the best of a few would be much the same in every restart.
        best = jnp.where(j == 0, 0, jnp.argmin(left.sum(axis=1)))
        return lut.at[j].set(entries[:, best]), left[best]

    start = (jnp.zeros((k, points.shape[0]), points.dtype), jnp.full(n, jnp.inf, points.dtype))
    return jax.lax.fori_loop(0, k, add, start)[0]
