"""What a configuration asks for, as a transform of one weight, or why the weight cannot have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import coremltools as ct
import jax
import numpy as np

from palettax.coreml.config import OpPalettizerConfig
from palettax.coreml.package import Op
from palettax.coreml.weights import Numbers, output_axis, parts_of
from palettax.leaf import Granularity, PalettizedArray
from palettax.palettize import count_nonfinite
from palettax.transforms import PaletteTransformation, custom, kmeans, masked, uniform, unique, with_channel_scale


def transform_of(config: OpPalettizerConfig, op: Op, numbers: Numbers) -> PaletteTransformation:
    """The transform that makes the table of a weight.

    Args:
        config: what is asked for.
        op: the weight.
        numbers: what is stored for it. Under a scale of theirs they get no other.
    """
    granularity = _granularity(config, op)
    inner = _tables(config, granularity, numbers.values.shape)
    if config.enable_per_channel_scale and numbers.scale is None:
        inner = with_channel_scale(inner, channel_axis=output_axis(op))
    return inner if numbers.mask is None else masked(inner, lambda tree: jax.tree.map(lambda _: _inside(numbers), tree))


def _inside(numbers: Numbers) -> np.ndarray:
    """Where a pruned weight needs an entry: not for zeros that are stored for it, unless an offset makes them more."""
    mask: Any = numbers.mask
    return mask if numbers.offset is not None else mask & (numbers.values != 0)


def unfit(config: OpPalettizerConfig, op: Op, numbers: Numbers) -> str:
    """Why a weight cannot have what is asked for; empty if it can.

    Args:
        config: what is asked for.
        op: the weight.
        numbers: what is stored for it.
    """
    bad = count_nonfinite(numbers.values)
    if bad:
        return f"{bad} of its numbers are NaN or infinite"
    if output_axis(op) is None and (_cuts(config) or config.enable_per_channel_scale):
        return "the ops that read it have their outputs along different axes of it; set channel_axis, or per_tensor"
    if config.cluster_dim > 1 and numbers.offset is not None:
        return f"cluster_dim={config.cluster_dim}: there is an offset for each channel, and a vector has one table"
    if config.cluster_dim > 1 and numbers.mask is not None:
        return f"cluster_dim={config.cluster_dim}: zeros and other elements of a vector would share an index"
    try:
        granularity = _granularity(config, op)
        granularity.groups(op.outputs[0].shape)
    except ValueError as error:
        return str(error)
    if config.cluster_dim > 1 and granularity.vector_axis_of(op.outputs[0].shape) == 0:
        outputs, parts = op.outputs[0].shape[0], parts_of(op)
        if outputs // parts % config.cluster_dim:
            return f"cluster_dim={config.cluster_dim} does not divide the {outputs // parts} channels of {parts} groups"
    return ""


def _cuts(config: OpPalettizerConfig) -> bool:
    """Whether the table depends on the axis of the outputs."""
    grouped = config.granularity == "per_grouped_channel" and config.group_size > 0
    return (grouped and config.channel_axis is None) or config.cluster_dim > 1


def _granularity(config: OpPalettizerConfig, op: Op) -> Granularity:
    axis, size = output_axis(op) or 0, None
    if config.granularity == "per_grouped_channel":
        axis = axis if config.channel_axis is None else config.channel_axis
        size = config.group_size or None
    return Granularity(size, axis, vector_size=config.cluster_dim)


def _tables(config: OpPalettizerConfig, granularity: Granularity, shape: tuple[int, ...]) -> PaletteTransformation:
    """The transform of the mode."""
    if config.lut_function is not None:
        groups = granularity.groups(shape)
        block = tuple(length // count for length, count in zip(shape, groups, strict=True))
        axis = granularity.vector_axis_of(shape)
        axis = max(range(len(shape)), key=lambda a: groups[a]) if axis is None else axis
        return custom(_in_own_shape(config.lut_function, block, axis), granularity=granularity)
    if config.nbits is None:
        return unique(granularity=granularity)
    if config.mode == "uniform":
        return uniform(config.nbits, granularity=granularity)
    key = jax.random.key(0) if config.cluster_dim > 1 else None
    return kmeans(config.nbits, granularity=granularity, key=key)


def _in_own_shape(function: Callable[..., Any], block: tuple[int, ...], axis: int) -> Callable[..., Any]:
    """A function of a group, as coremltools calls it, as one of the group's elements, or vectors along the axis."""

    def of_rows(rows: Any) -> tuple[Any, Any]:
        rows, size = np.asarray(rows), np.shape(rows)[1] if np.ndim(rows) > 1 else 1
        shape = tuple(length // size if a == axis else length for a, length in enumerate(block))
        weights = np.moveaxis(rows.reshape(*shape, size), -1, axis + 1).reshape(block).swapaxes(0, axis)
        lut, indices = function(weights)[:2]
        if np.size(indices) != len(rows):
            return lut, indices
        swapped = [weights.shape[0] // size, *weights.shape[1:]]
        return lut, np.asarray(indices).reshape(swapped).swapaxes(0, axis).reshape(-1)

    return of_rows


def in_bits_of(leaf: PalettizedArray, target: ct.target) -> PalettizedArray:
    """A leaf of the fewest bits in as few as the target holds: before iOS18, 4 for 3."""
    if leaf.nbits != 3 or target >= ct.target.iOS18:
        return leaf
    last = np.asarray(leaf.lut)[..., -1:, :]
    return dataclasses.replace(leaf, lut=np.concatenate([leaf.lut, *[last] * 8], axis=-2), nbits=4)
