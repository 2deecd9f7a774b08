"""Small programs, built op by op, with a weight of every kind that is read along another axis."""

from __future__ import annotations

import functools
import warnings

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
from coremltools.converters.mil import Builder as mb

from palettax.coreml import OptimizationConfig, get_weights_metadata, run
from palettax.coreml.package import load_program, operations
from palettax.coreml.scoped import quiet
from palettax.coreml.weights import weights_of

AXES = {"conv": 0, "up": 1, "lin": 0, "right": 1, "right_t": 0, "left": 0, "left_t": 1, "add": 0}
"""The output axis of the weight that each op of `program` reads."""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Weights that differ with their shape."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def convert(program, target: str = "iOS18", half: bool = True, **more):
    """A model of a program, which computes in float16 or in float32."""
    precision = ct.precision.FLOAT16 if half else ct.precision.FLOAT32
    options = {"minimum_deployment_target": ct.target[target], "compute_precision": precision}
    with quiet():
        return ct.convert(program, skip_model_load=True, **options, **more)


@functools.cache
def model(target: str = "iOS18", half: bool = True):
    """Convolutions, a linear op, factors of `matmul` in all positions, and a sum; no test changes it."""

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 8, 4, 4))], opset_version=ct.target[target])
    def program(x):
        x = mb.conv(x=x, weight=normal(16, 8, 3, 3), name="conv", pad_type="same")
        x = mb.conv_transpose(x=x, weight=normal(16, 12, 2, 2), name="up", strides=[2, 2])
        x = mb.linear(x=mb.reshape(x=x, shape=(12, 64)), weight=normal(24, 64), name="lin")
        x = mb.matmul(x=x, y=normal(24, 40), name="right")
        x = mb.matmul(x=x, y=normal(16, 40), transpose_y=True, name="right_t")
        x = mb.matmul(x=normal(20, 12), y=x, name="left")
        x = mb.matmul(x=normal(20, 36), y=x, transpose_x=True, name="left_t")
        return mb.add(x=x, y=normal(36, 16), name="add")

    return convert(program, target, half)


def one_weight(weight: np.ndarray, target: str = "iOS18", half: bool = False):
    """A model of one linear op."""

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, weight.shape[1]))], opset_version=ct.target[target])
    def program(x):
        return mb.linear(x=x, weight=weight, name="lin")

    return convert(program, target, half)


def peer(function, mlmodel, config=None, **options):
    """What a function of coremltools makes of a model."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(mlmodel, **({} if config is None else {"config": config}), **options)


def peer_config(**keys):
    """coremltools' configuration that asks the same of all weights."""
    return cto.OptimizationConfig(cto.OpPalettizerConfig(**keys))


def constants(mlmodel) -> list[bytes]:
    """The bytes of every constant of a model; the loader names those that stand in an op itself anew."""
    return sorted(np.asarray(op.outputs[0].val).tobytes() for _, op in operations(mlmodel) if op.op_type == "const")


def same_program(one, other) -> bool:
    """Whether two models have equal descriptions, functions and constants."""
    first, second = one.get_spec(), other.get_spec()
    equal = (
        first.description == second.description,
        first.specificationVersion == second.specificationVersion,
        first.mlProgram.functions == second.mlProgram.functions,
        constants(one) == constants(other),
    )
    return all(equal)


def readers(mlmodel) -> dict[str, str]:
    """For each op that reads one weight, the name of that weight."""
    with quiet():
        program = load_program(mlmodel)
    return {
        reader.name.removesuffix("_cast_fp16").removesuffix("_has_output_shape"): op.name
        for _, op in weights_of(program)
        if op.outputs[0].rank > 1
        for reader in op.outputs[0].child_ops
    }


def asked(**keys) -> OptimizationConfig:
    """A configuration of ours for all weights of more than 100 elements."""
    return OptimizationConfig({"weight_threshold": 100, **keys})


def squared_errors(small, reference) -> np.ndarray:
    """Of every weight, in order; the names of a package change with its compression."""
    pairs = zip(get_weights_metadata(small, 100).values(), get_weights_metadata(reference, 100).values(), strict=True)
    return np.array([np.square(a.val.astype(float) - b.val.astype(float)).sum() for a, b in pairs])


def outputs(mlmodel, inputs, **options) -> list[np.ndarray]:
    """What a program gives for inputs in order."""
    names = [feature.name for feature in mlmodel.get_spec().description.input]
    return list(run(mlmodel, dict(zip(names, inputs, strict=True)), **options).values())
