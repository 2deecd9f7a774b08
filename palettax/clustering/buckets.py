"""Weights on a line in 65,536 buckets, finest where attention turns from one entry to the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, UInt16

from palettax.clustering.attention import Points, Scalar, cumulants_at

BUCKETS = 2**16
"""Buckets at most: as many as 16 bits tell apart."""

FINEST = 1024
"""Buckets on each side of an entry, at most: with more, floats are what limits the sums."""

CHUNK = 2**17
"""Weights that are in memory at a time beside what is given and what is asked for."""

CODE = "palettax bucket"
"""The name under which derivatives of values keep the buckets, two bytes a weight, rather than find them again."""


class Grid(NamedTuple):
    """Buckets between the landmarks of a table: its entries, and the middles between them.

    The way from an entry to a middle is cut in steps that shrink towards the middle, where attention turns.

    Attributes:
        entries: the table, ascending.
        reach: how far the buckets of an entry extend to its left and to its right.
    """

    entries: Float[jax.Array, " k"]
    reach: Float[jax.Array, "k 2"]

    @classmethod
    def of(
        cls, lut: Float[jax.Array, " k"], weights: Float[jax.Array, " n"], place: Callable[[jax.Array], jax.Array]
    ) -> Grid:
        """The grid of a table that covers the places of all weights; a constant to differentiation."""
        lut, weights = jax.lax.stop_gradient((lut, weights))
        entries = jnp.sort(lut)
        half = (entries[1:] - entries[:-1]) / 2
        left = jnp.maximum(entries[0] - place(weights.min()), 0)[None]
        right = jnp.maximum(place(weights.max()) - entries[-1], 0)[None]
        return cls(entries, jnp.stack([jnp.concatenate([left, half]), jnp.concatenate([half, right])], axis=1))

    @property
    def steps(self) -> int:
        """Buckets on each side of an entry."""
        return min(BUCKETS // self.reach.size, FINEST)

    def buckets_of(
        self, weights: Float[jax.Array, " n"], middles: Float[jax.Array, " buckets"]
    ) -> tuple[UInt16[jax.Array, " n"], Float[jax.Array, " n"]]:
        """The bucket of every weight, and how far the weight is from its middle."""
        fixed = jax.lax.stop_gradient(weights)
        halfway = self.entries[:-1] + self.reach[:-1, 1]
        if halfway.size < 32:  # comparing with all is faster than bisection
            entry = (fixed[:, None] > halfway).sum(axis=1, dtype=jnp.int32)
        else:
            entry = jnp.searchsorted(halfway, fixed, method="scan").astype(jnp.int32)
        gap = fixed - self.entries[entry]
        side = 2 * entry + (gap > 0)
        reach = self.reach.reshape(-1)[side]
        left = jnp.maximum(1 - abs(gap) / jnp.where(reach > 0, reach, 1), 0)  # of the way to the middle
        number = jnp.minimum((jnp.sqrt(left) * self.steps).astype(jnp.int32), self.steps - 1)
        code = checkpoint_name((side * self.steps + number).astype(jnp.uint16), CODE)
        return code, weights - middles[code]

    def middles(self) -> Float[jax.Array, " buckets"]:
        """The middle of every bucket."""
        share = 1 - ((jnp.arange(self.steps, dtype=self.reach.dtype) + 0.5) / self.steps) ** 2
        gap = self.reach[..., None] * share
        return (self.entries[:, None, None] + gap * jnp.array([-1, 1], gap.dtype)[:, None]).reshape(-1)


def bucketed(
    weights: Float[jax.Array, " n"],
    mass: Float[jax.Array, " n"] | None,
    lut: Float[jax.Array, " k"],
    place: Callable[[jax.Array], jax.Array],
) -> Points:
    """Weights as at most 65,536 points: each bucket stands at the mean of its weights and knows their variance.

    Differentiable in weights and mass: the points stay where they are, their moments about them move.

    Args:
        weights: as they are given.
        mass: what a squared error of each costs.
        lut: where attention will turn, about.
        place: what to cluster for a weight.
    """
    grid = Grid.of(lut, weights, place)
    middles = grid.middles()

    def collect(total: tuple, chunk: tuple) -> tuple[tuple, None]:
        weights, mass = chunk
        code, gap = grid.buckets_of(place(weights), middles)
        own = jnp.ones_like(gap) if mass is None else mass.astype(gap.dtype)
        # Each chunk by itself: a float that counts one by one stops at 2^24.
        return tuple(t + zero.at[code].add(v) for t, v in zip(total, (own, own * gap, own * gap**2), strict=True)), None

    zero = jnp.zeros_like(middles)
    (heavy, first, second), _ = jax.lax.scan(jax.checkpoint(collect), (zero,) * 3, _chunks(weights, mass))
    mean = jax.lax.stop_gradient(first / jnp.where(heavy > 0, heavy, 1))
    about_mean = jnp.maximum(second - 2 * mean * first + mean**2 * heavy, 0)
    return Points((middles + mean)[None], heavy[None], None, first - mean * heavy, about_mean)


def interpolated(
    weights: Float[jax.Array, " n"],
    lut: Float[jax.Array, " k"],
    temperature: Scalar,
    table: Float[jax.Array, " k"],
    place: Callable[[jax.Array], jax.Array],
    unit: Scalar,
) -> Float[jax.Array, " n"]:
    """Σ attention · entry at every weight, from its value and derivatives in the middle of the bucket.

    Args:
        weights: as they are given.
        lut: whose attention it is.
        temperature: of it.
        table: the lut in the units of the weights.
        place: what is clustered for a weight.
        unit: how much of a weight is one step in place.
    """
    grid = Grid.of(lut, weights, place)
    middles = grid.middles()
    tables = cumulants_at(middles, lut, temperature, table)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(CODE))
    def read(chunk: tuple) -> jax.Array:
        code, gap = grid.buckets_of(place(chunk[0]), middles)
        value, slope, bend = (column[code] for column in tables)
        return (value + unit * gap * (slope + gap * bend / 2)).astype(weights.dtype)

    return jax.lax.map(read, _chunks(weights, None)).reshape(-1)[: weights.size]


def _chunks(weights: Float[jax.Array, " n"], mass: Float[jax.Array, " n"] | None) -> tuple:
    """Weights and their mass in equal chunks of at most `CHUNK`; what fills up the last has no mass."""
    n = weights.size
    count = -(-n // CHUNK)
    count = next((c for c in range(count, 2 * count) if n % c == 0), count)
    short = -n % count
    if short:
        mass = jnp.ones(n, weights.dtype) if mass is None else mass
        weights, mass = jnp.pad(weights, (0, short), mode="edge"), jnp.pad(mass, (0, short))
    return tuple(None if a is None else a.reshape(count, -1) for a in (weights, mass))
