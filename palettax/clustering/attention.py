"""Soft assignment of points to the entries of a table, in blocks of points: no (points, k) array is ever made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

BLOCK = 2**18
"""Pairs of a point and an entry that are in memory at a time: few enough for a cache."""

Scalar = Float[jax.Array, ""]


class Points(NamedTuple):
    """What is clustered: weights, vectors of weights, or buckets of weights that stand for many.

    Attributes:
        places: coordinates.
        mass: what a squared error costs at each coordinate.
        metric: `mass` over its mean at the point: how much a coordinate counts in distances. None for one everywhere.
        first: Σ mass · (weight - place) of the weights of a bucket; None for points that are weights themselves.
        second: Σ mass · (weight - place)² of them.
    """

    places: Float[jax.Array, "d n"]
    mass: Float[jax.Array, "d n"]
    metric: Float[jax.Array, "d n"] | None = None
    first: Float[jax.Array, " n"] | None = None
    second: Float[jax.Array, " n"] | None = None


def attention(
    points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar
) -> tuple[Float[jax.Array, "k n"], list[Float[jax.Array, "k n"]]]:
    """The softmax over entries of -|place - entry|² / temperature, and place - entry at each coordinate."""
    gaps = [x[None, :] - c[:, None] for x, c in zip(points.places, lut.T, strict=True)]
    metric = [1.0] * len(gaps) if points.metric is None else list(points.metric)
    distance = sum(m * gap**2 for m, gap in zip(metric, gaps, strict=True))
    nearest = jax.lax.stop_gradient(jnp.min(distance, axis=0))
    share = jnp.exp((nearest - distance) / temperature)
    return share / share.sum(axis=0), gaps


class Moments(NamedTuple):
    """What a table's entries attract, at each coordinate.

    Attributes:
        mass: Σ mass · attention.
        shift: Σ mass · attention · (place - entry).
    """

    mass: Float[jax.Array, "k d"]
    shift: Float[jax.Array, "k d"]


def moments(points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar) -> Moments:
    """The sums over all points that a step of k-means needs; over a bucket by Taylor's expansion about its place."""

    def of_block(block: Points) -> Moments:
        share, gaps = attention(block, lut, temperature)
        if block.first is None or block.second is None:
            parts = [(share * mass, gap) for mass, gap in zip(block.mass, gaps, strict=True)]
            return Moments(
                jnp.stack([own.sum(axis=1) for own, _ in parts], axis=1),
                jnp.stack([(own * gap).sum(axis=1) for own, gap in parts], axis=1),
            )
        entries, mass = lut[:, :1], block.mass[0]
        mean = (share * entries).sum(axis=0)
        pull = 2 / temperature * (entries - mean)  # share' = share · pull
        bend = (share * pull**2).sum(axis=0)  # share'' = share · (pull² - bend)
        # Where attention turns within a bucket, Taylor's expansion says nothing.
        second = jnp.minimum(block.second, mass / jnp.maximum(jax.lax.stop_gradient(bend), jnp.finfo(mass.dtype).tiny))
        own = share * (mass + block.first * pull + second / 2 * (pull**2 - bend))
        drift = share * (block.first + second * pull)
        return Moments(own.sum(axis=1)[:, None], (own * gaps[0] + drift).sum(axis=1)[:, None])

    return sum_blocks(of_block, points, lut.shape[0])


def step(points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar) -> Float[jax.Array, "k d"]:
    """One step of soft k-means: every entry moves to the mean of what it attracts; one that attracts nothing stays."""
    mass, shift = moments(points, lut, temperature)
    used = mass > 1e-30 * points.mass.sum()
    return lut + jnp.where(used, shift / jnp.where(used, mass, 1), 0)


def values_at(points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar) -> Float[jax.Array, "d n"]:
    """Σ attention · entry at every point."""

    def of_block(block: Points) -> jax.Array:
        share, _ = attention(block, lut, temperature)
        return jnp.stack([(share * entries[:, None]).sum(axis=0) for entries in lut.T])

    return map_blocks(of_block, points, lut.shape[0])


def cumulants_at(
    places: Float[jax.Array, " n"], lut: Float[jax.Array, " k"], temperature: Scalar
) -> Float[jax.Array, "3 n"]:
    """The value at every place and its first two derivatives there: the cumulants of the entries under attention."""

    def of_block(block: Points) -> jax.Array:
        share, _ = attention(block, lut[:, None], temperature)
        value = (share * lut[:, None]).sum(axis=0)
        spread = lut[:, None] - value
        rate = 2 / temperature
        return jnp.stack(
            [value, rate * (share * spread**2).sum(axis=0), rate * (rate * (share * spread**3).sum(axis=0))]
        )

    row = places[None]
    return map_blocks(of_block, Points(row, jnp.ones_like(row)), lut.shape[0])


def sum_blocks(function: Callable[[Points], Any], points: Points, k: int) -> Any:
    """The function of every block of points, summed; points that fill up the last block have no mass.

    What a block needs for its derivative is computed again, not kept.
    """
    own, blocks = jax.checkpoint(function), _blocks(points, k)
    if blocks.places.shape[0] == 1:
        return own(points)
    zero = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, jax.tree.map(lambda a: a[0], blocks))
    )
    return jax.lax.scan(lambda total, block: (jax.tree.map(jnp.add, total, own(block)), None), zero, blocks)[0]


def map_blocks(function: Callable[[Points], jax.Array], points: Points, k: int) -> jax.Array:
    """What the function says of every point, (rows, n): block after block, as `sum_blocks` goes."""
    own, blocks = jax.checkpoint(function), _blocks(points, k)
    if blocks.places.shape[0] == 1:
        return own(points)
    rows = jnp.moveaxis(jax.lax.map(own, blocks), 0, 1)
    return rows.reshape(rows.shape[0], -1)[:, : points.places.shape[1]]


def _blocks(points: Points, k: int) -> Points:
    """The points in equal blocks, one after the other on a new first axis."""
    n = points.places.shape[1]
    size = min(max(BLOCK // k, 1), n)
    count = -(-n // size)

    def cut(array: jax.Array) -> jax.Array:
        full = jnp.pad(array, [*[(0, 0)] * (array.ndim - 1), (0, count * size - n)])
        return jnp.moveaxis(full.reshape(*array.shape[:-1], count, size), -2, 0)

    return jax.tree.map(cut, points)
