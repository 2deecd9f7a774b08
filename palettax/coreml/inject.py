"""A graph pass that puts our tables and indices in the place of dense constants."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Builder, Program, Var, types
from coremltools.converters.mil.mil.block import curr_block
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.helper import block_context_manager
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

from palettax.clustering.levels import ZERO_LEVEL
from palettax.coreml.package import Op, op_name
from palettax.leaf import PalettizedArray, as_numpy, has_levels, pack, table_scale

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
        seen: filled by the pass, the leaves of which there were constants.
    """

    leaves: dict[str, PalettizedArray]
    leaf_of: dict[str, str]
    half: bool
    op_names: dict[str, str] = dataclasses.field(default_factory=dict)
    seen: set[str] = dataclasses.field(default_factory=set)


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
    tables.seen |= {tables.leaf_of[op.name] for op in block.operations if op.name in tables.leaf_of}
    leaf_of = {op.name: tables.leaf_of[op.name] for op in block.operations if _is_ours(op, tables)}
    taken = {op_name(op.name) for op in block.operations if op.name not in leaf_of}
    for op in list(block.operations):
        for inner in op.blocks:
            _inject(inner, tables)
        if op.name in leaf_of:
            leaf = leaf_of[op.name]
            tables.op_names[leaf] = free_name(op_name(leaf), taken)
            taken.add(tables.op_names[leaf])
            small = tables.leaves[leaf]
            dtype = op.outputs[0].val.dtype
            replace_weight(op, flushed(small) if tables.half else small, dtype, tables.op_names[leaf])


def _is_ours(op: Op, tables: Tables) -> bool:
    """Whether the op is a constant of one of our leaves' names that holds that leaf's value."""
    name = tables.leaf_of.get(op.name) if op.op_type == "const" else None
    return name is not None and _holds(op, tables.leaves[name])


def free_name(name: str, taken: Container[str | None]) -> str:
    """The name, or with the first number behind it that makes it new.

    Example:
        >>> free_name("weight", {"weight", "weight_1"})
        'weight_2'
    """
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return name if name not in taken else next(candidate for candidate in numbered if candidate not in taken)


def _holds(op: Op, leaf: PalettizedArray) -> bool:
    """Whether the constant is that weight, so that a name alone decides nothing."""
    value = op.outputs[0].val
    return isinstance(value, np.ndarray) and np.array_equal(value, np.asarray(leaf.depalettize()))


def flushed(leaf: PalettizedArray) -> PalettizedArray:
    """The leaf without numbers that float16 rounds to zero: coremltools would raise those to its smallest number.

    Args:
        leaf: as NumPy arrays, for a program that will compute in float16.
    """

    def flush(values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        return np.where(half == 0, half.astype(values.dtype), values)

    return dataclasses.replace(
        leaf,
        lut=leaf.lut if has_levels(leaf) else flush(np.asarray(leaf.lut)),
        scale=None if leaf.scale is None else flush(np.asarray(leaf.scale)),
    )


def replace_weight(op: Op, leaf: PalettizedArray, dtype: Any, name: str) -> None:
    """Put a table in the place of a weight, and take out what only that weight was made from.

    Args:
        op: the constant, or the last op of those that decompress it. Its block is open for editing.
        leaf: the weight, as `in_package` has it.
        dtype: of the weight in the program.
        name: what to call the op of the table.
    """
    replace_op(op, table_op(leaf, dtype, name, op))


def replace_op(op: Op, value: Var) -> None:
    """Let what reads a weight read another variable, and take out the op and what only it was made from.

    Args:
        op: the constant, or the last op of those that decompress it. Its block is open for editing.
        value: of the same weight, made before the op.
    """
    op.enclosing_block.replace_uses_of_var_after_op(
        anchor_op=op, old_var=op.outputs[0], new_var=value, no_check_var_types=True, force_replace=True
    )
    _remove(op)


def _remove(op: Op) -> None:
    sources = {var.op for var in op.inputs.values() if getattr(var, "op", None) is not None}
    op.enclosing_block.remove_ops([op])
    for source in sources:
        if source.enclosing_block is None:  # it went with another source
            continue
        unread = not any(var.child_ops or var in source.enclosing_block.outputs for var in source.outputs)
        if unread and source.op_type.startswith("const"):
            _remove(source)


def table_op(leaf: PalettizedArray, dtype: np.dtype, name: str, before: Op | None = None) -> Var:
    """Build the ops that stand for a palettized weight, in the form that the program's opset has.

    Args:
        leaf: the weight, as `in_package` has it.
        dtype: the dtype the program computes in.
        name: what to call the op of the table.
        before: the op to insert it before; None for the end of the block that is being built.

    Returns:
        The variable that holds the weight.
    """
    leaf = dataclasses.replace(
        as_numpy(leaf),
        lut=np.asarray(leaf.lut) if has_levels(leaf) else np.asarray(leaf.lut).astype(dtype),
        scale=None if leaf.scale is None else np.asarray(leaf.scale).astype(dtype),
        dtype=dtype,
    )
    opset = _opset_of(curr_block() if before is None else before.enclosing_block)
    if opset < ct.target.iOS18:
        return _packed(leaf, name, before)
    if leaf.mask is not None:
        return _sparse(leaf, name, before)
    return _dense(leaf, name, before, scale_in_front=opset < ct.target.iOS26)


def _opset_of(block: Any) -> ct.target:
    """The opset of the function that a block is in."""
    while block.outer_op is not None:
        block = block.outer_op.enclosing_block
    return block.opset_version


def _packed(leaf: PalettizedArray, name: str, before: Op | None) -> Var:
    """The form before iOS18: a stream of bits, a flat table, a shape."""
    indices, shape = pack(np.asarray(leaf.indices), leaf.nbits), np.array(leaf.shape, np.uint32)
    return mb.constexpr_lut_to_dense(
        indices=indices, lut=leaf.lut.reshape(-1), shape=shape, name=name, before_op=before
    )


def _dense(leaf: PalettizedArray, name: str, before: Op | None, scale_in_front: bool) -> Var:
    """A table in the form of iOS18, its scale in front of the lookup or behind it."""
    vector = {} if leaf.vector_axis is None else {"vector_axis": np.int32(leaf.vector_axis)}
    indices = leaf.indices.astype(_unsigned(leaf.nbits))
    lut, scale = leaf.lut, leaf.scale
    if scale is not None and scale_in_front:
        in_front = table_scale(leaf)
        lut = mb.constexpr_blockwise_shift_scale(
            data=lut, scale=in_front, **_offset(leaf, in_front), name=f"{name}_lut", before_op=before
        )
    weight = mb.constexpr_lut_to_dense(indices=indices, lut=lut, **vector, name=name, before_op=before)
    if scale is None or scale_in_front:
        return weight
    return mb.constexpr_blockwise_shift_scale(
        data=weight, scale=scale, **_offset(leaf, scale), name=f"{name}_scaled", before_op=before
    )


def _sparse(leaf: PalettizedArray, name: str, before: Op | None) -> Var:
    """A table for the weights inside the mask, and zeros elsewhere."""
    inside = np.asarray(leaf.mask)
    mask, values = mb.constexpr_lut_to_sparse(
        indices_mask=inside.astype(_unsigned(1)),
        indices_nonzero_data=leaf.indices[inside].astype(_unsigned(leaf.nbits)),
        lut=leaf.lut,
        name=name,
        before_op=before,
    )
    if leaf.scale is not None:
        mask, values = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask,
            nonzero_data=values,
            scale=leaf.scale,
            **_offset(leaf, leaf.scale),
            name=f"{name}_scaled",
            before_op=before,
        )
    return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask, name=f"{name}_dense", before_op=before)


def _unsigned(nbits: int) -> Any:
    """An integer of that width: NumPy has none, coremltools tags a uint8 with it."""
    return types.nptype_from_builtin(types.string_to_builtin(f"uint{nbits}"))


def _offset(leaf: PalettizedArray, scale: Any) -> dict[str, np.ndarray]:
    """What unsigned levels store for zero, beside their scale."""
    return {"offset": np.full(scale.shape, ZERO_LEVEL, np.uint8)} if leaf.lut.dtype == np.uint8 else {}
