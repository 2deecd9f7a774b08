"""What transforms around transforms have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from palettax._typing import Array, Tree
from palettax.clustering.checks import as_host
from palettax.leaf import depalettize, is_palettized, multiply_scales
from palettax.transforms.base import PaletteTransformation, map_leaves, placed_like
from palettax.transforms.elements import numpy_of


def wrapped(inner: PaletteTransformation, finalize: Callable[..., Tree]) -> PaletteTransformation:
    """The transform that stores what `finalize` makes, its state that of the inner one."""

    def update(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> tuple[Tree, Tree]:
        return depalettize(finalize(params, state, sensitivity=sensitivity)), state

    return PaletteTransformation(inner.init, update, finalize)


def stored(params: Tree, small: Tree) -> Tree:
    """What was palettized, where its weights were, and the very leaves that were not."""
    return map_leaves(lambda name, new, old: placed_like(old, new) if is_palettized(new) else old, small, params)


def dense_on_host(params: Tree) -> Tree:
    """Every leaf dense, and in NumPy where it is a concrete JAX array."""
    return jax.tree.map(lambda leaf: as_host(leaf) if isinstance(leaf, jax.Array) else leaf, depalettize(params))


def scaled_mass(name: str, weights: Array, sensitivity: Array | None, scale: Array) -> Array | None:
    """What a squared error of weight / scale costs: sensitivity · scale²."""
    if scale.size == 1:
        return sensitivity
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
