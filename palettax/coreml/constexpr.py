"""What the ops that decompress weights give, however they are chained."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from palettax.coreml.package import Op
from palettax.coreml.read_table import LOOKUPS, plain
from palettax.leaf import PalettizedArray


def value_of(var: Any) -> np.ndarray:
    """The value of a constant, or of what decompressing ops make from constants.

    Args:
        var: a variable of a program that does not depend on its inputs.

    Returns:
        An array of NumPy's own dtypes: sub-byte integers in bytes.
    """
    if var.val is not None:
        return plain(var.val)
    return _outputs(var.op)[var.op.outputs.index(var)]


def _outputs(op: Op) -> tuple[np.ndarray, ...]:
    """All that an op gives, with the arithmetic of coremltools, but for lookups: that expands tables per weight."""
    if op.op_type == "constexpr_cast":
        return (value_of(op.source_val).astype(np.float32),)
    given: dict[str, Any] = {name: None if var is None else value_of(var) for name, var in op.inputs.items()}
    if op.op_type not in LOOKUPS or "shape" in given:
        # Its static methods know the parameters by the names of the op's inputs.
        names = inspect.signature(op.decompress).parameters
        found = op.decompress(**{name: given.get(name) for name in names})
        return found if isinstance(found, tuple) else (found,)
    lut, axis, mask = given["lut"], given.get("vector_axis", 0), given.get("indices_mask")
    if mask is None:
        return (_looked_up(lut, given["indices"], axis),)
    indices = np.zeros(mask.shape, np.uint8)
    indices[mask != 0] = given["indices_nonzero_data"]
    mask = mask if lut.shape[-1] == 1 else mask.repeat(lut.shape[-1], axis=int(axis))
    return mask, _looked_up(lut, indices, axis)[mask != 0]


def _looked_up(lut: np.ndarray, indices: np.ndarray, vector_axis: Any) -> np.ndarray:
    axis = None if lut.shape[-1] == 1 else int(vector_axis) % indices.ndim
    leaf = PalettizedArray(lut, indices, nbits=lut.shape[-2].bit_length() - 1, vector_axis=axis, dtype=lut.dtype)
    return np.asarray(leaf.depalettize())
