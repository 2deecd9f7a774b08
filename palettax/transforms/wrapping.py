"""What transforms around transforms have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from palettax._typing import Array, Tree
from palettax.clustering.assignment import assign_groups
from palettax.clustering.checks import as_host, check_sensitivity
from palettax.clustering.levels import ZERO_LEVEL
from palettax.leaf import (
    PalettizedArray,
    depalettize,
    is_palettized,
    level_numbers,
    merge_blocks,
    multiply_scales,
    split_blocks,
)
from palettax.transforms.base import (
    PaletteTransformation,
    is_stateful,
    map_leaves,
    placed_like,
)
from palettax.transforms.elements import numpy_of


def wrapped(
    inner: PaletteTransformation,
    finalize: Callable[..., Tree],
    *,
    init: Callable[[Tree], Tree] | None = None,
    train: Callable[..., tuple[Tree, Tree]] | None = None,
) -> PaletteTransformation:
    """The transform that stores what `finalize` makes, its state that of the inner one.

    Args:
        inner: what it is around.
        finalize: what it stores.
        init: where its state starts; None for where the inner one does.
        train: its update, if the inner transform follows weights in training; None for the inner update.
    """

    def update(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> tuple[Tree, Tree]:
        if is_stateful(state):
            return (train or inner.update)(params, state, sensitivity=sensitivity)
        return depalettize(finalize(params, state, sensitivity=sensitivity)), state

    return PaletteTransformation(init or inner.init, update, finalize)


def stored(params: Tree, small: Tree) -> Tree:
    """What was palettized, where its weights were, and the very leaves that were not."""
    return map_leaves(lambda name, new, old: placed_like(old, new) if is_palettized(new) else old, small, params)


def dense_on_host(params: Tree) -> Tree:
    """Every leaf dense, and weights in NumPy where they are concrete."""
    return map_leaves(lambda name, leaf: as_host(leaf) if is_weight(leaf) else leaf, depalettize(params))


def is_weight(leaf: Any) -> bool:
    """Whether a leaf is a float array with elements: what a table can stand for."""
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.floating)) and leaf.size > 0


def scaled_mass(name: str, weights: Any, sensitivity: Array | None, scale: Array) -> Array | None:
    """What a squared error of weight / scale costs: sensitivity · scale²."""
    if scale.size == 1:
        return sensitivity
    check_sensitivity(sensitivity, weights, infinite=True)
    wide = scale.astype(np.promote_types(scale.dtype, np.float32))
    xp = numpy_of(weights, sensitivity, scale)
    # Only ratios count, and squares of tiny scales would vanish.
    mass = xp.broadcast_to((wide / wide.max()) ** 2, weights.shape)
    return mass if sensitivity is None else xp.asarray(sensitivity) * mass


def positive(values: Any, otherwise: Any) -> Any:
    """Values where they are positive and finite, something else elsewhere."""
    return numpy_of(values, otherwise).where((values > 0) & (values < np.inf), values, otherwise)


def spread(scale: Any, shape: tuple[int, ...]) -> Array:
    """A scale by blocks, as one number per weight."""
    return multiply_scales(as_host(scale), numpy_of(scale).ones(shape, scale.dtype))


def pin_zero(leaf: PalettizedArray, scaled: Array, needed: Array) -> PalettizedArray:
    """The leaf with the entry nearest to zero set to zero in the tables that need it, and indices found anew.

    Args:
        leaf: of scalars.
        scaled: (*shape), the weights over the leaf's scale.
        needed: (*groups) bool.
    """
    needed = jnp.asarray(needed).reshape(-1, 1)
    lut = jnp.asarray(leaf.lut).reshape(-1, leaf.lut.shape[-2])
    size = abs(level_numbers(jnp, lut, leaf.dtype))
    near = size == size.min(axis=1, keepdims=True)
    # Of equals below zero the last and of those above it the first, so that the table stays ascending.
    k, negative = lut.shape[1], (level_numbers(jnp, lut, leaf.dtype) < 0) & near
    last = k - 1 - jnp.argmax(negative[:, ::-1], axis=1)
    closest = jnp.where(negative.any(axis=1), last, jnp.argmax(near, axis=1))[:, None]
    zero = lut.dtype.type(ZERO_LEVEL if lut.dtype == np.uint8 else 0)
    lut = jnp.where(needed & (jnp.arange(k) == closest), zero, lut)
    found = assign_groups(split_blocks(scaled, leaf.groups), level_numbers(jnp, lut, leaf.dtype), None)
    found = jnp.where(needed, found, split_blocks(leaf.indices, leaf.groups))
    indices = merge_blocks(found, leaf.groups, leaf.shape)
    if leaf.mask is not None:
        indices = jnp.where(leaf.mask, indices, 0)
    return dataclasses.replace(leaf, lut=lut.reshape(leaf.lut.shape), indices=indices)
