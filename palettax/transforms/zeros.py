"""`keep_zeros`: exact zeros stay exact."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from palettax._typing import Array, Tree
from palettax.clustering.checks import float64_stays
from palettax.leaf import depalettize, is_palettized, split_blocks
from palettax.transforms.base import PaletteTransformation, check_transform, map_leaves, shared
from palettax.transforms.elements import hide_elements, keep_elements, numpy_of
from palettax.transforms.wrapping import dense_on_host, is_weight, pin_zero, positive, spread, stored, wrapped


def keep_zeros(inner: PaletteTransformation, *, sparse: bool = False) -> PaletteTransformation:
    """Palettize pruned weights: what is exactly zero stays exactly zero.

    Args:
        inner: the transform; it should heed sensitivity, as `kmeans` does. Scalars only.
        sparse: where the zeros go. False: each table that zeros need has an entry that is zero; the other entries are
            chosen for that. True: no entry; a bitmap beside the indices says where they are, and only the others have
            an index.

    Raises:
        ValueError: from `update` and `finalize`: tables of vectors, whose elements share an index.

    Example:
        >>> import jax, jax.numpy as jnp, palettax as px
        >>> dense = jax.random.normal(jax.random.key(0), (64, 64))
        >>> pruned = {"w": jnp.where(jnp.abs(dense) > 1, dense, 0)}
        >>> small = px.palettize(pruned, px.keep_zeros(px.kmeans(2), sparse=True))["w"]
        >>> bool((small.depalettize()[pruned["w"] == 0] == 0).all()), bool((small.lut == 0).any())
        (True, False)
    """
    check_transform("inner", inner)

    def marked(name: str, weights: Any, sensitivity: Array | None) -> Array | None:
        """Hidden zeros, or zeros of infinite cost: an entry is to be zero."""
        mass: Any = hidden(name, weights, sensitivity)
        if sparse or not is_weight(weights):
            return mass
        return numpy_of(mass).where(weights != 0, mass, mass.dtype.type(np.inf))

    @float64_stays
    def set_zero(name: str, leaf: Any, weights: Any) -> Any:
        if not is_palettized(leaf):
            return leaf
        if leaf.vector_size > 1:
            raise ValueError(f"vectors of {leaf.vector_size}: elements of a vector share an index, zeros and others")
        needed = (split_blocks(weights, leaf.groups) == 0).any(axis=1).reshape(leaf.groups)
        scaled = weights
        if leaf.scale is not None:
            scale = spread(leaf.scale, leaf.shape)
            scaled = weights / positive(scale, scale.dtype.type(1))
        return pin_zero(leaf, scaled, needed)

    def leave_out(name: str, leaf: Any, weights: Any) -> Any:
        return keep_elements(leaf, weights, weights != 0, zeros=True) if is_palettized(leaf) else leaf

    def hidden(name: str, weights: Any, sensitivity: Array | None) -> Array | None:
        return hide_elements(sensitivity, weights, weights != 0) if is_weight(weights) else sensitivity

    def still_zero(name: str, values: Any, weights: Any) -> Any:
        return jnp.where(weights == 0, values.dtype.type(0), values) if is_weight(weights) else values

    def train(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> tuple[Tree, Tree]:
        dense = depalettize(params)
        values, state = inner.update(dense, state, sensitivity=map_leaves(marked, dense, shared(params, sensitivity)))
        return map_leaves(still_zero, values, dense), state

    def finalize(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> Tree:
        dense, sensitivity = dense_on_host(params), shared(params, sensitivity)
        mass = map_leaves(marked, dense, sensitivity)
        small = inner.finalize(dense, state, sensitivity=mass)
        return stored(params, map_leaves(leave_out if sparse else set_zero, small, dense))

    return wrapped(inner, finalize, train=train)
