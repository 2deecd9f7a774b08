"""Ops that lay the same elements out anew, or make arrays from shapes."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palettax.coreml.mil.values import Array, Function, axes_of, static


def reshape(x: Array, shape: Array) -> Array:
    """To a shape, in which 0 stands for the dimension that was there and -1 for what is left."""
    return jnp.reshape(x, [np.shape(x)[i] if size == 0 else size for i, size in enumerate(static(shape))])


def reshape_like(x: Array, ref_tensors: Any, begins: Any, ends: Any, end_masks: Any) -> Array:
    """To a shape made of parts of other shapes."""
    parts = (
        np.shape(other)[int(begin) : None if mask else int(end)]
        for other, begin, end, mask in zip(ref_tensors, begins, ends, end_masks, strict=True)
    )
    return jnp.reshape(x, tuple(itertools.chain(*parts)))


def expand_dims(x: Array, axes: Array) -> Array:
    """With new axes of one."""
    return jnp.expand_dims(x, static(np.atleast_1d(axes)))


def squeeze(x: Array, axes: Any = None) -> Array:
    """Without those of the axes that are one."""
    return jnp.squeeze(x, tuple(axis for axis in axes_of(axes, np.ndim(x)) if np.shape(x)[axis] == 1))


def concat(values: Any, axis: Any, interleave: Any = False) -> Array:
    """One after the other along an axis, or by turns."""
    if not interleave:
        return jnp.concatenate([jnp.atleast_1d(value) for value in values], static(axis))
    axis = static(axis) % np.ndim(values[0])
    shape = list(np.shape(values[0]))
    shape[axis] *= len(values)
    return jnp.reshape(jnp.stack(values, axis + 1), shape)


def split(x: Array, axis: Any, num_splits: Any = None, split_sizes: Any = None) -> tuple[Array, ...]:
    """Into equal parts, or parts of given sizes."""
    parts = static(num_splits) if split_sizes is None else np.cumsum(static(split_sizes))[:-1]
    return tuple(jnp.split(x, parts, axis=static(axis)))


def pad(x: Array, pad: Array, mode: str = "constant", constant_val: Any = 0) -> Array:
    """More elements before and after the last axes."""
    pairs = np.reshape(static(pad), (-1, 2)).tolist()
    widths = [(0, 0)] * (np.ndim(x) - len(pairs)) + [tuple(pair) for pair in pairs]
    if mode == "constant":
        return jnp.pad(x, widths, constant_values=jnp.asarray(constant_val))
    return jnp.pad(x, widths, mode={"replicate": "edge", "reflect": "reflect"}[mode])


def band_part(x: Array, lower: Any = -1, upper: Any = -1) -> Array:
    """Zero outside a band around the diagonal."""
    rows, columns = np.shape(x)[-2:]
    below = np.arange(rows)[:, None] - np.arange(columns)
    lower, upper = static(lower), static(upper)
    keep = ((lower < 0) | (below <= lower)) & ((upper < 0) | (-below <= upper))
    return jnp.where(keep, x, jnp.zeros((), jnp.asarray(x).dtype))


def one_hot(indices: Array, one_hot_vector_size: Any, axis: Any = -1, on_value: Any = 1, off_value: Any = 0) -> Array:
    """A vector for each index."""
    size = static(one_hot_vector_size)
    hot = jnp.expand_dims(indices, static(axis))
    place = np.arange(size).reshape([-1 if i == static(axis) % hot.ndim else 1 for i in range(hot.ndim)])
    return jnp.where(hot == place, on_value, off_value)


def flatten2d(x: Array, axis: Any = 1) -> Array:
    """Two axes: all before one, and all from it on."""
    return jnp.reshape(x, (int(np.prod(np.shape(x)[: static(axis)])), -1))


def reverse_sequence(x: Array, lengths: Array, seq_axis: Any = 0, batch_axis: Any = 0) -> Array:
    """The first elements of each sequence backwards, as many as are given for it."""
    seq_axis, batch_axis = static(seq_axis) % np.ndim(x), static(batch_axis) % np.ndim(x)
    moved = jnp.moveaxis(x, (batch_axis, seq_axis), (0, 1))
    place = np.arange(moved.shape[1])
    source = jnp.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)
    return jnp.moveaxis(jax.vmap(lambda row, order: row[order])(moved, source), (0, 1), (batch_axis, seq_axis))


def _blocks(x: Array, rows: int, columns: int) -> Array:
    """Images (n, c, h, w) in blocks of so many pixels: (n, c, rows, columns, h / rows, w / columns)."""
    n, c, h, w = np.shape(x)
    return jnp.reshape(x, (n, c, h // rows, rows, w // columns, columns)).transpose(0, 1, 3, 5, 2, 4)


def _images(blocks: Array) -> Array:
    """The inverse of `_blocks`."""
    n, c, rows, columns, h, w = blocks.shape
    return blocks.transpose(0, 1, 4, 2, 5, 3).reshape(n, c, h * rows, w * columns)


def depth_to_space(x: Array, block_size: Any) -> Array:
    """Blocks of pixels out of channels, the place in the block first."""
    n, c, h, w = np.shape(x)
    b = static(block_size)
    return _images(jnp.reshape(x, (n, b, b, c // b**2, h, w)).transpose(0, 3, 1, 2, 4, 5))


def space_to_depth(x: Array, block_size: Any) -> Array:
    """The inverse of `depth_to_space`."""
    b = static(block_size)
    n, c, _, _, h, w = (blocks := _blocks(x, b, b)).shape
    return blocks.transpose(0, 2, 3, 1, 4, 5).reshape(n, c * b**2, h, w)


def pixel_shuffle(x: Array, upscale_factor: Any) -> Array:
    """Blocks of pixels out of channels, the place in the block last."""
    n, c, h, w = np.shape(x)
    f = static(upscale_factor)
    return _images(jnp.reshape(x, (n, c // f**2, f, f, h, w)))


def pixel_unshuffle(x: Array, downscale_factor: Any) -> Array:
    """The inverse of `pixel_shuffle`."""
    f = static(downscale_factor)
    n, c, _, _, h, w = (blocks := _blocks(x, f, f)).shape
    return blocks.reshape(n, c * f**2, h, w)


def space_to_batch(x: Array, block_shape: Array, paddings: Array) -> Array:
    """Every so manieth pixel as an image of its own."""
    (a, b), widths = static(block_shape), static(paddings)
    n, c, _, _, h, w = (blocks := _blocks(jnp.pad(x, ((0, 0), (0, 0), *widths)), a, b)).shape
    return blocks.transpose(2, 3, 0, 1, 4, 5).reshape(n * a * b, c, h, w)


def batch_to_space(x: Array, block_shape: Array, crops: Array) -> Array:
    """The inverse of `space_to_batch`."""
    (a, b), widths = static(block_shape), static(crops)
    n, c, h, w = np.shape(x)
    return crop(_images(jnp.reshape(x, (a, b, n // (a * b), c, h, w)).transpose(2, 3, 0, 1, 4, 5)), *widths)


def sliding_windows(x: Array, axis: Any, size: Any, stride: Any = 1) -> Array:
    """All windows along an axis, on an axis of their own."""
    axis, size = static(axis) % np.ndim(x), static(size)
    starts = np.arange(0, np.shape(x)[axis] - size + 1, static(stride))
    return jnp.take(x, starts[:, None] + np.arange(size), axis=axis)


def crop(x: Array, crop_height: Array, crop_width: Array) -> Array:
    """Without the outer rows and columns."""
    (top, bottom), (left, right) = static(crop_height), static(crop_width)
    height, width = np.shape(x)[-2:]
    return x[..., top : height - bottom, left : width - right]


OPS: dict[str, Function] = {
    "band_part": band_part,
    "batch_to_space": batch_to_space,
    "concat": concat,
    "crop": crop,
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "fill": lambda shape, value=0.0: jnp.full(static(shape), value),
    "fill_like": lambda ref_tensor, value=0.0: jnp.full(np.shape(ref_tensor), value),
    "flatten2d": flatten2d,
    "one_hot": one_hot,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "range_1d": lambda end, start, step: jnp.arange(static(start), static(end), static(step)),
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": lambda x, axes=None: jnp.flip(x, axes_of(axes, np.ndim(x))),
    "reverse_sequence": reverse_sequence,
    "shape": lambda x: np.asarray(np.shape(x), np.int32),
    "sliding_windows": sliding_windows,
    "space_to_batch": space_to_batch,
    "space_to_depth": space_to_depth,
    "split": split,
    "squeeze": squeeze,
    "stack": lambda values, axis: jnp.stack(values, static(axis)),
    "tile": lambda x, reps: jnp.tile(x, static(reps)),
    "transpose": lambda x, perm: jnp.transpose(x, static(perm)),
}
