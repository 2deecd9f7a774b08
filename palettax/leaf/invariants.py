"""What must hold of the parts of a `PalettizedArray`. What depends on values is checked where there are values."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palettax._typing import NBITS, is_traced

NARROW = tuple(map(np.dtype, (jnp.int8, jnp.uint8, jnp.float8_e4m3fn, jnp.float8_e5m2)))
"""The dtypes of a table of levels, which needs a scale."""


def has_values(array: Any) -> bool:
    """Whether an array can be read: it is neither a tracer nor the mere shape of an array."""
    return array is not None and not is_traced(array) and not isinstance(array, jax.ShapeDtypeStruct)


def check_tables(lut: Any, indices: Any, nbits: int, vector_axis: int | None) -> None:
    """Ranks, entries, groups and vectors of the table against the indices.

    Raises:
        ValueError: naming the invariant that does not hold and what was found. So do the other checks.
    """
    if nbits not in NBITS:
        raise ValueError(f"nbits={nbits!r}; Core ML holds {NBITS}")
    rank, k = len(indices.shape), 2**nbits
    if len(lut.shape) != rank + 2:
        raise ValueError(f"lut {lut.shape} must have the rank of indices {indices.shape} plus 2: (*groups, k, vector)")
    *groups, entries, vector_size = lut.shape
    if entries != k:
        raise ValueError(f"lut {lut.shape} has {entries} entries; nbits={nbits} needs {k}")
    for axis, (count, length) in enumerate(zip(groups, indices.shape, strict=True)):
        if count < 1 or length % count:
            raise ValueError(f"{count} groups do not divide axis {axis} of indices {indices.shape}")
    if (vector_size == 1) != (vector_axis is None):
        raise ValueError(f"vector_size={vector_size} with vector_axis={vector_axis}: set both or neither")
    if vector_axis is not None and not 0 <= vector_axis < rank:
        raise ValueError(f"vector_axis={vector_axis} is not an axis of indices {indices.shape}")
    if np.dtype(indices.dtype) != np.uint8:
        raise ValueError(f"indices are {indices.dtype}; they must be uint8")
    if has_values(indices) and indices.size and int(np.asarray(indices).max()) >= k:
        raise ValueError(f"index {int(np.asarray(indices).max())} is outside the {k} entries of the lut")


def check_scale(lut: Any, scale: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """The dtypes of weight, table and scale, and the blocks of the scale."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"dtype={dtype} is no float; pass the dtype of the weight, which a lut of levels does not tell"
        )
    if lut.dtype != dtype and np.dtype(lut.dtype) not in NARROW:
        raise ValueError(f"lut is {lut.dtype}; it must be of the weight's dtype {dtype}, or one of {_names(NARROW)}")
    if scale is None:
        if lut.dtype != dtype:
            raise ValueError(f"lut is {lut.dtype} without a scale; levels of a {dtype} weight need one")
        return
    if np.dtype(scale.dtype) != dtype:
        raise ValueError(f"scale is {scale.dtype}; it must be of the weight's dtype {dtype}")
    if len(scale.shape) != len(shape):
        raise ValueError(f"scale {scale.shape} must have the rank of the weight {shape}")
    for axis, (blocks, length) in enumerate(zip(scale.shape, shape, strict=True)):
        if blocks != length and (blocks < 1 or length % blocks):
            raise ValueError(f"the {blocks} blocks of scale {scale.shape} do not divide axis {axis} of {shape}")


def check_mask(mask: Any, kept: Any, indices: Any, vector_size: int, dtype: np.dtype) -> None:
    """The mask against the weight, and the kept values against the mask."""
    if mask is None:
        if kept is not None:
            raise ValueError(f"kept {kept.shape} without a mask; the mask says where the kept values belong")
        return
    if vector_size > 1:
        raise ValueError(f"a mask with vector_size={vector_size}; a mask needs an index for each weight")
    if np.dtype(mask.dtype) != np.bool_ or mask.shape != indices.shape:
        raise ValueError(f"mask is {mask.dtype} {mask.shape}; it must be bool of the weight's shape {indices.shape}")
    if kept is not None and (np.dtype(kept.dtype) != dtype or len(kept.shape) != 1):
        raise ValueError(f"kept is {kept.dtype} {kept.shape}; it must be one row of the weight's dtype {dtype}")
    if not has_values(mask):
        return
    outside = ~np.asarray(mask)
    if kept is not None and kept.shape[0] != outside.sum():
        raise ValueError(f"{kept.shape[0]} kept values for the {int(outside.sum())} weights outside the mask")
    if has_values(indices) and np.asarray(indices)[outside].any():
        raise ValueError("an index outside the mask is not 0; it stands for nothing there: np.where(mask, indices, 0)")


def indices_stored(mask: Any, kept: Any, indices: Any) -> int:
    """How many indices are stored: all, but with a mask those of its Trues, as far as those can be counted."""
    size = math.prod(indices.shape)
    if has_values(mask):
        return int(np.count_nonzero(np.asarray(mask)))
    return size if kept is None else size - kept.shape[0]


def _names(dtypes: tuple[np.dtype, ...]) -> str:
    return ", ".join(dtype.name for dtype in dtypes)
