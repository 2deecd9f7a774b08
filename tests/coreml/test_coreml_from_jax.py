"""JAX to Core ML without torch: every table is in the package, and the package computes what JAX does."""

import functools
import subprocess
import sys
import warnings
import zlib

import coremltools as ct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import palettax as px
from palettax.coreml import audit, from_jax, read_palettes, run
from palettax.coreml.compare import rounded
from palettax.coreml.package import load_program, operations_of
from palettax.coreml.stablehlo import TABLE
from palettax.leaf import is_palettized
from tests.leaves import assert_same, random_leaf, with_mask

IMAGE = jax.random.normal(jax.random.key(1), (1, 8, 8, 3))
WORDS = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]], jnp.int32)
FORMS = {
    "tensor": lambda shape: {},
    "outputs": lambda shape: {"groups": (*(1,) * (len(shape) - 1), 2)},
    "inputs": lambda shape: {"groups": (shape[0], *(1,) * (len(shape) - 1)), "nbits": 3},
    "scale": lambda shape: {"scale": (*(1,) * (len(shape) - 1), shape[-1])},
    "vectors": lambda shape: {"vector": (len(shape) - 1, 2)},
    "levels": lambda shape: {"lut_dtype": np.int8},
    "zeros": lambda shape: {},
}
"""Arguments of `random_leaf`."""


class Images(nn.Module):
    """Convolutions of all kinds, dense layers and attention."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(nn.relu(nn.Conv(8, (3, 3))(x))))
        x = nn.relu(nn.ConvTranspose(4, (3, 3), strides=(2, 2))(x)).reshape(1, 8, 32)
        x = nn.LayerNorm()(nn.gelu(nn.Dense(16)(x)))
        return nn.Dense(10)(x + nn.MultiHeadDotProductAttention(num_heads=4)(x))


class Words(nn.Module):
    """An embedding that is also the last layer."""

    @nn.compact
    def __call__(self, words):
        table = nn.Embed(50, 16)
        x = table(words)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        return table.attend(x + nn.Dense(16)(nn.gelu(nn.Dense(32)(x), approximate=False)))


class Both(nnx.Module):
    """The same layers in NNX, and normalization."""

    def __init__(self, rngs):
        self.conv, self.first = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 4, (3, 3), strides=2, rngs=rngs)
        self.norm, self.dense = nnx.BatchNorm(4, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
        self.last, self.table = nnx.LayerNorm(16, rngs=rngs), nnx.Embed(50, 16, rngs=rngs)

    def __call__(self, image, words):
        x = self.norm(self.up(nnx.relu(self.first(self.conv(image))))).reshape(1, 8, 32)
        x = nnx.gelu(self.dense(x)) + self.table(words)
        return self.table.attend(self.last(x + self.attention(x)))


def small_of(params, form):
    """Random params of those shapes; kernels and embeddings are palettized."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        seed = zlib.crc32(name.encode())
        if "kernel" in name or "embedding" in name:
            small = random_leaf(leaf.shape, **({"nbits": 4} | FORMS[form](leaf.shape)), seed=seed)
            return with_mask(small, kept=False) if form == "zeros" else small
        return np.random.default_rng(seed).normal(size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, params)


def check(mlmodel, small, expected, tolerance, *inputs):
    """Every palettized weight is a table, moved by nobody at run time; and the outputs are those of JAX."""
    leaves = [leaf for leaf in jax.tree.leaves(small, is_leaf=is_palettized) if is_palettized(leaf)]
    found = audit(mlmodel, small)
    assert found.identical, str(found)
    assert len(found.leaves) == len(leaves) >= 5
    for _, op in operations_of(load_program(mlmodel)):
        if op.op_type in ("transpose", "reshape", "reverse"):
            assert op.x.op is None or not op.x.op.op_type.startswith("const")
    names = [feature.name for feature in mlmodel.get_spec().description.input]
    outputs = run(mlmodel, dict(zip(names, map(np.asarray, inputs), strict=True)))
    assert abs(outputs["output"] - expected).max() <= tolerance * np.ptp(expected)


@pytest.mark.parametrize(("form", "target"), [*((form, "iOS18") for form in FORMS), ("scale", "iOS26")])
def test_linen_images(form, target):
    model = Images()
    small = small_of(jax.eval_shape(model.init, jax.random.key(0), IMAGE), form)
    expected = np.asarray(jax.jit(model.apply)(px.depalettize(small), IMAGE))
    precision = ct.precision.FLOAT32
    mlmodel = from_jax(model.apply, IMAGE, small, minimum_deployment_target=target, compute_precision=precision)
    check(mlmodel, small, expected, 1e-5, IMAGE)
    palettes = read_palettes(mlmodel)
    for path, leaf in jax.tree_util.tree_flatten_with_path(small, is_leaf=is_palettized)[0]:
        if is_palettized(leaf):
            found = palettes[".".join(key.key for key in path)]
            assert (np.asarray(found.depalettize()) == np.asarray(leaf.depalettize())).all()
            if (form, target) != ("scale", "iOS18"):  # which multiplies it into the table
                assert_same(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, leaf))


@pytest.mark.parametrize(("precision", "tolerance"), [(ct.precision.FLOAT32, 1e-5), (ct.precision.FLOAT16, 1e-2)])
def test_linen_words_in_a_closure(precision, tolerance):
    model = Words()
    small = small_of(jax.eval_shape(model.init, jax.random.key(0), WORDS), "outputs")
    expected = np.asarray(jax.jit(model.apply)(small, WORDS))
    mlmodel = from_jax(lambda words: model.apply(small, words), (WORDS,), compute_precision=precision)
    check(mlmodel, small, expected, tolerance, WORDS)
    assert [feature.name for feature in mlmodel.get_spec().description.input] == ["words"]


@pytest.mark.parametrize("form", ["outputs", "vectors"])
def test_nnx(form):
    model = Both(nnx.Rngs(0))
    small = small_of(nnx.state(model, nnx.Param), form)
    nnx.update(model, small)
    nnx.update(model, jax.tree.map(lambda v: v + jnp.linspace(0.5, 1, v.size), nnx.state(model, nnx.BatchStat)))
    mlmodel = from_jax(model, (IMAGE, WORDS), compute_precision=ct.precision.FLOAT32)
    assert not model.norm.use_running_average  # it was a copy that was put in eval mode
    model.eval()
    expected = np.asarray(nnx.jit(model)(IMAGE, WORDS))
    check(mlmodel, small, expected, 1e-5, IMAGE, WORDS)


KERNEL, CHANNELS = random_leaf((3, 3, 3, 4), 4, seed=2), jnp.linspace(0.5, 2, 4)


def conv(params, x):
    return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


ABOUT_CONVOLUTIONS = {
    "a constant that is read again": lambda y: jnp.tanh(y - CHANNELS) * CHANNELS,
    "two biases": lambda y: (y + CHANNELS) - 2 * CHANNELS,
    "a bias and a number": lambda y: (y + CHANNELS) + 1,
    "from a constant": lambda y: CHANNELS - y,
    "of every pixel": lambda y: y + jnp.arange(256.0).reshape(8, 8, 4),
    "with and without": lambda y: jnp.concatenate([y, y + CHANNELS]),
}


@pytest.mark.parametrize("kernel", [KERNEL, KERNEL.depalettize()], ids=["table", "dense"])
@pytest.mark.parametrize("name", ABOUT_CONVOLUTIONS)
def test_what_is_added_to_a_convolution(name, kernel):
    def function(params, x):
        return ABOUT_CONVOLUTIONS[name](conv(params, x))

    mlmodel = from_jax(function, IMAGE, {"w": kernel}, compute_precision=ct.precision.FLOAT32)
    expected = function({"w": jnp.asarray(kernel)}, IMAGE)
    np.testing.assert_allclose(run(mlmodel, {"x": np.asarray(IMAGE)})["output"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["table", "dense"])
def test_a_product_may_be_subtracted(kind):
    def function(x):
        return jnp.arange(16.0) - x @ weights

    weights = SMALL["a"] if kind == "table" else SMALL["a"].depalettize()
    mlmodel = from_jax(function, X, compute_precision=ct.precision.FLOAT32)
    np.testing.assert_allclose(run(mlmodel, {"x": np.asarray(X)})["output"], function(X), rtol=1e-5)


def test_lists_of_layers():
    layers = [{"w": random_leaf((16, 16), 2, seed=seed)} for seed in range(3)]
    small = {"layers": layers, "top": SMALL["a"]}

    def function(params, x):
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer["w"])
        return x @ params["top"]

    mlmodel = from_jax(function, X, small)
    found = audit(mlmodel, small)
    assert found.identical
    assert list(found.leaves) == ["layers.0.w", "layers.1.w", "layers.2.w", "top"]
    assert audit(from_jax(lambda x: x @ layers[0]["w"] @ layers[1]["w"] @ layers[2]["w"], X), layers).identical


def test_a_reshape_that_would_need_a_table_for_every_row_is_left_to_the_program():
    small = {"w": random_leaf((64, 64), 4, groups=(1, 16))}
    mlmodel = from_jax(lambda params, x: x * params["w"].reshape(4096), jnp.ones((1, 4096)), small)
    assert audit(mlmodel, small).identical
    assert read_palettes(mlmodel)["w"].nbytes < 4096


def test_loops_of_params():
    def function(params, x):
        return jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ params["a"] + x @ params["b"]), x)

    assert audit(from_jax(function, X, SMALL), SMALL).identical


def mlp(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


@pytest.mark.parametrize("form", ["tensor", "zeros"])
def test_equal_tables_in_other_layouts_keep_their_own(form):
    one = random_leaf((8, 8), mask=form == "zeros", seed=1)
    small = {"a": one, "b": one.reshape(8, 2, 4), "c": one.transpose()}

    def function(params, x):
        return (x @ params["a"]) @ params["b"].reshape(8, 8) + x @ params["c"].T + x @ params["a"]

    mlmodel = from_jax(function, jnp.ones((1, 8)), small)
    assert audit(mlmodel, small).identical
    for name, leaf in read_palettes(mlmodel).items():
        assert (leaf.indices == small[name].indices).all()


SMALL = {"a": random_leaf((16, 16), 3), "b": random_leaf((16, 16), 2, groups=(1, 4))}
X = jnp.ones((1, 16))
COMPILED = jax.jit(mlp)
CALLABLES = {
    "closure": lambda x: mlp(SMALL, x),
    "partial": functools.partial(mlp, SMALL),
    "compiled": jax.jit(lambda x: COMPILED(SMALL, x)),
    "compiled within": lambda x: COMPILED(SMALL, x),
}


@pytest.mark.parametrize("name", CALLABLES)
def test_whatever_holds_the_weights(name):
    function = CALLABLES[name]
    expected = function(X)  # traced before, without our ops
    mlmodel = from_jax(function, X, compute_precision=ct.precision.FLOAT32)
    assert audit(mlmodel, SMALL).identical
    np.testing.assert_allclose(run(mlmodel, {"x": np.asarray(X)})["output"], expected, rtol=1e-5)
    np.testing.assert_allclose(function(X), expected)


class Holder:
    """No tree, and with one that has no order."""

    def __init__(self):
        self.small, self.settings = SMALL, {"width": 16, 1: None}

    def __call__(self, x):
        return mlp(self.small, x)


@pytest.mark.parametrize("function", [Holder(), Holder().__call__], ids=["object", "method"])
def test_an_object_may_hold_the_weights(function):
    mlmodel = from_jax(function, X)
    assert audit(mlmodel, {"small": SMALL}).identical


def test_features_have_the_names_of_what_they_are():
    def function(batch, flag):
        return {"scores": mlp(SMALL, batch["x"]) + flag, "pair": (batch["y"] * 2, flag * 2)}

    mlmodel = from_jax(function, ({"x": X, "y": X}, jnp.ones(1)))
    description = mlmodel.get_spec().description
    assert [feature.name for feature in description.input] == ["batch_x", "batch_y", "flag"]
    assert sorted(feature.name for feature in description.output) == ["pair_0", "pair_1", "scores"]


def test_outputs_have_names_of_their_own():
    mlmodel = from_jax(lambda params, x: {"a_b": x @ params["a"], "a": {"b": x @ params["b"]}}, X, SMALL)
    assert sorted(run(mlmodel, {"x": np.asarray(X)})) == ["a_b", "a_b_1"]
    mlmodel = from_jax(lambda params, x: (mlp(params, x), x @ params["a"].T, params["a"]), X, SMALL)
    assert sorted(run(mlmodel, {"x": np.asarray(X)})) == ["output_0", "output_1", "output_2"]


def test_shapes_are_enough():
    mlmodel = from_jax(mlp, jax.ShapeDtypeStruct((1, 16), jnp.float32), SMALL)
    assert audit(mlmodel, SMALL).identical


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_floats(dtype):
    small = jax.tree.map(jnp.asarray, {name: random_leaf((16, 16), 2, dtype=dtype) for name in "ab"})
    params = small | {"bias": jnp.ones(16, dtype)}
    precision = ct.precision.FLOAT32
    mlmodel = from_jax(lambda p, x: mlp(p, x) + p["bias"], X.astype(dtype), params, compute_precision=precision)
    for name, leaf in read_palettes(mlmodel).items():
        assert (np.asarray(leaf.depalettize()) == np.asarray(small[name].depalettize()).astype(np.float32)).all()


def test_what_is_no_table_is_said():
    kept = random_leaf((16, 16), mask=True, kept=True, seed=1)
    with pytest.warns(UserWarning, match=r"kept values.*dense") as said:
        mlmodel = from_jax(mlp, X, {"a": kept, "b": SMALL["b"]})
    assert len(said) == 1
    assert set(read_palettes(mlmodel)) == {"b"}
    with pytest.warns(UserWarning, match=r"c: no table of the package"):
        mlmodel = from_jax(mlp, X, SMALL | {"c": SMALL["a"].transpose()})
    assert set(read_palettes(mlmodel)) == {"a", "b"}
    with warnings.catch_warnings(action="error"):
        from_jax(mlp, X, px.depalettize(SMALL))


def test_dense_leaves_keep_their_names_and_are_moved_beforehand():
    kernel, bias, tied = (
        np.random.default_rng(n).normal(size=s).astype(np.float32) for n, s in enumerate([(12, 16), 12, 16])
    )
    params = {"c": {"b": {"kernel": kernel}, "b_bias": bias}, "tied": [tied, tied]} | SMALL

    def call(params, x):
        x = x * params["tied"][0] + params["tied"][1]
        x = x @ params["a"] + x @ params["b"]
        return jnp.tanh(x @ params["c"]["b"]["kernel"].T) * params["c"]["b_bias"]

    mlmodel = from_jax(call, X, params, compute_precision=ct.precision.FLOAT32)
    constants = {op.name: op.outputs[0].val for _, op in operations_of(load_program(mlmodel)) if op.op_type == "const"}
    assert (constants["c_b_kernel"] == kernel).all() or (constants["c_b_kernel"] == kernel.T).all()
    assert (constants["c_b_bias"].ravel() == bias).all()
    assert {"c.b.kernel", "c.b_bias"} <= audit(mlmodel, params).dense.keys()
    assert {"tied_0", "tied_1"} <= constants.keys()
    found = run(mlmodel, {"x": np.asarray(X)})["output"]
    assert abs(found - call(params, X)).max() < 1e-5 * np.ptp(found)


@pytest.mark.parametrize(
    "function",
    [
        lambda p, x: jnp.take(p["a"], x.astype(int), axis=0, mode="fill", fill_value=7),
        lambda p, x: jnp.where(x > 0, x @ p["a"], p["c"]),
        lambda p, x: jnp.maximum(x @ p["a"] + p["c"], 0) * p["c"],
    ],
)
@pytest.mark.filterwarnings("ignore:.*no table of the package is this weight")
def test_constants_that_ops_broadcast_do_not_grow_with_the_batch(function):
    params, stored = SMALL | {"c": np.arange(16, dtype=np.float32)}, []
    for batch in (1, 64):
        x = np.random.default_rng(0).normal(size=(batch, 16)).astype(np.float32) * 9
        mlmodel = from_jax(function, x, params, compute_precision=ct.precision.FLOAT32)
        found, expected = run(mlmodel, {"x": x})["output"], np.asarray(function(params, jnp.asarray(x)))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        operations = operations_of(load_program(mlmodel))
        stored.append(sum(np.size(op.outputs[0].val) for _, op in operations if op.op_type == "const"))
    assert stored[0] == stored[1]


@pytest.mark.parametrize("fill", [np.finfo(np.float32).min, -1e9, -np.inf])
def test_masks_of_attention_in_float16(fill):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 4, 16))

    def attend(q, k, v):
        scores = jnp.where(jnp.tril(jnp.ones((8, 8), bool)), jnp.einsum("bqhd,bkhd->bhqk", q, k), fill)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)

    def masked(q, k, v):
        return attend(q, k, v) + jax.nn.dot_product_attention(q, k, v, is_causal=True)

    found = run(from_jax(masked, (q, k, v)), {"q": np.asarray(q), "k": np.asarray(k), "v": np.asarray(v)})["output"]
    assert abs(found - masked(q, k, v)).max() < 1e-2


def test_tables_go_back_into_a_tree():
    params = {"layers": [{"kernel": np.ones((16, 16), np.float32), "bias": np.ones(16, np.float16)}]}
    kernel = random_leaf((16, 16), groups=(4, 1), nbits=4, seed=3)
    small = {"layers": [params["layers"][0] | {"kernel": kernel}]}
    mlmodel = from_jax(lambda p, x: x @ p["layers"][0]["kernel"] + p["layers"][0]["bias"], X, small)
    found = read_palettes(mlmodel, like=params)
    assert jax.tree.structure(px.depalettize(found)) == jax.tree.structure(params)
    assert found["layers"][0]["bias"] is params["layers"][0]["bias"]
    assert_same(found["layers"][0]["kernel"], rounded(rounded(kernel, np.float16), np.float32))
    with pytest.raises(ValueError, match=r"no such leaf; did you mean 'layers.0.kernels'"):
        read_palettes(mlmodel, like={"layers": [{"kernels": params["layers"][0]["kernel"]}]})
    with pytest.raises(ValueError, match=r"\(16, 16\) in the package, and \(16,\) in `like`"):
        read_palettes(mlmodel, like={"layers": [{"kernel": params["layers"][0]["bias"]}]})


def test_features_keep_their_names_beside_leaves_of_the_same():
    weights = {name: np.eye(16, dtype=np.float32) * 2 for name in ("x", "output", "y")} | {"output_1": SMALL["a"]}
    mlmodel = from_jax(lambda p, x: {"y": ((x @ p["x"] * 3) @ p["output"] * 3) @ p["y"] @ p["output_1"]}, X, weights)
    description = mlmodel.get_spec().description
    assert [feature.name for feature in (*description.input, *description.output)] == ["x", "y"]
    mlmodel = from_jax(lambda p, x: jnp.tanh(x @ p["output"]), X, {"output": SMALL["b"]})
    assert [feature.name for feature in mlmodel.get_spec().description.output] == ["output"]
    assert set(read_palettes(mlmodel)) == {"output"}


@pytest.mark.filterwarnings("ignore:.*no table of the package is this weight")
@pytest.mark.parametrize(
    "function",
    [
        lambda p, x: x @ p["a"] * float(p["v"][3]),
        lambda p, x: (x @ p["a"]) / np.sqrt(p["v"] + 1),
        lambda p, x: x @ p["a"] if p["v"][1] > 0 else x @ p["b"],
    ],
)
def test_functions_may_see_the_values_of_dense_params(function):
    params = SMALL | {"v": np.arange(16, dtype=np.float32)}
    found = run(from_jax(function, X, params, compute_precision=ct.precision.FLOAT32), {"x": np.asarray(X)})["output"]
    np.testing.assert_allclose(found, function(params, X), rtol=1e-5)


def test_tied_leaves_stay_tied_when_their_tables_come_back():
    kernel = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    params = {"a": kernel, "b": kernel}
    small = px.palettize(params, px.kmeans(2), weight_threshold=0)
    found = read_palettes(from_jax(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], X, small), like=params)
    assert found["a"] is found["b"]


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": 1.0, "b": SMALL["b"]}, "a: it is a float in `like`"),
        ({"a": {"b": SMALL["a"]}, "a.b": SMALL["a"]}, "a.b is the name of two leaves"),
        ({}, "no such leaf"),
    ],
)
def test_trees_that_tables_do_not_go_into(like, message):
    with pytest.raises(ValueError, match=message):
        read_palettes(from_jax(mlp, X, SMALL), like=like)


def test_an_nnx_module_has_its_weights():
    module = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"Linear is an NNX module.*nnx\.merge"):
        from_jax(module, X, nnx.state(module))


def over_layers(params, x):
    layers = jax.tree.map(lambda *parts: jnp.stack(parts), params["a"], params["a"])
    return jax.lax.scan(lambda carry, layer: (jnp.tanh(carry @ layer), None), x, layers)[0]


@pytest.mark.parametrize(
    ("function", "target", "message"),
    [
        (lambda x: over_layers(SMALL, x), "iOS18", r"a palettized weight \(16, 16\) is used in a loop"),
        (lambda x: jax.lax.map(lambda row: row @ SMALL["a"], x), "iOS18", "used in a loop"),
        (lambda x: jnp.fft.fft(x @ SMALL["a"]).real, "iOS18", "cannot be converted by stablehlo-coreml"),
        (lambda x: mlp(SMALL, x), "iOS17", "converts for iOS18 or later"),
        (lambda x: mlp(SMALL, x), "iOS99", "did you mean"),
    ],
)
def test_what_cannot_be_converted_is_said(function, target, message):
    with pytest.raises(ValueError, match=message):
        from_jax(function, X, minimum_deployment_target=target)


def test_inputs_are_no_weights():
    with pytest.raises(ValueError, match="give their tree as params"):
        from_jax(mlp, (SMALL, X))


def test_the_registry_of_stablehlo_coreml_is_as_it_was():
    """It is private there: this says when it has changed."""
    from stablehlo_coreml.converter import StableHloConverter

    before = dict(StableHloConverter._composite_ops_registry)
    assert "chlo.erf" in before
    assert TABLE not in before
    from_jax(mlp, X, SMALL)
    assert StableHloConverter._composite_ops_registry == before


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import jax.numpy as jnp, numpy as np, palettax as px, palettax.coreml as coreml
small = {"w": px.PalettizedArray(np.ones((1, 1, 2, 1), np.float32), np.eye(16, dtype=np.uint8), nbits=1)}
mlmodel = coreml.from_jax(lambda params, x: x @ params["w"], jnp.ones((1, 16)), small)
config = coreml.OptimizationConfig.from_dict({"global_config": {"nbits": 2, "weight_threshold": 0}})
again = coreml.palettize_weights(coreml.decompress_weights(mlmodel), config)
outputs = coreml.run(again, {"x": np.ones((1, 16))})["output"]
print(coreml.audit(mlmodel, small).identical, (outputs == 16).all())
try:
    coreml.from_torch(None, None)
except ImportError as error:
    print(error)
"""


def test_without_torch():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=300)
    assert result.stdout.splitlines() == ["True True", "torch is not installed; run: pip install 'palettax[torch]'"], (
        result
    )
