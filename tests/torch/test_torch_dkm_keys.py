"""What the keys of DKM do to the table of one layer."""

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

import palettax.torch
from palettax.torch import DKMPalettizer, DKMPalettizerConfig
from palettax.torch.attach import palettes_of


def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 8)


def prepared(model=None, **options):
    config = {"global_config": {"n_bits": 2, "weight_threshold": 0, **options}}
    palettizer = DKMPalettizer(model or layer(), DKMPalettizerConfig.from_dict(config))
    return palettizer, palettizer.prepare().train()


def trained(model=None, steps=2, **options):
    palettizer, model = prepared(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.eye(8)).square().sum().backward()
        optimizer.step()
        palettizer.step()
    return palettizer


def table(small):
    return palettax.torch.to_params(small.state_dict())["weight"]


def test_enforce_zero_keeps_an_entry_at_zero():
    assert (table(trained(enforce_zero=True).finalize()).lut == 0).any()
    assert not (table(trained().finalize()).lut == 0).any()


def test_hard_is_cold():
    hard, cold = (trained(**options).finalize() for options in ({"palett_mode": "hard"}, {"palett_tau": 0}))
    assert torch.equal(hard.weight, cold.weight)
    _, model = prepared(palett_mode="hard")
    assert model.weight.unique().numel() == 4
    _, model = prepared()
    assert model.weight.unique().numel() > 4


def test_palett_tau_is_in_squared_weights():
    model = layer()
    _, large = prepared(model, palett_tau=0.01)
    with torch.no_grad():
        model.weight.mul_(2**-8)
    _, small = prepared(model, palett_tau=0.01 * 2**-16)
    np.testing.assert_allclose(small.weight.detach() * 2**8, large.weight.detach(), rtol=1e-4, atol=1e-6)


def test_the_levels_are_between_quant_min_and_quant_max():
    leaf = table(trained(lut_dtype="i8", quant_min=-8, quant_max=7).finalize())
    assert leaf.lut.dtype == np.int8
    assert -8 <= leaf.lut.min() < leaf.lut.max() <= 7
    assert abs(table(trained(lut_dtype="i8").finalize()).lut.astype(int)).max() > 8


@pytest.mark.parametrize(("permute", "axis"), [((1, 0), 1), ((0, 1), 0), (None, 0)])
def test_vectors_lie_along_the_first_axis_of_cluster_permute(permute, axis):
    assert table(trained(cluster_dim=2, cluster_permute=permute).finalize()).vector_axis == axis


def test_fake_palettization_can_be_turned_on_and_off():
    palettizer, model = prepared(milestone=100)
    original = model.parametrizations.weight.original
    assert torch.equal(model.weight, original)
    palettizer.enable_fake_palett(True)
    soft = model.weight.detach().clone()
    assert not torch.equal(soft, original)
    palettizer.enable_fake_palett(False)
    assert torch.equal(model.weight, original)


@pytest.mark.parametrize("milestone", [0, 5])
def test_turned_off_and_on_again_the_table_is_still_the_trained_one(milestone):
    palettizer = trained(steps=4)
    (model,) = {p.module for p in palettes_of(palettizer._model)}
    model.milestone = milestone
    before = table(palettizer.finalize())
    palettizer.enable_fake_palett(False)
    assert palettizer._model(torch.eye(8)).shape == (8, 8)
    palettizer.enable_fake_palett(True)
    palettizer.step()
    after = table(palettizer.finalize())
    np.testing.assert_array_equal(after.lut, before.lut)
    np.testing.assert_array_equal(after.indices, before.indices)


def test_preparing_puts_a_model_into_training():
    config = DKMPalettizerConfig.from_dict({"global_config": {"n_bits": 2, "weight_threshold": 0}})
    assert DKMPalettizer(layer().eval(), config).prepare().training


def test_a_refused_model_is_left_as_it_was():
    model = torch.nn.Sequential(layer(), layer())
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    config = DKMPalettizerConfig.from_dict({"global_config": {"n_bits": 2, "weight_threshold": 0}})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1\.weight: .*1 NaN"):
            DKMPalettizer(model, config).prepare(inplace=True)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_sparse_gradients():
    torch.manual_seed(0)
    _, model = prepared(torch.nn.Embedding(16, 8, sparse=True))
    _, again = prepared(torch.nn.Embedding(16, 8, _weight=model.parametrizations.weight.original.detach().clone()))
    for one in (model, again):
        one(torch.tensor([1, 3])).square().sum().backward()
    found, wanted = (m.parametrizations.weight.original.grad for m in (model, again))
    torch.testing.assert_close(found, wanted)


def test_a_pruned_model_is_copied():
    model = torch.nn.Sequential(layer(), layer())
    prune.l1_unstructured(model[0], "weight", 0.5)
    palettizer, prepared_model = prepared(model)
    prepared_model(torch.eye(8)).square().sum().backward()
    assert (palettizer.finalize()[0].weight == 0).float().mean() >= 0.5
    assert isinstance(model[0].weight_orig, torch.nn.Parameter)


def test_the_report_is_of_the_tables_of_now():
    palettizer = trained()
    rows = palettizer.report()
    assert rows["weight"].nbits == 2
    assert rows["bias"].skipped == "not the weight of a layer, and not named by itself"
    assert prepared(milestone=3)[0].report()["weight"].skipped == "its palette does not count yet"
    small = palettizer.finalize()
    assert rows["weight"].sqnr == pytest.approx(
        palettax.report({"w": layer_weights(palettizer)}, {"w": small.weight.detach().numpy()})["w"].sqnr, rel=1e-6
    )


def layer_weights(palettizer):
    return palettizer._model.parametrizations.weight.original.detach().numpy()


def test_a_step_without_palettes_is_said():
    with pytest.warns(UserWarning, match="no palettes; call prepare, and train what it returns"):
        DKMPalettizer(layer()).step()


def test_a_frozen_weight_has_a_palette_and_stays_as_it_is():
    model = layer()
    model.weight.requires_grad_(False)
    palettizer, prepared_model = prepared(model)
    optimizer = torch.optim.SGD(prepared_model.parameters(), 0.1)
    prepared_model(torch.eye(8)).square().sum().backward()
    optimizer.step()
    assert torch.equal(prepared_model.parametrizations.weight.original, model.weight)
    assert not torch.equal(prepared_model.bias, model.bias)
    small = palettizer.finalize()
    assert small.weight.unique().numel() == 4


def test_constant_channels_with_a_scale():
    model = layer()
    with torch.no_grad():
        model.weight[0], model.weight[1] = 0.25, 0
    palettizer, prepared_model = prepared(model, enable_per_channel_scale=True)
    prepared_model(torch.eye(8)).sum().backward()
    assert torch.isfinite(prepared_model.parametrizations.weight.original.grad).all()
    small = palettizer.finalize()
    assert torch.isfinite(small.weight).all()
    assert [len(row.unique()) for row in small.weight[:2]] == [1, 1]
    assert table(small).scale.shape == (8, 1)


def test_what_is_written_to_data_is_noticed():
    palettizer, model = prepared()
    original = model.parametrizations.weight.original
    assert torch.equal(model.weight, model.weight)
    original.data.mul_(2)
    assert not torch.equal(model.weight, original)
    assert model.parametrizations.weight[0].count == 2
    model.eval()
    hard = model.weight.clone()
    original.data.mul_(2)
    assert torch.equal(model.weight, palettizer.finalize().weight)
    assert not torch.equal(model.weight, hard)


def test_errors_have_the_name_of_the_parameter():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), layer())
    _, prepared_model = prepared(model)
    with torch.no_grad():
        prepared_model[1].parametrizations.weight.original[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^1\.weight: .*NaN"):
        prepared_model.eval()[1](torch.eye(8))


def test_vectors_are_not_zero_in_part():
    with pytest.raises(ValueError, match=r"enforce_zero=True with cluster_dim=2"):
        prepared(enforce_zero=True, cluster_dim=2)
    model = layer()
    prune.l1_unstructured(model, "weight", 0.5)
    config = DKMPalettizerConfig.from_dict({"global_config": {"cluster_dim": 2, "weight_threshold": 0}})
    with pytest.raises(ValueError, match=r"weight: it is being pruned.*cluster_dim=1"):
        DKMPalettizer(model, config).prepare(inplace=True)
