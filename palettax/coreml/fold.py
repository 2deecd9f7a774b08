"""A graph pass that moves a weight before the program would: transposed, reshaped or reversed, a table stays one."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Program
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.helper import block_context_manager
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

from palettax.coreml.inject import mb, replace_op, table_op
from palettax.coreml.moves import Move, moved
from palettax.coreml.package import Op
from palettax.coreml.read import table_name
from palettax.coreml.read_table import lookup_of, read_table

FOLD_PASS = "palettax::fold_moves"
_SLACK = 4096
"""Bytes of tables that are worth less than an op."""


@register_pass(namespace="palettax", override=True)
class fold_moves(AbstractGraphPass):
    """Do to every table what the program does to its weight.

    Attributes:
        moves: an option, which is told what was done, by the op's name.
        dense: an option, constants that keep their names when the same is done to them.
    """

    moves: dict[str, list[Move]] | None = None
    dense: Container[str] = ()

    def apply(self, prog: Program) -> None:
        """Rewrite the program in place, as coremltools' passes do."""
        for function in prog.functions.values():
            _fold(function, {} if self.moves is None else self.moves, self.dense)


@block_context_manager
def _fold(block: Any, moves: dict[str, list[Move]], dense: Container[str]) -> None:
    for op in list(block.operations):
        for inner in op.blocks:
            _fold(inner, moves, dense)
        while (var := _fold_one(op, moves, dense)) is not None:
            op = var.op


def _fold_one(op: Op, moves: dict[str, list[Move]], dense: Container[str]) -> Any:
    """Do to the weight that an op makes what all who read it do first; None where there is no such thing."""
    lookup = lookup_of(op)
    if lookup is None and not (op.op_type == "const" and op.name in dense):
        return None
    weight = op.outputs[-1]
    readers = weight.child_ops
    wanted = [_move_of(reader) for reader in readers]
    # Where some read the weight as it is, a second table would be stored beside the first.
    if not wanted or wanted[0] is None or any(move != wanted[0] for move in wanted):
        return None
    if weight in op.enclosing_block.outputs:
        return None
    before = weight.val if lookup is None else read_table(lookup)
    try:
        leaf = moved(before, wanted[0])
    except ValueError:  # its tables would be torn apart: the program moves the weight when it runs
        return None
    if leaf.nbytes > max(before.nbytes, leaf.size * leaf.dtype.itemsize) + _SLACK:  # so would it if they were so many
        return None
    if lookup is None:
        var = mb.const(val=leaf, name=op.name, before_op=op)
    else:
        name = table_name(lookup)
        moves.setdefault(name, []).append(wanted[0])
        var = table_op(leaf, np.dtype(leaf.dtype), name, lookup)
    for reader in list(readers):
        replace_op(reader, var)
    return var


def _move_of(op: Op) -> Move | None:
    """What an op does to its weight, if it is one that can be done beforehand."""
    if op.op_type not in _MOVES:
        return None
    kind, numbers = _MOVES[op.op_type]
    return kind, [int(n) for n in numbers(op)]


_MOVES: dict[str, tuple[str, Callable[[Op], Any]]] = {
    "transpose": ("transpose", lambda op: op.perm.val),
    "reverse": ("reverse", lambda op: range(op.x.rank) if op.axes is None else op.axes.val),
    "reshape": ("reshape", lambda op: (*op.x.shape, *op.outputs[0].shape)),
    "squeeze": ("reshape", lambda op: (*op.x.shape, *op.outputs[0].shape)),
    "expand_dims": ("reshape", lambda op: (*op.x.shape, *op.outputs[0].shape)),
}
