"""Lookup tables out of a package, whoever made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np

from palettax.coreml.compare import same, same_after_rounding
from palettax.coreml.package import Op, op_name, open_model, operations, read_names, write_names
from palettax.leaf import PalettizedArray, unpack

_TABLE, _SPARSE, _SCALED = "constexpr_lut_to_dense", "constexpr_lut_to_sparse", "constexpr_blockwise_shift_scale"


def read_palettes(mlmodel: ct.models.MLModel | str | Path) -> dict[str, PalettizedArray]:
    """Read every lookup table of a package.

    Args:
        mlmodel: an mlprogram of any maker, or the path of one.

    Returns:
        The palettized weights in the dtype of the package, usually float16; quantized tables are de-quantized. Keys are
        dotted names where `from_torch` noted them, else the op's name without the suffixes of coremltools. Of two
        functions with different weights under one name, the second's begins with the function's name.

    Raises:
        ValueError: the model is no mlprogram, or a weight is in a form that is more than a table and a scale.
    """
    mlmodel = open_model(mlmodel)
    names = read_names(mlmodel)
    palettes: dict[str, PalettizedArray] = {}
    for function, op, leaf in _tables(mlmodel):
        for name in names.get(op, [op]):
            known = palettes.setdefault(name, leaf)
            if not same(known, leaf):
                palettes[f"{function}.{name}"] = leaf
    return palettes


def record_leaves(
    mlmodel: ct.models.MLModel, leaves: Mapping[str, PalettizedArray], op_names: Mapping[str, str | None]
) -> None:
    """Note in a fresh package which op holds which leaf.

    Args:
        mlmodel: what a conversion gave.
        leaves: the palettized weights that went in.
        op_names: the op that the conversion made of each, if it made one.

    Raises:
        ValueError: a leaf is not a table in the package.
    """
    ops = {op: leaf for _, op, leaf in _tables(mlmodel)} if leaves else {}
    names: dict[str, list[str]] = {}
    for name, leaf in leaves.items():
        made = op_names[name]
        # The pipeline merges equal weights: the leaf may live on under the name of its twin.
        twins = [op for op, found in ops.items() if same_after_rounding(leaf, found)] if made not in ops else []
        holder = made if made in ops else next(iter(twins), None) if made else None
        if holder is None:
            raise ValueError(
                f"{name}: it did not become a lookup table: the converter kept no constant that holds it, because the "
                "model does not use it or the converter computes with it; leave it dense"
            )
        names.setdefault(holder, []).append(name)
    write_names(mlmodel, names)


def _tables(mlmodel: ct.models.MLModel) -> list[tuple[str, str, PalettizedArray]]:
    """Function, op name and weight of every table."""
    found = []
    for function, op in operations(mlmodel):
        if op.op_type == _SPARSE:
            raise ValueError(f"{op_name(op.name)}: a sparse lookup table is no PalettizedArray; decompress it first")
        if op.op_type == _TABLE:
            found.append((function, op_name(op.name), _read(op)))
    return found


def _read(op: Op) -> PalettizedArray:
    """The weight of one table op, and of the scale behind it."""
    lut, indices, axis = _read_packed(op) if hasattr(op, "shape") else _read_unpacked(op)
    scale, offset = _scale_behind(op)
    if np.issubdtype(lut.dtype, np.integer):
        lut, scale = _dequantize(op, lut, scale, offset, axis), None
    elif offset is not None:
        raise ValueError(f"{op_name(op.name)}: a float table with an offset is no PalettizedArray; decompress it")
    nbits = lut.shape[-2].bit_length() - 1
    return PalettizedArray(lut, indices, scale, nbits=nbits, vector_axis=axis).validate()


def _read_packed(op: Op) -> tuple[np.ndarray, np.ndarray, None]:
    """The form before iOS18: a stream of bits, a flat table, a shape."""
    lut, shape = np.asarray(op.lut.val), tuple(int(n) for n in op.shape.val)
    indices = unpack(_plain(op.indices.val).reshape(-1), lut.size.bit_length() - 1, shape)
    return lut.reshape(*(1,) * len(shape), lut.size, 1), indices, None


def _read_unpacked(op: Op) -> tuple[np.ndarray, np.ndarray, int | None]:
    """The form of iOS18, whose table may be quantized in front of the op."""
    lut = op.lut.val if op.lut.val is not None else op.lut.op.materialized_val_inference()
    indices = _plain(op.indices.val)
    axis = int(op.vector_axis.val) % indices.ndim if lut.shape[-1] > 1 and op.vector_axis is not None else None
    return np.asarray(lut), indices, axis


def _plain(indices: Any) -> np.ndarray:
    """The indices without the tag by which coremltools knows their width."""
    return np.asarray(indices).astype(np.dtype(np.uint8))


def _scale_behind(op: Op) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Scale and offset of the op that scales the weight, if there is one."""
    users = op.outputs[0].child_ops
    scalers = [user for user in users if user.op_type == _SCALED]
    if not scalers:
        return None, None
    if len(users) > 1:
        raise ValueError(f"{op_name(op.name)}: it is used both with and without a scale; decompress it first")
    offset = scalers[0].offset
    return np.asarray(scalers[0].scale.val), None if offset is None else np.asarray(offset.val)


def _dequantize(
    op: Op, lut: np.ndarray, scale: np.ndarray | None, offset: np.ndarray | None, axis: int | None
) -> np.ndarray:
    """A table of integers, and the scale behind the op, as a table of floats."""
    groups = lut.shape[:-2]
    fits = scale is not None and all(g % s == 0 for g, s in zip(groups, scale.shape, strict=True))
    if scale is None or not fits:
        found = "no scale" if scale is None else f"a scale of shape {scale.shape}"
        raise ValueError(
            f"{op_name(op.name)}: an integer table in {groups} groups with {found} behind it is no PalettizedArray; "
            "decompress it first"
        )
    shift = np.zeros_like(scale) if offset is None else offset.astype(scale.dtype)
    return (lut.astype(scale.dtype) - _spread(shift, groups)[..., None, None]) * _spread(scale, groups)[..., None, None]


def _spread(values: np.ndarray, shape: Any) -> np.ndarray:
    """Repeat blockwise values along each axis up to a shape."""
    for axis, length in enumerate(shape):
        values = values.repeat(length // values.shape[axis], axis=axis)
    return values
