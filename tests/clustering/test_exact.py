"""The exact solver against exhaustive dynamic programming in rational arithmetic, and against other solvers."""

from fractions import Fraction

import kmeans1d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

import palettax as px
from palettax.clustering.nodes import optimum
from palettax.clustering.points import ONES, distinct_count
from tests.tables import DTYPES, KINDS, data, sensitivities


def least_cost(values, mass, k):
    """The least weighted squared error of k intervals, exactly, by trying every split."""
    values, mass = [Fraction(v) for v in values], [Fraction(m) for m in mass]
    n = len(values)

    def cost(i, j):
        weight = sum(mass[i:j])
        mean = sum(m * v for m, v in zip(mass[i:j], values[i:j], strict=True)) / weight
        return sum(m * (v - mean) ** 2 for m, v in zip(mass[i:j], values[i:j], strict=True))

    links = {(i, j): cost(i, j) for i in range(n) for j in range(i + 1, n + 1)}
    best = {0: Fraction(0)}
    for _ in range(k):
        best = {j: min(best[i] + links[i, j] for i in best if i < j) for j in range(1, n + 1) if min(best) < j}
    return best[n]


floats = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)


@given(
    st.lists(st.tuples(floats, st.integers(1, 1000)), min_size=3, max_size=14, unique_by=lambda p: p[0]),
    st.integers(1, 13),
)
def test_optimal_by_exhaustion(points, k):
    points = sorted((v + 0.0, m) for v, m in points)
    k = min(k, len(points) - 1)
    values, mass = (np.array(column, np.float64) for column in zip(*points, strict=True))
    lut = np.empty(k)
    cost, bound, _ = optimum(values, mass, lut)
    best = least_cost(values, mass, k)
    close = pytest.approx(float(best), rel=1e-9, abs=1e-28 * float(mass @ values**2))
    assert cost == close
    assert bound == close
    assert (np.diff(lut) > 0).all()


@given(st.integers(4, 40), st.data())
def test_ties_are_spliced(n, draw):
    """On an even grid every penalty window is empty or tied; path lengths k are found by splicing only."""
    k = draw.draw(st.integers(1, n - 1))
    values = np.arange(n, dtype=np.float64)
    cost, bound, _ = optimum(values, ONES, np.empty(k))
    # Sizes as equal as can be are optimal: s points in a row cost s (s² - 1) / 12.
    small, larger = divmod(n, k)
    best = sum(s * (s * s - 1) / 12 for s in [small + 1] * larger + [small] * (k - larger))
    assert cost == pytest.approx(best, rel=1e-12)
    assert bound == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_certified(kind, dtype):
    for n in (1, 2, 3, 17, 257, 300, 5000):
        weights = data(kind, n).astype(dtype)
        for sensitivity in (None, sensitivities(n).astype(np.float32), np.zeros(n, np.float32)):
            for nbits in (1, 2, 4, 8):
                fit = px.kmeans_lut(weights, nbits, sensitivity=sensitivity)
                assert px.certify(weights, fit.lut, sensitivity=sensitivity) <= 1e-9
                assert bool(fit.converged)
                assert (np.diff(np.asarray(fit.lut)) >= 0).all()


@pytest.mark.parametrize("kind", ["normal", "heavy", "bimodal"])
def test_certified_at_a_million(kind):
    weights = data(kind, 1_000_000).astype(np.float32)
    for nbits in (1, 4, 8):
        assert px.certify(weights, px.kmeans_lut(weights, nbits).lut) <= 1e-9


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4, 1e30])
def test_any_scale(scale):
    weights = (data("normal", 4000) * scale).astype(np.float32)
    assert px.certify(weights, px.kmeans_lut(weights, 4).lut) <= 1e-9


def test_where_doubles_cannot_tell_costs_apart_it_is_no_worse_than_lloyd():
    weights = np.concatenate([np.ones(6000), np.random.default_rng(0).normal(size=3000) * 1e-17]).astype(np.float32)
    fit = px.kmeans_lut(weights, 2)
    assert not bool(fit.converged)
    assert float(fit.inertia) <= float(px.kmeans_lut(weights, 2, method="lloyd").inertia)


def test_same_as_kmeans1d():
    weights = data("normal", 3000).astype(np.float32)
    for k, nbits in ((2, 1), (8, 3), (64, 6)):
        _, centroids = kmeans1d.cluster(weights.astype(np.float64).tolist(), k)
        np.testing.assert_allclose(px.kmeans_lut(weights, nbits).lut, np.float32(centroids), rtol=1e-5)


def test_the_example_of_kmeans1d():
    """Its own test, by hand: four clusters, each at its mean; and weights that count as repetitions do."""
    x = np.float32([4.0, 4.1, 4.2, -50, 200.2, 200.4, 200.9, 80, 100, 102])
    fit = px.kmeans_lut(x, 2)
    np.testing.assert_allclose(fit.lut, [-50, 4.1, 94, 200.5], rtol=1e-6)
    assert np.asarray(fit.indices).tolist() == [1, 1, 1, 0, 3, 3, 3, 2, 2, 2]
    counts = np.arange(1, 11)
    weighted = px.kmeans_lut(x, 2, sensitivity=counts.astype(np.float32))
    repeated = px.kmeans_lut(np.repeat(x, counts), 2)
    np.testing.assert_allclose(weighted.lut, repeated.lut, rtol=1e-6)
    np.testing.assert_array_equal(np.repeat(weighted.indices, counts), repeated.indices)


@pytest.mark.parametrize("kind", ["normal", "heavy", "bimodal"])
def test_nothing_beats_it(kind):
    weights = data(kind, 3000).astype(np.float32)
    best = px.kmeans_lut(weights, 3)

    def inertia(lut):
        lut = np.asarray(lut, np.float64)
        return float(((weights - lut[np.asarray(px.assign(weights, lut.astype(np.float32)))]) ** 2).sum())

    rivals = [px.kmeans_lut(weights, 3, method="lloyd").lut, px.uniform_lut(weights, 3).lut]
    rivals += [
        np.sort(KMeans(8, n_init=3, random_state=s).fit(weights[:, None]).cluster_centers_[:, 0]) for s in (0, 1)
    ]
    rng = np.random.default_rng(0)
    spread = np.diff(np.asarray(best.lut)).min()
    rivals += [np.asarray(best.lut) + rng.normal(0, spread * 10.0**-p, 8) for p in range(1, 6)]
    assert all(inertia(best.lut) <= inertia(lut) * (1 + 1e-7) for lut in rivals)


@pytest.mark.parametrize("n", [4_000_000, 10_000_000])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_many_half_precision_weights_of_few_values(n, dtype):
    values = np.linspace(-1, 1, 16).astype(DTYPES[dtype])
    weights = values[np.random.default_rng(0).integers(0, 16, n)]
    assert distinct_count(weights) == 16
    fit = px.kmeans_lut(weights, 4)
    np.testing.assert_array_equal(fit.lut, values.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(fit.lut)[np.asarray(fit.indices)], weights)


@pytest.mark.parametrize("n", [4_000_000, 10_000_000])
def test_many_half_precision_weights_of_many_values(n):
    bits = np.random.default_rng(0).permutation(np.arange(0x7C00, dtype=np.uint16))[:30_000]
    weights = np.resize(bits, n).view(np.float16)
    assert distinct_count(weights) == 30_000
    fit = px.kmeans_lut(weights, 8)
    assert px.certify(weights, fit.lut) <= 1e-9
    values, counts = bits.view(np.float16), np.bincount(np.arange(n) % 30_000)
    counted = px.kmeans_lut(values, 8, sensitivity=counts.astype(np.float32))
    np.testing.assert_array_equal(counted.lut, fit.lut)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.3, 7.0, 1e4])
@pytest.mark.parametrize("nbits", [1, 4, 8])
def test_the_lut_scales_with_the_weights(scale, nbits):
    weights = data("normal", 4000).astype(np.float32)
    scaled = weights * np.float32(scale)
    small, plain = px.kmeans_lut(scaled, nbits), px.kmeans_lut(weights, nbits)
    np.testing.assert_allclose(np.asarray(small.lut) / np.float32(scale), plain.lut, rtol=1e-6, atol=1e-9)
    assert float(small.inertia) / scale**2 == pytest.approx(float(plain.inertia), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_optimal_where_nodes_stand_for_many_points(kind):
    """Enough points that the solver starts from a part of them, few enough for dynamic programming over all."""
    weights = np.sort(data(kind, 1500))
    for mass in (None, sensitivities(1500)):
        w, m = (weights, np.ones(1500)) if mass is None else (weights[mass > 0], mass[mass > 0])
        origin = w[w.size // 2]
        best = layered(w - origin, m, 12)
        for k in (1, 2, 3, 7, 12):
            found = px.kmeans_curve(weights, [k], sensitivity=mass)[0]
            assert found == pytest.approx(best[k - 1], rel=1e-6, abs=1e-9 * float(m @ (w - origin) ** 2))


def layered(values, mass, most):
    """The least cost of 1..most intervals: a layer per interval, every split tried, in doubles."""
    sums = [np.concatenate([[0], np.cumsum(mass * values**p)]) for p in range(3)]
    weight, first, second = (s[None, :] - s[:, None] for s in sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        cost = np.where(weight > 0, np.maximum(second - first**2 / weight, 0), np.inf)
    best, found = np.where(np.arange(values.size + 1) == 0, 0, np.inf), []
    for _ in range(most):
        best = np.minimum(np.min(best[:, None] + cost, axis=0), best)
        found.append(best[-1])
    return found


@settings(max_examples=30)
@given(st.lists(floats, min_size=2, max_size=30), st.lists(st.integers(1, 4), min_size=30, max_size=30))
def test_integer_sensitivity_is_repetition(values, counts):
    weights, counts = np.array(values, np.float32), np.array(counts[: len(values)])
    weighted = px.kmeans_lut(weights, 2, sensitivity=counts.astype(np.float32))
    repeated = px.kmeans_lut(np.repeat(weights, counts), 2)
    assert float(weighted.inertia) == pytest.approx(float(repeated.inertia), rel=1e-5, abs=1e-9)


def test_zero_sensitivity_leaves_a_weight_out():
    weights, noise = data("normal", 500).astype(np.float32), data("heavy", 500, 3).astype(np.float32)
    sensitivity = np.concatenate([np.ones(500, np.float32), np.zeros(500, np.float32)])
    both = px.kmeans_lut(np.concatenate([weights, noise]), 3, sensitivity=sensitivity)
    np.testing.assert_array_equal(both.lut, px.kmeans_lut(weights, 3).lut)
