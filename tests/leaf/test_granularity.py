"""Cutting a weight into groups and joining them again."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import palettax as px
from palettax.leaf import merge_blocks, split_blocks

cuts = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=4)
"""(groups, length of a group) per axis."""


@given(cuts=cuts)
def test_rows_are_the_blocks_that_slices_give_and_merge_is_the_inverse(cuts):
    groups = tuple(g for g, _ in cuts)
    shape = tuple(g * size for g, size in cuts)
    weights = np.arange(math.prod(shape)).reshape(shape)
    rows = split_blocks(weights, groups)
    places = list(itertools.product(*(range(g) for g in groups)))
    assert rows.shape == (len(places), weights.size // len(places))
    for row, place in zip(rows, places, strict=True):
        block = weights[tuple(slice(i * n, (i + 1) * n) for i, (_, n) in zip(place, cuts, strict=True))]
        np.testing.assert_array_equal(row, np.reshape(block, -1))
    np.testing.assert_array_equal(merge_blocks(rows, groups, shape), weights)


def test_on_tracers_and_jax_arrays():
    weights = jnp.arange(24.0).reshape(4, 6)
    rows = jax.jit(lambda w: split_blocks(w, (2, 3)))(weights)
    np.testing.assert_array_equal(rows, split_blocks(np.asarray(weights), (2, 3)))
    np.testing.assert_array_equal(merge_blocks(rows, (2, 3), (4, 6)), weights)


def vectors_of(weights, groups, axis, size):
    """The vectors, block by block and in each block in the order of an index array, by slicing alone."""
    places = [n // size if a == axis else n for a, n in enumerate(weights.shape)]
    inner = [n // g for n, g in zip(places, groups, strict=True)]
    for block in np.ndindex(*groups):
        for place in np.ndindex(*inner):
            start = [b * n + i for b, n, i in zip(block, inner, place, strict=True)]
            at = tuple(slice(i * size, (i + 1) * size) if a == axis else i for a, i in enumerate(start))
            yield weights[at]


@given(cuts=cuts.filter(len), data=st.data(), size=st.integers(1, 3))
def test_vectors_are_split_in_the_order_of_the_indices_and_merge_is_the_inverse(cuts, data, size):
    axis, groups = data.draw(st.integers(0, len(cuts) - 1)), tuple(g for g, _ in cuts)
    places = tuple(g * n for g, n in cuts)
    shape = tuple(n * size if a == axis else n for a, n in enumerate(places))
    weights = np.arange(math.prod(shape)).reshape(shape)
    rows = split_blocks(weights, groups, axis, size)
    assert rows.shape == (math.prod(groups), math.prod(n for _, n in cuts), size)
    np.testing.assert_array_equal(rows.reshape(-1, size), list(vectors_of(weights, groups, axis, size)))
    np.testing.assert_array_equal(merge_blocks(rows, groups, shape, axis), weights)
    # The numbers of the vectors, merged as indices are, name the vectors that lie in their places.
    indices = merge_blocks(np.arange(rows.size // size).reshape(rows.shape[:2]), groups, places)
    small = rows.reshape(-1, size)[indices]
    np.testing.assert_array_equal(np.moveaxis(small, -1, axis + 1).reshape(shape), weights)
    on_device = jax.jit(lambda w: split_blocks(w, groups, axis, size))(jnp.asarray(weights))
    np.testing.assert_array_equal(on_device, rows)
    np.testing.assert_array_equal(jax.jit(lambda r: merge_blocks(r, groups, shape, axis))(on_device), weights)


def test_a_negative_vector_axis_counts_from_the_end():
    weights = np.arange(24).reshape(2, 4, 3)
    rows = split_blocks(weights, (1, 2, 1), -2, 2)
    np.testing.assert_array_equal(rows, split_blocks(weights, (1, 2, 1), 1, 2))
    np.testing.assert_array_equal(merge_blocks(rows, (1, 2, 1), (2, 4, 3), -2), weights)


def test_a_vector_needs_an_axis():
    with pytest.raises(ValueError, match="vector_size=2 without vector_axis"):
        split_blocks(np.zeros((4, 4)), (1, 1), None, 2)


def test_groups_are_for_each_axis():
    with pytest.raises(ValueError, match="zip"):
        split_blocks(np.zeros((4, 4)), (2,))


@pytest.mark.parametrize(
    ("granularity", "shape", "groups"),
    [
        ({}, (64, 48), (1, 1)),
        ({}, (), ()),
        ({"group_size": 16}, (64, 48), (4, 1)),
        ({"group_size": 16, "channel_axis": -1}, (64, 48), (1, 3)),
        ({"group_size": 3, "channel_axis": 2}, (2, 5, 9, 4), (1, 1, 3, 1)),
        ({"group_size": 64}, (64, 48), (1, 1)),
        ({"group_size": 1}, (5,), (5,)),
        ({"group_size": (16, 8), "channel_axis": (0, 1)}, (64, 48), (4, 6)),
        ({"group_size": (3, 2), "channel_axis": (-1, 0)}, (4, 5, 9), (2, 1, 3)),
        ({"group_size": 4, "vector_size": 2}, (8, 6), (2, 1)),
        ({"group_size": 3, "vector_size": 2, "vector_axis": 1}, (9, 6), (3, 1)),
        ({"group_size": (2, 4), "channel_axis": (0, 1), "vector_size": 4, "vector_axis": -1}, (6, 8), (3, 2)),
        ({"vector_size": 3, "vector_axis": -1}, (5, 6), (1, 1)),
    ],
)
def test_groups(granularity, shape, groups):
    assert px.Granularity(**granularity).groups(shape) == groups


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        # Two divisors on either side, fewer at the ends.
        ({"group_size": 5}, (36, 8), r"5 does not divide the 36 channels on axis 0 of \(36, 8\); .*: 3, 4, 6, 9$"),
        ({"group_size": 100}, (36, 8), "that do: 18, 36$"),
        ({"group_size": 5, "channel_axis": -1}, (36, 8), "the 8 channels on axis 1 .*: 2, 4, 8$"),
        ({"group_size": 2}, (7,), "that do: 1, 7$"),
        ({"group_size": 2, "channel_axis": 2}, (4, 4), r"channel_axis=2 is not an axis of shape \(4, 4\)"),
        ({"group_size": 2, "channel_axis": -3}, (4, 4), "channel_axis=-3 is not an axis"),
        ({"group_size": 2}, (), "channel_axis=0 is not an axis"),
        (
            {"group_size": (2, 3), "channel_axis": (0, 1)},
            (4, 4),
            "group_size=3 does not divide the 4 channels on axis 1",
        ),
        (
            {"group_size": (2, 2), "channel_axis": (0, -2)},
            (4, 4),
            r"channel_axis=\(0, -2\) names an axis of \(4, 4\) twice",
        ),
        ({"vector_size": 4}, (6, 8), r"vector_size=4 does not divide the 6 weights on axis 0 .*that do: 2, 3, 6$"),
        ({"vector_size": 2, "vector_axis": 2}, (6, 8), r"vector_axis=2 is not an axis of shape \(6, 8\)"),
        (
            {"group_size": 6, "vector_size": 4},
            (12, 8),
            r"vectors of 4 would straddle the groups of 6 on axis 0 of \(12, 8\); .*whole ones: 4, 12$",
        ),
        ({"group_size": 3, "vector_size": 2, "vector_axis": 0}, (6, 8), "whole ones: 2, 6$"),
    ],
)
def test_groups_that_a_shape_does_not_have(granularity, shape, message):
    with pytest.raises(ValueError, match=message):
        px.Granularity(**granularity).groups(shape)


@pytest.mark.parametrize(
    ("name", "shape", "options", "groups", "vector_axis"),
    [
        ("", (64, 48), {}, (4, 1), 0),
        ("conv.weight", (32, 7, 3, 3), {}, (2, 1, 1, 1), 0),
        ("embedding", (32, 7), {}, (2, 1), 0),
        ("dense/kernel", (64, 48), {}, (1, 3), 1),
        ("layers.0.kernel", (3, 3, 7, 32), {}, (1, 1, 1, 2), 3),
        ("kernel", (32,), {}, (2,), 0),
        # Sixteen fits the inputs alone.
        ("conv.weight", (10, 32, 3, 3), {}, (1, 2, 1, 1), 1),
        ("dense/kernel", (64, 10), {}, (4, 1), 0),
        # Named after, not by, a kernel.
        ("kernel/weight", (64, 48), {}, (4, 1), 0),
        ("my_kernel", (64, 48), {}, (4, 1), 0),
        ("weight", (36, 24), {"group_size": 12, "vector_size": 4}, (3, 1), 0),
        ("weight", (9, 12), {"group_size": None, "vector_size": 4}, (1, 1), 1),
        ("kernel", (12, 9), {"group_size": None, "vector_size": 4}, (1, 1), 0),
        ("weight", (12, 8), {"group_size": 6, "vector_size": 4, "vector_axis": 1}, (2, 1), 1),
    ],
)
def test_channels_chosen_by_the_name(name, shape, options, groups, vector_axis):
    options = {"group_size": 16, "channel_axis": None, "vector_size": 2} | options
    assert px.Granularity(**options).groups(shape, name) == groups
    assert px.Granularity(**options).vector_axis_of(shape, name) == vector_axis
    assert px.Granularity(**options | {"vector_size": 1}).vector_axis_of(shape, name) is None


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        (
            "weight",
            (36, 8),
            {"group_size": 5},
            r"group_size=5 does not divide the 36 output channels on axis 0 \(3, 4, 6, 9 would\) or the 8 input "
            r"channels on axis 1 \(2, 4, 8 would\) of \(36, 8\); use one of those sizes",
        ),
        ("kernel", (3, 3, 8, 36), {"group_size": 5}, "36 output channels on axis 3 .* 8 input channels on axis 2"),
        ("kernel", (7,), {"group_size": 5}, r"the 7 output channels on axis 0 \(1, 7 would\) of \(7,\)"),
        # Groups of six fit the outputs; vectors of four do not fit those.
        (
            "",
            (36, 32),
            {"group_size": 6, "vector_size": 4},
            r"group_size=6, in vectors of 4, .* axis 0 \(4, 12, 36 would",
        ),
        ("", (9, 9), {"vector_size": 4}, "vector_size=4 does not divide the 9 output .* the 9 input"),
        ("", (), {"group_size": 5}, r"channel_axis=None: shape \(\) has no channels"),
    ],
)
def test_channels_that_no_axis_offers(name, shape, options, message):
    with pytest.raises(ValueError, match=message):
        px.Granularity(**{"channel_axis": None} | options).groups(shape, name)


@given(cuts=cuts.filter(len), data=st.data(), size=st.integers(1, 3))
def test_groups_are_what_split_blocks_takes(cuts, data, size):
    axis = data.draw(st.integers(0, len(cuts) - 1))
    shape = tuple(g * n * (size if a == axis else 1) for a, (g, n) in enumerate(cuts))
    sizes = tuple(length // g for length, (g, _) in zip(shape, cuts, strict=True))
    granularity = px.Granularity(sizes, tuple(range(len(cuts))), size, axis)
    groups = granularity.groups(shape)
    assert groups == tuple(g for g, _ in cuts)
    rows = split_blocks(np.zeros(shape), groups, granularity.vector_axis_of(shape), size)
    assert rows.shape[0] == math.prod(groups)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("field", ["group_size", "vector_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", True])
def test_sizes_are_positive_integers(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}; it must be a positive integer"):
        px.Granularity(**{field: value})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group_size": (4, 0), "channel_axis": (0, 1)},
            r"group_size=\(4, 0\); it must be a positive integer, a tuple",
        ),
        (
            {"group_size": [4, 4], "channel_axis": (0, 1)},
            r"group_size=\[4, 4\]; it must be a positive integer, a tuple",
        ),
        ({"channel_axis": 1.0}, "channel_axis=1.0; it must be the number of an axis, a tuple of them, or None"),
        ({"group_size": (4, 4), "channel_axis": (0, True)}, r"channel_axis=\(0, True\); it must be"),
        ({"vector_axis": "0"}, "vector_axis='0'; it must be the number of an axis, or None"),
        ({"vector_axis": (0, 1)}, r"vector_axis=\(0, 1\); it must be the number of an axis"),
        ({"vector_size": None}, "vector_size=None; it must be a positive integer"),
        ({"group_size": (4, 4)}, r"group_size=\(4, 4\) with channel_axis=0; give one size per axis"),
        ({"group_size": (4, 4), "channel_axis": None}, "with channel_axis=None; give one size per axis"),
        ({"group_size": (4,), "channel_axis": (0, 1)}, r"group_size=\(4,\) with channel_axis=\(0, 1\); give one"),
        ({"group_size": 4, "channel_axis": (0, 1)}, "group_size=4 with .* give one size per axis"),
        ({"channel_axis": (0, 1)}, "group_size=None with .* give one size per axis"),
        ({"group_size": (), "channel_axis": ()}, "give one size per axis"),
        ({"group_size": (4, 4), "channel_axis": (1, 1)}, r"channel_axis=\(1, 1\) names an axis twice"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        px.Granularity(**options)


@pytest.mark.usefixtures("unchecked")
def test_numpy_integers_will_do():
    assert px.Granularity(np.int64(4), np.int32(-1)).groups((3, 8)) == (1, 2)
