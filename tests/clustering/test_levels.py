"""Tables of narrow entries: the levels against every subset, the step by what it must reproduce."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import palettax as px
from palettax.clustering import level_path
from palettax.clustering.levels import level_values, quantized_lut
from tests.tables import DTYPES, KINDS, data, sensitivities

NARROW = {"int8": np.int8, "uint8": np.uint8, "e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
FLOAT32 = level_path.Format(24, -126, 2.0**-126, 3e38)

narrow = pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
floats = pytest.mark.parametrize("float_dtype", DTYPES.values(), ids=DTYPES)


def entries(fit):
    """The values of every table, computed as a reader of it would."""
    lut, step = np.asarray(fit.lut), np.asarray(fit.step)
    levels = lut.astype(np.float32) - (128 if lut.dtype == np.uint8 else 0)
    return levels.astype(step.dtype) * step[:, None]


def dense(fit):
    return np.take_along_axis(entries(fit), np.asarray(fit.indices).astype(int), axis=1)


def check(weights, fit, sensitivity=None):
    """Ascending entries, the nearest one for every weight, and the inertia that is claimed."""
    table = entries(fit).astype(np.float64)
    assert (np.diff(table) >= 0).all()
    assert (fit.step > 0).all()
    wide = weights.astype(np.float64)
    error = np.abs(wide - dense(fit).astype(np.float64))
    np.testing.assert_array_equal(error, np.abs(wide[:, :, None] - table[:, None, :]).min(axis=2))
    mass = np.ones_like(wide) if sensitivity is None else sensitivity.astype(np.float64)
    mass = np.where(mass.any(axis=1, keepdims=True), mass, 1)
    np.testing.assert_allclose(fit.inertia, (mass * error**2).sum(axis=1), rtol=1e-6)


def least_inertia(values, mass, table, k):
    """The least inertia over all k-subsets of a table."""
    squares = (values[:, None] - table) ** 2
    return min(float(mass @ squares[:, subset].min(axis=1)) for subset in itertools.combinations(range(table.size), k))


LEVEL_SETS = {
    "even": np.arange(-4.0, 5.0),
    "positive": np.arange(5.0),
    "powers": np.array([-8.0, -2, -0.5, 0, 0.25, 0.5, 1, 4]),
    "uneven": np.array([-3.0, -2.9, 0, 0.1, 0.7, 2, 5]),
}


@pytest.mark.parametrize("levels", LEVEL_SETS.values(), ids=LEVEL_SETS)
@pytest.mark.parametrize("seed", range(12))
def test_no_other_levels_are_better(levels, seed):
    rng = np.random.default_rng(seed)
    values = np.unique(rng.standard_normal(rng.integers(1, 40)) * 3 + rng.integers(-2, 3))
    mass = rng.random(values.size) ** 4 + 1e-6
    step = float(np.float32(rng.uniform(0.3, 2)))
    tables = level_path.with_middles(levels.tobytes())
    for k in range(1, levels.size + 1):
        chosen = np.zeros(k, np.int64)
        sums = level_path.summed(values, mass)
        inertia, better = level_path.choose(values, sums, tables, FLOAT32, step, chosen, levels.size)
        table = (np.float32(levels) * np.float32(step)).astype(np.float64)
        best = least_inertia(values, mass, table, k)
        assert inertia == pytest.approx(best, rel=1e-6)
        nearest = chosen[np.abs(values[:, None] - table[chosen]).argmin(axis=1)]
        assert mass @ (values - table[nearest]) ** 2 == pytest.approx(best, rel=1e-6)
        # Every entry but the repeated last serves a point, and the other step is no worse for these levels.
        assert set(nearest) == set(chosen)
        assert mass @ (values - better * levels[nearest]) ** 2 <= best * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [np.int8, jnp.float8_e4m3fn])
def test_no_path_through_all_levels_is_shorter(dtype):
    """Against every origin of every link, where there are too many subsets to try."""
    levels = level_values(dtype)
    values = np.unique(data("normal", 300))
    mass = sensitivities(values.size) + 1e-9
    step = float(np.float32(3 / levels[-1]))
    table = (np.float32(levels) * np.float32(step)).astype(np.float64)
    squares = (values[:, None] - table) ** 2
    link = np.full((table.size, table.size), np.inf)
    for a, b in itertools.combinations(range(table.size), 2):
        inside = (values > table[a]) & (values <= table[b])
        link[a, b] = mass[inside] @ np.minimum(squares[inside, a], squares[inside, b])
    cost = np.array([mass[values <= t] @ squares[values <= t, a] for a, t in enumerate(table)])
    last = np.array([mass[values > t] @ squares[values > t, a] for a, t in enumerate(table)])
    sums, tables = level_path.summed(values, mass), level_path.with_middles(levels.tobytes())
    for k in range(1, 65):
        inertia, _ = level_path.choose(values, sums, tables, FLOAT32, step, np.zeros(k, np.int64), levels.size)
        assert inertia == pytest.approx((cost + last).min(), rel=1e-6)
        cost = (cost[:, None] + link).min(axis=0)


@floats
def test_entries_round_as_the_format_does(float_dtype):
    info = jnp.finfo(float_dtype)
    form = level_path.Format(info.nmant + 1, info.minexp, float(info.smallest_normal), float(info.max))
    rng = np.random.default_rng(0)
    for dtype in NARROW.values():
        levels = level_values(dtype)
        for exponent in (-3, 0, 4, info.minexp // 2, info.minexp):
            step = np.asarray(rng.uniform(1, 2) * 2.0**exponent).astype(float_dtype)
            with np.errstate(over="ignore"):
                expected = (levels.astype(float_dtype) * step).astype(np.float64)
            found = level_path.entries_of(levels, float(step), form)
            finite = np.isfinite(expected)
            np.testing.assert_array_equal(found[finite], expected[finite])
            assert (np.abs(found[~finite]) > form.largest).all()


def test_levels():
    for dtype in (np.int8, np.uint8):
        np.testing.assert_array_equal(level_values(dtype), np.arange(-127, 128))
    assert level_values(jnp.float8_e4m3fn)[-1] == 448
    assert level_values(jnp.float8_e5m2)[-1] == 1.75 * 2**15
    for dtype in NARROW.values():
        levels = level_values(dtype)
        assert levels.dtype == np.float64
        assert 0 in levels
        assert (np.diff(levels) > 0).all()
        np.testing.assert_array_equal(levels, -levels[::-1])
        stored = levels + 128 if dtype == np.uint8 else levels
        np.testing.assert_array_equal(stored.astype(dtype).astype(np.float64), stored)
    # 256 patterns less two NaN and -0; less two infinities and six NaN and -0.
    assert level_values(jnp.float8_e4m3fn).size == 253
    assert level_values(jnp.float8_e5m2).size == 247
    with pytest.raises(ValueError, match="float16; choose int8"):
        level_values(np.float16)


@pytest.mark.parametrize("n", [4096, 32768, 1_000_000])
def test_int8_is_near_the_free_optimum(n):
    weights = data("normal", n).astype(np.float32)
    for nbits, excess in ((2, 0.001), (4, 0.003), (6, 0.06)):
        free = float(px.kmeans_lut(weights, nbits).inertia)
        inertia = quantized_lut(weights[None], 2**nbits, np.int8, None).inertia[0]
        assert free * (1 - 1e-6) <= inertia <= free * (1 + excess)


@narrow
@floats
@pytest.mark.parametrize("kind", KINDS)
def test_sound(kind, float_dtype, dtype):
    for n, k in ((1, 2), (3, 2), (50, 16), (700, 16), (700, 256)):
        weights = np.stack([data(kind, n, seed) for seed in range(2)]).astype(float_dtype)
        mass = sensitivities(2 * n).reshape(2, n)
        mass[1] = 0
        for sensitivity in (None, mass):
            fit = quantized_lut(weights, k, dtype, sensitivity)
            assert fit.lut.dtype == dtype
            assert fit.step.dtype == weights.dtype
            check(weights, fit, sensitivity)


@narrow
@floats
@pytest.mark.parametrize("k", [16, 256])
def test_weights_on_a_grid_come_back(k, float_dtype, dtype):
    rng = np.random.default_rng(0)
    levels = level_values(dtype)
    for _ in range(20):
        step = np.asarray(rng.uniform(0.5, 4)).astype(float_dtype)
        at_most_one = np.abs(levels) * float(step) < 1e4
        used = rng.permutation(levels[at_most_one])[: rng.integers(1, k + 1)]
        weights = rng.choice(used.astype(float_dtype) * step, (1, 2000))
        fit = quantized_lut(weights, k, dtype, None)
        np.testing.assert_array_equal(dense(fit), weights)
        assert fit.inertia[0] == 0


@narrow
@floats
def test_constants(float_dtype, dtype):
    for value in (0.1, -0.3, 1.0, 300.0, -1e4, 1e-3, 0.0):
        weights = np.full((1, 9), value).astype(float_dtype)
        fit = quantized_lut(weights, 4, dtype, None)
        np.testing.assert_array_equal(dense(fit), weights)
        assert (entries(fit) == weights[0, 0]).all()
        assert not fit.indices.any()
    assert fit.step[0] == 1


@narrow
def test_few_values_leave_entries_over(dtype):
    weights = np.tile(np.float32([-0.5, 0.25, 1.0]), (1, 5))
    fit = quantized_lut(weights, 8, dtype, None)
    np.testing.assert_array_equal(entries(fit), [[-0.5, 0.25] + 6 * [1.0]])
    rng = np.random.default_rng(0)
    weights = rng.choice(rng.standard_normal(3), (1, 500)).astype(np.float32)
    fit = quantized_lut(weights, 8, dtype, None)
    assert np.unique(entries(fit)).size == 3
    assert (np.abs(dense(fit) - weights) <= np.abs(weights).max() / 16).all()


@narrow
@pytest.mark.parametrize("k", [16, 64])
def test_scale(k, dtype):
    weights = data("normal", 2000).astype(np.float32)[None]
    fit = quantized_lut(weights, k, dtype, None)
    for exponent in (-90, -3, 5, 90):
        scaled = quantized_lut(np.ldexp(weights, exponent), k, dtype, None)
        np.testing.assert_array_equal(scaled.lut, fit.lut)
        np.testing.assert_array_equal(scaled.indices, fit.indices)
        np.testing.assert_array_equal(scaled.step, np.ldexp(fit.step, exponent))


def test_groups_are_independent():
    weights = np.stack([data(kind, 600) for kind in KINDS])
    mass = sensitivities(weights.size).reshape(weights.shape)
    for sensitivity in (None, mass):
        fit = quantized_lut(weights, 16, np.int8, sensitivity)
        for row in range(weights.shape[0]):
            alone = quantized_lut(weights[[row]], 16, np.int8, None if sensitivity is None else sensitivity[[row]])
            for together, single in zip(fit, alone, strict=True):
                np.testing.assert_array_equal(together[row], single[0])


def test_sensitivity_repeats_weights():
    weights = data("normal", 400).astype(np.float32)
    times = np.random.default_rng(1).integers(0, 4, 400)
    fit = quantized_lut(weights[None], 8, np.int8, times[None].astype(np.float32))
    repeated = quantized_lut(np.repeat(weights, times)[None], 8, np.int8, None)
    np.testing.assert_array_equal(fit.lut, repeated.lut)
    np.testing.assert_array_equal(fit.step, repeated.step)


def test_outliers_are_cut_off_where_that_is_cheaper():
    weights = data("normal", 100_000).astype(np.float32)
    weights[0] = 100
    fit = quantized_lut(weights[None], 16, np.int8, None)
    assert fit.inertia[0] < 0.5 * quantized_lut(weights[None], 2, np.int8, None).inertia[0]
    unheeded = np.ones_like(weights)
    unheeded[0] = 0
    without = quantized_lut(weights[None, 1:], 16, np.int8, None)
    assert quantized_lut(weights[None], 16, np.int8, unheeded[None]).step[0] == without.step[0]


@narrow
def test_steps_are_normal_numbers(dtype):
    weights = (data("normal", 500) * 1e-3).astype(np.float16)[None]
    fit = quantized_lut(weights, 16, dtype, None)
    assert fit.step[0] >= jnp.finfo(jnp.float16).smallest_normal
    check(weights, fit)
    # Of a wider step there is no end.
    assert quantized_lut(weights, 16, dtype, None, step_dtype=np.float32).step.dtype == np.float32


@pytest.mark.parametrize("step_dtype", [np.float16, jnp.bfloat16])
def test_the_step_is_rounded_first(step_dtype):
    weights = data("normal", 3000).astype(np.float32)[None]
    fit = quantized_lut(weights, 64, np.int8, None, step_dtype=step_dtype)
    assert fit.step.dtype == step_dtype
    check(weights, fit)
    assert fit.inertia[0] <= 1.02 * quantized_lut(weights, 64, np.int8, None).inertia[0]


@narrow
def test_traced(dtype):
    weights = np.stack([data("normal", 300), data("heavy", 300)]).astype(np.float32)
    mass = sensitivities(600).reshape(2, 300).astype(np.float32)
    for sensitivity in (None, mass):
        eager = quantized_lut(weights, 16, dtype, sensitivity)
        traced = jax.jit(lambda w, s: quantized_lut(w, 16, dtype, s))(weights, sensitivity)
        mapped = jax.vmap(lambda w: quantized_lut(w[None], 16, dtype, None))(weights)
        for a, b in zip(eager, traced, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    for a, b in zip(quantized_lut(weights, 16, dtype, None), mapped, strict=True):
        np.testing.assert_array_equal(a, b[:, 0])


def test_what_is_not_finite_gets_no_step():
    weights = np.float32([[1, 2, np.nan], [1, 2, 3], [1, -np.inf, 3]])
    fit = jax.jit(lambda w: quantized_lut(w, 4, np.int8, None))(weights)
    np.testing.assert_array_equal(np.isnan(fit.step), [True, False, True])
    np.testing.assert_array_equal(np.isnan(fit.inertia), [True, False, True])
    assert not fit.lut[0].any()
    long = np.stack([data("normal", 20_000), np.full(20_000, np.nan)]).astype(np.float16)
    np.testing.assert_array_equal(np.isnan(quantized_lut(long, 4, np.int8, None).step), [False, True])


@pytest.mark.parametrize("float_dtype", [np.float16, jnp.bfloat16])
def test_counted_bits_are_sorted_weights(float_dtype):
    weights = data("normal", 20_000).astype(float_dtype)[None]
    mass = sensitivities(weights.size)[None]
    for sensitivity in (None, mass):
        fit = quantized_lut(weights, 16, np.int8, sensitivity)
        wide = quantized_lut(weights.astype(np.float32), 16, np.int8, sensitivity, step_dtype=float_dtype)
        for a, b in zip(fit, wide, strict=True):
            np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=1e-6)


def test_weights_far_out_of_the_range_of_the_step():
    weights = data("normal", 500)[None]
    small = quantized_lut(weights * 1e-200, 4, np.int8, None, step_dtype=np.float32)
    assert small.step[0] > 0
    assert not small.lut.any()
    large = quantized_lut(weights * 1e30, 4, np.int8, None, step_dtype=np.float16)
    check(weights * 1e30, large)
    assert np.abs(entries(large)).max() > 60_000


def test_only_zeros_count():
    weights = np.float32([[0, 1, 2, 3.3, 7]])
    fit = quantized_lut(weights, 2, np.int8, np.float32([[1, 0, 0, 0, 0]]))
    check(weights, fit, np.float32([[1, 0, 0, 0, 0]]))
    assert fit.inertia[0] == 0
