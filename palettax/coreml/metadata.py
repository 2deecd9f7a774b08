"""`get_weights_metadata`: what there is to know of the weights of a package before it is compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np

from palettax.clustering.points import distinct_count
from palettax.coreml._backend import import_quietly
from palettax.coreml.constexpr import value_of
from palettax.coreml.package import Op, load_program, open_model
from palettax.coreml.scoped import quiet
from palettax.coreml.weights import named_weights
from palettax.palettize import WEIGHT_THRESHOLD

_ZERO = 1e-12  # coremltools counts smaller magnitudes as zeros


def get_weights_metadata(
    mlmodel: ct.models.MLModel | str | Path, weight_threshold: int = WEIGHT_THRESHOLD
) -> dict[str, Any]:
    """Every large weight of a Core ML model: its values, how many are zero, how many differ, and what reads it.

    Args:
        mlmodel: an mlprogram, or the path of one.
        weight_threshold: weights of at least this many elements are listed.

    Returns:
        By the name of each weight, coremltools' own `CoreMLWeightMetaData`: `val`, `sparsity`, `unique_values` and
        `child_ops`. A compressed weight has the values that its ops decompress it to.

    Raises:
        ValueError: a model of another kind.

    Example:
        >>> import torch
        >>> from palettax.coreml import from_torch
        >>> model = from_torch(torch.nn.Linear(64, 64), torch.ones(1, 64), {}, minimum_deployment_target="iOS18")
        >>> [(weight.val.shape, weight.sparsity) for weight in get_weights_metadata(model).values()]
        [((64, 64), 0.0)]
    """
    optimize = import_quietly("coremltools.optimize.coreml")  # here, because it imports far more than is used
    with quiet():
        program = load_program(open_model(mlmodel))
    found = {}
    for name, op in named_weights(program):
        if np.prod(op.outputs[0].shape) >= weight_threshold:
            values = value_of(op.outputs[0])
            found[name] = optimize.CoreMLWeightMetaData(
                values,
                sparsity=float(((values >= -_ZERO) & (values <= _ZERO)).mean()),
                unique_values=int(distinct_count(values.reshape(-1))),
                child_ops=[
                    optimize.CoreMLOpMetaData(reader.op_type, reader.name, _constants(reader))
                    for reader in op.outputs[0].child_ops
                ],
            )
    return found


def _constants(op: Op) -> dict[str, str]:
    """The names of the constants that an op reads, by its parameters."""
    names = {}
    for parameter, var in op.inputs.items():
        maker = getattr(var, "op", None)
        if maker is not None and maker.op_type.startswith("const"):
            names[parameter] = maker.name
    return names
