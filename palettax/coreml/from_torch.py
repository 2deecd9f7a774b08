"""A torch module to a Core ML model whose tables and indices are, bit for bit, ours."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Mapping
from typing import Any

import coremltools as ct
import jax
import torch

from palettax._keys import warn_caller
from palettax._names import flatten_names
from palettax.coreml.forms import check_forms, in_package, parse_target
from palettax.coreml.frontend import Captured, export, needs_trace, trace
from palettax.coreml.inject import PASS_NAME, Tables
from palettax.coreml.read import Use, record_leaves
from palettax.coreml.scoped import quiet
from palettax.leaf import PalettizedArray, is_palettized
from palettax.torch.activations import rounds_output
from palettax.torch.conversion import fast_conversion
from palettax.torch.load import copied, evaluated, tables_of, tensors_by_name, write_weights


def from_torch(
    model: torch.nn.Module,
    example_inputs: Any,
    palettized: Mapping[str, Any] | None = None,
    *,
    minimum_deployment_target: ct.target | str,
    compute_precision: Any = None,
    frontend: str | None = None,
    **convert_options: Any,
) -> ct.models.MLModel:
    """Convert a module with its palettized weights; nothing is clustered and no index is searched.

    Args:
        model: the module, on any device; it is copied, and the copy is converted in eval mode.
        example_inputs: a tensor or a tuple of them, on any device.
        palettized: leaves by dotted torch name, or nested dicts of them, in torch's layout; `PalettizedArray` or
            dense. Parameters it does not name keep the model's own weights. None: the tables that the model carries in
            its `_COREML_` buffers, as `load_into` and palettizers leave them; one that becomes no table, because the
            model does not use it, is left out with a warning. Those of LSTM and GRU layers are dense in the package,
            with a warning.
        minimum_deployment_target: a member of `coremltools.target` or its name, from iOS16. iOS16 and iOS17 hold one
            float table of scalars per weight; groups, vectors, 3 bits, levels, masks and scales need iOS18. A scale
            without a mask is kept as it is from iOS26; at iOS18 it multiplies a float table into one per block, and
            a table of levels is repeated for each block (`audit` knows).
        compute_precision: as in `coremltools.convert`; its default computes in float16 and rounds the tables to it.
        frontend: "export", "trace", or None: export, but trace where export does not convert or would convert wrongly.
        convert_options: the other options of `coremltools.convert`, `inputs` and `outputs` among them.

    Returns:
        The model. Its metadata says which op is which leaf, for `read_palettes` and `audit`.

    Raises:
        ValueError: a name or a shape that is not the model's, a leaf that the target cannot hold or that did not
            become a table, a weight that eval mode changes (LoRA), activations that are quantized before iOS17, or an
            unknown frontend.

    Example:
        >>> import numpy as np
        >>> from palettax.coreml import read_palettes
        >>> lut = np.array([-1.0, 0.5], np.float32).reshape(1, 1, 2, 1)
        >>> leaf = PalettizedArray(lut, np.eye(8, dtype=np.uint8), nbits=1)
        >>> layer = torch.nn.Linear(8, 8)
        >>> mlmodel = from_torch(layer, torch.ones(1, 8), {"weight": leaf}, minimum_deployment_target="iOS18")
        >>> list(read_palettes(mlmodel))
        ['weight']
    """
    target = parse_target(minimum_deployment_target)
    if frontend not in (None, "export", "trace"):
        raise ValueError(f"frontend={frontend!r}; use 'export', 'trace' or None")
    leaves = tables_of(model) if palettized is None else flatten_names(palettized)
    _check_activations(model, target)
    leaves = _without_gates(model, leaves)
    check_forms({name: leaf for name, leaf in leaves.items() if is_palettized(leaf)}, target)
    held = {name: in_package(leaf, target) if is_palettized(leaf) else leaf for name, leaf in leaves.items()}
    model, tables = _prepare(model, held)
    example_inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    example_inputs = jax.tree.map(_plain, example_inputs)
    options = {"skip_model_load": True, "compute_precision": compute_precision, **convert_options}
    options["minimum_deployment_target"] = target
    # Parameters that keep tables of their own, in the buffers of the model, are left to coremltools.
    with quiet(), fast_conversion():
        return _convert_by(frontend, model, example_inputs, tables, options, lenient=palettized is None)


def _check_activations(model: torch.nn.Module, target: ct.target) -> None:
    """Refuse quantized activations where the target has no op for them."""
    rounded = [name for name, module in model.named_modules() if rounds_output(module)]
    if rounded and target < ct.target.iOS17:
        raise ValueError(
            f"{', '.join(rounded)}: activations are quantized, for which {target.name} has no op; use iOS17 or later, "
            "or train with quantize_activations=False"
        )


def _without_gates(model: torch.nn.Module, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves, dense where the converter computes with them: it takes the gates of recurrent layers apart."""
    recurrent = (module for module in model.modules() if isinstance(module, torch.nn.LSTM | torch.nn.GRU))
    taken = {id(tensor) for module in recurrent for tensor in module.parameters(recurse=False)}
    tensors = tensors_by_name(model)
    gates = [name for name, leaf in leaves.items() if is_palettized(leaf) and id(tensors.get(name)) in taken]
    if gates:
        warn_caller(
            f"{', '.join(gates)}: dense in the package, with the values of their tables: the converter takes the gates "
            "of LSTM and GRU apart. palettize_weights with mode='unique' makes tables of those values, without loss"
        )
    return {name: leaf.depalettize() if name in gates else leaf for name, leaf in leaves.items()}


def _prepare(model: torch.nn.Module, leaves: Mapping[str, Any]) -> tuple[torch.nn.Module, dict[str, PalettizedArray]]:
    """A copy of the model with the weights in it, in a float type that Core ML has, and the tables in the same type."""
    model = evaluated(copied(model), [name for name, leaf in leaves.items() if is_palettized(leaf)])
    tensors = tensors_by_name(model).values()
    if any(tensor.device.type not in ("cpu", "meta") for tensor in tensors):
        model = model.cpu()  # where what the converter makes of it is
    if any(map(_is_foreign, tensors)):
        model = model.float()
    written = write_weights(model, leaves)
    return model, {name: leaf for name, leaf in written.items() if is_palettized(leaf)}


def _plain(value: Any) -> Any:
    """An input where, and in a type in which, it is converted."""
    if not isinstance(value, torch.Tensor):
        return value
    return (value.float() if _is_foreign(value) else value).cpu()


def _is_foreign(value: Any) -> bool:
    """Whether it is a tensor of a float type that Core ML does not compute in."""
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float64)


def _convert_by(
    frontend: str | None,
    model: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    leaves: dict[str, PalettizedArray],
    options: dict[str, Any],
    *,
    lenient: bool,
) -> ct.models.MLModel:
    """Convert by the frontend asked for, or by export and, where that does not do, by trace."""
    if frontend == "trace":
        return _convert(trace(model, example_inputs), model, leaves, options, lenient=lenient)
    try:
        captured = export(model, example_inputs)
        if frontend == "export" or not needs_trace(captured):
            return _convert(captured, model, leaves, options, lenient=lenient)
        failure = None
    except Exception as error:
        # What torch.export and its converter raise for a model they do not know has no type in common.
        if frontend == "export":
            raise
        failure = error
        traceback.clear_frames(error.__traceback__)  # the converter's temporary files go with its variables
    try:
        return _convert(trace(model, example_inputs), model, leaves, options, lenient=lenient)
    except Exception as error:
        raise error from failure


def _convert(
    captured: Captured,
    model: torch.nn.Module,
    leaves: dict[str, PalettizedArray],
    options: dict[str, Any],
    *,
    lenient: bool,
) -> ct.models.MLModel:
    """Convert a captured program, and note in the model which op is which leaf."""
    tensors = tensors_by_name(model)
    # Tied leaves are one constant: the first of them stands for all.
    first = {id(tensors[name]): name for name in reversed(leaves)}
    leaf_of = {const: first[id(tensors[name])] for const, name in captured.names.items() if id(tensors[name]) in first}
    tables = Tables(leaves, leaf_of, half=options["compute_precision"] is not ct.precision.FLOAT32)
    pipeline: Any = copy.deepcopy(options.get("pass_pipeline") or ct.PassPipeline.DEFAULT)
    pipeline.insert_pass(0, PASS_NAME)
    pipeline.set_options(PASS_NAME, {"tables": tables})
    mlmodel: Any = ct.convert(captured.program, **{**captured.options, **options, "pass_pipeline": pipeline})
    made = {name: tables.op_names.get(first[id(tensors[name])]) for name in leaves}
    unused = [name for name in leaves if first[id(tensors[name])] not in tables.seen]
    if lenient and unused:
        warn_caller(f"{', '.join(unused)}: no table in the package, as the model does not use it")
        leaves = {name: leaf for name, leaf in leaves.items() if name not in unused}
    record_leaves(mlmodel, [Use(name, leaf, made[name]) for name, leaf in leaves.items()], {})
    return mlmodel
