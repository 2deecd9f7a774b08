"""`uniform_lut` and `unique_lut`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import palettax as px
from tests.tables import DTYPES, KINDS, data


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_uniform(kind, dtype):
    weights = data(kind, 200).astype(dtype)
    fit = px.uniform_lut(weights, 4)
    lut = np.asarray(fit.lut, np.float64)
    assert lut[0] == weights.min()
    assert lut[-1] == weights.max()
    steps = np.diff(lut)
    np.testing.assert_allclose(steps, steps.mean(), atol=4e-7 * np.abs(lut).max())
    np.testing.assert_array_equal(fit.indices, px.assign(weights, fit.lut))


def test_uniform_over_the_whole_range_of_float32():
    weights = np.array([-3e38, 0.0, 3e38], np.float32)
    assert np.isfinite(px.uniform_lut(weights, 2).lut).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("distinct", "nbits"), [(1, 1), (2, 1), (3, 2), (5, 3), (16, 4), (17, 6), (65, 8), (256, 8)])
def test_unique_picks_the_fewest_bits_and_loses_nothing(distinct, nbits, dtype):
    values = (np.arange(distinct) - 7.0).astype(dtype)
    weights = np.random.default_rng(0).permutation(np.concatenate([values, values[: distinct // 2]]))
    fit = px.unique_lut(weights)
    assert bool(fit.converged)
    assert fit.lut.shape == (2**nbits,)
    np.testing.assert_array_equal(np.asarray(fit.lut)[np.asarray(fit.indices)].astype(dtype), weights)


def test_unique_that_does_not_fit_says_so():
    weights = np.arange(300, dtype=np.float32)
    assert not bool(px.unique_lut(weights).converged)
    assert not bool(px.unique_lut(weights[:5], 2).converged)
    assert bool(px.unique_lut(weights[:4], 2).converged)


def test_unique_merges_the_zeros():
    fit = px.unique_lut(np.array([-0.0, 0.0, 1.0], np.float32))
    assert fit.lut.tolist() == [0.0, 1.0]
    assert not np.signbit(np.asarray(fit.lut)).any()


@pytest.mark.parametrize("fit", [lambda w: px.uniform_lut(w, 3), lambda w: px.unique_lut(w, 3)])
def test_jit_vmap_and_eager_agree(fit):
    weights = jnp.asarray(data("grid", 60).astype(np.float32).reshape(10, 6))
    eager = jax.tree.map(lambda *rows: np.stack(rows), *map(fit, weights))
    for found in (jax.vmap(fit)(weights), jax.jit(jax.vmap(fit))(weights)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, eager)


def test_unique_cannot_count_under_jit():
    with pytest.raises(ValueError, match="unknown under jit; pass nbits"):
        jax.jit(lambda w: px.unique_lut(w))(jnp.ones(3))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("fit", [lambda w: px.uniform_lut(w, 3), px.unique_lut])
def test_bad_input(fit):
    for weights, message in (
        (np.arange(3), "int64"),
        (np.zeros(0, np.float32), "empty"),
        (np.float32([np.inf]), "1 inf"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(weights)
