"""coremltools' own tests of its torch palettizers, seen from outside and asked of both libraries.

Where only palettax is asked, a comment says what coremltools 9.0 does instead.
"""

import contextlib
import copy
import io
import math
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import palettax as px
import palettax.coreml  # before coremltools, whose import it keeps quiet
import palettax.torch
from palettax.coreml.scoped import quiet
from palettax.leaf import is_palettized
from palettax.torch.match import match_indices

import coremltools as ct  # isort: skip

with warnings.catch_warnings(action="ignore"):
    from coremltools.optimize.torch import palettization as peer
    from coremltools.optimize.torch._utils.k_means import KMeansConfig, SequentialKMeans
    from coremltools.optimize.torch._utils.metadata_utils import CompressionMetadata, CompressionType
    from coremltools.optimize.torch.palettization._utils import vectorize

# coremltools' SKMPalettizer leaves its checkpoint to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")

LIBRARIES = {"palettax": palettax.torch, "coremltools": peer}
GROUPED = {"granularity": "per_grouped_channel"}


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def noticing(library, message=None):
    """palettax warns where coremltools writes to its log; other warnings of coremltools are torch's, of its age."""
    if library is peer:
        return warnings.catch_warnings(action="ignore")
    return pytest.warns(UserWarning, match=message) if message else contextlib.nullcontext()


def net():
    layers = {
        "conv1": nn.Conv2d(3, 8, 3),  # 216 weights
        "conv2": nn.Conv2d(8, 16, 3),  # 1152
        "pool": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(64, 48),  # 3072
        "fc2": nn.Linear(48, 10),  # 480
    }
    return nn.Sequential(OrderedDict(layers))


IMAGE = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)


def palettizer_of(library, algorithm, model, config):
    given = getattr(library, f"{algorithm}PalettizerConfig")
    config = given.from_yaml(io.StringIO(config)) if isinstance(config, str) else given.from_dict(config)
    return getattr(library, f"{algorithm}Palettizer")(model, config)


def compressed(library, algorithm, model, config, *inputs, message=None):
    """The model with its tables; what is trained sees one forward pass, in eval mode."""
    palettizer = palettizer_of(library, algorithm, model, config)
    with noticing(library, message):
        if algorithm == "PostTraining":
            return palettizer.compress()
        if algorithm == "SKM":
            return palettizer.compress(dataloader=[*inputs], loss_fn=lambda model, one: model(one).square().mean())
        palettizer.prepare().eval()(*inputs)
        return palettizer.finalize()


def one_layer(library, layer, **options):
    """The layer, palettized without training, and what its buffers say: bit for bit its weight, or it raises."""
    small = compressed(library, "PostTraining", nn.Sequential(layer), {"global_config": options})
    return small[0], px.torch.to_params(small.state_dict())["0.weight"]


def metadata_of(layer):
    """As coremltools reads it, whoever wrote it."""
    return CompressionMetadata.from_state_dict(layer.state_dict())["weight"]


def weights_of(model):
    return {name: layer.weight.detach() for name, layer in model.named_modules() if hasattr(layer, "weight")}


def check_counts(small, model, expected):
    """Layers that are expected to have so many values have them; all others are as they were."""
    after, before = weights_of(small), weights_of(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == expected.keys()
    assert {name: after[name].unique().numel() for name in expected} == expected


def vectors(weight, axis, size):
    return weight.movedim(axis, -1).reshape(-1, size)


# Which layers, and how many values: test_post_training_palettization.py, test_palettization_api.py

COUNTS = {
    "default": ({}, {"conv1": 16, "conv2": 16, "fc1": 16, "fc2": 16}),
    "global": ({"global_config": {"n_bits": 3}}, {"conv1": 8, "conv2": 8, "fc1": 8, "fc2": 8}),
    "names": ({"module_name_configs": {"conv1": {"n_bits": 4}, "fc1": {"n_bits": 2}}}, {"conv1": 16, "fc1": 4}),
    "types": (
        {"module_type_configs": {nn.Conv2d: {"n_bits": 4}, "Linear": {"n_bits": 2}}},
        {"conv1": 16, "conv2": 16, "fc1": 4, "fc2": 4},
    ),
    "None": (
        {
            "global_config": {"n_bits": 1},
            "module_type_configs": {nn.Conv2d: None},
            "module_name_configs": {"fc2": None, "conv1": {"n_bits": 6}},
        },
        {"fc1": 2, "conv1": 64},
    ),
    "regular expression": ({"module_name_configs": {r"conv\d": {"n_bits": 2}}}, {"conv1": 4, "conv2": 4}),
}


@pytest.mark.parametrize("algorithm", ["PostTraining", "SKM"])
@pytest.mark.parametrize("name", COUNTS)
def test_layers_have_as_many_values_as_the_configuration_says(library, name, algorithm):
    config, expected = COUNTS[name]
    model = net()
    check_counts(compressed(library, algorithm, model, config, IMAGE), model, expected)


SIZES = [{"n_bits": 2, "weight_threshold": 1000}, {"n_bits": 4, "weight_threshold": 200}]
# A layer has the same width wherever it can: palettax compiles for every shape and width anew.
TRAINED = {
    "default": ({}, {"fc1": 16}),
    "default of other layers": ({"module_type_configs": {nn.Conv2d: {"weight_threshold": 1000}}}, {"conv2": 4}),
    "at the threshold": ({"module_name_configs": {"conv.": {"n_bits": 2, "weight_threshold": 216}}}, {"conv2": 4}),
    "thresholds": ({"module_type_configs": {nn.Conv2d: SIZES}}, {"conv1": 16, "conv2": 4}),
    "thresholds of YAML": (
        "module_name_configs:\n  conv\\d+:\n    - {n_bits: 4, weight_threshold: 200}\n"
        "    - {n_bits: 2, weight_threshold: 1000}\n",
        {"conv1": 16, "conv2": 4},
    ),
    "None of a type": (
        {"module_type_configs": {nn.Conv2d: None, nn.Linear: {"weight_threshold": 0}}},
        {"fc1": 16, "fc2": 16},
    ),
    "None of a name": (
        {
            "module_name_configs": {"conv1": None},
            "module_type_configs": {nn.Conv2d: {"n_bits": 2, "weight_threshold": 0}},
        },
        {"conv2": 4},
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_trained_layers_have_as_many_values_as_the_configuration_says(library, name):
    config, expected = TRAINED[name]
    model = net()
    check_counts(compressed(library, "DKM", model, config, IMAGE), model, expected)


def test_thresholds_that_hold_for_all_layers():
    # coremltools sorts this list and forgets the result.
    model = net()
    small = compressed(palettax.torch, "DKM", model, {"global_config": SIZES}, IMAGE)
    check_counts(small, model, {"conv1": 16, "conv2": 4, "fc1": 4, "fc2": 16})


MIXED = {
    "modconv": nn.Conv2d(3, 10, 3),
    "modlinear": nn.Linear(2, 5),
    "multihead": nn.MultiheadAttention(10, 5),
    "embedding": nn.Embedding(100, 10),
}
OF_ATTENTION = {"multihead.in_proj_weight", "multihead.out_proj.weight"}
CHOSEN = {
    "all": ({}, {"modconv.weight", "modlinear.weight", "embedding.weight", *OF_ATTENTION}),
    "a name": ({"module_name_configs": {"modconv": None}}, {"modlinear.weight", "embedding.weight", *OF_ATTENTION}),
    "names": ({"module_name_configs": {"mod.*": None}}, {"embedding.weight", *OF_ATTENTION}),
    "a type": ({"module_type_configs": {nn.Embedding: None}}, {"modconv.weight", "modlinear.weight", *OF_ATTENTION}),
    "attention": (
        {"module_type_configs": {"MultiheadAttention": None}, "module_name_configs": {"multihead.out_proj": None}},
        {"modconv.weight", "modlinear.weight", "embedding.weight"},
    ),
    "no configuration": (
        {"global_config": None},
        {"modconv.weight", "modlinear.weight", "embedding.weight", *OF_ATTENTION},
    ),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_parameters_that_sensitive_k_means_palettizes(library, name, tmp_path):
    config, expected = CHOSEN[name]
    model = nn.ModuleDict({name: copy.deepcopy(layer) for name, layer in MIXED.items()})
    ones = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    torch.save(ones, tmp_path / "sensitivity.pt")
    palettizer = palettizer_of(library, "SKM", model, {"global_config": {"n_bits": 2}} | config)
    with noticing(library):
        small = palettizer.compress(sensitivity_path=str(tmp_path / "sensitivity.pt"))
    leaves = px.torch.to_params(small.state_dict())
    assert {name for name, leaf in leaves.items() if is_palettized(leaf)} == expected


def test_a_type_that_is_left_alone_is_left_alone_whole():
    # coremltools palettizes the output projection of an attention layer whose type is configured as None.
    config = {"global_config": {"n_bits": 2}, "module_type_configs": {"MultiheadAttention": None}}
    small = compressed(palettax.torch, "PostTraining", nn.ModuleDict(copy.deepcopy(MIXED)), config)
    assert not any(
        is_palettized(leaf) for name, leaf in px.torch.to_params(small.state_dict()).items() if "multi" in name
    )


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 3, add_bias_kv=True, **options)

    def forward(self, x):
        keys = x[..., : self.inner.kdim]
        return self.inner(x, keys, keys, need_weights=False)[0]


KINDS = {
    "Conv1d": (nn.Conv1d(2, 10, 1), torch.ones(1, 2, 4)),
    "Conv3d": (nn.Conv3d(2, 10, 2), torch.ones(1, 2, 4, 4, 4)),
    "Embedding": (nn.Embedding(10, 20), torch.arange(10)),
    # Their finalize asks the attention layer for its weight: AttributeError.
    "attention": (Attention(kdim=1, vdim=1), torch.ones(2, 3, 6)),
}


@pytest.mark.parametrize(
    ("library", "kind"), [("palettax", kind) for kind in KINDS] + [("coremltools", kind) for kind in [*KINDS][:-1]]
)
def test_layers_of_every_kind_are_trained(library, kind):
    layer, inputs = KINDS[kind]
    model = nn.Sequential(copy.deepcopy(layer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    small = compressed(
        LIBRARIES[library], "DKM", model, {"global_config": {"n_bits": 2, "weight_threshold": 0}}, inputs
    )
    leaves = px.torch.to_params(small.state_dict())
    matrices = {name for name in leaves if name.endswith("weight") and "bias" not in name}
    assert matrices
    for name, parameter in model.named_parameters():
        assert is_palettized(leaves[name]) == (name in matrices)
        if name in matrices:
            assert np.unique(leaves[name].depalettize()).size <= 4
        else:
            np.testing.assert_array_equal(leaves[name], parameter.detach())


def test_training_mode_without_gradients(library):
    palettizer = palettizer_of(
        library, "DKM", nn.Sequential(nn.Conv1d(2, 10, 1)), {"global_config": {"weight_threshold": 0}}
    )
    with noticing(library), torch.no_grad():
        model = palettizer.prepare().train()
        palettizer.step()
        assert model(torch.ones(3, 2, 10)).isfinite().all()


# When: milestones, finalize, copies

MILESTONES = {
    "at once": ({nn.Conv2d: {"milestone": 0}}, {"conv1": 0, "conv2": 0}),
    "by type": (
        {nn.Conv2d: {"milestone": 1}, nn.Linear: {"milestone": 2}},
        {"conv1": 1, "conv2": 1, "fc1": 2, "fc2": 2},
    ),
    "by size": (
        {nn.Conv2d: [{"weight_threshold": 1000, "milestone": 2}, {"weight_threshold": 200, "milestone": 1}]},
        {"conv1": 1, "conv2": 2},
    ),
}


@pytest.mark.parametrize("name", MILESTONES)
def test_milestones(library, name):
    by_type, milestones = MILESTONES[name]
    by_type = {
        kind: [{"weight_threshold": 0} | one for one in (given if isinstance(given, list) else [given])]
        for kind, given in by_type.items()
    }
    model = net()
    palettizer = palettizer_of(library, "DKM", model, {"module_type_configs": by_type})
    with noticing(library):
        prepared = palettizer.prepare().eval()
    changed = set()
    for layer_name in weights_of(model):

        def compare(layer, inputs, output, layer_name=layer_name):
            if not torch.equal(output, model.get_submodule(layer_name)(*inputs)):
                changed.add(layer_name)

        prepared.get_submodule(layer_name).register_forward_hook(compare)
    # "The number of times step has to be called before palettization is enabled": coremltools needs one more.
    late = 1 if library is peer else 0
    for steps in range(4):
        changed.clear()
        prepared(IMAGE)
        assert changed == {name for name, at in milestones.items() if steps >= at + (late if at else 0)}
        with noticing(library):
            palettizer.step()


def test_finalize_without_a_forward_pass(library):
    model = net()
    palettizer = palettizer_of(library, "DKM", model, {"global_config": {"n_bits": 2, "weight_threshold": 0}})
    with noticing(library, "no forward pass has used a palette"):
        palettizer.prepare()
        palettizer.step()
        small = palettizer.finalize()
    check_counts(small, model, {})


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize(("algorithm", "method"), [("PostTraining", "compress"), ("DKM", "prepare")])
def test_in_place_or_in_a_copy(library, algorithm, method, inplace):
    model = net()
    before = copy.deepcopy(model.state_dict())
    palettizer = palettizer_of(library, algorithm, model, {})
    with noticing(library):
        made = getattr(palettizer, method)(inplace=inplace)
    assert (made is model) == inplace
    changed = model.state_dict().keys() != before.keys()
    assert changed == inplace


# Groups, vectors, scales: test_k_means.py, test_validation_utils.py, test_palettization_utils.py


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_group_has_its_own_values(library, axis, scaled):
    options = {**GROUPED, "group_size": 4, "channel_axis": axis, "enable_per_channel_scale": scaled}
    layer, leaf = one_layer(library, nn.Conv2d(12, 32, 2), n_bits=4, **options)
    assert leaf.lut.shape == ((8, 1) if axis == 0 else (1, 3)) + (1, 1, 16, 1)
    assert scaled == (metadata_of(layer).palettization_scale is not None)
    tables = np.unstack(leaf.lut.reshape(-1, 16))
    assert all(np.unique(table).size == 16 for table in tables)
    for group in np.split(leaf.indices, len(tables), axis=axis):
        assert np.unique(group).size == 16


@pytest.mark.parametrize("axis", [0, 1])
def test_every_vector_is_one_of_the_table(library, axis):
    layer, leaf = one_layer(library, nn.Conv2d(16, 16, 2), n_bits=4, cluster_dim=4, channel_axis=axis)
    assert leaf.lut.shape == (1, 1, 1, 1, 16, 4)
    weight = layer.weight.detach()
    assert len(vectors(weight, axis, 4).unique(dim=0)) == 16 < len(vectors(weight, 1 - axis, 4).unique(dim=0))


DIVISIBLE = [{**GROUPED, "group_size": 4}, {**GROUPED, "group_size": 4, "channel_axis": 1}, {"cluster_dim": None}]
INDIVISIBLE = [
    {**GROUPED, "group_size": 5},
    {**GROUPED, "group_size": 8, "channel_axis": 1},
    {**GROUPED, "group_size": 64},
    {"cluster_dim": 3},
    {"cluster_dim": 8, "channel_axis": 1},
]


@pytest.mark.parametrize(
    ("options", "fits"), [(options, True) for options in DIVISIBLE] + [(options, False) for options in INDIVISIBLE]
)
def test_what_does_not_divide_stays_dense(library, options, fits):
    model = nn.Sequential(nn.Conv2d(12, 32, 2))
    message = None if fits else r"0\.weight \(32, 12, 2, 2\) stays dense"
    small = compressed(library, "PostTraining", model, {"global_config": options}, message=message)
    assert torch.equal(small[0].weight, model[0].weight) == (not fits)


@pytest.mark.parametrize("options", [{**GROUPED, "group_size": 5}, {"cluster_dim": 3}])
def test_what_does_not_divide_is_not_trained(library, options):
    model = nn.Sequential(nn.Conv2d(12, 32, 2))
    palettizer = palettizer_of(library, "DKM", model, {"global_config": {"weight_threshold": 0} | options})
    with noticing(library, r"0\.weight \(32, 12, 2, 2\) stays dense"):
        prepared = palettizer.prepare()
    assert prepared.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("size", "shape", "first"), [(2, (2, 3, 4), [0, 12]), (2, (4, 3, 2), [0, 6]), (3, (6, 2, 2), [0, 4, 8])]
)
def test_vectors_are_those_of_coremltools(size, shape, first):
    weight = np.arange(24, dtype=np.float32).reshape(shape)
    theirs = vectorize(torch.from_numpy(weight), size)[0].numpy()
    assert theirs[0].tolist() == first
    lut = np.pad(theirs, [(0, 16 - len(theirs)), (0, 0)], mode="edge").reshape(1, 1, 1, 16, size)
    indices, missing = match_indices(weight, lut, vector_axis=0)
    assert missing == 0
    assert sorted(indices.reshape(-1).tolist()) == [*range(len(theirs))]
    np.testing.assert_array_equal(px.PalettizedArray(lut, indices, nbits=4, vector_axis=0).depalettize(), weight)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_pruned_weights_stay_out_of_the_tables(axis, weighted, tmp_path):
    # No palettizer of coremltools hands its k-means the mask that it could take: here it is handed one.
    layer = nn.Linear(32, 32)
    with torch.no_grad():
        layer.weight[torch.rand(32, 32) < 0.25] = 0
    mask, before = layer.weight != 0, layer.weight.detach().clone()
    importance = torch.rand(32, 32) + 0.1 if weighted else torch.ones(32, 32)
    torch.save({"0.weight": importance}, tmp_path / "importance.pt")
    layer.register_buffer("_COREML_/weight/compression_type", torch.tensor([1]))
    config = {"global_config": {**GROUPED, "group_size": 4, "channel_axis": axis}}
    palettizer = palettizer_of(palettax.torch, "SKM", nn.Sequential(layer), config)
    own = palettizer.compress(sensitivity_path=tmp_path / "importance.pt")[0]
    their_config = KMeansConfig(n_bits=4, block_size=4, axis=axis, mask=mask, importance=importance)
    theirs = SequentialKMeans.cluster_weights(copy.deepcopy(layer), their_config)
    errors = []
    for weight in (own.weight.detach(), theirs.weight.detach()):
        assert torch.equal(weight[~mask], before[~mask])
        for group, kept in zip(weight.split(4, axis), mask.split(4, axis), strict=True):
            assert group[kept].unique().numel() == 16
        errors.append(float((importance.double() * (weight.double() - before.double()) ** 2).sum()))
    assert errors[0] <= errors[1] * (1 + 1e-6)
    assert metadata_of(own).compression_type == [CompressionType.pruning.value, CompressionType.palettization.value]


EXACT = {
    "tensor": {},
    "1 bit": {"n_bits": 1},
    "groups": {**GROUPED, "group_size": 4},
    "groups of inputs": {**GROUPED, "group_size": 4, "channel_axis": 1},
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_table_is_worse_than_that_of_coremltools(name, weighted, tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    importance = torch.rand(16, 8, 3, 3) + 0.1 if weighted else torch.ones(16, 8, 3, 3)
    torch.save({"0.weight": importance, "0.bias": torch.ones(16)}, tmp_path / "importance.pt")
    errors = []
    for library in (palettax.torch, peer):
        palettizer = palettizer_of(
            library, "SKM" if weighted else "PostTraining", model, {"global_config": EXACT[name]}
        )
        with noticing(library):
            small = palettizer.compress(**{"sensitivity_path": str(tmp_path / "importance.pt")} if weighted else {})
        change = (small[0].weight - model[0].weight).detach().double()
        errors.append(float((importance * change**2).sum()))
    assert errors[0] <= errors[1] * (1 + 1e-6)


def test_a_channel_of_zeros_behind_a_scale(library):
    layer = nn.Linear(10, 100)
    with torch.no_grad():
        layer.weight[0] = 0
    before = layer.weight.detach().clone()
    small, leaf = one_layer(library, layer, n_bits=4, enable_per_channel_scale=True)
    assert small.weight.isfinite().all()
    step = np.diff(np.sort(leaf.lut.reshape(-1))).max()
    scale = torch.from_numpy(np.array(leaf.scale))
    assert scale.isfinite().all()
    # No weight is further from its own than the widest gap of the table, in the scale of its channel.
    assert ((small.weight - before).abs() <= scale * float(step)).all()


# Awkward weights: test_k_means.py, and section 5 of the reference

LOSSLESS = {
    "a constant": torch.full((8, 8), 0.5),
    "zeros": torch.zeros(8, 8),
    "few values": torch.tensor([-1.0, 0.25, 3.0]).repeat(8, 8),
    "fewer weights than entries": torch.tensor([[0.5, -1.5, 2.0]]),
    "beyond float16": torch.tensor([[1e5, -2e5, 3e5, 1.0]]),
    "rounding that overflows float16": torch.tensor([[1000.1, 53.2, 23.4, 50000.12]], dtype=torch.float16),
}
# coremltools rounds weights to four decimals, and cannot view bfloat16 as an array.
LOSSLESS_HERE = {
    "tiny": torch.tensor([-3e-7, -1e-7, 1e-7, 2e-7]).repeat(8, 8),
    "bfloat16": torch.tensor([-1.5, 0.25, 3.0]).repeat(8, 8).bfloat16(),
    "float64": torch.tensor([1 / 3, 2 / 3], dtype=torch.float64).repeat(8, 8),
}


@pytest.mark.parametrize(
    ("library", "name"),
    [*((lib, name) for lib in LIBRARIES for name in LOSSLESS), *(("palettax", name) for name in LOSSLESS_HERE)],
)
def test_few_values_come_back_as_they_are(library, name):
    weight = (LOSSLESS | LOSSLESS_HERE)[name]
    layer = nn.Linear(*reversed(weight.shape), dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    palettizer = palettizer_of(LIBRARIES[library], "PostTraining", layer, {"global_config": {"n_bits": 2}})
    assert torch.equal(palettizer.compress().weight, weight)  # and of neither library a warning, which is an error


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    # coremltools spreads NaN over the whole table, and gives an infinity an entry.
    model = net()
    with torch.no_grad():
        model.fc1.weight[3, 5] = value
    with pytest.raises(ValueError, match=r"fc1\.weight"):
        compressed(palettax.torch, "PostTraining", model, {})


def test_tied_weights_behind_a_scale_are_clustered_once():
    # coremltools divides by the scale under each name.
    model = nn.ModuleDict({"in": nn.Embedding(32, 16), "out": nn.Linear(16, 32, bias=False)})
    model["out"].weight = model["in"].weight
    options = {"n_bits": 6, "enable_per_channel_scale": True}
    small = compressed(palettax.torch, "PostTraining", model, {"global_config": options})
    _, alone = one_layer(palettax.torch, copy.deepcopy(model["out"]), **options)
    assert small["in"].weight is small["out"].weight
    np.testing.assert_array_equal(small["out"].weight.detach(), alone.depalettize())


# Buffers: test_metadata_utils.py, and the protocol between palettizers and converter

FIELDS = {
    "tensor": ({}, {"lut"}, (1, 1, 1, 1, 16, 1)),
    "groups": ({**GROUPED, "group_size": 4}, {"lut"}, (4, 1, 1, 1, 16, 1)),
    "groups of inputs": ({**GROUPED, "group_size": 4, "channel_axis": 1}, {"lut"}, (1, 4, 1, 1, 16, 1)),
    "vectors": ({"cluster_dim": 4}, {"lut", "vector_axis"}, (1, 1, 1, 1, 16, 4)),
    "vectors of inputs": ({"cluster_dim": 4, "channel_axis": 1}, {"lut", "vector_axis"}, (1, 1, 1, 1, 16, 4)),
    "scale": ({"enable_per_channel_scale": True}, {"lut", "palettization_scale"}, (1, 1, 1, 1, 16, 1)),
    "grouped scale": (
        {**GROUPED, "group_size": 4, "enable_per_channel_scale": True},
        {"lut", "palettization_scale"},
        (4, 1, 1, 1, 16, 1),
    ),
}
INTEGER = {"int8": {"quantization_n_bits", "quantization_scale"}}
INTEGER["uint8"] = INTEGER["int8"] | {"zero_point"}


@pytest.mark.parametrize("lut_dtype", [None, *INTEGER])
@pytest.mark.parametrize("name", FIELDS)
def test_buffers(library, name, lut_dtype):
    options, fields, lut_shape = FIELDS[name]
    config = {"global_config": {"n_bits": 4, "lut_dtype": lut_dtype} | options}
    small = compressed(library, "PostTraining", nn.Sequential(nn.Conv2d(16, 16, 2)), config)
    fields = fields | INTEGER.get(lut_dtype, set()) | {"compression_type"}
    state = {key: tensor for key, tensor in small.state_dict().items() if "_COREML_" in key}
    assert state.keys() == {"_COREML_/metadata_version", *(f"0._COREML_/weight/{field}" for field in fields)}
    assert state["_COREML_/metadata_version"].tolist() == 1
    found = metadata_of(small[0])
    assert found.compression_type == [2] if lut_dtype is None else [2, 3]
    assert (found.lut.shape, found.lut.dtype) == (lut_shape, torch.float32)
    if "vector_axis" in fields:
        assert found.vector_axis == options.get("channel_axis", 0)
    if "palettization_scale" in fields:
        assert found.palettization_scale.shape == (16, 1, 1, 1)
        assert (found.palettization_scale > 0).all()
    if lut_dtype is not None:
        assert found.quantization_n_bits == 8
        # One for each table; behind a scale of channels, palettax keeps one for all.
        one_scale = "palettization_scale" in fields and library is palettax.torch
        assert found.quantization_scale.shape == ((1,) * 6 if one_scale else (*lut_shape[:4], 1, 1))
        levels = found.lut / found.quantization_scale
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
        assert levels.abs().max().round() <= 127
    if lut_dtype == "uint8":
        assert (found.zero_point.shape, found.zero_point.dtype) == (found.quantization_scale.shape, torch.uint8)
        assert ((levels + found.zero_point).round() >= 0).all()
        assert ((levels + found.zero_point).round() <= 255).all()
    # The weight is on the table, bit for bit: else this raises.
    assert is_palettized(px.torch.to_params(small.state_dict())["0.weight"])


# Conversion: test_palettization_conversion.py


def mnist():
    """Its layers, smaller."""
    layers = {
        "conv1": nn.Conv2d(1, 32, 3, padding=1),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(32, 64, 3, padding=1),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "dense1": nn.Linear(256, 48),
        "relu3": nn.ReLU(),
        "dense2": nn.Linear(48, 10),
    }
    return nn.Sequential(OrderedDict(layers))


OUTPUTS, INPUTS = {**GROUPED, "group_size": 16}, {**GROUPED, "group_size": 16, "channel_axis": 1}
CHANNELS = {**GROUPED, "group_size": 1, "enable_per_channel_scale": True}
PACKAGES = {
    "tensors": {
        "conv1": ({}, (1, 1, 1, 1, 16, 1)),
        "conv2": ({"n_bits": 2}, (1, 1, 1, 1, 4, 1)),
        "dense1": ({"n_bits": 2}, (1, 1, 4, 1)),
        "dense2": ({}, (1, 1, 16, 1)),
    },
    "groups of outputs": {
        "conv1": (OUTPUTS, (2, 1, 1, 1, 16, 1)),
        "conv2": (OUTPUTS, (4, 1, 1, 1, 16, 1)),
        "dense1": (OUTPUTS, (3, 1, 16, 1)),
    },
    "groups of inputs": {
        "conv2": (INPUTS, (1, 2, 1, 1, 16, 1)),
        "dense1": (INPUTS, (1, 16, 16, 1)),
        "dense2": (INPUTS, (1, 3, 16, 1)),
    },
    "scaled channels and vectors": {
        "conv1": (CHANNELS | {"n_bits": 2}, (32, 1, 1, 1, 4, 1)),
        "conv2": ({"cluster_dim": 4}, (1, 1, 1, 1, 16, 4)),
        "dense2": (CHANNELS, (10, 1, 16, 1)),
    },
    "groups and scaled channels": {
        "conv1": (OUTPUTS, (2, 1, 1, 1, 16, 1)),
        "dense2": (CHANNELS, (10, 1, 16, 1)),
    },
    "integers": {
        "conv1": (OUTPUTS | {"lut_dtype": "int8"}, (2, 1, 1, 1, 16, 1)),
        "conv2": ({"lut_dtype": "uint8"}, (1, 1, 1, 1, 16, 1)),
        "dense1": (OUTPUTS | {"lut_dtype": "uint8"}, (3, 1, 16, 1)),
        "dense2": ({"lut_dtype": "int8"}, (1, 1, 16, 1)),
    },
}


CONVERTED = [("PostTraining", name) for name in PACKAGES]
CONVERTED += [("SKM", "tensors"), ("DKM", "groups and scaled channels")]


@pytest.mark.parametrize(("algorithm", "name"), CONVERTED)
def test_the_tables_of_a_plain_conversion(library, name, algorithm):
    least = {"weight_threshold": 0} if algorithm == "DKM" else {}
    config = {layer: {"n_bits": 4} | least | options for layer, (options, _) in PACKAGES[name].items()}
    example = torch.ones(1, 1, 8, 8)
    small = compressed(library, algorithm, mnist(), {"module_name_configs": config}, example).eval()
    with quiet():
        mlmodel = ct.convert(
            torch.jit.trace(small, example),
            inputs=[ct.TensorType(shape=example.shape)],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
    ops = mlmodel._mil_program.functions["main"].find_ops(op_type="constexpr_lut_to_dense")
    expected = {layer: shape for layer, (_, shape) in PACKAGES[name].items()}
    assert {op.name.partition("_weight")[0]: op.lut.shape for op in ops} == expected
    audit = px.coreml.audit(mlmodel, small)
    assert audit.leaves.keys() == {f"{layer}.weight" for layer in expected}
    assert all(leaf.indices_identical for leaf in audit.leaves.values())
    # A scale is multiplied into the table by coremltools in float16, by `from_torch` before it is rounded to that.
    scaled = {
        name
        for name, leaf in px.torch.to_params(small.state_dict()).items()
        if getattr(leaf, "scale", None) is not None
    }
    if library is palettax.torch:
        assert {name for name, leaf in audit.leaves.items() if not leaf.identical} <= scaled
