"""Ops that sum, average or search along axes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palettax.coreml.mil.values import Array, Function, axes_of, static

_OF_AXES = {
    "reduce_l1_norm": lambda x, **over: jnp.sum(jnp.abs(x), **over),
    "reduce_l2_norm": lambda x, **over: jnp.sqrt(jnp.sum(jnp.square(x), **over)),
    "reduce_log_sum": lambda x, **over: jnp.log(jnp.sum(x, **over)),
    "reduce_log_sum_exp": lambda x, **over: jax.nn.logsumexp(x, **over),
    "reduce_max": jnp.max,
    "reduce_mean": jnp.mean,
    "reduce_min": jnp.min,
    "reduce_prod": jnp.prod,
    "reduce_sum": jnp.sum,
    "reduce_sum_square": lambda x, **over: jnp.sum(jnp.square(x), **over),
}


def _over_axes(function: Function) -> Function:
    def reduce(x: Array, axes: Any = None, keep_dims: Any = False) -> Array:
        return function(x, axis=axes_of(axes, np.ndim(x)), keepdims=bool(keep_dims))

    return reduce


def _over_axis(function: Function) -> Function:
    def reduce(x: Array, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32") -> Array:
        return function(x, axis=static(axis), keepdims=bool(keep_dims)).astype(output_dtype)

    return reduce


def argsort(x: Array, axis: Any = -1, ascending: Any = False) -> Array:
    """Where the sorted elements stand; of equal ones the first comes first."""
    return jnp.argsort(x, axis=static(axis), stable=True, descending=not ascending).astype(jnp.int32)


def topk(
    x: Array,
    k: Any = 1,
    axis: Any = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: str = "int32",
) -> Any:
    """The k largest (smallest) elements and where they stand; they are sorted, asked or not."""
    del sort
    order = jnp.take(argsort(x, axis, ascending), np.arange(static(k)), axis=static(axis))
    values = jnp.take_along_axis(jnp.asarray(x), order, axis=static(axis))
    return (values, order.astype(output_indices_dtype)) if return_indices else values


def cumsum(x: Array, axis: Any = 0, exclusive: Any = False, reverse: Any = False) -> Array:
    """Running sums, with or without the element itself, from either end."""
    axis = static(axis)
    x = jnp.flip(x, axis) if reverse else jnp.asarray(x)
    sums = jnp.cumsum(x, axis=axis) - (x if exclusive else 0)
    return jnp.flip(sums, axis) if reverse else sums


OPS: dict[str, Function] = {
    **{name: _over_axes(function) for name, function in _OF_AXES.items()},
    "reduce_argmax": _over_axis(jnp.argmax),
    "reduce_argmin": _over_axis(jnp.argmin),
    "argsort": argsort,
    "topk": topk,
    "cumsum": cumsum,
}
