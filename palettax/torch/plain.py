"""The forms of a palettized weight that the adapters hand on, and tables beside their scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Shaped

from palettax._typing import Array
from palettax.leaf import PalettizedArray, level_numbers
from palettax.leaf.blocks import split_vectors
from palettax.leaf.dense import multiply_blocks

_LEVELS = (np.dtype(np.int8), np.dtype(np.uint8))


def check_plain(name: str, leaf: PalettizedArray, *, blocked_scale: bool) -> None:
    """Refuse what torch's buffers and Core ML's tables here do not hold.

    Args:
        name: of the leaf, for messages.
        leaf: a palettized weight.
        blocked_scale: a scale may have any blocks, not only those that torch's buffers can say.

    Raises:
        ValueError: the leaf has kept values, a table of float8, or a scale in blocks that is not allowed.
    """
    if leaf.kept is not None:
        raise ValueError(
            f"{name}: it has kept values, and weights outside a table are handed on only where they are zero; "
            "expand it with px.depalettize, or build it without them"
        )
    if leaf.lut.dtype != leaf.dtype and np.dtype(leaf.lut.dtype) not in _LEVELS:
        raise ValueError(
            f"{name}: its lut holds {leaf.lut.dtype} levels, and only int8, uint8 and tables in the weight's own "
            f"{leaf.dtype} are handed on; expand it with px.depalettize, or build it with one of those"
        )
    if leaf.scale is not None and not blocked_scale and not _has_buffer(leaf, leaf.scale.shape):
        raise ValueError(
            f"{name}: its scale {tuple(leaf.scale.shape)} has blocks along the weight {leaf.shape}, and torch's "
            "buffers hold one that broadcasts; expand it with px.depalettize, or build it with one scale per channel"
        )


def _has_buffer(leaf: PalettizedArray, scale: tuple[int, ...]) -> bool:
    """Whether torch has buffers for the scale: behind a float table it broadcasts, or tables of levels carry it."""
    if broadcasts(scale, leaf.shape):
        return True
    return has_levels(leaf) and all(n % s == 0 for n, s in zip(leaf.indices.shape, scale, strict=True))


def has_levels(leaf: PalettizedArray) -> bool:
    """Whether the table holds levels, not numbers of the weight's dtype."""
    return np.dtype(leaf.lut.dtype) != leaf.dtype


def as_numpy(leaf: PalettizedArray) -> PalettizedArray:
    """The leaf with NumPy arrays, so that no product depends on who computes it."""
    return jax.tree.map(np.asarray, leaf)


def broadcasts(scale: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a scale of the weight's rank broadcasts to the weight.

    Args:
        scale: its shape.
        shape: that of the weight.

    Returns:
        The answer.

    Example:
        >>> broadcasts((4, 1), (4, 6)), broadcasts((2, 1), (4, 6))
        (True, False)
    """
    return all(blocks in (1, length) for blocks, length in zip(scale, shape, strict=True))


def spread(values: Shaped[np.ndarray, ...], counts: Sequence[int]) -> Shaped[np.ndarray, ...]:
    """Repeat blockwise values along the first axes up to those counts.

    Example:
        >>> spread(np.array([1, 2]), [4]).tolist()
        [1, 1, 2, 2]
    """
    for axis, count in enumerate(counts):
        values = values.repeat(count // values.shape[axis], axis=axis)
    return values


def table_scale(leaf: PalettizedArray) -> Float[Array, "*groups k vector"] | None:
    """The scale of the weight as one of its tables, if each table has one.

    Args:
        leaf: with a scale.

    Returns:
        Of the table's rank. The last axis has a length above 1 where each place of a vector has a scale of its own.
        None: some table stands behind several scales.

    Example:
        >>> lut, indices = np.zeros((2, 1, 2, 1), np.int8), np.zeros((4, 3), np.uint8)
        >>> scales = np.ones((2, 1), np.float32), np.ones((4, 1), np.float32)
        >>> leaves = [PalettizedArray(lut, indices, scale, nbits=1, dtype=np.float32) for scale in scales]
        >>> [scale if scale is None else scale.shape for scale in map(table_scale, leaves)]
        [(2, 1, 1, 1), None]
    """
    scale, axis = np.asarray(leaf.scale), leaf.vector_axis
    vectors = scale[..., None]
    if axis is not None and scale.shape[axis] == leaf.shape[axis] and leaf.groups[axis] == leaf.indices.shape[axis]:
        vectors = split_vectors(scale, axis, leaf.vector_size)
    if any(g % s for g, s in zip(leaf.groups, vectors.shape[:-1], strict=True)):
        return None
    return vectors[..., None, :]


def scaled_lut(leaf: PalettizedArray) -> Float[Array, "*groups k vector"] | None:
    """The table of a leaf multiplied with its scale, in the weight's dtype; None where some table has several scales.

    Its entries are the weights bit for bit: either way, one product is rounded.
    """
    scale = table_scale(leaf)
    return None if scale is None else multiply_blocks(level_numbers(np, np.asarray(leaf.lut), leaf.dtype), scale)


def tables_per_scale(leaf: PalettizedArray) -> PalettizedArray:
    """The same weight with its tables repeated, until none stands behind several scales.

    Args:
        leaf: with a scale.

    Returns:
        A leaf that has a `table_scale`. Along the axis of vectors that straddle scales, the scale has full length.

    Example:
        >>> lut, indices = np.zeros((2, 1, 2, 1), np.int8), np.zeros((4, 3), np.uint8)
        >>> leaf = PalettizedArray(lut, indices, np.ones((4, 1), np.float32), nbits=1, dtype=np.float32)
        >>> tables_per_scale(leaf).groups
        (4, 1)
    """
    scale, counts = np.asarray(leaf.scale), list(leaf.groups)
    for axis, places in enumerate(leaf.indices.shape):
        blocks = scale.shape[axis]
        if places % blocks == 0:
            counts[axis] = math.lcm(counts[axis], blocks)
        else:
            counts[axis] = places
            scale = scale.repeat(leaf.shape[axis] // blocks, axis=axis)
    return dataclasses.replace(leaf, lut=spread(np.asarray(leaf.lut), counts), scale=scale)
