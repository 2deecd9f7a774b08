"""Products of matrices, attention and normalization."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palettax.coreml.mil.values import Array, Function, axes_of, per_channel, static


def linear(x: Array, weight: Array, bias: Any = None) -> Array:
    """The product x Wᵀ + b."""
    return x @ jnp.asarray(weight).T + (0 if bias is None else bias)


def matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    """The product of the last two axes, either of them transposed first."""
    x = jnp.swapaxes(x, -1, -2) if transpose_x and np.ndim(x) > 1 else x
    return jnp.matmul(x, jnp.swapaxes(y, -1, -2) if transpose_y and np.ndim(y) > 1 else y)


def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Any = None) -> Array:
    """softmax(Q Kᵀ / √d + mask) V, the mask of numbers to add or of what may be attended to."""
    scores = jnp.einsum("...qd,...kd->...qk", query, key) / np.sqrt(np.shape(query)[-1]).astype(np.float32)
    if attn_mask is not None:
        mask = jnp.asarray(attn_mask)
        scores = jnp.where(mask, scores, -jnp.inf) if mask.dtype == bool else scores + mask
    return jnp.einsum("...qk,...kd->...qd", jax.nn.softmax(scores, axis=-1), value)


def batch_norm(
    x: Array, mean: Array, variance: Array, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5
) -> Array:
    """Each channel by the mean and the variance that are given for it."""
    scale = jax.lax.rsqrt(jnp.asarray(variance) + epsilon) * (1 if gamma is None else gamma)
    return (x - per_channel(mean, x)) * per_channel(scale, x) + (0 if beta is None else per_channel(beta, x))


def instance_norm(x: Array, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Array:
    """Each channel of each image by its own mean and variance."""
    scaled = _normalized(x, tuple(range(2, np.ndim(x))), epsilon)
    scaled = scaled * (1 if gamma is None else per_channel(gamma, x))
    return scaled + (0 if beta is None else per_channel(beta, x))


def layer_norm(x: Array, axes: Any = None, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Array:
    """By the mean and the variance over some axes."""
    axes = axes_of(axes, np.ndim(x))
    shape = [size if i in axes else 1 for i, size in enumerate(np.shape(x))]
    scaled = _normalized(x, axes, epsilon) * (1 if gamma is None else jnp.reshape(gamma, shape))
    return scaled + (0 if beta is None else jnp.reshape(beta, shape))


def _normalized(x: Array, axes: tuple[int, ...], epsilon: Any) -> Array:
    centred = x - jnp.mean(x, axis=axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=axes, keepdims=True) + epsilon)


def l2_norm(x: Array, epsilon: Any = 1e-6) -> Array:
    """By the root of the sum of squares over the last three axes."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=(-3, -2, -1), keepdims=True) + epsilon)


def local_response_norm(x: Array, size: Any, alpha: Any = 1e-4, beta: Any = 0.75, k: Any = 1.0) -> Array:
    """By a power of the mean square of neighbouring channels."""
    size = static(size)
    widths = [(0, 0), (size // 2, (size - 1) // 2)] + [(0, 0)] * (np.ndim(x) - 2)
    squares = jnp.pad(jnp.square(x), widths)
    sums = sum(squares[:, i : i + np.shape(x)[1]] for i in range(size))
    return x / (k + alpha / size * sums) ** beta


OPS: dict[str, Function] = {
    "batch_norm": batch_norm,
    "einsum": lambda values, equation: jnp.einsum(equation, *values),
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "linear": linear,
    "local_response_norm": local_response_norm,
    "matmul": matmul,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
