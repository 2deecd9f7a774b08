import jax
import numpy as np
import pytest

import palettax as px
from tests.clustering.test_exact import optimum
from tests.tables import data


def test_equals_the_true_excess():
    """On data small enough to enumerate, the bound is the optimum itself."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights = np.sort(rng.standard_normal(12))
        lut = np.sort(rng.standard_normal(4))
        inertia = (np.abs(weights[:, None] - lut).min(1) ** 2).sum()
        excess = inertia / float(optimum(weights, np.ones(12), 4)) - 1
        assert px.certify(weights, lut) == pytest.approx(excess, rel=1e-9)


def test_storage_precision_is_forgiven_and_only_that():
    weights = data("normal", 3000).astype(np.float32)
    lut = np.asarray(px.kmeans_lut(weights, 2).lut)
    # In float16 the boundaries move a little, and what moves with them is charged; the rounding itself is not.
    half = lut.astype(np.float16)
    rounding = ((weights - half.astype(np.float64)[np.asarray(px.assign(weights, half))]) ** 2).sum()
    best = ((weights - lut.astype(np.float64)[np.asarray(px.assign(weights, lut))]) ** 2).sum()
    assert px.certify(weights, half) <= rounding / best - 1
    assert px.certify(weights, lut + np.float32(0.01)) > 1e-5


def test_error_where_none_is_needed():
    weights = np.array([1.0, 2.0], np.float32)
    assert px.certify(weights, np.array([1.0, 2.0], np.float32)) == 0
    assert px.certify(weights, np.array([1.0, 2.5], np.float32)) == np.inf


def test_under_jit_and_vmap():
    weights = data("normal", 200).astype(np.float32).reshape(4, 50)
    plain = [px.certify(row, px.uniform_lut(row, 2).lut) for row in weights]
    found = jax.jit(jax.vmap(lambda row: px.certify(row, px.uniform_lut(row, 2).lut)))(weights)
    np.testing.assert_allclose(found, plain, rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused():
    weights = data("normal", 20).astype(np.float32)
    for lut in (np.zeros((2, 2), np.float32), np.zeros(0, np.float32), np.arange(3)):
        with pytest.raises(ValueError, match="certify takes one row of 1 to 256 floats"):
            px.certify(weights, lut)
    with pytest.raises(ValueError, match="1 NaN"):
        px.certify(weights, np.array([np.nan, 1.0], np.float32))
