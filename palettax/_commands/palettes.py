"""Whether a table is valid, and every index that of the entry which is nearest to its weight."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from palettax.clustering.assignment import assign_groups
from palettax.leaf import PalettizedArray, as_numpy, level_numbers, scaled_lut, split_blocks, tables_per_scale

_ROUNDINGS = 4
"""How many roundings, of entry times scale, may stand between an index and the nearest entry."""


def faults_of(leaf: PalettizedArray) -> list[str]:
    """What is wrong with a table by itself: invariants, numbers that are not finite, indices outside it."""
    try:
        leaf.validate()
    except ValueError as error:
        return [str(error)]
    faults, lut = [], level_numbers(np, np.asarray(leaf.lut), np.dtype(np.float32))
    if (bad := int((~np.isfinite(lut)).sum())) or (leaf.scale is not None and not np.isfinite(leaf.scale).all()):
        faults.append(f"{bad} of its entries, or its scale, are not finite")
    if int(np.max(leaf.indices, initial=0)) >= lut.shape[-2]:
        faults.append(f"an index is outside its table of {lut.shape[-2]} entries")
    return faults


def misplaced(leaf: PalettizedArray, reference: np.ndarray) -> tuple[int, int]:
    """How many indices are not those of an entry nearest to the weights, and how many of them rounding cannot explain.

    Where there is a scale, or a table for every channel into which one may have been multiplied, entries were rounded
    once more after the indices were found.

    Args:
        leaf: a palettized array without faults.
        reference: the weights, of its shape.

    Example:
        >>> lut = np.array([-1.0, 0.5], np.float32).reshape(1, 1, 2, 1)
        >>> leaf = PalettizedArray(lut, np.array([[0, 1, 1]], np.uint8), nbits=1)
        >>> misplaced(leaf, np.array([[-2.0, 0.4, -0.9]], np.float32))
        (1, 1)
    """
    leaf = as_numpy(leaf)
    lut, multiplied = np.asarray(leaf.lut), leaf.scale is not None
    if multiplied:
        leaf = tables_per_scale(leaf)
        lut = np.asarray(scaled_lut(leaf))
    multiplied |= any(count == length > 1 for count, length in zip(leaf.groups, leaf.indices.shape, strict=True))
    tables = lut.astype(np.float64).reshape(-1, *lut.shape[-2:])
    wide = reference.astype(np.promote_types(reference.dtype, np.float32))
    rows = split_blocks(wide, leaf.groups, leaf.vector_axis, leaf.vector_size)
    scalars = leaf.vector_axis is None
    near = assign_groups(rows, np.asarray(tables[..., 0] if scalars else tables, rows.dtype), None)
    rows = np.asarray(rows).reshape(len(tables), -1, leaf.vector_size)
    own = np.asarray(split_blocks(leaf.indices, leaf.groups))
    far, best = (_distances(rows, tables, indices) for indices in (own, np.asarray(near)))
    wrong = far > best
    if leaf.mask is not None:
        wrong &= np.asarray(split_blocks(leaf.mask, leaf.groups))
    slack = _ROUNDINGS * float(jnp.finfo(leaf.dtype).eps) * np.abs(rows).max(axis=-1) if multiplied else 0.0
    return int(wrong.sum()), int((wrong & (far > best + slack)).sum())


def _distances(rows: np.ndarray, tables: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """How far every vector is from the entry that its index chooses."""
    entries = np.take_along_axis(tables, indices[..., None].astype(np.int64), axis=1)
    return np.sqrt(np.square(rows - entries).sum(axis=-1))
