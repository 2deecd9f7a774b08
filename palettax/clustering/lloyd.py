"""Lloyd's k-means on a line, in JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from palettax.clustering.assignment import assign
from palettax.clustering.fit import LutFit
from palettax.clustering.seeding import unit_of, unscaled


def lloyd(
    weights: Float[jax.Array, " n"], k: int, sensitivity: Float[jax.Array, " n"] | None, max_steps: int | jax.Array
) -> LutFit:
    """Alternate nearest-entry assignment and weighted means until no index moves.

    Args:
        weights: (n,).
        k: entries.
        sensitivity: (n,) ≥ 0, or None.
        max_steps: steps at most.

    References:
        Lloyd, "Least squares quantization in PCM", IEEE Transactions on Information Theory 28, 1982.
    """
    dtype = jnp.promote_types(weights.dtype, jnp.float32)
    points = weights.astype(dtype)
    ones = jnp.ones_like(points)
    mass = ones if sensitivity is None else sensitivity.astype(dtype)
    mass = jnp.where(mass.sum() > 0, mass, ones)
    finite = jnp.isfinite(points).all() & (mass >= 0).all() & jnp.isfinite(mass).all()
    points, mass = jnp.where(finite, points, 0), jnp.where(finite, mass, 1)
    unit, heaviest = unit_of(points), unit_of(mass)
    points, mass = points * unit, mass * heaviest

    def step(state: tuple) -> tuple:
        lut, indices, steps, _ = state
        # A mean as a correction to its entry: entries that already are their cell's only value stay bit for bit.
        total = jax.ops.segment_sum(mass, indices, k)
        shift = jax.ops.segment_sum(mass * (points - lut[indices]), indices, k)
        lut = jnp.sort(lut + jnp.where(total > 0, shift / jnp.where(total > 0, total, 1), 0))
        moved = assign(points, lut)
        return lut, moved, steps + 1, (moved == indices).all()

    lut = _start(points, mass, k)
    state = (lut, assign(points, lut), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    state = jax.lax.while_loop(lambda s: ~s[3] & (s[2] < max_steps), step, state)
    lut, indices, steps, converged = state
    inertia = unscaled(jnp.sum(mass * (points - lut[indices]) ** 2), heaviest, unit, unit)
    lut, inertia = jnp.where(finite, lut / unit, jnp.nan), jnp.where(finite, inertia, jnp.nan)
    return LutFit(lut, indices, inertia, steps, converged & finite)


def _start(points: jax.Array, mass: jax.Array, k: int) -> jax.Array:
    """Entries spaced by the cube root of the density (Panter and Dite), or the distinct values when k hold them all."""
    distinct = jnp.unique(points, size=k + 1, fill_value=points.max())
    order = jnp.argsort(points)
    ordered = points[order]
    # Each gap between neighbours holds about one point: ∫ f^⅓ over it is mass^⅓ · gap^⅔, and none for equal values.
    density = jnp.cbrt((mass[order][1:] + mass[order][:-1]) / 2) * jnp.cbrt(jnp.diff(ordered)) ** 2
    position = jnp.concatenate([jnp.zeros(1, points.dtype), jnp.cumsum(density)])
    targets = position[-1] * (jnp.arange(k, dtype=points.dtype) + 0.5) / k
    spread = ordered[jnp.searchsorted(position, targets).clip(0, points.size - 1)]
    return jnp.where(distinct[k] == distinct[k - 1], distinct[:k], spread)
