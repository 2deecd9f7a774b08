"""Equality of palettized weights, on bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from palettax.leaf import PalettizedArray, as_numpy, has_levels, same_bits


def same(one: PalettizedArray, other: PalettizedArray) -> bool:
    """Whether two palettized weights are the same in every part."""
    static = (one.nbits, one.vector_axis) == (other.nbits, other.vector_axis)
    parts = ("lut", "indices", "scale", "mask", "kept")
    return static and all(same_bits(getattr(one, part), getattr(other, part)) for part in parts)


def same_after_rounding(ours: PalettizedArray, found: PalettizedArray) -> bool:
    """Whether a weight from a package is ours, once ours is rounded to the package's dtype."""
    return same(rounded(ours, found.dtype), found)


def rounded(leaf: PalettizedArray, dtype: Any) -> PalettizedArray:
    """The leaf in another dtype, such as that of a package, as NumPy arrays.

    Args:
        leaf: a palettized weight without kept values.
        dtype: of floats.

    Returns:
        The leaf; its indices, its mask, and a table of levels are unchanged.
    """

    def convert(values: Any) -> np.ndarray:
        # A program's constants are float32 before they are float16: rounding once from float64 could differ.
        with np.errstate(over="ignore"):
            return np.asarray(values).astype(np.float32).astype(dtype)

    leaf = as_numpy(leaf)
    return dataclasses.replace(
        leaf,
        lut=leaf.lut if has_levels(leaf) else convert(leaf.lut),
        scale=None if leaf.scale is None else convert(leaf.scale),
        dtype=np.dtype(dtype),
    )
