"""The palettizers of torch models: what they store, how they train, and that nothing else in torch notices."""

import copy

import jax
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch.nn.utils import prune

import palettax as px
import palettax.coreml  # before coremltools, whose import it keeps quiet
import palettax.torch
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
from coremltools.optimize.torch.pruning import MagnitudePruner, MagnitudePrunerConfig  # isort: skip


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


@pytest.mark.parametrize("pruned_first", [True, False])
def test_weights_may_be_pruned_again_and_again(pruned_first):
    """torch puts the hook that masks at the end anew each time; the layer is to compute with palettes all the same."""
    model = net()
    if pruned_first:
        prune.l1_unstructured(model[0], "weight", 0.2)
    palettizer = dkm(model, n_bits=2)
    prepared = palettizer.prepare(inplace=True).train()
    for _ in range(3):
        prune.l1_unstructured(prepared[0], "weight", 0.2)
        train(prepared, palettizer, steps=2)
        copied = copy.deepcopy(prepared).eval()
        copied(torch.ones(1, 16))
        assert copied[0].weight.unique().numel() == 5
    outputs = prepared.eval()(torch.ones(1, 16))
    small = palettizer.finalize()
    assert torch.equal(small(torch.ones(1, 16)), outputs)
    assert (small[0].weight == 0).sum() >= 200


def test_two_weights_of_a_layer_may_be_pruned():
    model = torch.nn.LSTM(8, 8)
    config = DKMPalettizerConfig.from_dict({"module_type_configs": {"LSTM": {"n_bits": 2, "weight_threshold": 10}}})
    prepared = DKMPalettizer(model, config).prepare()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        prune.l1_unstructured(prepared, name, 0.5)
    prepared.register_parameter("another", torch.nn.Parameter(torch.ones(2)))
    assert {name for name, _ in prepared.named_parameters()} >= {"weight_ih_l0_orig", "weight_hh_l0_orig", "another"}


def test_a_copy_trains_on_its_own():
    palettizer = dkm(net(), n_bits=2)
    model = train(palettizer.prepare().train(), palettizer)
    before = model[0].weight.detach().clone()
    train(copy.deepcopy(model), palettizer)
    assert torch.equal(before, model[0].weight)


def test_finalizing_a_copy_leaves_the_model_in_training():
    palettizer = dkm(net(), n_bits=2)
    model = train(palettizer.prepare().train(), palettizer, steps=1)
    first = palettizer.finalize()
    train(model, palettizer, steps=1)
    second = palettizer.finalize()
    assert type(first[0]) is type(second[0]) is torch.nn.Linear
    assert not torch.equal(first[0].weight, second[0].weight)
    prune.l1_unstructured(copy.deepcopy(model)[0], "weight", 0.5)
    assert model[0].weight.shape == (32, 16)


class Doubled(torch.nn.Module):
    def forward(self, values):
        return 2 * values


def test_preparing_a_copy_leaves_the_model_whole():
    model = net()
    torch.nn.utils.parametrize.register_parametrization(model[0], "bias", Doubled())
    before = model(torch.ones(1, 16))
    prepared = dkm(model, n_bits=2).prepare()
    assert torch.equal(model(torch.ones(1, 16)), before)
    assert not torch.equal(prepared(torch.ones(1, 16)), before)


def test_buffers_and_scalars_are_no_weights():
    model = net()
    del model[0].weight
    model[0].register_buffer("weight", torch.randn(32, 16))
    model.register_parameter("scale", torch.nn.Parameter(torch.tensor(2.0)))
    config = PostTrainingPalettizerConfig.from_dict({"module_name_configs": {".*": {"n_bits": 1}}})
    small = PostTrainingPalettizer(model, config).compress()
    assert torch.equal(small[0].weight, model[0].weight)
    assert set(px.torch.load.tables_of(small)) == {"2.weight"}


def test_a_shared_module_is_dense_for_one_reason():
    shared = torch.nn.Linear(4, 4)
    model = torch.nn.ModuleDict({"a": shared, "b": shared, "c": torch.nn.Linear(16, 16)})
    palettizer = PostTrainingPalettizer(
        model, PostTrainingPalettizerConfig.from_dict({"global_config": {"weight_threshold": 99}})
    )
    palettizer.compress()
    reasons = {name: row.skipped for name, row in palettizer.report().items()}
    assert "99" in reasons["a.weight"]
    assert reasons["a.weight"] == reasons["b.weight"]


@pytest.mark.parametrize("palettizer", [DKMPalettizer, PostTrainingPalettizer])
def test_tied_parameters_are_reported_once(palettizer):
    model = torch.nn.ModuleDict({"in": torch.nn.Embedding(30, 16), "out": torch.nn.Linear(16, 30, bias=False)})
    model["out"].weight = model["in"].weight
    config = getattr(palettax.torch, f"{palettizer.__name__}Config").from_dict(
        {"global_config": {"n_bits": 4, "weight_threshold": 9}}
    )
    made = palettizer(model, config)
    made.prepare() if palettizer is DKMPalettizer else made.compress()
    rows = made.report()
    assert (rows["out.weight"].tied_to, rows["out.weight"].nbits) == ("in.weight", 4)
    assert rows.nbytes == rows["in.weight"].nbytes


def test_names_of_one_parameter_are_configured_alike():
    model = torch.nn.ModuleDict({"in": torch.nn.Embedding(30, 16), "out": torch.nn.Linear(16, 30, bias=False)})
    model["out"].weight = model["in"].weight
    groups = {"granularity": "per_grouped_channel", "group_size": 8}
    for names in ({"in": {"n_bits": 6}}, {"in": {"n_bits": 6}, "out": {"n_bits": 4, **groups}}, {"in": None}):
        config = {"global_config": {"n_bits": 4}, "module_name_configs": names}
        with pytest.raises(ValueError, match=r"tied to in\.weight, .*'out\.weight\|in\.weight'"):
            PostTrainingPalettizer(model, PostTrainingPalettizerConfig.from_dict(config)).compress()
    both = PostTrainingPalettizerConfig.from_dict({"module_name_configs": {"out.weight|in.weight": {"n_bits": 1}}})
    assert PostTrainingPalettizer(model, both).compress()["in"].weight.unique().numel() == 2


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
    assert {leaf.lut_dtype for leaf in audit.leaves.values()} == {"int8 of float16"}
    assert {dense.reason for dense in audit.dense.values()} == {"it has one axis"}


def test_norms_are_not_meant_by_a_pattern():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16))
    for names, dense in (({".*": {}}, True), ({r"1": {}}, False), ({"0|1": {}}, False), ({"1.weight": {}}, False)):
        small = PostTrainingPalettizer(model, PostTrainingPalettizerConfig.from_dict({"module_name_configs": names}))
        assert ("1.weight" not in px.torch.load.tables_of(small.compress())) == dense


def test_values_that_are_not_finite_are_named():
    model = net()
    with torch.no_grad():
        model[2].weight[1, 1] = torch.inf
    with pytest.raises(ValueError, match=r"^2\.weight: 1 NaN or infinite values; mend them, or leave it alone"):
        PostTrainingPalettizer(model).compress()


def test_a_shared_module_is_found_by_each_of_its_names():
    shared = torch.nn.Linear(16, 16)
    model = torch.nn.ModuleDict({"a": shared, "b": shared})
    config = PostTrainingPalettizerConfig.from_dict({"module_name_configs": {"b": {"n_bits": 2}}})
    assert PostTrainingPalettizer(model, config).compress()["a"].weight.unique().numel() == 4
    alone = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": 2}, "module_name_configs": {"b": None}})
    with pytest.raises(ValueError, match=r"b\.weight: it is tied to a\.weight, which is configured differently"):
        PostTrainingPalettizer(model, alone).compress()


def test_a_type_without_known_weights_is_said():
    types = {name: {"n_bits": 2} for name in ("LSTMCell", "Linear")}
    config = PostTrainingPalettizerConfig.from_dict({"module_type_configs": types})
    with pytest.warns(UserWarning, match=r"module_type_configs\['LSTMCell'\]: none of its parameters"):
        PostTrainingPalettizer(torch.nn.Sequential(torch.nn.LSTMCell(8, 8), torch.nn.Linear(8, 8)), config).compress()


def test_what_is_wrong_is_said_before_the_sensitivities():
    with pytest.raises(ValueError, match=r"weight: it is on the meta device"):
        SKMPalettizer(torch.nn.Linear(8, 8, device="meta")).compress([torch.ones(1, 8)], lambda *_: 1 / 0)


def test_meta_parameters_are_refused():
    with pytest.raises(ValueError, match=r"weight: it is on the meta device"):
        PostTrainingPalettizer(torch.nn.Linear(8, 8, device="meta")).compress()


@pytest.mark.parametrize(
    ("normalize", "undo"), [("weight_norm", "remove_weight_norm"), ("spectral_norm", "remove_spectral_norm")]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_that_are_computed_are_refused(normalize, undo):
    model = torch.nn.Sequential(getattr(torch.nn.utils, normalize)(torch.nn.Linear(16, 8)), torch.nn.Linear(8, 8))
    for palettizer in (PostTrainingPalettizer(model), dkm(model)):
        with pytest.raises(ValueError, match=rf"0\.weight: it is computed from weight_.*{undo}"):
            getattr(palettizer, "compress" if hasattr(palettizer, "compress") else "prepare")()
    config = PostTrainingPalettizerConfig.from_dict({"module_name_configs": {"0": None, "1": {"n_bits": 1}}})
    PostTrainingPalettizer(model, config).compress(inplace=True)
    assert model[1].weight.unique().numel() == 2
    getattr(torch.nn.utils, undo)(model[0])
    assert PostTrainingPalettizer(model).compress()[0].weight.unique().numel() == 16


def test_what_a_layer_has_beside_its_weight_is_palettized_by_its_own_name():
    names = {"0.bias": {"n_bits": 1}, r"\d\.weight": None, "2.*": None}
    config = PostTrainingPalettizerConfig.from_dict({"module_name_configs": names})
    palettizer = PostTrainingPalettizer(net(), config)
    small = palettizer.compress()
    assert [tensor.unique().numel() for tensor in small.parameters()] == [
        2 if n == "0.bias" else t.numel() for n, t in net().named_parameters()
    ]


def test_the_report_says_why_a_parameter_is_dense():
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4), torch.nn.BatchNorm1d(4)
    )
    config = {"global_config": {"weight_threshold": 100}, "module_name_configs": {"2": None}}
    palettizer = PostTrainingPalettizer(model, PostTrainingPalettizerConfig.from_dict(config))
    palettizer.compress()
    reasons = {name: row.skipped for name, row in palettizer.report().items() if row.skipped}
    assert "0.weight" not in reasons
    assert reasons["0.bias"] == reasons["3.weight"] == "not the weight of a layer, and not named by itself"
    assert reasons["1.weight"] == "its 16 weights do not exceed weight_threshold=100 of global_config"
    assert reasons["2.weight"] == "module_name_configs['2'] is None"
    assert reasons["3.running_mean"] == "no parameter"


def test_sensitivities_of_tied_and_unused_parameters():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"in": torch.nn.Embedding(32, 16), "out": torch.nn.Linear(16, 32, bias=False), "idle": torch.nn.Linear(16, 16)}
    )
    model["out"].weight = model["in"].weight

    def loss(model, batch):
        return model["out"](model["in"](batch)).square().mean()

    palettizer = SKMPalettizer(model, SKMPalettizerConfig.from_dict({"global_config": {"n_bits": 2}}))
    small = palettizer.compress([torch.arange(32)], loss)
    assert small["in"].weight is small["out"].weight
    fisher = px.torch.fisher_diagonal(model, [torch.arange(32)], loss)
    weights = px.torch.to_params(model.state_dict())
    expected = px.palettize(
        {"w": weights["in.weight"]}, px.kmeans(2), sensitivity={"w": fisher["in.weight"]}, weight_threshold=0
    )
    np.testing.assert_array_equal(small["in"].weight.detach(), expected["w"].depalettize())
    plain = px.palettize({"w": weights["idle.weight"]}, px.kmeans(2), weight_threshold=0)["w"]
    np.testing.assert_array_equal(small["idle"].weight.detach(), plain.depalettize())
    assert palettizer.report()["idle.weight"].unweighted == 1


def test_sensitive_k_means_is_palettize_with_the_fisher_information():
    model = net()
    batches = [torch.randn(6, 16, generator=torch.Generator().manual_seed(2)) for _ in range(2)]

    def loss(model, batch):
        return model(batch).square().sum()

    config = SKMPalettizerConfig.from_dict({"global_config": {"n_bits": 2}, "calibration_nsamples": 12})
    small = SKMPalettizer(model, config).compress(batches, loss)
    fisher = px.torch.fisher_diagonal(model, batches, loss)
    weights = px.torch.to_params(model.state_dict())
    expected = px.palettize(weights, px.kmeans(2), sensitivity=fisher, weight_threshold=32)
    for name in ("0.weight", "2.weight"):
        np.testing.assert_array_equal(dict(small.named_parameters())[name].detach(), expected[name].depalettize())


def test_sensitivities_go_through_a_file_and_frozen_parameters_are_clustered_alike(tmp_path):
    model = net()
    model[2].weight.requires_grad_(False)
    batches = [torch.randn(6, 16, generator=torch.Generator().manual_seed(2))]
    palettizer = SKMPalettizer(model, SKMPalettizerConfig.from_dict({"global_config": {"n_bits": 2}}))

    def loss(model, batch):
        return model(batch).square().sum()

    palettizer.compute_sensitivity(batches, loss, tmp_path / "fisher.pt")
    one, other = palettizer.compress(batches, loss), palettizer.compress(sensitivity_path=tmp_path / "fisher.pt")
    assert torch.equal(one[0].weight, other[0].weight)
    plain = px.palettize(model[2].weight.detach().numpy(), px.kmeans(2), weight_threshold=0)
    np.testing.assert_array_equal(one[2].weight.detach(), plain.depalettize())


class Sequence(torch.nn.Module):
    """Attention, a norm, recurrent layers and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = torch.nn.LayerNorm(16)
        self.lstm = torch.nn.LSTM(16, 16, batch_first=True)
        self.gru = torch.nn.GRU(16, 16, batch_first=True)
        self.bare = torch.nn.Parameter(torch.eye(16) + 0.1 * torch.randn(16, 16))

    def forward(self, inputs):
        hidden = self.norm(self.attention(inputs, inputs, inputs, need_weights=False)[0])
        return self.gru(self.lstm(hidden)[0])[0] @ self.bare


def test_layers_of_every_kind_are_trained_and_stored():
    torch.manual_seed(0)
    config = {"n_bits": 2, "weight_threshold": 10}
    palettizer = DKMPalettizer(
        Sequence(),
        DKMPalettizerConfig.from_dict(
            {"global_config": config, "module_name_configs": dict.fromkeys(("bare", "lstm", "gru"), config)}
        ),
    )
    model = palettizer.prepare().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 5, 16)).square().mean().backward()
        optimizer.step()
        palettizer.step()
        copy.deepcopy(model)
    assert all(
        not torch.equal(parameter, start[name]) for name, parameter in model.named_parameters() if "weight" in name
    )
    small = palettizer.finalize()
    stored = {
        *("attention.in_proj_weight", "attention.out_proj.weight", "norm.weight", "bare"),
        *(f"{kind}.weight_{way}_l0" for kind in ("lstm", "gru") for way in ("ih", "hh")),
    }
    leaves = px.torch.to_params(small.state_dict())
    assert {name for name, leaf in leaves.items() if is_palettized(leaf)} == stored
    assert {type(module) for module in small.children()} == {type(module) for module in Sequence().children()}
    # What the layer computes with is what is stored.
    plain = Sequence()
    plain.load_state_dict({name: tensor for name, tensor in small.state_dict().items() if "_COREML_" not in name})
    inputs = torch.randn(1, 5, 16)
    assert torch.equal(small(inputs), plain.eval()(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_train_and_stay_narrow(dtype):
    palettizer = dkm(net()[:1].to(dtype), n_bits=2)
    model = palettizer.prepare().train()
    model(torch.ones(2, 16, dtype=dtype)).float().square().sum().backward()
    assert model[0].parametrizations.weight.original.grad.dtype == dtype
    small = palettizer.finalize()
    assert small[0].weight.dtype == dtype
    assert small[0].weight.unique().numel() == 4


@pytest.mark.parametrize("scale", [1e-7, 1e3])
def test_weights_of_any_size_keep_all_their_values(scale):
    model = net()[:1]
    with torch.no_grad():
        model[0].weight.mul_(scale)
    palettizer = dkm(model, n_bits=4)
    palettizer.prepare().train()(torch.ones(1, 16)).sum().backward()
    assert palettizer.finalize()[0].weight.unique().numel() == 16


def test_activation_checkpointing_and_data_parallel_wrappers_change_nothing(tmp_path):
    gradients = []
    for way in ("plain", "checkpoint", "wrapper"):
        model = dkm(net(), n_bits=2).prepare().train()
        inputs = torch.ones(4, 16, requires_grad=True)
        if way == "checkpoint":
            torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=False).sum().backward()
        elif way == "wrapper":
            torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
            torch.nn.parallel.DistributedDataParallel(model)(inputs).sum().backward()
            torch.distributed.destroy_process_group()
        else:
            model(inputs).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for others in gradients[1:]:
        assert all(torch.equal(one, other) for one, other in zip(gradients[0], others, strict=True))


@pytest.mark.parametrize("frontend", ["export", "trace"])
@pytest.mark.parametrize("dtype", ["qint8", "quint8"])
def test_quantized_activations_are_still_there_after_conversion(frontend, dtype):
    palettizer = dkm(net(), n_bits=2, quantize_activations=True, dtype=dtype)
    train(palettizer.prepare().train(), palettizer)
    small = palettizer.finalize()
    inputs = torch.randn(64, 16)
    assert small[0](inputs).unique().numel() <= 256
    with pytest.raises(ValueError, match="0, 2: activations are quantized, for which iOS16 has no op"):
        px.coreml.from_torch(small, inputs, minimum_deployment_target="iOS16", frontend=frontend)
    mlmodel = px.coreml.from_torch(small, inputs, minimum_deployment_target="iOS18", frontend=frontend)
    ops = [op.op_type for op in mlmodel._mil_program.functions["main"].operations]
    assert ops.count("quantize") == ops.count("dequantize") == 2
    assert px.coreml.audit(mlmodel, small).identical


@pytest.mark.parametrize("palettizer_ends_first", [True, False])
def test_coremltools_pruner_through_a_whole_training_run(palettizer_ends_first):
    model = net()
    palettizer = dkm(model, n_bits=2)
    prepared = palettizer.prepare(inplace=True).train()
    config = MagnitudePrunerConfig.from_dict(
        {"global_config": {"scheduler": {"update_steps": [1, 2]}, "target_sparsity": 0.5}}
    )
    pruner = MagnitudePruner(prepared, config)
    pruner.prepare(inplace=True)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        prepared(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        pruner.step()
        palettizer.step()
    if palettizer_ends_first:
        small = pruner.finalize(palettizer.finalize(), inplace=True)
    else:
        small = palettizer.finalize(pruner.finalize(prepared, inplace=True))
    assert (small[0].weight == 0).float().mean() >= 0.5
    assert small[0].weight.unique().numel() <= 5
    mlmodel = px.coreml.from_torch(small, torch.zeros(1, 16), minimum_deployment_target="iOS18")
    assert px.coreml.audit(mlmodel, small).identical


@pytest.mark.parametrize("palettizer", [DKMPalettizer, PostTrainingPalettizer])
def test_recurrent_layers_are_palettized_only_when_asked_for(palettizer):
    """The converter takes their gates apart, so that a package could not hold their tables."""
    model = torch.nn.ModuleDict({"lstm": torch.nn.LSTM(64, 64), "head": torch.nn.Linear(64, 64)})
    made = palettizer(model)
    if palettizer is DKMPalettizer:
        found = {name for name, _ in made.prepare().named_parameters() if "original" in name}
        assert found == {"head.parametrizations.weight.original"}
    else:
        leaves = px.torch.to_params(made.compress().state_dict())
        assert {name for name, leaf in leaves.items() if is_palettized(leaf)} == {"head.weight"}


def test_what_the_work_is_shared_among_has_no_effect():
    with pytest.warns(UserWarning, match="num_kmeans_workers=8 has no effect: the solver uses all cores"):
        PostTrainingPalettizer(torch.nn.Linear(64, 64)).compress(num_kmeans_workers=8)
    palettizer = SKMPalettizer(torch.nn.Linear(64, 64))
    options = {"num_kmeans_workers": 8, "num_sensitivity_workers": 2, "fsdp_auto_wrap_policy": len}
    with pytest.warns(UserWarning, match="has no effect") as warned:
        palettizer.compress([torch.ones(2, 64)], lambda model, x: model(x).sum(), **options)
    assert sorted(str(one.message).split("=")[0] for one in warned) == sorted(options)


class Recurrent(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.head = getattr(torch.nn, kind)(16, 24, batch_first=True), torch.nn.Linear(24, 8)

    def forward(self, values):
        return self.head(self.layer(values)[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_convert(kind):
    config = PostTrainingPalettizerConfig.from_dict({"module_name_configs": {".*": {"n_bits": 4}}})
    small, inputs = PostTrainingPalettizer(Recurrent(kind).eval(), config).compress(), torch.randn(2, 5, 16)
    options = {"minimum_deployment_target": "iOS18", "compute_precision": ct.precision.FLOAT32}
    if kind == "RNN":
        mlmodel = px.coreml.from_torch(small, inputs, **options)
        assert px.coreml.audit(mlmodel, small).identical
    else:
        with pytest.warns(UserWarning, match=r"layer\.weight_ih_l0, layer\.weight_hh_l0: dense in the package"):
            mlmodel = px.coreml.from_torch(small, inputs, **options)
        assert list(px.coreml.read_palettes(mlmodel)) == ["head.weight"]
    if kind == "LSTM":  # the others are loops, which are not evaluated here
        name = mlmodel.get_spec().description.input[0].name
        (found,) = px.coreml.run(mlmodel, {name: inputs.numpy()}).values()
        np.testing.assert_allclose(found, small(inputs).detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("frontend", ["export", "trace"])
def test_attention_converts_by_either_frontend(frontend):
    model = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    config = PostTrainingPalettizerConfig.from_dict({"module_type_configs": {"MultiheadAttention": {"n_bits": 4}}})
    small, inputs = PostTrainingPalettizer(model, config).compress(), torch.randn(2, 6, 32)
    mlmodel = px.coreml.from_torch(small, inputs, minimum_deployment_target="iOS18", frontend=frontend)
    assert px.coreml.audit(mlmodel, small).identical
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_layer_may_write_to_the_weight_it_was_given():
    palettizer = dkm(net(), n_bits=1)
    model = train(palettizer.prepare(), palettizer).eval()
    with torch.no_grad():
        before = model[0].weight.clone()
        model[0].weight.clamp_(0, 0)
        assert torch.equal(model[0].weight, before)


def test_gradients_flow_after_inference_mode():
    palettizer = dkm(net(), n_bits=1)
    model = train(palettizer.prepare(), palettizer).eval()
    with torch.inference_mode():
        model(torch.ones(1, 16))
    inputs = torch.ones(1, 16, requires_grad=True)
    model.requires_grad_(False)(inputs).sum().backward()
    assert inputs.grad.abs().sum() > 0


def test_palettizing_anew_what_was_edited():
    model = net()
    small = PostTrainingPalettizer(model).compress()
    with torch.no_grad():
        small[0].weight += torch.randn_like(small[0].weight)
    edited = small[0].weight.detach().numpy().copy()
    again = PostTrainingPalettizer(small).compress()
    expected = px.palettize(edited, px.kmeans(4), weight_threshold=0).depalettize()
    np.testing.assert_array_equal(again[0].weight.detach(), expected)


def test_finalizing_what_was_never_prepared_is_said():
    with pytest.warns(UserWarning, match="the model has no palettes; call prepare"):
        dkm(net()).finalize()


@pytest.mark.parametrize("config", [{"global_config": {}}, PostTrainingPalettizerConfig()])
@pytest.mark.usefixtures("unchecked")
def test_a_configuration_of_another_kind_is_refused(config):
    with pytest.raises(ValueError, match=r"config is a \w+, not a DKMPalettizerConfig; DKMPalettizerConfig.from_dict"):
        DKMPalettizer(net(), config)


class Adapted(torch.nn.Linear):
    """A layer that merges what was trained beside its weight into it when it is put in eval mode."""

    def __init__(self):
        super().__init__(16, 32)
        self.beside = torch.nn.Parameter(torch.full((32, 16), 0.01))

    def train(self, mode=True):
        if self.training and not mode:
            self.weight.data += self.beside.data
        return super().train(mode)

    def forward(self, x):
        beside = self.beside if self.training else 0 * self.beside
        return torch.nn.functional.linear(x, self.weight + beside, self.bias)


def test_layers_that_merge_weights_in_eval_mode_are_refused():
    config = {"module_name_configs": {"0": {"n_bits": 2, "weight_threshold": 10}}}
    small = PostTrainingPalettizer(
        torch.nn.Sequential(Adapted()), PostTrainingPalettizerConfig.from_dict(config)
    ).compress()
    with pytest.raises(ValueError, match=r"0\.weight: eval\(\) changes it"):
        px.coreml.from_torch(small, torch.ones(1, 16), minimum_deployment_target="iOS18")
    for inplace in (False, True):
        model = torch.nn.Sequential(Adapted())
        before = copy.deepcopy(model.state_dict())
        palettizer = DKMPalettizer(model, DKMPalettizerConfig.from_dict(config))
        with pytest.raises(ValueError, match=r"0\.weight: eval\(\) changes it"):
            palettizer.prepare(inplace)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    merged = torch.nn.Sequential(Adapted()).eval()
    small = PostTrainingPalettizer(merged, PostTrainingPalettizerConfig.from_dict(config)).compress()
    mlmodel = px.coreml.from_torch(small, torch.ones(1, 16), minimum_deployment_target="iOS18")
    assert list(px.coreml.read_palettes(mlmodel)) == ["0.weight"]


class Masked(torch.nn.Linear):
    """A layer with a mask of its own, as autoregressive networks have."""

    def __init__(self):
        super().__init__(16, 32)
        self.register_buffer("weight_mask", torch.ones(32, 16).tril())

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.weight_mask, self.bias)


def test_layers_that_merge_weights_may_stay_dense():
    config = {"module_name_configs": {"0": None}, "global_config": {"n_bits": 2, "weight_threshold": 10}}
    model = torch.nn.Sequential(Adapted(), torch.nn.Linear(32, 8))
    palettizer = DKMPalettizer(model, DKMPalettizerConfig.from_dict(config))
    prepared = train(palettizer.prepare(), palettizer)
    final = palettizer.finalize()
    torch.testing.assert_close(final[0].weight, prepared[0].weight + prepared[0].beside)
    assert len(final[1].weight.unique()) == 4


def test_a_mask_of_a_layers_own_is_no_pruning():
    model = torch.nn.Sequential(Masked())
    config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": 2}})
    assert len(PostTrainingPalettizer(model, config).compress()[0].weight.unique()) == 4
    palettizer = dkm(model, n_bits=2)
    train(palettizer.prepare(), palettizer)
    assert len(palettizer.finalize()[0].weight.unique()) == 4


def test_tables_that_weights_have_left_are_removed():
    config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": 2}})
    small = PostTrainingPalettizer(net(), config).compress()
    palettizer = DKMPalettizer(small, DKMPalettizerConfig.from_dict({"global_config": {"weight_threshold": 300}}))
    train(palettizer.prepare(), palettizer)
    with pytest.warns(UserWarning, match=r"^2\.weight: changed since it was palettized"):
        final = palettizer.finalize()
    assert list(px.torch.load.tables_of(final)) == ["0.weight"]


def test_tables_of_weights_that_did_not_change_stay():
    config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": 2}})
    small = PostTrainingPalettizer(net(), config).compress()
    small[2].weight.requires_grad_(False)
    palettizer = DKMPalettizer(small, DKMPalettizerConfig.from_dict({"global_config": {"weight_threshold": 300}}))
    train(palettizer.prepare(), palettizer)
    assert list(px.torch.load.tables_of(palettizer.finalize())) == ["0.weight", "2.weight"]


def tied():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    model[1].weight = model[0].weight
    return model


def test_a_tied_parameter_that_is_pruned_in_one_place_is_refused():
    model = tied()
    prune.l1_unstructured(model[1], "weight", 0.5)
    with pytest.raises(ValueError, match=r"0\.weight: it is tied, and not all its modules prune it alike"):
        dkm(model).prepare()


class Stateful(torch.nn.Linear):
    """A layer with what no array holds in its state dict."""

    def __init__(self):
        super().__init__(16, 32)
        self.register_buffer("neighbours", torch.eye(16).to_sparse())

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_state_that_is_no_array_is_in_nobodys_way():
    model = torch.nn.Sequential(Stateful())
    config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": 2}})
    small = PostTrainingPalettizer(model, config).compress()
    assert list(px.torch.load.tables_of(small)) == ["0.weight"]
    palettizer = SKMPalettizer(model, SKMPalettizerConfig.from_dict({"global_config": {"n_bits": 2}}))
    weighted = palettizer.compress([torch.randn(4, 16)], lambda model, x: model(x).square().mean())
    assert len(weighted[0].weight.unique()) == 4
    palettizer = dkm(model, n_bits=2)
    train(palettizer.prepare(), palettizer)
    mlmodel = px.coreml.from_torch(palettizer.finalize(), torch.ones(1, 16), minimum_deployment_target="iOS18")
    assert list(px.coreml.read_palettes(mlmodel)) == ["0.weight"]


def test_models_are_averaged_with_their_buffers():
    palettizer = dkm(net(), n_bits=2)
    model = palettizer.prepare()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        train(model, palettizer, steps=1)
        average.update_parameters(model)
    final = palettizer.finalize(average.module)
    assert len(final[0].weight.unique()) == 4


@pytest.mark.parametrize("strict", [True, False])
def test_the_state_of_a_dense_model_loads_and_makes_new_tables(strict):
    palettizer = dkm(net(), n_bits=2)
    model = train(palettizer.prepare(), palettizer)
    torch.manual_seed(5)
    dense = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    assert not any(model.load_state_dict(dense.state_dict(), strict=strict))
    fresh = dkm(dense, n_bits=2).prepare()
    inputs = torch.ones(1, 16)
    torch.testing.assert_close(model.train()(inputs), fresh(inputs), rtol=0, atol=0)
    for name, value in fresh.state_dict().items():
        if not name.endswith("steps"):
            torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


def test_what_is_stored_right_after_a_state_is_loaded_is_of_that_state():
    palettizer = dkm(net(), n_bits=2)
    model = palettizer.prepare()
    dense = {name: 3 * tensor for name, tensor in net().state_dict().items()}
    model.eval()(torch.ones(1, 16))
    model.load_state_dict(dense)
    tripled = net()
    tripled.load_state_dict(dense)
    fresh = dkm(tripled, n_bits=2)
    fresh.prepare().eval()(torch.ones(1, 16))
    assert palettizer.report() == fresh.report()
    assert torch.equal(palettizer.finalize()[0].weight, fresh.finalize()[0].weight)


def test_lazy_layers_are_named():
    with pytest.raises(ValueError, match=r"^0\.weight: it has no shape yet"):
        PostTrainingPalettizer(torch.nn.Sequential(torch.nn.LazyLinear(8))).compress()


def test_the_seed_of_torch_changes_nothing_for_scalars():
    parameters = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = DKMPalettizerConfig.from_dict({"global_config": {"weight_threshold": 10}})
        parameters.append(px.torch.parameters.parameters_of(net(), config, trained=True).palettized[0])
    one, other = map(px.torch.recipe.trained_recipe_of, parameters)
    assert one == other


def test_that_nothing_is_palettized_is_said():
    palettizer = DKMPalettizer(net())
    with pytest.warns(UserWarning, match=r"no parameter is palettized: .*2048"):
        palettizer.prepare()
    with pytest.warns(UserWarning, match="no parameter is palettized: the model has no parameters"):
        PostTrainingPalettizer(torch.nn.ReLU()).compress()


def test_reports_come_after_the_work():
    with pytest.raises(ValueError, match="call prepare first"):
        DKMPalettizer(net()).report()


def test_known_sensitivities_are_read_and_kept(tmp_path):
    model, path = net(), tmp_path / "sensitivity.pt"
    palettizer = SKMPalettizer(model, SKMPalettizerConfig.from_dict({"global_config": {"n_bits": 2}}))
    data, loss = [torch.randn(4, 16)], lambda model, x: model(x).square().mean()
    palettizer.compress(data, loss, path)
    torch.save({name: torch.ones_like(p) for name, p in model.named_parameters()}, path)
    before = path.read_bytes()
    with pytest.warns(UserWarning, match=r"sensitivity\.pt exists: it is read"):
        small = palettizer.compress(data, loss, path)
    assert path.read_bytes() == before
    config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": 2}})
    plain = PostTrainingPalettizer(model, config).compress()
    torch.testing.assert_close(small[0].weight, plain[0].weight)


def test_what_is_pruned_after_it_was_palettized_is_left_alone():
    config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": 2}})
    small = PostTrainingPalettizer(net(), config).compress()
    prune.l1_unstructured(small[0], "weight", 0.5)
    alone = {"module_name_configs": {"0": None}, "global_config": {"n_bits": 1}}
    again = PostTrainingPalettizer(small, PostTrainingPalettizerConfig.from_dict(alone)).compress()
    assert torch.equal(again[0].weight, small[0].weight)
    assert len(again[2].weight.unique()) == 2
