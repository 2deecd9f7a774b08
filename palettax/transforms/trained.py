"""Transforms whose tables follow the weights: their state, and what they have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from palettax._paths import leaf_names
from palettax._typing import Array, PRNGKey, Tree, is_traced
from palettax.clustering.assignment import assign_groups
from palettax.clustering.checks import (
    check_finite,
    check_nbits,
    check_sensitivity,
    check_weights,
    float64_stays,
    lut_dtype,
    resolve_method,
)
from palettax.clustering.kmeans import kmeans_groups
from palettax.clustering.rounding import Rounding, check_levels
from palettax.clustering.soft import SoftFit, Way, check_nonnegative, soft_groups
from palettax.leaf import Granularity, PalettizedArray, depalettize, level_numbers, merge_blocks
from palettax.transforms.base import PaletteTransformation, is_node, map_leaves, placed_like, shared, with_gradient_of
from palettax.transforms.elements import hidden_elements
from palettax.transforms.hard import Cut, check_granularity, key_of

Temperature = float | Float[Array, ""] | Callable[[Any], Any]
"""A temperature, or one for every count of updates, as optax's schedules are."""


class DkmState(NamedTuple):
    """What the next update starts from: arrays only, those of leaves by their paths.

    Attributes:
        count: updates so far.
        luts: (*groups, k, vector) for every leaf that has a table; float32, or float64 for float64 weights.
        skipped: updates in which the leaf, or its sensitivities, held NaN or infinities: its weights passed through,
            its table stayed.
    """

    count: Int[Array, ""]
    luts: dict[str, Float[Array, "*groups k vector"]]
    skipped: dict[str, Int[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Following:
    """How tables follow the weights.

    Attributes:
        nbits: the width of an index.
        temperature: of an update, by the count of updates.
        granularity: which weights share a table.
        milestone: the update in which the first table is made.
        weight_threshold: leaves of at most this many weights stay dense.
        lut_dtype: what tables are rounded to, as they are stored.
        levels: the lowest and the highest level of such a table; None for all there are.
        zero_entry: whether every table has an entry that is zero.
        way: how soft k-means goes.
        tol: where it stops.
        key: for vectors.
        hard: whether an update gives what is stored, with a gradient that passes as if it did not.
    """

    nbits: int
    temperature: Callable[[Any], Any]
    granularity: Granularity
    milestone: int
    weight_threshold: int
    lut_dtype: np.dtype | None
    way: Way
    tol: float
    key: PRNGKey | None
    hard: bool = False
    levels: tuple[int, int] | None = None
    zero_entry: bool = False

    def __post_init__(self) -> None:
        check_nbits(self.nbits)
        check_granularity(self.granularity)
        resolve_method(None, self.granularity.vector_size, self.key)
        if self.zero_entry and self.granularity.vector_size > 1:
            raise ValueError("zero_entry=True with vectors, whose entries are not zero in part; use scalars")
        if self.levels is not None:
            check_levels(self.levels, self.lut_dtype)
        check_nonnegative("tol", self.tol)
        for name in ("milestone", "weight_threshold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
                raise ValueError(f"{name}={value!r}; it must be an integer ≥ 0")


class _Leaf(NamedTuple):
    """A leaf as soft k-means sees it.

    Attributes:
        cut: how it is cut into groups.
        rows: its weights; something finite where they are left out.
        mass: what their squared errors cost.
        zero: whether a group needs an entry that is zero.
    """

    cut: Cut
    rows: Float[Array, "groups n d"]
    mass: Float[Array, "groups n d"] | None
    zero: Bool[Array, " groups"] | None

    def as_they_are(self) -> tuple[Array, Array | None]:
        """Rows and mass, of scalars without an axis of one."""
        if self.cut.vector_size > 1:
            return self.rows, self.mass
        return self.rows[..., 0], None if self.mass is None else self.mass[..., 0]


@dataclasses.dataclass(frozen=True)
class _Result:
    """What an update makes of a leaf; to JAX, a leaf itself."""

    values: Any
    lut: Array | None = None
    bad: Array | None = None


def following(how: Following) -> PaletteTransformation:
    """The transform that follows so."""

    def has_table(leaf: Any) -> bool:
        if getattr(leaf, "size", 0) <= how.weight_threshold:
            return False
        check_weights(leaf)
        return True

    @float64_stays
    def first_lut(name: str, leaf: _Leaf) -> Array:
        """What `kmeans` makes, (groups, k, d)."""
        rows, mass = jax.lax.stop_gradient(leaf.as_they_are())
        rows = jnp.where(jnp.isfinite(rows), rows, 0)  # of a leaf that will be skipped
        method = resolve_method(None, leaf.cut.vector_size, how.key)
        lut = kmeans_groups(rows, how.nbits, mass, method, key=key_of(how.key, name)).lut
        return jnp.asarray(lut).reshape(-1, 2**how.nbits, leaf.cut.vector_size)

    def solve(name: str, leaf: _Leaf, lut: Array, count: Array) -> tuple[SoftFit, Rounding]:
        """Tables and soft values."""
        wanted = (*leaf.cut.groups, 2**how.nbits, leaf.cut.vector_size)
        if lut.shape != wanted:
            raise ValueError(f"the state has a table of {lut.shape} for it, not {wanted}; make one by init(params)")
        flat = lut.reshape(-1, *lut.shape[-2:])
        if how.milestone:
            flat = _choose(count <= how.milestone, lambda: first_lut(name, leaf).astype(lut.dtype), lambda: flat)
        rounding = Rounding(how.lut_dtype, np.dtype(leaf.rows.dtype), how.levels)
        as_is = how.lut_dtype is None and leaf.zero is None
        way = how.way if as_is else dataclasses.replace(how.way, finish=rounding)
        start, temperature = jax.lax.stop_gradient(flat), how.temperature(count)
        fit = soft_groups(leaf.rows, start, temperature, how.tol, leaf.mass, leaf.zero, way=way)
        return fit._replace(lut=jax.lax.stop_gradient(fit.lut)), rounding

    def store(leaf: _Leaf, lut: Array, rounding: Rounding) -> PalettizedArray:
        """Every weight at its nearest entry."""
        cut, (rows, mass) = leaf.cut, leaf.as_they_are()
        levels, step = jax.vmap(rounding.stored)(_ascending(jnp.asarray(lut)), leaf.zero)
        entries = level_numbers(jnp, levels, rounding.step_dtype)
        entries = entries if step is None else entries * step[:, None, None]
        indices = assign_groups(rows, entries if cut.vector_size > 1 else entries[..., 0], mass)
        return PalettizedArray(
            levels.reshape(*cut.groups, *levels.shape[1:]),
            merge_blocks(indices, cut.groups, cut.shape),
            None if step is None else step.reshape(cut.groups),
            nbits=how.nbits,
            vector_axis=cut.vector_axis,
            dtype=rounding.step_dtype,
        )

    @float64_stays
    def init_leaf(name: str, weights: Array) -> Array:
        check_finite(weights)
        leaf = _seen(how, name, weights, None)
        if how.milestone:  # it will be made then
            shape = leaf.rows.shape[0], 2**how.nbits, leaf.cut.vector_size
            lut = jnp.zeros(shape, lut_dtype(weights))
        else:
            lut = first_lut(name, leaf)
        return lut.reshape(*leaf.cut.groups, *lut.shape[1:])

    @float64_stays
    def update_leaf(
        name: str, weights: Array, sensitivity: Array | None, lut: Array, count: Array
    ) -> tuple[Array, Array, Array]:
        """Values, the next table, and whether the leaf is skipped."""
        leaf = _seen(how, name, weights, sensitivity)
        sound = jnp.isfinite(leaf.rows).all()
        if leaf.mass is not None:
            sound &= jnp.isfinite(leaf.mass).all()
        # Zeros only to the derivative: of a leaf that is skipped it is not NaN, and one that is not has no copy.
        leaf = leaf._replace(rows=with_gradient_of(leaf.rows, jnp.where(sound, leaf.rows, 0)))
        cut = leaf.cut

        def trained() -> tuple[Array, Array]:
            fit, rounding = solve(name, leaf, lut, count)
            if how.hard:
                stored = store(leaf, fit.lut, rounding).depalettize()
                return with_gradient_of(stored, jnp.asarray(weights)), fit.lut.reshape(lut.shape)
            values = fit.values if cut.vector_size > 1 else fit.values[..., 0]
            values = merge_blocks(values, cut.groups, tuple(weights.shape), cut.vector_axis)
            return values, fit.lut.reshape(lut.shape)

        dense = jnp.asarray(weights), jnp.asarray(lut)
        new = _choose(count < how.milestone, lambda: dense, trained) if how.milestone else trained()
        sound &= jnp.isfinite(new[1]).all()
        values, table = (jnp.where(sound, a, b) for a, b in zip(new, dense, strict=True))
        return values, table, ~sound

    @float64_stays
    def store_leaf(name: str, weights: Array, sensitivity: Array | None, lut: Array, count: Array) -> PalettizedArray:
        leaf = _seen(how, name, weights, sensitivity)
        check_finite(leaf.rows)
        fit, rounding = solve(name, leaf, lut, count)
        return store(leaf, fit.lut, rounding)

    def init(params: Tree) -> DkmState:
        def of_leaf(name: str, leaf: Any) -> _Result:
            weights = depalettize(leaf)
            return _Result(None, init_leaf(name, weights) if has_table(weights) else None)

        luts = _by_name(map_leaves(of_leaf, params), "lut")
        return DkmState(jnp.int32(0), luts, {name: jnp.int32(0) for name in luts})

    def update(params: Tree, state: DkmState, *, sensitivity: Tree | None = None) -> tuple[Tree, DkmState]:
        _check_state(state)

        def of_leaf(name: str, leaf: Any, sensitivity: Array | None) -> _Result:
            weights = depalettize(leaf)
            if not has_table(weights):
                return _Result(weights)
            return _Result(*update_leaf(name, weights, sensitivity, _lut_of(state, name), state.count))

        results = map_leaves(of_leaf, params, shared(params, sensitivity))
        bad = _by_name(results, "bad")
        skipped = {name: state.skipped[name] + bad[name] for name in bad}
        values = jax.tree.map(lambda r: r.values if isinstance(r, _Result) else r, results, is_leaf=is_node)
        return values, DkmState(state.count + 1, _by_name(results, "lut"), skipped)

    def finalize(params: Tree, state: DkmState, *, sensitivity: Tree | None = None) -> Tree:
        _check_state(state)

        def of_leaf(name: str, leaf: Any, sensitivity: Array | None) -> Any:
            weights = depalettize(leaf)
            if not has_table(weights):
                return leaf
            return placed_like(weights, store_leaf(name, weights, sensitivity, _lut_of(state, name), state.count))

        return map_leaves(of_leaf, params, shared(params, sensitivity))

    return PaletteTransformation(init, update, finalize)


def _check_state(state: Any) -> None:
    if not isinstance(state, DkmState):
        raise ValueError(f"the state is a {type(state).__name__}; give (params, state), the state from init(params)")


def _seen(how: Following, name: str, weights: Array, sensitivity: Array | None) -> _Leaf:
    """A leaf with what its sensitivities say of elements that are left out, or are to stay zero."""
    check_sensitivity(sensitivity, weights, infinite=True)
    cut = Cut.of(how.granularity, name, tuple(weights.shape))
    rows = cut.rows(jnp.asarray(weights))
    mass = None if sensitivity is None else cut.rows(jnp.asarray(sensitivity))
    if cut.vector_size > 1:
        return _Leaf(cut, rows, mass, None)
    zero = jnp.ones(len(rows), bool) if how.zero_entry else None
    if mass is not None:
        pinned = jnp.isinf(mass)
        zero, hidden = pinned.any(axis=1) | how.zero_entry, pinned | hidden_elements(mass)
        rows, mass = jnp.where(hidden, 0, rows), jnp.where(hidden, 0, mass)[..., None]
    return _Leaf(cut, rows[..., None], mass, zero)


def _choose(condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """One of two; only it is computed, and nothing is compiled for that when the condition is known."""
    if is_traced(condition):
        return jax.lax.cond(condition, yes, no)
    return yes() if condition else no()


def _by_name(results: Tree, field: str) -> dict[str, Array]:
    """A field of the results of leaves that have a table, in every place of a tied leaf."""
    paths, _ = jax.tree_util.tree_flatten_with_path(results, is_leaf=is_node)
    names = leaf_names([path for path, _ in paths])
    found = {name: result for name, (_, result) in zip(names, paths, strict=True) if isinstance(result, _Result)}
    return {name: getattr(result, field) for name, result in found.items() if result.lut is not None}


def _lut_of(state: DkmState, name: str) -> Array:
    """The table of a leaf, or a `ValueError` that says which leaves have one."""
    if name not in state.luts:
        raise ValueError(f"the state has no table for it, only for {list(state.luts)}; make one by init(params)")
    return state.luts[name]


def _ascending(lut: Float[jax.Array, "groups k d"]) -> Float[jax.Array, "groups k d"]:
    """Tables in ascending order, those of vectors in lexicographic."""
    order = jnp.lexsort(jnp.moveaxis(lut, -1, 0)[::-1], axis=-1)
    return jnp.take_along_axis(lut, order[..., None], axis=1)
