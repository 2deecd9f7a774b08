"""The laws every hard transform obeys: rows of `HARD`, leaves of every float type."""

import dataclasses
import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import palettax as px
import palettax.coreml
from palettax.leaf import is_palettized, pack, unpack
from tests.leaves import assert_same
from tests.tables import (
    ABOUT_ZERO,
    COLUMNS,
    DTYPES,
    HARD,
    INEXACT,
    MIXES,
    NEEDS_VALUES,
    ORDERED,
    RESCALED,
    ROUNDED,
    ROWS,
    params,
)

assert palettax.coreml  # imported first: it brings coremltools in without its noise


def laws(test):
    return pytest.mark.parametrize("mix", MIXES)(pytest.mark.parametrize("name", HARD)(test))


@cache
def outcome(name, mix):
    """(params, a copy made before, update's params, finalize's tree): computed once, compiling is what costs."""
    transform, tree = HARD[name], params(MIXES[mix])
    before = jax.tree.map(np.copy, tree)
    state = transform.init(tree)
    updated, _ = transform.update(tree, state)
    return tree, before, updated, transform.finalize(tree, state)


def palettes(tree):
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_palettized) if is_palettized(leaf)]


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


def same_tree(a, b, roundings=0):
    """The same structure, storage and bits; or nearly the same values, off by so many roundings of the largest."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if not roundings:
            same_bits(x, y)
            continue
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        eps = float(jnp.finfo(x.dtype).eps)
        x, y = np.float64(x), np.float64(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=roundings * eps * abs(y).max())


@laws
def test_structure(name, mix):
    tree, _, updated, _ = outcome(name, mix)
    assert jax.tree.structure(updated) == jax.tree.structure(tree)  # palettized leaves would be nodes
    for before, now in zip(jax.tree.leaves(tree), jax.tree.leaves(updated), strict=True):
        assert (now.shape, now.dtype) == (before.shape, before.dtype)


@laws
def test_agreement(name, mix):
    _, _, updated, small = outcome(name, mix)
    same_tree(px.depalettize(small), updated)


@laws
def test_storage_is_valid_and_sorted(name, mix):
    tree, _, _, small = outcome(name, mix)
    for before, leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(small, is_leaf=is_palettized), strict=True):
        assert leaf.shape == before.shape
        assert leaf.dtype == before.dtype
    for leaf in palettes(small):
        leaf.validate()
        table = np.asarray(leaf.lut, np.float64).reshape(-1, 2**leaf.nbits, leaf.vector_size)
        for entries in table.tolist():
            assert entries == sorted(entries)


@laws
def test_inputs_are_not_mutated(name, mix):
    tree, before, _, _ = outcome(name, mix)
    same_tree(tree, before)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", [n for n in HARD if n not in RESCALED])
def test_idempotence(name, mix):
    _, _, updated, _ = outcome(name, mix)
    again, _ = HARD[name].update(updated, HARD[name].init(updated))
    same_tree(again, updated, roundings=2 if name in ROUNDED else 0)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", HARD)
def test_two_values_a_leaf_come_back_bit_for_bit(name, mix):
    values = [-1, 1] if name in INEXACT else [-0.3, 0.1]
    tree = jax.tree.map(lambda leaf: np.where(leaf > 0, *values).astype(leaf.dtype), params(MIXES[mix]))
    dense = px.depalettize(HARD[name].finalize(tree, HARD[name].init(tree)))
    same_tree(dense, tree, roundings=2 if name in ROUNDED else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "transform",
    [px.kmeans(3), px.kmeans(3, method="lloyd"), px.unique(3), px.unique()],
    ids=["kmeans", "lloyd", "3", "-"],
)
def test_as_many_values_as_entries_come_back_bit_for_bit(transform, dtype):
    values = np.array([-7, -2.5, -1e-3, 0, 0.1, 0.125, 3, 1e3]).astype(DTYPES[dtype])
    weights = values[np.random.default_rng(0).permutation(80) % 8].reshape(8, 10)
    small = transform.finalize(weights, ())
    assert small.nbits == 3
    np.testing.assert_array_equal(np.asarray(small.lut).reshape(-1), values)
    same_bits(small.depalettize(), weights)


@pytest.mark.parametrize("name", HARD)
def test_twice_the_same_bits(name):
    tree, _, _, small = outcome(name, "float32")
    same_tree(HARD[name].finalize(tree, HARD[name].init(tree)), small)


@pytest.mark.parametrize("name", HARD)
def test_jit_agrees_and_traces_once(name):
    tree, _, updated, _ = outcome(name, "float32")
    transform, traces = HARD[name], []

    @jax.jit
    def update(tree):
        traces.append(1)
        return transform.update(tree, transform.init(tree))[0]

    if name in NEEDS_VALUES:
        with pytest.raises(ValueError, match=r"leaf 'a' .* unknown under jit; pass nbits"):
            update(tree)
        return
    for a, b, w in zip(*map(jax.tree.leaves, (update(tree), updated, tree)), strict=True):
        if name in RESCALED:  # in the precision that compiled code has, another step may look best
            assert np.square(a - w).sum() == pytest.approx(np.square(b - w).sum(), rel=0.1)
        else:  # compiled as a whole, a product and a sum round once
            np.testing.assert_allclose(a, b, rtol=3e-7, atol=3e-7)
    update(params(seed=1))
    assert len(traces) == 1


compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: compilations.append(event) if "backend_compile" in event else None
)


@pytest.mark.parametrize(
    "name",
    [name for name in HARD if name not in INEXACT],
)
def test_a_second_call_compiles_nothing(name):
    tree, _, _, _ = outcome(name, "float32")  # the first
    HARD[name].finalize(tree, HARD[name].init(tree))
    del compilations[:]
    HARD[name].finalize(tree, HARD[name].init(tree))
    assert not compilations


def shuffled(array, rows, columns):
    """Permute the first axis within groups of 4 and the last within groups of 5, so that every group stays whole."""
    for axis, order in ((0, rows), (-1, columns)):
        starts = np.arange(0, array.shape[axis], order.size)[:, None]
        array = array.take((starts + order).reshape(-1), axis=axis)
    return array


@pytest.mark.parametrize("name", [n for n in HARD if n not in ORDERED])
def test_permutation(name):
    tree, _, updated, _ = outcome(name, "float32")
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(4), rng.permutation(5)
    moved, _ = HARD[name].update(jax.tree.map(lambda w: shuffled(w, rows, columns), tree), HARD[name].init(tree))
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(updated), strict=True):
        np.testing.assert_allclose(a, shuffled(np.asarray(b), rows, columns), rtol=1e-5)  # Lloyd's sums reorder


@pytest.mark.parametrize("name", [n for n in HARD if n not in ("custom", *RESCALED)])
def test_positive_scale(name):
    """By a power of two every bit of the result scales."""
    tree, _, updated, _ = outcome(name, "float32")
    larger = jax.tree.map(lambda w: w * 1024, tree)
    larger, _ = HARD[name].update(larger, HARD[name].init(larger))
    for a, b in zip(jax.tree.leaves(larger), jax.tree.leaves(updated), strict=True):
        np.testing.assert_allclose(a, np.asarray(b) * 1024, rtol=1e-5 if "lloyd" in name or "vectors" in name else 0)


@pytest.mark.parametrize("name", [n for n in HARD if n not in ABOUT_ZERO])
def test_shift(name):
    tree, _, updated, _ = outcome(name, "float32")
    moved = jax.tree.map(lambda w: w + 4, tree)
    moved, _ = HARD[name].update(moved, HARD[name].init(moved))
    for a, b, w in zip(*map(jax.tree.leaves, (moved, updated, tree)), strict=True):
        # Weights lose three bits by the shift; one on a boundary may change its cell.
        assert np.square(a - w - 4).sum() == pytest.approx(np.square(b - w).sum(), rel=1e-3)


@laws
def test_there_and_back_by_a_file(name, mix, tmp_path):
    _, _, _, small = outcome(name, mix)
    px.save(tmp_path / "tree.safetensors", small)
    found = jax.tree.leaves(px.load(tmp_path / "tree.safetensors"), is_leaf=is_palettized)
    for a, b in zip(found, jax.tree.leaves(small, is_leaf=is_palettized), strict=True):
        assert_same(a, jax.tree.map(np.asarray, b))


@laws
def test_there_and_back_by_packing(name, mix):
    for leaf in palettes(outcome(name, mix)[3]):
        indices = np.asarray(leaf.indices)
        np.testing.assert_array_equal(unpack(pack(indices, leaf.nbits), leaf.nbits, indices.shape), indices)


@laws
def test_layout(name, mix):
    """What coremltools makes of the table and the indices is what we make of them."""
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_lut_to_dense

    for leaf in palettes(outcome(name, mix)[3]):
        if leaf.lut.dtype != leaf.dtype or leaf.mask is not None:
            continue  # levels and bitmaps are other ops of Core ML
        plain = dataclasses.replace(leaf, scale=None)
        theirs = constexpr_lut_to_dense.decompress(np.asarray(leaf.indices), np.asarray(leaf.lut), leaf.vector_axis)
        same_bits(plain.depalettize(), theirs)


def test_identity():
    tree = params()
    transform = px.identity()
    updated, state = transform.update(tree, transform.init(tree))
    assert all(a is b for a, b in zip(jax.tree.leaves(updated), jax.tree.leaves(tree), strict=True))
    assert transform.finalize(tree, state) is tree
    small = outcome("kmeans", "float32")[3]
    assert transform.finalize(small, ()) is small
    same_tree(transform.update(small, ())[0], px.depalettize(small))


@pytest.mark.parametrize("name", ["kmeans rows", "unique", "masked", "by_path"])
def test_identity_is_neutral_in_a_chain(name):
    tree, _, _, small = outcome(name, "float32")
    for transform in (px.chain(HARD[name], px.identity()), px.chain(px.identity(), HARD[name])):
        same_tree(transform.finalize(tree, transform.init(tree)), small)


@pytest.mark.parametrize("name", ["kmeans columns", "uniform", "masked", "by_path", "custom"])
def test_chain_is_associative(name):
    tree = params()
    a, b, c = px.kmeans(4), HARD[name], px.kmeans(1, granularity=ROWS)
    forms = [px.chain(a, b, c), px.chain(a, px.chain(b, c)), px.chain(px.chain(a, b), c)]
    values = [t.update(tree, t.init(tree))[0] for t in forms]
    storage = [t.finalize(tree, t.init(tree)) for t in forms]
    for i in (1, 2):
        same_tree(values[i], values[0])
        same_tree(storage[i], storage[0])
    one_by_one = c.update(b.update(a.update(tree, ())[0], b.init(tree))[0], ())[0]
    same_tree(values[0], one_by_one)


def per_group(weights, granularity, fit):
    """Fit each group by itself: its lut in the dtype of the weights, and the nearest entry of every weight."""
    groups = granularity.groups(weights.shape)
    sizes = [n // g for n, g in zip(weights.shape, groups, strict=True)]
    dense, luts = np.empty_like(weights), []
    for place in itertools.product(*(range(g) for g in groups)):
        block = tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, sizes, strict=True))
        # In float64, so that the lut is rounded only once.
        lut = np.asarray(fit(weights[block].astype(np.float64)).lut).astype(weights.dtype)
        dense[block] = lut[np.asarray(px.assign(weights[block], lut))]
        luts.append(lut)
    return dense, np.stack(luts).reshape(*groups, -1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", [ROWS, COLUMNS, px.Granularity()], ids=["rows", "columns", "tensor"])
def test_groups_are_a_loop_over_groups(granularity, dtype):
    transform = px.kmeans(2, granularity=granularity)
    for weights in jax.tree.leaves(params((DTYPES[dtype],) * 3)):
        dense, lut = per_group(weights, granularity, lambda w: px.kmeans_lut(w, 2))
        small = transform.finalize(weights, ())
        same_bits(small.lut, lut)
        same_bits(small.depalettize(), dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_uniform_groups_are_a_loop_over_groups(granularity, dtype):
    transform = px.uniform(4, granularity=granularity)
    weights = params()["a"].astype(DTYPES[dtype])
    groups = granularity.groups(weights.shape)
    small = transform.finalize(weights, ())
    dense = np.asarray(small.depalettize())
    for place in np.ndindex(*groups):
        block = tuple(slice(i * n // g, (i + 1) * n // g) for i, n, g in zip(place, weights.shape, groups, strict=True))
        fit = px.uniform_lut(weights[block], 4)
        lut = np.asarray(fit.lut).astype(weights.dtype)
        np.testing.assert_allclose(
            np.asarray(small.lut[place][:, 0], np.float64), lut.astype(np.float64), rtol=float(jnp.finfo(lut.dtype).eps)
        )
        own = np.asarray(small.lut[place][:, 0])
        same_bits(dense[block], own[np.asarray(px.assign(weights[block], own))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unique_takes_one_width_for_all_groups(dtype):
    weights = np.arange(16).astype(DTYPES[dtype]).reshape(4, 4) // np.array([[8], [8], [1], [1]], DTYPES[dtype])
    small = px.unique(granularity=px.Granularity(group_size=2)).finalize(weights, ())
    assert small.nbits == 3
    same_bits(small.depalettize(), weights)


@pytest.mark.parametrize("make", [px.kmeans, px.uniform, px.unique])
@pytest.mark.parametrize("nbits", [0, 5, 9, -1])
def test_widths_core_ml_has_not(make, nbits):
    with pytest.raises(ValueError, match=rf"nbits={nbits}; an index has one of \(1, 2, 3, 4, 6, 8\) bits"):
        make(nbits)


def test_vectors_are_refused_where_there_are_none(unchecked):
    pairs = px.Granularity(vector_size=2, vector_axis=1)
    with pytest.raises(ValueError, match="vector_size=2 without a key; vectors start at random"):
        px.kmeans(2, granularity=pairs)
    with pytest.raises(ValueError, match=r"key=0; give a key of JAX: jax\.random\.key\(0\)"):
        px.kmeans(2, granularity=pairs, key=0)
    with pytest.raises(ValueError, match="vector_size=2; uniform makes no tables of vectors"):
        px.uniform(2, granularity=pairs)
