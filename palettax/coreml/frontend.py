"""From a torch module to a program whose constants we can name: torch.export or torch.jit.trace."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import Any

import coremltools as ct
import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Captured:
    """A module as a converter takes it.

    Attributes:
        program: an `ExportedProgram` or a traced module.
        names: the dotted torch name of each constant that the converter will make.
        options: what `coremltools.convert` needs to know besides.
    """

    program: Any
    names: dict[str, str]
    options: dict[str, Any]


def export(model: torch.nn.Module, example_inputs: tuple[Any, ...]) -> Captured:
    """Capture with torch.export.

    Args:
        model: in eval mode.
        example_inputs: its positional arguments.

    Returns:
        The captured program.
    """
    program = torch.export.export(model, example_inputs).run_decompositions({})
    signature = program.graph_signature
    return Captured(program, {**signature.inputs_to_parameters, **signature.inputs_to_buffers}, {})


def trace(model: torch.nn.Module, example_inputs: tuple[Any, ...]) -> Captured:
    """Capture with torch.jit.trace.

    Args:
        model: in eval mode.
        example_inputs: its positional arguments, all tensors.

    Returns:
        The captured program, with inputs of the shapes and kinds of the examples.
    """
    # The fused attention of torch is an op that coremltools does not know.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # pyright: ignore[reportPrivateImportUsage]
            program = torch.jit.trace(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    names = [name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]]
    inputs = [ct.TensorType(**options) for options in _input_options(model, example_inputs)]
    return Captured(program, {name: name for name in names}, {"inputs": inputs})


def _input_options(model: torch.nn.Module, example_inputs: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Shape, kind and name of each input; the names of export, where trace would number them."""
    # Without a dtype, coremltools picks the float type that the target prefers.
    options = [
        {"shape": tuple(x.shape)} | ({} if x.is_floating_point() else {"dtype": np.int32}) for x in example_inputs
    ]
    parameters = list(inspect.signature(model.forward).parameters.values())[: len(options)]
    if len(parameters) < len(options) or any(p.kind != p.POSITIONAL_OR_KEYWORD for p in parameters):
        return options
    return [option | {"name": parameter.name} for option, parameter in zip(options, parameters, strict=True)]


def needs_trace(captured: Captured) -> bool:
    """Whether the export holds a tanh gelu, which coremltools would convert to the exact one without a word."""
    return any(
        node.target is torch.ops.aten.gelu.default and node.kwargs.get("approximate", "none") == "tanh"
        for node in captured.program.graph.nodes
    )
