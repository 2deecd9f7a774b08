"""`kmeans_curve` against the fits it stands for, and what it refuses."""

import jax
import numpy as np
import pytest

import palettax as px
from tests.tables import DTYPES, KINDS, data, sensitivities


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_inertia_of_the_best_table_of_each_size(kind, dtype):
    weights = data(kind, 3000).astype(DTYPES[dtype]).reshape(30, 100)
    for sensitivity in (None, sensitivities(3000).astype(np.float32).reshape(30, 100)):
        curve = px.kmeans_curve(weights, [2, 4, 8, 16, 64, 256], sensitivity=sensitivity)
        fits = [px.kmeans_lut(weights, nbits, sensitivity=sensitivity) for nbits in (1, 2, 3, 4, 6, 8)]
        energy = float(np.square(weights, dtype=np.float64).sum())
        # A float32 table is off by its last bit.
        np.testing.assert_allclose(curve, [float(fit.inertia) for fit in fits], rtol=1e-3, atol=1e-13 * energy)


def test_convex_and_falling_to_nothing():
    weights = data("grid", 500)
    curve = px.kmeans_curve(weights, range(1, 45))
    assert curve.dtype == np.float64
    slack = 1e-12 * curve[0]
    assert (np.diff(curve) <= slack).all()
    assert (np.diff(curve, 2) >= -slack).all()
    distinct = np.unique(weights).size
    assert curve[distinct - 2] > 0
    assert not curve[distinct - 1 :].any()


def test_any_order_and_repetition():
    weights = data("normal", 300)
    np.testing.assert_array_equal(px.kmeans_curve(weights, [7, 3, 7]), px.kmeans_curve(weights, [3, 7])[[1, 0, 1]])


def test_under_jit_and_vmap():
    weights = data("normal", 120).astype(np.float32).reshape(3, 40)
    found = jax.jit(jax.vmap(lambda row: px.kmeans_curve(row, (2, 5))))(weights)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [px.kmeans_curve(row, (2, 5)) for row in weights], rtol=1e-6)
    unknown = jax.jit(lambda row: px.kmeans_curve(row, (2, 5)))(np.float32([1, np.nan, 3]))
    assert np.isnan(unknown).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("ks", [[], [0], [2, -1], [2.0], 3, "ab", [[1]]])
def test_numbers_of_entries_that_cannot_be(ks):
    with pytest.raises(ValueError, match="give a list of positive integers"):
        px.kmeans_curve(np.ones(3, np.float32), ks)


def test_beyond_the_range_of_squares():
    assert px.kmeans_curve(np.array([1e200, 2e200, 3e200]), [2, 3, 10**9]).tolist() == [np.inf, 0, 0]
