"""Cutting a weight into the blocks that share a table, and joining them again."""

from __future__ import annotations

import math

from jaxtyping import Shaped

from palettax._typing import Array


def split_blocks(
    weights: Shaped[Array, "*shape"], groups: tuple[int, ...], vector_axis: int | None = None, vector_size: int = 1
) -> Shaped[Array, "blocks n *vector"]:
    """Cut a weight into equal blocks, one row each, in row-major order of the blocks.

    Args:
        weights: (*shape).
        groups: blocks per axis; each divides its axis.
        vector_axis: the axis along which `vector_size` consecutive weights are one vector; None for scalars.
        vector_size: d, which divides the block along that axis.

    Returns:
        (blocks, n) for scalars, (blocks, m, d) for vectors; within a block in the row-major order of the indices.

    Raises:
        ValueError: `vector_size` without `vector_axis`.

    Example:
        >>> import numpy as np
        >>> from palettax.leaf import split_blocks
        >>> split_blocks(np.arange(8).reshape(2, 4), (1, 2), vector_axis=0, vector_size=2).tolist()
        [[[0, 4], [1, 5]], [[2, 6], [3, 7]]]
    """
    if vector_axis is not None:
        vectors = split_vectors(weights, vector_axis, vector_size)
        blocks = math.prod(groups)
        return split_blocks(vectors, (*groups, 1)).reshape(blocks, vectors.size // blocks // vector_size, vector_size)
    if vector_size != 1:
        raise ValueError(f"vector_size={vector_size} without vector_axis; give both or neither")
    rank = weights.ndim
    cut = weights.reshape([d for g, length in zip(groups, weights.shape, strict=True) for d in (g, length // g)])
    return cut.transpose([*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]).reshape(math.prod(groups), -1)


def merge_blocks(
    rows: Shaped[Array, "blocks n *vector"],
    groups: tuple[int, ...],
    shape: tuple[int, ...],
    vector_axis: int | None = None,
) -> Shaped[Array, "*shape"]:
    """The inverse of `split_blocks`: `merge_blocks(split_blocks(x, g, a, d), g, x.shape, a) == x`.

    The indices of vectors, (blocks, m), are merged as scalars, to the shape that the indices have.

    Args:
        rows: (blocks, n), or (blocks, m, d) with a `vector_axis`.
        groups: blocks per axis.
        shape: of what is put together.
        vector_axis: the axis that the last axis of the rows lies along; None for scalars.

    Returns:
        (*shape).
    """
    if vector_axis is not None:
        blocks, m, d = rows.shape
        places = [length // d if a == vector_axis % len(shape) else length for a, length in enumerate(shape)]
        return join_vectors(merge_blocks(rows.reshape(blocks, m * d), (*groups, 1), (*places, d)), vector_axis)
    rank = len(shape)
    blocks = rows.reshape([*groups, *(length // g for g, length in zip(groups, shape, strict=True))])
    return blocks.transpose([a for i in range(rank) for a in (i, rank + i)]).reshape(shape)


def split_vectors(weights: Shaped[Array, "*shape"], axis: int, size: int) -> Shaped[Array, "*places size"]:
    """Take the vectors that lie along an axis out of it, to the end: (.., m·d, ..) -> (.., m, .., d)."""
    rank, shape = weights.ndim, weights.shape
    axis %= rank
    cut = weights.reshape([*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :]])
    return cut.transpose([*range(axis + 1), *range(axis + 2, rank + 1), axis + 1])


def join_vectors(vectors: Shaped[Array, "*places size"], axis: int) -> Shaped[Array, "*shape"]:
    """The inverse of `split_vectors`: (.., m, .., d) -> (.., m·d, ..)."""
    *shape, size = vectors.shape
    rank = len(shape)
    axis %= rank
    shape[axis] *= size
    return vectors.transpose([*range(axis + 1), rank, *range(axis + 1, rank)]).reshape(shape)
