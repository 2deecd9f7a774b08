from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import palettax as px
from tests.clustering.test_exact import least_cost
from tests.tables import data


def test_equals_the_true_excess():
    """On data small enough to enumerate, the bound is the optimum itself."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights = np.sort(rng.standard_normal(12))
        lut = np.sort(rng.standard_normal(4))
        inertia = (np.abs(weights[:, None] - lut).min(1) ** 2).sum()
        excess = inertia / float(least_cost(weights, np.ones(12), 4)) - 1
        assert px.certify(weights, lut) == pytest.approx(excess, rel=1e-9)


def test_the_last_bit_is_forgiven_and_only_that():
    weights = data("normal", 3000).astype(np.float32)
    lut = np.asarray(px.kmeans_lut(weights, 2).lut)
    assert px.certify(weights, lut) <= 1e-9
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


@pytest.mark.parametrize("spread", [0, 4, 8, 12])
def test_never_below_the_true_excess(spread):
    """However wildly the sensitivities differ: where doubles cannot tell, the bound gives way, not the truth."""
    rng = np.random.default_rng(spread)
    for _ in range(15):
        n, nbits = int(rng.integers(5, 13)), int(rng.choice([1, 2]))
        weights = np.sort(
            rng.choice([rng.standard_normal(n), np.arange(float(n)), 1e3 + 1e-3 * rng.standard_normal(n)])
        )
        mass = np.exp(spread * rng.standard_normal(n))
        fit = px.kmeans_lut(weights, nbits, sensitivity=mass)
        means = np.asarray(fit.lut)
        inertia = mass @ (weights - means[np.asarray(fit.indices)]) ** 2
        excess = inertia / float(least_cost(weights, mass, 2**nbits)) - 1
        proven = px.certify(weights, fit.lut, sensitivity=mass)
        assert proven >= excess - 1e-9
        assert proven <= 1e-9 or not fit.converged


def test_the_lut_of_16_bits_pays_for_its_rounding():
    weights = np.concatenate([data("normal", 500) * 0.01 + 1003, data("normal", 500, 1) * 0.01 + 2006]).astype(
        np.float32
    )
    lut = px.kmeans_lut(weights, 1).lut.astype(jnp.bfloat16)
    assert px.certify(weights, lut) == px.certify(weights, lut.astype(np.float32)) > 1


def test_any_magnitude():
    for scale in (1e-170, 1e-30, 1e170, 1e307):
        weights = data("normal", 300) * scale
        fit = px.kmeans_lut(weights, 4)
        assert px.certify(weights, fit.lut) <= 1e-9
        assert bool(fit.converged)


@pytest.mark.parametrize("seed", range(60))
def test_never_below_the_true_excess_of_a_clump_beside_heavy_values(seed):
    """Squared errors far below what double-doubles resolve: no proof may be claimed that does not hold."""
    rng = np.random.default_rng(seed)
    clump = rng.integers(-9, 10, 4) * 10.0 ** rng.integers(-14, -8)
    weights = np.unique(np.concatenate([clump, rng.integers(-3000, 3000, 2)])).astype(np.float64)
    mass = 10.0 ** rng.integers(-8, 9, weights.size)
    for nbits in (1, 2):
        if weights.size <= 2**nbits:
            continue
        fit = px.kmeans_lut(weights, nbits, sensitivity=mass)
        excess = float(partition_cost(weights, mass, np.asarray(fit.indices)) / least_cost(weights, mass, 2**nbits)) - 1
        if excess > 1e-9:
            assert not bool(fit.converged)
            assert px.certify(weights, fit.lut, sensitivity=mass) >= excess * (1 - 1e-6)


def partition_cost(values, mass, indices):
    """The least squared error that any table has with these indices, exactly."""
    total = Fraction(0)
    for index in set(indices.tolist()):
        v, m = ([Fraction(x) for x in column[indices == index]] for column in (values, mass))
        mean = sum(a * b for a, b in zip(v, m, strict=True)) / sum(m)
        total += sum(b * (a - mean) ** 2 for a, b in zip(v, m, strict=True))
    return total
