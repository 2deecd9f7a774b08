"""Tables of vectors in a narrow dtype: every coordinate of an entry is a level times the step of the table."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from palettax._typing import Array
from palettax.clustering.assignment import nearest
from palettax.clustering.levels import QuantizedFit, level_values, stored_levels
from palettax.clustering.rounding import rounded

# Steps tried over an octave, and rounds of means and assignments at most.
STEPS, ROUNDS = 13, 8


def quantized_vectors(
    vectors: Float[Array, "groups m d"],
    lut: Float[Array, "groups k d"],
    dtype: Any,
    sensitivity: Float[Array, "groups m d"] | None,
    *,
    step_dtype: Any,
) -> QuantizedFit:
    """Move the entries of tables of vectors to levels.

    minimise over step, levels and indices:  Σ sensitivity · (vector - step · level[index])²

    A step is chosen for the levels nearest to the entries. Then, in turns, vectors go to the nearest entry and every
    coordinate of an entry to the level nearest to the mean of its cell, which is the best one for that cell, as long as
    that gains something.

    Args:
        vectors: (groups, m, d).
        lut: (groups, k, d), where to start from.
        dtype: int8, uint8, float8_e4m3fn or float8_e5m2.
        sensitivity: (groups, m, d) ≥ 0, or None for ones.
        step_dtype: what a step is rounded to.

    Returns:
        `QuantizedFit`; lut (groups, k, d), its rows in lexicographic order.
    """
    levels, *rest = _fit_groups(vectors, lut, sensitivity, tuple(level_values(dtype).tolist()), np.dtype(step_dtype))
    return QuantizedFit(stored_levels(levels, dtype), *rest)


@partial(jax.jit, static_argnums=(3, 4))
def _fit_groups(
    vectors: Array, lut: Array, sensitivity: Array | None, levels: tuple[float, ...], step_dtype: np.dtype
) -> tuple[Array, ...]:
    def fit(group: tuple[Array, Array, Array | None]) -> tuple[Array, ...]:
        return _fit(*group, levels, step_dtype)

    return jax.lax.map(fit, (vectors, lut, sensitivity))


def _fit(
    vectors: Array, lut: Array, sensitivity: Array | None, levels: tuple[float, ...], step_dtype: np.dtype
) -> tuple[Array, ...]:
    dtype = jnp.promote_types(vectors.dtype, jnp.float32)
    points, lut = vectors.T.astype(dtype), lut.astype(dtype)
    mass = None if sensitivity is None else sensitivity.T.astype(dtype)
    mass = None if mass is None else jnp.where((mass > 0).any(), mass, 1)
    table = jnp.asarray(levels, dtype)
    k, tiny = lut.shape[0], float(jnp.finfo(step_dtype).smallest_normal)

    def values(chosen: Array, step: Array) -> Array:
        return rounded(chosen * step, step_dtype)

    def snapped(entries: Array, step: Array) -> Array:
        return table[jnp.searchsorted((table[1:] + table[:-1]) / 2, entries / step)]

    def reached(chosen: Array, step: Array) -> tuple[Array, Array]:
        near, errors = nearest(points, mass, values(chosen, step), plain_ties=mass is not None)
        return near, errors.sum()

    largest = jnp.abs(lut).max()
    steps = jnp.where(largest > 0, largest / table[-1] * 2.0 ** -jnp.linspace(0, 1, STEPS, dtype=dtype), 1)
    steps = jnp.maximum(rounded(steps, step_dtype), tiny)
    costs = jax.lax.map(lambda step: reached(snapped(lut, step), step)[1], steps)
    step = steps[jnp.argmin(costs)]

    def improve(state: tuple) -> tuple:
        chosen, near, cost, rounds, _ = state
        weight = jnp.ones_like(points) if mass is None else mass
        total = jax.ops.segment_sum(weight.T, near, k)
        means = jax.ops.segment_sum((weight * points).T, near, k) / jnp.where(total > 0, total, 1)
        moved = jnp.where(total > 0, snapped(means, step), chosen)
        fresh, lower = reached(moved, step)
        gains = lower < cost
        better = jax.tree.map(lambda a, b: jnp.where(gains, a, b), (moved, fresh, lower), (chosen, near, cost))
        return *better, rounds + 1, gains

    chosen = snapped(lut, step)
    state = (chosen, *reached(chosen, step), 0, jnp.ones((), bool))
    chosen = jax.lax.while_loop(lambda s: s[4] & (s[3] < ROUNDS), improve, state)[0]
    ordered = jnp.stack(jax.lax.sort(tuple(chosen.T), num_keys=chosen.shape[1]), axis=1)
    near, inertia = reached(ordered, step)
    return ordered, step.astype(step_dtype), near.astype(jnp.uint8), inertia
