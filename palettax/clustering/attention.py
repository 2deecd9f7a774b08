"""Soft assignment of points to the entries of a table, in blocks of points: no (points, k) array is ever made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

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
        anchor: where one entry is to stay; NaN, and None, for no such place.
    """

    places: Float[jax.Array, "d n"]
    mass: Float[jax.Array, "d n"]
    metric: Float[jax.Array, "d n"] | None = None
    first: Float[jax.Array, " n"] | None = None
    second: Float[jax.Array, " n"] | None = None
    anchor: Scalar | None = None


def attention(
    points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar
) -> tuple[Float[jax.Array, "k n"], list[Float[jax.Array, "k n"]]]:
    """The softmax over entries of -|place - entry|² / temperature, and place - entry at each coordinate.

    At the coldest it is one for the nearest entry, the lowest on ties, and a constant to differentiation.
    """
    gaps = [x[None, :] - c[:, None] for x, c in zip(points.places, lut.T, strict=True)]
    metric = [1.0] * len(gaps) if points.metric is None else list(points.metric)
    distance = jnp.asarray(sum(m * gap**2 for m, gap in zip(metric, gaps, strict=True)))
    return shares(distance, temperature), gaps


@jax.custom_jvp
def shares(distance: Float[jax.Array, "k n"], temperature: Scalar) -> Float[jax.Array, "k n"]:
    """The softmax of -distance / temperature over the first axis; at the coldest, one for the first of the least."""

    def hard() -> jax.Array:
        nearest = jnp.arange(distance.shape[0])[:, None] == jnp.argmin(distance, axis=0)
        return nearest.astype(distance.dtype)

    def soft() -> jax.Array:
        least = distance.min(axis=0)
        share = jnp.exp((least - distance) / _resolved(temperature, least))
        return share / share.sum(axis=0)

    return jax.lax.cond(temperature <= coldest(distance.dtype), hard, soft)


@shares.defjvp
def _shares_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    distance, temperature = primals
    share, least = shares(distance, temperature), distance.min(axis=0)
    resolved = _resolved(temperature, least)
    rate = jnp.where(temperature > coldest(distance.dtype), 1 / resolved, 0)
    change = rate * ((distance - least) / resolved * tangents[1] - tangents[0])
    return share, share * (change - (share * change).sum(axis=0))


@jax.custom_jvp
def blended(share: Float[jax.Array, "k n"], entries: Float[jax.Array, " k"]) -> Float[jax.Array, " n"]:
    """Σ share · entry."""
    return (share * entries[:, None]).sum(axis=0)


@blended.defjvp
def _blended_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    share, entries = primals
    value = blended(share, entries)
    # Shares add up to one: what changes them counts by what sets entries apart, not by how far from zero they all are.
    return value, (tangents[0] * (entries[:, None] - value)).sum(axis=0) + (share * tangents[1][:, None]).sum(axis=0)


def _resolved(temperature: Scalar, least: Float[jax.Array, " n"]) -> Float[jax.Array, " n"]:
    """No colder than distances are resolved: compiled twice, they may differ in their last bits from their minimum."""
    return jnp.maximum(temperature, coldest(least.dtype) * least)


def coldest(dtype: np.dtype) -> float:
    """The least temperature, in squared widths of a cell; one below changes nothing that floats of a dtype resolve."""
    return 10 * float(jnp.finfo(dtype).eps)


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
        mass = block.mass[0]
        pull = 2 / temperature * (lut - blended(share, lut[:, 0]))  # share' = share · pull
        bend = (share * pull**2).sum(axis=0)  # share'' = share · (pull² - bend)
        # Where attention turns within a bucket, Taylor's expansion says nothing.
        limit = jax.lax.stop_gradient(mass / jnp.maximum(bend, jnp.finfo(mass.dtype).tiny))
        second = jnp.where(block.second <= limit, block.second, limit)
        own = share * (mass + block.first * pull + second / 2 * (pull**2 - bend))
        drift = share * (block.first + second * pull)
        return Moments(own.sum(axis=1)[:, None], (own * gaps[0] + drift).sum(axis=1)[:, None])

    return sum_blocks(of_block, points, lut.shape[0])


def step(points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar) -> Float[jax.Array, "k d"]:
    """One step of soft k-means: every entry moves to the mean of what it attracts; one that attracts nothing stays."""
    mass, shift = moments(points, lut, temperature)
    used = attracts(points, mass)
    # In units of the mass itself: the derivative of a quotient divides by a square, which small masses do not have.
    unit = jax.lax.stop_gradient(1 / jnp.where(used, mass, 1))
    return anchored(points, lut + jnp.where(used, shift * unit / jnp.where(used, mass * unit, 1), 0))


def attracts(points: Points, mass: Float[jax.Array, "k d"]) -> Bool[jax.Array, "k d"]:
    """Where the mass that entries attract is worth dividing by."""
    return mass > 1e-30 * points.mass.sum()


def is_anchored(points: Points, lut: Float[jax.Array, "k d"]) -> Bool[jax.Array, "k 1"]:
    """The entry that is to stay at the anchor: the nearest to it."""
    if points.anchor is None:
        return jnp.zeros((lut.shape[0], 1), bool)
    nearest = jnp.arange(lut.shape[0]) == abs(lut[:, 0] - points.anchor).argmin()
    return (nearest & jnp.isfinite(points.anchor))[:, None]


def anchored(points: Points, lut: Float[jax.Array, "k d"]) -> Float[jax.Array, "k d"]:
    """The table with an entry at the anchor, if there is one."""
    return lut if points.anchor is None else jnp.where(is_anchored(points, lut), points.anchor, lut)


def values_at(
    points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar, table: Float[jax.Array, "k d"]
) -> Float[jax.Array, "d n"]:
    """Σ attention · entry at every point: attention of the lut, entries of the table it stands for."""

    def of_block(block: Points) -> jax.Array:
        share, _ = attention(block, lut, temperature)
        return jnp.stack([blended(share, entries) for entries in table.T])

    return map_blocks(of_block, points, lut.shape[0])


def cumulants_at(
    places: Float[jax.Array, " n"], lut: Float[jax.Array, " k"], temperature: Scalar, table: Float[jax.Array, " k"]
) -> Float[jax.Array, "3 n"]:
    """The value at every place, and its first two derivatives there: cumulants of the entries under attention.

    The value is in the units of the table, derivatives are in those of the lut that it stands for.
    """

    def of_block(block: Points) -> jax.Array:
        share, _ = attention(block, lut[:, None], temperature)
        spread = lut[:, None] - blended(share, lut)
        value, rate = blended(share, table), 2 / temperature
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
    n, points = points.places.shape[1], points._replace(anchor=None)
    size = min(max(BLOCK // k, 1), n)
    count = -(-n // size)

    def cut(array: jax.Array) -> jax.Array:
        full = jnp.pad(array, [*[(0, 0)] * (array.ndim - 1), (0, count * size - n)])
        return jnp.moveaxis(full.reshape(*array.shape[:-1], count, size), -2, 0)

    return jax.tree.map(cut, points)
