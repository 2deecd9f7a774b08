"""What `kmeans_vectors` promises."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from palettax.clustering.vectors import fit_group, kmeans_vectors
from tests.tables import DTYPES, KINDS, data, sensitivities

KEY = jax.random.key(0)
FEW, MANY = (2, 300, 2), (1, 20000, 2)
"""Shapes that tests share: every shape, and every number of entries, is compiled anew."""


def vectors_of(kind, groups, m, d, seed=0):
    return data(kind, groups * m * d, seed).astype(np.float32).reshape(groups, m, d)


def weights_of(groups, m, d, seed=1):
    return sensitivities(groups * m * d, seed).astype(np.float32).reshape(groups, m, d)


def errors_to(vectors, lut, sensitivity=None):
    """(m, k) in float64: the weighted error of every vector at every entry of one group."""
    squares = (np.asarray(vectors, np.float64)[:, None] - np.asarray(lut, np.float64)) ** 2
    return (squares if sensitivity is None else squares * sensitivity[:, None]).sum(-1)


def inertia_of(vectors, fit, sensitivity=None, group=0):
    errors = errors_to(vectors[group], fit.lut[group], None if sensitivity is None else sensitivity[group])
    return np.take_along_axis(errors, np.asarray(fit.indices[group], int)[:, None], 1).sum()


def least_inertia(vectors, k, sensitivity):
    """The optimum over all partitions of one small group."""
    points, mass = np.asarray(vectors, np.float64), np.asarray(sensitivity, np.float64)
    best = np.inf
    for cells in itertools.product(range(k), repeat=len(points)):
        cost = 0.0
        for cell in set(cells):
            x, w = points[np.equal(cells, cell)], mass[np.equal(cells, cell)]
            mean = (w * x).sum(0) / np.where(w.sum(0) > 0, w.sum(0), 1)
            cost += (w * (x - mean) ** 2).sum()
        best = min(best, cost)
    return best


@pytest.mark.parametrize("weights", ["none", "even", "skewed"])
def test_the_optimum_of_few_vectors_is_found_and_never_beaten(weights):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((20, 6, 2)).astype(np.float32)
    vectors[10:] = np.round(vectors[10:] * 2)
    mass = {
        "none": np.ones_like(vectors),
        "even": rng.uniform(0.5, 2, vectors.shape).astype(np.float32),
        "skewed": weights_of(20, 6, 2),
    }[weights]
    fit = kmeans_vectors(vectors, 3, None if weights == "none" else mass, KEY, restarts=100, tol=0.0)
    best = np.array([least_inertia(x, 3, w) for x, w in zip(vectors, mass, strict=True)])
    size = 1e-6 * (mass * vectors**2).sum((1, 2))
    assert (fit.inertia >= best * (1 - 1e-4) - size).all()
    # Where single coordinates hardly count, no start drawn from the vectors need lead to the optimum.
    if weights != "skewed":
        assert (fit.inertia <= best * (1 + 1e-4) + size).all()


def test_integer_sensitivity_repeats_vectors():
    rng = np.random.default_rng(0)
    vectors, times = rng.standard_normal((1, 7, 2)).astype(np.float32), rng.integers(1, 4, 7)
    weighted = kmeans_vectors(vectors, 3, np.broadcast_to(times[None, :, None], (1, 7, 2)).astype(np.float32), KEY)
    repeated = kmeans_vectors(vectors.repeat(times, axis=1), 3, None, KEY)
    np.testing.assert_allclose(weighted.inertia, repeated.inertia, rtol=1e-5)
    np.testing.assert_allclose(weighted.lut, repeated.lut, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.repeat(weighted.indices, times, axis=1), repeated.indices)


@pytest.mark.parametrize(("m", "d", "k"), [(3000, 2, 16), (20000, 4, 8)])
def test_no_worse_than_scikit_learn(m, d, k):
    vectors = vectors_of("normal", 1, m, d)
    fit = kmeans_vectors(vectors, k, None, KEY)
    assert bool(fit.converged[0])
    assert float(fit.inertia[0]) <= 1.01 * KMeans(k, n_init=10, random_state=0).fit(vectors[0]).inertia_


def test_few_heavy_vectors_of_many_are_not_missed():
    vectors = vectors_of("normal", *MANY)
    vectors[0, [5, 900]] += [[3e4, 0], [0, -3e4]]
    fit = kmeans_vectors(vectors, 16, None, KEY)
    plain = KMeans(16, n_init=10, random_state=0).fit(vectors[0])
    assert float(fit.inertia[0]) <= 1.01 * plain.inertia_


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_indices_are_nearest_and_inertia_is_theirs(kind, weighted):
    vectors = vectors_of(kind, *FEW)
    sensitivity = weights_of(*FEW) if weighted else None
    fit = kmeans_vectors(vectors, 8, sensitivity, KEY)
    for g in range(2):
        mass = None if sensitivity is None else sensitivity[g]
        errors = errors_to(vectors[g], fit.lut[g], mass)
        chosen = errors[np.arange(300), fit.indices[g]]
        size = 1e-10 * (np.ones_like(vectors[g]) if mass is None else mass).max() * np.abs(vectors[g]).max() ** 2
        np.testing.assert_allclose(chosen, errors.min(1), rtol=1e-4, atol=size)
        assert float(fit.inertia[g]) == pytest.approx(inertia_of(vectors, fit, sensitivity, g), rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("kind", ["normal", "grid", "constant", "heavy"])
def test_rows_are_in_lexicographic_order_and_the_lowest_of_equals_is_used(kind):
    fit = kmeans_vectors(vectors_of(kind, 2, 200, 3), 16, None, KEY)
    for lut, indices in zip(np.asarray(fit.lut), np.asarray(fit.indices), strict=True):
        rows = [tuple(row) for row in lut]
        assert rows == sorted(rows)
        assert [rows.index(rows[i]) for i in indices] == indices.tolist()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("m", [40, 3000, 20000])
def test_few_distinct_vectors_come_back_bit_for_bit(m, weighted):
    rng = np.random.default_rng(0)
    rows = np.array([[0.1, -2.5], [0.1, 7.0], [1e-3, 0.1], [-3.3, 0.7]], np.float32)
    of = rng.integers(0, 3, m)
    of[m // 2] = 3  # too rare for a sample to hold
    vectors = rows[of][None]
    sensitivity = weights_of(1, m, 2) if weighted else None
    for k in (4, 16) if m == 40 else (16,):
        fit = kmeans_vectors(vectors, k, sensitivity, KEY)
        np.testing.assert_array_equal(np.asarray(fit.lut[0])[np.asarray(fit.indices[0])], vectors[0])
        np.testing.assert_array_equal(fit.lut[0, 4:], np.broadcast_to(rows[1], (k - 4, 2)))
        assert float(fit.inertia[0]) == 0
        assert bool(fit.converged[0])


def test_more_entries_than_vectors():
    vectors = vectors_of("normal", 1, 3, 2)
    fit = kmeans_vectors(vectors, 256, None, KEY)
    np.testing.assert_array_equal(np.asarray(fit.lut[0])[np.asarray(fit.indices[0])], vectors[0])


def test_no_entry_is_left_unused_while_there_is_error():
    # Twenty far points and a crowd of equal ones: a start drawn from the crowd leaves cells empty.
    vectors = np.zeros((1, 3000, 2), np.float32)
    vectors[0, :20] = 50 + vectors_of("normal", 1, 20, 2)[0]
    fit = kmeans_vectors(vectors, 16, None, KEY)
    assert len(np.unique(fit.indices)) == 16
    assert float(fit.inertia[0]) > 0


def test_a_coordinate_without_weight_is_free():
    vectors = vectors_of("normal", *FEW)
    sensitivity = np.ones_like(vectors)
    sensitivity[..., 1] = 0
    both = kmeans_vectors(vectors, 4, sensitivity, KEY)
    first = kmeans_vectors(vectors[..., :1], 4, None, KEY)
    np.testing.assert_allclose(both.inertia, first.inertia, rtol=1e-4)
    assert np.isfinite(both.lut).all()


def test_no_sensitivity_anywhere_in_a_group_counts_as_one():
    vectors = vectors_of("normal", *FEW)
    sensitivity = np.stack([np.zeros((300, 2), np.float32), np.full((300, 2), 2, np.float32)])
    zero, plain = kmeans_vectors(vectors, 4, sensitivity, KEY), kmeans_vectors(vectors, 4, None, KEY)
    np.testing.assert_allclose(zero.inertia, plain.inertia * np.array([1, 2]), rtol=1e-5)
    np.testing.assert_allclose(zero.lut, plain.lut, rtol=1e-5)


def test_vectors_without_sensitivity_go_to_the_plainly_nearest_entry():
    vectors, sensitivity = vectors_of("normal", *FEW), np.ones(FEW, np.float32)
    sensitivity[:, ::3] = 0
    fit = kmeans_vectors(vectors, 8, sensitivity, KEY)
    for group, lut, indices in zip(vectors, fit.lut, fit.indices, strict=True):
        np.testing.assert_array_equal(indices, errors_to(group, lut).argmin(1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_group_that_is_not_finite_is_flagged_alone(bad):
    vectors = vectors_of("normal", 3, 100, 2)
    plain = kmeans_vectors(vectors, 4, None, KEY)
    vectors[1, 50, 1] = bad
    fit = kmeans_vectors(vectors, 4, None, KEY)
    assert fit.converged.tolist() == [True, False, True]
    assert np.isnan(fit.lut[1]).all()
    for a, b in zip(fit, plain, strict=True):
        np.testing.assert_array_equal(a[::2], b[::2])


def test_a_sensitivity_that_is_no_mass_is_flagged():
    sensitivity = np.ones(FEW, np.float32)
    sensitivity[1, 3] = -1
    assert kmeans_vectors(vectors_of("normal", *FEW), 4, sensitivity, KEY).converged.tolist() == [True, False]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("power", [-60, -20, 13])
def test_scaling_by_powers_of_two_scales_the_lut_exactly(power, weighted):
    vectors = vectors_of("normal", *FEW)
    sensitivity = weights_of(*FEW) if weighted else None
    plain = kmeans_vectors(vectors, 8, sensitivity, KEY)
    factor = np.float32(2.0**power)
    scaled = kmeans_vectors(vectors * factor, 8, sensitivity, KEY)
    np.testing.assert_array_equal(scaled.lut, plain.lut * factor)
    np.testing.assert_array_equal(scaled.indices, plain.indices)
    if weighted:
        np.testing.assert_array_equal(kmeans_vectors(vectors, 8, sensitivity * factor, KEY).lut, plain.lut)


@pytest.mark.parametrize(("groups", "m"), [(5, 100), (7, 9000), (2, 40000)])
def test_groups_are_a_loop_over_groups(groups, m):
    vectors, sensitivity = vectors_of("normal", groups, m, 2), weights_of(groups, m, 2)
    fit = kmeans_vectors(vectors, 4, sensitivity, KEY, restarts=2, max_steps=5)
    alone = jax.jit(lambda v, s, key: fit_group(v, s, key, k=4, tol=2e-5, max_steps=5, restarts=2))
    for g, key in enumerate(jax.random.split(KEY, groups)):
        single = alone(jnp.asarray(vectors[g]), jnp.asarray(sensitivity[g]), key)
        np.testing.assert_allclose(fit.lut[g], single.lut, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(fit.inertia[g], single.inertia, rtol=1e-5)
        assert np.mean(np.asarray(fit.indices[g]) != np.asarray(single.indices)) < 1e-3


def test_a_key_determines_the_fit():
    vectors = vectors_of("normal", *MANY)
    a, b, c = (kmeans_vectors(vectors, 16, None, jax.random.key(seed), max_steps=3) for seed in (1, 1, 2))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    assert (np.asarray(a.lut) != np.asarray(c.lut)).any()


@pytest.mark.parametrize("weighted", [False, True])
def test_inertia_descends(weighted):
    vectors = vectors_of("normal", *MANY)
    sensitivity = weights_of(*MANY) if weighted else None
    fits = [kmeans_vectors(vectors, 16, sensitivity, KEY, max_steps=n, tol=0.0) for n in (0, 1, 2, 3, 5, 8, 1000)]
    inertias = [float(f.inertia[0]) for f in fits]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(inertias))
    assert [bool(f.converged[0]) for f in fits] == [False] * 6 + [True]
    assert [int(f.num_steps[0]) for f in fits[:6]] == [0, 1, 2, 3, 5, 8]


def test_entries_are_the_means_of_their_cells_once_converged():
    vectors, sensitivity = vectors_of("normal", *FEW), weights_of(*FEW)
    fit = kmeans_vectors(vectors, 8, sensitivity, KEY, tol=0.0, max_steps=1000)
    assert bool(fit.converged[0])
    for j in range(8):
        cell = np.asarray(fit.indices[0]) == j
        x, w = (a[0, cell].astype(np.float64) for a in (vectors, sensitivity))
        np.testing.assert_allclose(fit.lut[0, j], (w * x).sum(0) / w.sum(0), rtol=1e-3, atol=1e-4)


def test_jit_vmap_and_eager_agree():
    vectors, sensitivity = jnp.asarray(vectors_of("normal", *FEW)), jnp.asarray(weights_of(*FEW))

    def fit(v, s):
        return kmeans_vectors(v, 4, s, KEY)

    eager = fit(vectors, sensitivity)
    for a, b in zip(jax.jit(fit)(vectors, sensitivity), eager, strict=True):
        np.testing.assert_array_equal(a, b)
    batched = jax.vmap(fit)(vectors[:, None], sensitivity[:, None])
    for g in range(2):
        single = fit(vectors[g : g + 1], sensitivity[g : g + 1])
        np.testing.assert_allclose(batched.inertia[g], single.inertia, rtol=1e-4)
        np.testing.assert_allclose(batched.lut[g], single.lut, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes(dtype):
    vectors = vectors_of("normal", 2, 60, 4).astype(dtype)
    with jax.enable_x64(dtype is np.float64):
        fit = kmeans_vectors(vectors, 8, np.ones_like(vectors), jax.random.key(0))
    assert fit.lut.shape == (2, 8, 4)
    assert fit.lut.dtype == fit.inertia.dtype == (np.float64 if dtype is np.float64 else np.float32)
    assert fit.indices.shape == (2, 60)
    assert (fit.indices.dtype, fit.num_steps.dtype, fit.converged.dtype) == (np.uint8, np.int32, bool)
    wide = vectors.astype(np.float32)
    if dtype is not np.float64:
        np.testing.assert_array_equal(fit.lut, kmeans_vectors(wide, 8, np.ones_like(wide), KEY).lut)


def test_the_fit_is_a_constant_to_differentiation():
    vectors = jnp.asarray(vectors_of("normal", 1, 50, 2))
    gradient = jax.grad(lambda v: kmeans_vectors(v, 4, jnp.abs(v), KEY).lut.sum())(vectors)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(vectors))


@pytest.mark.parametrize("weighted", [False, True])
def test_memory_does_not_grow_with_entries_times_vectors(weighted):
    m, k, d = 1 << 20, 256, 4
    array = jax.ShapeDtypeStruct((1, m, d), np.float32)
    fit = jax.jit(lambda v, s, key: kmeans_vectors(v, k, s, key))
    compiled = fit.lower(array, array if weighted else None, KEY).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < m * k * 4 / 4


@pytest.mark.parametrize("k", [0, 257])
def test_a_number_of_entries_that_no_byte_can_index(k):
    with pytest.raises(ValueError, match=f"k={k}"):
        kmeans_vectors(vectors_of("normal", 1, 10, 2), k, None, KEY)


def test_no_restarts():
    with pytest.raises(ValueError, match="restarts=0"):
        kmeans_vectors(vectors_of("normal", 1, 10, 2), 2, None, KEY, restarts=0)


def test_few_vectors_closer_than_squares_can_tell():
    vectors = np.array([[[1, 0], [1e-20, 0], [2e-20, 0], [3e-20, 0]]], np.float32)
    fit = kmeans_vectors(vectors, 4, None, KEY)
    np.testing.assert_array_equal(np.asarray(fit.lut)[0][np.asarray(fit.indices)[0]], vectors[0])
    assert float(fit.inertia[0]) == 0


def test_an_exact_fit_of_large_vectors_has_no_inertia():
    fit = kmeans_vectors(np.full((1, 2, 2), 1e25, np.float32), 2, None, KEY)
    assert float(fit.inertia[0]) == 0
