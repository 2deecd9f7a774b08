"""What transforms around transforms promise beyond the laws of all."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import palettax as px
from tests.leaves import assert_same
from tests.tables import BLOCKS, COLUMNS, DTYPES, KINDS, ROWS, data, sensitivities


def squared_error(transform, weights, sensitivity=None):
    small = transform.finalize(weights, transform.init(weights), sensitivity=sensitivity)
    error = np.square(np.float64(small.depalettize()) - np.float64(weights))
    return (error if sensitivity is None else error * np.float64(sensitivity)).sum()


def uneven_rows(kind, dtype, seed=0):
    """Twenty rows of twenty, their sizes over four orders of magnitude."""
    weights = data(kind, 400, seed).reshape(20, 20)
    return (weights / np.abs(weights).max() * np.logspace(-3, 1, 20)[:, None]).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", [px.Granularity(), ROWS, COLUMNS, BLOCKS], ids=["-", "rows", "columns", "both"])
def test_channel_scale_never_makes_a_leaf_worse(kind, dtype, granularity):
    inner = px.kmeans(2, granularity=granularity)
    for weights in (uneven_rows(kind, DTYPES[dtype]), data(kind, 400).reshape(20, 20).astype(DTYPES[dtype])):
        for sensitivity in (None, sensitivities(400).reshape(20, 20).astype(np.float32)):
            plain = squared_error(inner, weights, sensitivity)
            assert squared_error(px.with_channel_scale(inner, max_steps=2), weights, sensitivity) <= plain


def test_channel_scale_finds_rows_that_differ_in_size_only():
    table = np.array([-1.0, -0.25, 0.5, 1.0])
    row = table[np.random.default_rng(0).integers(0, 4, 200)]
    weights = (row * 2.0 ** np.arange(-4, 4)[:, None]).astype(np.float32)
    assert squared_error(px.kmeans(2), weights) > 0
    small = px.with_channel_scale(px.kmeans(2)).finalize(weights, ())
    np.testing.assert_array_equal(small.depalettize(), weights)
    assert small.scale.shape == (8, 1)


def test_a_channel_of_zeros_stays_zero():
    weights = uneven_rows("normal", np.float32)
    weights[3] = 0
    small = px.with_channel_scale(px.keep_zeros(px.kmeans(2))).finalize(weights, ())
    assert np.isfinite(small.scale).all()
    assert not np.asarray(small.depalettize())[3].any()


@pytest.mark.parametrize(("name", "shape"), [("kernel", (1, 1, 1, 6)), ("weight", (5, 1, 1, 1))])
def test_channels_are_the_output_channels(name, shape):
    weights = {"conv": {name: data("normal", 5 * 4 * 3 * 6).reshape(5, 4, 3, 6).astype(np.float32)}}
    assert px.with_channel_scale(px.kmeans(1)).finalize(weights, ())["conv"][name].scale.shape == shape


def test_bare_rows_have_no_channels():
    weights = data("normal", 64).astype(np.float32)
    assert px.with_channel_scale(px.kmeans(2)).finalize(weights, ()).scale is None


@pytest.mark.parametrize("n", [4096, 32768, 262144])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_eight_bit_entries_cost_at_most_six_percent(n, dtype):
    weights = data("normal", n).astype(np.float32)
    exact = float(px.kmeans_lut(weights, 6).inertia)
    assert exact <= squared_error(px.quantize_lut(px.kmeans(6), dtype), weights) <= 1.06 * exact


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("granularity", [px.Granularity(), ROWS, BLOCKS], ids=["-", "rows", "both"])
def test_narrow_entries_are_levels_and_indices_the_nearest(dtype, granularity):
    weights = uneven_rows("normal", np.float32)
    small = px.quantize_lut(px.kmeans(3, granularity=granularity), dtype).finalize(weights, ()).validate()
    assert str(small.lut.dtype) == dtype
    assert small.scale.shape == granularity.groups(weights.shape)
    dense = np.asarray(small.depalettize())
    size = [n // g for n, g in zip(weights.shape, small.groups, strict=True)]
    for place in np.ndindex(*small.groups):
        block = tuple(slice(p * s, (p + 1) * s) for p, s in zip(place, size, strict=True))
        levels = np.float32(small.lut[place][:, 0]) - (128 if dtype == "uint8" else 0)
        entries = levels * np.float32(small.scale[place])
        nearest = np.abs(weights[block][..., None] - entries).min(axis=-1)
        np.testing.assert_array_equal(np.abs(weights[block] - dense[block]), nearest)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
def test_narrow_tables_of_vectors(dtype):
    """Entries are levels, indices the nearest, and the error little above that of float entries."""
    weights = data("normal", 4000).reshape(40, 100).astype(np.float32)
    sensitivity = np.random.default_rng(1).random((40, 100), np.float32)
    pairs = px.kmeans(4, granularity=px.Granularity(vector_size=2, vector_axis=1), key=jax.random.key(0))
    small = px.quantize_lut(pairs, dtype).finalize(weights, (), sensitivity=sensitivity).validate()
    assert str(small.lut.dtype) == dtype
    entries = (np.float32(small.lut[0, 0]) - (128 if dtype == "uint8" else 0)) * np.float32(small.scale)
    errors = np.square(weights.reshape(40, 50, 1, 2) - entries) * sensitivity.reshape(40, 50, 1, 2)
    least = errors.sum(axis=-1).min(axis=-1)
    found = np.square(np.asarray(small.depalettize()) - weights) * sensitivity
    np.testing.assert_allclose(found.reshape(40, 50, 2).sum(axis=-1), least, rtol=1e-5, atol=1e-7)
    assert found.sum() <= 1.02 * squared_error(pairs, weights, sensitivity)


def test_what_is_narrow_already_is_refused():
    narrow = px.quantize_lut(px.kmeans(2), "int8")
    with pytest.raises(ValueError, match="the table is of int8 already"):
        px.quantize_lut(narrow, "int8").finalize(np.eye(8, dtype=np.float32), ())


def test_what_the_inner_transform_did_not_make_keeps_its_table():
    weights = {"w": uneven_rows("normal", np.float32)}
    small = px.kmeans(2).finalize(weights, ())
    assert px.quantize_lut(px.identity(), "int8").finalize(small, ()) == small


@pytest.mark.parametrize("dtype", ["int4", "float32", "bool"])
def test_dtypes_that_are_no_narrow_table(dtype):
    with pytest.raises(ValueError, match=r"choose int8, uint8, float8_e4m3fn or float8_e5m2"):
        px.quantize_lut(px.kmeans(2), dtype)


INNERS = {
    "kmeans": px.kmeans(2),
    "rows": px.kmeans(2, granularity=ROWS),
    "lloyd": px.kmeans(2, method="lloyd"),
    "uniform": px.uniform(3),
    "int8": px.quantize_lut(px.kmeans(2), "int8"),
    "uint8": px.quantize_lut(px.kmeans(2), "uint8"),
    "scaled": px.with_channel_scale(px.kmeans(2), max_steps=2),
}


def pruned(dtype=np.float32, seed=0):
    weights = data("normal", 400, seed).reshape(20, 20)
    return np.where(np.abs(weights) > 0.8, weights, 0).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", INNERS)
def test_zeros_stay_zeros(name, sparse, dtype):
    weights = pruned(DTYPES[dtype])
    transform = px.keep_zeros(INNERS[name], sparse=sparse)
    small = transform.finalize(weights, transform.init(weights)).validate()
    assert not np.asarray(small.depalettize(), np.float64)[weights == 0].any()
    assert (small.mask is not None) == sparse
    assert small.kept is None


def test_sparse_zeros_take_no_entry():
    """Four values besides zero fit into two bits."""
    values = np.array([-2, -1, 0, 1, 3], np.float32)
    weights = values[np.random.default_rng(0).integers(0, 5, (20, 20))]
    small = px.keep_zeros(px.kmeans(2), sparse=True).finalize(weights, ())
    np.testing.assert_array_equal(small.depalettize(), weights)
    np.testing.assert_array_equal(np.asarray(small.lut).reshape(-1), values[values != 0])
    # A bit for each weight, two for each that is not zero, four entries.
    assert small.nbytes == 400 // 8 + -(-2 * int((weights != 0).sum()) // 8) + 4 * 4


@settings(max_examples=25)
@given(st.lists(st.integers(-30, 30), min_size=6, max_size=10), st.integers(1, 2))
def test_an_entry_of_zero_is_the_best_there_is(values, nbits):
    """Against every table that holds zero: zero's own cell, and the means of the others."""
    weights = np.array([*values, 0, 0], np.float32)

    def cost(cells):
        return sum(((np.array(c) - (0 if 0 in c else np.mean(c))) ** 2).sum() for c in cells if c)

    ordered, k = np.sort(weights).tolist(), 2**nbits
    cuts = itertools.combinations_with_replacement(range(len(ordered) + 1), k - 1)
    splits = ([ordered[a:b] for a, b in itertools.pairwise([0, *cut, len(ordered)])] for cut in cuts)
    # Zeros split over two cells would not all be zero.
    best = min(cost(cells) for cells in splits if sum(0 in cell for cell in cells) == 1)
    assert squared_error(px.keep_zeros(px.kmeans(nbits)), weights) <= best * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INNERS)
def test_elements_that_are_left_out_keep_their_value_and_have_no_say(name, dtype):
    weights = data("normal", 400).reshape(20, 20).astype(DTYPES[dtype])
    mask = np.random.default_rng(1).random((20, 20)) < 0.8
    outliers = np.where(mask, weights, weights.dtype.type(64)).astype(weights.dtype)
    small = px.masked(INNERS[name], mask).finalize(weights, INNERS[name].init(weights)).validate()
    np.testing.assert_array_equal(np.asarray(small.depalettize())[~mask], weights[~mask])
    far = px.masked(INNERS[name], mask).finalize(outliers, INNERS[name].init(outliers))
    np.testing.assert_array_equal(np.asarray(far.lut), np.asarray(small.lut))
    np.testing.assert_array_equal(np.asarray(far.depalettize())[mask], np.asarray(small.depalettize())[mask])


def test_a_mask_of_elements_in_a_tree_of_bools():
    weights = {"a": data("normal", 40).astype(np.float32), "b": data("normal", 40).astype(np.float32), "c": 1}
    keep = np.arange(40) % 2 == 0
    small = px.masked(px.kmeans(1), {"a": keep, "b": True, "c": False}).finalize(weights, ())
    assert small["c"] == 1
    assert small["b"].mask is None
    assert len(set(np.asarray(small["b"].depalettize()).tolist())) == 2
    np.testing.assert_array_equal(small["a"].depalettize()[~keep], weights["a"][~keep])


@pytest.mark.usefixtures("unchecked")
def test_masks_that_do_not_fit():
    weights = {"w": np.ones((4, 4), np.float32)}
    with pytest.raises(ValueError, match=r"leaf 'w' \(4, 4\) float32: mask is bool\(4,\)"):
        px.masked(px.kmeans(1), {"w": np.ones(4, bool)}).finalize(weights, ())
    with pytest.raises(ValueError, match=r"mask is int64\(4, 4\); give one bool"):
        px.masked(px.kmeans(1), {"w": np.ones((4, 4), np.int64)}).finalize(weights, ())
    pairs = px.kmeans(1, granularity=px.Granularity(vector_size=2), key=jax.random.key(0))
    with pytest.raises(ValueError, match="elements of a vector share an index"):
        px.masked(pairs, {"w": np.eye(4) > 0}).finalize(weights, ())
    for sparse in (False, True):
        with pytest.raises(ValueError, match="elements of a vector share an index"):
            px.keep_zeros(pairs, sparse=sparse).finalize(weights, ())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"channel_axis": 0.5}, "channel_axis=0.5"), ({"channel_axis": 2}, "channel_axis=2 is not an axis of"),
     ({"max_steps": 0}, "max_steps=0; at least one fit")],
)  # fmt: skip
def test_channel_scales_that_cannot_be(kwargs, message):
    with pytest.raises(ValueError, match=message):
        px.with_channel_scale(px.kmeans(1), **kwargs).finalize(np.ones((3, 3), np.float32), ())


def test_under_jit_a_mask_must_be_known_where_values_are_kept():
    weights = jnp.ones((4, 4))
    with pytest.raises(ValueError, match="mask is unknown under jit"):
        jax.jit(lambda w: px.masked(px.kmeans(1), w > 0).finalize(w, ()))(weights)


def test_tied_leaves_with_masks_of_their_own():
    weights = data("normal", 400).reshape(20, 20).astype(np.float32)
    mask = weights > -1
    small = px.masked(px.kmeans(1), {"a": mask, "b": ~mask}).finalize({"a": weights, "b": weights}, ())
    np.testing.assert_array_equal(np.asarray(small["a"].depalettize())[~mask], weights[~mask])
    np.testing.assert_array_equal(np.asarray(small["b"].depalettize())[mask], weights[mask])


def test_tied_leaves_that_are_palettized_already():
    """What is kept, or weighed, is what one of the leaves holds, not their sum."""
    tree = px.kmeans(3).finalize([uneven_rows("normal", np.float32)] * 2, ())
    mask = np.arange(400).reshape(20, 20) % 2 == 0
    alone = px.masked(px.kmeans(1), mask).finalize(tree[0], ())
    both = px.masked(px.kmeans(1), [mask, mask]).finalize(tree, ())
    assert both[0] is both[1]
    assert_same(*(jax.tree.map(np.asarray, leaf) for leaf in (both[0], alone)))


WRAPPERS = {
    "scale": lambda inner: px.with_channel_scale(inner, max_steps=2),
    "int8": lambda inner: px.quantize_lut(inner, "int8"),
    "zeros": px.keep_zeros,
    "sparse": lambda inner: px.keep_zeros(inner, sparse=True),
    "elements": lambda inner: px.masked(inner, np.random.default_rng(1).random((20, 20)) < 0.9),
}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("outer", WRAPPERS)
@pytest.mark.parametrize("inner", WRAPPERS)
def test_wrappers_in_every_order(outer, inner, dtype):
    """Zeros stay zeros and what is left out stays what it was, whichever is around the other."""
    weights = (pruned() * np.logspace(-2, 0, 20)[:, None]).astype(DTYPES[dtype])
    transform = WRAPPERS[outer](WRAPPERS[inner](px.kmeans(3)))
    if {outer, inner} <= {"sparse", "elements"} or (outer == inner == "int8"):
        with pytest.raises(ValueError, match=r"leaves out elements already|int8 already"):
            transform.finalize(weights, ())
        return
    small = transform.finalize(weights, ()).validate()
    dense = np.asarray(small.depalettize())
    np.testing.assert_array_equal(np.asarray(transform.update(weights, ())[0]), dense)
    if {outer, inner} & {"zeros", "sparse"}:
        assert not dense[weights == 0].any()
    if "elements" in (outer, inner):
        left = np.random.default_rng(1).random((20, 20)) >= 0.9
        np.testing.assert_array_equal(dense[left], weights[left])
    assert np.square(dense - weights, dtype=np.float64).sum() < np.square(weights, dtype=np.float64).sum()


@pytest.mark.parametrize("make", [px.uniform, px.kmeans])
def test_what_is_left_out_has_no_say_in_any_group(make):
    weights = np.stack([np.full(10, 1e3), np.linspace(-1, 1, 10)]).astype(np.float32)
    mask = np.ones((2, 10), bool)
    mask[1, 0] = False
    rows = make(2, granularity=px.Granularity(1))
    lut = px.masked(rows, mask).finalize(weights, ()).lut
    np.testing.assert_allclose(lut[1], make(2).finalize(weights[1, 1:], ()).lut[0][None], rtol=1e-6)


@pytest.mark.parametrize(
    "transform",
    [px.with_channel_scale(px.kmeans(2)), px.keep_zeros(px.kmeans(2)), px.quantize_lut(px.kmeans(2), "int8")],
    ids=["scale", "zeros", "int8"],
)
def test_sensitivities_of_another_shape_are_refused(transform):
    weights = uneven_rows("normal", np.float32)
    for sensitivity in (np.ones(20, np.float32), np.ones((1, 20), np.float32), -np.ones((20, 20), np.float32)):
        with pytest.raises(ValueError, match="sensitivity"):
            transform.finalize(weights, (), sensitivity=sensitivity)


def test_sensitivities_of_half_precision():
    weights = pruned(np.float16)
    ones = np.ones((20, 20), np.float16)
    assert_same(
        *(
            jax.tree.map(np.asarray, px.keep_zeros(px.kmeans(2)).finalize(weights, (), sensitivity=s))
            for s in (ones, None)
        )
    )


def test_what_the_inner_transform_passes_by_the_wrappers_pass_by():
    tree = {
        "w": pruned(),
        "key": jax.random.key(0),
        "empty": np.zeros((0, 3), np.float32),
        "ids": np.arange(5),
        "f": len,
    }
    inner = px.by_path([("^w$", px.kmeans(2))])
    for make in (px.with_channel_scale, px.keep_zeros, lambda t: px.quantize_lut(t, "int8")):
        transform = make(inner)
        small = transform.finalize(tree, transform.init(tree))
        assert all(small[name] is tree[name] for name in tree if name != "w")
        assert small["w"].nbits == 2


def test_the_table_stays_ascending_when_its_padding_is_nearest_to_zero():
    def three(weights):
        return [-3.0, -2.0, -1.0], np.zeros(weights.size, int)

    weights = np.array([-3, -2, -1, 0] * 5, np.float32)
    lut = np.asarray(px.keep_zeros(px.custom(three)).finalize(weights, ()).lut).reshape(-1)
    assert lut.tolist() == [-3, -2, -1, 0]
