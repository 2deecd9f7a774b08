"""A graph pass that puts our tables and indices in the place of dense constants."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Block, Builder, Program, Var, types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.helper import block_context_manager
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

from palettax.coreml.package import Op, op_name
from palettax.leaf import PalettizedArray, pack

# Its ops are attributes that no type declares.
mb: Any = Builder

PASS_NAME = "palettax::inject_tables"


@dataclasses.dataclass
class Tables:
    """What one conversion injects, and what became of it.

    Attributes:
        leaves: the palettized weights by name.
        leaf_of: the leaf that each constant holds, by the names of the two.
        half: the program will compute in float16.
        op_names: filled by the pass, the op that it made of each leaf.
    """

    leaves: dict[str, PalettizedArray]
    leaf_of: dict[str, str]
    half: bool
    op_names: dict[str, str] = dataclasses.field(default_factory=dict)


@register_pass(namespace="palettax", override=True)
class inject_tables(AbstractGraphPass):
    """Replace each constant that is one of our leaves; the pipeline's options hand over the `tables`."""

    tables: Tables | None = None

    def apply(self, prog: Program) -> None:
        """Rewrite the program in place, as coremltools' passes do."""
        if self.tables is not None:
            for function in prog.functions.values():
                _inject(function, self.tables)


@block_context_manager
def _inject(block: Any, tables: Tables) -> None:
    leaf_of = {op.name: tables.leaf_of[op.name] for op in block.operations if _is_ours(op, tables)}
    taken = {op_name(op.name) for op in block.operations if op.name not in leaf_of}
    for op in list(block.operations):
        for inner in op.blocks:
            _inject(inner, tables)
        if op.name in leaf_of:
            leaf = leaf_of[op.name]
            tables.op_names[leaf] = _free(op_name(leaf), taken)
            taken.add(tables.op_names[leaf])
            small = tables.leaves[leaf]
            _replace(block, op, _flushed(small) if tables.half else small, tables.op_names[leaf])


def _is_ours(op: Op, tables: Tables) -> bool:
    """Whether the op is a constant of one of our leaves' names that holds that leaf's value."""
    name = tables.leaf_of.get(op.name) if op.op_type == "const" else None
    return name is not None and _holds(op, tables.leaves[name])


def _free(name: str, taken: set[str]) -> str:
    """The name, or with the first number behind it that makes it new."""
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return name if name not in taken else next(candidate for candidate in numbered if candidate not in taken)


def _holds(op: Op, leaf: PalettizedArray) -> bool:
    """Whether the constant is that weight, so that a name alone decides nothing."""
    value = op.outputs[0].val
    return isinstance(value, np.ndarray) and np.array_equal(value, np.asarray(leaf.depalettize()))


def _flushed(leaf: PalettizedArray) -> PalettizedArray:
    """The leaf without entries that float16 rounds to zero: coremltools would raise those to its smallest number."""
    lut = np.asarray(leaf.lut)
    with np.errstate(over="ignore"):
        half = lut.astype(np.float16)
    return dataclasses.replace(leaf, lut=np.where(half == 0, half.astype(lut.dtype), lut))


def _replace(block: Block, op: Op, leaf: PalettizedArray, name: str) -> None:
    dense = op.outputs[0]
    table = table_op(leaf, dense.val.dtype, name, op)
    block.replace_uses_of_var_after_op(anchor_op=op, old_var=dense, new_var=table, no_check_var_types=True)
    block.remove_ops([op])


def table_op(leaf: PalettizedArray, dtype: np.dtype, name: str, before: Op) -> Var:
    """Build the ops that stand for a palettized weight, in the form that the program's opset has.

    Args:
        leaf: the weight.
        dtype: the dtype the program computes in.
        name: what to call the op.
        before: the op to insert it before.

    Returns:
        The variable that holds the weight.
    """
    lut, indices = np.asarray(leaf.lut).astype(dtype), np.asarray(leaf.indices)
    if _is_packed_form(before):
        packed = {
            "indices": pack(indices, leaf.nbits),
            "lut": lut.reshape(-1),
            "shape": np.array(leaf.shape, np.uint32),
        }
        return mb.constexpr_lut_to_dense(**packed, name=name, before_op=before)
    # NumPy has no integer of that width: coremltools tags a uint8 with it.
    width = types.nptype_from_builtin(types.string_to_builtin(f"uint{leaf.nbits}"))
    vector = {} if leaf.vector_axis is None else {"vector_axis": np.int32(leaf.vector_axis)}
    weight = mb.constexpr_lut_to_dense(indices=indices.astype(width), lut=lut, **vector, name=name, before_op=before)
    if leaf.scale is None:
        return weight
    scale = np.asarray(leaf.scale).astype(dtype)
    return mb.constexpr_blockwise_shift_scale(data=weight, scale=scale, name=f"{name}_scaled", before_op=before)


def _is_packed_form(op: Op) -> bool:
    """Whether the program is of an opset before iOS18."""
    return op.enclosing_block.opset_version < ct.target.iOS18
