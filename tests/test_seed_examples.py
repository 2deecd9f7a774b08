"""The worked examples of coremltools' documentation of `palettize_weights`, and where it contradicts itself.

Quotations are of that documentation.
"""

import jax
import numpy as np
import pytest

import palettax as px
import palettax.coreml
from palettax.leaf import is_palettized, pack

assert palettax.coreml  # imported first: it brings coremltools in without its noise

LINE = np.array([0.11, 0.19, 0.3, 0.08, 0.0, 0.02], np.float32)


def lut_of(leaf):
    return np.ravel(leaf.lut)


def small(weights, transform):
    return px.palettize(np.asarray(weights, np.float32), transform, weight_threshold=0)


def test_a_one_bit_lut():
    leaf = small([0.3, 0.3, 0.5, 0.5], px.unique())
    assert leaf.nbits == 1
    np.testing.assert_array_equal(lut_of(leaf), np.float32([0.3, 0.5]))
    assert leaf.indices.tolist() == [0, 0, 1, 1]


def test_uniform():
    leaf = small(LINE, px.uniform(2))
    np.testing.assert_allclose(lut_of(leaf), [0.0, 0.1, 0.2, 0.3], rtol=1e-6, atol=1e-9)
    assert leaf.indices.tolist() == [0b01, 0b10, 0b11, 0b01, 0b00, 0b00]
    np.testing.assert_allclose(leaf.depalettize(), [0.1, 0.2, 0.3, 0.1, 0.0, 0.0], rtol=1e-6, atol=1e-9)
    # "The indices are a byte array": 00 00 | 01 11 10 01, least significant bits first.
    assert pack(np.asarray(leaf.indices), leaf.nbits).tolist() == [0b01111001, 0b0000]


def test_the_uniform_example_has_two_bits():
    # The text says nbits=4, then "indices [0, 1, 2, 3] (2 bits)". The example holds: four entries are two bits.
    assert lut_of(small(LINE, px.uniform(2))).size == 4
    assert lut_of(small(LINE, px.uniform(4))).size == 16


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 6, 8])
def test_the_uniform_scale(nbits):
    # The text: scale = (v_max - v_min) / (1 << nbits - 1). As Python reads it, 2 bits would give steps of 0.15 and end
    # at 0.45. The example and "[v_min, ..., v_max]" hold: the entries are 2^nbits - 1 steps apart.
    lut = lut_of(small(LINE, px.uniform(nbits)))
    assert lut[0] == LINE.min()
    assert lut[-1] == LINE.max()
    np.testing.assert_allclose(np.diff(lut), (LINE.max() - LINE.min()) / ((1 << nbits) - 1), atol=6e-8)


def test_unique():
    weights = np.float32([0.1, 0.2, 0.3, 0.4])
    leaf = small(weights, px.unique(2))
    assert leaf.indices.tolist() == [0b00, 0b01, 0b10, 0b11]
    np.testing.assert_array_equal(lut_of(leaf), weights)


@pytest.mark.parametrize(("weights", "nbits"), [([0.1, 0.2, 0.3, 0.4], 1), ([0.1, 0.2, 0.3, 0.4, 0.5], 2)])
def test_unique_where_nothing_happens(weights, nbits):
    weights = np.float32(weights)
    assert small(weights, px.unique(nbits)) is weights
    found = px.report(weights, weights, weight_threshold=0)[""]
    assert found.skipped == f"left dense by the transform ({len(weights)} distinct values)"


def test_unique_above_256_is_skipped():
    assert small(np.arange(256), px.unique()).nbits == 8
    assert not is_palettized(small(np.arange(257), px.unique()))


@pytest.mark.parametrize("distinct", range(5, 9))
def test_unique_may_take_three_bits(distinct):
    # The text says {1, 2, 4, 6, 8}. "The smallest possible" holds: Core ML has 3 bits, coremltools' code tries them.
    assert small(np.arange(distinct), px.unique()).nbits == 3


TOP = np.array([0.1, 0.5, 0.3, 0.3, 0.5, 0.6, 0.7], np.float32)


def top_k(nbits, candidates):
    """The documentation's lut_function, with its two choices as arguments."""

    def lut_function(weight):
        weight = np.asarray(weight).flatten()
        k = (1 << nbits) - 1
        lut = [0.0, *np.partition(candidates(weight), -k)[-k:].tolist()]
        mapping = {v: i for i, v in enumerate(lut)}
        return lut, [mapping.get(v, 0) for v in weight.tolist()]

    return lut_function


def test_custom_top_k():
    leaf = small(TOP, px.custom(top_k(2, np.unique)))
    np.testing.assert_array_equal(lut_of(leaf), np.float32([0, 0.5, 0.6, 0.7]))
    # The text gives six indices, [0, 1, 0, 0, 2, 3], to seven weights: the second 0.5 is missing. One each holds.
    assert leaf.indices.tolist() == [0, 1, 0, 0, 1, 2, 3]


def test_custom_with_the_six_indices_of_the_text():
    with pytest.raises(ValueError, match="6 indices for 7 weights; give one each"):
        small(TOP, px.custom(lambda w: ([0, 0.5, 0.6, 0.7], [0, 1, 0, 0, 2, 3])))


def test_custom_with_the_four_bits_of_the_text():
    # nbits = 4 asks for the 15 largest of 7 weights, which np.partition refuses. The printed lut has 4 entries: 2 bits.
    with pytest.raises(ValueError, match=r"leaf '' \(7,\) float32: .*out of bounds"):
        small(TOP, px.custom(top_k(4, lambda w: w)))


def test_custom_with_the_partition_of_the_text():
    # The text finds unique_elements and partitions the weights all the same: ties then fill the lut with one value.
    # The comment above that line holds: "top k maximum unique elements".
    weights = np.array([0.5, 0.6, 0.7, 0.7, 0.7], np.float32)
    as_written, as_meant = (small(weights, px.custom(top_k(2, c))) for c in (lambda w: w, np.unique))
    np.testing.assert_array_equal(lut_of(as_written), np.float32([0, 0.7, 0.7, 0.7]))
    np.testing.assert_array_equal(as_written.depalettize(), np.float32([0, 0, 0.7, 0.7, 0.7]))
    np.testing.assert_array_equal(as_meant.depalettize(), weights)


def test_a_weight_of_200_elements_is_below_a_threshold_of_1024():
    weights = np.random.default_rng(0).standard_normal((10, 20, 1, 1)).astype(np.float32)
    assert px.palettize(weights, px.kmeans(1), weight_threshold=1024) is weights
    assert is_palettized(px.palettize(weights, px.kmeans(1), weight_threshold=199))


@pytest.mark.parametrize(
    ("axis", "lut", "indices"),
    [
        (0, [[range(8)], [range(8, 16)]], [[0, 1, 2, 3], [4, 5, 6, 7]] * 2),
        (
            1,
            [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]],
            [[0, 1, 0, 1], [2, 3, 2, 3], [4, 5, 4, 5], [6, 7, 6, 7]],
        ),
    ],
)
def test_palettizer_compression_channelwise_basic(axis, lut, indices):
    weights = np.arange(16, dtype=np.float32).reshape(4, 4)
    expected = np.array([[list(table) for table in row] for row in lut], np.float32)[..., None]
    granularity = px.Granularity(group_size=2, channel_axis=axis)
    for transform in (px.unique(granularity=granularity), px.unique(3, granularity=granularity)):
        leaf = small(weights, transform)
        np.testing.assert_array_equal(leaf.lut, expected)
        np.testing.assert_array_equal(leaf.indices, indices)
    theirs = compress(weights, "UNIQUE", 3, granularity)
    np.testing.assert_array_equal(theirs.lut, expected)
    np.testing.assert_array_equal(theirs.indices, indices)


def compress(weights, mode, nbits, granularity):
    """coremltools' own."""
    from coremltools.optimize.coreml._quantization_passes import palettize_weights

    blocks = [0] * weights.ndim
    if granularity.group_size:
        blocks[granularity.channel_axis] = granularity.group_size
    return palettize_weights.blockwise_compress(weights, mode, nbits, blocks)


GRANULARITIES = [px.Granularity(), px.Granularity(4), px.Granularity(5, channel_axis=-1)]
granularities = pytest.mark.parametrize("granularity", GRANULARITIES, ids=["tensor", "rows", "columns"])


@granularities
@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 6])
def test_uniform_is_that_of_coremltools(granularity, nbits):
    rng = np.random.default_rng(nbits)
    # Away from ties: entries of an even lut over [-1, 1], moved by less than 0.4 of a step; each group holds both ends.
    step = 2 / (2**nbits - 1)
    weights = np.clip(-1 + step * (rng.integers(0, 2**nbits, (8, 10)) + rng.uniform(-0.4, 0.4, (8, 10))), -1, 1)
    weights[::4, ::5], weights[3::4, 4::5] = -1, 1
    weights = weights.astype(np.float32)
    ours = small(weights, px.uniform(nbits, granularity=granularity))
    theirs = compress(weights, "UNIFORM", nbits, granularity)
    assert ours.lut.shape == theirs.lut.shape
    np.testing.assert_allclose(ours.lut, theirs.lut, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours.indices, theirs.indices)


@granularities
def test_unique_is_that_of_coremltools(granularity):
    weights = np.random.default_rng(0).permutation(80).astype(np.float32).reshape(8, 10) // 3
    ours, theirs = small(weights, px.unique(granularity=granularity)), compress(weights, "UNIQUE", None, granularity)
    assert ours.lut.shape == theirs.lut.shape
    np.testing.assert_array_equal(ours.indices, theirs.indices)
    np.testing.assert_array_equal(px.depalettize(ours), weights)
    # They fill up with zeros, we with the last value, so that ours stays sorted.
    k = ours.lut.shape[-2]
    for own, other in zip(np.reshape(ours.lut, (-1, k)), np.reshape(theirs.lut, (-1, k)), strict=True):
        distinct = np.unique(own).size
        np.testing.assert_array_equal(own[:distinct], other[:distinct])
        np.testing.assert_array_equal(own[distinct:], own[distinct - 1])


@granularities
def test_kmeans_is_never_worse_than_that_of_coremltools(granularity):
    weights = np.random.default_rng(0).standard_normal((8, 10)).astype(np.float32)
    ours, theirs = small(weights, px.kmeans(2, granularity=granularity)), compress(weights, "KMEANS", 2, granularity)
    expanded = px.PalettizedArray(theirs.lut.astype(np.float32), theirs.indices.astype(np.uint8), nbits=2).depalettize()
    errors = [np.sum((weights.astype(np.float64) - np.asarray(x)) ** 2) for x in (ours.depalettize(), expanded)]
    assert errors[0] <= errors[1] * (1 + 1e-9)


def test_trees_of_weights():
    tree = {"a": LINE, "b": [TOP]}
    leaves = px.palettize(tree, px.unique(), weight_threshold=0)
    assert jax.tree.map(lambda x: x.nbits, leaves, is_leaf=is_palettized) == {"a": 3, "b": [3]}
