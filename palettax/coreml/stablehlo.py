"""From a JAX function to a program, its palettized weights as tables: what is touched of stablehlo-coreml is here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import coremltools as ct
import jax
import jax.export
import numpy as np
from jax._src.interpreters.mlir import make_ir_context
from jax.experimental.xla_metadata import set_xla_metadata
from jaxlib.mlir import ir

from palettax._extras import require
from palettax._typing import Array
from palettax.leaf import PalettizedArray, as_numpy, has_levels
from palettax.leaf.palettized_array import AS_ARRAY

TABLE, DENSE = "palettax.table", "palettax.dense"
OLDEST = ct.target.iOS18
"""The first target that stablehlo-coreml converts for."""
_PARTS = ("lut", "indices", "scale", "mask")


def composite(leaf: PalettizedArray) -> Array:
    """The dense weight as one op, which `program_of` makes a table of: `lut[group, indices] · scale`.

    Args:
        leaf: a palettized weight without kept values; traced or not.
    """
    leaf = float_leaf(as_numpy(leaf))
    parts = {name: getattr(leaf, name) for name in _PARTS if getattr(leaf, name) is not None}
    form = {"nbits": leaf.nbits, "vector_axis": -1 if leaf.vector_axis is None else leaf.vector_axis}
    form |= {"parts": ",".join(parts)}

    def dense(*values: Array, **_: Any) -> Array:
        return _rebuilt(dict(zip(parts, values, strict=True)), leaf.nbits, leaf.vector_axis, leaf.dtype).depalettize()

    return jax.lax.composite(dense, TABLE)(*parts.values(), **form)


def named(name: str, weights: Array) -> Array:
    """A dense weight as an op of its own, so that `program_of` can make a constant of its name.

    Args:
        name: of the leaf.
        weights: in a float type that Core ML has.
    """
    return jax.lax.composite(lambda values, **_: values, DENSE)(weights, name=name)


def float_leaf(leaf: PalettizedArray) -> PalettizedArray:
    """The leaf in a float type that Core ML has: float32, but for float16."""
    if leaf.dtype in (np.float16, np.float32):
        return leaf
    lut = leaf.lut if has_levels(leaf) else leaf.lut.astype(np.float32)
    scale = None if leaf.scale is None else leaf.scale.astype(np.float32)
    return dataclasses.replace(leaf, lut=lut, scale=scale, dtype=np.dtype(np.float32))


def _rebuilt(parts: dict[str, Any], nbits: int, vector_axis: int | None, dtype: Any) -> PalettizedArray:
    return PalettizedArray(**parts, nbits=nbits, vector_axis=vector_axis, dtype=dtype)


def program_of(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    target: ct.target,
    as_array: Callable[[PalettizedArray], Array],
    table: Callable[[PalettizedArray], Any],
    constant: Callable[[str, np.ndarray], Any],
) -> Any:
    """A program of what a function computes.

    Args:
        function: of `inputs`, traceable by JAX.
        inputs: arrays, or what has a shape and a dtype.
        target: the deployment target.
        as_array: what to compute with in the place of a palettized weight: its `composite`, or a dense array.
        table: makes the ops of a palettized weight, whose parts are constants of the program, and returns its variable.
        constant: makes the op of a dense weight of a name, and returns its variable.

    Returns:
        A program of coremltools.
    """
    require("stablehlo_coreml", "stablehlo")
    from stablehlo_coreml import convert

    token = AS_ARRAY.set(as_array)
    try:
        # JAX keeps what it traced before, without our ops, apart from what it traces in another context.
        with set_xla_metadata(palettax="export"):
            exported = jax.export.export(jax.jit(function))(*inputs)
    finally:
        AS_ARRAY.reset(token)
    module = ir.Module.parse(exported.mlir_module(), context=make_ir_context())
    _check_loops(module)
    with _composites({TABLE: _handler(table), DENSE: _constant_handler(constant)}):
        try:
            return convert(module, minimum_deployment_target=target)
        except Exception as error:  # what it raises for an op that it does not know has no type in common
            raise ValueError(f"the function cannot be converted by stablehlo-coreml: {error}") from error


def _check_loops(module: ir.Module) -> None:
    """Refuse a table in a loop or a branch: what is sliced there is no constant."""
    functions: dict[str, Any] = {}
    for function in module.body:
        operation: Any = function.operation
        functions[ir.StringAttr(operation.attributes["sym_name"]).value] = operation

    def visit(op: Any, within: bool) -> None:
        if op.name == "stablehlo.composite" and within and ir.StringAttr(op.attributes["name"]).value == TABLE:
            shape = tuple(op.results[0].type.shape)
            raise ValueError(
                f"a palettized weight {shape} is used in a loop or a branch, as in a scan over layers, and a table of "
                "Core ML is a constant of the whole program; unroll it, or expand the weight with px.depalettize"
            )
        if op.name == "func.call":
            visit(functions[ir.FlatSymbolRefAttr(op.attributes["callee"]).value], within)
        within = within or op.name in ("stablehlo.while", "stablehlo.case", "stablehlo.if")
        for region in op.regions:
            for block in region:
                for inner in block.operations:
                    visit(inner.operation, within)

    visit(functions["main"], within=False)


@contextlib.contextmanager
def _composites(handlers: dict[str, Callable[..., None]]) -> Iterator[None]:
    """Handlers of composite ops, by name, until the block ends; it has no public place for them."""
    from stablehlo_coreml.converter import StableHloConverter

    registry = StableHloConverter._composite_ops_registry
    registry.update(handlers)
    try:
        yield
    finally:
        for name in handlers:
            del registry[name]


def _constant_handler(constant: Callable[[str, np.ndarray], Any]) -> Callable[..., None]:
    def handle(converter: Any, context: Any, op: Any) -> None:
        name = ir.StringAttr(op.composite_attributes["name"]).value
        context.add_result(op.results[0], constant(name, context[op.inputs[0].get_name()].val))

    return handle


def _handler(table: Callable[[PalettizedArray], Any]) -> Callable[..., None]:
    def handle(converter: Any, context: Any, op: Any) -> None:
        given = op.composite_attributes
        names = ir.StringAttr(given["parts"]).value.split(",")
        values = [context[operand.get_name()].val for operand in op.inputs]
        axis = ir.IntegerAttr(given["vector_axis"]).value
        dtype = np.dtype(str(op.results[0].type.element_type).replace("f", "float"))
        parts = {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
        leaf = _rebuilt(parts, ir.IntegerAttr(given["nbits"]).value, None if axis < 0 else axis, dtype)
        context.add_result(op.results[0], table(leaf))

    return handle
