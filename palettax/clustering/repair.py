"""Entries of a table that say nothing are put where they help."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from palettax.clustering.attention import Points, Scalar, attention, attracts, is_anchored, sum_blocks

SAME = 1e-6
"""Entries nearer than this, in widths of a cell, are one."""


def repaired(points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar) -> Float[jax.Array, "k d"]:
    """The table with entries that repeat another, or attract nothing, moved into the cells of most error.

    The first goes one standard deviation of its cell beside the entry of the costliest, the next into the second
    costliest, and so on; nothing moves where no cell has an error, as with fewer distinct weights than entries.
    """
    k = lut.shape[0]

    def of_block(block: Points) -> tuple[jax.Array, jax.Array]:
        share, gaps = attention(block, lut, temperature)
        own = [share * mass for mass in block.mass]
        return (
            jnp.stack([a.sum(axis=1) for a in own], axis=1),
            jnp.stack([(a * gap**2).sum(axis=1) for a, gap in zip(own, gaps, strict=True)], axis=1),
        )

    mass, error = sum_blocks(of_block, points, k)
    near = (abs(lut[:, None] - lut[None]) <= SAME).all(axis=-1)
    spare = jnp.tril(near, -1).any(axis=1) | ~attracts(points, mass).any(axis=1)
    spare &= ~is_anchored(points, lut)[:, 0]
    cost = jnp.where(spare, 0, error.sum(axis=1))
    costliest = jnp.argsort(-cost)
    cell = costliest[jnp.cumsum(spare) - 1]  # the first spare entry takes the costliest cell
    aside = lut[cell] + jnp.sqrt(error[cell] / jnp.where(mass[cell] > 0, mass[cell], 1))
    worth = spare & (cost[cell] > SAME**2 * mass[cell].sum(axis=1))
    # Where the square root is of zero, it has no derivative.
    return jnp.where(worth[:, None], jax.lax.stop_gradient(aside), lut)
