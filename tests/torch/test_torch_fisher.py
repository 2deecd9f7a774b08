"""The Fisher diagonal of torch models: what a loop over single examples gives, and models that stay as they were."""

from __future__ import annotations

import copy
from collections import UserDict
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

import palettax as px
import palettax.torch
from palettax.demo.networks import FEATURE_MAP, DigitNet, torch_twin
from palettax.torch import fisher_diagonal, to_params


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.layer(self.embedding(tokens))).mean(dim=1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(11, 5), nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 11)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, tokens):
        return self.head(self.hidden(self.embedding(tokens).mean(dim=1)))


class Branching(Words):
    def hidden(self, values):
        return values.exp() if values.sum() > 0 else 2 * values


class WithItem(Words):
    def hidden(self, values):
        return values * values.detach().norm().item()


class Centred(Words):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def hidden(self, values):
        self.mean.mul_(0.5).add_(values.detach().mean(dim=0))
        return (values - self.mean).exp()


class Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        ctx.save_for_backward(values.exp())
        return values.exp()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class WithoutRule(Words):
    def hidden(self, values):
        return Exponential.apply(values)


class OutOfReach(Words):
    """vmap raises nothing here, and gives zeros: functional_call does not see a parameter in a list."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(8, 8))
        self.parts = [self.mixing]

    def hidden(self, values):
        return values @ self.parts[0]


class Stateful(Words):
    def __init__(self):
        super().__init__()
        self.last, self.calls = None, 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("latest", torch.zeros(8))

    def hidden(self, values):
        values = values if self.last is None else values + self.last.detach().mean(dim=0)
        self.last, self.latest, self.calls = values, values.mean(dim=0), self.calls + 1
        self.seen += 1
        return values


def perceptron():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 11))


def digits():
    model = torch_twin()
    model.bn1.running_mean.normal_()
    model.bn1.running_var.uniform_(0.5, 2)
    return model


def vectors(n):
    return torch.randn(n, 6), torch.randint(0, 11, (n,))


def images(n):
    return torch.randn(n, 1, 28, 28), torch.randint(0, 10, (n,))


def sentences(n):
    return torch.randint(0, 11, (n, 7)), torch.randint(0, 11, (n,))


NETWORKS = {
    "perceptron": (perceptron, vectors),
    "transformer": (Encoder, sentences),
    "lstm": (Recurrent, sentences),
    "branching": (Branching, sentences),
    "item": (WithItem, sentences),
    "buffer in place": (Centred, sentences),
    "no rule for vmap": (WithoutRule, sentences),
    "out of reach": (OutOfReach, sentences),
}
TOGETHER = ["perceptron", "transformer"]


def make(name, n):
    torch.manual_seed(0)
    network, data = NETWORKS[name]
    return network().train(), data(n)


def loss_of(model, batch):
    inputs, labels = batch
    return functional.cross_entropy(model(inputs), labels)


def cut(data, *sizes):
    ends = np.cumsum([0, *sizes])
    return [tuple(tensor[first:stop] for tensor in data) for first, stop in pairwise(ends)]


def reference(model, data, loss_fn=loss_of):
    """In float64, one example after the other, each with a model of its own."""
    data = [tensor.double() if tensor.is_floating_point() else tensor for tensor in data]
    total = {name: 0 for name, p in model.named_parameters() if p.requires_grad}
    for i in range(len(data[0])):
        own = copy.deepcopy(model).double().eval()
        parameters = {name: p for name, p in own.named_parameters() if p.requires_grad}
        loss = loss_fn(own, [tensor[i : i + 1] for tensor in data])
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        total = {name: total[name] + gradient**2 for name, gradient in zip(parameters, gradients, strict=True)}
    return {name: (sums / len(data[0])).numpy() for name, sums in total.items()}


def assert_near(found, expected, tolerance=1e-5):
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        assert np.linalg.norm(found[name] - array) <= tolerance * np.linalg.norm(array), name
        np.testing.assert_allclose(found[name], array, rtol=20 * tolerance, atol=tolerance * array.max())


@pytest.mark.parametrize(("sizes", "chunk_size"), [((13,), None), ((1,) * 13, 4), ((5, 5, 3), 2), ((8, 5), 1)])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_mean_of_the_squares_of_single_gradients(name, sizes, chunk_size):
    model, data = make(name, 13)
    expected = reference(model, data)
    assert all(array.any() for array in expected.values())
    assert_near(fisher_diagonal(model, cut(data, *sizes), loss_of, chunk_size=chunk_size), expected)


def test_convolutions_and_batch_norm():
    torch.manual_seed(0)
    model, data = digits().train(), images(6)
    assert_near(fisher_diagonal(model, cut(data, 4, 2), loss_of, chunk_size=3), reference(model, data))


@pytest.mark.parametrize("name", NETWORKS)
def test_examples_are_taken_together_where_they_can_be(name):
    model, data = make(name, 24)
    calls = 0

    def counted(model, batch):
        nonlocal calls
        calls += 1
        return loss_of(model, batch)

    fisher_diagonal(model, [data], counted, chunk_size=24)
    if name != "lstm":  # depends on the kernels that torch was built with
        assert (calls < 24) == (name in TOGETHER)


def test_what_later_examples_do_not_allow_is_done_one_by_one():
    model, data = make("perceptron", 12)

    def loss(model, batch):
        values, labels = batch
        found = loss_of(model, (values[:, :6], labels))
        return found if values.shape[1] == 6 else found * found.detach().item()

    batches = [data, (torch.cat([data[0], data[0]], dim=1), data[1])]
    first, second = (reference(model, batch, loss) for batch in batches)
    found = fisher_diagonal(model, batches, loss)
    assert_near(found, {name: (first[name] + second[name]) / 2 for name in first})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_squared_in_float32(dtype):
    model, data = make("perceptron", 9)
    model, data = model.to(dtype), (data[0].to(dtype), data[1])
    # The squares of gradients this small are no float16.
    tiny = fisher_diagonal(model, [data], lambda model, batch: 1e-3 * loss_of(model, batch))
    assert_near(
        {name: 1e6 * array for name, array in tiny.items()}, reference(model, data), 30 * torch.finfo(dtype).eps
    )


def test_float64_parameters_too():
    model, data = make("transformer", 9)
    assert_near(fisher_diagonal(model.double(), [data], loss_of), reference(model, data), 1e-6)


def test_frozen_and_unused_parameters_have_zeros():
    model, data = make("perceptron", 9)
    model.spare = nn.Linear(3, 3)
    model[0].weight.requires_grad_(False)
    forward = nn.Sequential(*[model[i] for i in range(4)])
    found = fisher_diagonal(model, [data], lambda _, batch: loss_of(forward, batch))
    assert found.keys() == model.state_dict().keys()
    assert not any(found[name].any() for name in ("0.weight", "spare.weight", "spare.bias"))
    assert_near(found, reference(forward, data))


def test_a_tied_parameter_has_one_sum_under_each_name():
    model, data = make("transformer", 9)
    found = fisher_diagonal(model, [data], loss_of)
    assert found["head.weight"] is found["embedding.weight"]
    model.requires_grad_(False).layer.linear1.requires_grad_(True)
    found = fisher_diagonal(model, [data], loss_of)
    assert found["head.weight"] is found["embedding.weight"]
    assert not found["head.weight"].any()


def test_it_is_a_sensitivity_as_it_is():
    torch.manual_seed(0)
    model, data = digits(), images(3)
    model.spare = nn.Linear(64, 64)
    params = to_params(model.state_dict())
    found = fisher_diagonal(model, [data], lambda model, batch: loss_of(model[:13], batch))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
    assert list(found) == list(params)
    assert not any(found[name].any() for name, _ in model.named_buffers())
    small = px.palettize(params, px.kmeans(2), sensitivity=found)
    blind = px.palettize(params, px.kmeans(2))

    def cost(tree, name):
        return float((found[name] * (px.depalettize(tree)[name] - params[name]) ** 2).sum())

    assert all(cost(small, name) < cost(blind, name) for name in ("conv2.weight", "dense1.weight", "dense2.weight"))
    # The buffers with tables that Core ML reads are no leaves of their own.
    px.torch.load_into(model, small)
    again = fisher_diagonal(model, [data], lambda model, batch: loss_of(model[:13], batch))
    px.palettize(to_params(model.state_dict()), px.kmeans(1), sensitivity=again)


def test_jax_finds_the_same():
    network = DigitNet(nnx.Rngs(0))
    network.bn1.mean[...] = jax.random.normal(jax.random.key(1), (32,))
    network.bn1.var[...] = jax.random.uniform(jax.random.key(2), (32,), minval=0.5, maxval=2)
    network.eval()
    random = np.random.default_rng(0)
    pixels, labels = random.normal(size=(7, 28, 28, 1)).astype(np.float32), random.integers(0, 10, 7)
    graph, params, rest = nnx.split(network, nnx.Param, ...)

    def loss(params, example):
        return -nnx.merge(graph, params, rest)(example["pixels"][None])[0, example["label"]]

    batches = [{"pixels": pixels[rows], "label": labels[rows]} for rows in (slice(0, 4), slice(4, 7))]
    fisher = px.fisher_diagonal(loss, params, batches, progress=False)
    expected = px.torch.from_flax(fisher, flattened={"dense1": FEATURE_MAP})
    leaves = px.torch.from_flax(
        nnx.state(network, nnx.Any(nnx.Param, nnx.BatchStat)), flattened={"dense1": FEATURE_MAP}
    )
    twin = px.torch.load_into(torch_twin(), leaves)
    data = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)
    found = fisher_diagonal(twin, cut(data, 3, 4), lambda model, batch: functional.nll_loss(model(batch[0]), batch[1]))
    assert expected.keys() <= found.keys()
    assert_near(found, expected, 1e-4)


def state_of(model):
    """What must not change, with the objects that must not be replaced."""
    tensors = [*model.parameters(), *model.buffers()]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = [(module, dict(vars(module)), list(vars(module))) for module in model.modules()]
    grads = [(p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad) for p in model.parameters()]
    return tensors, values, objects, grads


def assert_untouched(model, before):
    tensors, values, objects, grads = before
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name]), name
    for module, attributes, names in objects:
        assert list(vars(module)) == names
        assert all(vars(module)[name] is value for name, value in attributes.items())
    for p, (grad, value, requires_grad) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert p.requires_grad == requires_grad
        assert grad is None or torch.equal(grad, value)


class Halt(Exception):
    pass


@pytest.mark.parametrize("error", [None, Halt, KeyboardInterrupt])
@pytest.mark.parametrize("network", [Stateful, Centred, Encoder, OutOfReach])
def test_the_model_is_as_it_was(network, error):
    torch.manual_seed(0)
    model, data = network().train(), sentences(9)
    model.head.eval()
    model.embedding.weight.requires_grad_(False)
    weight = next(model.head.parameters())
    weight.grad = torch.ones_like(weight)
    before, calls = state_of(model), 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        assert not any(module.training for module in model.modules())
        found = loss_of(model, batch)
        if error is not None and calls > 4:
            raise error
        return found

    if error is None:
        fisher_diagonal(model, [data], loss, chunk_size=4)
    else:
        with pytest.raises(error):
            fisher_diagonal(model, [data], loss, chunk_size=4)
    assert_untouched(model, before)
    assert model.training
    assert not model.head.training


def test_every_example_meets_the_model_as_it_was():
    torch.manual_seed(0)
    model, data = Stateful(), sentences(9)
    expected = reference(model, data)
    for chunk_size in (1, 4, 9):
        assert_near(fisher_diagonal(model, [data], loss_of, chunk_size=chunk_size), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_grad_mode_around_it_does_not_matter(mode):
    model, data = make("perceptron", 9)
    expected, seen = reference(model, data), []

    def loader():
        seen.append(torch.is_grad_enabled())
        yield tuple(tensor.clone() for tensor in data)

    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert_near(fisher_diagonal(model, loader(), loss_of), expected)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
        assert seen == [before[0]]


class Endless(torch.utils.data.IterableDataset):
    """A loader of it has a `__len__` that raises."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return zip(*self.data, strict=True)


def test_batches_may_be_whatever_loaders_give():
    model, data = make("perceptron", 9)
    expected = fisher_diagonal(model, cut(data, 4, 4, 1), loss_of)

    def assert_same(batches, loss_fn=loss_of):
        assert_near(fisher_diagonal(model, batches, loss_fn), expected, 1e-6)

    def named(model, batch):
        return loss_of(model, (batch["x"], batch["inner"]["y"]))

    tensors = cut(data, 4, 4, 1)
    assert_same(list(map(list, tensors)))
    assert_same(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=4))
    assert_same(torch.utils.data.DataLoader(Endless(data), batch_size=4))
    assert_same([{"x": x, "inner": {"y": y}, "none": None} for x, y in tensors], named)
    assert_same([UserDict({"x": x, "inner": UserDict({"y": y})}) for x, y in tensors], named)
    joined = [torch.cat([x, y[:, None]], dim=1) for x, y in tensors]
    assert_same(joined, lambda model, batch: loss_of(model, (batch[:, :6], batch[:, 6].long())))
    assert_same(tensors, lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1], reduction="none"))


def test_no_more_samples_than_asked_for():
    model, data = make("perceptron", 13)
    found = fisher_diagonal(model, cut(data, 5, 5, 3), loss_of, num_samples=7)
    assert_near(found, reference(model, [tensor[:7] for tensor in data]))


@pytest.mark.parametrize("name", ["perceptron", "branching"])
def test_what_was_interrupted_is_taken_up_again(name, tmp_path):
    model, data = make(name, 13)
    batches, checkpoint = cut(data, 4, 4, 5), tmp_path / "fisher.safetensors"
    expected = fisher_diagonal(model, batches, loss_of)

    def interrupted():
        yield from batches[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fisher_diagonal(model, interrupted(), loss_of, checkpoint=checkpoint)
    for _ in range(2):
        found = fisher_diagonal(model, batches, loss_of, checkpoint=checkpoint)
        assert all(np.array_equal(found[name], array) for name, array in expected.items())
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(ValueError, match="was begun with other weights"):
        fisher_diagonal(model, batches, loss_of, checkpoint=checkpoint)


def test_a_checkpoint_of_other_trainable_parameters_is_refused(tmp_path):
    model, data = make("perceptron", 4)
    fisher_diagonal(model, [data], loss_of, checkpoint=tmp_path / "fisher.safetensors")
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="was begun with other weights"):
        fisher_diagonal(model, [data], loss_of, checkpoint=tmp_path / "fisher.safetensors")


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: model(batch[0]), r"loss_fn gives a tensor of \(1, 11\) for a batch of one"),
        (lambda model, batch: 1.0, "loss_fn gives float"),
        (lambda model, batch: model(batch[0]).argmax(), "loss_fn gives torch.int64"),
        (lambda model, batch: batch[0].sum(), "depends on no parameter"),
        (lambda model, batch: loss_of(model, batch).detach(), "depends on no parameter"),
        (lambda model, batch: (loss_of(model, batch) * 0 - 1).sqrt(), "batch 0, example 0: its loss is nan"),
        (lambda model, batch: (loss_of(model, batch) * 0).sqrt(), r"batch 0, example 0: its gradient.* is NaN"),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_losses_that_are_none_are_refused(loss_fn, message, chunk_size):
    model, data = make("perceptron", 6)
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(model, [data], loss_fn, chunk_size=chunk_size)


@pytest.mark.parametrize("name", ["perceptron", "out of reach"])
def test_the_example_that_is_not_finite_is_named(name):
    model, data = make(name, 13)
    scale = torch.ones(13)
    scale[9] = torch.nan
    with pytest.raises(ValueError, match="batch 1, example 4: its loss is nan; 1 of 8"):
        fisher_diagonal(model, cut((*data, scale), 5, 8), lambda model, b: b[2].squeeze() * loss_of(model, b[:2]))
    steep = torch.ones(13)
    steep[9] = 1e25

    def loss(model, batch):
        found = loss_of(model, batch[:2])
        return (batch[2].squeeze() * (found - found.detach())).sum()

    with pytest.raises(ValueError, match="batch 1, example 4: its gradient, or its square, is NaN or infinite"):
        fisher_diagonal(model, cut((*data, steep), 5, 8), loss)


def test_wrong_calls_say_what_to_do(unchecked):
    model, data = make("perceptron", 6)
    cases = [
        ((model, [], loss_of), {}, "hold no examples"),
        ((model, loss_of, [data]), {}, "dataloader is a function and loss_fn a list; data come first"),
        ((model, data[0], loss_of), {}, "batches are one Tensor"),
        ((model, [(data[0], data[1][:4])], loss_of), {}, "{'0': 6, '1': 4}"),
        ((model, [data], loss_of), {"chunk_size": 0}, "chunk_size=0"),
        ((model, [data], loss_of), {"num_samples": 0}, "num_samples=0"),
        ((loss_of, model, [data]), {}, "model is a function, not a torch.nn.Module"),
        ((copy.deepcopy(model).requires_grad_(False), [data], loss_of), {}, r"none of the 4 .*requires_grad_\(True\)"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            fisher_diagonal(*arguments, **options)


def test_a_sum_that_overflows():
    """Each square is finite."""
    with pytest.raises(ValueError, match="each of its squared gradients is finite, but not their sum"):
        fisher_diagonal(nn.Linear(1, 1, bias=False), [torch.full((4, 1), 1.5e19)], lambda model, x: model(x).sum())
