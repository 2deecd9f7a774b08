"""The front door: which leaves it takes, which it leaves, and what it says of those it cannot take."""

import dataclasses
import typing

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import palettax as px
from palettax.leaf import is_palettized

RNG = np.random.default_rng(0)
BIG = RNG.standard_normal((8, 10)).astype(np.float32)


def test_only_strictly_larger_leaves_are_palettized():
    tree = {"at": np.zeros(2048, np.float32), "above": np.zeros(2049, np.float32)}
    small = px.palettize(tree, px.kmeans(1))
    assert small["at"] is tree["at"]
    assert is_palettized(small["above"])
    assert not is_palettized(px.palettize(BIG, px.kmeans(1), weight_threshold=80))
    assert is_palettized(px.palettize(BIG, px.kmeans(1), weight_threshold=79))


def test_what_is_left_is_the_very_same_object():
    tree = {
        "bias": np.ones(10, np.float32),
        "step": np.array(3),
        "ids": np.arange(20),
        "none": None,
        "lr": 0.1,
        "empty": np.zeros((0, 3), np.float32),
        "device": jnp.ones(3),
        "kept": BIG,
    }
    small = px.palettize({**tree, "w": BIG}, px.by_path([("^w$", px.kmeans(1))]), weight_threshold=60)
    for name, leaf in tree.items():
        assert small[name] is leaf
    assert is_palettized(small["w"])


def test_empty_leaves_stay_dense_at_any_threshold():
    tree = {"empty": np.zeros((0, 3), np.float32)}
    assert px.palettize(tree, px.kmeans(1), weight_threshold=0)["empty"] is tree["empty"]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_single_weights(shape):
    weight = np.full(shape, 0.3, np.float32)
    small = px.palettize(weight, px.kmeans(1), weight_threshold=0)
    assert small.shape == shape
    np.testing.assert_array_equal(small.depalettize(), weight)


def test_inputs_stay_as_they_are():
    tree = {"w": BIG.copy()}
    px.palettize(tree, px.kmeans(2), weight_threshold=0)
    assert tree["w"].tobytes() == BIG.tobytes()


def bad_leaf():
    bad = BIG.copy()
    bad[0, :3] = np.nan
    bad[1, :2] = np.inf, -np.inf
    return bad


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray, lambda x: x.astype(jnp.bfloat16)])
def test_nan_and_infinity_are_counted_and_named(as_array):
    tree = {"enc": [BIG, as_array(bad_leaf())]}
    message = r"leaf 'enc/1' \(8, 10\) b?float\d\d: 3 NaN and 2 infinite of 80 values; .*nonfinite=\"keep\""
    with pytest.raises(ValueError, match=message):
        px.palettize(tree, px.kmeans(2), weight_threshold=0)


def test_nan_may_be_kept():
    tree = {"enc": [BIG, bad_leaf()]}
    small = px.palettize(tree, px.kmeans(2), weight_threshold=0, nonfinite="keep")
    assert is_palettized(small["enc"][0])
    assert small["enc"][1] is tree["enc"][1]


def test_nan_in_leaves_that_are_left_is_no_concern():
    tree = {"small": np.array([np.nan], np.float32), "w": BIG}
    assert is_palettized(px.palettize(tree, px.kmeans(2), weight_threshold=10)["w"])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", ["drop", None, True])
def test_nonfinite_has_two_choices(value):
    with pytest.raises(ValueError, match=f'nonfinite={value!r}; choose "raise" or "keep"'):
        px.palettize(BIG, px.kmeans(2), nonfinite=value)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, bool, np.complex64])
def test_a_large_leaf_that_is_not_float_is_named(dtype):
    tree = {"ids": np.ones(81, dtype), "w": BIG}
    with pytest.raises(ValueError, match=rf"leaf 'ids' \(81,\) {np.dtype(dtype)}: .*only floats have a palette"):
        px.palettize(tree, px.kmeans(2), weight_threshold=80)
    assert px.palettize(tree, px.kmeans(2), weight_threshold=81)["ids"] is tree["ids"]
    rules = px.by_path([("ids", None), ("", px.kmeans(2))])
    assert px.palettize(tree, rules, weight_threshold=0)["ids"] is tree["ids"]


def test_a_group_size_that_does_not_divide_names_the_leaf():
    rows = px.Granularity(group_size=3)
    with pytest.raises(ValueError, match=r"leaf 'w' \(8, 10\) float32: group_size=3 .* axis 0 .*that do: 1, 2, 4, 8$"):
        px.palettize({"w": BIG}, px.kmeans(2, granularity=rows), weight_threshold=0)


def test_a_flax_nnx_state():
    state = nnx.state(nnx.Linear(8, 10, rngs=nnx.Rngs(0)), nnx.Param)
    rules = px.by_path([("^kernel$", px.kmeans(2))])
    small = px.palettize(state, rules, weight_threshold=20)
    assert isinstance(small, nnx.State)
    leaves = jax.tree.leaves(small, is_leaf=is_palettized)
    assert [is_palettized(leaf) for leaf in leaves] == [False, True]
    assert list(px.report(state, small, weight_threshold=20)) == ["bias", "kernel"]
    dense = px.depalettize(small)
    assert jax.tree.structure(dense) == jax.tree.structure(state)
    np.testing.assert_array_equal(dense["kernel"][...], px.kmeans(2).update(state["kernel"][...], ())[0])
    np.testing.assert_array_equal(dense["bias"][...], state["bias"][...])


def test_flax_linen_variables():
    model = flax.linen.Dense(10)
    variables = model.init(jax.random.key(0), jnp.ones((1, 8)))
    small = px.palettize(variables, px.kmeans(2), weight_threshold=20)
    assert list(px.report(variables, small)) == ["params/bias", "params/kernel"]
    dense = px.depalettize(small)
    assert len(np.unique(dense["params"]["kernel"])) == 4
    assert model.apply(dense, jnp.ones((1, 8))).shape == (1, 10)


class Pair(typing.NamedTuple):
    w: typing.Any
    b: typing.Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: typing.Any
    b: typing.Any


@pytest.mark.parametrize("make", [Pair, Layer])
def test_named_tuples_and_dataclasses(make):
    tree = {"layer": make(w=BIG, b=np.ones(3, np.float32))}
    small = px.palettize(tree, px.by_path([("layer/w", px.kmeans(2))]), weight_threshold=0)
    assert type(small["layer"]) is make
    assert is_palettized(small["layer"].w)
    assert small["layer"].b is tree["layer"].b
    assert list(px.report(tree, small)) == ["layer/w", "layer/b"]


def test_under_jit_it_is_the_same():
    tree = {"w": jnp.asarray(BIG), "b": jnp.ones(3)}

    def small(tree):
        return px.palettize(tree, px.kmeans(3, granularity=px.Granularity(group_size=4)), weight_threshold=10)

    eager, compiled = small(tree), jax.jit(small)(tree)
    assert jax.tree.structure(compiled) == jax.tree.structure(eager)
    for a, b in zip(jax.tree.leaves(compiled), jax.tree.leaves(eager), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("unchecked")  # shapes stand for arrays
def test_shapes_are_known_without_values():
    tree = {"w": jax.ShapeDtypeStruct((64, 48), np.float32), "b": jax.ShapeDtypeStruct((48,), np.float32)}
    small = jax.eval_shape(lambda t: px.palettize(t, px.kmeans(4, granularity=px.Granularity(group_size=16))), tree)
    assert small["w"].lut.shape == (4, 1, 16, 1)
    assert small["w"].indices.shape == (64, 48)
    assert small["w"].nbytes == 64 * 48 // 2 + 4 * 16 * 4
    assert small["b"].shape == (48,)


def test_sensitivity_is_that_of_each_leaf():
    tree = {"w": BIG, "b": np.ones(3, np.float32), "v": BIG.T.copy()}
    sensitivity = jax.tree.map(np.square, tree)
    small = px.palettize(tree, px.kmeans(2), sensitivity=sensitivity, weight_threshold=10)
    for name in ("w", "v"):
        fit = px.kmeans_lut(tree[name], 2, sensitivity=sensitivity[name])
        np.testing.assert_array_equal(np.ravel(small[name].lut), fit.lut)
        np.testing.assert_array_equal(small[name].indices, fit.indices)


def test_a_sensitivity_where_nothing_is_palettized_does_not_matter():
    tree = {"w": BIG, "b": np.ones(3, np.float32)}
    small = px.palettize(tree, px.kmeans(2), sensitivity={"w": np.ones_like(BIG), "b": None}, weight_threshold=10)
    assert small["b"] is tree["b"]


def test_a_sensitivity_of_another_tree():
    with pytest.raises(ValueError, match="sensitivity has another structure"):
        px.palettize({"w": BIG}, px.kmeans(2), sensitivity={"v": BIG}, weight_threshold=0)


def test_palettized_leaves_that_no_transform_acts_on_are_kept():
    once = px.palettize({"w": BIG}, px.kmeans(4), weight_threshold=0)
    assert px.palettize(once, px.identity(), weight_threshold=0)["w"] is once["w"]
    assert px.palettize(once, px.kmeans(1), weight_threshold=BIG.size)["w"] is once["w"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("transform", [px.kmeans, 4, {"w": 4}])
def test_what_is_no_transform(transform):
    with pytest.raises(ValueError, match=r"give a transform, such as kmeans\(4\)"):
        px.palettize({"w": np.ones((64, 64), np.float32)}, transform)
    with pytest.raises(ValueError, match=r"give a list of \(regex, transform or None\)|give a transform"):
        px.by_path({"w": transform} if transform is px.kmeans else [("w", transform)])


def test_a_palettized_leaf_is_palettized_anew():
    weights = {"w": np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)}
    three = px.palettize(weights, px.kmeans(3))
    again = px.palettize(three, px.kmeans(1))
    expected = px.palettize(px.depalettize(three), px.kmeans(1))
    assert again["w"].nbits == 1
    np.testing.assert_array_equal(px.depalettize(again)["w"], px.depalettize(expected)["w"])


@pytest.mark.parametrize("params", ["model.safetensors", len, flax.linen.Dense(4)], ids=["str", "function", "Linen"])
@pytest.mark.usefixtures("unchecked")
def test_params_that_are_no_tree(params):
    with pytest.raises(ValueError, match="no tree of arrays"):
        px.palettize(params, px.kmeans(4))


@pytest.mark.usefixtures("unchecked")
def test_what_tree_map_does_to_indices_is_noticed():
    small = px.palettize({"w": np.float32(np.eye(8))}, px.kmeans(1), weight_threshold=0)
    halved = jax.tree.map(lambda leaf: leaf.astype(np.float16), small)
    with pytest.raises(ValueError, match="indices are float16, not uint8"):
        px.depalettize(halved)
