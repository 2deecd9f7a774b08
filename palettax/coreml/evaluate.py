"""Evaluate a Core ML program off a Mac: a JAX function that does what the package says."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import coremltools as ct
import jax
import jax.numpy as jnp
import numpy as np
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.var import ListVar

from palettax.coreml.constexpr import value_of
from palettax.coreml.mil import OPS, UnknownError
from palettax.coreml.package import Op, load_program, open_model
from palettax.coreml.scoped import quiet
from palettax.coreml.weights import is_constant, is_part

Arithmetic = Literal["float32", "declared"]
Values = dict[Any, Any]
"""What is known of a program's variables."""


def run(
    mlmodel: ct.models.MLModel | str | Path,
    inputs: Mapping[str, Any],
    *,
    function: str | None = None,
    arithmetic: Arithmetic = "float32",
) -> dict[str, Any]:
    """The outputs of a Core ML program for given inputs, on any machine.

    Args:
        mlmodel: an mlprogram, or the path of one. Compressed weights of every form are read.
        inputs: by name, arrays of the shapes that the program takes; an image as an array, channels first.
        function: which one of several; the default one if None.
        arithmetic: "float32" computes everything so; "declared" rounds the result of every op to the float16 that the
            program declares, once for each op: what a Mac may do inside an op is not known.

    Returns:
        By name, arrays; of a classifier also the label, and a dict of probabilities.

    Raises:
        ValueError: a model of another kind; before any work, an op that cannot be evaluated; an input that is missing,
            unknown or of another shape.

    Example:
        >>> import numpy as np, torch
        >>> from palettax.coreml import from_torch
        >>> layer = torch.nn.Linear(8, 4)
        >>> mlmodel = from_torch(layer, torch.ones(1, 8), {}, minimum_deployment_target="iOS18")
        >>> (name,) = [feature.name for feature in mlmodel.get_spec().description.input]
        >>> (values,) = run(mlmodel, {name: np.ones((1, 8))}).values()
        >>> bool(np.allclose(values, layer(torch.ones(1, 8)).detach(), atol=1e-2))
        True
    """
    return as_function(mlmodel, function=function, arithmetic=arithmetic)(inputs)


def as_function(
    mlmodel: ct.models.MLModel | str | Path, *, function: str | None = None, arithmetic: Arithmetic = "float32"
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What `run` evaluates, as a function that is compiled once for every shape of its inputs.

    Args:
        mlmodel: as for `run`.
        function: as there.
        arithmetic: as there.

    Returns:
        A function of the inputs by name, which returns the outputs by name.

    Raises:
        ValueError: a model of another kind, no such function, or an op that cannot be evaluated.

    Example:
        >>> import numpy as np, torch
        >>> from palettax.coreml import from_torch
        >>> mlmodel = from_torch(torch.nn.ReLU(), torch.ones(1, 2), {}, minimum_deployment_target="iOS18")
        >>> (name,) = [feature.name for feature in mlmodel.get_spec().description.input]
        >>> function = as_function(mlmodel)
        >>> [function({name: [[x, 2.0]]}).popitem()[1].tolist() for x in (-1.0, 1.0)]
        [[[0.0, 2.0]], [[1.0, 2.0]]]
    """
    if arithmetic not in ("float32", "declared"):
        raise ValueError(f"arithmetic={arithmetic!r}; use 'float32' or 'declared'")
    mlmodel = open_model(mlmodel)
    with quiet():
        program = load_program(mlmodel)
        name = function or program.default_function_name
        if name not in program.functions:
            raise ValueError(f"function={name!r}: the model has {', '.join(program.functions)}")
        block: Any = program.functions[name]
        _check_ops(block)
        known, weights = _constants(block)
    description = mlmodel.get_spec().description
    features = next((f.input for f in description.functions if f.name == name), description.input)
    rounded = arithmetic == "declared"
    options = {"xla_allow_excess_precision": False} if rounded else None  # else the compiler leaves roundings out
    evaluate = jax.jit(functools.partial(_evaluate, block, known, rounded=rounded), compiler_options=options)
    weights = jax.device_put(weights)
    classify = next((op for op in block.operations if op.op_type == "classify"), None)

    def evaluated(inputs: Mapping[str, Any]) -> dict[str, Any]:
        outputs = evaluate(weights, _checked_inputs(inputs, block, features))
        found = {name: np.asarray(value) for name, value in outputs.items()}
        return found if classify is None else found | _labelled(classify, found)

    return evaluated


def _check_ops(block: Any) -> None:
    """Refuse a program with an op, or with an input of one, that there is no function for."""
    unknown = []
    for op in block.operations:
        if op.op_type == "classify" or is_constant(op):
            continue
        if op.op_type not in OPS:
            unknown.append(f"{op.op_type} ({op.name})")
            continue
        parameters = inspect.signature(OPS[op.op_type]).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            given = (name for name, var in op.inputs.items() if var is not None and name not in parameters)
            unknown += [f"{op.op_type} ({op.name}) with {name}" for name in given]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(
            f"{', '.join(unknown[:3])}{more}: cannot be evaluated here; control flow, state, lists, random numbers and "
            "shapes that depend on values are out of reach"
        )


def _constants(block: Any) -> tuple[Values, Values]:
    """What the program holds: what shapes may depend on, and float arrays, which the compiled function is given."""
    known, weights = {}, {}
    for op in block.operations:
        if not is_constant(op) or is_part(op):
            continue
        for var in op.outputs:
            if isinstance(var, ListVar):
                continue  # the names of classes
            value = var.val if types.is_str(var.dtype) else value_of(var)
            if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
                value = value.astype(np.float32)
                if value.ndim:
                    weights[var.name] = value
                    continue
            known[var] = value
    return known, weights


def _evaluate(block: Any, known: Values, weights: Values, inputs: dict[str, Any], *, rounded: bool) -> dict[str, Any]:
    """Every op in turn."""
    values = known | {block.inputs[name]: value for name, value in inputs.items()}
    with jax.default_matmul_precision("float32"):
        for op in block.operations:
            if is_constant(op):
                values |= {var: weights[var.name] for var in op.outputs if var.name in weights}
            elif op.op_type == "classify":
                values |= dict.fromkeys(op.outputs, values[op.probabilities])
            else:
                values |= zip(op.outputs, _outputs(op, values, rounded), strict=True)
    return {var.name: values[var] for var in block.outputs}


def _outputs(op: Op, values: Values, rounded: bool) -> list[Any]:
    """What one op gives, of the shapes that the program declares."""

    def given(var: Any) -> Any:
        return [values[item] for item in var] if isinstance(var, list | tuple) else values[var]

    arguments = {name: given(var) for name, var in op.inputs.items() if var is not None}
    try:
        if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(arguments)):
            found = OPS[op.op_type](**arguments)
        else:
            with jax.ensure_compile_time_eval():  # what shapes depend on must be known while the program is traced
                found = jax.tree.map(np.asarray, OPS[op.op_type](**arguments))
    except UnknownError:
        raise ValueError(
            f"{op.op_type} ({op.name}): its shape depends on the values of the inputs, which cannot be compiled"
        ) from None
    found = found if isinstance(found, tuple) else (found,)
    return [_declared(op, var, value, rounded) for var, value in zip(op.outputs, found, strict=True)]


def _declared(op: Op, var: Any, value: Any, rounded: bool) -> Any:
    """A result in its declared type: any float as float32, unless it is to be rounded."""
    wanted = tuple(var.shape)
    if np.ndim(value) != len(wanted) or any(
        isinstance(size, int | np.integer) and size != own for size, own in zip(wanted, np.shape(value), strict=True)
    ):
        raise ValueError(f"{op.op_type} ({op.name}): it gives {np.shape(value)}, the program declares {wanted}")
    array = value if isinstance(value, np.ndarray) else jnp.asarray(value)
    dtype = np.dtype(types.nptype_from_builtin(var.dtype))
    if not np.issubdtype(dtype, np.floating):
        return array.astype(dtype)
    return array.astype(dtype).astype(np.float32) if rounded else array.astype(np.float32)


def _checked_inputs(inputs: Mapping[str, Any], block: Any, features: Any) -> dict[str, jax.Array]:
    """The inputs as arrays of the types that the program takes."""
    if not isinstance(inputs, Mapping):
        names = ", ".join(f"{name!r}: array" for name in block.inputs)
        raise ValueError(f"inputs are a {type(inputs).__name__}; give them by name: {{{names}}}")
    if inputs.keys() != block.inputs.keys():
        raise ValueError(f"inputs are {sorted(inputs)}; the program takes {sorted(block.inputs)}")
    flexible = {feature.name: feature.type.multiArrayType for feature in features}
    checked = {}
    for name, var in block.inputs.items():
        value = np.asarray(inputs[name])
        if not _fits(value.shape, var, flexible[name]):
            raise ValueError(f"input {name!r} is {value.shape}; the program takes {tuple(var.shape)}")
        dtype = np.dtype(types.nptype_from_builtin(var.dtype))
        value = value.astype(dtype)  # what the program is given is rounded, whatever it computes with
        checked[name] = jnp.asarray(value.astype(np.float32) if np.issubdtype(dtype, np.floating) else value)
    return checked


def _fits(shape: tuple[int, ...], var: Any, declared: Any) -> bool:
    """Whether an input may have the shape."""
    if len(shape) != len(var.shape):
        return False
    kind = declared.WhichOneof("ShapeFlexibility")
    if kind == "enumeratedShapes":
        return shape in [tuple(one.shape) for one in declared.enumeratedShapes.shapes]
    if kind == "shapeRange":
        ranges = declared.shapeRange.sizeRanges
        return all(
            r.lowerBound <= n and (r.upperBound < 0 or n <= r.upperBound) for n, r in zip(shape, ranges, strict=True)
        )
    return all(size == own for size, own in zip(var.shape, shape, strict=True) if isinstance(size, int | np.integer))


def _labelled(classify: Op, found: dict[str, Any]) -> dict[str, Any]:
    """The label of the largest probability, and all of them by label."""
    label, by_label = (var.name for var in classify.outputs)
    classes = np.asarray(classify.classes.val).reshape(-1).tolist()
    probabilities = np.asarray(found[by_label]).reshape(-1)
    return {
        label: classes[int(probabilities.argmax())],
        by_label: dict(zip(classes, probabilities.tolist(), strict=True)),
    }
