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
}
leaves = pytest.mark.parametrize("small", LEAVES.values(), ids=LEAVES)


def expand(small):
    """The definition, one element at a time."""
    dense = np.empty(small.shape, small.dtype)
    for place in np.ndindex(*small.shape):
        slot, entry = list(place), 0
        if small.vector_axis is not None:
            slot[small.vector_axis], entry = divmod(place[small.vector_axis], small.vector_size)
        group = tuple(i // (length // g) for i, length, g in zip(slot, small.indices.shape, small.groups, strict=True))
        value = small.lut[(*group, small.indices[tuple(slot)], entry)]
        if small.scale is not None:
            value = value * np.broadcast_to(small.scale, small.shape)[place]
        dense[place] = value
    return dense


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def same_leaf(a, b):
    assert (a.nbits, a.vector_axis, a.dtype) == (b.nbits, b.vector_axis, b.dtype)
    assert (a.scale is None) == (b.scale is None)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        same_bits(x, y)


@leaves
def test_depalettize_is_its_definition(small):
    dense = small.depalettize()
    assert type(dense) is np.ndarray
    same_bits(dense, expand(small))


@pytest.mark.parametrize("name", [n for n in LEAVES if n != "double"])  # JAX cuts float64 to float32
def test_in_jax_it_is_the_same(name):
    small = LEAVES[name]
    on_device = jax.tree.map(jnp.asarray, small)
    for dense in (on_device.depalettize(), jax.jit(px.depalettize)(on_device)):
        assert isinstance(dense, jax.Array)
        same_bits(dense, small.depalettize())


@leaves
def test_coremltools_expands_it_to_the_same(small):
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_lut_to_dense

    theirs = constexpr_lut_to_dense.decompress(small.indices, small.lut, small.vector_axis)
    same_bits(dataclasses.replace(small, scale=None).depalettize(), theirs)


@leaves
def test_transpose(small):
    dense = small.depalettize()
    for axes in itertools.permutations(range(small.ndim)):
        turned = small.transpose(*axes).validate()
        same_bits(turned.depalettize(), dense.transpose(axes))
        same_leaf(turned.transpose(*np.argsort(axes).tolist()), small)
    same_leaf(small.transpose(*range(-small.ndim, 0)), small)
    same_bits(small.transpose().depalettize(), dense.T)


@pytest.mark.parametrize("axes", [(0,), (0, 0), (0, 1, 2), (0, 3), (-3, 1)])
def test_transpose_refuses_what_is_no_permutation(axes):
    with pytest.raises(ValueError, match="not a permutation of the 2 axes"):
        LEAVES["blocks"].transpose(*axes)


def blocks_stay_whole(small, order, axis):
    """Whether an order keeps each vector and each group of an axis together."""
    size = small.vector_size if axis == small.vector_axis else 1
    vectors = np.reshape(order, (-1, size))
    groups = np.reshape(order, (small.groups[axis], -1)) // (small.shape[axis] // small.groups[axis])
    whole_vectors = (vectors == vectors[:, :1] // size * size + np.arange(size)).all()
    return bool(whole_vectors and (groups == groups[:, :1]).all())


@given(name=st.sampled_from(sorted(LEAVES)), seed=st.integers(0, 2**32 - 1), legal=st.booleans())
def test_take_reorders_or_refuses_to_tear(name, seed, legal):
    small, rng = LEAVES[name], np.random.default_rng(seed)
    axis = int(rng.integers(-small.ndim, small.ndim))
    order = np.arange(small.shape[axis])
    if legal:
        groups, size = small.groups[axis], small.vector_size if axis % small.ndim == small.vector_axis else 1
        blocks = [rng.permutation(block) for block in order.reshape(groups, -1, size)]
        order = rng.permutation(blocks).reshape(-1)
        assert blocks_stay_whole(small, order, axis % small.ndim)
    else:
        order = rng.permutation(order)
    if blocks_stay_whole(small, order, axis % small.ndim):
        moved = small.take(order, axis).validate()
        same_bits(moved.depalettize(), small.depalettize().take(order, axis))
    else:
        with pytest.raises(ValueError, match=r"would tear its \d+ (groups|vectors) of \d+ apart"):
            small.take(order, axis)


@pytest.mark.parametrize(
    ("name", "order", "axis", "message"),
    [
        ("rows", [0, 2, 1, 3], 0, "reordering axis 0 would tear its 2 groups of 2 apart; palettize along another axis"),
        ("vectors", [1, 0, 2, 3, 4, 5, 6, 7], 0, "tear its 4 vectors of 2 apart"),
        ("rows", [0, 0, 1, 2], 0, "not a permutation of the 4 elements on axis 0"),
        ("rows", [0, 1], 0, "not a permutation of the 4 elements on axis 0"),
        ("rows", [0, 1, 2, 3], 2, "axis"),
    ],
)
def test_take_says_what_is_wrong(name, order, axis, message):
    with pytest.raises(ValueError, match=message):
        LEAVES[name].take(order, axis)


@leaves
def test_bytes_are_counted_exactly(small):
    bits = small.indices.size * small.nbits
    floats = small.lut.size + (0 if small.scale is None else small.scale.size)
    expected = (bits + 7) // 8 + floats * np.dtype(small.dtype).itemsize
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
        (lambda: broken(ROWS, lut=ROWS.lut.astype(int)), "lut is int64; it must be floating"),
        (lambda: broken(ROWS, lut=ROWS.lut.astype(np.float16)), "lut is float16; .* the weight's dtype float32"),
        (lambda: broken(SCALE, scale=SCALE.scale[0]), r"scale \(1,\) must have the rank of the weight \(4, 6\)"),
        (lambda: broken(SCALE, scale=SCALE.scale[:2]), r"\(2, 1\).* \(4, 6\)"),
        (lambda: broken(SCALE, indices=SCALE.indices[:1]), r"scale \(4, 1\) does not broadcast to the weight \(1, 6\)"),
        (lambda: broken(SCALE, scale=SCALE.scale.astype(np.float64)), "scale is float64"),
        (lambda: broken(ROWS, indices=ROWS.indices + np.uint8(8)), r"index \d+ is outside the 8 entries of the lut"),
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
        same_leaf(again, small)


@pytest.mark.usefixtures("unchecked")  # shapes stand for arrays
@pytest.mark.parametrize("name", ["everything", "vectors", "half", "brain"])
def test_static_fields_survive_jit(name):
    small = LEAVES[name]
    through = jax.jit(lambda s: s)(small)
    same_leaf(jax.tree.map(np.asarray, through), small)
    assert jax.tree.structure(through) == jax.tree.structure(small)
    shapes = jax.eval_shape(lambda s: s, small)
    assert (shapes.shape, shapes.nbytes) == (small.shape, small.nbytes)


def test_vmap_over_a_batch_of_leaves():
    batch = [leaf((4, 6), (2, 3), vector_axis=1, vector_size=2, seed=s) for s in range(3)]
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
    same_bits(out["a"][0], LEAVES["rows"].depalettize())
    same_bits(out["b"][0], LEAVES["vectors"].depalettize())
    assert is_palettized(tree["b"][0])
    assert not is_palettized(out["b"][0])
