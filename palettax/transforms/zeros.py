"""`keep_zeros`: exact zeros stay exact."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from palettax._typing import Array, Tree
from palettax.clustering.assignment import assign_groups
from palettax.clustering.checks import float64_stays
from palettax.clustering.levels import ZERO_LEVEL
from palettax.leaf import is_palettized, level_numbers, merge_blocks, split_blocks
from palettax.transforms.base import PaletteTransformation, map_leaves
from palettax.transforms.elements import hide_elements, is_element_mask, keep_elements, numpy_of, weigh_elements
from palettax.transforms.wrapping import dense_on_host, positive, spread, stored, wrapped


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

    def pinned(name: str, weights: Any, sensitivity: Array | None, mask: Any) -> Array | None:
        if not is_element_mask(mask):
            return sensitivity
        # As good as infinite, so that an entry settles on zero; its last bits are set afterwards.
        mass: Any = weigh_elements(sensitivity, weights, mask)
        total = mass.sum()
        return numpy_of(mass).where(mask, mass / positive(total, total.dtype.type(1)), mass.dtype.type(2.0**20))

    @float64_stays
    def set_zero(name: str, leaf: Any, weights: Array, mask: Array) -> Any:
        if not is_palettized(leaf):
            return leaf
        if leaf.vector_size > 1:
            raise ValueError(f"vectors of {leaf.vector_size}: elements of a vector share an index, zeros and others")
        lut = jnp.asarray(leaf.lut).reshape(-1, leaf.lut.shape[-2])
        entries = level_numbers(jnp, lut, leaf.dtype)
        needed = ~split_blocks(mask, leaf.groups).all(axis=1, keepdims=True)
        closest = jnp.arange(lut.shape[1]) == abs(entries).argmin(axis=1, keepdims=True)
        zero = ZERO_LEVEL if lut.dtype == np.uint8 else 0
        lut = jnp.where(needed & closest, lut.dtype.type(zero), lut)
        scaled = weights if leaf.scale is None else weights / spread(leaf.scale, leaf.shape)
        found = assign_groups(split_blocks(scaled, leaf.groups), level_numbers(jnp, lut, leaf.dtype), None)
        indices = merge_blocks(found, leaf.groups, leaf.shape)
        if leaf.mask is not None:
            indices = jnp.where(leaf.mask, indices, 0)
        return dataclasses.replace(leaf, lut=lut.reshape(leaf.lut.shape), indices=indices)

    def leave_out(name: str, leaf: Any, weights: Array, mask: Array) -> Any:
        return keep_elements(leaf, weights, mask, zeros=True) if is_palettized(leaf) else leaf

    def finalize(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> Tree:
        dense = dense_on_host(params)
        mask = map_leaves(lambda name, weights: weights != 0, dense)
        if sparse:
            mass = map_leaves(lambda name, w, s, m: weigh_elements(s, w, m), dense, sensitivity, mask)
            hidden = map_leaves(lambda name, w, m: hide_elements(w, m), dense, mask)
            return stored(params, map_leaves(leave_out, inner.finalize(hidden, state, sensitivity=mass), dense, mask))
        small = inner.finalize(dense, state, sensitivity=map_leaves(pinned, dense, sensitivity, mask))
        return stored(params, map_leaves(set_zero, small, dense, mask))

    return wrapped(inner, finalize)
