"""Convolutions and pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from palettax.coreml.mil.values import Array, Function, per_channel, static

Pairs = list[tuple[int, int]]


def conv(
    x: Array,
    weight: Array,
    bias: Any = None,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Array:
    """Correlation of images, channels first, with kernels."""
    strides, dilations = _each(strides, x), _each(dilations, x)
    extents = [d * (size - 1) + 1 for d, size in zip(dilations, np.shape(weight)[2:], strict=True)]
    return _correlate(x, weight, bias, strides, dilations, _padding(x, extents, strides, pad_type, pad), static(groups))


def conv_transpose(
    x: Array,
    weight: Array,
    bias: Any = None,
    pad: Any = None,
    output_shape: Any = None,
    pad_type: str = "valid",
    strides: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Array:
    """What `conv` does to gradients of its input: kernels spread over an image of strides."""
    strides, dilations, groups = _each(strides, x), _each(dilations, x), static(groups)
    spatial, kernel = np.shape(x)[2:], np.shape(weight)[2:]
    extents = [d * (size - 1) + 1 for d, size in zip(dilations, kernel, strict=True)]
    whole = [s * (size - 1) + extent for s, size, extent in zip(strides, spatial, extents, strict=True)]
    same = pad_type == "same"
    pairs = _pairs(pad if pad_type == "custom" else None, len(spatial))
    if output_shape is not None:
        sizes = static(output_shape)[2:]
    elif same:
        sizes = [s * n for s, n in zip(strides, spatial, strict=True)]
    else:
        sizes = [size - sum(pair) for size, pair in zip(whole, pairs, strict=True)]
    begins = [
        max(size - wanted, 0) // 2 if same else pair[0] for size, wanted, pair in zip(whole, sizes, pairs, strict=True)
    ]
    pads = [
        (extent - 1 - begin, extent - 1 - (size - wanted - begin))
        for extent, begin, size, wanted in zip(extents, begins, whole, sizes, strict=True)
    ]
    into, out = np.shape(weight)[:2]
    kernels = jnp.reshape(weight, (groups, into // groups, out, *kernel)).swapaxes(1, 2)
    kernels = jnp.flip(kernels.reshape(groups * out, into // groups, *kernel), range(2, 2 + len(kernel)))
    return _correlate(x, kernels, bias, [1] * len(kernel), dilations, pads, groups, lhs_dilation=strides)


def _correlate(
    x: Array, weight: Array, bias: Any, strides: Any, dilations: Any, pads: Pairs, groups: int, **how: Any
) -> Array:
    result = lax.conv_general_dilated(
        x, weight, strides, pads, rhs_dilation=dilations, feature_group_count=groups, **how
    )
    return result if bias is None else result + per_channel(bias, x)


def max_pool(x: Array, kernel_sizes: Array, **how: Any) -> Array:
    """The largest element of every window."""
    return _windows(x, -jnp.inf, lax.max, *_places(x, kernel_sizes, **how))


def avg_pool(x: Array, kernel_sizes: Array, exclude_padding_from_average: Any = False, **how: Any) -> Array:
    """The mean of every window, with zeros of the padding in it or not; what `ceil_mode` adds never counts."""
    sizes, strides, pads, added = _places(x, kernel_sizes, **how)
    spatial = (1, 1, *np.shape(x)[2:])
    inside = [(0, 0), (0, 0), *pads]
    ones = np.pad(np.ones(spatial, np.float32), inside, constant_values=not exclude_padding_from_average)
    count = _windows(ones, 0.0, lax.add, sizes, strides, [(0, 0)] * len(pads), added)
    return _windows(x, 0.0, lax.add, sizes, strides, pads, added) / count


def l2_pool(x: Array, kernel_sizes: Array, **how: Any) -> Array:
    """The root of the sum of squares of every window."""
    return jnp.sqrt(_windows(jnp.square(x), 0.0, lax.add, *_places(x, kernel_sizes, **how)))


def _places(
    x: Array, kernel_sizes: Any, strides: Any = None, pad_type: str = "valid", pad: Any = None, ceil_mode: Any = False
) -> tuple[Any, Any, Pairs, list[int]]:
    """Windows, strides, padding, and how many elements `ceil_mode` adds at the end."""
    sizes, strides = static(kernel_sizes), _each(strides, x)
    pads = _padding(x, sizes, strides, pad_type, pad)
    added = [0] * len(sizes)
    if ceil_mode:
        for i, (length, size, stride, pair) in enumerate(zip(np.shape(x)[2:], sizes, strides, pads, strict=True)):
            padded = length + sum(pair)
            count = math.ceil((padded - size) / stride) + 1
            # A window that would start in the padding at the end is left out.
            count -= sum(pair) > 0 and (count - 1) * stride >= length + pair[0]
            added[i] = max((count - 1) * stride + size - padded, 0)
    return sizes, strides, pads, added


def _windows(x: Array, start: float, function: Any, sizes: Any, strides: Any, pads: Pairs, added: list[int]) -> Array:
    edges = [(0, 0), (0, 0), *((low, high + more) for (low, high), more in zip(pads, added, strict=True))]
    return lax.reduce_window(jnp.asarray(x), start, function, (1, 1, *sizes), (1, 1, *strides), edges)


def _each(values: Any, x: Array) -> Sequence[int]:
    return [1] * (np.ndim(x) - 2) if values is None else static(values)


def _pairs(pad: Any, rank: int) -> Pairs:
    flat = [0] * 2 * rank if pad is None else static(pad)
    return list(zip(flat[::2], flat[1::2], strict=True))


def _padding(x: Array, extents: Sequence[int], strides: Sequence[int], pad_type: str, pad: Any) -> Pairs:
    """Elements before and after each spatial axis."""
    if pad_type == "custom":
        return _pairs(pad, len(extents))
    if pad_type == "valid":
        return [(0, 0)] * len(extents)
    totals = [
        max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
        for size, stride, extent in zip(np.shape(x)[2:], strides, extents, strict=True)
    ]
    low = [total // 2 if pad_type == "same" else total - total // 2 for total in totals]
    return [(begin, total - begin) for begin, total in zip(low, totals, strict=True)]


OPS: dict[str, Function] = {
    "avg_pool": avg_pool,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "l2_pool": l2_pool,
    "max_pool": max_pool,
}
