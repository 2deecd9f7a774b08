"""Ops that work element by element, and activations, as functions of their named inputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palettax.coreml.mil.values import Array, Function, per_channel, static

_DTYPES = {"fp16": np.float32, "fp32": np.float32, "bool": np.bool_} | {
    name: np.dtype(name) for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32")
}


def cast(x: Array, dtype: str) -> Array:
    """Of another type: floats stay float32 here, and are rounded to float16 where results are rounded at all."""
    return jnp.asarray(x).astype(_DTYPES[dtype])


def clamped_relu(x: Array, alpha: Array, beta: Array) -> Array:
    """A leaky ramp that ends at beta."""
    return jnp.minimum(jnp.where(x >= 0, x, alpha * x), beta)


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """Exact, by tanh, or by a sigmoid."""
    if mode == "SIGMOID_APPROXIMATION":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate=mode == "TANH_APPROXIMATION")


def softplus_parametric(x: Array, alpha: Array, beta: Array) -> Array:
    """α log(1 + exp(β x)), with α and β for each channel."""
    return per_channel(alpha, x) * jax.nn.softplus(per_channel(beta, x) * x)


def prelu(x: Array, alpha: Array) -> Array:
    """A leaky ramp with a slope for each channel."""
    return jnp.where(x >= 0, x, per_channel(alpha, x) * x)


def quantize(input: Array, scale: Array, output_dtype: str, zero_point: Any = 0, axis: Any = None) -> Array:
    """round(x / scale) + zero point, within the integers of its type."""
    limits = np.iinfo(output_dtype)
    shifted = jnp.round(input / _along(scale, input, axis)) + _along(zero_point, input, axis)
    return jnp.clip(shifted, limits.min, limits.max).astype(output_dtype)


def dequantize(input: Array, scale: Array, zero_point: Any = 0, axis: Any = None) -> Array:
    """(q - zero point) · scale."""
    shifted = jnp.asarray(input).astype(jnp.float32) - _along(zero_point, input, axis)
    return shifted * _along(scale, input, axis)


def _along(values: Any, x: Array, axis: Any) -> Array:
    values = jnp.asarray(values).astype(jnp.float32)
    if values.ndim == 0:
        return values
    return jnp.expand_dims(values, [i for i in range(np.ndim(x)) if i != static(axis) % np.ndim(x)])


def _binary(function: Function) -> Function:
    return lambda x, y: function(x, y)


def _unary(function: Function) -> Function:
    return lambda x: function(x)


_BINARY = {
    "add": jnp.add,
    "equal": jnp.equal,
    "floor_div": jnp.floor_divide,
    "greater": jnp.greater,
    "greater_equal": jnp.greater_equal,
    "less": jnp.less,
    "less_equal": jnp.less_equal,
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "mod": jnp.mod,
    "mul": jnp.multiply,
    "not_equal": jnp.not_equal,
    "pow": jnp.power,
    "real_div": jnp.true_divide,
    "sub": jnp.subtract,
}
_UNARY = {
    "abs": jnp.abs,
    "acos": jnp.arccos,
    "asin": jnp.arcsin,
    "atan": jnp.arctan,
    "atanh": jnp.arctanh,
    "ceil": jnp.ceil,
    "cos": jnp.cos,
    "cosh": jnp.cosh,
    "erf": jax.lax.erf,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "floor": jnp.floor,
    "identity": jnp.asarray,
    "logical_not": jnp.logical_not,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "round": jnp.round,
    "sigmoid": jax.nn.sigmoid,
    "sign": jnp.sign,
    "silu": jax.nn.silu,
    "sin": jnp.sin,
    "sinh": jnp.sinh,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "sqrt": jnp.sqrt,
    "square": jnp.square,
    "tan": jnp.tan,
    "tanh": jnp.tanh,
}

OPS: dict[str, Function] = {
    **{name: _binary(function) for name, function in _BINARY.items()},
    **{name: _unary(function) for name, function in _UNARY.items()},
    "cast": cast,
    "clamped_relu": clamped_relu,
    "clip": lambda x, alpha, beta: jnp.clip(x, alpha, beta),
    "dequantize": dequantize,
    "elu": lambda x, alpha: jnp.where(x >= 0, x, alpha * jnp.expm1(jnp.minimum(x, 0))),
    "gelu": gelu,
    "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
    "leaky_relu": lambda x, alpha: jnp.where(x >= 0, x, alpha * x),
    "linear_activation": lambda x, alpha, beta: alpha * x + beta,
    "log": lambda x, epsilon=1e-45: jnp.log(x + epsilon),
    "prelu": prelu,
    "quantize": quantize,
    "rsqrt": lambda x, epsilon=1e-12: jax.lax.rsqrt(x + epsilon),
    "scaled_tanh": lambda x, alpha, beta: alpha * jnp.tanh(beta * x),
    "select": lambda cond, a, b: jnp.where(cond, a, b),
    "sigmoid_hard": lambda x, alpha, beta: jnp.clip(alpha * x + beta, 0, 1),
    "softmax": lambda x, axis=-1: jax.nn.softmax(x, axis=static(axis)),
    "softplus_parametric": softplus_parametric,
    "threshold": lambda x, alpha: jnp.maximum(x, alpha),
    "thresholded_relu": lambda x, alpha: jnp.where(x >= alpha, x, 0),
}
