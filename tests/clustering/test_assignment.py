from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import palettax as px

# XLA takes subnormal numbers for zero: stay clear of them, halved too.
values = st.floats(-(2.0**60), 2.0**60, width=32).map(lambda x: x if abs(x) > 2.0**-60 else 0.0)


@given(hnp.arrays(np.float32, 6, elements=values), hnp.arrays(np.float32, 5, elements=values))
def test_assign_is_exact(weights, lut):
    """Against rational arithmetic, with the midpoints themselves and their neighbours among the weights."""
    middle = (lut[:-1] / 2 + lut[1:] / 2).astype(np.float32)
    weights = np.concatenate([weights, middle, np.nextafter(middle, np.float32(np.inf)), lut])
    nearest = [
        min(range(5), key=lambda j: (abs(Fraction(float(w)) - Fraction(float(lut[j]))), lut[j])) for w in weights
    ]
    found = lut[np.asarray(px.assign(weights, lut))]
    np.testing.assert_array_equal(found, lut[nearest])


def test_ties_and_duplicates_go_to_the_lowest_index():
    lut = np.array([0.0, 1.0, 2.0, 2.0, 2.0], np.float32)
    assert px.assign(np.array([0.5, 1.5, 2.0, 9.0], np.float32), lut).tolist() == [0, 1, 2, 2]


def test_a_lut_in_any_order():
    lut = np.array([3.0, -1.0, 0.0], np.float32)
    assert px.assign(np.array([2.9, -5.0, 0.4], np.float32), lut).tolist() == [0, 1, 2]


def test_vectors():
    rng = np.random.default_rng(0)
    weights, lut = rng.standard_normal((3, 20)).astype(np.float32), rng.standard_normal((16, 4)).astype(np.float32)
    vectors = weights.reshape(3, 5, 4)
    nearest = ((vectors[:, :, None] - lut) ** 2).sum(-1).argmin(-1)
    indices = px.assign(weights, lut)
    np.testing.assert_array_equal(indices, nearest)
    np.testing.assert_array_equal(px.lookup(lut, indices), lut[nearest].reshape(3, 20))


def test_float64_keeps_its_width():
    weights = np.array([1.0, 1.0 + 1e-12, 2.0])
    lut = np.array([1.0, 1.0 + 1e-12, 2.0])
    np.testing.assert_array_equal(px.lookup(lut, px.assign(weights, lut)), weights)


def test_under_jit_and_vmap():
    rng = np.random.default_rng(0)
    weights, lut = rng.standard_normal((3, 20)).astype(np.float32), np.sort(rng.standard_normal(8).astype(np.float32))
    plain = px.assign(weights, lut)
    np.testing.assert_array_equal(jax.jit(px.assign)(weights, lut), plain)
    np.testing.assert_array_equal(jax.vmap(px.assign, (0, None))(weights, lut), plain)


def test_what_is_refused():
    with pytest.raises(ValueError, match="300 entries"):
        px.assign(np.zeros(3, np.float32), np.zeros(300, np.float32))
    with pytest.raises(ValueError, match="vector_size=2 does not divide"):
        px.assign(np.zeros(3, np.float32), np.zeros((4, 2), np.float32))


def test_midpoints_near_the_least_normal_number():
    lut = np.array([1.2e-38, 2.4e-38], np.float32)
    assert px.assign(np.array([1.5e-38, 2.2e-38], np.float32), lut).tolist() == [0, 1]
