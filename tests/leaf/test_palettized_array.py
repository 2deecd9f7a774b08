"""`PalettizedArray`: what it stands for, what it refuses, and how it travels."""

import copy
import dataclasses
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import palettax as px
import palettax.coreml
from palettax.leaf import is_palettized
from palettax.leaf.blocks import split_vectors
from tests.leaves import assert_same, assert_same_bits, forms, random_leaf, with_levels, with_mask
from tests.tables import DTYPES

assert palettax.coreml  # imported first: it brings coremltools in without its noise


def leaf(shape, groups, nbits=2, vector_axis=None, vector_size=1, scale=None, dtype=np.float32, seed=0):
    """A valid leaf with random contents; `shape` is that of the indices."""
    rng = np.random.default_rng(seed)
    return px.PalettizedArray(
        rng.standard_normal((*groups, 2**nbits, vector_size)).astype(dtype),
        rng.integers(0, 2**nbits, shape).astype(np.uint8),
        None if scale is None else rng.uniform(0.5, 2, scale).astype(dtype),
        nbits=nbits,
        vector_axis=vector_axis,
    ).validate()


LEAVES = {
    "tensor": leaf((4, 6), (1, 1)),
    "rows": leaf((4, 6), (2, 1), nbits=3),
    "columns": leaf((4, 6), (1, 3), nbits=1),
    "blocks": leaf((4, 6), (2, 3), nbits=4),
    "four axes": leaf((2, 4, 3, 6), (2, 2, 1, 3)),
    "vectors": leaf((4, 6), (1, 1), vector_axis=0, vector_size=2),
    "vectors last": leaf((4, 6), (2, 3), vector_axis=1, vector_size=3),
    "vectors in the middle": leaf((2, 4, 6), (1, 2, 3), vector_axis=1, vector_size=2),
    "scale": leaf((4, 6), (1, 1), scale=(4, 1)),
    "everything": leaf((4, 6), (2, 3), vector_axis=1, vector_size=2, scale=(4, 12), nbits=3),
    "a row": leaf((8,), (2,), nbits=8),
    "half": leaf((4, 6), (2, 1), scale=(1, 6), dtype=np.float16),
    "brain": leaf((4, 6), (1, 2), dtype=jnp.bfloat16),
    "double": leaf((4, 6), (1, 2), dtype=np.float64),
    "scale in blocks": leaf((4, 6), (2, 1), scale=(2, 3)),
    "vectors under scale blocks": leaf((4, 6), (1, 3), vector_axis=1, vector_size=2, scale=(1, 4), dtype=np.float16),
    "int8": with_levels(leaf((4, 6), (2, 1), scale=(4, 1), nbits=3), np.int8),
    "uint8": with_levels(leaf((4, 6), (1, 1), scale=(2, 6), nbits=8, dtype=jnp.bfloat16), np.uint8),
    "uint8 vectors": with_levels(leaf((4, 6), (1, 3), vector_axis=0, vector_size=2, scale=(1, 2)), np.uint8),
    "float8": with_levels(leaf((4, 6), (1, 1), scale=(1, 6), dtype=np.float16), jnp.float8_e4m3fn),
    "wide float8": with_levels(leaf((2, 3, 4), (1, 3, 2), scale=(1, 1, 2)), jnp.float8_e5m2),
    "sparse": with_mask(leaf((4, 6), (2, 1)), kept=False),
    "kept": with_mask(leaf((4, 6), (2, 3), scale=(4, 3)), kept=True),
    "kept half": with_mask(leaf((2, 4, 6), (1, 2, 3), dtype=np.float16), kept=True),
    "kept beside levels": with_mask(with_levels(leaf((4, 6), (2, 1)), np.int8), kept=True),
}
assert all(0 < small.mask.sum() < small.size for small in LEAVES.values() if small.mask is not None)
IN_JAX = [name for name in LEAVES if name != "double"]  # JAX cuts float64 to float32
leaves = pytest.mark.parametrize("small", LEAVES.values(), ids=LEAVES)


def expand(small):
    """The definition, one element at a time."""
    dense, kept = np.zeros(small.shape, small.dtype), None if small.kept is None else iter(small.kept)
    for place in np.ndindex(*small.shape):
        if small.mask is not None and not small.mask[place]:
            dense[place] = 0 if kept is None else next(kept)
            continue
        slot, entry = list(place), 0
        if small.vector_axis is not None:
            slot[small.vector_axis], entry = divmod(place[small.vector_axis], small.vector_size)
        group = tuple(i // (length // g) for i, length, g in zip(slot, small.indices.shape, small.groups, strict=True))
        value = small.lut[(*group, small.indices[tuple(slot)], entry)]
        if small.lut.dtype == np.uint8:
            value = int(value) - 128
        value = np.float64(value).astype(small.dtype)
        if small.scale is not None:
            blocks = zip(place, small.shape, small.scale.shape, strict=True)
            value = value * small.scale[tuple(i // (length // count) for i, length, count in blocks)]
        dense[place] = value
    return dense


@leaves
def test_depalettize_is_its_definition(small):
    dense = small.depalettize()
    assert type(dense) is np.ndarray
    assert_same_bits(dense, expand(small))


@given(form=forms())
def test_depalettize_is_its_definition_in_every_form(form):
    small = random_leaf(**form)
    assert_same_bits(small.depalettize(), expand(small))
    assert_same(jax.tree.map(lambda part: part, small), small)


@given(form=forms())
def test_transposed_twice_and_back(form):
    small, rng = random_leaf(**form), np.random.default_rng(form["seed"])
    one, two = rng.permutation(small.ndim).tolist(), rng.permutation(small.ndim).tolist()
    turned = small.transpose(*one).validate()
    assert_same_bits(turned.depalettize(), small.depalettize().transpose(one))
    assert_same(turned.transpose(*two), small.transpose(*np.array(one)[two].tolist()))
    assert_same(turned.transpose(*np.argsort(one).tolist()), small)


@pytest.mark.parametrize("name", IN_JAX)
def test_in_jax_it_is_the_same(name):
    small = LEAVES[name]
    on_device = jax.tree.map(jnp.asarray, small)
    for dense in (on_device.depalettize(), jax.jit(px.depalettize)(on_device)):
        assert isinstance(dense, jax.Array)
        assert_same_bits(dense, small.depalettize())


@pytest.mark.parametrize(
    "name", [n for n, small in LEAVES.items() if small.mask is None and small.lut.dtype == small.dtype]
)
def test_coremltools_expands_it_to_the_same(name):
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_lut_to_dense

    small = LEAVES[name]
    theirs = constexpr_lut_to_dense.decompress(small.indices, small.lut, small.vector_axis)
    assert_same_bits(dataclasses.replace(small, scale=None).depalettize(), theirs)


@leaves
def test_transpose(small):
    dense = small.depalettize()
    for axes in itertools.permutations(range(small.ndim)):
        turned = small.transpose(*axes).validate()
        assert_same_bits(turned.depalettize(), dense.transpose(axes))
        assert_same(turned.transpose(*np.argsort(axes).tolist()), small)
    assert_same(small.transpose(*range(-small.ndim, 0)), small)
    assert_same_bits(small.transpose().depalettize(), dense.T)


@pytest.mark.parametrize("axes", [(0,), (0, 0), (0, 1, 2), (0, 3), (-3, 1)])
def test_transpose_refuses_what_is_no_permutation(axes):
    with pytest.raises(ValueError, match="not a permutation of the 2 axes"):
        LEAVES["blocks"].transpose(*axes)


def blocks_stay_whole(small, order, axis):
    """Whether an order keeps each vector, each group and each block of the scale of an axis together."""
    size = small.vector_size if axis == small.vector_axis else 1
    vectors = np.reshape(order, (-1, size))
    whole = (vectors == vectors[:, :1] // size * size + np.arange(size)).all()
    for count in (small.groups[axis], 1 if small.scale is None else small.scale.shape[axis]):
        blocks = np.reshape(order, (count, -1)) // (small.shape[axis] // count)
        whole &= (blocks == blocks[:, :1]).all()
    return bool(whole)


def whole_order(small, axis, rng):
    """A random order of an axis that tears nothing: blocks, the smaller ones in them and vectors, each shuffled."""
    counts = (small.groups[axis], 1 if small.scale is None else small.scale.shape[axis])
    size = small.vector_size if axis == small.vector_axis else 1
    length = small.shape[axis]
    if max(counts) % min(counts) or (length // max(counts)) % size:
        return np.arange(length)
    blocks = np.arange(length).reshape(min(counts), max(counts) // min(counts), -1, size)
    inner = [rng.permutation([rng.permutation(small_block) for small_block in block]) for block in blocks]
    return rng.permutation(inner).reshape(-1)


@given(form=forms(), legal=st.booleans())
def test_take_reorders_or_refuses_to_tear(form, legal):
    small, rng = random_leaf(**form), np.random.default_rng(form["seed"])
    axis = int(rng.integers(-small.ndim, small.ndim))
    order = whole_order(small, axis % small.ndim, rng) if legal else rng.permutation(small.shape[axis])
    if blocks_stay_whole(small, order, axis % small.ndim):
        moved = small.take(order, axis).validate()
        assert_same_bits(moved.depalettize(), small.depalettize().take(order, axis))
        assert_same(moved.take(np.argsort(order), axis), small)
    else:
        assert not legal
        with pytest.raises(ValueError, match=r"would tear its \d+ (groups|vectors|blocks of the scale) of \d+ apart"):
            small.take(order, axis)


@pytest.mark.parametrize(
    ("name", "order", "axis", "message"),
    [
        ("rows", [0, 2, 1, 3], 0, "reordering axis 0 would tear its 2 groups of 2 apart; palettize along another axis"),
        ("vectors", [1, 0, 2, 3, 4, 5, 6, 7], 0, "tear its 4 vectors of 2 apart"),
        ("scale in blocks", [0, 2, 1, 3, 4, 5], 1, "axis 1 would tear its 3 blocks of the scale of 2 apart"),
        ("rows", [0, 0, 1, 2], 0, "not a permutation of the 4 elements on axis 0"),
        ("rows", [0, 1], 0, "not a permutation of the 4 elements on axis 0"),
        ("rows", [0, 1, 2, 3], 2, "axis"),
    ],
)
def test_take_says_what_is_wrong(name, order, axis, message):
    with pytest.raises(ValueError, match=message):
        LEAVES[name].take(order, axis)


def factorizations(n):
    """Every shape of n elements without axes of length 1, if n is not 1 itself."""
    shapes = [(n,)]
    shapes += [(d, *rest) for d in range(2, n) if n % d == 0 for rest in factorizations(n // d)]
    return shapes


def lie_in_line(small, shape):
    """Whether the elements of every vector of a weight are neighbours on one axis, and on whole places of it."""
    where = split_vectors(np.arange(small.size).reshape(small.shape), small.vector_axis, small.vector_size)
    places = np.stack(np.unravel_index(where.reshape(-1, small.vector_size), shape))
    steps = np.diff(places, axis=2)
    on_axis = [axis for axis in range(len(shape)) if (steps[axis] == 1).all() and shape[axis] % small.vector_size == 0]
    return any(not np.delete(steps, axis, axis=0).any() for axis in on_axis)


@given(forms(), st.data())
def test_reshape_keeps_the_weight_or_refuses_to_tear_vectors(form, data):
    small = random_leaf(**form)
    shape = data.draw(st.sampled_from(factorizations(small.size)).flatmap(lambda s: st.sampled_from([s, (1, *s)])))
    if small.vector_axis is not None and not lie_in_line(small, shape):
        with pytest.raises(ValueError, match="tear"):
            small.reshape(*shape)
        return
    other = small.reshape(*shape).validate()
    assert other.shape == shape
    assert_same_bits(other.depalettize(), small.depalettize().reshape(shape))
    assert_same_bits(other.reshape(small.shape).depalettize(), small.depalettize())


@pytest.mark.parametrize(
    ("groups", "shape", "new", "expected"),
    [
        ((1, 4), (6, 8), (48,), (24,)),  # a table of columns is read again in every row
        ((3, 1), (6, 8), (48,), (3,)),
        ((1, 4), (6, 8), (2, 3, 8), (1, 1, 4)),
        ((1, 4), (6, 8), (6, 2, 4), (1, 2, 2)),
        ((2, 2), (4, 4), (1, 4, 4, 1), (1, 2, 2, 1)),
    ],
)
def test_reshape_needs_no_more_tables_than_it_must(groups, shape, new, expected):
    small = random_leaf(shape, groups=groups)
    assert small.reshape(new).groups == expected
    assert small.reshape(-1).reshape(new).shape == new


def test_a_layer_computes_with_it_as_with_an_array():
    small = random_leaf((6, 4), 3, groups=(3, 1), scale=(1, 4))
    dense, x = jnp.asarray(small.depalettize()), jnp.arange(12.0).reshape(2, 6)
    expected = x @ dense
    assert_same_bits(np.asarray(x @ small), np.asarray(expected))
    assert_same_bits(np.asarray(jnp.dot(x, small)), np.asarray(expected))
    assert_same_bits(np.asarray(small[1:, 0]), np.asarray(dense[1:, 0]))
    assert_same_bits(np.stack(list(small)), np.asarray(dense))
    assert_same_bits(np.asarray(small), np.asarray(dense))
    assert_same_bits(np.asarray(small.T), np.asarray(dense.T))
    assert len(small) == 6
    np.testing.assert_allclose(jax.jit(jnp.matmul)(x, small), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda row: row @ small)(x), expected, rtol=1e-6)
    two = jax.tree.map(lambda a: jnp.stack([a, a]), jax.tree.map(jnp.asarray, small))
    scanned = jax.lax.scan(lambda carry, layer: (carry, x @ layer), 0, two)[1]
    np.testing.assert_allclose(scanned, [expected, expected], rtol=1e-6)


def test_a_layer_has_a_gradient_in_the_lut():
    small, x = random_leaf((6, 4), 1), jnp.arange(6.0)
    gradient = jax.grad(lambda lut: (x @ dataclasses.replace(small, lut=lut)).sum())(jnp.asarray(small.lut))
    sums = [x @ (small.indices == entry).sum(axis=1) for entry in range(2)]
    np.testing.assert_allclose(gradient.reshape(-1), sums, rtol=1e-6)


@leaves
def test_bytes_are_counted_exactly(small):
    count = small.indices.size if small.mask is None else int(small.mask.sum())
    parts = [part for part in (small.lut, small.scale, small.kept) if part is not None]
    expected = (count * small.nbits + 7) // 8 + sum(part.nbytes for part in parts)
    expected += 0 if small.mask is None else (small.size + 7) // 8
    assert small.nbytes == expected
    assert small.size == np.prod(small.shape)
    assert small.bits_per_weight == 8 * expected / small.size
    assert small.shape == small.depalettize().shape


@pytest.mark.usefixtures("unchecked")  # shapes stand for arrays
def test_four_bits_for_a_million_weights():
    parts = jnp.zeros((1, 1, 16, 1), np.float16), jnp.zeros((1000, 1000), np.uint8)
    small = jax.eval_shape(lambda lut, indices: px.PalettizedArray(lut, indices, nbits=4), *parts)
    assert small.nbytes == 500_000 + 32
    assert small.bits_per_weight == 4 + 256 / 1_000_000


def broken(small, **changes):
    return dataclasses.replace(small, **changes)


ROWS = LEAVES["rows"]
VECTORS = LEAVES["vectors"]
SCALE = LEAVES["scale"]
INT8 = LEAVES["int8"]
KEPT = LEAVES["kept"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: broken(ROWS, nbits=5), r"nbits=5; Core ML holds \(1, 2, 3, 4, 6, 8\)"),
        (lambda: broken(ROWS, lut=ROWS.lut[0]), r"lut \(1, 8, 1\) must have the rank of indices \(4, 6\) plus 2"),
        (lambda: broken(ROWS, nbits=4), r"lut \(2, 1, 8, 1\) has 8 entries; nbits=4 needs 16"),
        (lambda: broken(ROWS, indices=ROWS.indices[:3]), r"2 groups do not divide axis 0 of indices \(3, 6\)"),
        (lambda: broken(ROWS, lut=ROWS.lut[:0]), "0 groups do not divide axis 0"),
        (lambda: broken(ROWS, vector_axis=0), "vector_size=1 with vector_axis=0: set both or neither"),
        (lambda: broken(VECTORS, vector_axis=None), "vector_size=2 with vector_axis=None: set both or neither"),
        (lambda: broken(VECTORS, vector_axis=2), r"vector_axis=2 is not an axis of indices \(4, 6\)"),
        (lambda: broken(VECTORS, vector_axis=-1), "vector_axis=-1 is not an axis"),
        (lambda: broken(ROWS, indices=ROWS.indices.astype(np.int32)), "indices are int32; they must be uint8"),
        (
            lambda: broken(ROWS, lut=ROWS.lut.astype(int)),
            "lut is int64; it must be of the weight's dtype .* or one of int8",
        ),
        (lambda: broken(ROWS, lut=ROWS.lut.astype(np.float16)), "lut is float16; .* the weight's dtype float32"),
        (lambda: broken(SCALE, scale=SCALE.scale[0]), r"scale \(1,\) must have the rank of the weight \(4, 6\)"),
        (
            lambda: broken(SCALE, scale=SCALE.scale[:3]),
            r"the 3 blocks of scale \(3, 1\) do not divide axis 0 of \(4, 6\)",
        ),
        (lambda: broken(SCALE, scale=SCALE.scale[:0]), r"the 0 blocks of scale \(0, 1\) do not divide axis 0"),
        (lambda: broken(SCALE, indices=SCALE.indices[:1]), r"the 4 blocks of scale \(4, 1\) do not divide axis 0"),
        (lambda: broken(SCALE, scale=SCALE.scale.astype(np.float64)), "scale is float64"),
        (lambda: broken(ROWS, indices=ROWS.indices + np.uint8(8)), r"index \d+ is outside the 8 entries of the lut"),
        (lambda: broken(INT8, scale=None), "lut is int8 without a scale; levels of a float32 weight need one"),
        (lambda: broken(INT8, dtype=None), "dtype=int8 is no float; pass the dtype of the weight"),
        (lambda: broken(INT8, dtype=np.float16), "scale is float32; it must be of the weight's dtype float16"),
        (lambda: broken(KEPT, mask=None), r"kept \(\d+,\) without a mask"),
        (
            lambda: broken(KEPT, mask=KEPT.mask[:2]),
            r"mask is bool \(2, 6\); it must be bool of the weight's shape \(4, 6\)",
        ),
        (lambda: broken(KEPT, mask=KEPT.mask.astype(np.uint8)), "mask is uint8"),
        (lambda: broken(KEPT, kept=KEPT.kept[:-1]), r"\d+ kept values for the \d+ weights outside the mask"),
        (lambda: broken(KEPT, kept=KEPT.kept[None]), r"kept is float32 \(1, \d+\); it must be one row"),
        (lambda: broken(KEPT, kept=KEPT.kept.astype(np.float16)), "kept is float16 .* of the weight's dtype float32"),
        (lambda: broken(KEPT, indices=KEPT.indices | ~KEPT.mask), "an index outside the mask is not 0"),
        (
            lambda: broken(VECTORS, mask=np.ones((8, 6), bool)),
            "a mask with vector_size=2; a mask needs an index for each",
        ),
    ],
)
def test_every_invariant_is_checked(bad, message):
    with pytest.raises(ValueError, match=message):
        bad().validate()


def test_valid_leaves_come_back_from_validate():
    for small in LEAVES.values():
        assert small.validate() is small


@leaves
def test_copies_are_the_same(small):
    for again in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small), jax.tree.map(lambda x: x.copy(), small)):
        assert_same(again, small)


@pytest.mark.usefixtures("unchecked")  # shapes stand for arrays
@pytest.mark.parametrize("name", IN_JAX)
def test_static_fields_survive_jit(name):
    small = LEAVES[name]
    through = jax.jit(lambda s: s)(small)
    assert_same(jax.tree.map(np.asarray, through), small)
    assert jax.tree.structure(through) == jax.tree.structure(small)


@pytest.mark.usefixtures("unchecked")  # shapes stand for arrays
@pytest.mark.parametrize("name", IN_JAX)
def test_shapes_alone_say_what_it_costs_before_any_work(name):
    small = LEAVES[name]
    shapes = jax.eval_shape(lambda s: s, small)
    assert shapes.validate() is shapes
    assert (shapes.shape, shapes.size) == (small.shape, small.size)
    # Without values, and without kept ones, nobody knows how many indices the mask saves.
    saved = 0 if small.mask is None or small.kept is not None else int((~small.mask).sum())
    assert saved == 0 or name == "sparse"
    assert (
        shapes.nbytes
        == small.nbytes + (small.size * small.nbits + 7) // 8 - ((small.size - saved) * small.nbits + 7) // 8
    )
    assert shapes.bits_per_weight == 8 * shapes.nbytes / small.size
    dense = jax.eval_shape(px.depalettize, small)
    assert (dense.shape, dense.dtype) == (small.shape, small.dtype)


@pytest.mark.parametrize("name", ["kept", "sparse"])
def test_kept_values_are_moved_where_their_order_is_known(name):
    small = jax.tree.map(jnp.asarray, LEAVES[name])
    order = [1, 0, 3, 2, 5, 4] if small.groups[1] > 1 else [5, 4, 3, 2, 1, 0]
    moves = (lambda s: s.transpose(), lambda s: s.take(order, 1))
    for move in moves:
        assert_same(move(small), move(LEAVES[name]))
        # Values may be traced; the order of the kept ones is in the mask.
        held = jax.jit(lambda kept, move=move: move(dataclasses.replace(small, kept=kept)).depalettize())(small.kept)
        assert_same_bits(held, move(LEAVES[name]).depalettize())
        if name == "kept":
            with pytest.raises(ValueError, match="while the mask is traced"):
                jax.jit(move)(small)
        else:
            assert_same(jax.jit(move)(small), move(LEAVES[name]))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_mask_that_is_all_of_one_kind(kept, inside):
    small = leaf((4, 6), (2, 1))
    mask = np.full((4, 6), inside)
    values = np.arange(24 * (not inside), dtype=np.float32) if kept else None
    small = dataclasses.replace(small, indices=small.indices * mask, mask=mask, kept=values).validate()
    assert_same_bits(small.depalettize(), expand(small))
    assert_same_bits(jax.jit(px.depalettize)(small), expand(small))
    assert_same_bits(small.transpose().depalettize(), expand(small).T)


def test_levels_are_about_their_zero():
    levels = np.array([0, 127, 128, 255], np.uint8)
    for lut, values in ((levels, [-32, -0.25, 0, 31.75]), (levels.view(np.int8), [0, 31.75, -32, -0.25])):
        scale = np.full((1,), 0.25, np.float16)
        small = px.PalettizedArray(
            lut.reshape(1, 4, 1), np.arange(4, dtype=np.uint8), scale, nbits=2, dtype=jnp.float16
        ).validate()
        assert small.depalettize().tolist() == values
        assert small.dtype == np.dtype(np.float16)


def test_levels_of_a_double_in_jax():
    small = with_levels(leaf((4, 6), (1, 2), dtype=np.float64), np.uint8)
    np.testing.assert_array_equal(jax.jit(px.depalettize)(small), small.depalettize().astype(np.float32))


@pytest.mark.parametrize(
    "make",
    [
        lambda s: leaf((4, 6), (2, 3), vector_axis=1, vector_size=2, seed=s),
        lambda s: with_levels(leaf((4, 6), (2, 3), scale=(2, 6), seed=s), np.uint8, s),
        # A batch has kept values of one number.
        lambda s: LEAVES["kept"].take(np.roll(np.arange(6), 2 * s), 1),
    ],
    ids=["vectors", "levels", "kept"],
)
def test_vmap_over_a_batch_of_leaves(make):
    batch = [make(s) for s in range(3)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *batch)
    dense = jax.vmap(px.depalettize)(stacked)
    np.testing.assert_array_equal(dense, np.stack([s.depalettize() for s in batch]))


def test_the_lut_is_differentiable():
    small = jax.tree.map(jnp.asarray, LEAVES["tensor"])
    gradient = jax.grad(lambda lut: dataclasses.replace(small, lut=lut).depalettize().sum())(small.lut)
    np.testing.assert_array_equal(gradient.reshape(-1), np.bincount(np.ravel(small.indices), minlength=4))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_dtype_is_that_of_the_lut(dtype):
    small = leaf((4, 6), (1, 1), dtype=dtype)
    assert small.dtype == np.dtype(dtype)
    assert small.depalettize().dtype == np.dtype(dtype)


def test_depalettize_a_tree():
    dense = np.arange(3)
    tree = {"a": [LEAVES["rows"], dense, None], "b": (LEAVES["vectors"], 1.5)}
    out = px.depalettize(tree)
    assert out["a"][1] is dense
    assert out["a"][2] is None
    assert out["b"][1] == 1.5
    assert_same_bits(out["a"][0], LEAVES["rows"].depalettize())
    assert_same_bits(out["b"][0], LEAVES["vectors"].depalettize())
    assert is_palettized(tree["b"][0])
    assert not is_palettized(out["b"][0])
