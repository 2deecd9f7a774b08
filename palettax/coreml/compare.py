"""Equality of palettized weights, on bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from palettax.leaf import PalettizedArray


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
    one, other = np.ascontiguousarray(one), np.ascontiguousarray(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    unsigned = f"u{one.dtype.itemsize}"
    return bool(np.array_equal(one.view(unsigned), other.view(unsigned)))


def same(one: PalettizedArray, other: PalettizedArray) -> bool:
    """Whether two palettized weights are the same in every part."""
    static = (one.nbits, one.vector_axis) == (other.nbits, other.vector_axis)
    parts = ("lut", "indices", "scale", "mask", "kept")
    return static and all(same_bits(getattr(one, part), getattr(other, part)) for part in parts)


def same_after_rounding(ours: PalettizedArray, found: PalettizedArray) -> bool:
    """Whether a weight from a package is ours, once ours is rounded to the package's dtype."""
    return same(rounded(ours, found.dtype), found)


def rounded(leaf: PalettizedArray, dtype: Any) -> PalettizedArray:
    """The leaf in the dtype of a package, as NumPy arrays.

    Args:
        leaf: a palettized weight without a mask, its table in its own dtype.
        dtype: float16 or float32.

    Returns:
        The leaf; its indices are unchanged.
    """

    def convert(values: Any) -> np.ndarray:
        # A program's constants are float32 before they are float16: rounding once from float64 could differ.
        return np.asarray(values).astype(np.float32).astype(dtype)

    return dataclasses.replace(
        leaf,
        lut=convert(leaf.lut),
        indices=np.asarray(leaf.indices),
        scale=None if leaf.scale is None else convert(leaf.scale),
        dtype=np.dtype(dtype),
    )
