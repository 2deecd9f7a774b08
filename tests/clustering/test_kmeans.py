"""What `kmeans_lut` promises beyond optimality."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import palettax as px
from tests.tables import DTYPES, KINDS, data

METHODS = ["exact", "lloyd"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_shapes_and_dtypes(method, dtype):
    weights = data("normal", 120).astype(dtype).reshape(2, 3, 20)
    fit = px.kmeans_lut(weights, 3, method=method)
    assert fit.lut.shape == (8,)
    assert fit.indices.shape == weights.shape
    assert fit.indices.dtype == np.uint8
    assert fit.lut.dtype == (np.float64 if dtype is np.float64 else np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_indices_are_nearest_and_inertia_is_theirs(method, kind):
    weights = data(kind, 700).astype(np.float32)
    fit = px.kmeans_lut(weights, 3, method=method)
    np.testing.assert_array_equal(fit.indices, px.assign(weights, fit.lut))
    error = weights.astype(np.float64) - np.asarray(fit.lut, np.float64)[np.asarray(fit.indices)]
    assert float(fit.inertia) == pytest.approx((error**2).sum(), rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_few_distinct_values_come_back_bit_for_bit(method, dtype):
    values = np.array([-2.5, -1e-3, 0.1, 7.0]).astype(dtype)
    weights = values[np.random.default_rng(0).integers(0, 4, 100)]
    fit = px.kmeans_lut(weights, 4, method=method)
    np.testing.assert_array_equal(np.asarray(fit.lut)[np.asarray(fit.indices)].astype(dtype), weights)
    np.testing.assert_array_equal(np.asarray(fit.lut)[3:], np.full(13, values[-1], fit.lut.dtype))
    assert float(fit.inertia) == 0


@pytest.mark.parametrize("method", METHODS)
def test_scaling_by_powers_of_two_scales_the_lut_exactly(method):
    weights = data("normal", 900).astype(np.float32)
    for power in (-20, 13):
        scaled = px.kmeans_lut(weights * np.float32(2.0**power), 4, method=method)
        plain = px.kmeans_lut(weights, 4, method=method)
        np.testing.assert_allclose(
            np.asarray(scaled.lut) * 2.0**-power, plain.lut, rtol=0 if method == "exact" else 1e-5
        )


def test_order_does_not_matter():
    weights = data("normal", 900).astype(np.float32)
    order = np.random.default_rng(0).permutation(900)
    a, b = px.kmeans_lut(weights, 4), px.kmeans_lut(weights[order], 4)
    np.testing.assert_array_equal(a.lut, b.lut)
    np.testing.assert_array_equal(np.asarray(a.indices)[order], b.indices)


def test_shift():
    weights = data("grid", 900).astype(np.float32)
    a, b = px.kmeans_lut(weights, 3), px.kmeans_lut(weights + 64, 3)
    np.testing.assert_allclose(np.asarray(a.lut) + 64, b.lut, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_jit_vmap_and_eager_agree(method):
    weights = jnp.asarray(data("normal", 600).astype(np.float32).reshape(3, 4, 50))
    sensitivity = jnp.asarray(np.random.default_rng(0).random((3, 4, 50), np.float32))

    def fit(w, s):
        return px.kmeans_lut(w, 2, sensitivity=s, method=method)

    eager = [fit(w, s) for w, s in zip(weights, sensitivity, strict=True)]
    eager = jax.tree.map(lambda *rows: np.stack(rows), *eager)
    for batched in (jax.vmap(fit), jax.jit(jax.vmap(fit)), lambda w, s: jax.lax.map(lambda a: fit(*a), (w, s))):
        found = batched(weights, sensitivity)
        np.testing.assert_array_equal(found.indices, eager.indices)
        np.testing.assert_allclose(found.lut, eager.lut, rtol=1e-6)
        np.testing.assert_allclose(found.inertia, eager.inertia, rtol=1e-5)
    twice = jax.jit(jax.vmap(jax.vmap(lambda w: px.kmeans_lut(w, 2, method=method).lut)))(weights)
    np.testing.assert_allclose(twice[1, 2], px.kmeans_lut(weights[1, 2], 2, method=method).lut, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_unknown_under_jit_becomes_a_flag(method):
    fit = jax.jit(lambda w: px.kmeans_lut(w, 2, method=method))(jnp.array([1.0, jnp.nan, 2.0, 3.0, 4.0, 5.0]))
    assert not bool(fit.converged)
    assert bool(jnp.isnan(fit.lut).all())


def test_one_trace():
    traces = []

    @jax.jit
    def fit(weights):
        traces.append(1)
        return px.kmeans_lut(weights, 2).lut

    for seed in range(3):
        fit(jnp.asarray(data("normal", 50, seed).astype(np.float32)))
    assert len(traces) == 1


CONCURRENT = """
import faulthandler; faulthandler.dump_traceback_later(100, exit=True)
from concurrent.futures import ThreadPoolExecutor
import jax, jax.numpy as jnp, palettax as px
@jax.jit
def fit(weights):
    return px.kmeans_lut(jnp.sin(weights) @ weights, 2).lut
weights = jax.random.normal(jax.random.key(0), (300, 300))
alone = fit(weights)
with ThreadPoolExecutor(8) as pool:
    for lut in pool.map(lambda _: fit(weights), range(64)):
        assert (lut == alone).all()
with ThreadPoolExecutor(8) as pool:
    for lut in pool.map(lambda _: px.kmeans_lut(weights, 2).lut, range(16)):
        pass
print("done")
"""


def test_concurrent_compiled_calls_neither_deadlock_nor_disagree():
    run = subprocess.run([sys.executable, "-c", CONCURRENT], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "done", run.stderr


AT_ONCE = """
from concurrent.futures import ThreadPoolExecutor
import jax, jax.numpy as jnp, palettax as px
with ThreadPoolExecutor(8) as pool:
    fits = [pool.submit(jax.jit(lambda w, n=n: px.kmeans_lut(w + n, 1).lut), jnp.arange(9.0)) for n in range(8)]
    print(all(fit.result().shape == (2,) for fit in fits))
"""


def test_threads_that_compile_the_first_call_together():
    run = subprocess.run([sys.executable, "-c", AT_ONCE], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "True", run.stderr


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", [np.int8, np.uint32, np.float16])
def test_sensitivities_of_any_dtype_under_jit(dtype):
    weights = jnp.asarray(data("normal", 40), jnp.float32)
    sensitivity = jnp.asarray(np.arange(40) % 5, dtype)
    plain = px.kmeans_lut(weights, 2, sensitivity=sensitivity)
    compiled = jax.jit(lambda w, s: px.kmeans_lut(w, 2, sensitivity=s))(weights, sensitivity)
    np.testing.assert_array_equal(compiled.indices, plain.indices)


def test_float64_weights_beside_traced_sensitivities():
    weights = data("normal", 40)
    lut = jax.jit(lambda s: px.kmeans_lut(weights, 2, sensitivity=s).lut)(jnp.ones(40))
    np.testing.assert_array_equal(lut, px.kmeans_lut(weights.astype(np.float32), 2).lut)


def test_lloyd_descends_and_stops():
    weights = data("normal", 2000).astype(np.float32)
    fits = [px.kmeans_lut(weights, 4, method="lloyd", max_steps=m) for m in (0, 1, 2, 4, 8, 500)]
    inertias = [float(f.inertia) for f in fits]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(inertias))
    assert [bool(f.converged) for f in fits] == [False] * 5 + [True]
    assert int(fits[3].num_steps) == 4


ONE = np.ones(9, np.float32)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("weights", "nbits", "kwargs", "message"),
    [
        (np.arange(9), 4, {}, "weights are int64; only floats have a palette"),
        (np.zeros((0, 3), np.float32), 4, {}, r"weights \(0, 3\) are empty"),
        ([1.0, 2.0], 4, {}, "weights are of type list; pass a NumPy or JAX array"),
        (ONE, 5, {}, r"nbits=5; an index has one of \(1, 2, 3, 4, 6, 8\) bits"),
        (ONE, 4.0, {}, "nbits=4.0"),
        (ONE, True, {}, "nbits=True"),
        (ONE * np.float32("nan"), 4, {}, "9 NaN and 0 infinite of 9 values"),
        (ONE / np.float32("-inf") - np.float32("inf"), 4, {}, "0 NaN and 9 infinite of 9 values"),
        (ONE, 4, {"sensitivity": -ONE}, "sensitivity has 9 negative"),
        (ONE, 4, {"sensitivity": ONE[:3]}, r"sensitivity is \(3,\) and weights are \(9,\)"),
        (ONE, 4, {"sensitivity": ONE * np.float32("nan")}, "9 NaN or infinite"),
        (ONE.astype(">f4"), 4, {}, "weights are >f4; cast them to float16, bfloat16, float32 or float64"),
        (ONE, 4, {"sensitivity": ONE * 1j}, "sensitivity is complex64"),
        (ONE, 4, {"method": "elbow"}, 'choose "exact" or "lloyd"'),
        (ONE, 4, {"vector_size": 2}, "vector_size=2"),
    ],
)
def test_bad_input(weights, nbits, kwargs, message):
    with pytest.raises(ValueError, match=message):
        px.kmeans_lut(weights, nbits, **kwargs)


def test_a_failing_host_function_is_an_error_not_a_crash():
    from palettax.clustering.host import host_call

    def fails(weights, result):
        raise RuntimeError("no such luck")

    def call(w):
        return host_call(fails, [jax.ShapeDtypeStruct((), np.float32)], w)

    with pytest.raises(jax.errors.JaxRuntimeError, match="no such luck"):
        jax.block_until_ready(jax.jit(call)(jnp.ones(3)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-30, 1e38])
def test_the_ends_of_the_range(method, size):
    weights = (data("bimodal", 50) / 2 * size).astype(np.float32)
    sensitivity = np.full(50, size, np.float32)
    fit = px.kmeans_lut(weights, 1, sensitivity=sensitivity, method=method)
    plain = px.kmeans_lut((data("bimodal", 50) / 2).astype(np.float32), 1, method=method)
    assert bool(fit.converged)
    np.testing.assert_allclose(np.asarray(fit.lut, np.float64) / size, plain.lut, rtol=1e-5)
    np.testing.assert_array_equal(fit.indices, plain.indices)
