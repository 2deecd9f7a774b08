"""What differentiates, and what is constant to differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import palettax as px
from tests.tables import HARD, data, params

METHODS = ["exact", "lloyd"]


@pytest.mark.parametrize("method", METHODS)
def test_an_entry_moves_as_the_mean_of_its_cell(method):
    weights = jnp.asarray(data("normal", 200).astype(np.float32))
    sensitivity = jnp.asarray(np.random.default_rng(0).random(200, np.float32))
    slope = jnp.array([1.0, -2.0, 3.0, 5.0])

    def score(w):
        return px.kmeans_lut(w, 2, sensitivity=sensitivity, method=method).lut @ slope

    indices = px.kmeans_lut(weights, 2, sensitivity=sensitivity, method=method).indices
    total = jax.ops.segment_sum(sensitivity, indices, 4)
    for gradient in (jax.grad(score)(weights), jax.jit(jax.grad(score))(weights)):
        np.testing.assert_allclose(gradient, (slope / total)[indices] * sensitivity, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shares_of_half_precision_weights_add_up_to_one(dtype):
    """More weights in a cell than the dtype can count."""
    weights = jnp.asarray(data("normal", 20000), dtype)
    gradient = jax.grad(lambda w: px.kmeans_lut(w, 1).lut.sum())(weights).astype(jnp.float32)
    assert float(gradient.sum()) == pytest.approx(2, rel=1e-2)


def test_depalettized_weights_move_together():
    weights = jnp.asarray(data("normal", 60).astype(np.float32).reshape(6, 10))
    transform = px.kmeans(1, granularity=px.Granularity(group_size=3))
    slope = jnp.asarray(data("normal", 60, 1).astype(np.float32).reshape(6, 10))
    gradient = jax.grad(lambda w: (transform.update(w, ())[0] * slope).sum())(weights)
    indices = transform.finalize(weights, ()).indices
    for rows in (slice(0, 3), slice(3, 6)):
        for cell in (0, 1):
            members = indices[rows] == cell
            np.testing.assert_allclose(gradient[rows][members], slope[rows][members].mean(), rtol=1e-4)


OF_EACH_KIND = [
    "kmeans", "kmeans columns", "lloyd", "uniform", "unique 8 bit", "custom", "vectors rows", "chain", "masked",
    "channel scale", "int8 lut", "elements", "sparse", "by_path", "straight through",
]  # fmt: skip


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_straight_through(name):
    """`w + stop_gradient(update(w) - w)`: the palette forward, the identity backward."""
    tree = jax.tree.map(jnp.asarray, params())
    transform = HARD[name]

    def score(tree):
        snapped, _ = transform.update(tree, transform.init(tree))
        through = jax.tree.map(lambda w, q: w + jax.lax.stop_gradient(q - w), tree, snapped)
        return sum(leaf.sum() for leaf in jax.tree.leaves(through))

    for gradient in jax.tree.leaves(jax.grad(score)(tree)):
        np.testing.assert_array_equal(gradient, np.ones_like(gradient))
