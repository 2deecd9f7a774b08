"""Configurations of Core ML weights: what they refuse, and which weight gets which, beside coremltools."""

from __future__ import annotations

import dataclasses
import warnings

import attrs
import coremltools.optimize.coreml as cto
import pytest
from coreml_programs import model, peer, readers

from palettax.coreml import OpPalettizerConfig, OptimizationConfig, palettize_weights, read_palettes
from palettax.coreml.package import operations

LIBRARIES = pytest.mark.parametrize(
    ("Op", "Whole"),
    [(OpPalettizerConfig, OptimizationConfig), (cto.OpPalettizerConfig, cto.OptimizationConfig)],
    ids=["palettax", "coremltools"],
)


@LIBRARIES
def test_defaults(Op, Whole):
    config = Op(nbits=4)
    assert config.mode.lower() == "kmeans"
    assert (config.lut_function, config.group_size, config.channel_axis) == (None, 32, None)
    assert (config.cluster_dim, config.enable_per_channel_scale, config.num_kmeans_workers) == (1, False, 1)
    assert config.weight_threshold == 2048
    assert getattr(config.granularity, "name", config.granularity).lower() == "per_tensor"
    assert (Whole().global_config, Whole().op_type_configs, Whole().op_name_configs) == (None, {}, {})


def test_positions_are_those_of_coremltools():
    theirs = [field.name for field in attrs.fields(cto.OpPalettizerConfig)]
    assert [field.name for field in dataclasses.fields(OpPalettizerConfig)] == theirs


@LIBRARIES
@pytest.mark.parametrize(
    "keys",
    [
        {"mode": "kmeans"},
        {"mode": "uniform"},
        {"mode": "median", "nbits": 4},
        {"nbits": 5},
        {"nbits": 7},
        {"nbits": "4"},
        {"mode": "unique", "nbits": 4},
        {"mode": "custom"},
        {"mode": "custom", "lut_function": 3},
        {"mode": "custom", "nbits": 4, "lut_function": len},
        {"mode": "unique", "lut_function": len},
        {"nbits": 4, "lut_function": len},
        {"nbits": 4, "granularity": "per_channel"},
        {"nbits": 4, "granularity": "per_block"},
        {"nbits": 4, "granularity": "per_tensr"},
        {"nbits": 4, "cluster_dim": 2.0},
        {"nbits": 4, "weight_threshold": -1},
    ],
    ids=str,
)
def test_both_refuse(Op, Whole, keys):
    with pytest.raises((ValueError, TypeError)):
        Op(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"nbits": 4.0}, "nbits=4.0; use 1, 2, 3, 4, 6 or 8"),
        ({"nbits": True}, "nbits=True"),
        ({"nbits": 4, "group_size": -1}, "group_size=-1; use an integer, 0 or more"),
        ({"nbits": 4, "cluster_dim": 0}, "cluster_dim=0; use an integer, 1 or more"),
        ({"nbits": 4, "mode": "uniform", "cluster_dim": 2}, "mode='uniform' makes no tables of vectors"),
        ({"nbits": 4, "num_kmeans_workers": 0}, "num_kmeans_workers=0"),
        ({"nbits": 4, "weight_threshold": None}, "weight_threshold=None"),
    ],
    ids=str,
)
def test_what_coremltools_lets_pass_and_breaks_on_later(unchecked, keys, message):
    with pytest.raises(ValueError, match=message):
        OpPalettizerConfig(**keys)


@LIBRARIES
def test_modes_and_granularities_in_any_case(Op, Whole):
    assert Op(mode="KMeans", nbits=4).mode.lower() == "kmeans"
    member = cto._config.CompressionGranularity.PER_GROUPED_CHANNEL
    assert Op(nbits=4, granularity=member) == Op(nbits=4, granularity="per_grouped_channel")


NESTED = {
    "config_type": "OpPalettizerConfig",
    "global_config": {"nbits": 4, "weight_threshold": 100},
    "op_type_configs": {"conv": {"mode": "uniform", "nbits": 1, "weight_threshold": 100}, "linear": None},
    "op_name_configs": {"add_cast_fp16": {"mode": "unique"}},
}
EVERY_KEY = {
    "mode": "kmeans",
    "nbits": 3,
    "granularity": "per_grouped_channel",
    "group_size": 8,
    "channel_axis": 1,
    "cluster_dim": 2,
    "enable_per_channel_scale": True,
    "num_kmeans_workers": 3,
    "weight_threshold": 7,
}


@LIBRARIES
def test_dicts_and_yaml(Op, Whole, tmp_path):
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(NESTED))
    built = Whole(global_config=Op(nbits=4, weight_threshold=100))
    built.set_op_type("conv", Op(mode="uniform", nbits=1, weight_threshold=100))
    built.set_op_type("linear", None)
    built.set_op_name("add_cast_fp16", Op(mode="unique"))
    assert Whole.from_dict(NESTED) == built
    assert Whole.from_yaml(str(tmp_path / "config.yaml")) == built
    with (tmp_path / "config.yaml").open() as stream:
        assert Whole.from_yaml(stream) == built
    own_type = {"config_type": "OpPalettizerConfig", **EVERY_KEY}
    whole = {"config_type": "OpPalettizerConfig", "op_type_configs": {"conv": own_type}}
    assert Whole.from_dict(whole).op_type_configs == {"conv": Op(**EVERY_KEY)}


@LIBRARIES
@pytest.mark.parametrize(
    "config",
    [
        {**NESTED, "globl_config": {}},
        {**NESTED, "config_type": "OpMagicConfig"},
        {"config_type": "OpPalettizerConfig", "global_config": {"mode": "custom", "lut_function": len}},
        {"config_type": "OpPalettizerConfig", "op_type_configs": 123},
    ],
    ids=["part", "type", "function", "number"],
)
def test_dicts_that_both_refuse(Op, Whole, config):
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        Whole.from_dict(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"globl_config": {}}, "globl_config: .*did you mean 'global_config'"),
        ({"op_type_configs": {"conv": {"nbit": 4}}}, r"op_type_configs\['conv'\]: nbit: .*did you mean 'nbits'"),
        ({"op_name_configs": {"a": 4}}, r"op_name_configs\['a'\]: 4 is no OpPalettizerConfig"),
        ({"op_type_configs": {"const": None}}, "use set_global, or set_op_name"),
        ({"config_type": "OpLinearQuantizerConfig"}, "config_type='OpLinearQuantizerConfig'; use 'OpPalettizerConfig'"),
    ],
)
def test_messages_say_where(config, message):
    with pytest.raises(ValueError, match=message):
        OptimizationConfig.from_dict(config)


BITS = {"global": 6, "linear": 2, "matmul": 3, "right_cast_fp16": 1, "left_x_0_to_fp16": 8}
RESOLUTION = [
    # what is set, and the bits of each weight, by the op that reads it
    (["global"], {"conv": 6, "lin": 6, "right": 6, "left": 6, "add": 6}),
    (["global", "linear"], {"conv": 6, "lin": 2, "right": 6, "left": 6, "add": 6}),
    (["linear", "matmul"], {"conv": None, "lin": 2, "right": 3, "left": 3, "add": None}),
    (["global", "matmul", "right_cast_fp16"], {"conv": 6, "lin": 6, "right": 1, "left": 3, "add": 6}),
    (["matmul", "left_x_0_to_fp16"], {"conv": None, "lin": None, "right": 3, "left": 8, "add": None}),
    (["global", "no linear", "no right_cast_fp16"], {"conv": 6, "lin": None, "right": None, "left": 6, "add": 6}),
]


@pytest.mark.parametrize(("parts", "expected"), RESOLUTION)
@LIBRARIES
def test_a_name_before_a_type_before_the_global_config(Op, Whole, parts, expected):
    config = Whole()
    for part in parts:
        key = part.removeprefix("no ")
        value = None if part.startswith("no ") else Op(nbits=BITS[key], weight_threshold=100)
        if key == "global":
            config.set_global(value)
        elif key in ("linear", "matmul"):
            config.set_op_type(key, value)
        else:
            config.set_op_name(key, value)
    ours = Whole is OptimizationConfig
    small = palettize_weights(model(), config) if ours else peer(cto.palettize_weights, model(), config)
    bits = {op.name: op.lut.shape[-2].bit_length() - 1 for _, op in operations(small) if "constexpr" in op.op_type}
    names = readers(model())
    assert {op: bits.get(f"{names[op]}_palettized") for op in expected} == expected


@pytest.mark.parametrize("name", ["lin_weight_0", "lin_weight_0_to_fp16"])
def test_the_names_of_tables_will_do(name):
    """Those of `read_palettes`, and of the command line, have no suffixes."""
    small = palettize_weights(model(), OptimizationConfig(op_name_configs={name: {"nbits": 2, "weight_threshold": 9}}))
    assert list(read_palettes(small)) == ["lin_weight_0"]


def test_a_part_of_a_compressed_weight_stands_for_it():
    pruner = cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=100)
    pruned = peer(cto.prune_weights, model(), cto.OptimizationConfig(pruner))
    parts = {op.nonzero_data.op.name for _, op in operations(pruned) if op.op_type == "constexpr_sparse_to_dense"}
    config = OptimizationConfig({"nbits": 2, "weight_threshold": 100}, op_name_configs=dict.fromkeys(parts))
    assert read_palettes(palettize_weights(pruned, config, joint_compression=True)) == {}


def test_the_configuration_of_coremltools_will_do():
    theirs = cto.OptimizationConfig(cto.OpPalettizerConfig(nbits=2, weight_threshold=100))
    theirs.set_op_type("conv", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = palettize_weights(model(), theirs)
    assert {leaf.nbits for leaf in read_palettes(small).values()} == {2}
    assert readers(model())["conv"].removesuffix("_to_fp16") not in read_palettes(small)
    with pytest.raises(ValueError, match=r"global_config: .* is no OpPalettizerConfig"):
        palettize_weights(model(), cto.OptimizationConfig(cto.OpMagnitudePrunerConfig(target_sparsity=0.5)))
