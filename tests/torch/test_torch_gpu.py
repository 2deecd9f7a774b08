"""Models on a GPU: they stay there, and come out as the same models on the CPU do."""

import copy

import jax
import numpy as np
import pytest
import torch

import palettax as px
import palettax.coreml  # before coremltools, whose import it keeps quiet
import palettax.torch
from palettax.torch import (
    DKMPalettizer,
    DKMPalettizerConfig,
    PostTrainingPalettizer,
    PostTrainingPalettizerConfig,
    SKMPalettizer,
    SKMPalettizerConfig,
)
from palettax.torch.tensors import to_jax, to_torch

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or jax.default_backend() != "gpu", reason="torch and JAX have no GPU in common"
)
GPU = torch.device("cuda")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))


def config_of(kind, **options):
    return kind.from_dict({"global_config": {"n_bits": 2, "weight_threshold": 10, **options}})


def train(model, palettizer, device):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    random = torch.Generator().manual_seed(1)
    for _ in range(5):
        inputs = torch.randn(8, 16, generator=random).to(device)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        palettizer.step()
    return model


def assert_on_gpu(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert not [name for name, t in tensors.items() if t.device.type != "cuda" and "_COREML_" not in name]


def test_tensors_share_memory():
    tensor = torch.arange(6.0, device=GPU).reshape(2, 3)
    array = to_jax(tensor)
    assert array.devices() == {jax.devices()[0]}
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    back = to_torch(array, GPU)
    assert back.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "per_grouped_channel", "group_size": 4},
        {"cluster_dim": 2},
        {"enable_per_channel_scale": True},
        {"lut_dtype": "int8"},
    ],
    ids=str,
)
def test_dkm_trains_there_as_it_does_on_the_cpu(net, options):
    trained = {}
    for device in (torch.device("cpu"), GPU):
        palettizer = DKMPalettizer(copy.deepcopy(net).to(device), config_of(DKMPalettizerConfig, **options))
        model = train(palettizer.prepare(), palettizer, device)
        assert model[0].weight.device.type == device.type
        trained[device.type] = palettizer.finalize()
    assert_on_gpu(trained["cuda"])
    cpu, gpu = (trained[kind].state_dict() for kind in ("cpu", "cuda"))
    for name, tensor in cpu.items():
        if "_COREML_" not in name:
            np.testing.assert_allclose(gpu[name].cpu(), tensor, rtol=1e-3, atol=1e-3)


def test_what_is_written_to_data_is_noticed():
    torch.manual_seed(0)
    palettizer = DKMPalettizer(torch.nn.Linear(16, 8, device=GPU), config_of(DKMPalettizerConfig))
    model = palettizer.prepare()
    original = model.parametrizations.weight.original
    assert torch.equal(model.weight, model.weight)
    original.data.mul_(-1)
    assert not torch.equal(model.weight, original)
    assert model.parametrizations.weight[0].count == 2
    model.eval()
    hard = model.weight.clone()
    original.data.mul_(-1)
    assert torch.equal(model.weight, palettizer.finalize().weight)
    assert not torch.equal(model.weight, hard)


def test_half_precision_trains_there(net):
    palettizer = DKMPalettizer(net.to(GPU, torch.bfloat16), config_of(DKMPalettizerConfig))
    model = palettizer.prepare()
    model(torch.ones(4, 16, device=GPU, dtype=torch.bfloat16)).float().square().mean().backward()
    assert model[0].parametrizations.weight.original.grad.dtype == torch.bfloat16
    assert len(palettizer.finalize()[0].weight.unique()) <= 4


@pytest.mark.parametrize("skm", [False, True])
def test_post_training(net, skm):
    small = {}
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(net).to(device)
        if skm:
            data = [torch.linspace(-1, 1, 64).reshape(4, 16).to(device)]
            palettizer = SKMPalettizer(model, config_of(SKMPalettizerConfig))
            small[device] = palettizer.compress(data, lambda model, x: model(x).square().mean())
        else:
            small[device] = PostTrainingPalettizer(model, config_of(PostTrainingPalettizerConfig)).compress()
    assert_on_gpu(small["cuda"])
    for ours, theirs in zip(small["cuda"].parameters(), small["cpu"].parameters(), strict=True):
        if skm:  # gradients are summed in another order
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(ours.cpu(), theirs)


def test_from_torch_converts_it(net):
    inputs = torch.ones(1, 16)
    small = PostTrainingPalettizer(net, config_of(PostTrainingPalettizerConfig)).compress()
    packages = [
        px.coreml.from_torch(model, example, minimum_deployment_target="iOS18")
        for model, example in ((small, inputs), (copy.deepcopy(small).to(GPU), inputs.to(GPU)))
    ]
    ours, theirs = map(px.coreml.read_palettes, packages)
    assert set(ours) == set(theirs) == {"0.weight", "2.weight"}
    for name in ours:
        np.testing.assert_array_equal(ours[name].indices, theirs[name].indices)
        np.testing.assert_array_equal(ours[name].lut, theirs[name].lut)
