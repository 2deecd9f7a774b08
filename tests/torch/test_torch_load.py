"""Loading into a module: weights and buffers on every owner, once, and nothing at all where something does not fit."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from palettax.torch import load_into, to_params
from palettax.torch.load import write_weights
from tests.leaves import LEVELS, NO_BUFFERS, assert_same, random_leaf, with_mask


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.output = torch.nn.Linear(4, 10, bias=False)
        self.output.weight = self.embedding.weight
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 4))


def _buffers(model):
    return sorted(name for name, _ in model.named_buffers() if "_COREML_" in name)


def test_the_model_given_is_returned_with_weights_and_buffers():
    model, leaf = Tied(), random_leaf((6, 4), groups=(3, 1))
    assert load_into(model, {"body": {"0": {"weight": leaf}}}) is model
    np.testing.assert_array_equal(model.body[0].weight.detach().numpy(), leaf.depalettize())
    assert_same(to_params(model.state_dict())["body.0.weight"], leaf)


def test_dense_leaves_and_buffers_load_too():
    model, mean = Tied(), np.arange(6, dtype=np.float32)
    load_into(model, {"body.1.running_mean": mean, "body.2.bias": mean[:4]})
    assert model.body[1].running_mean.tolist() == mean.tolist()
    assert model.body[2].bias.tolist() == [0, 1, 2, 3]
    assert _buffers(model) == []


def test_parameters_that_are_not_named_are_left_alone():
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    load_into(model, {"body.0.weight": random_leaf((6, 4))})
    for name, tensor in before.items():
        assert name == "body.0.weight" or torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["embedding.weight", "output.weight"])
def test_a_tied_parameter_carries_the_buffers_on_each_owner(name):
    model, leaf = Tied(), random_leaf((10, 4))
    params = to_params(load_into(model, {name: leaf}).state_dict())
    assert_same(params["embedding.weight"], leaf)
    assert_same(params["output.weight"], leaf)
    assert model.output.weight is model.embedding.weight


def test_two_values_for_one_tied_parameter_are_refused():
    leaves = {"embedding.weight": random_leaf((10, 4), seed=1), "output.weight": random_leaf((10, 4), seed=2)}
    with pytest.raises(ValueError, match=r"embedding\.weight: tied to output\.weight"):
        load_into(Tied(), leaves)


def test_loading_again_replaces_the_buffers():
    model = load_into(Tied(), {"body.0.weight": random_leaf((6, 4), vector=(1, 2), scale=(6, 1))})
    leaf = random_leaf((6, 4), nbits=3)
    load_into(model, {"body.0.weight": leaf})
    assert model.body[0].get_buffer("_COREML_/weight/compression_type").tolist() == [2]
    assert_same(to_params(model.state_dict())["body.0.weight"], leaf)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("lut_dtype", [None, np.int8, np.uint8])
def test_a_pruned_module_takes_a_table(lut_dtype, mask):
    model = Tied()
    model.body[0].register_buffer("_COREML_/weight/compression_type", torch.tensor([1]))
    leaf = random_leaf((6, 4), lut_dtype=lut_dtype, mask=mask, seed=1)
    load_into(model, {"body.0.weight": leaf})
    types = [1] * mask + [2] + [3] * (lut_dtype is not None)
    assert model.body[0].get_buffer("_COREML_/weight/compression_type").tolist() == types
    found = to_params(model.state_dict())["body.0.weight"]
    assert (found.mask is None, found.lut.dtype) == (not mask, leaf.lut.dtype)
    np.testing.assert_array_equal(found.depalettize(), leaf.depalettize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_levels_stay_in_a_parameter_of_any_dtype(dtype):
    leaf = random_leaf((6, 4), 4, scale=(6, 1), lut_dtype=np.uint8)
    leaf = dataclasses.replace(leaf, lut=np.arange(16, dtype=np.uint8).reshape(1, 1, 16, 1))
    found = to_params(load_into(Tied().to(dtype), {"body.0.weight": leaf}).state_dict())["body.0.weight"]
    np.testing.assert_array_equal(found.lut, leaf.lut)
    np.testing.assert_array_equal(found.indices, leaf.indices)
    np.testing.assert_array_equal(found.scale.astype(np.float64), leaf.scale.astype(np.float64))


def test_a_dense_weight_takes_the_table_away():
    model = load_into(Tied(), {"body.0.weight": random_leaf((6, 4))})
    dense = np.ones((6, 4), np.float32)
    load_into(model, {"body.0.weight": dense})
    assert_same(to_params(model.state_dict())["body.0.weight"], dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_table_takes_the_dtype_of_the_parameter(dtype):
    leaf = random_leaf((6, 4), scale=(6, 1))
    model = load_into(Tied().to(dtype), {"body.0.weight": leaf})
    found = to_params(model.state_dict())["body.0.weight"]
    assert model.body[0].weight.dtype == dtype
    np.testing.assert_array_equal(found.indices, leaf.indices)
    np.testing.assert_array_equal(found.lut.astype(np.float64), leaf.lut.astype(found.dtype).astype(np.float64))


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"body.0.wieght": (6, 4)}, r"body\.0\.wieght: .*did you mean 'body\.0\.weight'"),
        ({"body.0.weight": (4, 6)}, r"body\.0\.weight: .*\(4, 6\).*\(6, 4\).*from_flax"),
    ],
)
def test_nothing_is_written_where_something_does_not_fit(leaves, message):
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    good = {"embedding.weight": random_leaf((10, 4))}
    with pytest.raises(ValueError, match=message):
        load_into(model, good | {name: random_leaf(shape) for name, shape in leaves.items()})
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("form", "message"), NO_BUFFERS.values(), ids=NO_BUFFERS)
def test_nothing_is_written_where_a_form_has_no_buffers(form, message):
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    leaves = {"embedding.weight": random_leaf((10, 4)), "body": {"0": {"weight": random_leaf(**form)}}}
    with pytest.raises(ValueError, match=rf"body\.0\.weight: .*{message}"):
        load_into(model, leaves)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lut_dtype", [None, *LEVELS])
def test_weights_alone_are_written_from_every_form(lut_dtype, dtype):
    model = Tied().to(dtype)
    leaf = with_mask(random_leaf((6, 4), scale=(3, 2), lut_dtype=lut_dtype), kept=True)
    write_weights(model, {"body.0.weight": leaf})
    # The scales are powers of two: only the kept values are rounded.
    expected = leaf.depalettize().astype(np.float16 if dtype == torch.float16 else np.float32)
    np.testing.assert_array_equal(model.body[0].weight.detach().numpy(), expected)
