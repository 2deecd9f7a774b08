"""`with_channel_scale`: a scale for every channel of a leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palettax._typing import Array, Tree, is_traced
from palettax.clustering.checks import as_host, float64_stays
from palettax.leaf import PalettizedArray, as_numpy, channel_axes, depalettize, is_palettized, multiply_scales
from palettax.transforms.base import (
    PaletteTransformation,
    check_transform,
    is_stateful,
    map_leaves,
    shared,
    with_gradient_of,
)
from palettax.transforms.elements import hidden_elements, numpy_of
from palettax.transforms.wrapping import dense_on_host, is_weight, positive, scaled_mass, stored, wrapped


def with_channel_scale(
    inner: PaletteTransformation, *, channel_axis: int | None = None, max_steps: int = 8
) -> PaletteTransformation:
    """Give every channel of a leaf a scale of its own, so that channels of different size share a table well.

    minimise over lut, indices and scale:  Σ sensitivity · (weight - scale[channel] · lut[index])²

    Starts from scale = max |weight| of the channel. Then, in turns, the inner transform fits weight / scale with its
    squared errors weighted by sensitivity · scale², and the scales are refitted by least squares,

        scale[channel] = Σ sensitivity · weight · value / Σ sensitivity · value²,

    value being what the table gives. The best fit is kept, the one without scales among them, so no leaf gets worse.
    The scale of a channel of zeros is one; a leaf of rank 1, whose every weight would be a channel, gets none. Around a
    transform that trains, such as `dkm`, the scale is max |weight| of the channel in every update, and at the end.

    Args:
        inner: the transform; it should heed sensitivity, as `kmeans` does.
        channel_axis: the axis with a scale per element; None for the output channels: the last axis of a leaf named
            `kernel`, as in Flax, else the first, as in torch.
        max_steps: fits of scaled weights, after one of the weights as they are.

    Example:
        >>> import jax, jax.numpy as jnp, palettax as px
        >>> rows = {"w": jax.random.normal(jax.random.key(0), (64, 64)) * jnp.logspace(-2, 0, 64)[:, None]}
        >>> plain, scaled = px.kmeans(3), px.with_channel_scale(px.kmeans(3))
        >>> error = lambda t: float(jnp.sum((px.depalettize(px.palettize(rows, t))["w"] - rows["w"]) ** 2))
        >>> error(scaled) < 0.5 * error(plain)
        True
    """
    check_transform("inner", inner)
    if channel_axis is not None and (isinstance(channel_axis, bool) or not isinstance(channel_axis, int | np.integer)):
        raise ValueError(f"channel_axis={channel_axis!r}; it must be the number of an axis, or None")
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}; at least one fit is needed")

    def first_scale(name: str, weights: Any, sensitivity: Array | None) -> Array:
        rank = getattr(weights, "ndim", 0)
        if rank < 2 or not is_weight(weights):
            return np.ones((1,) * rank, np.float32)
        axis = channel_axes(name, rank)[0] if channel_axis is None else channel_axis
        if not -rank <= axis < rank:
            raise ValueError(f"channel_axis={channel_axis} is not an axis of {weights.shape}")
        largest = _largest(weights, sensitivity, [a for a in range(rank) if a != axis % rank])
        return positive(largest, largest.dtype.type(1))

    @float64_stays
    def refit(name: str, leaf: Any, scale: Array, weights: Any, sensitivity: Array | None) -> Array:
        """Least squares per channel; `leaf` is of the scaled weights."""
        if not is_palettized(leaf) or scale.size == 1:
            return scale
        values, wide, mass = _wide(as_numpy(leaf).depalettize(), weights, sensitivity)
        others = tuple(a for a, length in enumerate(scale.shape) if length == 1)
        top = (mass * wide * values).sum(axis=others, keepdims=True)
        bottom = (mass * values * values).sum(axis=others, keepdims=True)
        fresh = positive((top / positive(bottom, bottom.dtype.type(1))).astype(scale.dtype), scale)
        # A scale so small that weights overflow when divided by it is no candidate.
        room = float(jnp.finfo(scale.dtype).max) / 2
        fits = _largest(wide, sensitivity, others) / room < fresh
        return numpy_of(fresh, scale).where(fits, fresh, scale)

    @float64_stays
    def better(name: str, new: Any, old: Any, weights: Any, sensitivity: Array | None) -> Any:
        """Of two leaves the one of less weighted error."""
        if not (is_palettized(new) and is_palettized(old)):
            return old
        gain = _error(old, weights, sensitivity) - _error(new, weights, sensitivity)
        if not is_traced(gain):
            return new if gain > 0 else old
        return jax.tree.map(lambda a, b: jnp.where(gain > 0, a, b), new, old)

    def init(params: Tree) -> Tree:
        dense = dense_on_host(params)
        return inner.init(map_leaves(_divided, dense, map_leaves(lambda name, w: first_scale(name, w, None), dense)))

    def rescaled(name: str, values: Any, divided: Any, scale: Array, weights: Any) -> Any:
        if scale.size == 1:
            return values
        # What passed through as it was is to be as it was: division and product would round.
        return with_gradient_of(jnp.where(values == divided, weights, values * scale), values * scale)

    def train(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> tuple[Tree, Tree]:
        dense, sensitivity = depalettize(params), shared(params, sensitivity)
        scale = jax.lax.stop_gradient(map_leaves(first_scale, dense, sensitivity))
        mass = map_leaves(scaled_mass, dense, sensitivity, scale)
        divided = map_leaves(_divided, dense, scale)
        values, state = inner.update(divided, state, sensitivity=mass)
        return map_leaves(rescaled, values, divided, scale, dense), state

    def finalize(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> Tree:
        dense, sensitivity = dense_on_host(params), shared(params, sensitivity)
        scale = map_leaves(first_scale, dense, sensitivity)

        def fit(scale: Tree) -> Tree:
            mass = map_leaves(scaled_mass, dense, sensitivity, scale)
            return inner.finalize(map_leaves(_divided, dense, scale), state, sensitivity=mass)

        if is_stateful(state):  # its tables are of weights over the scale they were trained with
            return stored(params, map_leaves(_rescaled, fit(scale), scale, dense))
        best = map_leaves(_unscaled, inner.finalize(dense, state, sensitivity=sensitivity), scale)
        for _ in range(max_steps):
            small = fit(scale)
            best = map_leaves(better, map_leaves(_rescaled, small, scale, dense), best, dense, sensitivity)
            scale = map_leaves(refit, small, scale, dense, sensitivity)
        return stored(params, best)

    return wrapped(inner, finalize, init=init, train=train)


def _divided(name: str, weights: Any, scale: Array) -> Any:
    return weights if scale.size == 1 else weights / scale


@float64_stays
def _rescaled(name: str, leaf: Any, scale: Array, weights: Any) -> Any:
    """A leaf that was fitted to scaled weights, as a leaf of the weights."""
    if not is_palettized(leaf) or scale.size == 1:
        return leaf
    if leaf.kept is not None:
        if is_traced(leaf.mask):
            raise ValueError("kept values cannot be put back while the mask is traced; put the mask outside the scales")
        leaf = dataclasses.replace(leaf, kept=jnp.asarray(weights)[~np.asarray(leaf.mask)])
    scale = jnp.asarray(scale, leaf.dtype)
    return dataclasses.replace(leaf, scale=scale if leaf.scale is None else multiply_scales(scale, leaf.scale))


def _unscaled(name: str, leaf: Any, scale: Array) -> Any:
    """A leaf without scales of channels; while tracing, where all candidates have one structure, with scales of one."""
    if not is_palettized(leaf) or not any(map(is_traced, (leaf.lut, leaf.indices, scale))):
        return leaf
    return _rescaled(name, leaf, np.ones(scale.shape, scale.dtype), None)


def _largest(weights: Array, sensitivity: Array | None, axes: Sequence[int]) -> Array:
    """The largest magnitude along axes of what is not hidden."""
    size = abs(as_host(weights))
    if sensitivity is not None:
        size = numpy_of(size, sensitivity).where(hidden_elements(as_host(sensitivity)), size.dtype.type(0), size)
    return size.max(axis=tuple(axes), keepdims=True)


def _wide(values: Array, weights: Array, sensitivity: Array | None) -> tuple[Array, Array, Array]:
    """Values, weights and sensitivities in the widest dtype at hand; weights that do not count have no error."""
    xp = numpy_of(values, weights, sensitivity)
    dtype = np.float64 if xp is np else jnp.promote_types(weights.dtype, jnp.float32)
    mass = xp.ones((1,) * weights.ndim, dtype) if sensitivity is None else xp.asarray(sensitivity).astype(dtype)
    mass = xp.where(xp.isinf(mass), mass.dtype.type(0), mass)  # of zeros, which will be zero
    values, weights = (xp.asarray(a).astype(dtype) for a in (values, weights))
    return values, xp.where(mass > 0, weights, values), mass


def _error(leaf: PalettizedArray, weights: Array, sensitivity: Array | None) -> Any:
    values, weights, mass = _wide(as_numpy(leaf).depalettize(), weights, sensitivity)
    return (mass * (weights - values) ** 2).sum()
