"""Graph passes over the constants of a program: none becomes infinite in float16, none is stored repeated."""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Program
from coremltools.converters.mil.mil.ops.defs.iOS15.elementwise_binary import elementwise_binary
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.helper import block_context_manager
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

from palettax.coreml.inject import mb, replace_op
from palettax.coreml.package import Op
from palettax.coreml.read_table import decompresses

BROADCAST_PASS, CLIP_PASS = "palettax::leave_to_broadcasting", "palettax::clip_to_half"
_LARGEST_HALF = float(np.finfo(np.float16).max)


@register_pass(namespace="palettax", override=True)
class clip_to_half(AbstractGraphPass):
    """Let no number become infinite in float16: the float32 minimum of a mask would, and zero times that is NaN."""

    def apply(self, prog: Program) -> None:
        """Rewrite the program in place, as coremltools' passes do."""
        for function in prog.functions.values():
            _clip(function)


@register_pass(namespace="palettax", override=True)
class leave_to_broadcasting(AbstractGraphPass):
    """Store no constant repeated where the ops that read it can broadcast it."""

    def apply(self, prog: Program) -> None:
        """Rewrite the program in place, as coremltools' passes do."""
        for function in prog.functions.values():
            _leave(function)


@block_context_manager
def _clip(block: Any) -> None:
    for op in list(block.operations):
        for inner in op.blocks:
            _clip(inner)
        value: Any = op.outputs[0].val if op.op_type == "const" else None
        if getattr(value, "dtype", None) != np.float32 or any(map(decompresses, op.outputs[0].child_ops)):
            continue
        clipped = np.where(np.isfinite(value), np.clip(value, -_LARGEST_HALF, _LARGEST_HALF), value).astype(np.float32)
        if not np.array_equal(clipped, value, equal_nan=True):
            replace_op(op, mb.const(val=clipped, name=op.name, before_op=op))


@block_context_manager
def _leave(block: Any) -> None:
    for op in list(block.operations):
        for inner in op.blocks:
            _leave(inner)
        _leave_to_broadcasting(op)


def _leave_to_broadcasting(op: Op) -> None:
    """Let ops broadcast the constant that a tile repeats to the shape of what they combine it with."""
    if op.op_type != "tile" or op.x.val is None or op.outputs[0] in op.enclosing_block.outputs:
        return
    tiled, readers = op.outputs[0], op.outputs[0].child_ops
    spread = op.x.rank == tiled.rank and all(n == 1 or n == m for n, m in zip(op.x.shape, tiled.shape, strict=True))
    others = [[var for var in _operands(reader) if var is not tiled] for reader in readers]
    if spread and all(any(var.shape == tiled.shape for var in vars) for vars in others):
        replace_op(op, op.x)


def _operands(op: Op) -> tuple[Any, ...]:
    """What an op that broadcasts combines, element by element; nothing of other ops."""
    if op.op_type == "select":
        return op.a, op.b
    return (op.inputs["x"], op.inputs["y"]) if isinstance(op, elementwise_binary) else ()
