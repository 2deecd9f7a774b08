"""Tables beside their scale: what a leaf is when the two are multiplied, or the tables repeated until each has one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from palettax._typing import Array
from palettax.clustering.checks import as_host
from palettax.leaf.blocks import split_vectors
from palettax.leaf.dense import level_numbers, multiply_blocks, spread
from palettax.leaf.palettized_array import PalettizedArray


def has_levels(leaf: PalettizedArray) -> bool:
    """Whether the table holds levels, not numbers of the weight's dtype."""
    return np.dtype(leaf.lut.dtype) != leaf.dtype


def as_numpy(leaf: Any) -> Any:
    """A leaf, palettized or not, with NumPy arrays where they are concrete.

    Nothing is then compiled for its shape, and no product depends on who computes it.
    """
    return jax.tree.map(as_host, leaf)


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


def shift_tables(leaf: PalettizedArray, offset: Float[Array, "*scale"]) -> PalettizedArray:
    """The weight (entry - offset) · scale as tables of its own values, one for every scale.

    Args:
        leaf: of scalars, its table of numbers, with a scale; its zeros outside a mask stay zeros.
        offset: of the shape of the scale.

    Example:
        >>> lut, indices = np.array([[[[0.0], [9.0]]]], np.float32), np.eye(2, dtype=np.uint8)
        >>> leaf = PalettizedArray(lut, indices, np.array([[1.0], [2.0]], np.float32), nbits=1)
        >>> shift_tables(leaf, np.array([[3.0], [4.0]], np.float32)).depalettize().tolist()
        [[6.0, -3.0], [-8.0, 10.0]]
    """
    scale = np.asarray(leaf.scale)
    leaf = tables_per_scale(as_numpy(leaf))
    scale, offset = (spread(a, leaf.groups)[..., None, None] for a in (scale, np.asarray(offset)))
    return dataclasses.replace(leaf, lut=(leaf.lut - offset) * scale, scale=None)
