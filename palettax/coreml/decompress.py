"""Compressed weights as dense constants again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
from coremltools.converters.mil.mil import Builder

from palettax.coreml.constexpr import value_of
from palettax.coreml.inject import replace_op
from palettax.coreml.package import load_program, open_model, rebuild
from palettax.coreml.read_table import decompresses
from palettax.coreml.scoped import quiet
from palettax.coreml.weights import weights_of

mb: Any = Builder


def decompress_weights(mlmodel: ct.models.MLModel | str | Path) -> ct.models.MLModel:
    """Put a dense constant in the place of every compressed weight; all else stays as it is, bit for bit.

    Args:
        mlmodel: an mlprogram, or the path of one; it is not changed.

    Returns:
        The model, as large as it was before it was compressed.

    Raises:
        ValueError: a model of another kind.

    Example:
        >>> import coremltools as ct, numpy as np, torch
        >>> from palettax.coreml import OptimizationConfig, from_torch, palettize_weights, read_palettes
        >>> model = from_torch(torch.nn.Linear(64, 64), torch.ones(1, 64), {}, minimum_deployment_target="iOS18")
        >>> small = palettize_weights(model, OptimizationConfig({"nbits": 4}))
        >>> read_palettes(decompress_weights(small))
        {}
    """
    mlmodel = open_model(mlmodel)
    with quiet():
        program = load_program(mlmodel)
        for _, op in [found for found in weights_of(program) if decompresses(found[1])]:
            with op.enclosing_block:
                replace_op(op, mb.const(val=value_of(op.outputs[0]), name=op.name, before_op=op))
        return rebuild(program, mlmodel)
