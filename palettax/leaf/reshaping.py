"""A palettized weight in another shape."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Shaped

from palettax._typing import Array
from palettax.leaf.dense import group_numbers


def reshape_blocks(blocks: Shaped[Array, ...], shape: tuple[int, ...], new: tuple[int, ...]) -> Shaped[Array, ...]:
    """What belongs to equal blocks of a weight, by the equal blocks of the weight in another shape.

    Args:
        blocks: one entry a block along the first axes, as many as the weight has.
        shape: of the weight: blocks of an axis divide it.
        new: the shape that it is given.

    Returns:
        The same, with as few blocks along each axis of the new shape as can be: entries are repeated, never merged.

    Example:
        >>> reshape_blocks(np.array([[1, 2]]), (2, 4), (8,)).tolist()
        [1, 2, 1, 2]
    """
    rank, counts = len(shape), tuple(blocks.shape[: len(shape)])
    flat = blocks.reshape((math.prod(counts), *blocks.shape[rank:]))
    if len(flat) == 1:
        return flat.reshape((*(1,) * len(new), *flat.shape[1:]))
    number = np.broadcast_to(group_numbers(np, counts, shape), shape).reshape(new)
    number = fewest_blocks(number, len(new))
    return flat[number.reshape(-1)].reshape((*number.shape, *flat.shape[1:]))


def fewest_blocks(blocks: Shaped[np.ndarray, ...], rank: int) -> Shaped[np.ndarray, ...]:
    """What belongs to equal blocks of a weight, blocks beside each other made one where it is the same for all.

    Args:
        blocks: one entry a block along the first axes.
        rank: how many axes those are.

    Example:
        >>> fewest_blocks(np.array([[1, 1, 2, 2], [1, 1, 2, 2]]), 2).tolist()
        [[1, 2]]
    """
    for axis in range(rank):
        blocks = blocks[(slice(None),) * axis + (slice(None, None, _block_size(blocks, axis)),)]
    return blocks


def _block_size(values: Shaped[np.ndarray, ...], axis: int) -> int:
    """The longest equal blocks along an axis in which nothing changes."""
    length = values.shape[axis]
    rows = np.moveaxis(values, axis, 0).reshape(length, -1)
    edges = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1
    return math.gcd(length, *edges.tolist())


def axis_of_vectors(shape: tuple[int, ...], axis: int, size: int, new: tuple[int, ...]) -> int:
    """The axis of a new shape that whole vectors of the old one lie along.

    Args:
        shape: of the weight.
        axis: the one that its vectors lie along.
        size: of a vector.
        new: the shape that the weight is given.

    Raises:
        ValueError: there is none.
    """
    step = math.prod(shape[axis + 1 :])
    for candidate, length in enumerate(new):
        if math.prod(new[candidate + 1 :]) == step and length % size == 0 and length > 1:
            return candidate
    raise ValueError(
        f"reshaping {shape} to {new} would tear its vectors of {size} along axis {axis} apart; "
        "palettize along another axis, or without vectors"
    )
