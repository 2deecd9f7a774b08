"""The weights of a program: their numbers, the ops that read them, and which axis is that of the outputs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Program, types

from palettax.coreml.package import Op, operations_of
from palettax.coreml.read_table import SCALE, SPARSE_SCALE, TO_DENSE, decompresses, plain
from palettax.leaf import spread
from palettax.report import LeafReport

_MIN_WEIGHT = 10  # coremltools keeps smaller constants in the program itself


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What is stored for a weight: numbers, less an offset, times a scale, with zeros outside a mask.

    Attributes:
        values: of the weight's shape, in the dtype of the program.
        scale: of the weight's rank, in equal blocks along each axis; None for 1.
        offset: of the shape of the scale; None for 0.
        mask: where the numbers are, True; None for everywhere.
    """

    values: np.ndarray
    scale: np.ndarray | None = None
    offset: np.ndarray | None = None
    mask: np.ndarray | None = None

    def dense(self) -> np.ndarray:
        """The weight."""
        weight, shape = self.values, self.values.shape
        if self.offset is not None:
            weight = weight - spread(self.offset, shape)
        if self.scale is not None:
            weight = weight * spread(self.scale, shape)
        return weight if self.mask is None else np.where(self.mask, weight, weight.dtype.type(0))


def weights_of(program: Program) -> Iterator[tuple[str, Op]]:
    """The ops that hold a weight: constants, and the last op of each chain that decompresses one.

    Args:
        program: a loaded program.

    Yields:
        The name of its function and the op. What only other decompressing ops read is a part of a weight, not one.
    """
    for function, op in operations_of(program):
        if is_weight(op) and not is_part(op):
            yield function, op


def named_weights(program: Program) -> Iterator[tuple[str, Op]]:
    """The weights of a program under names of their own: behind that of its function where one has the name."""
    taken: set[str] = set()
    for function, op in weights_of(program):
        name = op.name if op.name not in taken else f"{function}.{op.name}"
        taken.add(name)
        yield name, op


def is_constant(op: Op) -> bool:
    """Whether an op gives what does not depend on the inputs of the program."""
    return op.op_type == "const" or decompresses(op)


def is_part(op: Op) -> bool:
    """Whether only ops that decompress read a constant: it is a part of a weight, not one."""
    readers = op.outputs[-1].child_ops
    return bool(readers) and all(map(decompresses, readers))


def is_weight(op: Op) -> bool:
    """Whether an op holds a weight or a part of one: 10 floats or integers of a byte at least, or a compressed one."""
    if op.op_type != "const":
        return decompresses(op)
    value = op.outputs[0].val
    return (
        isinstance(value, np.ndarray)
        and value.size >= _MIN_WEIGHT
        and (is_floating(op) or value.dtype.name in ("int8", "uint8"))
    )


def is_floating(op: Op) -> bool:
    """Whether the values of an op are floats."""
    return types.is_float(op.outputs[0].dtype)


def numbers_of(op: Op) -> Numbers | None:
    """What is stored for a weight, in the forms that can be palettized.

    Args:
        op: one of `weights_of`.

    Returns:
        The numbers of a dense, a pruned or a quantized weight, or of one that is both; None for any other form.
    """
    if op.op_type == "const":
        return Numbers(np.asarray(op.outputs[0].val))
    if op.op_type == SCALE and op.data.val is not None:
        return _scaled(plain(op.data.val), op)
    if op.op_type != TO_DENSE or hasattr(op, "shape"):
        return None
    maker = op.nonzero_data.op
    if op.nonzero_data.val is not None:
        values, inside = _spread_out(op.nonzero_data.val, op.mask.val)
        return Numbers(values, mask=inside)
    if maker.op_type == SPARSE_SCALE and maker.nonzero_data.val is not None:
        values, inside = _spread_out(maker.nonzero_data.val, maker.data_mask.val)
        return dataclasses.replace(_scaled(values, maker), mask=inside)
    return None


def _spread_out(nonzero: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Numbers where a mask says, zeros elsewhere; and the mask."""
    inside = np.asarray(mask) != 0
    values = np.zeros(inside.shape, plain(nonzero).dtype)
    values[inside] = plain(nonzero) + values.dtype.type(0)  # -0 becomes 0
    return values, inside


def _scaled(data: np.ndarray, op: Op) -> Numbers:
    """Integers in the dtype of their scale: float16 holds all of a byte."""
    scale = plain(op.scale.val)
    offset = None if op.offset is None else plain(op.offset.val).astype(scale.dtype)
    return Numbers(data.astype(scale.dtype), scale, offset if offset is not None and offset.any() else None)


def output_axis(op: Op) -> int | None:
    """The axis of a weight that the outputs of the ops which read it lie along.

    Args:
        op: one of `weights_of`.

    Returns:
        1 for the weight of a transposed convolution, the last axis or the last but one for a factor of `matmul`, else
        0; None where the ops that read it differ in this.
    """
    var = op.outputs[-1]
    axes = {_output_axis(reader, var) for reader in var.child_ops}
    return axes.pop() if len(axes) == 1 else None


def _output_axis(reader: Op, var: Any) -> int:
    if reader.op_type == "conv_transpose":
        return 1
    if reader.op_type != "matmul":
        return 0
    on_the_right = reader.y is var
    transposed = bool((reader.transpose_y if on_the_right else reader.transpose_x).val)
    return var.rank - (2 if on_the_right == transposed else 1)


def parts_of(op: Op) -> int:
    """Into how many parts grouped convolutions cut the first axis of a weight; 1 for what other ops read."""
    readers = (reader for reader in op.outputs[-1].child_ops if reader.op_type in ("conv", "conv_transpose"))
    return max((int(reader.groups.val) for reader in readers), default=1)


def compressed_row(op: Op) -> LeafReport:
    """What a report says of a weight that stays compressed as it is."""
    var = op.outputs[0]
    size, nbytes = math.prod(var.shape), _stored_bytes(op)
    dtype = types.nptype_from_builtin(var.dtype)
    dense = size * np.dtype(dtype).itemsize
    return LeafReport(tuple(var.shape), np.dtype(dtype).name, None, (), 8 * nbytes / size, math.inf, nbytes, dense, "")


def _stored_bytes(op: Op) -> int:
    """The bytes of the constants that a weight is made from."""
    if op.op_type == "const":
        var = op.outputs[0]
        width = int(re.sub(r"\D", "", types.builtin_to_string(var.dtype)) or 8)
        return math.ceil(math.prod(var.shape) * width / 8)
    sources = (var for var in op.inputs.values() if getattr(var, "op", None) is not None)
    return sum(_stored_bytes(source) for source in {var.op for var in sources})
