"""The arithmetic from tables and indices back to weights. `xp` is NumPy or jax.numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

from palettax._typing import Array
from palettax.clustering.levels import ZERO_LEVEL


def same_bits(one: Any, other: Any) -> bool:
    """Whether two arrays have one shape, one dtype and the same bits; None equals None.

    Args:
        one: an array or None.
        other: an array or None.

    Returns:
        The answer; -0 differs from 0, and a NaN equals the same NaN.

    Example:
        >>> same_bits(np.zeros(2), -np.zeros(2))
        False
    """
    if one is None or other is None:
        return one is other
    one, other = np.asarray(one), np.asarray(other)
    return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()


def group_numbers(xp: Any, groups: tuple[int, ...], shape: tuple[int, ...]) -> Int[Array, "*shape"]:
    """Which table each place of an index array reads, the tables counted in row-major order; broadcasts to it."""
    rank = len(shape)
    number = xp.zeros((1,) * rank, np.int32)
    for axis, (count, length) in enumerate(zip(groups, shape, strict=True)):
        block = xp.arange(length, dtype=np.int32) // (length // count)
        number = number * count + block.reshape([-1 if a == axis else 1 for a in range(rank)])
    return number


def level_numbers(xp: Any, lut: Num[Array, "*groups k vector"], dtype: np.dtype) -> Float[Array, "*groups k vector"]:
    """The table in the dtype of the weight: levels as the numbers they are, unsigned ones about their zero."""
    if lut.dtype == dtype:
        return lut
    # Without x64, JAX warns of a float64 that it would make a float32.
    values = lut.astype(dtype if xp is np else jax.dtypes.canonicalize_dtype(dtype))
    return values - values.dtype.type(ZERO_LEVEL) if lut.dtype == np.uint8 else values


def multiply_blocks(weight: Float[Array, "*shape"], scale: Float[Array, "*scale"]) -> Float[Array, "*shape"]:
    """Multiply each block of a weight by its scale: the shape of the scale counts blocks per axis."""
    cut = [d for s, n in zip(scale.shape, weight.shape, strict=True) for d in (s, n // max(s, 1))]
    return (weight.reshape(cut) * scale.reshape([d for s in scale.shape for d in (s, 1)])).reshape(weight.shape)


def multiply_scales(one: Float[Array, "*one"], other: Float[Array, "*other"]) -> Float[Array, "*both"]:
    """The scale that is two scales, one after the other: as many blocks per axis as both divide."""
    counts = [math.lcm(a, b) for a, b in zip(one.shape, other.shape, strict=True)]
    return spread(one, counts) * spread(other, counts)


def spread(values: Shaped[Array, ...], counts: Sequence[int]) -> Shaped[Array, ...]:
    """Repeat blockwise values along the first axes up to those counts.

    Example:
        >>> spread(np.array([1, 2]), [4]).tolist()
        [1, 1, 2, 2]
    """
    for axis, count in enumerate(counts):
        values = values.repeat(count // values.shape[axis], axis=axis)
    return values


def fill_kept(
    xp: Any, weight: Float[Array, "*shape"], mask: Bool[Array, "*shape"], kept: Float[Array, " kept"] | None
) -> Float[Array, "*shape"]:
    """Put the kept values, or zeros, where the mask is False."""
    if kept is None or kept.shape[0] == 0:
        return xp.where(mask, weight, weight.dtype.type(0))
    # The place of each False among the Falses; elsewhere whatever comes last, which is not used.
    place = xp.cumsum(~mask.reshape(-1)) - 1
    return xp.where(mask, weight, kept[place].reshape(mask.shape))


def kept_order(mask: Bool[np.ndarray, "*shape"], moved: Shaped[np.ndarray, ...]) -> Int[np.ndarray, " kept"]:
    """Where each kept value was before the weights moved.

    Args:
        mask: before the move.
        moved: the positions `arange(size)` of the weights, moved as the weights are.

    Returns:
        Positions in `kept`, in its new order.
    """
    place = np.cumsum(~mask.reshape(-1)) - 1
    old = moved.reshape(-1)
    return place[old[~mask.reshape(-1)[old]]]


def whole_blocks(
    order: Int[np.ndarray, " length"], blocks: int, axis: int, noun: str, ordered: bool = True
) -> Int[np.ndarray, " blocks"]:
    """Which old block each of the new consecutive blocks is.

    Args:
        order: a permutation of the axis.
        blocks: how many blocks the axis has.
        axis: for the message.
        noun: what the blocks are, for the message.
        ordered: the order within a block must stay too.

    Returns:
        The old block of each new one.

    Raises:
        ValueError: the order mixes blocks.
    """
    size = order.size // blocks
    rows = order.reshape(blocks, size)
    if not ordered:
        rows = np.sort(rows, axis=1)
    if (rows != rows[:, :1] // size * size + np.arange(size)).any():
        raise ValueError(
            f"reordering axis {axis} would tear its {blocks} {noun} of {size} apart; palettize along another axis"
        )
    return rows[:, 0] // size
