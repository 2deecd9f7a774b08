"""Transforms that snap every weight to its palette: the array functions, leaf by leaf and group by group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palettax._typing import Array, is_traced
from palettax.clustering import LutFit, assign, uniform_lut, unique_lut
from palettax.clustering.checks import (
    Method,
    as_host,
    check_finite,
    check_method,
    check_nbits,
    check_sensitivity,
    check_weights,
    float64_stays,
)
from palettax.clustering.kmeans import kmeans_groups
from palettax.clustering.unique import nbits_for, smallest_nbits
from palettax.leaf import PER_TENSOR, Granularity, PalettizedArray, depalettize, merge_blocks, split_blocks
from palettax.transforms.base import PaletteTransformation, map_leaves

GroupFit = Callable[[Array, Array | None], LutFit]
"""Fits the rows of (groups, n) weights, with sensitivities of that shape or None; fields get a leading axis."""


def kmeans(
    nbits: int, *, granularity: Granularity = PER_TENSOR, method: Method = "exact", max_steps: int = 100
) -> PaletteTransformation:
    """Palettes of least squared error: `kmeans_lut` for every group of every leaf.

    Args:
        nbits: 1, 2, 3, 4, 6 or 8.
        granularity: which weights share a table.
        method: "exact", or "lloyd" to stay on the accelerator.
        max_steps: Lloyd steps at most.

    Example:
        >>> import jax, palettax as px
        >>> weights = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> px.palettize(weights, px.kmeans(nbits=4, granularity=px.Granularity(group_size=16)))["w"].lut.shape
        (4, 1, 16, 1)
    """
    check_nbits(nbits)
    check_method(method)
    return _hard(lambda w, s: kmeans_groups(w, nbits, s, method, max_steps, dtype=np.dtype(w.dtype)), granularity)


def uniform(nbits: int, *, granularity: Granularity = PER_TENSOR) -> PaletteTransformation:
    """Evenly spaced palettes: `uniform_lut` for every group of every leaf. Sensitivity is not used.

    Args:
        nbits: 1, 2, 3, 4, 6 or 8.
        granularity: which weights share a table.

    Example:
        >>> import jax, palettax as px
        >>> weights = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> px.palettize(weights, px.uniform(nbits=8))["w"].nbits
        8
    """
    check_nbits(nbits)
    return _hard(lambda w, s: jax.vmap(lambda row: uniform_lut(row, nbits))(jnp.asarray(w)), granularity)


def unique(nbits: int | None = None, *, granularity: Granularity = PER_TENSOR) -> PaletteTransformation:
    """Lossless palettes for weights with few distinct values: `unique_lut`. Other leaves stay dense.

    Args:
        nbits: 1, 2, 3, 4, 6 or 8; None for the smallest that serves every group of the leaf.
        granularity: which weights share a table.

    Example:
        >>> import jax.numpy as jnp, palettax as px
        >>> ternary = {"w": jnp.sign(jnp.arange(-2000.0, 2000.0)).reshape(40, 100)}
        >>> small = px.palettize(ternary, px.unique())
        >>> small["w"].nbits, bool((px.depalettize(small)["w"] == ternary["w"]).all())
        (2, True)
    """
    if nbits is not None:
        check_nbits(nbits)

    def fit(weights: Array, sensitivity: Array | None) -> LutFit:
        bits = nbits if nbits is not None else max(smallest_nbits(row) for row in weights)
        return jax.vmap(lambda row: unique_lut(row, bits))(jnp.asarray(weights))

    return _hard(fit, granularity, must_converge=True)


def custom(
    lut_function: Callable[[Any], LutFit | tuple[Any, Any]], *, granularity: Granularity = PER_TENSOR
) -> PaletteTransformation:
    """Palettes of your own making.

    The table is sorted, its indices with it, and padded by its last value to the next width that Core ML holds; the
    weights it stands for are exactly those that the function chose.

    Args:
        lut_function: `weights (n,) -> (lut, indices)`, or `-> LutFit`, called once per group. The lut has 1 to 256
            values, the indices one entry per weight; lists will do. A fit with `converged=False` leaves the leaf dense.
        granularity: which weights share a table.

    Raises:
        ValueError: from `update` and `finalize`: a table that is empty, too long or not finite; indices that are of
            another number than the weights, or point outside the table.

    Example:
        >>> import numpy as np, palettax as px
        >>> sign = lambda w: ([-abs(w).mean(), abs(w).mean()], w > 0)
        >>> weights = {"w": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}
        >>> px.palettize(weights, px.custom(sign))["w"].nbits
        1
    """

    def fit(weights: Array, sensitivity: Array | None) -> LutFit:
        rows = [_custom_row(lut_function(row), row) for row in weights]
        k = 2 ** nbits_for(max(row.lut.shape[0] for row in rows))
        padded = [row._replace(lut=jnp.pad(row.lut, (0, k - row.lut.shape[0]), mode="edge")) for row in rows]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)

    return _hard(fit, granularity, must_converge=True)


def _custom_row(result: LutFit | tuple[Any, Any], weights: Array) -> LutFit:
    """One group's answer as a `LutFit` with an ascending lut."""
    if not isinstance(result, tuple) or len(result) < 2:
        raise ValueError(f"lut_function gave a {type(result).__name__}; give (lut, indices) or a LutFit")
    lut = jnp.asarray(result[0], weights.dtype)
    indices = jnp.asarray(result[1]).reshape(-1).astype(jnp.int32)
    if lut.ndim != 1 or not 1 <= lut.size <= 256:
        raise ValueError(f"lut_function gave a lut of shape {lut.shape}; give one row of 1 to 256 values")
    if indices.size != weights.size:
        raise ValueError(f"lut_function gave {indices.size} indices for {weights.size} weights; give one each")
    if not is_traced(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < lut.size:
        raise ValueError(f"lut_function gave indices outside its lut of {lut.size} values")
    check_finite(lut)
    order = jnp.argsort(lut)
    rank = jnp.argsort(order).astype(jnp.uint8)
    inertia = jnp.sum((weights - lut[indices]) ** 2)
    converged = result.converged if isinstance(result, LutFit) else jnp.ones((), bool)
    return LutFit(lut[order], rank[indices], inertia, jnp.zeros((), jnp.int32), converged)


def _hard(fit: GroupFit, granularity: Granularity, must_converge: bool = False) -> PaletteTransformation:
    """The transform of a group fit. With `must_converge`, leaves whose fit did not converge stay as they are."""
    if not isinstance(granularity, Granularity):
        raise ValueError(f"granularity={granularity!r}; give a Granularity, such as Granularity(group_size=16)")
    if granularity.vector_size != 1:
        raise ValueError(f"vector_size={granularity.vector_size}; only scalars (vector_size=1) can be clustered so far")

    @float64_stays
    def fit_leaf(weights: Array, sensitivity: Array | None) -> tuple[PalettizedArray, Any]:
        check_weights(weights)
        check_finite(weights)
        check_sensitivity(sensitivity, weights)
        groups = granularity.groups(tuple(weights.shape))
        rows = split_blocks(as_host(weights), groups)
        result = fit(rows, None if sensitivity is None else split_blocks(as_host(sensitivity), groups))
        fits = result.converged.all() if must_converge else None
        return _assemble(result, rows, groups, tuple(weights.shape)), fits

    def update_leaf(leaf: Any, sensitivity: Array | None) -> Array:
        weights = depalettize(leaf)
        small, fits = fit_leaf(weights, sensitivity)
        if is_traced(fits):
            return jnp.where(fits, small.depalettize(), weights)
        return small.depalettize() if fits is None or fits else weights

    def finalize_leaf(leaf: Any, sensitivity: Array | None) -> Any:
        small, fits = fit_leaf(depalettize(leaf), sensitivity)
        if is_traced(fits):
            # Storage cannot depend on values under jit: what does not fit must not pass for the weight.
            return dataclasses.replace(small, lut=jnp.where(fits, small.lut, jnp.nan))
        return small if fits is None or fits else leaf

    return PaletteTransformation(
        init=lambda params: (),
        update=lambda params, state, *, sensitivity=None: (map_leaves(update_leaf, params, sensitivity), state),
        finalize=lambda params, state, *, sensitivity=None: map_leaves(finalize_leaf, params, sensitivity),
    )


def _assemble(fit: LutFit, rows: Array, groups: tuple[int, ...], shape: tuple[int, ...]) -> PalettizedArray:
    """The leaf that a fit of its groups describes, its table in the dtype of the weights."""
    lut, indices = fit.lut, fit.indices
    if lut.dtype != rows.dtype:
        lut = lut.astype(rows.dtype)
        indices = jax.vmap(assign)(jnp.asarray(rows), jnp.asarray(lut))
    k = lut.shape[-1]
    return PalettizedArray(
        jnp.asarray(lut).reshape(*groups, k, 1),
        jnp.asarray(merge_blocks(indices, groups, shape)),
        nbits=k.bit_length() - 1,
    )
