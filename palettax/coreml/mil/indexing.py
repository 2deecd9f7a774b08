"""Ops that take elements by their places, or put them there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palettax.coreml.mil.values import Array, Function, static


def _ranges(
    x: Array,
    begin: Array,
    end: Array,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> tuple[Any, ...]:
    """An index or a slice for every axis; a mask says that an end is the array's own."""
    rank = np.ndim(x)
    steps = [1] * rank if stride is None else static(stride)
    masks = [[False] * rank if mask is None else static(mask) for mask in (begin_mask, end_mask, squeeze_mask)]
    return tuple(
        low if single else slice(None if open_low else low, None if open_high else high, step)
        for low, high, step, open_low, open_high, single in zip(static(begin), static(end), steps, *masks, strict=True)
    )


def slice_by_index(x: Array, **corners: Any) -> Array:
    """The part between two corners."""
    return jnp.asarray(x)[_ranges(x, **corners)]


def slice_update(x: Array, update: Array, **corners: Any) -> Array:
    """The array with the part between two corners replaced."""
    return jnp.asarray(x).at[_ranges(x, **corners)].set(update)


def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """So many elements from a corner on; -1 for all that are left. The corner may depend on inputs."""
    sizes = static(size)
    if -1 not in sizes:
        return jax.lax.dynamic_slice(jnp.asarray(x), [begin[i] for i in range(np.ndim(x))], sizes)
    return x[tuple(slice(low, None if n == -1 else low + n) for low, n in zip(static(begin), sizes, strict=True))]


def gather(x: Array, indices: Array, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False) -> Array:
    """The slices at some indices of an axis; NaN where there is none."""
    del validate_indices
    axis, batch_dims = static(axis) % np.ndim(x), static(batch_dims)

    def take(x: Array, indices: Array) -> Array:
        return jnp.take(x, indices, axis=axis - batch_dims)

    for _ in range(batch_dims):
        take = jax.vmap(take)
    return take(jnp.asarray(x), jnp.asarray(indices))


def gather_along_axis(x: Array, indices: Array, axis: Any = 0, validate_indices: Any = False) -> Array:
    """Of every line along an axis the elements at its own indices."""
    del validate_indices
    return jnp.take_along_axis(jnp.asarray(x), jnp.asarray(indices), axis=static(axis))


def gather_nd(x: Array, indices: Array, batch_dims: Any = 0, validate_indices: Any = False) -> Array:
    """The parts at places that the last axis of the indices holds."""
    del validate_indices

    def take(x: Array, indices: Array) -> Array:
        return x[tuple(jnp.moveaxis(indices, -1, 0))]

    for _ in range(static(batch_dims)):
        take = jax.vmap(take)
    return take(jnp.asarray(x), jnp.asarray(indices))


def _put(data: Array, place: Any, updates: Array, mode: str) -> Array:
    at = jnp.asarray(data).at[place]
    how = {"update": at.set, "add": at.add, "mul": at.multiply, "div": at.divide, "max": at.max, "min": at.min}
    return at.add(-updates) if mode == "sub" else how[mode](updates)


def scatter(
    data: Array, indices: Array, updates: Array, axis: Any = 0, mode: str = "add", validate_indices: Any = False
) -> Array:
    """Slices put, or added, at some indices of an axis."""
    del validate_indices
    return _put(data, (slice(None),) * (static(axis) % np.ndim(data)) + (indices,), updates, mode)


def scatter_along_axis(
    data: Array, indices: Array, updates: Array, axis: Any = 0, mode: str = "add", validate_indices: Any = False
) -> Array:
    """Elements put, or added, at their own indices of every line along an axis."""
    del validate_indices
    place = list(np.ogrid[tuple(slice(size) for size in np.shape(indices))])
    place[static(axis) % np.ndim(data)] = indices
    return _put(data, tuple(place), updates, mode)


def scatter_nd(data: Array, indices: Array, updates: Array, mode: str = "add", validate_indices: Any = False) -> Array:
    """Parts put, or added, at places that the last axis of the indices holds."""
    del validate_indices
    return _put(data, tuple(jnp.moveaxis(indices, -1, 0)), updates, mode)


OPS: dict[str, Function] = {
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
}
