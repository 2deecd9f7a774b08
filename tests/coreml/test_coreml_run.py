"""`run` and `as_function`: what a package computes is what the torch model computed."""

import functools

import coremltools as ct
import numpy as np
import pytest
import torch
from coreml_programs import convert, model, normal, outputs
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types

import palettax as px
from palettax.coreml import (
    OptimizationConfig,
    as_function,
    decompress_weights,
    from_torch,
    palettize_weights,
    run,
    save_package,
)
from palettax.coreml.scoped import quiet
from palettax.demo.networks import torch_twin


class Residual(torch.nn.Module):
    """Convolutions, whole and for each channel, with norms and a sum."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 7, 2, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.pool = torch.nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.deep = torch.nn.Sequential(
            torch.nn.Conv2d(8, 8, 3, 1, 1, groups=8), torch.nn.Conv2d(8, 8, 1), torch.nn.ReLU6()
        )
        self.up = torch.nn.ConvTranspose2d(8, 4, 2, 2)
        self.head = torch.nn.Linear(4, 10)

    def forward(self, images):
        x = self.pool(self.stem(images))
        return self.head(self.up(x + self.deep(x)).mean(dim=(2, 3)))


class Vision(torch.nn.Module):
    """A small vision transformer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 32, 4, 4)
        self.place = torch.nn.Parameter(0.02 * torch.randn(1, 17, 32))
        self.token = torch.nn.Parameter(torch.zeros(1, 1, 32))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(32) for _ in range(3))
        self.attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norms[1](x))
        return self.norms[2](x)[:, 0].softmax(-1)


class Words(torch.nn.Module):
    """Embeddings, an LSTM both ways, and logits by the embeddings."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.lstm = torch.nn.LSTM(16, 8, bidirectional=True, batch_first=True)

    def forward(self, tokens):
        return self.lstm(self.embed(tokens))[0][:, -1] @ self.embed.weight.T


IMAGE = torch.from_numpy(normal(1, 3, 16, 16))
NETWORKS = {
    "MNIST": (torch_twin, torch.from_numpy(normal(1, 1, 28, 28))),
    "residual": (Residual, IMAGE),
    "vision transformer": (Vision, IMAGE),
    "LSTM": (Words, torch.tensor([[3, 1, 4, 1, 5, 9]], dtype=torch.int32)),
}


@functools.cache
def network(name):
    torch.manual_seed(0)
    made, inputs = NETWORKS[name]
    return made().eval(), inputs


def package(name, half, palettized=None):
    net, inputs = network(name)
    precision = ct.precision.FLOAT16 if half else ct.precision.FLOAT32
    return from_torch(net, inputs, palettized or {}, minimum_deployment_target="iOS18", compute_precision=precision)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("half", "arithmetic", "tolerance"), [(0, "float32", 1e-5), (1, "float32", 1e-2), (1, "declared", 1e-2)]
)
def test_what_torch_computes(name, half, arithmetic, tolerance):
    net, inputs = network(name)
    wanted = net(inputs).detach().numpy()
    (found,) = outputs(package(name, half), [inputs.numpy()], arithmetic=arithmetic)
    assert np.abs(found - wanted).max() <= tolerance * np.ptp(wanted)


def test_rounding_is_not_left_out():
    """Large numbers lose their last bits once for each op that declares float16."""

    @mb.program(input_specs=[mb.TensorSpec(shape=(4,), dtype=types.fp16)], opset_version=ct.target.iOS17)
    def program(x):
        return mb.sub(x=mb.add(x=x, y=np.float16(2048)), y=np.float16(2048))

    mlmodel = convert(program, "iOS17")
    x = np.array([0.25, 0.75, 1.25, 3.5], np.float16)
    (rounded,) = outputs(mlmodel, [x], arithmetic="declared")
    (exact,) = outputs(mlmodel, [x])
    np.testing.assert_array_equal(rounded, (x + np.float16(2048)) - np.float16(2048))
    np.testing.assert_array_equal(exact, x)


def test_palettes_are_what_they_decompress_to():
    net, inputs = network("MNIST")
    params = px.torch.to_params(net.state_dict())
    small = px.palettize(params, px.by_path([("conv", px.with_channel_scale(px.kmeans(4))), ("dense", px.kmeans(2))]))
    mlmodel = package("MNIST", half=False, palettized=small)
    one, other = (outputs(m, [inputs.numpy()]) for m in (mlmodel, decompress_weights(mlmodel)))
    np.testing.assert_array_equal(one, other)


def test_a_package_from_the_disk_at_any_batch():
    net, inputs = network("MNIST")
    batch = ct.Shape((ct.RangeDim(1, 4), 1, 28, 28))
    with quiet():
        traced = torch.jit.trace(net, inputs)
        mlmodel = ct.convert(
            traced, inputs=[ct.TensorType("x", batch)], minimum_deployment_target=ct.target.iOS17,
            compute_precision=ct.precision.FLOAT32, skip_model_load=True,
        )  # fmt: skip
    function = as_function(mlmodel)
    for count in (1, 3):
        images = normal(count, 1, 28, 28, seed=count)
        (found,) = function({"x": images}).values()
        np.testing.assert_allclose(found, net(torch.from_numpy(images)).detach(), atol=1e-4)
    with pytest.raises(ValueError, match=r"input 'x' is \(5, 1, 28, 28\)"):
        function({"x": normal(5, 1, 28, 28)})


def test_inputs_are_checked(tmp_path):
    path = save_package(model(), tmp_path / "m.mlpackage")
    (name,) = (feature.name for feature in model().get_spec().description.input)
    with pytest.raises(ValueError, match=rf"inputs are \['other'\]; the program takes \['{name}'\]"):
        run(path, {"other": np.ones(3)})
    with pytest.raises(ValueError, match="the program takes"):
        run(path, {name: np.ones(3)})
    with pytest.raises(ValueError, match="function='other': the model has main"):
        run(path, {name: np.ones(3)}, function="other")


@pytest.mark.usefixtures("unchecked")
def test_inputs_have_names():
    with pytest.raises(ValueError, match=r"inputs are a ndarray; give them by name: \{'x': array\}"):
        run(model(), np.ones(3))


@pytest.mark.usefixtures("unchecked")
def test_there_are_two_arithmetics():
    with pytest.raises(ValueError, match="arithmetic='half'; use 'float32' or 'declared'"):
        as_function(model(), arithmetic="half")


def test_what_is_out_of_reach_is_named_before_any_work():
    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 8)), mb.TensorSpec(shape=(1,))], opset_version=ct.target.iOS18)
    def program(x, choice):
        return mb.cond(
            pred=mb.squeeze(x=mb.greater(x=choice, y=0.0)),
            _true_fn=lambda: mb.relu(x=x),
            _false_fn=lambda: mb.random_normal(shape=[1, 8]),
            name="branch",
        )

    with pytest.raises(ValueError, match=r"cond \(branch\): cannot be evaluated here; control flow"):
        as_function(convert(program, half=False))

    @mb.program(input_specs=[mb.TensorSpec(shape=(3,), dtype=types.int32)], opset_version=ct.target.iOS18)
    def shaped(shape):
        return mb.fill(shape=shape, value=1.0, name="filled")

    with pytest.raises(ValueError, match=r"fill \(filled\): its shape depends on the values"):
        outputs(convert(shaped, half=False), [np.array([1, 2, 3], np.int32)])


def test_a_classifier_names_its_class():
    net, inputs = network("MNIST")
    with quiet():
        traced = torch.jit.trace(net, inputs)
        mlmodel = ct.convert(
            traced, inputs=[ct.TensorType("x", (1, 1, 28, 28))], minimum_deployment_target=ct.target.iOS17,
            classifier_config=ct.ClassifierConfig([f"digit {i}" for i in range(10)]), skip_model_load=True,
        )  # fmt: skip
    found = run(mlmodel, {"x": inputs.numpy()})
    wanted = net(inputs).detach().numpy()[0]
    assert found.pop("classLabel") == f"digit {wanted.argmax()}"
    (probabilities,) = found.values()
    np.testing.assert_allclose([probabilities[f"digit {i}"] for i in range(10)], wanted, atol=1e-2)
    small = palettize_weights(mlmodel, OptimizationConfig({"nbits": 8}))
    assert run(small, {"x": inputs.numpy()})["classLabel"] == f"digit {wanted.argmax()}"
