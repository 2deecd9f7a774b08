"""`quantize_lut`: tables in a narrow dtype."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from palettax._typing import Array, Tree
from palettax.clustering.checks import check_sensitivity, float64_stays
from palettax.clustering.level_vectors import quantized_vectors
from palettax.clustering.levels import level_values, quantized_lut
from palettax.leaf import is_palettized, merge_blocks, multiply_scales, split_blocks
from palettax.transforms.base import PaletteTransformation, check_transform, map_leaves, shared
from palettax.transforms.elements import fill_hidden, hidden_elements, hide_elements, numpy_of
from palettax.transforms.wrapping import dense_on_host, pin_zero, positive, scaled_mass, spread, stored, wrapped


def quantize_lut(inner: PaletteTransformation, dtype: Any) -> PaletteTransformation:
    """Store tables in a narrow dtype: entry = step · level, one step per table.

    minimise over step, levels and indices:  Σ sensitivity · (weight - step · level[index])²

    The levels are chosen among all that the dtype holds, not rounded to: for scalars the table of a group is optimal
    for its step, for vectors every entry for its cell. Indices are found anew. The step of a table becomes its block of
    the leaf's `scale`.

    Around a transform that trains, `finalize` alone makes narrow tables, and fits them anew; `dkm(lut_dtype=...)`
    trains and stores rounded ones.

    Args:
        inner: the transform that makes the tables. An entry that is zero stays zero. Leaves that the inner transform
            did not make keep their tables.
        dtype: int8, uint8 (a level u stands for u - 128), float8_e4m3fn or float8_e5m2.

    Raises:
        ValueError: another dtype; from `update` and `finalize`, tables that are narrow already.

    Example:
        >>> import jax, palettax as px
        >>> weights = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> small = px.palettize(weights, px.quantize_lut(px.kmeans(4), "int8"))["w"]
        >>> str(small.lut.dtype), small.scale.shape
        ('int8', (1, 1))

    References:
        Wu, "Optimal quantization by matrix searching", Journal of Algorithms 12, 1991.
    """
    check_transform("inner", inner)
    narrow = _dtype_of(dtype)

    @float64_stays
    def quantize(name: str, leaf: Any, given: Any, weights: Any, sensitivity: Array | None) -> Any:
        if not is_palettized(leaf) or leaf is given:  # the inner transform did not make it
            return leaf
        if leaf.lut.dtype != leaf.dtype:
            raise ValueError(f"the table is of {leaf.lut.dtype} already; quantize_lut takes tables of floats")
        check_sensitivity(sensitivity, weights, infinite=True)
        if sensitivity is not None:  # an entry is zero already where that is asked for
            xp = numpy_of(sensitivity)
            sensitivity = xp.where(xp.isinf(sensitivity), sensitivity.dtype.type(-0.0), sensitivity)
        holds_zero = (leaf.lut == 0).all(axis=-1).any(axis=-1)
        if leaf.mask is not None:
            sensitivity = hide_elements(sensitivity, weights, leaf.mask)
        if leaf.scale is not None:
            scale = spread(leaf.scale, leaf.shape)
            sensitivity = scaled_mass(name, weights, sensitivity, scale)
            weights = weights / positive(scale, scale.dtype.type(1))
        vectors = leaf.vector_axis, leaf.vector_size
        rows = split_blocks(weights, leaf.groups, *vectors)
        mass = None if sensitivity is None else split_blocks(sensitivity, leaf.groups, *vectors)
        lut = leaf.lut.reshape(-1, *leaf.lut.shape[-2:])
        if leaf.vector_size > 1:
            fit = quantized_vectors(rows, lut, narrow, mass, step_dtype=leaf.dtype)
        else:
            rows = rows if mass is None else fill_hidden(rows, hidden_elements(mass))
            fit = quantized_lut(rows, 2**leaf.nbits, narrow, mass, step_dtype=leaf.dtype)
        indices = merge_blocks(jnp.asarray(fit.indices), leaf.groups, leaf.indices.shape)
        # A table of NaN says that there is none; so does a step.
        step = jnp.where(jnp.isfinite(lut).all(axis=(1, 2)), jnp.asarray(fit.step, leaf.dtype), jnp.nan)
        step = step.reshape(leaf.groups)
        small = dataclasses.replace(
            leaf,
            lut=jnp.asarray(fit.lut).reshape(leaf.lut.shape),
            indices=indices if leaf.mask is None else jnp.where(leaf.mask, indices, 0),
            scale=step if leaf.scale is None else multiply_scales(leaf.scale, step),
        )
        return small if leaf.vector_size > 1 else pin_zero(small, weights / spread(step, leaf.shape), holds_zero)

    def finalize(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> Tree:
        small, dense = inner.finalize(params, state, sensitivity=sensitivity), dense_on_host(params)
        return stored(params, map_leaves(quantize, small, params, dense, shared(params, sensitivity)))

    return wrapped(inner, finalize)


def _dtype_of(dtype: Any) -> np.dtype:
    """A narrow dtype, also by name."""
    narrow = jnp.dtype(dtype)
    level_values(narrow)  # refuses others
    return narrow
