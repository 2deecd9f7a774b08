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
    ],
)
def test_groups_that_a_shape_does_not_have(granularity, shape, message):
    with pytest.raises(ValueError, match=message):
        px.Granularity(**granularity).groups(shape)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("field", ["group_size", "vector_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", True])
def test_sizes_are_positive_integers(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}; it must be a positive integer"):
        px.Granularity(**{field: value})
