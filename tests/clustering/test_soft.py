"""Fits of soft k-means: its limits, its laws, what it refuses, what it costs; tables that are repaired and rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import palettax as px
from palettax.clustering.attention import Points
from palettax.clustering.levels import level_values
from palettax.clustering.repair import repaired
from palettax.clustering.rounding import Rounding, narrow_dtype, rounded
from palettax.clustering.soft import Way, soft_row
from tests.clustering.soft_reference import EPS
from tests.clustering.test_soft_gradients import MANY, adjoints, many, problem
from tests.tables import DTYPES, data

WEIGHTS, START, SENSITIVITY = problem(n=120)


def lloyd(weights, lut, sensitivity, steps):
    """Lloyd's steps, in float64."""
    weights, lut, sensitivity = (np.float64(a) for a in (weights, lut, sensitivity))
    for _ in range(steps):
        nearest = abs(weights[:, None] - lut).argmin(axis=1)
        total = np.bincount(nearest, sensitivity, lut.size)
        lut = np.where(
            total > 0, np.bincount(nearest, sensitivity * weights, lut.size) / np.maximum(total, 1e-300), lut
        )
    return lut


# --- Limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_steps", [1, 5])
def test_steps_at_zero_are_lloyds(max_steps):
    fit = px.soft_kmeans_lut(
        WEIGHTS, START, 0.0, sensitivity=SENSITIVITY, max_steps=max_steps, tol=0.0, adjoint=px.Unrolled()
    )
    np.testing.assert_allclose(fit.lut, lloyd(WEIGHTS, START, SENSITIVITY, max_steps), atol=4 * EPS * 3)


@adjoints
def test_values_at_zero_are_the_nearest_entries(adjoint):
    fit = px.soft_kmeans_lut(WEIGHTS, START, 0.0, adjoint=adjoint)
    np.testing.assert_array_equal(fit.values, px.lookup(fit.lut, px.assign(WEIGHTS, fit.lut)))


def test_values_at_zero_are_the_nearest_entries_for_many_weights():
    """But where a bucket lies on both sides of a middle, or the lut moved."""
    weights, lut, _ = many("normal")
    fit = px.soft_kmeans_lut(weights, lut, 0.0)
    near = px.lookup(fit.lut, px.assign(weights, fit.lut))
    assert np.mean(np.asarray(fit.values) != np.asarray(near)) < 1e-4
    np.testing.assert_allclose(fit.lut, lloyd(weights, lut, np.ones_like(weights), int(fit.num_steps)), atol=1e-5)


def test_vectors_at_zero_are_the_nearest_entries():
    vectors, lut = WEIGHTS.reshape(20, 6), np.eye(4, 3, dtype=np.float32)
    fit = px.soft_kmeans_lut(vectors, lut, 0.0)
    np.testing.assert_array_equal(fit.values, px.lookup(fit.lut, px.assign(vectors, fit.lut)))


@pytest.mark.parametrize("temperature", [1e5, 1e20])
def test_all_entries_become_the_mean_in_heat(temperature):
    fit = px.soft_kmeans_lut(WEIGHTS, START, temperature, sensitivity=SENSITIVITY)
    mean = np.average(np.float64(WEIGHTS), weights=np.float64(SENSITIVITY))
    for found in (fit.lut, fit.values):
        np.testing.assert_allclose(found, mean, atol=1e-4)
    assert fit.converged


# --- Laws -----------------------------------------------------------------------------------------------------------


def free_energy(weights, lut, sensitivity, tau):
    """-τ Σ sensitivity · log Σ exp(-(weight - lut)² / τ): what steps of soft k-means descend."""
    return -tau * sensitivity @ np.logaddexp.reduce(-((weights[:, None] - lut) ** 2) / tau, axis=1)


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_no_step_goes_uphill(tau):
    """In float64 by a NumPy array, with JAX in its 32 bits."""
    weights, sensitivity, lut = (np.float64(a) for a in (WEIGHTS, SENSITIVITY, START))
    energy = free_energy(weights, lut, sensitivity, tau)
    for _ in range(8):
        fit = px.soft_kmeans_lut(
            weights, lut, tau, sensitivity=sensitivity, relative=False, max_steps=1, adjoint=px.Unrolled()
        )
        assert fit.lut.dtype == fit.values.dtype == np.float64
        lut, before = fit.lut, energy
        energy = free_energy(weights, lut, sensitivity, tau)
        assert energy <= before + 1e-12 * abs(before)
    assert energy < free_energy(weights, np.float64(START), sensitivity, tau)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("nbits", [1, 2, 3])
def test_all_entries_are_used_on_normal_weights(nbits, temperature):
    weights = data("normal", 2000).astype(np.float32)
    fit = px.soft_kmeans_lut(weights, px.kmeans_lut(weights, nbits).lut, temperature, max_steps=20)
    np.testing.assert_array_equal(np.unique(px.assign(weights, fit.lut)), np.arange(2**nbits))
    assert (np.diff(fit.lut) > 0).all()


def test_what_is_symmetric_stays_symmetric():
    half = np.float32(abs(WEIGHTS[:60]))
    weights = np.concatenate([half, -half])
    fit = px.soft_kmeans_lut(
        weights, np.array([-2, -0.3, 0.3, 2], np.float32), 1.0, sensitivity=np.tile(SENSITIVITY[:60], 2)
    )
    np.testing.assert_allclose(fit.lut, -fit.lut[::-1], atol=1e-5)
    np.testing.assert_allclose(fit.values[:60], -fit.values[60:], atol=1e-5)


def test_an_entry_that_attracts_nothing_stays():
    lut = np.append(START[:3], np.float32(1000))
    fit = px.soft_kmeans_lut(WEIGHTS, lut, 1.0)
    assert float(fit.lut[3]) == pytest.approx(1000, rel=4 * EPS)
    assert float(fit.values.max()) <= float(fit.lut[:3].max()) * (1 + 4 * EPS)


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name):
    """Values are of the weights' dtype, the lut is float32 at least; half floats are computed in float32."""
    weights = WEIGHTS.astype(DTYPES[name])
    fit = px.soft_kmeans_lut(weights, START, 1.0)
    assert fit.values.dtype == weights.dtype
    assert fit.lut.dtype == (np.float64 if name == "float64" else np.float32)
    wide = px.soft_kmeans_lut(weights.astype(np.float32), START, 1.0)
    np.testing.assert_allclose(fit.lut, wide.lut, atol=1e-5)
    if name != "float64":
        np.testing.assert_array_equal(fit.values, wide.values.astype(weights.dtype))


def test_steps_end_when_nothing_moves():
    slow = px.soft_kmeans_lut(WEIGHTS, START, 1.0, max_steps=2, tol=1e-6)
    assert (int(slow.num_steps), bool(slow.converged)) == (2, False)
    done = px.soft_kmeans_lut(WEIGHTS, START, 1.0, max_steps=1000, tol=1e-3)
    assert done.converged
    assert 2 < int(done.num_steps) < 1000
    width = WEIGHTS.std() / 4
    again = px.soft_kmeans_lut(WEIGHTS, done.lut, 1.0, max_steps=1000, tol=1e-3)
    assert int(again.num_steps) == 1
    assert abs(again.lut - done.lut).max() <= 1.001e-3 * width
    every = px.soft_kmeans_lut(WEIGHTS, done.lut, 1.0, max_steps=30, tol=1e-3, adjoint=px.Unrolled())
    assert (int(every.num_steps), bool(every.converged)) == (30, True)


@pytest.mark.parametrize(("k", "n"), [(1, MANY), (20, 70_001), (64, 70_001)])
def test_buckets_for_tables_of_any_size(k, n):
    """One step against NumPy: buckets are found by comparison with a few middles, by bisection of many."""
    weights, lut = data("normal", n).astype(np.float32), np.linspace(-3, 3, k + 2, dtype=np.float32)[1:-1]
    fit = px.soft_kmeans_lut(weights, lut, 10.0, max_steps=1, adjoint=px.Unrolled())
    wide, entries = np.float64(weights), np.float64(lut)
    tau = 10 * wide.var() / k**2

    def attention(entries):
        distance = (wide[:, None] - entries) ** 2
        share = np.exp((distance.min(axis=1, keepdims=True) - distance) / tau)
        return share / share.sum(axis=1, keepdims=True)

    share = attention(entries)
    entries = wide @ share / share.sum(axis=0)
    for found, exact in ((fit.lut, entries), (fit.values, attention(entries) @ entries)):
        np.testing.assert_allclose(found, exact, atol=1e-4 / k + 8 * EPS)


def test_vectors_without_sensitivity_go_to_the_nearest_entry():
    vectors, lut = WEIGHTS.reshape(20, 6), np.eye(4, 3, dtype=np.float32)
    sensitivity = SENSITIVITY.reshape(20, 6).copy()
    sensitivity[0] = 0
    fit = px.soft_kmeans_lut(vectors, lut, 1e-3, sensitivity=sensitivity)
    near = px.lookup(fit.lut, px.assign(vectors, fit.lut))
    np.testing.assert_allclose(fit.values[0], near[0], atol=1e-2)


# --- What it refuses ------------------------------------------------------------------------------------------------

W = WEIGHTS[:12]
REFUSED = {
    "integers": ({"weights": W.astype(int)}, "only floats have a palette"),
    "nothing": ({"weights": W[:0]}, "empty"),
    "nan": ({"weights": np.where(np.arange(12) < 2, np.float32(np.nan), W)}, "2 NaN and 0 infinite of 12"),
    "infinity": ({"weights": np.where(np.arange(12) < 3, np.float32(np.inf), W)}, "0 NaN and 3 infinite of 12"),
    "scalar lut": ({"lut": np.float32(1)[None][0]}, "lut is"),
    "lut of rank 3": ({"lut": np.zeros((4, 1, 1), np.float32)}, r"lut is \(4, 1, 1\)"),
    "lut of 257": ({"lut": np.zeros(257, np.float32)}, r"lut is \(257,\)"),
    "lut of none": ({"lut": np.zeros(0, np.float32)}, r"lut is \(0,\)"),
    "vectors of 5": ({"lut": np.zeros((4, 5), np.float32)}, "vector_size=5 does not divide"),
    "vectors of a scalar": ({"weights": W[0], "lut": np.zeros((4, 2), np.float32)}, "vector_size=2 does not divide"),
    "colder than zero": ({"temperature": -1e-9}, "temperature=-1e-09"),
    "no temperature": ({"temperature": float("nan")}, "temperature=nan"),
    "negative array": ({"temperature": jnp.float32(-1)}, "temperature=-1.0"),
    "adjoint by name": ({"adjoint": "implicit"}, "adjoint='implicit'"),
    "adjoint without parentheses": ({"adjoint": px.Implicit}, "adjoint=<class"),
    "no step": ({"max_steps": 0}, "max_steps=0"),
    "half a step": ({"max_steps": 2.5}, "max_steps=2.5"),
    "true steps": ({"max_steps": True}, "max_steps=True"),
    "sensitivity of another shape": ({"sensitivity": np.ones(11, np.float32)}, r"sensitivity is \(11,\)"),
    "negative sensitivity": ({"sensitivity": -np.ones(12, np.float32)}, "12 negative and 0 NaN"),
    "nan sensitivity": ({"sensitivity": np.full(12, np.nan, np.float32)}, "0 negative and 12 NaN"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, unchecked):
    changed, message = REFUSED[case]
    call = {"weights": W, "lut": START, "temperature": 1.0} | changed
    with pytest.raises(ValueError, match=message):
        px.soft_kmeans_lut(**call)


fitted = jax.jit(lambda weights, sensitivity: px.soft_kmeans_lut(weights, START, 1.0, sensitivity=sensitivity))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [120, MANY])
def test_a_traced_fit_of_nan_is_nan(bad, n):
    weights = np.resize(WEIGHTS, n)
    weights[5] = bad
    fit = fitted(weights, None)
    assert np.isnan(fit.lut).all()
    assert np.isnan(fit.values).all()
    assert not fit.converged


def test_a_traced_fit_of_infinite_sensitivity_is_nan():
    fit = fitted(WEIGHTS, np.where(np.arange(120) == 3, np.float32(np.inf), SENSITIVITY))
    assert np.isnan(fit.lut).all()
    assert not fit.converged


@pytest.mark.parametrize("bad", [np.nan, -1])
def test_a_traced_fit_of_bad_sensitivity_is_nan(bad):
    """As `kmeans_lut` has it."""
    sensitivity = np.where(np.arange(120) == 3, np.float32(bad), SENSITIVITY)
    hard = jax.jit(lambda w, s: px.kmeans_lut(w, 2, sensitivity=s))(WEIGHTS, sensitivity)
    assert np.isnan(hard.lut).all()
    assert np.isnan(fitted(WEIGHTS, sensitivity).lut).all()


# --- What it costs --------------------------------------------------------------------------------------------------


def test_one_trace_for_all_temperatures():
    class Counted(px.Implicit):
        traces = 0

        def solve(self, *given):
            Counted.traces += 1
            return super().solve(*given)

    for temperature in (0.5, 1.0, 2.5):
        for tol in (1e-3, 1e-4):
            px.soft_kmeans_lut(WEIGHTS, START * np.float32(temperature), temperature, tol=tol, adjoint=Counted())
    assert Counted.traces == 1

    @jax.jit
    def trained(weights, lut, temperature):
        return jax.grad(lambda w: (px.soft_kmeans_lut(w, lut, temperature, adjoint=Counted()).values ** 2).sum())(
            weights
        )

    trained(WEIGHTS, START, 1.0)
    before = Counted.traces
    for temperature in (0.1, 0.0):
        trained(WEIGHTS, START * 2, temperature)
    assert Counted.traces == before


def bytes_a_weight(shape, k, **how):
    """Beside the weights, for a gradient: what is in memory at a time, and what comes out."""

    def loss(weights, lut, temperature):
        return (px.soft_kmeans_lut(weights, lut, temperature, **how).values ** 2).sum()

    given = (jax.ShapeDtypeStruct(s, np.float32) for s in (shape, (k,), ()))
    memory = jax.jit(jax.value_and_grad(loss)).lower(*given).compile().memory_analysis()
    return (memory.temp_size_in_bytes + memory.output_size_in_bytes) / np.prod(shape)


def test_memory_does_not_grow_with_steps_or_entries():
    few = bytes_a_weight((2**22,), 4, max_steps=3)
    assert few < 24
    assert bytes_a_weight((2**22,), 256, max_steps=100) <= 1.2 * few


def test_memory_does_not_grow_with_steps_that_are_differentiated():
    assert bytes_a_weight((2**22,), 16, max_steps=100, adjoint=px.Unrolled()) < 24


def test_memory_of_a_large_layer():
    assert bytes_a_weight((4096, 4096), 16) <= 20


# --- Repair ---------------------------------------------------------------------------------------------------------


def points(*clusters, mass=None):
    places = np.concatenate(clusters).astype(np.float32)
    return Points(jnp.asarray(places[None]), jnp.asarray(np.ones_like(places)[None] if mass is None else mass[None]))


WIDE, NARROW = np.linspace(-1, 1, 50), 10 + np.linspace(-0.1, 0.1, 50)


@pytest.mark.parametrize("spare", [[10, 1000], [1000, 10], [0, 0], [-500, 500]])
def test_spare_entries_move_into_the_costliest_cells(spare):
    """The first into the costliest, the second into the next; each one standard deviation beside the entry there."""
    lut = np.array([0, 10, *spare], np.float32)[:, None]
    moved = np.asarray(repaired(points(WIDE, NARROW), jnp.asarray(lut), jnp.float32(0.01)))[:, 0]
    np.testing.assert_array_equal(moved[:2], [0, 10])
    np.testing.assert_allclose(moved[2:], [WIDE.std(), 10 + NARROW.std()], rtol=1e-5)


def test_cost_counts_mass():
    mass = np.repeat(np.float32([1e-4, 1]), 50)
    lut = jnp.array([[0.0], [10.0], [10.0]])
    moved = repaired(points(WIDE, NARROW, mass=mass), lut, jnp.float32(0.01))
    assert float(moved[2, 0]) == pytest.approx(10 + NARROW.std(), rel=1e-5)


@pytest.mark.parametrize("spare", [[10, 1000], [0, 0]])
def test_nothing_moves_when_nothing_is_lost(spare):
    lut = jnp.array([0, 10, *spare], jnp.float32)[:, None]
    moved = repaired(points(np.zeros(50), np.full(50, 10)), lut, jnp.float32(0.01))
    np.testing.assert_array_equal(moved, lut)


def test_nothing_moves_when_all_entries_are_used():
    lut = jnp.asarray(START[:, None])
    np.testing.assert_array_equal(repaired(points(WEIGHTS), lut, jnp.float32(0.1)), lut)


def test_vectors_move_beside_vectors():
    rng = np.random.default_rng(0)
    places = rng.standard_normal((2, 100)).astype(np.float32) * np.float32([[2], [0.5]])
    lut = jnp.array([[0, 0], [0, 0], [0, 0]], jnp.float32)
    moved = repaired(Points(jnp.asarray(places), jnp.ones_like(places)), lut, jnp.float32(0.01))
    np.testing.assert_allclose(moved[1], np.sqrt((places**2).mean(axis=1)), rtol=1e-5)
    np.testing.assert_array_equal(moved[jnp.array([0, 2])], lut[:2])


def test_a_repaired_fit_is_better():
    """From a table that serves a part of the weights only."""
    lut = np.array([[-1], [-1], [1], [900]], np.float32)
    inertia = {}
    for repair in (False, True):
        way = Way(px.OneStep(), 50, repair=repair)
        fit = soft_row(jnp.asarray(WEIGHTS[:, None]), jnp.asarray(lut), 0.1, 1e-4, way=way)
        inertia[repair] = float(((WEIGHTS[:, None] - fit.values) ** 2).sum())
    assert len(np.unique(px.assign(WEIGHTS, fit.lut[:, 0]))) == 4
    assert inertia[True] < 0.8 * inertia[False]


# --- Rounding -------------------------------------------------------------------------------------------------------

LEVELS = {"int8": np.int8, "uint8": np.uint8, "e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
STEPS = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}
TABLES = {
    "normal": np.sort(data("normal", 16))[:, None],
    "vectors": data("normal", 24).reshape(8, 3),
    "tiny": np.sort(data("normal", 16))[:, None] * 1e-3,
    "zeros": np.zeros((4, 1)),
    "one": np.full((1, 1), -0.7),
}
tables = pytest.mark.parametrize("table", TABLES)


def rounding(dtype, step_dtype=np.float32):
    return Rounding(narrow_dtype(dtype), np.dtype(step_dtype))


def read(levels, step):
    """As a reader of the stored table computes it."""
    levels = np.asarray(levels).astype(np.float32) - (128 if levels.dtype == np.uint8 else 0)
    return levels.astype(step.dtype) * np.asarray(step)


@tables
@pytest.mark.parametrize("step_dtype", STEPS)
@pytest.mark.parametrize("dtype", LEVELS)
def test_rounded_tables_are_what_is_read_back(dtype, step_dtype, table):
    rounds = rounding(LEVELS[dtype], STEPS[step_dtype])
    lut = jnp.asarray(TABLES[table], jnp.float32)
    levels, step = rounds.stored(lut, None)
    assert (levels.dtype, step.dtype) == (np.dtype(LEVELS[dtype]), np.dtype(STEPS[step_dtype]))
    np.testing.assert_array_equal(rounds(lut, None), read(levels, step).astype(np.float32))


@pytest.mark.parametrize("step_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", LEVELS)
def test_compiled_tables_are_what_is_read_back(dtype, step_dtype):
    rounds = rounding(LEVELS[dtype], STEPS[step_dtype])
    both = jax.jit(lambda lut: (rounds(lut, None), rounds.stored(lut, None)))
    rounded, stored = both(jnp.asarray(TABLES["normal"], jnp.float32))
    np.testing.assert_array_equal(rounded, read(*stored).astype(np.float32))


@tables
@pytest.mark.parametrize("dtype", LEVELS)
def test_levels_are_the_nearest(dtype, table):
    """With the step that makes the largest entry the largest level."""
    lut = np.float32(TABLES[table])
    rounds = rounding(LEVELS[dtype])
    levels = level_values(np.dtype(LEVELS[dtype])).astype(np.float64)
    _, step = rounds.stored(jnp.asarray(lut), None)
    step = np.float64(step)
    assert step * levels.max() == pytest.approx(abs(np.float64(lut)).max(), rel=EPS) or not lut.any()
    least = abs(np.float64(lut)[..., None] - step * levels).min(axis=-1)
    found = abs(np.float64(lut) - np.float64(rounds(jnp.asarray(lut), None)))
    assert (found <= least + 2 * EPS * abs(lut)).all()


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_tables_are_casts(dtype):
    lut = jnp.asarray(TABLES["normal"], jnp.float32)
    rounds = rounding(dtype, dtype)
    stored, step = rounds.stored(lut, None)
    assert (stored.dtype, step) == (np.dtype(dtype), None)
    np.testing.assert_array_equal(stored, lut.astype(dtype))
    np.testing.assert_array_equal(rounds(lut, None), lut.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_rounding_is_a_cast_and_back(dtype):
    """Of every float16, of halves of the spacing between floats, and of what overflows."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = halves[np.isfinite(halves)]
    values = np.concatenate([finite, finite * np.float32(1 + 2**-11), finite * 2.0**-20, np.float32([1e-30, 3e38])])
    with np.errstate(over="ignore"):
        expected = values.astype(dtype).astype(np.float32)
    expected = np.where(
        np.isnan(expected), np.copysign(np.float32(np.inf), values), expected
    )  # a float8 without infinity
    np.testing.assert_array_equal(jax.jit(lambda x: rounded(x, np.dtype(dtype)))(values), expected)


def test_no_rounding():
    lut = jnp.asarray(TABLES["normal"], jnp.float32)
    np.testing.assert_array_equal(rounding(None)(lut, None), lut)
    np.testing.assert_array_equal(rounding(None)(lut, False), lut)


@pytest.mark.parametrize("dtype", [None, np.float16, jnp.bfloat16, *LEVELS.values()])
def test_gradients_go_straight_through(dtype):
    """But not into the entry that is pinned to zero."""
    lut = jnp.asarray(TABLES["normal"], jnp.float32)
    slope = jnp.asarray(data("normal", 16, 1)[:, None], jnp.float32)
    rounds = rounding(dtype)
    for zero in (None, False, True):
        value, gradient = jax.value_and_grad(lambda t, zero=zero: (rounds(t, zero) * slope).sum())(lut)
        pinned = np.arange(16)[:, None] == (abs(lut).argmin() if zero else -1)
        assert np.isfinite(value)
        np.testing.assert_array_equal(gradient, np.where(pinned, 0, slope))
        read_back, stored = rounds(lut, zero), rounds.stored(lut, zero)
        assert (not zero) or float(read_back[pinned][0]) == 0
        if rounds.has_levels:
            np.testing.assert_array_equal(read_back, read(*stored))


def test_zero_may_be_traced():
    lut = jnp.asarray(TABLES["normal"], jnp.float32)
    rounds = rounding(np.int8)
    both = jax.jit(jax.vmap(lambda zero: rounds(lut, zero)))(jnp.array([False, True]))
    np.testing.assert_allclose(both[0], rounds(lut, None), rtol=4 * EPS)
    assert (both[1] == 0).sum() == 1


@pytest.mark.parametrize("dtype", ["int4", "float32", "int32", "complex64"])
def test_dtypes_that_tables_do_not_have(dtype):
    with pytest.raises(ValueError, match=f"a lookup table of {dtype}"):
        narrow_dtype(dtype)
