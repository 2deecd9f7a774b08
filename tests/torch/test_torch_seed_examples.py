"""The torch examples of coremltools' documentation of palettization, with their imports changed and their stubs filled.

What stands in the place of `get_torch_model` and its like: a small convolutional net, and the digits of scikit-learn.
"""

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from test_torch_configs import SKM_YAML

import palettax as px
import palettax.coreml  # before coremltools, whose import it keeps quiet
import palettax.torch
from palettax.coreml import scoped
from palettax.leaf import is_palettized
from palettax.torch import (
    DKMPalettizer,
    DKMPalettizerConfig,
    PostTrainingPalettizer,
    PostTrainingPalettizerConfig,
    SKMPalettizer,
    SKMPalettizerConfig,
)

import coremltools as ct  # isort: skip

BATCH = 16


@pytest.fixture(scope="module")
def digits():
    """Train and test sets of (images, labels), upsampled to the size of MNIST."""
    found = load_digits()
    images = F.interpolate(torch.tensor(found.images, dtype=torch.float32)[:, None], (28, 28), mode="bilinear")
    images, labels = (images - images.mean()) / images.std(), torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1024], order[1024:]
    return [torch.utils.data.TensorDataset(images[part], labels[part]) for part in (train, test)]


def get_torch_model():
    torch.manual_seed(0)
    layers = {
        "conv1": nn.Conv2d(1, 8, 5, stride=4),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(8, 16, 3),
        "relu2": nn.ReLU(),
        "conv3": nn.Conv2d(16, 16, 3),
        "flatten": nn.Flatten(),
        "dense1": nn.Linear(64, 64),
        "dense2": nn.Linear(64, 12),
        "softmax": nn.LogSoftmax(dim=1),
    }
    return nn.Sequential(OrderedDict(layers))


def convert(model, example_input, **options):
    """`coremltools.convert` of a traced model, as the documentation has it."""
    with scoped.quiet():
        traced_model = torch.jit.trace(model.eval(), example_input)
        inputs = [ct.TensorType(shape=example_input.shape)]
        return ct.convert(traced_model, inputs=inputs, skip_model_load=True, **options)


def tables(mlmodel):
    """The names of the weights that are tables, by the layer that a traced constant is named after."""
    ops = mlmodel._mil_program.functions["main"].find_ops(op_type="constexpr_lut_to_dense")
    return {op.name.partition("_weight")[0] for op in ops}


def distinct(model):
    """Distinct values of every weight matrix, by layer."""
    weights = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    return {name: weight.unique().numel() for name, weight in weights.items()}


def test_post_training_palettization_of_groups():
    torch_model = get_torch_model()

    palettization_config_dict = {
        "global_config": {"n_bits": 4, "granularity": "per_grouped_channel", "group_size": 4},
    }
    palettization_config = PostTrainingPalettizerConfig.from_dict(palettization_config_dict)
    palettizer = PostTrainingPalettizer(torch_model, palettization_config)

    palettized_torch_model = palettizer.compress()

    for name in distinct(torch_model):
        weight = palettized_torch_model.get_submodule(name).weight
        assert [group.unique().numel() for group in weight.split(4)] == [16] * (len(weight) // 4)
        assert not torch.equal(weight, torch_model.get_submodule(name).weight)
    # Groups are of iOS18.
    mlmodel = convert(palettized_torch_model, torch.rand(1, 1, 28, 28), minimum_deployment_target=ct.target.iOS18)
    assert tables(mlmodel) == distinct(torch_model).keys()
    assert px.coreml.audit(mlmodel, palettized_torch_model).identical


def test_converting_needs_no_option_but_a_target():
    palettized_torch_model = PostTrainingPalettizer(get_torch_model()).compress()
    example_input = torch.rand(1, 1, 28, 28)
    for target in ("iOS16", "iOS18"):
        mlmodel = convert(palettized_torch_model, example_input, minimum_deployment_target=getattr(ct.target, target))
        assert tables(mlmodel) == distinct(palettized_torch_model).keys()
    # The text needs none at all. The converter's own is iOS15, which has no tables: it says nothing and writes floats.
    assert tables(convert(palettized_torch_model, example_input)) == set()
    with pytest.raises(ValueError, match="iOS15"):
        px.coreml.from_torch(palettized_torch_model, example_input, minimum_deployment_target="iOS15")


def test_sensitive_k_means_from_yaml(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "palettization_config.yaml").write_text(SKM_YAML)
    torch_model = get_torch_model()
    palettization_config = SKMPalettizerConfig.from_yaml("palettization_config.yaml")

    loss_fn = lambda mod, dat: F.nll_loss(mod(dat[0]), dat[1])  # noqa: E731, as in the text
    calibration_data = torch.utils.data.DataLoader(digits[0], batch_size=BATCH)

    palettizer = SKMPalettizer(torch_model, palettization_config)
    palettized_torch_model = palettizer.compress(dataloader=calibration_data, loss_fn=loss_fn)

    before = distinct(torch_model)
    palettized = {"conv2": 16, "dense1": 64, "dense2": 64}
    assert distinct(palettized_torch_model) == before | palettized
    for name in ("conv1", "conv3"):
        assert torch.equal(palettized_torch_model.get_submodule(name).weight, torch_model.get_submodule(name).weight)
    # The tables are those of 64 examples, and of no other number.
    examples = torch.utils.data.DataLoader(torch.utils.data.Subset(digits[0], range(64)), batch_size=64)
    exactly = SKMPalettizer(torch_model, palettization_config).compress(examples, loss_fn)
    for name in palettized:
        found, expected = (model.get_submodule(name).weight for model in (palettized_torch_model, exactly))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_training_time_palettization_from_a_dict(digits):
    torch_model = get_torch_model()
    dataloader = torch.utils.data.DataLoader(digits[0], batch_size=128)
    optimizer = torch.optim.SGD(torch_model.parameters(), lr=0.01)
    soft = []

    def train_step(data, target, model):
        optimizer.zero_grad()
        F.nll_loss(model(data), target).backward()
        optimizer.step()
        soft.append(not torch.equal(model.conv3.weight, model.conv3.parametrizations.weight.original))

    num_palettization_epochs = 2
    palettization_config_dict = {
        "global_config": {"n_bits": 4, "milestone": 10},
    }
    palettization_config = DKMPalettizerConfig.from_dict(palettization_config_dict)
    palettizer = DKMPalettizer(torch_model, palettization_config)

    palettizer.prepare(inplace=True)

    torch_model.train()
    for _epoch in range(num_palettization_epochs):
        for _batch_idx, (data, target) in enumerate(dataloader):
            train_step(data, target, torch_model)
            palettizer.step()

    palettized_torch_model = palettizer.finalize()

    # Palettization starts when step has been called ten times, so training steps 0 to 9 are as ever.
    assert soft == [False] * 10 + [True] * 6
    # conv3 and dense1 alone have more than the 2048 weights of the default threshold.
    assert {name for name, count in distinct(palettized_torch_model).items() if count <= 16} == {"conv3", "dense1"}
    leaves = px.torch.to_params(palettized_torch_model.state_dict())
    assert {name for name, leaf in leaves.items() if is_palettized(leaf)} == {"conv3.weight", "dense1.weight"}


@pytest.mark.parametrize("inplace", [False, True])
def test_the_sample_code_of_training_time_palettization(inplace, tmp_path):
    def create_data():
        random = torch.Generator().manual_seed(0)
        return [(torch.rand(8, 4, generator=random), torch.rand(8, 4, generator=random)) for _ in range(5)]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 500), nn.Sigmoid(), nn.Linear(500, 4), nn.Sigmoid())
    loss_fn = nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = create_data()
    module_config = {nn.Linear: {"n_bits": 2, "weight_threshold": 1000, "milestone": 2}}
    config = DKMPalettizerConfig.from_dict({"module_type_configs": module_config})

    palettizer = DKMPalettizer(model, config)
    prepared_model = palettizer.prepare(inplace=inplace)

    for inputs, labels in data:
        output = model(inputs)
        loss = loss_fn(output, labels)
        loss.backward()
        optimizer.step()
        palettizer.step()

    if inplace:
        assert prepared_model is model
        finalized_model = palettizer.finalize()
    else:
        # As printed, it trains `model` while the tables are in a copy: nothing is palettized, which palettax says.
        with pytest.warns(UserWarning, match=r"0\.weight, 2\.weight: no forward pass has used a palette"):
            finalized_model = palettizer.finalize()

    example_input = torch.rand(1, 4)
    coreml_model = convert(
        finalized_model,
        example_input,
        convert_to="mlprogram",
        pass_pipeline=ct.PassPipeline.DEFAULT_PALETTIZATION,
        minimum_deployment_target=ct.target.iOS16,
    )
    coreml_model.save(str(tmp_path / "compressed_model.mlpackage"))

    saved = px.coreml.read_palettes(tmp_path / "compressed_model.mlpackage").values()
    leaves = [leaf for leaf in px.torch.to_params(finalized_model.state_dict()).values() if is_palettized(leaf)]
    assert len(saved) == len(leaves) == (2 if inplace else 0)
    for palette, leaf in zip(saved, leaves, strict=True):
        assert leaf.nbits == 2
        np.testing.assert_array_equal(palette.lut, leaf.lut.astype(np.float16))
        np.testing.assert_array_equal(palette.indices, leaf.indices)


def mnist_net(num_classes=10):
    """The tutorial's, with half as many channels and an eighth of the hidden units."""
    return nn.Sequential(
        OrderedDict(
            [
                ("conv1", nn.Conv2d(1, 16, 5, padding="same")),
                ("relu1", nn.ReLU()),
                ("pool1", nn.MaxPool2d(2, stride=2, padding=0)),
                ("bn1", nn.BatchNorm2d(16, eps=0.001, momentum=0.01)),
                ("conv2", nn.Conv2d(16, 32, 5, padding="same")),
                ("relu2", nn.ReLU()),
                ("pool2", nn.MaxPool2d(2, stride=2, padding=0)),
                ("flatten", nn.Flatten()),
                ("dense1", nn.Linear(1568, 128)),
                ("relu3", nn.ReLU()),
                ("dropout", nn.Dropout(p=0.4)),
                ("dense2", nn.Linear(128, num_classes)),
                ("softmax", nn.LogSoftmax()),
            ]
        )
    )


@pytest.mark.filterwarnings("ignore:Implicit dimension choice for log_softmax")
def test_the_mnist_tutorial(digits, tmp_path):
    torch.manual_seed(0)
    model = mnist_net()
    train_dataset, test_dataset = digits
    train_loader = torch.utils.data.DataLoader(train_dataset, batch_size=BATCH, shuffle=True)
    test_loader = torch.utils.data.DataLoader(test_dataset, batch_size=BATCH)

    def train_step(model, optimizer, data, target, palettizer=None):
        optimizer.zero_grad()
        if palettizer is not None:
            palettizer.step()
        output = model(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()

    def eval_model(model, test_loader):
        model.eval()
        with torch.no_grad():
            correct = sum(int((model(data).argmax(dim=1) == target).sum()) for data, target in test_loader)
        return 100.0 * correct / len(test_loader.dataset)

    def train(model, optimizer, palettizer=None, num_epochs=2):
        for _epoch in range(num_epochs):
            model.train()
            for data, target in train_loader:
                train_step(model, optimizer, data, target, palettizer)
        return eval_model(model, test_loader)

    accuracy_unpalettized = train(model, torch.optim.SGD(model.parameters(), lr=0.008))

    config = DKMPalettizerConfig.from_dict({"module_name_configs": {"conv2": {"n_bits": 4}}})
    palettizer = DKMPalettizer(model, config)
    prepared_model = palettizer.prepare()

    optimizer = torch.optim.SGD(prepared_model.parameters(), lr=0.008)
    accuracy_palettized = train(prepared_model, optimizer, palettizer)

    finalized_model = palettizer.finalize()

    assert accuracy_unpalettized > 80  # or there would be nothing to lose
    assert accuracy_palettized > accuracy_unpalettized - 3
    assert eval_model(finalized_model, test_loader) == accuracy_palettized
    assert finalized_model.conv2.weight.unique().numel() <= 2**4
    assert [type(layer) for layer in finalized_model] == [type(layer) for layer in mnist_net()]

    example_input = torch.rand(1, 1, 28, 28)
    coreml_model = convert(
        finalized_model,
        example_input,
        pass_pipeline=ct.PassPipeline.DEFAULT_PALETTIZATION,
        minimum_deployment_target=ct.target.iOS16,
    )
    ours = px.coreml.from_torch(finalized_model, example_input, minimum_deployment_target="iOS16")
    leaf = px.torch.to_params(finalized_model.state_dict())["conv2.weight"]
    for name, mlmodel in {"plain": coreml_model, "ours": ours}.items():
        path = tmp_path / f"{name}.mlpackage"
        mlmodel.save(str(path))
        assert len(mlmodel._mil_program.functions["main"].find_ops(op_type="constexpr_lut_to_dense")) == 1
        assert px.coreml.audit(path, finalized_model).identical
        (palette,) = px.coreml.read_palettes(path).values()
        np.testing.assert_array_equal(palette.lut, leaf.lut.astype(np.float16))
        np.testing.assert_array_equal(palette.indices, leaf.indices)
