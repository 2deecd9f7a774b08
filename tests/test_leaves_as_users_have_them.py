"""Trees, containers and arrays as they come: tied, sharded, in half precision, in modules of other libraries."""

import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import palettax as px
from palettax.leaf import is_palettized, pack, unpack
from tests.leaves import assert_same
from tests.tables import DTYPES, KEY

RNG = np.random.default_rng(0)
SHARED = RNG.standard_normal((60, 40)).astype(np.float32)
OTHER = RNG.standard_normal((60, 40)).astype(np.float32)


def test_a_tied_leaf_is_clustered_once_and_stays_tied():
    calls = []

    def spy(weights):
        calls.append(weights.size)
        return [-1.0, 1.0], weights > 0

    for shared in (SHARED, jnp.asarray(SHARED)):
        del calls[:]
        small = px.palettize({"embed": shared, "head": {"kernel": shared}, "other": OTHER}, px.custom(spy))
        assert small["embed"] is small["head"]["kernel"]
        assert small["other"] is not small["embed"]
        assert calls == [2400, 2400]


def test_views_of_the_same_memory_are_tied():
    small = px.palettize([SHARED[:], SHARED.view(), SHARED.T], px.kmeans(1))
    assert small[0] is small[1]
    assert small[2] is not small[0]


def test_tensors_of_torch_are_to_be_converted(unchecked):
    import torch

    weights = {"w": torch.ones(60, 40)}
    for call in (lambda: px.palettize(weights, px.kmeans(2)), lambda: px.dkm(2).init(weights)):
        with pytest.raises(ValueError, match=r"leaf 'w' \(60, 40\) torch\.float32: it is no NumPy or JAX array"):
            call()


def test_a_tied_leaf_heeds_what_each_of_its_places_costs():
    """The left half matters in one place, the right half in the other."""
    left = np.arange(40) < 20
    sensitivity = [np.broadcast_to(half, SHARED.shape).astype(np.float32) for half in (left, ~left)]
    tied = px.palettize([SHARED, SHARED], px.kmeans(3), sensitivity=sensitivity)
    assert_same(tied[0], px.palettize(SHARED, px.kmeans(3)))


@pytest.mark.parametrize(
    "transform",
    [px.with_channel_scale(px.kmeans(2)), px.quantize_lut(px.kmeans(2), "int8"),
     px.keep_zeros(px.kmeans(2), sparse=True),
     px.masked(px.kmeans(2), lambda tree: jax.tree.map(lambda leaf: leaf > -2, tree))],
    ids=["scale", "int8", "zeros", "elements"],
)  # fmt: skip
def test_wrappers_keep_ties(transform):
    tree = {"embed": SHARED, "head": SHARED}
    small = px.palettize(tree, transform)
    assert small["embed"] is small["head"]
    assert_same(small["embed"], px.palettize({"embed": SHARED}, transform)["embed"])


def test_ties_are_counted_and_written_once(tmp_path):
    params = {"embed": SHARED, "head": SHARED, "norm": OTHER}
    small = px.palettize(params, px.kmeans(4))
    report = px.report(params, small)
    assert report["head"].tied_to == "embed"
    assert report.nbytes == small["embed"].nbytes + small["norm"].nbytes
    assert report.nbytes_before == 2 * SHARED.nbytes
    assert "tied to embed" in str(report)
    sizes = []
    for tree in (small, {"embed": small["embed"]}, {"norm": small["norm"]}):
        px.save(tmp_path / "tree.safetensors", tree)
        sizes.append((tmp_path / "tree.safetensors").stat().st_size)
    assert sizes[0] < sizes[1] + sizes[2]
    px.save(tmp_path / "tree.safetensors", small)
    loaded = px.load(tmp_path / "tree.safetensors")
    assert loaded["embed"] is loaded["head"]
    assert_same(loaded["embed"], jax.tree.map(np.asarray, small["embed"]))


def test_an_equinox_module():
    model = eqx.nn.MLP(in_size=64, out_size=64, width_size=64, depth=1, key=jax.random.key(0))
    small = px.palettize(model, px.kmeans(8))
    assert isinstance(small, eqx.nn.MLP)
    assert [is_palettized(layer.weight) for layer in small.layers] == [True, True]
    assert not any(is_palettized(layer.bias) for layer in small.layers)
    assert small.activation is model.activation
    x = jnp.ones(64)
    np.testing.assert_allclose(px.depalettize(small)(x), model(x), atol=0.05)
    assert px.report(model, small)["layers/0/weight"].nbits == 8


@pytest.mark.usefixtures("unchecked")
def test_the_size_is_known_before_any_work():
    params = {
        "kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16),
        "bias": jax.ShapeDtypeStruct((64,), np.float32),
    }
    rows = px.kmeans(4, granularity=px.Granularity(group_size=16))
    for transform, spent in (
        (rows, 4096 * 4096 // 2 + 256 * 16 * 2),
        (px.quantize_lut(rows, "int8"), 4096 * 4096 // 2 + 256 * 16 + 256 * 2),
        (px.with_channel_scale(px.kmeans(4)), 4096 * 4096 // 2 + 16 * 2 + 4096 * 2),
    ):
        small = jax.eval_shape(lambda tree, t=transform: px.palettize(tree, t), params)
        assert small["kernel"].nbytes == spent
        assert small["bias"].shape == (64,)


@pytest.mark.parametrize(
    "transform",
    [px.kmeans(2), px.kmeans(2, method="lloyd"), px.with_channel_scale(px.kmeans(2), max_steps=1),
     px.kmeans(2, granularity=px.Granularity(vector_size=2), key=jax.random.key(0))],
    ids=["exact", "lloyd", "scale", "vectors"],
)  # fmt: skip
def test_gradients_move_a_cell_as_one(transform):
    """The derivative of an entry by a weight of its cell is one over the size of the cell."""
    weights = jnp.asarray(RNG.standard_normal((8, 10)), jnp.float32)
    upstream = jnp.asarray(RNG.standard_normal((8, 10)), jnp.float32)

    def loss(w):
        return (px.depalettize(px.palettize(w, transform, weight_threshold=0)) * upstream).sum()

    found = jax.grad(loss)(weights)
    small = px.palettize(weights, transform, weight_threshold=0)
    scale = 1.0 if small.scale is None else small.scale
    parts = np.asarray(upstream * scale).reshape(8 // small.vector_size, small.vector_size, 10)
    indices = np.asarray(small.indices).reshape(parts.shape[0], 1, 10)
    expected = np.zeros_like(parts)
    for index in range(4):
        cell = np.broadcast_to(indices == index, parts.shape)
        for place in range(small.vector_size):
            where = np.zeros_like(cell)
            where[:, place] = cell[:, place]
            expected[where] = parts[where].sum() / max(where.sum(), 1)
    if small.scale is None:
        np.testing.assert_allclose(found, expected.reshape(8, 10), rtol=2e-5, atol=1e-6)
    assert np.isfinite(found).all()
    assert (found != 0).any()


SHARDED = """
import jax, numpy as np, palettax as px
from jax.sharding import Mesh, NamedSharding, PartitionSpec
mesh = Mesh(np.array(jax.devices()), ("x",))
spread = NamedSharding(mesh, PartitionSpec("x"))
weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
pairs = px.kmeans(3, granularity=px.Granularity(vector_size=2), key=jax.random.key(0))
scaled = px.with_channel_scale(px.kmeans(2))
for transform in (px.kmeans(3), px.kmeans(3, method="lloyd"), scaled, px.uniform(2), pairs):
    alone = px.palettize({"w": weights}, transform)["w"]
    small = px.palettize({"w": jax.device_put(weights, spread)}, transform)["w"]
    np.testing.assert_array_equal(small.depalettize(), alone.depalettize())
    if small.vector_size == 1:
        assert small.indices.sharding == spread
print("done", len(jax.devices()))
"""


def test_sharded_arrays_give_the_same_and_keep_their_sharding():
    command = [sys.executable, "-c", "import jax; jax.config.update('jax_num_cpu_devices', 4)\n" + SHARDED]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "done 4", run.stderr


recipes = st.fixed_dictionaries({
    "cuts": st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=3),
    "dtype": st.sampled_from(list(DTYPES)),
    "axes": st.permutations(range(3)),
    "vector_size": st.sampled_from([1, 1, 2]),
    "nbits": st.sampled_from([1, 2, 4]),
    "kind": st.sampled_from(["kmeans", "uniform", "int8", "sparse", "scale"]),
    "seed": st.integers(0, 9),
})  # fmt: skip


def leaf_and_transform(cuts, dtype, axes, vector_size, nbits, kind, seed):
    """A leaf of the shape that the cuts, (groups, half a group) an axis, describe; and a transform that suits it."""
    shape = tuple(2 * groups * size for groups, size in cuts)
    axes = [axis for axis in axes if axis < len(cuts)]
    cut = axes[: 1 + seed % len(axes)]
    granularity = px.Granularity(
        group_size=tuple(shape[a] // cuts[a][0] for a in cut), channel_axis=tuple(cut),
        vector_size=vector_size, vector_axis=axes[-1] if vector_size > 1 else None,
    )  # fmt: skip
    if vector_size > 1:
        transform = px.kmeans(nbits, granularity=granularity, key=KEY)
    else:
        inner = px.kmeans(nbits, granularity=granularity)
        transform = {
            "kmeans": inner,
            "uniform": px.uniform(nbits, granularity=granularity),
            "int8": px.quantize_lut(inner, "int8"),
            "sparse": px.keep_zeros(inner, sparse=True),
            "scale": px.with_channel_scale(inner, max_steps=1),
        }[kind]
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype]), transform


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from("abcd"), recipes, min_size=1, max_size=3))
def test_there_and_back(tmp_path_factory, drawn):
    tree, rules = {}, []
    for name, recipe in drawn.items():
        tree[name], transform = leaf_and_transform(**recipe)
        rules.append((f"^{name}$", transform))
    small = px.palettize(tree, px.by_path(rules), weight_threshold=0)
    path = tmp_path_factory.mktemp("trees") / "tree.safetensors"
    px.save(path, small)
    loaded = px.load(path)
    for name, leaf in tree.items():
        kept = jax.tree.map(np.asarray, small[name]).validate()
        assert (kept.shape, kept.dtype) == (leaf.shape, leaf.dtype)
        assert_same(loaded[name], kept)
        assert_same(np.asarray(px.depalettize(loaded)[name]), np.asarray(small[name].depalettize()))
        np.testing.assert_array_equal(
            unpack(pack(kept.indices, kept.nbits), kept.nbits, kept.indices.shape), kept.indices
        )
