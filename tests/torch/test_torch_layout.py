"""Layouts: the two functions undo each other, and torch computes with the result what flax computed."""

from __future__ import annotations

import math

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st

import palettax as px
from palettax.leaf import is_palettized
from palettax.torch import from_flax, load_into, to_flax
from tests.leaves import assert_same, forms, random_leaf


def _divisors(n):
    return st.sampled_from([d for d in range(1, n + 1) if n % d == 0])


# The strategies draw arguments and `_build` makes the leaves: beartype's checks draw random numbers of their own, which
# hypothesis forbids inside a strategy.
@st.composite
def leaf_arguments(draw, rank):
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 4, 6]), min_size=rank, max_size=rank)))
    seed = draw(st.integers(0, 99))
    if rank == 0 or draw(st.booleans()):
        return {"shape": shape, "seed": seed}
    axis = draw(st.sampled_from([None, *(a for a, n in enumerate(shape) if n > 1)]))
    indices_shape = [n // 2 if a == axis else n for a, n in enumerate(shape)]
    scale = tuple(draw(st.sampled_from([1, n])) for n in shape) if draw(st.booleans()) else None
    groups = tuple(draw(_divisors(n)) for n in indices_shape)
    vector = None if axis is None else (axis, 2)
    nbits = draw(st.sampled_from([1, 2, 3]))
    return {"shape": shape, "seed": seed, "nbits": nbits, "groups": groups, "vector": vector, "scale": scale}


def _build(layers):
    def leaf(arguments):
        if "nbits" in arguments:
            return random_leaf(**arguments)
        return np.random.default_rng(arguments["seed"]).normal(size=arguments["shape"]).astype(np.float32)

    return {layer: {name: leaf(arguments) for name, arguments in names.items()} for layer, names in layers.items()}


@st.composite
def trees(draw):
    names = st.sampled_from(["kernel", "embedding", "bias", "mean", "var", "w"])
    layers = draw(st.lists(st.dictionaries(names, st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=3))
    tree = {}
    for index, layer in enumerate(layers):
        if "kernel" in layer:
            layer.pop("embedding", None)
        tree[f"layer{index}"] = {name: draw(leaf_arguments(rank)) for name, rank in layer.items()}
    return tree


def _assert_same_tree(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(assert_same, found, expected, is_leaf=is_palettized)


@given(trees())
@settings(max_examples=60, deadline=None)
def test_to_flax_undoes_from_flax(layers):
    tree = _build(layers)
    _assert_same_tree(to_flax(from_flax(tree), tree), tree)


@given(trees())
@settings(max_examples=60, deadline=None)
def test_layout_commutes_with_depalettizing(layers):
    tree = _build(layers)
    dense = from_flax(px.depalettize(tree))
    for name, leaf in from_flax(tree).items():
        np.testing.assert_array_equal(px.depalettize(leaf), dense[name])


def test_nnx_states_and_frozen_dicts_are_trees_too():
    state = nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    assert sorted(from_flax(state)) == ["bias", "running_mean", "running_var", "weight"]
    assert type(to_flax(from_flax(state), state)) is type(state)
    frozen = FrozenDict({"a": {"kernel": np.zeros((2, 3))}})
    assert from_flax(frozen)["a.weight"].shape == (3, 2)
    assert type(to_flax(from_flax(frozen), frozen)) is FrozenDict


def _palettized(shape, groups=None):
    return random_leaf(shape, 4, groups=groups, seed=3)


def _agree(flax_output, torch_output):
    np.testing.assert_allclose(np.asarray(flax_output), torch_output.detach().numpy(), rtol=2e-5, atol=2e-5)


def _input(*shape):
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def _channels_first(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def test_dense_runs_the_same():
    params = {"kernel": _palettized((8, 6), (1, 3)), "bias": _input(6)}
    x = _input(5, 8)
    layer = load_into(torch.nn.Linear(8, 6), from_flax(params))
    _agree(linen.Dense(6).apply({"params": px.depalettize(params)}, x), layer(torch.from_numpy(x)))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("feature_groups", [1, 2])
def test_convolution_runs_the_same(rank, feature_groups):
    spatial = (3, 2, 2)[:rank]
    params = {"kernel": _palettized((*spatial, 4 // feature_groups, 6), (*(1,) * rank, 2, 3)), "bias": _input(6)}
    x = _input(2, *(7, 6, 5)[:rank], 4)
    conv = linen.Conv(6, spatial, padding="VALID", feature_group_count=feature_groups)
    kind = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[rank - 1]
    layer = load_into(kind(4, 6, spatial, groups=feature_groups), from_flax(params))
    _agree(np.moveaxis(conv.apply({"params": px.depalettize(params)}, x), -1, 1), layer(_channels_first(x)))


def test_embedding_runs_the_same():
    params = {"embedding": _palettized((10, 4), (5, 1))}
    tokens = np.array([[0, 3, 9]])
    layer = load_into(torch.nn.Embedding(10, 4), from_flax(params))
    _agree(linen.Embed(10, 4).apply({"params": px.depalettize(params)}, tokens), layer(torch.from_numpy(tokens)))


def test_batch_norm_runs_the_same():
    norm = nnx.BatchNorm(4, use_running_average=True, epsilon=1e-5, rngs=nnx.Rngs(0))
    random = {name: jnp.asarray(abs(_input(4)) + shift) for shift, name in enumerate(("scale", "bias", "mean", "var"))}
    nnx.update(norm, nnx.State({name: getattr(norm, name).replace(value) for name, value in random.items()}))
    layer = load_into(torch.nn.BatchNorm1d(4).eval(), from_flax(nnx.state(norm)))
    x = _input(5, 4)
    _agree(norm(jnp.asarray(x)), layer(torch.from_numpy(x)))


class FlaxNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(4, (3, 3), padding="SAME", name="conv1")(x))
        x = linen.max_pool(x, (2, 2), (2, 2))
        return linen.Dense(5, name="dense1")(x.reshape(x.shape[0], -1))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(2, 4, 3, padding="same")
        self.dense1 = torch.nn.Linear(3 * 2 * 4, 5)

    def forward(self, x):
        x = torch.nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        return self.dense1(x.flatten(1))


def _net(dense_groups):
    return {
        "conv1": {"kernel": _palettized((3, 3, 2, 4), (1, 1, 1, 2)), "bias": _input(4)},
        "dense1": {"kernel": _palettized((24, 5), dense_groups), "bias": _input(5)},
    }


FLATTENED = {"dense1": (3, 2, 4)}


def test_a_flattened_feature_map_runs_the_same():
    params, x = _net((1, 5)), _input(2, 6, 4, 2)
    expected = FlaxNet().apply({"params": px.depalettize(params)}, x)
    model = load_into(TorchNet(), from_flax(params, flattened=FLATTENED))
    _agree(expected, model(_channels_first(x)))
    _assert_same_tree(to_flax(from_flax(params, flattened=FLATTENED), params, flattened=FLATTENED), params)
    wrong = load_into(TorchNet(), from_flax(params))(_channels_first(x))
    assert not np.allclose(np.asarray(expected), wrong.detach().numpy(), atol=1e-2)


def test_groups_that_flattening_would_tear_are_refused_by_name():
    with pytest.raises(ValueError, match=r"dense1\.kernel: .*tear.*output axis"):
        from_flax(_net((2, 1)), flattened=FLATTENED)


@pytest.mark.parametrize(
    ("flattened", "message"),
    [
        ({"dense": (3, 2, 4)}, "'dense', which has no kernel; did you mean 'dense1'"),
        ({"dense1": (3, 2, 5)}, r"dense1\.kernel: .*30 inputs.*\(24, 5\)"),
        ({"conv1": (3, 2, 4)}, r"conv1\.kernel"),
    ],
)
def test_a_wrong_flattened_is_refused(flattened, message):
    with pytest.raises(ValueError, match=message):
        from_flax(_net((1, 1)), flattened=flattened)


@given(form=forms())
def test_every_form_of_a_leaf_goes_there_and_back(form):
    small = random_leaf(**form)
    tree = {"layer": {"kernel": small}}
    (there,) = from_flax(tree).values()
    assert there.validate().size == small.size
    assert_same(to_flax(from_flax(tree), tree)["layer"]["kernel"], small)


def test_names_that_meet_in_torch_are_refused():
    with pytest.raises(ValueError, match=r"a\.scale: another leaf is already called a\.weight"):
        from_flax({"a": {"kernel": np.zeros((2, 2)), "scale": np.zeros(2)}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda torch_params: torch_params.pop("conv1.weight"),
            r"conv1\.kernel: its torch name conv1\.weight is missing",
        ),
        (lambda torch_params: torch_params.update(extra=np.zeros(1)), "extra: no leaf of `like`"),
        (lambda torch_params: torch_params.update({"conv1.bias": np.zeros(9)}), r"conv1\.bias: .*\(9,\), not \(4,\)"),
    ],
)
def test_a_torch_dict_that_does_not_fit_the_template_is_refused(change, message):
    like = _net((1, 1))
    torch_params = from_flax(like)
    change(torch_params)
    with pytest.raises(ValueError, match=message):
        to_flax(torch_params, like)


def test_the_template_may_be_shapes():
    params = px.depalettize(_net((1, 1)))
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
    _assert_same_tree(to_flax(from_flax(params) | {"bn.num_batches_tracked": np.array(3)}, shapes), params)


def test_inputs_are_not_touched():
    params = _net((1, 5))
    before = [np.array(leaf) for leaf in jax.tree.leaves(params)]
    for leaf in from_flax(params, flattened=FLATTENED).values():
        assert math.prod(leaf.shape) > 0
    assert all(np.array_equal(one, other) for one, other in zip(jax.tree.leaves(params), before, strict=True))
