"""Configurations of the torch palettizers: coremltools' own, key for key, but what is wrong is said at once."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import palettax.coreml
import palettax.torch
from palettax.torch.configs import (
    DKMPalettizerConfig,
    PalettizerConfig,
    PostTrainingPalettizerConfig,
    SKMPalettizerConfig,
)
from palettax.torch.module_configs import (
    ModuleDKMPalettizerConfig,
    ModulePostTrainingPalettizerConfig,
    ModuleSKMPalettizerConfig,
)

assert palettax.coreml  # imported first: it brings coremltools in without its noise

WHOLE = [PostTrainingPalettizerConfig, SKMPalettizerConfig, DKMPalettizerConfig]
MODULE = [ModulePostTrainingPalettizerConfig, ModuleSKMPalettizerConfig, ModuleDKMPalettizerConfig]
PTP, SKM, DKM = MODULE
whole = pytest.mark.parametrize("config", WHOLE)
module = pytest.mark.parametrize("config", MODULE)

# From the seeds: "optimize.torch API overview".
SKM_YAML = """\
global_config:
  n_bits: 4
module_type_configs:
  Linear:
    n_bits: 6
module_name_configs:
  conv1: null
  conv3: null
calibration_nsamples: 64
"""

EMPTY = ["", "\n", "{}", "# nothing\n"]


class Net(nn.Sequential):
    def __init__(self):
        layers = {"conv1": nn.Conv2d(1, 8, 3), "conv2": nn.Conv2d(8, 8, 3), "conv3": nn.Conv2d(8, 8, 3)}
        super().__init__(OrderedDict(layers | {"dense": nn.Linear(8, 4), "head": nn.Sequential(nn.Linear(4, 4))}))


def peers(name):
    """The six classes of one of the libraries, by name."""
    if name == "palettax":
        return SimpleNamespace(**{cls.__name__: cls for cls in WHOLE + MODULE})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("coremltools.optimize.torch.palettization")


@pytest.fixture(params=["palettax", "coremltools"])
def library(request):
    return peers(request.param)


def n_bits(config, name, model=None):
    found = config.get_module_config(name, (model or Net()).get_submodule(name))
    return None if found is None else found.n_bits


def value_of(setting):
    return setting.value if isinstance(setting, Enum) else setting


# Both libraries


@pytest.mark.parametrize("source", ["path", "stream"])
def test_the_yaml_of_the_seeds(library, source, tmp_path):
    path = tmp_path / "palettization_config.yaml"
    path.write_text(SKM_YAML)
    if source == "path":
        config = library.SKMPalettizerConfig.from_yaml(str(path))
    else:
        with path.open() as stream:
            config = library.SKMPalettizerConfig.from_yaml(stream)
    assert config.calibration_nsamples == 64
    assert config.global_config.n_bits == 4
    assert [n_bits(config, name) for name in ("conv1", "conv2", "conv3", "dense")] == [None, 4, None, 6]


def test_the_dicts_of_the_seeds(library):
    palettization_config_dict = {
        "global_config": {"n_bits": 4, "granularity": "per_grouped_channel", "group_size": 4},
    }
    grouped = library.PostTrainingPalettizerConfig.from_dict(palettization_config_dict).global_config
    assert (grouped.n_bits, value_of(grouped.granularity), grouped.group_size) == (4, "per_grouped_channel", 4)

    palettization_config_dict = {
        "global_config": {"n_bits": 4, "milestone": 10},
    }
    assert library.DKMPalettizerConfig.from_dict(palettization_config_dict).global_config.milestone == 10

    module_config = {nn.Linear: {"n_bits": 2, "weight_threshold": 1000, "milestone": 2}}
    config = library.DKMPalettizerConfig.from_dict({"module_type_configs": module_config})
    found = config.get_module_config("dense", Net().dense)
    assert (found.n_bits, found.weight_threshold, found.milestone) == (2, 1000, 2)
    assert config.get_module_config("conv1", Net().conv1) is None

    config = library.DKMPalettizerConfig.from_dict({"module_name_configs": {"conv2": {"n_bits": 4}}})
    assert [n_bits(config, name) for name in ("conv1", "conv2", "dense")] == [None, 4, None]


def test_regular_expressions_with_lists(library):
    text = """
module_name_configs:
  conv\\d+:
    - n_bits: 2
      weight_threshold: 1000
      palett_tau: 0.000004
    - n_bits: 4
      weight_threshold: 400
      palett_tau: 0.000004
"""
    config = library.DKMPalettizerConfig.from_yaml(io.StringIO(text))
    found = config.get_module_config("conv1", Net().conv1)
    assert [(one.weight_threshold, one.n_bits, one.palett_tau) for one in found] == [(400, 4, 4e-6), (1000, 2, 4e-6)]


@pytest.mark.parametrize("name", ["PostTrainingPalettizerConfig", "SKMPalettizerConfig", "DKMPalettizerConfig"])
def test_setters(library, name):
    of_model, of_module = getattr(library, name), getattr(library, f"Module{name}")
    config = of_model(global_config=of_module(n_bits=8))
    assert config.set_module_type(nn.Conv2d, of_module(n_bits=6)) is config
    assert config.set_module_name("conv1", of_module(n_bits=2)).set_module_name("conv2", None) is config
    assert [n_bits(config, name) for name in ("conv1", "conv2", "conv3", "dense")] == [2, None, 6, 8]
    assert config.set_global(None) is config
    assert n_bits(config, "dense") is None
    assert n_bits(of_model().set_module_name("conv1", None), "conv1") is None


@pytest.mark.parametrize("name", [cls.__name__ for cls in MODULE])
def test_every_key_of_coremltools_with_its_default(name):
    theirs, ours = getattr(peers("coremltools"), name)().as_dict(), getattr(peers("palettax"), name)().as_dict()
    for key, default in theirs.items():
        if key in ("partition_size", "cluster_dtype"):
            assert key not in ours
        elif key == "palett_tau":  # theirs is the same for weights of any size
            assert ours[key] is None
        elif key == "cluster_dim":  # None says the same
            assert (default, ours[key]) == (None, 1)
        else:
            default = str(default).removeprefix("torch.") if isinstance(default, torch.dtype) else value_of(default)
            assert (ours[key], type(ours[key])) == (default, type(default)), key
    assert ours.keys() - theirs.keys() <= {"weight_threshold"}
    read = getattr(peers("palettax"), name).from_dict(theirs)
    assert read.as_dict() | {"palett_tau": None} == ours | {"palett_tau": None}


BITS = st.sampled_from([None, {"n_bits": 1}, {"n_bits": 3}, {"n_bits": 8}])
NAMES = ["conv1", "conv.", "conv[12]", ".*", "dense", "head", r"head\.0", "nothing"]


@pytest.mark.parametrize("name", ["PostTrainingPalettizerConfig", "SKMPalettizerConfig", "DKMPalettizerConfig"])
@given(
    by_name=st.lists(st.tuples(st.sampled_from(NAMES), BITS), max_size=3),
    by_type=st.lists(st.tuples(st.sampled_from([nn.Linear, nn.Conv2d, "Linear", "Conv2d"]), BITS), max_size=3),
    rest=st.sampled_from([{"n_bits": 2}, {"n_bits": 6}]),
    has_rest=st.booleans(),
)
def test_the_order_of_precedence(name, by_name, by_type, rest, has_rest):
    types = {key if isinstance(key, str) else key.__name__ for key, _ in by_type}
    if len(types) < len(by_type):  # coremltools' PTP and SKM let the last of two spellings win
        by_type = []
    given_ = {"module_name_configs": dict(by_name), "module_type_configs": dict(by_type)}
    given_ |= {"global_config": rest} if has_rest or not (by_name or by_type) else {}
    ours, theirs = (getattr(peers(lib), name).from_dict(given_) for lib in ("palettax", "coremltools"))
    model = Net()
    for module_name, _ in model.named_modules():
        assert n_bits(ours, module_name, model) == n_bits(theirs, module_name, model)


# Values


WRONG = [
    (PTP, "n_bits", 5, "1, 2, 3, 4, 6 or 8"),
    (PTP, "n_bits", 0, "1, 2, 3, 4, 6 or 8"),
    (PTP, "n_bits", "4", "drop the quotes"),
    (PTP, "n_bits", True, "1, 2, 3, 4, 6 or 8"),
    (PTP, "n_bits", 4.0, "1, 2, 3, 4, 6 or 8"),
    (PTP, "n_bits", None, "1, 2, 3, 4, 6 or 8"),
    (SKM, "n_bits", None, "1, 2, 3, 4, 6 or 8"),
    (DKM, "n_bits", 7, "1, 2, 3, 4, 6 or 8"),
    (DKM, "n_bits", "4", "drop the quotes"),
    *((cls, "lut_dtype", value, "'int8'") for cls in MODULE for value in ("int4", torch.int32, 8, "")),
    *((cls, "lut_dtype", value, "'int8'") for cls in (PTP, SKM) for value in (torch.float16, "bf16")),
    (PTP, "granularity", "per_channel", "'per_tensor' or 'per_grouped_channel'"),
    (PTP, "granularity", None, "'per_tensor' or 'per_grouped_channel'"),
    (PTP, "group_size", 0, "1 or more"),
    (PTP, "group_size", "16", "drop the quotes"),
    (PTP, "group_size", 2.5, "an integer"),
    (PTP, "channel_axis", 2, "0 or 1"),
    (PTP, "channel_axis", -1, "0 or 1"),
    (PTP, "channel_axis", False, "0 or 1"),
    (PTP, "cluster_dim", 0, "1 or more"),
    (PTP, "cluster_dim", True, "1 or more"),
    (PTP, "enable_per_channel_scale", 1, "True or False"),
    (PTP, "enable_per_channel_scale", "yes", "True or False"),
    (PTP, "weight_threshold", -1, "0 or more"),
    (PTP, "weight_threshold", None, "0 or more"),
    (PTP, "rounding_precision", "four", "an integer"),
    (DKM, "milestone", -1, "0 or more"),
    (DKM, "milestone", 1.5, "0 or more"),
    (DKM, "dtype", "int4", "'qint8'"),
    (DKM, "dtype", torch.int32, "'qint8'"),
    (DKM, "quantize_activations", None, "True or False"),
    (DKM, "cluster_permute", (0, 0), "the axes"),
    (DKM, "cluster_permute", (1, 2), "the axes"),
    (DKM, "cluster_permute", 1, "the axes"),
    (DKM, "cluster_permute", (True, 0), "the axes"),
    (DKM, "kmeans_max_iter", 0, "1 or more"),
    (DKM, "enforce_zero", 0, "True or False"),
    *((DKM, "palett_mode", value, "'dkm', 'hard' or 'gsm'") for value in ("topk", "DKM", None)),
    *((DKM, "palett_tau", value, "0 or more") for value in (-1e-4, float("nan"), float("inf"), "hot", True)),
    (DKM, "per_channel_scaling_factor_scheme", "max", "'min_max' or 'abs'"),
    (DKM, "kmeans_init", 3, "a string"),
    (DKM, "palett_unique", "no", "True or False"),
    (DKM, "palett_lambda", [], "a number"),
    (DKM, "quant_min", 1.5, "an integer"),
    (DKM, "quant_max", "127", "drop the quotes"),
    (DKM, "partition_size", 16, "group_size"),
    (DKM, "cluster_dtype", "int4", "'int8'"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("config", "key", "value", "use"), WRONG)
def test_a_wrong_value_is_named_with_its_key_and_what_to_use(config, key, value, use):
    expected = rf"^{key}={re.escape(repr(value))}; .*{re.escape(use)}"
    with pytest.raises(ValueError, match=expected):
        config(**{key: value})
    with pytest.raises(ValueError, match=expected):
        config.from_dict({key: value})


@pytest.mark.parametrize(
    ("config", "keys", "message"),
    [
        (PTP, {"granularity": "per_grouped_channel"}, r"group_size=None; .*group_size=16"),
        (PTP, {"group_size": 8}, r"group_size=8; .*granularity='per_grouped_channel'"),
        (PTP, {"granularity": "per_grouped_channel", "group_size": 8, "cluster_dim": 3}, r"cluster_dim=3; .*size=8"),
        (DKM, {"lut_dtype": "f16", "cluster_dtype": "i8"}, r"cluster_dtype='i8' and lut_dtype='f16'"),
        (DKM, {"lut_dtype": "f32", "cluster_dtype": "i8"}, r"cluster_dtype='i8' and lut_dtype='f32'"),
        (DKM, {"quant_min": 5, "quant_max": 5}, r"quant_min=5 and quant_max=5"),
        (DKM, {"lut_dtype": "i8", "quant_max": 128}, r"quant_max=128; .*'i8'.*127"),
        (DKM, {"lut_dtype": "i8", "quant_min": 0, "quant_max": 0}, r"quant_min=0 and quant_max=0"),
        (DKM, {"lut_dtype": "u8", "quant_min": -1}, r"quant_min=-1.*'u8'.*0 ≤ quant_min"),
        (DKM, {"lut_dtype": "u8", "quant_min": 0, "quant_max": 15}, r"quant_max=15; .*128 ≤ quant_max ≤ 255"),
    ],
)
def test_values_that_contradict_each_other(config, keys, message):
    with pytest.raises(ValueError, match=message):
        config(**keys)


@module
@pytest.mark.parametrize(("wrong", "right"), [("nbits", "n_bits"), ("weight_treshold", "weight_threshold")])
def test_an_unknown_key_brings_up_the_nearest(config, wrong, right):
    with pytest.raises(ValueError, match=rf"^{wrong}: {config.__name__} has no such key; did you mean '{right}'"):
        config.from_dict({wrong: 4})
    with pytest.raises(TypeError, match=rf"^{wrong}: {config.__name__} has no such key; did you mean '{right}'"):
        config(**{wrong: 4})


@whole
def test_an_unknown_key_of_the_whole(config):
    with pytest.raises(TypeError, match=rf"^globl_config: {config.__name__} has no such key; did you mean 'global_con"):
        config(globl_config=None)


def test_the_configuration_of_coremltools_is_told_apart(unchecked):
    theirs = peers("coremltools").PostTrainingPalettizerConfig()
    with pytest.raises(ValueError, match=r"the PostTrainingPalettizerConfig of coremltools.*; give that of palettax"):
        palettax.torch.PostTrainingPalettizer(nn.Linear(4, 4), theirs)


def test_noise_is_not_added():
    with pytest.warns(UserWarning, match="'gsm' is taken as 'dkm'"):
        assert DKM(palett_mode="gsm").palett_mode == "gsm"


@pytest.mark.usefixtures("unchecked")
@whole
@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"global": {}}, r"^global: \w+ has no such key; .*'global_config'"),
        ({"n_bits": 4}, r"^n_bits: \w+ has no such key; .*'global_config'"),
        ({"n_bits": None}, r"^n_bits: \w+ has no such key"),
        ({"global_config": 4}, r"^global_config=4; use a Module\w+ or a dict"),
        ({"global_config": []}, r"^global_config=\[\]; use None"),
        ({"global_config": [{}, None]}, r"^global_config\[1\]=None; use a Module"),
        ({"global_config": {"n_bits": "4"}}, r"^global_config: n_bits='4'; drop the quotes"),
        ({"module_type_configs": {nn.Linear: {"n_bits": 5}}}, r"^module_type_configs\[Linear\]: n_bits=5; "),
        ({"module_type_configs": {"Linear": [{}, {"nbits": 5}]}}, r"^module_type_configs\['Linear'\]\[1\]: nbits: "),
        ({"module_type_configs": {torch.matmul: {}}}, r"^module_type_configs: <.*matmul.*; use a module class"),
        ({"module_type_configs": {int: {}}}, r"^module_type_configs: <class 'int'>; use a module class"),
        ({"module_type_configs": [{}]}, r"^module_type_configs=\[{}\]; use a dict"),
        ({"module_name_configs": {"conv1": {"n_bits": 5}}}, r"^module_name_configs\['conv1'\]: n_bits=5; "),
        ({"module_name_configs": {"conv[": {}}}, r"^module_name_configs: 'conv\[' is no regular expression"),
        ({"module_name_configs": {1.5: {}}}, r"^module_name_configs: 1.5 is no string; put quotes"),
        ({"module_name_configs": {True: {}}}, r"^module_name_configs: True is no string; put quotes"),
        ({"module_name_configs": "conv1"}, r"^module_name_configs='conv1'; use a dict"),
    ],
)
def test_a_wrong_configuration_says_where(config, given_, message):
    with pytest.raises(ValueError, match=message):
        config.from_dict(given_)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [0, -1, "64", 1.5, True, None])
def test_calibration_nsamples(value):
    with pytest.raises(ValueError, match=rf"calibration_nsamples={value!r}; .*use an integer, 1 or more"):
        SKMPalettizerConfig(calibration_nsamples=value)


def test_the_configuration_of_another_palettizer_is_refused():
    with pytest.raises(ValueError, match=r"global_config=ModuleSKM.*; use a ModuleDKMPalettizerConfig"):
        DKMPalettizerConfig(ModuleSKMPalettizerConfig())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("config", WHOLE + MODULE)
@pytest.mark.parametrize("given_", [None, [], 4, "n_bits"])
def test_only_dicts_are_read(config, given_):
    with pytest.raises(ValueError, match=rf"{config.__name__} is read from a dict"):
        config.from_dict(given_)


@pytest.mark.usefixtures("unchecked")
def test_other_types_of_the_same_values():
    class Granularity(Enum):
        grouped = "per_grouped_channel"

    config = ModuleDKMPalettizerConfig(
        n_bits=np.int64(6),
        granularity=Granularity.grouped,
        group_size=np.int32(8),
        cluster_dim=None,
        quantize_activations=np.True_,
        palett_tau=1,
        cluster_permute=[1, 0],
    )
    plain = ModuleDKMPalettizerConfig(
        n_bits=6,
        granularity="per_grouped_channel",
        group_size=8,
        quantize_activations=True,
        palett_tau=1.0,
        cluster_permute=(1, 0),
    )
    assert config == plain
    assert json.dumps(config.as_dict()) == json.dumps(plain.as_dict())


@pytest.mark.usefixtures("unchecked")
def test_yaml_reads_1e_4_as_text():
    assert yaml.safe_load("1e-4") == "1e-4"
    assert ModuleDKMPalettizerConfig.from_yaml("palett_tau: 1e-4\nprune_threshold: 1e-7").palett_tau == 1e-4


INTEGERS = {
    "int8": ["int8", "i8", "qint8", "torch.int8", "INT8", torch.int8, torch.qint8],
    "uint8": ["uint8", "u8", "quint8", torch.uint8, torch.quint8],
    None: [None, "f32", "float32", torch.float32],
}
FLOATS = {
    "float16": ["f16", "float16", torch.float16],
    "bfloat16": ["bf16", "bfloat16", "b16", torch.bfloat16],
}


@module
@pytest.mark.parametrize(("name", "spelling"), [(name, s) for name, spellings in INTEGERS.items() for s in spellings])
def test_spellings_of_integer_tables(config, name, spelling):
    found = config(lut_dtype=spelling)
    assert found.lut_dtype_name == name
    assert found == config.from_dict(found.as_dict())
    if config is not ModuleDKMPalettizerConfig:  # as coremltools has it
        assert found.lut_dtype == (None if name is None else getattr(torch, name))


@pytest.mark.parametrize("key", ["lut_dtype", "cluster_dtype"])
@pytest.mark.parametrize(
    ("name", "spelling"), [(name, s) for name, spellings in (INTEGERS | FLOATS).items() for s in spellings]
)
def test_both_names_of_the_dtype_of_tables(key, name, spelling):
    found = ModuleDKMPalettizerConfig(**{key: spelling})
    assert found.lut_dtype_name == name
    assert found.lut_dtype in ("i8", "u8", "f16", "bf16", "f32")
    both = ModuleDKMPalettizerConfig(lut_dtype=spelling, cluster_dtype=found.lut_dtype)
    assert found == both == dataclasses.replace(found) == ModuleDKMPalettizerConfig.from_dict(found.as_dict())


@pytest.mark.parametrize(
    ("lut_dtype", "least", "most", "levels"),
    [
        ("f32", -128, 127, None),
        ("f32", 0, 255, None),
        ("i8", -128, 127, None),
        ("u8", -128, 127, None),
        ("i8", -7, 7, (-7, 7)),
        ("i8", 0, 15, (0, 15)),
        ("u8", 0, 255, (-128, 127)),
        ("u8", 121, 135, (-7, 7)),
    ],
)
def test_levels(lut_dtype, least, most, levels):
    assert ModuleDKMPalettizerConfig(lut_dtype=lut_dtype, quant_min=least, quant_max=most).levels == levels


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("qint8", torch.qint8),
        ("int8", torch.qint8),
        (torch.qint8, torch.qint8),
        ("quint8", torch.quint8),
        ("uint8", torch.quint8),
        ("float32", torch.float32),
    ],
)
def test_the_dtype_of_activations(spelling, dtype):
    assert ModuleDKMPalettizerConfig(dtype=spelling).dtype == dtype
    assert ModuleDKMPalettizerConfig(dtype=spelling).activation_dtype is None
    quantized = ModuleDKMPalettizerConfig(dtype=spelling, quantize_activations=True)
    assert quantized.activation_dtype == (None if dtype == torch.float32 else dtype)


def test_the_width_depends_on_the_module_in_dkm():
    class Own(nn.Linear):
        pass

    modules = nn.Linear(2, 2), Own(2, 2), nn.Conv2d(1, 1, 1), nn.Embedding(2, 2), nn.MultiheadAttention(2, 1)
    assert [ModuleDKMPalettizerConfig().n_bits_for(one) for one in modules] == [4, 4, 2, 2, 2]
    assert [ModuleDKMPalettizerConfig(n_bits=3).n_bits_for(one) for one in modules] == [3] * 5
    assert ModuleSKMPalettizerConfig().n_bits_for(nn.Conv2d(1, 1, 1)) == 4


INERT = {
    PTP: {"enable_fast_kmeans_mode": False, "rounding_precision": 2},
    DKM: {
        "kmeans_init": "opt1d",
        "kmeans_n_init": 5,
        "kmeans_opt1d_threshold": 1,
        "kmeans_batch_threshold": 8,
        "kmeans_error_bnd": 0.1,
        "palett_max_mem": 0.5,
        "palett_min_tsize": 1,
        "palett_unique": True,
        "palett_shard": True,
        "palett_batch_mode": True,
        "palett_dist": True,
        "palett_lambda": 0.5,
        "palett_epsilon": 0.1,
        "palett_cluster_tol": 0.5,
        "add_extra_centroid": True,
        "zero_threshold": 0.1,
        "prune_threshold": 0.1,
        "percentage_palett_enable": 0.5,
        "per_channel_scaling_factor_scheme": "abs",
    },
}


@pytest.mark.parametrize(("config", "key", "value"), [(cls, k, v) for cls in INERT for k, v in INERT[cls].items()])
def test_a_key_without_effect_warns_only_when_it_is_set(config, key, value):
    with pytest.warns(UserWarning, match=rf"^{key}={value!r} has no effect: \w+"):
        found = config(**{key: value})
    assert getattr(found, key) == value
    config(**{key: config().as_dict()[key]})  # the default, without a warning


WARNS = """
from palettax.torch.configs import DKMPalettizerConfig
DKMPalettizerConfig.from_dict({"module_name_configs": {"conv1": [{"palett_unique": True}]}})
"""


def test_a_warning_is_of_the_line_that_asked():
    # In another process, without the frames of the type checker: only what is laid at this script's door is an error.
    command = [sys.executable, "-W", "ignore", "-W", "error::UserWarning:__main__", "-c", WARNS]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "UserWarning: palett_unique=True has no effect" in run.stderr


def test_module_configurations_do_not_change():
    config = ModuleSKMPalettizerConfig(2)
    assert config.n_bits == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_bits = 4
    with pytest.raises(ValueError, match="n_bits=5"):
        dataclasses.replace(config, n_bits=5)
    with pytest.raises(TypeError):
        ModuleSKMPalettizerConfig(2, torch.int8)  # the order of keys differs between the three


# Reading and writing


@st.composite
def module_dicts(draw, config):
    keys = {
        "n_bits": st.sampled_from([1, 2, 3, 4, 6, 8]),
        "lut_dtype": st.sampled_from([None, "int8", torch.uint8]),
        "channel_axis": st.integers(0, 1),
        "cluster_dim": st.sampled_from([None, 1, 2, 4]),
        "enable_per_channel_scale": st.booleans(),
        "weight_threshold": st.integers(0, 10**6),
    }
    if config is ModuleDKMPalettizerConfig:
        keys |= {
            "lut_dtype": st.sampled_from([None, "i8", "u8", "f16", torch.bfloat16]),
            "milestone": st.integers(0, 100),
            "dtype": st.sampled_from(["qint8", torch.quint8]),
            "cluster_permute": st.sampled_from([None, (1, 0), (1, 2, 3, 0)]),
            "palett_tau": st.none() | st.floats(0, 10),
            "palett_mode": st.sampled_from(["dkm", "hard"]),
        }
    chosen = draw(st.fixed_dictionaries({}, optional=keys))
    if draw(st.booleans()):
        chosen |= {"granularity": "per_grouped_channel", "group_size": draw(st.sampled_from([4, 8]))}
    return chosen


@st.composite
def whole_dicts(draw, config):
    one = module_dicts(config._of_module)
    value = one | st.none() | st.lists(one, min_size=1, max_size=3)
    sections = {
        "global_config": value,
        "module_type_configs": st.dictionaries(st.sampled_from([nn.Linear, "Conv2d", "Own"]), value),
        "module_name_configs": st.dictionaries(st.sampled_from(NAMES), value),
    }
    if config is SKMPalettizerConfig:
        sections["calibration_nsamples"] = st.integers(1, 1000)
    return draw(st.fixed_dictionaries({}, optional=sections))


@whole
@given(data=st.data())
def test_what_is_written_is_read_again(config, data):
    found = config.from_dict(data.draw(whole_dicts(config)))
    assert config.from_dict(found.as_dict()) == found
    if isinstance(found.global_config, config._of_module):
        one = found.global_config
        assert config._of_module.from_yaml(yaml.safe_dump(one.as_dict())) == one
        assert config._of_module.from_dict(json.loads(json.dumps(one.as_dict()))) == one


@whole
def test_what_is_given_is_neither_changed_nor_kept(config):
    by_name, by_size = {"conv1": {"n_bits": 2}}, [{"weight_threshold": 9}, {"weight_threshold": 3}]
    found = config(by_size, module_name_configs=by_name).set_module_name("conv2", None)
    assert (by_name, by_size) == ({"conv1": {"n_bits": 2}}, [{"weight_threshold": 9}, {"weight_threshold": 3}])
    assert [one.weight_threshold for one in found.global_config] == [3, 9]
    found.as_dict()["module_name_configs"].clear()
    assert list(found.module_name_configs) == ["conv1", "conv2"]


@pytest.mark.parametrize("config", WHOLE + MODULE)
@pytest.mark.parametrize("text", EMPTY)
def test_an_empty_configuration_is_the_default(config, text, tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text(text)
    default = config()
    assert config.from_dict({}) == default
    assert config.from_yaml(text) == config.from_yaml(io.StringIO(text)) == default
    assert config.from_yaml(path) == config.from_yaml(str(path)) == default


@whole
def test_the_default_is_the_default_of_every_module(config):
    assert config().global_config == config._of_module()
    assert config(module_type_configs={}).global_config == config._of_module()
    assert config.from_yaml("module_type_configs:\nmodule_name_configs:\nglobal_config:\n") == config()
    assert config.from_dict({"global_config": {}}) == config()
    assert config(module_name_configs={"conv1": {}}).global_config is None
    assert config(module_type_configs={nn.Linear: None}).global_config is None


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("config", WHOLE + MODULE)
def test_yaml_that_is_none(config, tmp_path):
    with pytest.raises(ValueError, match="this is no YAML: "):
        config.from_yaml("global_config: {n_bits: 4\n")
    with pytest.raises(ValueError, match="is read from a dict"):
        config.from_yaml("- n_bits: 4\n- n_bits: 2\n")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        config.from_yaml(str(tmp_path / "nowhere.yaml"))


def test_yaml_of_numbered_modules():
    config = SKMPalettizerConfig.from_yaml("module_name_configs:\n  0: null\n  '1': {n_bits: 2}\n")
    assert config.module_name_configs == {"0": None, "1": ModuleSKMPalettizerConfig(n_bits=2)}


# Resolution


class Linear(nn.Module):
    """The namesake of a class of torch.nn."""


@whole
def test_what_a_parameter_is_found_by(config):
    model = Net()

    def found(**sections):
        config_ = config.from_dict({key: {name: {"n_bits": n} for name, n in s.items()} for key, s in sections.items()})
        config_.set_global({"n_bits": 8})
        one = config_.for_parameter("head.0.weight", model.head[0], 10**6)
        assert one is config_.choose("head.0.weight", model.head[0], 10**6).config
        return one.n_bits

    # Names: of the module or of the parameter, all of them, the first one given.
    assert found(module_name_configs={r"head\.0": 1, r"head\..*": 2}) == 1
    assert found(module_name_configs={r"head\..*": 2, r"head\.0": 1}) == 2
    assert found(module_name_configs={r"head\.0\.weight": 3, r"head\.0": 1}) == 3
    assert found(module_name_configs={"head": 1, "0": 1, "weight": 1, "ead.0": 1}) == 8
    # Types: the class before its name, its own before that of a parent.
    assert found(module_type_configs={"Linear": 1, nn.Linear: 2}) == 2
    assert found(module_type_configs={nn.Module: 1, nn.Conv2d: 1}) == 8
    for spelling in ("Linear", "nn.Linear", "torch.nn.Linear", "torch.nn.modules.linear.Linear"):
        assert found(module_type_configs={spelling: 6}) == 6
    # Names before types.
    assert found(module_name_configs={r"head\.0": 1}, module_type_configs={nn.Linear: 2}) == 1


def test_a_class_is_told_from_its_namesake():
    config = DKMPalettizerConfig(module_type_configs={nn.Linear: {}, "torch.nn.Linear": {}, "nn.Linear": {}})
    assert config.for_parameter("own.weight", Linear(), 10**6) is None
    config.set_module_type(f"{__name__}.Linear", {"n_bits": 6})
    assert config.for_parameter("own.weight", Linear(), 10**6).n_bits == 6
    config = DKMPalettizerConfig(module_type_configs={"Linear": {"n_bits": 3}})
    assert config.for_parameter("own.weight", Linear(), 10**6).n_bits == 3


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True), size=st.integers(0, 60))
def test_of_a_list_the_largest_threshold_that_is_exceeded(sizes, size):
    configs = [PTP(weight_threshold=threshold) for threshold in sizes]
    found = PostTrainingPalettizerConfig(configs).for_parameter("weight", nn.Linear(1, 1), size)
    assert found == max(
        (c for c in configs if size > c.weight_threshold), key=lambda c: c.weight_threshold, default=None
    )


def test_why_a_parameter_is_left_alone():
    module = Net().conv1
    config = DKMPalettizerConfig(module_name_configs={"conv1": None, "conv.": [{}, {"weight_threshold": 4096}]})
    assert config.choose("conv1.weight", module, 10**6) == (None, "module_name_configs['conv1'] is None", True)
    assert config.choose("dense.weight", module, 10**6) == (None, "global_config is None", False)
    config_of_2049 = config.choose("conv2.weight", module, 2049)
    assert (config_of_2049.config, config_of_2049.reason) == (ModuleDKMPalettizerConfig(), "")
    small = config.choose("conv2.weight", module, 2048)
    assert small.config is None
    assert re.fullmatch(r"its 2048 weights .* weight_threshold=2048 of module_name_configs\['conv\.'\]", small.reason)


def test_the_name_of_a_module_that_the_name_of_its_parameter_does_not_begin_with():
    attention = nn.MultiheadAttention(4, 1)
    config = PostTrainingPalettizerConfig(module_name_configs={"attention": {"n_bits": 3}})
    assert config.for_parameter("attention.in_proj_weight", attention, 48).n_bits == 3
    assert config.for_parameter("attention.out_proj.weight", attention, 16) is None
    assert config.for_parameter("attention.out_proj.weight", attention, 16, module_name="attention").n_bits == 3


@whole
def test_keys_that_fit_nothing_are_warned_of_once_each(config):
    names = {"conv1": None, r"conv\d": {}, r"head\.0\.weight": {}, ".*": {}, "cnov1": {}}
    types = {nn.LSTM: {}, "LSTM": {}, "torch.nn.LSTM": {}, "Net": {}, f"{__name__}.Net": {}, "Liner": {}, "init": {}}
    found = config(module_name_configs=names, module_type_configs=types)
    with pytest.warns(UserWarning, match="_configs") as record:
        found.warn_unmatched(Net())
    said = [str(warning.message) for warning in record]
    assert len(said) == 3
    assert re.fullmatch(r"module_name_configs\['cnov1'\] matches no .*; did you mean 'conv1.*", said[0])
    assert re.fullmatch(r"module_type_configs\['Liner'\] is no class .*; did you mean 'Linear'\?", said[1])
    assert said[2].startswith("module_type_configs['init'] is no class")
    config().warn_unmatched(Net())


def test_the_base_is_for_all_three():
    assert all(issubclass(config, PalettizerConfig) for config in WHOLE)
