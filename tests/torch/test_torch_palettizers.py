"""The palettizers of torch models: what they store, how they train, and that nothing else in torch notices."""

import copy

import jax
import numpy as np
import pytest
import torch
from torch.nn.utils import prune

import palettax as px
import palettax.coreml
import palettax.torch
from palettax.torch import DKMPalettizer, DKMPalettizerConfig, PostTrainingPalettizer, PostTrainingPalettizerConfig

assert palettax.coreml


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))


def dkm(model, **options):
    return DKMPalettizer(model, DKMPalettizerConfig.from_dict({"global_config": {"weight_threshold": 10, **options}}))


def train(model, palettizer, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs = torch.randn(8, 16, generator=random)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        palettizer.step()
    return model


OPTIONS = {
    "2 bits": {"n_bits": 2},
    "groups": {"n_bits": 2, "granularity": "per_grouped_channel", "group_size": 4},
    "vectors": {"n_bits": 2, "cluster_dim": 2},
    "channel scale": {"n_bits": 2, "enable_per_channel_scale": True},
    "int8 table": {"n_bits": 2, "lut_dtype": "int8"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_post_training_is_palettize(name):
    options = OPTIONS[name]
    model = net()
    before = copy.deepcopy(model.state_dict())
    config = PostTrainingPalettizerConfig.from_dict({"global_config": options})
    small = PostTrainingPalettizer(model, config).compress()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    leaves = px.torch.to_params(small.state_dict())
    granularity = px.Granularity(options.get("group_size"), 0, options.get("cluster_dim", 1))
    key = jax.random.key(torch.initial_seed() % 2**32) if granularity.vector_size > 1 else None
    transform = px.kmeans(2, granularity=granularity, key=key)
    transform = px.with_channel_scale(transform, channel_axis=0) if name == "channel scale" else transform
    transform = px.quantize_lut(transform, "int8") if name == "int8 table" else transform
    expected = px.palettize({"0.weight": before["0.weight"].numpy()}, transform, weight_threshold=0)["0.weight"]
    np.testing.assert_array_equal(leaves["0.weight"].depalettize(), np.asarray(expected.depalettize()))


@pytest.mark.parametrize("name", OPTIONS)
def test_eval_mode_computes_with_what_is_stored(name):
    palettizer = dkm(net(), **OPTIONS[name])
    model = train(palettizer.prepare().train(), palettizer).eval()
    values = model[0].weight.detach().clone()
    small = palettizer.finalize()
    assert type(small[0]) is torch.nn.Linear
    assert torch.equal(values, small[0].weight)
    assert "0._COREML_/weight/lut" in small.state_dict()


def test_values_and_gradients_are_those_of_dkm():
    layer = net()[0]
    weights = layer.weight.detach().numpy().copy()
    palettizer = dkm(torch.nn.Sequential(layer), n_bits=2)
    model = palettizer.prepare().train()
    values = model[0].weight
    values.pow(3).sum().backward()
    transform = px.dkm(2, weight_threshold=0, max_steps=3)
    state = transform.init({"weight": weights})

    @jax.jit
    def soft(w):
        return transform.update({"weight": w}, state)[0]["weight"]

    np.testing.assert_allclose(values.detach().numpy(), soft(weights), rtol=1e-6, atol=1e-7)
    expected = jax.jit(jax.grad(lambda w: (soft(w) ** 3).sum()))(weights)
    own = model[0].parametrizations.weight.original.grad.numpy()
    np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_in_mid_training_goes_on_as_if_nothing_had_happened():
    one, other = dkm(net(), n_bits=2), dkm(net(), n_bits=2)
    model = train(one.prepare().train(), one)
    resumed = other.prepare().train()
    resumed.load_state_dict(model.state_dict())
    train(model, one)
    train(resumed, other)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def test_the_table_moves_on_once_for_each_value_of_the_weights():
    palettizer = dkm(net(), n_bits=2)
    model = palettizer.prepare().train()
    first = model[0].weight.detach().clone()
    assert torch.equal(first, model[0].weight)
    assert model[0].parametrizations.weight[0].count == 1


def test_before_the_milestone_the_weights_are_as_they_are():
    model = net()
    palettizer = dkm(model, n_bits=2, milestone=2)
    prepared = palettizer.prepare().train()
    palettizer.step()
    assert torch.equal(prepared[0].weight, model[0].weight)
    palettizer.step()
    assert not torch.equal(prepared[0].weight, model[0].weight)


def test_without_a_forward_pass_the_weights_stay_and_that_is_said():
    model = net()
    palettizer = dkm(model, n_bits=2)
    palettizer.prepare()
    with pytest.warns(UserWarning, match=r"0\.weight, 2\.weight: no forward pass"):
        small = palettizer.finalize()
    assert torch.equal(small[0].weight, model[0].weight)
    assert set(small.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("pruned_first", [True, False])
def test_pruned_weights_stay_pruned_through_a_training_run(pruned_first):
    model = net()
    if pruned_first:
        prune.l1_unstructured(model[0], "weight", 0.5)
    palettizer = dkm(model, n_bits=2)
    prepared = palettizer.prepare(inplace=True).train()
    if not pruned_first:
        prune.l1_unstructured(prepared[0], "weight", 0.5)
    train(prepared, palettizer)
    mask = prepared[0].weight_mask.clone()
    small = palettizer.finalize()
    assert ((small[0].weight != 0) == mask.bool()).all()
    assert small[0].weight.unique().numel() == 5
    assert small.state_dict()["0._COREML_/weight/compression_type"].tolist() == [1, 2]


def test_a_copy_trains_on_its_own():
    palettizer = dkm(net(), n_bits=2)
    model = train(palettizer.prepare().train(), palettizer)
    before = model[0].weight.detach().clone()
    train(copy.deepcopy(model), palettizer)
    assert torch.equal(before, model[0].weight)


def test_tied_parameters_stay_tied():
    model = torch.nn.ModuleDict({"in": torch.nn.Embedding(32, 16), "out": torch.nn.Linear(16, 32, bias=False)})
    model["out"].weight = model["in"].weight
    palettizer = dkm(model, n_bits=2, enable_per_channel_scale=True)
    prepared = palettizer.prepare().train()
    prepared["out"](prepared["in"](torch.arange(32))).sum().backward()
    small = palettizer.finalize()
    assert small["in"].weight is small["out"].weight


def test_the_package_holds_what_was_trained():
    palettizer = dkm(net(), n_bits=2, lut_dtype="int8")
    train(palettizer.prepare().train(), palettizer)
    small = palettizer.finalize()
    mlmodel = px.coreml.from_torch(small, torch.zeros(1, 16), minimum_deployment_target="iOS18")
    audit = px.coreml.audit(mlmodel, small)
    assert audit.identical
    assert len(audit.leaves) == 2


def test_meta_parameters_are_refused():
    with pytest.raises(ValueError, match=r"weight: it is on the meta device"):
        PostTrainingPalettizer(torch.nn.Linear(8, 8, device="meta")).compress()
