"""Squares of gradients and of activations: one example at a time in float64 is the reference."""

import itertools
import os
import re
import subprocess
import sys
import time
from collections import UserDict
from functools import cache

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import palettax as px
from palettax.leaf import is_palettized

KEY = jax.random.key(0)
CLASSES = 3


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def numbers(most, *shape):
    return np.random.default_rng(1).integers(0, most, shape).astype(np.int32)


def batches_of(examples, size):
    count = len(jax.tree.leaves(examples)[0])
    return [rows(examples, start, start + size) for start in range(0, count, size)]


def rows(examples, start, stop):
    return jax.tree.map(lambda a: a[start:stop], examples)


def squares(loss, params, examples):
    """Of the gradient of each example, float64, with a first axis of examples."""
    slope = jax.jit(jax.grad(loss))
    count = len(jax.tree.leaves(examples)[0])
    each = [slope(params, jax.tree.map(lambda a, i=i: a[i], examples)) for i in range(count)]
    return jax.tree.map(lambda *g: np.square(np.stack(g).astype(np.float64)), *each)


def looped(loss, params, examples):
    return jax.tree.map(lambda s: s.mean(axis=0), squares(loss, params, examples))


def assert_near(found, expected, tolerance=1e-5):
    """Relative, and where terms cancel, to what is largest in a leaf."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance / 10 * np.abs(b).max(initial=0))


def cross_entropy(logits, label):
    return -jax.nn.log_softmax(logits)[label]


# A small model.
PARAMS = {"hidden": normal(4, 5, seed=1), "out": {"kernel": normal(5, CLASSES, seed=2), "bias": normal(CLASSES)}}
EXAMPLES = {"x": normal(12, 4, seed=3), "y": numbers(CLASSES, 12)}


def logits(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]["kernel"] + params["out"]["bias"]


def loss(params, example):
    return cross_entropy(logits(params, example["x"]), example["y"])


SQUARES = squares(loss, PARAMS, EXAMPLES)


def first(count):
    return jax.tree.map(lambda s: s[:count].mean(axis=0), SQUARES)


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.out = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2)))


@cache
def conv_net():
    """With statistics that a pass in training has left behind."""
    examples = {"image": normal(8, 6, 6, 1, seed=4), "y": numbers(CLASSES, 8)}
    model = ConvNet(nnx.Rngs(0))
    model(examples["image"])
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, example):
        return cross_entropy(nnx.merge(graph, params, rest)(example["image"][None])[0], example["y"])

    return loss, params, examples


class Transformer(nn.Module):
    """The embedding is the head, too."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        x = embed(tokens)
        x += nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
        x += nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


@cache
def transformer():
    tokens = numbers(11, 8, 6)
    model = Transformer()

    def loss(params, tokens):
        return jax.vmap(cross_entropy)(model.apply(params, tokens[:-1]), tokens[1:]).mean()

    return loss, jax.jit(model.init)(KEY, tokens[0]), tokens


@cache
def tied():
    """One array in two places."""
    shared = jnp.asarray(normal(7, 4, seed=5))

    def loss(params, example):
        return cross_entropy(params["head"] @ jnp.tanh(params["embed"][example["from"]]), example["to"])

    return loss, {"embed": shared, "head": shared}, {"from": numbers(7, 8), "to": numbers(7, 16)[8:]}


@cache
def fisher_of(make):
    loss, params, examples = make()
    return px.fisher_diagonal(loss, params, batches_of(examples, 3), micro_batch_size=2)


@pytest.mark.parametrize("make", [conv_net, transformer])
def test_it_is_a_loop_over_examples(make):
    found = fisher_of(make)
    assert_near(found, looped(*make()))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}


@given(
    count=st.integers(1, 12),
    batch=st.integers(1, 13),
    micro=st.none() | st.integers(1, 13),
    num_samples=st.none() | st.integers(1, 15),
)
@settings(max_examples=8)
def test_no_size_changes_what_is_found(count, batch, micro, num_samples):
    found = px.fisher_diagonal(
        loss, PARAMS, batches_of(rows(EXAMPLES, 0, count), batch), num_samples=num_samples, micro_batch_size=micro
    )
    assert_near(found, first(min(count, num_samples or count)))


def test_one_array_in_two_places_has_the_gradient_of_both():
    loss, params, examples = tied()
    expected = looped(lambda w, example: loss({"embed": w, "head": w}, example), params["embed"], examples)
    for shared in (params, jax.tree.map(np.asarray, params) | {"head": np.asarray(params["embed"])[:]}):
        found = px.fisher_diagonal(loss, shared, batches_of(examples, 3))
        assert found["embed"] is found["head"]
        assert_near(found["embed"], expected)
    apart = px.fisher_diagonal(loss, params | {"head": params["head"].copy()}, batches_of(examples, 3))
    assert_near(apart, looped(loss, params, examples))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, torch.from_numpy], ids=["numpy", "jax", "torch"])
def test_arrays_of_any_library(kind):
    examples, params = jax.tree.map(kind, EXAMPLES), jax.tree.map(jnp.asarray, PARAMS)
    assert_near(px.fisher_diagonal(loss, params, batches_of(examples, 5), num_samples=8), first(8))


def test_batches_of_a_data_loader():
    data = torch.utils.data.TensorDataset(torch.from_numpy(EXAMPLES["x"]), torch.from_numpy(EXAMPLES["y"]))
    loader = torch.utils.data.DataLoader(data, batch_size=5)
    found = px.fisher_diagonal(lambda params, pair: loss(params, {"x": pair[0], "y": pair[1]}), PARAMS, loader)
    assert_near(found, first(12))


def test_batches_as_tokenizers_make_them():
    """A mapping that JAX takes for a leaf."""
    batches = [UserDict(batch | {"more": UserDict(batch)}) for batch in batches_of(EXAMPLES, 5)]
    found = px.fisher_diagonal(lambda params, e: loss(params, e["more"]), PARAMS, batches, num_samples=8)
    assert_near(found, first(8))


def test_no_more_is_taken_of_an_endless_stream_than_is_wanted():
    taken = []

    def endless():
        for batch in itertools.cycle(batches_of(EXAMPLES, 4)):
            taken.append(1)
            yield batch

    assert_near(px.fisher_diagonal(loss, PARAMS, endless(), num_samples=8), first(8))
    assert len(taken) == 2


@pytest.mark.parametrize("whole", [lambda each: each, jnp.mean], ids=["of each", "mean"])
def test_a_loss_of_batches(whole):
    shapes = set()

    def of_batch(params, batch):
        shapes.add(batch["x"].shape)
        return whole(jax.vmap(cross_entropy)(logits(params, batch["x"]), batch["y"]))

    found = px.fisher_diagonal(of_batch, PARAMS, batches_of(EXAMPLES, 5), batched=True, micro_batch_size=2)
    assert_near(found, first(12))
    assert shapes == {(1, 4)}


def test_batches_are_traced_once():
    def traces(batches):
        count = []

        def counted(params, example):
            count.append(1)
            return loss(params, example)

        px.fisher_diagonal(counted, PARAMS, batches, micro_batch_size=2)
        return len(count)

    one = traces(batches_of(EXAMPLES, 5)[:1])
    assert traces(batches_of(EXAMPLES, 5)) == one
    assert traces(batches_of(EXAMPLES, 5) * 7) == one


@pytest.mark.parametrize(("micro", "batch"), [(1, 12), (5, 12), (30, 12), (None, 12)])
def test_so_many_gradients_are_in_memory_at_a_time(micro, batch):
    """As many as `vmap` makes one of."""
    widths = []

    @jax.custom_batching.custom_vmap
    def seen(x):
        return x

    @seen.def_vmap
    def _(axis_size, in_batched, x):
        widths.append(axis_size)
        return x, in_batched[0]

    def watched(params, example):
        return loss(params, example | {"x": seen(example["x"])})

    found = px.fisher_diagonal(watched, PARAMS, batches_of(EXAMPLES, batch), micro_batch_size=micro)
    assert_near(found, first(12))
    assert 1 <= max(widths) <= min(micro or batch, batch)


# Laws


def test_a_loss_of_another_unit():
    scaled = EXAMPLES | {"factor": np.full(12, -1000, np.float32)}
    found = px.fisher_diagonal(lambda params, e: e["factor"] * loss(params, e), PARAMS, batches_of(scaled, 5))
    assert_near(found, jax.tree.map(lambda f: 1000**2 * f, first(12)))


def test_batches_that_come_again_change_nothing():
    assert_near(px.fisher_diagonal(loss, PARAMS, batches_of(EXAMPLES, 5) * 3), first(12))


def test_the_order_of_examples_is_no_matter():
    order = np.random.default_rng(2).permutation(12)
    mixed = jax.tree.map(lambda a: a[order], EXAMPLES)
    assert_near(px.fisher_diagonal(loss, PARAMS, batches_of(mixed, 5)), first(12))


def test_half_the_curvature_of_a_loss_that_is_a_squared_error():
    """For a linear layer with residuals of size one it is the mean square of its inputs."""
    inputs, kernel = normal(20, 6, seed=6), normal(6, 4, seed=7)
    signs = np.sign(normal(20, 4, seed=8))

    def loss(kernel, example):
        return 0.5 * jnp.square(example["x"] @ kernel - example["y"]).sum()

    examples = {"x": inputs, "y": inputs @ kernel - signs}
    expected = np.broadcast_to(np.asarray(px.second_moment(inputs))[:, None], kernel.shape)
    assert_near(px.fisher_diagonal(loss, kernel, batches_of(examples, 7)), expected, 1e-4)


# Leaves


def test_what_the_loss_does_not_feel_is_zero():
    params = PARAMS | {"unused": normal(3), "stopped": normal(4), "empty": np.zeros((0, 3), np.float32)}

    def stopped(params, example):
        return loss(params, example) + (jax.lax.stop_gradient(params["stopped"]) * example["x"]).sum()

    found = px.fisher_diagonal(stopped, params, batches_of(EXAMPLES, 5))
    for name in ("unused", "stopped", "empty"):
        np.testing.assert_array_equal(found[name], np.zeros(params[name].shape))
    assert_near({name: found[name] for name in PARAMS}, first(12))


def test_integers_are_zero_and_what_is_no_array_is_none():
    params = PARAMS | {"step": np.arange(3), "flag": jnp.array(True), "name": "tanh", "layers": 2}
    found = px.fisher_diagonal(loss, params, [EXAMPLES])
    assert found["name"] is found["layers"] is None
    np.testing.assert_array_equal(found["step"], np.zeros(3))
    np.testing.assert_array_equal(found["flag"], 0)
    assert_near({name: found[name] for name in PARAMS}, first(12))


def test_a_loss_may_read_integers():
    params = {"w": normal(5), "order": np.array([3, 1, 2])}
    found = px.fisher_diagonal(lambda p, e: (p["w"][p["order"]] * e).sum(), params, [normal(8, 3)])
    expected = np.zeros(5)
    expected[params["order"]] = np.square(normal(8, 3)).mean(axis=0)
    assert_near(found, {"w": expected, "order": np.zeros(3)})


def test_equinox():
    model = eqx.nn.MLP(4, CLASSES, width_size=8, depth=1, key=KEY)

    def loss(model, example):
        return cross_entropy(model(example["x"]), example["y"])

    found = px.fisher_diagonal(loss, model, batches_of(EXAMPLES, 5))
    assert found.activation is None
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    expected = looped(lambda arrays, example: loss(eqx.combine(arrays, static), example), arrays, EXAMPLES)
    assert_near(found, expected)
    small = px.palettize(model, px.kmeans(2), sensitivity=found, weight_threshold=20)
    assert [is_palettized(layer.weight) for layer in small.layers] == [True, True]


def test_python_floats_are_leaves_of_their_own():
    found = px.fisher_diagonal(lambda p, x: p["a"] * x + 3 * p["b"], {"a": 2.0, "b": 2.0}, [np.array([1.0, 3.0])])
    assert found == {"a": 5.0, "b": 9.0}
    assert found["a"].dtype == np.float32


@pytest.mark.parametrize("transform", [px.kmeans(2), px.keep_zeros(px.with_channel_scale(px.kmeans(1)), sparse=True)])
def test_palettized_leaves_count_as_their_values(transform):
    small = px.palettize(PARAMS, transform, weight_threshold=10)
    assert is_palettized(small["hidden"])
    found = px.fisher_diagonal(loss, small, [EXAMPLES])
    assert_near(found, looped(loss, px.depalettize(small), EXAMPLES))
    assert px.palettize(small, px.kmeans(1), sensitivity=found, weight_threshold=10)["hidden"].nbits == 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [2.0**-14, 1.0, 2.0**12])
def test_squares_that_half_precision_has_not(dtype, size):
    """2⁻²⁸ is less than any number of float16 and 2²⁴ more, and bfloat16 has eight digits for 1 + 2⁻⁸."""
    params = {"w": jnp.ones(2, dtype)}
    examples = np.full((16, 2), size, np.float32)
    examples[::2, 1] *= 1 + 2.0**-7
    found = px.fisher_diagonal(lambda p, x: (p["w"] * x.astype(dtype)).sum(), params, batches_of(examples, 4))["w"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, size**2 * np.array([1, (1 + (1 + 2.0**-7) ** 2) / 2]))


def test_many_examples_do_not_stall():
    """16384 times 1.25: a float16 stops growing long before."""
    params = {"w": jnp.ones((), jnp.float16)}
    signs = np.sign(normal(16384)).astype(np.float16)
    found = px.fisher_diagonal(lambda p, x: p["w"] * x * 1.5, params, batches_of(signs, 512), micro_batch_size=64)["w"]
    assert_near(found, np.float64(2.25), 1e-6)


def test_double_precision():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda w: w.astype(np.float64), PARAMS) | {"hidden": jnp.asarray(PARAMS["hidden"])}
        examples = EXAMPLES | {"x": EXAMPLES["x"].astype(np.float64)}
        found = px.fisher_diagonal(loss, params, batches_of(examples, 5))
        assert found["out"]["kernel"].dtype == np.float64
        assert found["hidden"].dtype == np.float32
        expected = looped(loss, params, examples)
    assert_near(found["out"], expected["out"], 1e-12)
    assert_near(found["hidden"], expected["hidden"])


def test_inputs_stay_as_they_are():
    params, examples = jax.tree.map(np.copy, (PARAMS, EXAMPLES))
    px.fisher_diagonal(loss, params, batches_of(examples, 5))
    for a, b in zip(jax.tree.leaves((params, examples)), jax.tree.leaves((PARAMS, EXAMPLES)), strict=True):
        np.testing.assert_array_equal(a, b)


# Labels that are drawn


def drawn(params, example, key):
    return example | {"y": jax.random.categorical(key, logits(params, example["x"]))}


def test_labels_that_are_fixed_are_those_of_the_data():
    found = px.fisher_diagonal(
        loss, PARAMS, batches_of(EXAMPLES, 5), sample=lambda params, example, key: example | {"y": 1}, key=KEY
    )
    assert_near(found, looped(loss, PARAMS, EXAMPLES | {"y": np.ones(12, np.int32)}))


def test_the_fisher_information_of_softmax_regression():
    """x² p (1 - p), up to five standard deviations of what N draws scatter."""
    weights, inputs, repeats = normal(2, CLASSES, seed=1), normal(4, 2, seed=3), 8192
    found = px.fisher_diagonal(
        lambda w, example: cross_entropy(example["x"] @ w, example["y"]),
        weights,
        [{"x": np.tile(inputs, (512, 1)), "y": np.zeros(2048, np.int32)}] * (repeats // 512),
        sample=lambda w, example, key: example | {"y": jax.random.categorical(key, example["x"] @ w)},
        key=KEY,
    )
    p = np.asarray(jax.nn.softmax(inputs @ weights)).astype(np.float64)
    square = np.square(inputs.astype(np.float64))[:, :, None]
    expected = (square * (p * (1 - p))[:, None]).mean(axis=0)
    # (p - y)² is (1 - p)² with probability p, and p² otherwise.
    variance = p * (1 - p) ** 4 + (1 - p) * p**4 - (p * (1 - p)) ** 2
    deviation = np.sqrt((square**2 * variance[:, None]).mean(axis=0) / (4 * repeats))
    assert (np.abs(found - expected) < 5 * deviation).all()
    # Or the bound would say little.
    assert (deviation < 0.1 * expected).all()


def draws(batch, micro=None, key=KEY, **options):
    """The square of what was drawn for each example, over how many there are."""
    return px.fisher_diagonal(
        lambda w, example: w[example["number"]] * example["drawn"],
        np.zeros(12, np.float32),
        batches_of({"number": np.arange(12), "drawn": np.zeros(12, np.float32)}, batch),
        sample=lambda w, example, key: example | {"drawn": jax.random.normal(key)},
        key=key,
        micro_batch_size=micro,
        **options,
    )


def test_draws_depend_on_the_key_and_the_number_of_the_example_only():
    expected = draws(12)
    assert len(np.unique(expected)) == 12
    for batch, micro in [(5, 2), (1, 1)]:
        assert_near(draws(batch, micro), expected, 1e-6)
    assert (np.abs(draws(12, key=jax.random.key(1)) - expected) > 1e-4 * expected).all()
    assert_near(12 * expected[:7], 7 * draws(5, num_samples=7)[:7], 1e-6)


def test_what_is_drawn_may_depend_on_the_weights_but_has_no_gradient():
    """The derivative of w·x is x, which is w; that of w² were 2w."""
    found = px.fisher_diagonal(
        lambda w, x: w * x, np.float32(3), [np.zeros(4, np.float32)], sample=lambda w, x, key: w, key=KEY
    )
    assert found == 9


def test_a_sample_of_batches():
    """Examples are sampled one at a time, also where the loss takes batches."""
    found = px.fisher_diagonal(
        lambda params, batch: jax.vmap(cross_entropy)(logits(params, batch["x"]), batch["y"]),
        PARAMS,
        batches_of(EXAMPLES, 5),
        batched=True,
        sample=drawn,
        key=KEY,
    )
    assert_near(found, px.fisher_diagonal(loss, PARAMS, batches_of(EXAMPLES, 4), sample=drawn, key=KEY))


def test_a_sample_needs_a_key():
    with pytest.raises(ValueError, match=r"sample without a key; .* pass key=jax\.random\.key\(0\)"):
        px.fisher_diagonal(loss, PARAMS, [EXAMPLES], sample=drawn)


# Interrupted


def until(batches, count, error=KeyboardInterrupt):
    yield from batches[:count]
    raise error


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        px.fisher_diagonal(loss, PARAMS, until(batches_of(EXAMPLES, 4), 2), checkpoint=folder / "fisher")
    assert os.listdir(folder) == ["fisher"]
    return (folder / "fisher").read_bytes()


@pytest.fixture
def half(tmp_path, interrupted):
    """A checkpoint of the first eight examples."""
    path = tmp_path / "fisher.safetensors"
    path.write_bytes(interrupted)
    return path


@pytest.mark.parametrize(("batch", "num_samples"), [(4, None), (12, 10), (5, None), (5, 8), (1, 9)])
def test_it_goes_on_where_it_was_interrupted(half, batch, num_samples):
    found = px.fisher_diagonal(
        loss, PARAMS, batches_of(EXAMPLES, batch), num_samples=num_samples, checkpoint=half, micro_batch_size=2
    )
    assert_near(found, first(num_samples or 12))
    assert os.listdir(half.parent) == [half.name]


def test_examples_that_are_counted_are_passed_over(half):
    blank = jax.tree.map(np.copy, EXAMPLES)
    blank["x"][1:8] = np.nan  # but for the first, by which the file knows them
    for _ in range(2):
        assert_near(px.fisher_diagonal(loss, PARAMS, batches_of(blank, 5), checkpoint=half), first(12))
        blank["x"][1:] = np.nan  # by now all are counted


def test_other_examples_are_no_continuation(half):
    with pytest.raises(ValueError, match="begun with other weights, examples or another key"):
        px.fisher_diagonal(loss, PARAMS, batches_of(rows(EXAMPLES, 1, 12), 4), checkpoint=half)


def test_draws_go_on_as_well(tmp_path):
    path = tmp_path / "fisher"
    draws(5, checkpoint=path, num_samples=7)
    assert_near(draws(4, checkpoint=path), draws(12), 1e-6)


def test_an_error_loses_nothing(tmp_path):
    path = tmp_path / "fisher"
    bad = jax.tree.map(np.copy, EXAMPLES)
    bad["x"][9] = np.nan
    with pytest.raises(ValueError, match="batch 2, example 1"):
        px.fisher_diagonal(loss, PARAMS, batches_of(bad, 4), checkpoint=path)
    mended = jax.tree.map(lambda a, b: np.concatenate([a[:1], np.full_like(a[1:8], 0), b[8:]]), EXAMPLES, EXAMPLES)
    assert_near(px.fisher_diagonal(loss, PARAMS, [mended], checkpoint=path), first(12))


def test_the_example_is_named_as_it_stands_in_its_batch(half):
    bad = jax.tree.map(np.copy, EXAMPLES)
    bad["x"][10] = np.nan
    with pytest.raises(ValueError, match="batch 1, example 3: its loss is nan; 1 of 4 are"):
        px.fisher_diagonal(loss, PARAMS, batches_of(bad, 7), checkpoint=half)


def test_leaves_of_all_kinds_in_a_checkpoint(tmp_path):
    shared = jnp.asarray(PARAMS["out"]["kernel"])
    params = {
        "half": jnp.asarray(PARAMS["hidden"], jnp.bfloat16),
        "kernel": shared,
        "again": shared,
        "bias": PARAMS["out"]["bias"],
        "scale": 0.5,
        "step": np.arange(3),
        "empty": np.zeros((2, 0), np.float32),
    }

    def wide(p, e):
        tree = {"hidden": p["half"], "out": {"kernel": p["kernel"] + p["again"], "bias": p["scale"] * p["bias"]}}
        return loss(tree, e)

    path, whole = tmp_path / "fisher", px.fisher_diagonal(wide, params, [EXAMPLES])
    px.fisher_diagonal(wide, params, [EXAMPLES], num_samples=7, checkpoint=path)
    assert_near(px.fisher_diagonal(wide, params, [EXAMPLES], checkpoint=path), whole)


@pytest.mark.parametrize(
    "other",
    [
        lambda: ({**PARAMS, "hidden": PARAMS["hidden"] + 1e-3}, {}),
        lambda: ({"concealed": PARAMS["hidden"], "out": PARAMS["out"]}, {}),
        lambda: ({**PARAMS, "hidden": PARAMS["hidden"].reshape(1, 4, 5)}, {}),
        lambda: ({**PARAMS, "more": normal(3)}, {}),
        lambda: (PARAMS, {"key": KEY, "sample": lambda params, example, key: example}),
    ],
    ids=["values", "names", "shape", "leaves", "key"],
)
def test_a_checkpoint_of_something_else(half, other):
    params, options = other()
    before = half.read_bytes()
    with pytest.raises(
        ValueError, match=r"fisher\.safetensors' was begun with other weights, examples or another key; delete"
    ):
        px.fisher_diagonal(lambda p, e: jnp.float32(0), params, [EXAMPLES], checkpoint=half, **options)
    assert half.read_bytes() == before


def test_a_checkpoint_of_another_key(tmp_path):
    path = tmp_path / "fisher"
    draws(5, checkpoint=path)
    with pytest.raises(ValueError, match="another key"):
        draws(5, checkpoint=path, key=jax.random.key(1))


@pytest.mark.parametrize("part", [0, 1, 8, 60, 0.5, -1])
def test_a_truncated_checkpoint(half, part):
    whole = half.read_bytes()
    half.write_bytes(whole[: int(part * len(whole)) if isinstance(part, float) else part])
    with pytest.raises(ValueError, match=r"fisher\.safetensors' is no checkpoint of sensitivities .*delete it"):
        px.fisher_diagonal(loss, PARAMS, [EXAMPLES], checkpoint=half)


@pytest.mark.parametrize("names", ["w", "012"])
def test_a_checkpoint_of_someone_else(tmp_path, names):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({name: np.ones(3) for name in names}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors' .*delete it to start anew"):
        px.fisher_diagonal(loss, PARAMS, [EXAMPLES], checkpoint=path)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"model\.safetensors' is no checkpoint"):
        px.fisher_diagonal(loss, PARAMS, [EXAMPLES], checkpoint=path)


def test_fewer_examples_than_are_counted(half):
    """The mean of eight says nothing of the first five."""
    with pytest.raises(ValueError, match="the checkpoint counts 8 examples, but these are only 5; give"):
        px.fisher_diagonal(loss, PARAMS, [rows(EXAMPLES, 0, 5)], checkpoint=half)
    with pytest.raises(ValueError, match="the checkpoint counts 8 examples already, and num_samples=5"):
        px.fisher_diagonal(loss, PARAMS, [EXAMPLES], checkpoint=half, num_samples=5)


def test_a_folder_that_is_not_there_is_missed_before_the_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder for the checkpoint"):
        px.fisher_diagonal(loss, PARAMS, until([], 0), checkpoint=tmp_path / "nowhere" / "fisher")
    with pytest.raises(ValueError, match="is a folder; name a file"):
        px.fisher_diagonal(loss, PARAMS, until([], 0), checkpoint=tmp_path)


def test_a_file_is_whole_at_any_time(tmp_path):
    """After each batch a copy of it, as it is then, is good to go on from."""
    path, copies = tmp_path / "fisher", []

    def watched():
        for batch in batches_of(EXAMPLES, 4):
            copies.extend([path.read_bytes()] if path.exists() else [])
            yield batch

    px.fisher_diagonal(loss, PARAMS, watched(), checkpoint=path, save_every=0.0)
    assert os.listdir(tmp_path) == [path.name]
    assert len(copies) == 2
    for copy in copies:
        path.write_bytes(copy)
        assert_near(px.fisher_diagonal(loss, PARAMS, batches_of(EXAMPLES, 4), checkpoint=path), first(12))


KILLED = """
import sys, time, numpy as np, palettax as px

def half():
    for number in range(200):
        yield np.random.default_rng(number).standard_normal((2, 300)).astype(np.float32)
    time.sleep(300)

weights = np.random.default_rng(0).standard_normal((300, 500)).astype(np.float32)
px.fisher_diagonal(lambda w, x: (x @ w)[:400].sum(), weights, half(), checkpoint=sys.argv[1], save_every=0.0)
"""


def test_killed_at_any_time_it_goes_on(tmp_path):
    """The gradient is x in the first columns, so the squares are those of the inputs."""
    path = tmp_path / "fisher"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stderr=subprocess.PIPE, text=True) as process:
        try:
            while not path.exists():
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.01)
            time.sleep(0.3 * np.random.default_rng().random())
        finally:
            process.kill()
    inputs = [normal(2, 300, seed=number) for number in range(250)]
    weights = normal(300, 500)

    def loss(w, x):
        return (x @ w)[:400].sum()

    def rest():
        # What the file counts is passed over unseen, whatever it is; the first batch is in it for sure.
        for number, batch in enumerate(inputs):
            yield np.concatenate([batch[:1], batch[1:] * np.nan]) if number == 0 else batch

    found = px.fisher_diagonal(loss, weights, rest(), checkpoint=path)
    expected = np.zeros((300, 500))
    expected[:, :400] = np.square(np.float64(np.concatenate(inputs))).mean(axis=0)[:, None]
    assert_near(found, expected)


def test_a_bar_on_a_terminal_only(tmp_path, capsys, monkeypatch):
    px.fisher_diagonal(loss, PARAMS, batches_of(EXAMPLES, 4))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    px.fisher_diagonal(loss, PARAMS, batches_of(EXAMPLES, 4), progress=False)
    assert capsys.readouterr() == ("", "")
    px.fisher_diagonal(loss, PARAMS, batches_of(EXAMPLES, 4))
    out, err = capsys.readouterr()
    assert not out
    assert "sensitivities" in err
    assert "12/12" in err


# Devices

DEVICES = """
import sys, jax, jax.numpy as jnp, numpy as np, palettax as px
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
on = lambda *axes: NamedSharding(mesh, P(*axes))
random = np.random.default_rng(0)
params = {"w": random.standard_normal((8, 16)).astype(np.float32), "bias": np.zeros(16, np.float32)}
examples = {"x": random.standard_normal((40, 8)).astype(np.float32), "y": random.integers(0, 16, 40)}

def loss(params, example):
    return -jax.nn.log_softmax(example["x"] @ params["w"] + params["bias"])[example["y"]]

sample = lambda params, example, key: example | {"y": jax.random.randint(key, (), 0, 16)}
batches = [jax.tree.map(lambda a: a[i : i + 16], examples) for i in (0, 16, 32)]
spread = [jax.device_put(batch, on("data")) for batch in batches]
ragged = spread[:2] + [jax.tree.map(lambda a: a[32:37], examples)]
replicated = jax.device_put(params, on())
sharded = {"w": jax.device_put(params["w"], on(None, "data")), "bias": jax.device_put(params["bias"], on("data"))}

def assert_near(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * b.max())

draw = {"sample": sample, "key": jax.random.key(0)}
alone = px.fisher_diagonal(loss, params, batches, **draw)
for weights in (replicated, sharded):
    found = px.fisher_diagonal(loss, weights, spread, **draw)
    assert_near(found, alone)
    assert found["w"].sharding.is_equivalent_to(weights["w"].sharding, 2)
alone = px.fisher_diagonal(loss, params, [jax.tree.map(lambda a: a[:37], examples)])
assert_near(px.fisher_diagonal(loss, params, ragged, micro_batch_size=3), alone)
px.fisher_diagonal(loss, sharded, ragged, num_samples=21, checkpoint=sys.argv[1])
assert_near(px.fisher_diagonal(loss, replicated, ragged, checkpoint=sys.argv[1]), alone)
print("done", len(jax.devices()))
"""


def test_on_several_devices_it_is_the_same(tmp_path):
    """Examples spread over devices; weights on the host, on all devices, or spread; also in one checkpoint."""
    code = "import jax; jax.config.update('jax_num_cpu_devices', 8)\n" + DEVICES
    command = [sys.executable, "-c", code, str(tmp_path / "fisher")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "done 8", run.stderr


EXPLICIT = """
import jax, jax.numpy as jnp, numpy as np, palettax as px
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((8,), ("data",))
x = np.random.default_rng(0).standard_normal((48, 4)).astype(np.float32)
batches = [jax.device_put(part, NamedSharding(mesh, P("data"))) for part in (x, x[:16])]
for size in (None, 1, 3, 16, 17):
    found = px.fisher_diagonal(lambda w, x: x @ w, jnp.ones(4), batches, micro_batch_size=size)
    np.testing.assert_allclose(found, np.square(np.concatenate([x, x[:16]])).mean(axis=0), rtol=1e-5)
print("done", len(jax.devices()))
"""


def test_batches_on_a_mesh_as_jax_makes_it():
    code = "import jax; jax.config.update('jax_num_cpu_devices', 8)\n" + EXPLICIT
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "done 8", run.stderr


# Errors


def test_no_examples():
    for nothing in ([], iter(())):
        with pytest.raises(ValueError, match="batches hold no examples; a generator gives its batches only once"):
            px.fisher_diagonal(loss, PARAMS, nothing)
    spent = iter(batches_of(EXAMPLES, 5))
    px.fisher_diagonal(loss, PARAMS, spent)
    with pytest.raises(ValueError, match="a generator gives its batches only once"):
        px.fisher_diagonal(loss, PARAMS, spent)


@pytest.mark.parametrize("batch", [EXAMPLES, EXAMPLES["x"], jnp.asarray(EXAMPLES["x"]), torch.ones(3, 4)])
def test_a_batch_is_no_iterable_of_batches(batch):
    with pytest.raises(ValueError, match=r"batches are one \w+; give an iterable of them, such as \[batch\]"):
        px.fisher_diagonal(loss, PARAMS, batch)


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        ({"x": normal(3, 4), "y": numbers(2, 4)}, "{'x': 3, 'y': 4}"),
        ({"x": normal(3, 4), "y": np.int32(1)}, "{'x': 3, 'y': 'a int32'}"),
        ({"x": normal(0, 4)}, "{'x': 0}"),
        ({"x": [1.0]}, "{'x/0': 'a float'}"),
        ({"x": normal(3, 4), "id": ["a"]}, "{'id/0': 'a str', 'x': 3}"),
        ({}, "none"),
    ],
    ids=["unequal", "scalar", "none", "list", "words", "empty"],
)
def test_leaves_that_disagree_on_examples(batch, sizes):
    with pytest.raises(ValueError, match=re.escape(f"batch 1 has examples: {sizes}; each of its leaves must")):
        px.fisher_diagonal(loss, PARAMS, [EXAMPLES, batch])


@pytest.mark.parametrize(("dtype", "batched"), [(np.float32, True), (jnp.bfloat16, False), (np.float16, True)])
def test_a_loss_that_is_not_finite(dtype, batched):
    params, inputs = {"w": jnp.ones(2, dtype)}, np.ones((12, 2), np.float32)
    inputs[6], inputs[9] = np.nan, np.inf

    def loss(params, x):
        return (params["w"] * x.astype(dtype)).sum()

    with pytest.raises(ValueError, match="batch 1, example 1: its loss is nan; 2 of 5 are such in this batch"):
        px.fisher_diagonal(loss, params, batches_of(inputs, 5), micro_batch_size=2, batched=batched)
    with pytest.raises(ValueError, match="batch 1, example 3: its loss is inf; 1 of 4 are"):
        px.fisher_diagonal(loss, params, batches_of(np.delete(inputs, 6, axis=0)[1:], 4))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_a_gradient_that_is_not_finite(dtype):
    """The root of zero is zero; its slope is not."""
    inputs = np.array([1, 4, 9, 1, 0, 0, 1], np.float32)
    message = r"batch 1, example 0: its gradient, or its square, is NaN or infinite \(the loss is 0\); 2 of 3 are"
    with pytest.raises(ValueError, match=message):
        px.fisher_diagonal(
            lambda w, x: jnp.sqrt(w * x.astype(dtype)), jnp.ones((), dtype), batches_of(inputs, 4), micro_batch_size=2
        )


def test_a_square_that_is_not_finite():
    with pytest.raises(ValueError, match=r"batch 0, example 1: its gradient, or its square, .*the loss is 2e\+30"):
        px.fisher_diagonal(lambda w, x: w * x, np.float32(1), [np.array([1, 2e30], np.float32)])


def test_rows_that_fill_a_batch_do_no_harm():
    """Neither those behind the last example nor, in a sample, what would be drawn for them."""
    assert_near(draws(5, num_samples=12, micro=4), draws(12), 1e-6)

    def late(w, x, key):
        return x + jnp.where(jax.random.uniform(key) < 0, jnp.nan, 0)

    assert px.fisher_diagonal(lambda w, x: w * x, 1.0, [np.ones(5), np.ones(2)], sample=late, key=KEY) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda each: each, r"an array of \(3,\) for one example; it must give a number for one example \(or pass bat"),
        (lambda each: each.sum().astype(int), "int32; it must give a real number"),
        (lambda each: each.sum() * 1j, "complex64; it must give a real number"),
        (lambda each: 3, "int32; it must give a real number"),
        (lambda each: (each.sum(), each), "a tuple; it must give a real number, and nothing beside it"),
        (lambda each: None, "a NoneType; it must give a real number"),
        (lambda each: {"loss": each.sum()}, "a dict; it must give a real number"),
    ],
    ids=["array", "integer", "complex", "int", "tuple", "none", "dict"],
)
def test_a_loss_that_is_no_scalar(wrong, message):
    with pytest.raises(ValueError, match="loss_fn gives " + message):
        px.fisher_diagonal(lambda params, e: wrong(logits(params, e["x"])), PARAMS, [EXAMPLES])


def test_a_loss_of_a_batch_has_one_number_for_each():
    with pytest.raises(
        ValueError, match=r"an array of \(1, 3\) .* it must give the loss of each example, or their mean"
    ):
        px.fisher_diagonal(lambda params, e: logits(params, e["x"]), PARAMS, [EXAMPLES], batched=True)


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ({"ids": np.arange(3)}, r"\['ids'\]"),
        ({}, "none at all"),
    ],
)
def test_no_leaf_has_a_gradient(params, found):
    with pytest.raises(ValueError, match=f"params have no float leaf, only {found}; there is no gradient to square"):
        px.fisher_diagonal(loss, params, [EXAMPLES])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["micro_batch_size", "num_samples"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4"])
def test_sizes_are_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}; it must be a positive integer"):
        px.fisher_diagonal(loss, PARAMS, [EXAMPLES], **{name: value})


@pytest.mark.usefixtures("unchecked")
def test_sizes_may_be_of_numpy():
    found = px.fisher_diagonal(loss, PARAMS, [EXAMPLES], num_samples=np.int64(7), micro_batch_size=np.int32(2))
    assert_near(found, first(7))


# Activations


def mean_square(batches):
    return np.square(np.concatenate([np.float64(b).reshape(-1, b.shape[-1]) for b in batches])).mean(axis=0)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    inner=st.lists(st.integers(1, 3), max_size=2),
    features=st.integers(1, 4),
    log_scale=st.integers(-12, 12),
)
@settings(max_examples=10)
def test_the_second_moment_is_that_of_all_rows(sizes, inner, features, log_scale):
    scale = np.float32(10.0**log_scale)
    batches = [scale * normal(n, *inner, features, seed=i) for i, n in enumerate(sizes)]
    assert_near(px.second_moment(iter(batches)), mean_square(batches))


def test_the_second_moment_of_a_tree():
    """Each leaf for itself, with as many rows as it has in a batch."""
    batches = [
        {"enc": {"q": normal(n, 5, 4, seed=n), "k": jnp.asarray(normal(n, 3, seed=n))}, "out": normal(2 * n, 6, seed=n)}
        for n in (3, 1, 7)
    ]
    found = px.second_moment(batches)
    expected = jax.tree.map(lambda *leaves: mean_square(leaves), *batches)
    assert_near(found, expected)
    assert_near(px.second_moment(batches[0]), px.second_moment(batches[:1]))


def test_the_second_moment_of_one_array():
    rows = normal(6, 5, 4)
    assert_near(px.second_moment(rows), np.square(np.float64(rows)).mean(axis=(0, 1)))
    assert_near(px.second_moment(rows[0, 0]), np.square(np.float64(rows[0, 0])))
    assert_near(px.second_moment(jnp.asarray(rows)), px.second_moment([rows]))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.float32, np.float64])
def test_the_second_moment_in_single_precision(dtype):
    """300² overflows float16."""
    found = px.second_moment(np.full((5, 2), 300.0).astype(dtype))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.float32(np.dtype(dtype).type(300)) ** 2)


def test_the_second_moment_in_double_precision():
    rows = normal(50, 3, dtype=np.float64)
    with jax.enable_x64(True):
        found = px.second_moment(batches_of(rows, 7))
        assert found.dtype == np.float64
    assert_near(found, np.square(rows).mean(axis=0), 1e-14)


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        ([], "activations hold nothing"),
        ({}, "activations hold nothing"),
        ([{}], "activations hold nothing"),
        ({"a": np.arange(6).reshape(2, 3)}, r"batch 0, 'a' is int64\(2, 3\); activations are floats"),
        ({"a": np.float32(1)}, r"batch 0, 'a' is float32\(\); activations are floats"),
        ({"a": "text"}, "batch 0, 'a' is str; activations are floats"),
        ({"a": np.zeros((0, 3), np.float32)}, r"batch 0, 'a' is empty \(0, 3\); leave it out"),
        ({"a": np.zeros((3, 0), np.float32)}, r"batch 0, 'a' is empty \(3, 0\); leave it out"),
        ([normal(2, 3), normal(2, 4)], "batch 1 has other layers or features than the first"),
        ([{"a": normal(2, 3)}, {"b": normal(2, 3)}], "batch 1 has other layers or features than the first"),
        ([normal(2, 3), normal(2, 3) * np.nan], "batch 1 holds NaN or infinities"),
        (
            {"enc": [normal(2, 3), np.full((2, 3), 1e30, np.float32)]},
            "batch 0, 'enc/1' holds NaN or .* squares that are",
        ),
    ],
)
def test_what_has_no_second_moment(activations, message):
    with pytest.raises(ValueError, match=message):
        px.second_moment(activations)


# What it is for


@pytest.mark.parametrize("make", [conv_net, tied])
def test_palettes_cost_less_where_it_is_known_what_matters(make):
    """Of all palettes, those of a leaf with its sensitivity have the least Σ F (w - ŵ)²."""
    (_, params, _), fisher = make(), fisher_of(make)
    plain = px.palettize(params, px.kmeans(2), weight_threshold=10)
    aware = px.palettize(params, px.kmeans(2), sensitivity=fisher, weight_threshold=10)

    def cost(small):
        together = (jax.tree.leaves(px.depalettize(small)), jax.tree.leaves(params), jax.tree.leaves(fisher))
        return np.array([(np.float64(f) * (np.float64(a) - b) ** 2).sum() for a, b, f in zip(*together, strict=True)])

    assert sum(map(is_palettized, jax.tree.leaves(aware, is_leaf=is_palettized))) >= 2
    assert (cost(aware) <= cost(plain) * (1 + 1e-6)).all()
    assert cost(aware).sum() < cost(plain).sum()


def test_complex_leaves():
    with pytest.raises(ValueError, match="leaf 'c' is complex64; take it apart into two real leaves"):
        px.fisher_diagonal(loss, PARAMS | {"c": np.ones(2, np.complex64)}, [EXAMPLES])


def test_batches_of_many_lengths_are_not_filled_up():
    """Texts of one length share a trace; a long one is never repeated to be as many as the short ones were."""
    seen = []

    def loss(w, x):
        jax.debug.callback(lambda first: seen.append(first), x[0])
        return x @ w[: x.shape[0]]

    lengths = [(12, 4), (2, 8), (1, 8), (3, 16)]
    batches = [np.ones(shape, np.float32) for shape in lengths]
    found = px.fisher_diagonal(loss, np.ones(16, np.float32), batches)
    jax.effects_barrier()
    assert len(seen) == 12 + 2 + 2 + 3  # one filled up to two
    np.testing.assert_allclose(found, np.repeat([1, 6 / 18, 3 / 18], [4, 4, 8]), rtol=1e-6)


def test_a_finished_mean_is_not_lost_to_a_disk(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()

    def batches():
        yield EXAMPLES
        folder.rmdir()

    with pytest.warns(UserWarning, match="could not be written"):
        assert_near(px.fisher_diagonal(loss, PARAMS, batches(), checkpoint=folder / "fisher"), first(12))


def test_inputs_and_labels_are_one_batch():
    for batch in [(EXAMPLES["x"], EXAMPLES["y"]), [EXAMPLES["x"], EXAMPLES["x"][:, :1]]]:
        with pytest.raises(ValueError, match=r"batches are one \w+; give an iterable of them"):
            px.fisher_diagonal(loss, PARAMS, batch)
    x = np.ones((4, 2), np.float32)
    assert px.fisher_diagonal(lambda w, x: x @ w, np.ones(2, np.float32), (x, 3 * x)).tolist() == [5, 5]
    lengths = [x[..., None], np.ones((4, 5, 1), np.float32)]
    assert px.fisher_diagonal(lambda w, x: x.sum() * w, np.ones((), np.float32), lengths).tolist() == (4 + 25) / 2


def test_arguments_in_another_order(unchecked):
    for order in [(PARAMS, loss, [EXAMPLES]), (PARAMS, [EXAMPLES], loss)]:
        with pytest.raises(ValueError, match="the order is loss_fn, params, batches"):
            px.fisher_diagonal(*order)
    with pytest.raises(ValueError, match="a key without sample"):
        px.fisher_diagonal(loss, PARAMS, [EXAMPLES], key=jax.random.key(0))


def test_a_report_of_a_tree_with_keys():
    params = {"w": normal(64, 64), "key": jax.random.key(0)}
    found = px.fisher_diagonal(lambda params, x: x @ params["w"][0], params, [normal(3, 64)])
    small = px.palettize(params, px.kmeans(2), sensitivity=found)
    assert px.report(params, small, sensitivity=found)["w"].loss_increase > 0


def test_second_moment_of_torch_tensors():
    np.testing.assert_array_equal(px.second_moment(torch.tensor([[1.0, 2.0], [3.0, 0.0]])), [5, 2])
