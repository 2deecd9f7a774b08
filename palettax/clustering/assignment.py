"""The nearest entry of a lookup table, and the way back."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from palettax._typing import Array, is_traced
from palettax.clustering.checks import float64_stays, vectors_of
from palettax.clustering.exact import two_sum
from palettax.clustering.points import mass_rows
from palettax.clustering.rows import nearest_entries

UNROLL = 8
"""Entries that one compiled loop over the points compares."""


@float64_stays
def lookup(lut: Float[Array, "*lut"], indices: UInt8[Array, "*shape"]) -> Float[Array, ...]:
    """Expand indices: `lut[indices]`.

    Args:
        lut: (k,), or (k, vector_size); any float dtype.
        indices: uint8 (*shape), each below k.

    Returns:
        The values, of the lut's dtype: (*shape), with a vector lut (*shape[:-1], shape[-1] · vector_size).

    Example:
        >>> import numpy as np, palettax as px
        >>> px.lookup(np.array([-1.0, 0.5], np.float32), np.array([0, 1, 1], np.uint8)).tolist()
        [-1.0, 0.5, 0.5]
    """
    values = jnp.asarray(lut)[jnp.asarray(indices)]
    return values if lut.ndim == 1 else values.reshape(*indices.shape[:-1], -1)


@float64_stays
def assign(weights: Float[Array, "*shape"], lut: Float[Array, "*lut"]) -> UInt8[Array, ...]:
    """The nearest lut entry of every weight: `argmin_j |weight - lut[j]|`.

    Exact for scalars: a weight on either side of the true midpoint of two entries goes to that side, however the
    midpoint rounds; on it, to the smaller entry, and of equal entries to the one of lowest index. XLA takes subnormal
    numbers for 0.

    Args:
        weights: (*shape), any float dtype. NaN goes to some entry.
        lut: (k,) in any order, or (k, vector_size); k at most 256.

    Returns:
        uint8 (*shape), the last axis divided by vector_size.

    Raises:
        ValueError: more than 256 entries, or a last axis that vector_size does not divide.

    Example:
        >>> import numpy as np, palettax as px
        >>> px.assign(np.array([0.11, 0.19, 0.3], np.float32), np.array([0.0, 0.1, 0.2, 0.3], np.float32)).tolist()
        [1, 2, 3]
    """
    if lut.shape[0] > 256:
        raise ValueError(f"lut has {lut.shape[0]} entries; an index is one byte, so at most 256")
    dtype = jnp.promote_types(jnp.promote_types(weights.dtype, lut.dtype), jnp.float32)
    # Indices are constants to differentiation, and not every step to them has a derivative.
    weights, lut = (jax.lax.stop_gradient(jnp.asarray(a, dtype)) for a in (weights, lut))
    if lut.ndim == 2:
        vectors = vectors_of(weights, lut.shape[1])
        return nearest_vectors(vectors.reshape(-1, lut.shape[1]), None, lut).reshape(vectors.shape[:-1])
    order = jnp.argsort(lut)
    entries = lut[order]
    slot = jnp.searchsorted(_thresholds(entries), weights, side="left")
    return order[jnp.searchsorted(entries, entries, side="left")[slot]].astype(jnp.uint8)


def _thresholds(lut: Float[jax.Array, " k"]) -> Float[jax.Array, " k-1"]:
    """The largest value of the dtype that is no farther from each ascending entry than from the next."""
    total, error = two_sum(lut[:-1], lut[1:])
    halves, half_error = two_sum(lut[:-1] / 2, lut[1:] / 2)  # exact where the sum overflows
    large = jnp.isinf(total)
    middle, error = jnp.where(large, halves, total / 2), jnp.where(large, half_error, error)
    return jnp.where(error < 0, jnp.nextafter(middle, jnp.full_like(middle, -jnp.inf)), middle)


def assign_groups(
    weights: Float[Array, "groups n *vector"],
    lut: Float[Array, "groups k *vector"],
    sensitivity: Float[Array, "groups n *vector"] | None,
) -> UInt8[Array, "groups n"]:
    """The entry of least weighted error for every weight, or vector of weights, of every group."""
    if weights.ndim == 2:  # one weight has one sensitivity, which decides nothing
        if is_traced(weights) or is_traced(lut):
            return jax.vmap(assign)(jnp.asarray(weights), jnp.asarray(lut))
        # On the host nothing is compiled for the shape.
        points, entries = np.ascontiguousarray(weights), np.asarray(lut).astype(np.float64)
        order = np.argsort(entries, axis=1, kind="stable")
        slots = np.empty(points.shape, np.uint8)
        nearest_entries(points, mass_rows(None, len(points)), np.take_along_axis(entries, order, axis=1), slots)
        return np.take_along_axis(order, slots, axis=1).astype(np.uint8)
    axes = (0, None if sensitivity is None else 0, 0)
    return jax.vmap(nearest_vectors, axes)(jnp.asarray(weights), sensitivity, jnp.asarray(lut))


@jax.jit
def nearest_vectors(
    vectors: Float[Array, "m d"], sensitivity: Float[Array, "m d"] | None, lut: Float[Array, "k d"]
) -> UInt8[jax.Array, " m"]:
    """The entry of least error, weighted by coordinate, of every vector.

    Among equals that of least plain error, then the lowest.
    """
    dtype = jnp.promote_types(jnp.promote_types(vectors.dtype, lut.dtype), jnp.float32)
    mass = None if sensitivity is None else sensitivity.T.astype(dtype)
    near, _ = nearest(vectors.T.astype(dtype), mass, lut.astype(dtype), plain_ties=mass is not None)
    return near.astype(jnp.uint8)


def squared_errors(
    points: Float[Array, "d n"], mass: Float[Array, "d n"] | None, entry: Float[Array, " d"]
) -> Float[jax.Array, " n"]:
    """The weighted squared distance of every point to one entry."""
    squares = [(x - e) ** 2 for x, e in zip(points, entry, strict=True)]
    terms = squares if mass is None else [w * s for w, s in zip(mass, squares, strict=True)]
    return functools.reduce(operator.add, terms)


def nearest(
    points: Float[Array, "d n"],
    mass: Float[Array, "d n"] | None,
    lut: Float[Array, "k d"],
    *,
    plain_ties: bool = False,
) -> tuple[Int[jax.Array, " n"], Float[jax.Array, " n"]]:
    """The entry of least weighted error of every point, the lowest on ties, and that error.

    Coordinates first: the compiled loop over entries then runs over neighbouring points, and no (n, k) array is made.
    `plain_ties` lets the unweighted error decide between equals first.
    """
    k, unroll = lut.shape[0], min(UNROLL, lut.shape[0])
    # A repeated last entry is never nearer than the last.
    padded = jnp.pad(lut, ((0, -k % unroll), (0, 0)), mode="edge")
    far = jnp.full(points.shape[1], jnp.inf, points.dtype)

    def compare(chunk: jax.Array, state: tuple) -> tuple:
        near, least, plain = state
        entries = jax.lax.dynamic_slice_in_dim(padded, chunk * unroll, unroll)
        for offset, entry in enumerate(entries):
            error = squared_errors(points, mass, entry)
            nearer = error < least
            if plain_ties:
                distance = squared_errors(points, None, entry)
                nearer |= (error == least) & (distance < plain)
                plain = jnp.where(nearer, distance, plain)
            near = jnp.where(nearer, chunk * unroll + offset, near)
            least = jnp.where(nearer, error, least)
        return near, least, plain

    start = (jnp.zeros(far.shape, jnp.int32), far, far if plain_ties else None)
    return jax.lax.fori_loop(0, padded.shape[0] // unroll, compare, start)[:2]
