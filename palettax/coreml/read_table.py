"""One lookup table of a program, with the ops in front of it and behind it, as a `PalettizedArray`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from palettax.clustering.levels import ZERO_LEVEL
from palettax.coreml.package import Op, op_name
from palettax.leaf import PalettizedArray, spread, unpack
from palettax.leaf.blocks import join_vectors

SCALE, SPARSE_SCALE = "constexpr_blockwise_shift_scale", "constexpr_sparse_blockwise_shift_scale"
_SPARSE, TO_DENSE = "constexpr_lut_to_sparse", "constexpr_sparse_to_dense"
LOOKUPS = ("constexpr_lut_to_dense", _SPARSE)
"""The ops that a table is looked up by."""


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What an op does to numbers: (number - offset) · scale, in equal blocks along each axis.

    Attributes:
        scale: of the numbers' rank.
        offset: of the shape of the scale, or None.
        fills_zeros: it also scales the zeros between sparse numbers.
    """

    scale: np.ndarray
    offset: np.ndarray | None
    fills_zeros: bool = False


def decompresses(op: Op) -> bool:
    """Whether an op makes a constant from smaller ones when a model is loaded."""
    return op.op_type.startswith("constexpr_")


def lookup_of(op: Op) -> Op | None:
    """The op that looks up a weight in its table: this one, or one before it in a chain that decompresses the weight.

    Args:
        op: any.

    Returns:
        It, or None where there is none.
    """
    if op.op_type in LOOKUPS:
        return op
    if not decompresses(op):
        return None
    makers = (var.op for var in op.inputs.values() if getattr(var, "op", None) is not None)
    return next(filter(None, map(lookup_of, makers)), None)


def read_table(op: Op) -> PalettizedArray:
    """Read the weight that begins with a lookup.

    Args:
        op: one that looks up, dense or sparse.

    Returns:
        The weight in the dtype of the program.

    Raises:
        ValueError: it is in a form that a `PalettizedArray` does not have.
    """
    mask, axis = None, None
    if op.op_type == _SPARSE:
        indices, mask = _sparse_indices(op)
    elif hasattr(op, "shape"):
        shape = tuple(int(n) for n in op.shape.val)
        flat = np.asarray(op.lut.val)
        indices = unpack(plain(op.indices.val).reshape(-1), flat.size.bit_length() - 1, shape)
        return _leaf(flat.reshape(*(1,) * len(shape), flat.size, 1), indices)
    else:
        indices = plain(op.indices.val)
        if op.lut.shape[-1] > 1:
            axis = int(op.vector_axis.val) % indices.ndim
    behind = _behind(op)
    if op.lut.val is None:
        return _scaled_in_front(op, indices, axis, mask, behind)
    lut = plain(op.lut.val)
    if np.issubdtype(lut.dtype, np.integer):
        return _integers(op, lut, indices, axis, mask, behind)
    return _floats(op, lut, indices, axis, mask, behind)


def _floats(
    op: Op, lut: np.ndarray, indices: np.ndarray, axis: int | None, mask: np.ndarray | None, behind: Scaling | None
) -> PalettizedArray:
    """A table of floats and the scale behind it, if there is one."""
    if behind is not None and behind.offset is not None and behind.offset.any():
        raise ValueError(f"{op_name(op.name)}: a float table with an offset is no PalettizedArray; decompress it first")
    return _leaf(lut, indices, None if behind is None else behind.scale, axis, mask)


def _leaf(
    lut: np.ndarray,
    indices: np.ndarray,
    scale: np.ndarray | None = None,
    axis: int | None = None,
    mask: np.ndarray | None = None,
) -> PalettizedArray:
    """The array, in the dtype of its scale or else of its table."""
    nbits = lut.shape[-2].bit_length() - 1
    dtype = lut.dtype if scale is None else scale.dtype
    return PalettizedArray(lut, indices, scale, nbits=nbits, vector_axis=axis, mask=mask, dtype=dtype).validate()


def plain(values: Any) -> np.ndarray:
    """An array without the tag by which coremltools knows the width of its integers."""
    values = np.asarray(values)
    return values.astype(np.dtype(values.dtype.name))


def _sparse_indices(op: Op) -> tuple[np.ndarray, np.ndarray]:
    """Indices, 0 outside the mask, and the mask of a sparse lookup."""
    if op.lut.shape[-1] > 1:
        raise ValueError(f"{op_name(op.name)}: a sparse table of vectors is no PalettizedArray; decompress it first")
    mask = np.asarray(op.indices_mask.val) != 0
    indices = np.zeros(mask.shape, np.uint8)
    indices[mask] = plain(op.indices_nonzero_data.val)
    return indices, mask


def _behind(op: Op) -> Scaling | None:
    """What is done to the numbers that were looked up, if anything is."""
    found, dense = [], op.op_type != _SPARSE
    numbers = op.outputs[-1]
    while True:
        users = [user for user in numbers.child_ops if user.op_type in (SCALE, SPARSE_SCALE, TO_DENSE)]
        if not users:
            break
        if len(numbers.child_ops) > 1:
            raise ValueError(f"{op_name(op.name)}: it is used both with and without a scale; decompress it first")
        (user,) = users
        if user.op_type == TO_DENSE:
            dense = True
        else:
            offset = None if user.offset is None else plain(user.offset.val)
            found.append(Scaling(plain(user.scale.val), offset, dense and op.op_type == _SPARSE))
        numbers = user.outputs[-1]
    if len(found) > 1:
        raise ValueError(f"{op_name(op.name)}: a table behind two scales is no PalettizedArray; decompress it first")
    return found[0] if found else None


def _scaled_in_front(
    op: Op, indices: np.ndarray, axis: int | None, mask: np.ndarray | None, behind: Scaling | None
) -> PalettizedArray:
    """A table that an op makes, of levels if possible."""
    maker = op.lut.op
    if maker.op_type == SCALE and maker.data.val is not None and behind is None:
        offset = None if maker.offset is None else plain(maker.offset.val)
        levels = _levels(plain(maker.data.val), offset)
        scale = _scale_of_weight(plain(maker.scale.val), levels, indices, axis)
        if levels is not None and scale is not None:
            return _leaf(levels, indices, scale, axis, mask)
    return _floats(op, np.asarray(maker.materialized_val_inference()), indices, axis, mask, behind)


def _scale_of_weight(
    scale: np.ndarray, lut: np.ndarray | None, indices: np.ndarray, axis: int | None
) -> np.ndarray | None:
    """The scale of a table as one of the weight; None where it scales some entries unlike others."""
    if lut is None or scale.shape[-2] > 1 or scale.shape[-1] not in (1, lut.shape[-1]):
        return None
    scale = scale[..., 0, :]
    if axis is None or scale.shape[-1] == 1:
        return scale[..., 0]
    places = [indices.shape[a] if a == axis else blocks for a, blocks in enumerate(scale.shape[:-1])]
    return np.asarray(join_vectors(spread(scale, places), axis))


def _integers(
    op: Op,
    lut: np.ndarray,
    indices: np.ndarray,
    axis: int | None,
    mask: np.ndarray | None,
    behind: Scaling | None,
) -> PalettizedArray:
    """A table of integers and the scale behind it: levels, or else de-quantized."""
    name, groups = op_name(op.name), lut.shape[:-2]
    if behind is None:
        raise ValueError(f"{name}: an integer table without a scale is no PalettizedArray; decompress it first")
    scale, offset = behind.scale, behind.offset
    if behind.fills_zeros and offset is not None and offset.any():
        raise ValueError(f"{name}: sparse weights with an offset are no PalettizedArray; decompress it first")
    levels = _levels(lut, offset)
    if levels is not None:
        return _leaf(levels, indices, scale, axis, mask)
    if any(g % s for g, s in zip(groups, scale.shape, strict=True)):
        raise ValueError(
            f"{name}: an integer table in {groups} groups with offsets behind it and a scale of shape {scale.shape} is "
            "no PalettizedArray; decompress it first"
        )
    shift = np.zeros_like(scale) if offset is None else offset.astype(scale.dtype)
    entries = lut.astype(scale.dtype) - spread(shift, groups)[..., None, None]
    return _leaf(entries * spread(scale, groups)[..., None, None], indices, None, axis, mask)


def _levels(lut: np.ndarray, offset: np.ndarray | None) -> np.ndarray | None:
    """The integers as levels of a `PalettizedArray`; None where it has no such levels."""
    centred = offset is None or not offset.any()
    if lut.dtype == np.int8 and centred:
        return lut
    if lut.dtype != np.uint8:
        return None
    if not centred:
        return lut if (offset == ZERO_LEVEL).all() else None
    # coremltools stores a table without negative levels as unsigned ones about 0.
    return lut.astype(np.int8) if lut.max() <= np.iinfo(np.int8).max else None
