"""The ops of Core ML's programs as JAX functions of their named inputs."""

from palettax.coreml.mil import convolution, elementwise, indexing, linear, recurrent, reductions, resizing, shapes
from palettax.coreml.mil.values import Function as Function
from palettax.coreml.mil.values import UnknownError as UnknownError

OPS: dict[str, Function] = (
    elementwise.OPS
    | reductions.OPS
    | shapes.OPS
    | indexing.OPS
    | convolution.OPS
    | linear.OPS
    | recurrent.OPS
    | resizing.OPS
)
