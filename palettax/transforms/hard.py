"""Transforms that snap every weight to its palette: the array functions, leaf by leaf and group by group."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from palettax._typing import Array, PRNGKey, is_traced
from palettax.clustering import LutFit
from palettax.clustering.assignment import assign_groups
from palettax.clustering.checks import (
    Method,
    as_host,
    check_finite,
    check_nbits,
    check_sensitivity,
    check_weights,
    float64_stays,
    resolve_method,
)
from palettax.clustering.kmeans import kmeans_groups
from palettax.clustering.uniform import uniform_groups
from palettax.clustering.unique import nbits_for, smallest_nbits, unique_groups, unique_vectors
from palettax.leaf import PER_TENSOR, Granularity, PalettizedArray, depalettize, merge_blocks, split_blocks
from palettax.transforms.base import PaletteTransformation, map_leaves, placed_like, shared
from palettax.transforms.elements import fill_hidden, finite_mass, hidden_elements, numpy_of

GroupFit = Callable[[Array, Array | None, PRNGKey | None], LutFit]
"""Fits the rows of (groups, n) weights, or (groups, m, d) vectors, with sensitivities of that shape or None and the
key of the leaf or None; fields get a leading axis."""


def kmeans(
    nbits: int,
    *,
    granularity: Granularity = PER_TENSOR,
    method: Method | None = None,
    key: PRNGKey | None = None,
    max_steps: int = 100,
) -> PaletteTransformation:
    """Palettes of least squared error: `kmeans_lut` for every group of every leaf.

    Args:
        nbits: 1, 2, 3, 4, 6 or 8.
        granularity: which weights share a table, and how many share an index.
        method: "exact", or "lloyd" to stay on the accelerator; None for exact scalars, and lloyd for vectors.
        key: for vectors, and required there; each leaf draws from one of its own, folded from its path.
        max_steps: Lloyd steps at most.

    Example:
        >>> import jax, palettax as px
        >>> weights = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> px.palettize(weights, px.kmeans(nbits=4, granularity=px.Granularity(group_size=16)))["w"].lut.shape
        (4, 1, 16, 1)
        >>> pairs = px.kmeans(nbits=4, granularity=px.Granularity(vector_size=2), key=jax.random.key(0))
        >>> px.palettize(weights, pairs)["w"].lut.shape
        (1, 1, 16, 2)
    """
    check_nbits(nbits)
    check_granularity(granularity)
    chosen = resolve_method(method, granularity.vector_size, key)

    def fit(weights: Array, sensitivity: Array | None, key: PRNGKey | None) -> LutFit:
        return kmeans_groups(weights, nbits, sensitivity, chosen, max_steps, key, dtype=np.dtype(weights.dtype))

    return _hard(fit, granularity, key=key)


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
    check_granularity(granularity)
    if granularity.vector_size != 1:
        raise ValueError(f"vector_size={granularity.vector_size}; uniform makes no tables of vectors")
    return _hard(lambda weights, sensitivity, key: uniform_groups(weights, nbits), granularity)


def unique(nbits: int | None = None, *, granularity: Granularity = PER_TENSOR) -> PaletteTransformation:
    """Lossless palettes for weights with few distinct values: `unique_lut`. Other leaves stay dense.

    Args:
        nbits: 1, 2, 3, 4, 6 or 8; None for the smallest that serves every group of the leaf.
        granularity: which weights share a table, and how many share an index. Vectors not under `jit`.

    Example:
        >>> import jax.numpy as jnp, palettax as px
        >>> ternary = {"w": jnp.sign(jnp.arange(-2000.0, 2000.0)).reshape(40, 100)}
        >>> small = px.palettize(ternary, px.unique())
        >>> small["w"].nbits, bool((px.depalettize(small)["w"] == ternary["w"]).all())
        (2, True)
    """
    if nbits is not None:
        check_nbits(nbits)
    check_granularity(granularity)

    def fit(weights: Array, sensitivity: Array | None, key: PRNGKey | None) -> LutFit:
        if granularity.vector_size > 1:
            return unique_vectors(weights, nbits)
        bits = nbits if nbits is not None else max(smallest_nbits(row) for row in weights)
        return unique_groups(weights, bits)

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
            Of vectors it is `weights (m, d) -> (lut (k, d), indices (m,))`, and the table is in lexicographic order.
        granularity: which weights share a table, and how many share an index.

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
    check_granularity(granularity)

    def fit(weights: Array, sensitivity: Array | None, key: PRNGKey | None) -> LutFit:
        rows = [_custom_row(lut_function(row), row) for row in weights]
        k = 2 ** nbits_for(max(row.lut.shape[0] for row in rows))
        xp = numpy_of(*jax.tree.leaves(rows))
        across = [(0, 0)] * (weights.ndim - 2)
        padded = [row._replace(lut=xp.pad(row.lut, [(0, k - len(row.lut)), *across], mode="edge")) for row in rows]
        return jax.tree.map(lambda *leaves: xp.stack(leaves), *padded)

    return _hard(fit, granularity, must_converge=True)


def _custom_row(result: LutFit | tuple[Any, Any], weights: Array) -> LutFit:
    """One group's answer as a `LutFit` with an ascending lut."""
    if not isinstance(result, tuple) or len(result) < 2:
        raise ValueError(f"lut_function gave a {type(result).__name__}; give (lut, indices) or a LutFit")
    xp = numpy_of(weights, result[0], result[1])
    lut = xp.asarray(result[0]).astype(weights.dtype)
    indices = xp.asarray(result[1]).reshape(-1).astype(np.int32)
    count, parts = len(weights), weights.shape[1:]
    if lut.ndim != weights.ndim or lut.shape[1:] != parts or not 1 <= len(lut) <= 256:
        wanted = f"1 to 256 rows of {parts[0]}" if parts else "one row of 1 to 256 values"
        raise ValueError(f"lut_function gave a lut of shape {lut.shape}; give {wanted}")
    if indices.size != count:
        kind = "vectors" if parts else "weights"
        raise ValueError(f"lut_function gave {indices.size} indices for {count} {kind}; give one each")
    if not is_traced(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(lut):
        raise ValueError(f"lut_function gave indices outside its lut of {len(lut)} values")
    check_finite(lut)
    order = xp.lexsort(lut.reshape(len(lut), -1).T[::-1])
    rank = xp.argsort(order, stable=True).astype(np.uint8)
    inertia = xp.sum((weights - lut[indices]) ** 2)
    converged = result.converged if isinstance(result, LutFit) else xp.ones((), bool)
    return LutFit(lut[order], rank[indices], inertia, xp.zeros((), np.int32), converged)


def check_granularity(granularity: Granularity) -> None:
    """Refuse what is no `Granularity`."""
    if not isinstance(granularity, Granularity):
        raise ValueError(f"granularity={granularity!r}; give a Granularity, such as Granularity(group_size=16)")


def _hard(
    fit: GroupFit, granularity: Granularity, *, must_converge: bool = False, key: PRNGKey | None = None
) -> PaletteTransformation:
    """The transform of a group fit. With `must_converge`, leaves whose fit did not converge stay as they are."""

    @float64_stays
    def fit_leaf(name: str, weights: Array, sensitivity: Array | None) -> tuple[PalettizedArray, Any]:
        check_weights(weights)
        check_sensitivity(sensitivity, weights, infinite=True)
        cut = Cut.of(granularity, name, tuple(weights.shape))
        rows, mass = cut.rows(as_host(weights)), None if sensitivity is None else cut.rows(as_host(sensitivity))
        hidden = None if mass is None or granularity.vector_size > 1 else hidden_elements(mass)
        if hidden is not None and not is_traced(hidden) and not hidden.any():
            hidden = None
        visible = rows if hidden is None else fill_hidden(rows, hidden)
        check_finite(visible)
        mass = None if mass is None else finite_mass(mass)
        result = fit(visible, mass, key_of(key, name))
        if hidden is not None:
            own = assign_groups(rows, result.lut, None)
            result = result._replace(indices=jnp.where(hidden, own, result.indices))
        small = placed_like(weights, _assemble(result, visible, mass, cut))
        return small, result.converged.all() if must_converge else None

    def update_leaf(name: str, leaf: Any, sensitivity: Array | None) -> Array:
        weights = depalettize(leaf)
        small, fits = fit_leaf(name, weights, sensitivity)
        if is_traced(fits):
            return jnp.where(fits, small.depalettize(), weights)
        return small.depalettize() if fits is None or fits else weights

    def finalize_leaf(name: str, leaf: Any, sensitivity: Array | None) -> Any:
        small, fits = fit_leaf(name, depalettize(leaf), sensitivity)
        if is_traced(fits):
            # Storage cannot depend on values under jit: what does not fit must not pass for the weight.
            return dataclasses.replace(small, lut=jnp.where(fits, small.lut, jnp.nan))
        return small if fits is None or fits else leaf

    return PaletteTransformation(
        init=lambda params: (),
        update=lambda params, state, *, sensitivity=None: (
            map_leaves(update_leaf, params, shared(params, sensitivity)),
            state,
        ),
        finalize=lambda params, state, *, sensitivity=None: map_leaves(
            finalize_leaf, params, shared(params, sensitivity)
        ),
    )


def key_of(key: PRNGKey | None, name: str) -> PRNGKey | None:
    """A leaf's own key."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))


class Cut(NamedTuple):
    """How a leaf is cut into rows that share a table."""

    groups: tuple[int, ...]
    vector_axis: int | None
    vector_size: int
    shape: tuple[int, ...]  # of the indices

    @classmethod
    def of(cls, granularity: Granularity, name: str, shape: tuple[int, ...]) -> Cut:
        """The cut of a leaf of this name and shape."""
        axis, size = granularity.vector_axis_of(shape, name), granularity.vector_size
        indices = tuple(length // size if a == axis else length for a, length in enumerate(shape))
        return cls(granularity.groups(shape, name), axis, size, indices)

    def rows(self, weights: Array) -> Array:
        """(groups, n), or (groups, m, d) for vectors."""
        return split_blocks(weights, self.groups, self.vector_axis, self.vector_size)


def _assemble(fit: LutFit, rows: Array, mass: Array | None, cut: Cut) -> PalettizedArray:
    """The leaf that a fit of its groups describes, its table in the dtype of the weights."""
    lut, indices = fit.lut, fit.indices
    if lut.dtype != rows.dtype:
        lut = lut.astype(rows.dtype)
        indices = assign_groups(rows, lut, mass)
    k = lut.shape[1]
    return PalettizedArray(
        jnp.asarray(lut).reshape(*cut.groups, k, cut.vector_size),
        jnp.asarray(merge_blocks(indices, cut.groups, cut.shape)),
        nbits=k.bit_length() - 1,
        vector_axis=cut.vector_axis,
    )
