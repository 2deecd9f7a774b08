"""Reading packages of any maker, and an audit that notices every bit."""

from __future__ import annotations

import dataclasses

import coremltools as ct
import ml_dtypes
import numpy as np
import pytest
import torch
from coreml_models import Mixed, Mnist
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

import palettax as px
from palettax.coreml import audit, from_torch, read_palettes
from palettax.coreml.scoped import quiet
from palettax.torch import load_into, to_params
from tests.leaves import random_leaf

UINT2 = types.nptype_from_builtin(types.string_to_builtin("uint2"))


@pytest.fixture(scope="module")
def leaves():
    leaves = {"dense1.weight": random_leaf((16, 128), 4, groups=(2, 1)), "dense2.weight": random_leaf((12, 16), seed=1)}
    # float16 cannot hold these tables as they are.
    return {name: dataclasses.replace(leaf, lut=leaf.lut * np.float32(1.0001)) for name, leaf in leaves.items()}


@pytest.fixture(scope="module")
def mlmodel(leaves):
    return from_torch(Mnist(), Mnist.example, leaves, minimum_deployment_target="iOS18")


def _plain_convert(model, example, target=ct.target.iOS18, **options):
    """coremltools alone, which finds the tables in the module's buffers and searches the indices."""
    with quiet():
        program = torch.export.export(model.eval(), (example,)).run_decompositions({})
        return ct.convert(program, minimum_deployment_target=target, skip_model_load=True, **options)


def test_audit_says_yes_and_lists_what_stayed_dense(mlmodel, leaves):
    result = audit(mlmodel, leaves)
    assert result.identical
    assert all(leaf.lut_rounded and leaf.lut_dtype == "float16" for leaf in result.leaves.values())
    assert result.dense["p_conv2_weight"] == ((8, 8, 3, 3), "float16", 1152, "no table was given for it")
    assert not {"dense1_weight", "dense2_weight", "p_dense1_weight", "p_dense2_weight"} & result.dense.keys()
    assert all(name in str(result) for name in (*leaves, "p_conv2_weight", "identical", "2 palettized"))


def _tampered(leaf, part):
    array = np.array(getattr(leaf, part), order="C")
    flat = array.reshape(-1)
    flat[5] = (flat[5] + 1) % 4 if part == "indices" else flat[5] * 1.01
    return dataclasses.replace(leaf, **{part: array})


@pytest.mark.parametrize("part", ["lut", "indices"])
def test_audit_sees_one_changed_entry(mlmodel, leaves, part):
    result = audit(mlmodel, leaves | {"dense1.weight": _tampered(leaves["dense1.weight"], part)})
    leaf = result.leaves["dense1.weight"]
    assert not result.identical
    assert (leaf.lut_identical, leaf.indices_identical) == (part != "lut", part != "indices")
    assert result.leaves["dense2.weight"].identical
    assert "NOT identical" in str(result)
    assert "DIFFERENT" in str(result)


def test_audit_sees_a_last_bit_that_survives_rounding(leaves):
    leaf = leaves["dense2.weight"]
    exact = from_torch(
        Mnist(), Mnist.example, leaves, minimum_deployment_target="iOS18", compute_precision=ct.precision.FLOAT32
    )
    nudged = dataclasses.replace(leaf, lut=np.nextafter(leaf.lut, np.float32(9)))
    assert audit(exact, leaves).identical
    assert not audit(exact, {"dense2.weight": nudged}).identical


def test_audit_sees_a_missing_leaf(mlmodel, leaves):
    result = audit(mlmodel, leaves | {"conv2.weight": random_leaf((8, 8, 3, 3))})
    assert result.leaves["conv2.weight"].found is None
    assert not result.identical
    assert "missing" in str(result)


def test_audit_sees_another_scale():
    leaves = {"dense2.weight": random_leaf((12, 16), scale=(12, 1))}
    mlmodel = from_torch(Mnist(), Mnist.example, leaves, minimum_deployment_target="iOS26")
    assert audit(mlmodel, leaves).identical
    for scale in (None, leaves["dense2.weight"].scale * 2):
        other = audit(mlmodel, {"dense2.weight": dataclasses.replace(leaves["dense2.weight"], scale=scale)})
        assert not other.identical
        assert other.leaves["dense2.weight"].lut_identical


def test_audit_sees_another_mask_and_another_level():
    leaf = random_leaf((12, 16), mask=True, lut_dtype=np.uint8, seed=1)
    mlmodel = from_torch(Mnist(), Mnist.example, {"dense2.weight": leaf}, minimum_deployment_target="iOS18")
    row, column = np.argwhere(~leaf.mask)[0]
    mask, level = leaf.mask.copy(), leaf.lut.copy()
    mask[row, column], level[0, 0, 0, 0] = True, level[0, 0, 0, 0] + 1
    found = audit(mlmodel, {"dense2.weight": leaf})
    assert found.identical
    assert found.leaves["dense2.weight"].lut_dtype == "uint8 of float16"
    for part, other, differs in (("mask", mask, "mask"), ("mask", None, "mask"), ("lut", level, "lut")):
        found = audit(mlmodel, {"dense2.weight": dataclasses.replace(leaf, **{part: other})}).leaves["dense2.weight"]
        parts = ("lut", "indices", "scale", "mask")
        assert [name for name in parts if not getattr(found, f"{name}_identical")] == [differs]


@pytest.mark.parametrize("form", [{"mask": True, "kept": True}, {"lut_dtype": ml_dtypes.float8_e4m3fn}])
def test_audit_refuses_what_no_package_holds(mlmodel, form):
    with pytest.raises(ValueError, match=r"dense2\.weight: it.*px\.depalettize"):
        audit(mlmodel, {"dense2.weight": random_leaf((12, 16), **form)})


def test_names_come_back_from_a_file(mlmodel, leaves, tmp_path):
    path = tmp_path / "net.mlpackage"
    mlmodel.save(str(path))
    for source in (path, str(path), ct.models.MLModel(str(path), skip_model_load=True)):
        assert sorted(read_palettes(source)) == sorted(leaves)


@pytest.mark.parametrize(
    ("form", "target"),
    [
        ({"nbits": 4}, ct.target.iOS16),
        ({"nbits": 3, "groups": (4, 1)}, ct.target.iOS18),
        ({"nbits": 4, "groups": (2, 4), "vector": (1, 2)}, ct.target.iOS18),
        ({"nbits": 4, "scale": (12, 1)}, ct.target.iOS18),
        ({"nbits": 4, "scale": (12, 1)}, ct.target.iOS26),
        ({"lut_dtype": np.int8, "groups": (4, 1), "scale": (4, 1)}, ct.target.iOS18),
        ({"lut_dtype": np.uint8, "groups": (4, 1)}, ct.target.iOS18),
        ({"lut_dtype": np.uint8, "groups": (4, 1), "scale": (4, 1)}, ct.target.iOS26),
        ({"lut_dtype": np.int8, "nbits": 4, "vector": (1, 2)}, ct.target.iOS26),
        ({"mask": True, "seed": 1}, ct.target.iOS18),
        ({"mask": True, "seed": 1, "groups": (4, 1), "scale": (12, 1)}, ct.target.iOS18),
        ({"mask": True, "seed": 1, "groups": (4, 1), "scale": (12, 1)}, ct.target.iOS26),
    ],
)
def test_load_into_makes_a_plain_conversion_give_the_same_tables(form, target):
    leaves = {"dense2.weight": random_leaf((12, 16), **form)}
    # Float32 all the way: the converter divides by the scale to search the indices, which rounds.
    mlmodel = _plain_convert(load_into(Mnist(), leaves), Mnist.example, target, compute_precision=ct.precision.FLOAT32)
    assert list(read_palettes(mlmodel)) == ["p_dense2_weight"]
    assert audit(mlmodel, leaves).identical


def test_a_plain_conversion_of_levels_that_are_not_negative():
    leaf = random_leaf((12, 16), lut_dtype=np.int8)
    leaf = dataclasses.replace(leaf, lut=np.array([0, 1, 5, 127], np.int8).reshape(1, 1, 4, 1))
    # coremltools makes them unsigned; they are the same levels.
    mlmodel = _plain_convert(load_into(Mnist(), {"dense2.weight": leaf}), Mnist.example)
    assert audit(mlmodel, {"dense2.weight": leaf}).identical


def test_loaded_tied_weights_convert_plainly():
    leaves = {"embedding.weight": random_leaf((20, 12), 4)}
    palettes = read_palettes(_plain_convert(load_into(Mixed(), leaves), Mixed.example))
    assert len(palettes) == 1
    np.testing.assert_array_equal(next(iter(palettes.values())).indices, leaves["embedding.weight"].indices)


@pytest.mark.parametrize("target", [ct.target.iOS16, ct.target.iOS18])
def test_packages_of_coremltools_own_palettizer(target):
    with quiet():
        dense = _plain_convert(Mnist(), Mnist.example, target, compute_precision=ct.precision.FLOAT32)
        config = ct.optimize.coreml.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=100)
        package = ct.optimize.coreml.palettize_weights(dense, ct.optimize.coreml.OptimizationConfig(config))
        expanded = ct.optimize.coreml.decompress_weights(package)
    weights = {name: weight for name, weight in _constants(expanded).items() if weight.size >= 100}
    palettes = read_palettes(package)
    assert palettes.keys() == weights.keys() == {"p_conv2_weight", "p_dense1_weight", "p_dense2_weight"}
    for name, weight in weights.items():
        np.testing.assert_array_equal(palettes[name].depalettize(), weight)


def _constants(mlmodel):
    from palettax.coreml.package import op_name, operations

    values = {op_name(op.name): op.outputs[0].val for _, op in operations(mlmodel) if op.op_type == "const"}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def _program(weight_of, target):
    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 8))], opset_version=target)
    def program(x):
        return mb.linear(x=x, weight=weight_of())

    with quiet():
        return ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=target,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )


def _expanded(mlmodel):
    with quiet():
        dense = ct.optimize.coreml.decompress_weights(mlmodel)
    return [value for value in _constants(dense).values() if value.shape == (12, 8)]


INDICES = np.random.default_rng(0).integers(0, 4, (12, 8)).astype(UINT2)
INTEGERS = np.arange(-60, 68, 16, dtype=np.int8).reshape(2, 1, 4, 1)
SCALES = np.array([0.25, 0.5], np.float32)


def _quantized_table():
    lut = mb.constexpr_blockwise_shift_scale(data=INTEGERS, scale=SCALES.reshape(2, 1, 1, 1))
    return mb.constexpr_lut_to_dense(indices=INDICES, lut=lut, name="w")


def _quantized_table_scaled_behind():
    dense = mb.constexpr_lut_to_dense(indices=INDICES, lut=INTEGERS, name="w")
    return mb.constexpr_blockwise_shift_scale(data=dense, scale=SCALES.reshape(2, 1), offset=np.int8([[3], [-5]]))


def _blockwise_scale_behind():
    dense = mb.constexpr_lut_to_dense(indices=INDICES, lut=INTEGERS.astype(np.float32), name="w")
    scale = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    return mb.constexpr_blockwise_shift_scale(data=dense, scale=scale)


def _unsigned_table():
    lut = mb.constexpr_blockwise_shift_scale(
        data=INTEGERS.view(np.uint8), scale=SCALES.reshape(2, 1, 1, 1), offset=np.full((2, 1, 1, 1), 128, np.uint8)
    )
    return mb.constexpr_lut_to_dense(indices=INDICES, lut=lut, name="w")


def _scaled_per_row_behind_integers():
    dense = mb.constexpr_lut_to_dense(indices=INDICES, lut=INTEGERS, name="w")
    return mb.constexpr_blockwise_shift_scale(data=dense, scale=np.arange(1, 13, dtype=np.float32).reshape(12, 1))


def _unsigned_without_an_offset():
    dense = mb.constexpr_lut_to_dense(indices=INDICES, lut=abs(INTEGERS).astype(np.uint8), name="w")
    return mb.constexpr_blockwise_shift_scale(data=dense, scale=SCALES.reshape(2, 1))


def _offset_of_coremltools():
    data, scale = INTEGERS.view(np.uint8), SCALES.reshape(2, 1, 1, 1)
    lut = mb.constexpr_blockwise_shift_scale(data=data, scale=scale, offset=np.full((2, 1, 1, 1), 127, np.uint8))
    return mb.constexpr_lut_to_dense(indices=INDICES, lut=lut, name="w")


def _floats_scaled_in_front():
    scale = np.arange(1, 9, dtype=np.float32).reshape(2, 1, 4, 1)
    lut = mb.constexpr_blockwise_shift_scale(data=INTEGERS.astype(np.float32), scale=scale)
    return mb.constexpr_lut_to_dense(indices=INDICES, lut=lut, name="w")


MASK = np.random.default_rng(1).random((12, 8)) < 0.5
UINT1 = types.nptype_from_builtin(types.string_to_builtin("uint1"))


def _sparse(lut=INTEGERS, scale=None, scaled_dense=None, **options):
    flags, values = mb.constexpr_lut_to_sparse(
        indices_mask=MASK.astype(UINT1), indices_nonzero_data=INDICES[MASK], lut=lut, name="w", **options
    )
    if scale is not None:
        flags, values = mb.constexpr_sparse_blockwise_shift_scale(data_mask=flags, nonzero_data=values, **scale)
    dense = mb.constexpr_sparse_to_dense(nonzero_data=values, mask=flags)
    return dense if scaled_dense is None else mb.constexpr_blockwise_shift_scale(data=dense, **scaled_dense)


ROWS = np.arange(1, 13, dtype=np.float32).reshape(12, 1)


def _sparse_floats():
    return _sparse(INTEGERS.astype(np.float32))


def _sparse_floats_scaled_when_dense():
    return _sparse(INTEGERS.astype(np.float32), scaled_dense={"scale": ROWS})


def _sparse_integers():
    return _sparse(scale={"scale": ROWS})


def _sparse_unsigned():
    return _sparse(INTEGERS.view(np.uint8), {"scale": ROWS, "offset": np.full((12, 1), 128, np.uint8)})


def _sparse_with_offsets():
    scale = {"scale": SCALES.reshape(2, 1), "offset": np.int8([[3], [-5]])}
    return _sparse(scale=scale)


FOUND = {  # the dtype of the table, the shape of the scale, and whether there is a mask
    _quantized_table: ("int8", (2, 1), False),
    _quantized_table_scaled_behind: ("float32", None, False),
    _blockwise_scale_behind: ("float32", (3, 4), False),
    _unsigned_table: ("uint8", (2, 1), False),
    _scaled_per_row_behind_integers: ("int8", (12, 1), False),
    _unsigned_without_an_offset: ("int8", (2, 1), False),
    _offset_of_coremltools: ("float32", None, False),
    _floats_scaled_in_front: ("float32", None, False),
    _sparse_floats: ("float32", None, True),
    _sparse_floats_scaled_when_dense: ("float32", (12, 1), True),
    _sparse_integers: ("int8", (12, 1), True),
    _sparse_unsigned: ("uint8", (12, 1), True),
    _sparse_with_offsets: ("float32", None, True),
}


@pytest.mark.parametrize("weight_of", FOUND)
def test_tables_that_are_quantized_scaled_or_sparse(weight_of):
    mlmodel = _program(weight_of, ct.target.iOS26)
    (name, leaf), *more = read_palettes(mlmodel).items()
    assert (name, more) == ("w", [])
    shape = None if leaf.scale is None else leaf.scale.shape
    assert (str(leaf.lut.dtype), shape, leaf.mask is not None) == FOUND[weight_of]
    (expected,) = _expanded(mlmodel)
    np.testing.assert_array_equal(leaf.depalettize(), expected)


def _sparse_vectors():
    lut = np.ones((1, 1, 4, 2), np.float32)
    flags, values = mb.constexpr_lut_to_sparse(
        indices_mask=MASK[:6].astype(UINT1),
        indices_nonzero_data=INDICES[:6][MASK[:6]],
        lut=lut,
        vector_axis=0,
        name="w",
    )
    return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=flags)


def _two_scales():
    once = mb.constexpr_blockwise_shift_scale(
        data=mb.constexpr_lut_to_dense(indices=INDICES, lut=INTEGERS.astype(np.float32), name="w"), scale=ROWS
    )
    return mb.constexpr_blockwise_shift_scale(data=once, scale=ROWS)


def _floats_with_an_offset():
    dense = mb.constexpr_lut_to_dense(indices=INDICES, lut=INTEGERS.astype(np.float32), name="w")
    return mb.constexpr_blockwise_shift_scale(data=dense, scale=ROWS, offset=ROWS)


def _sparse_offset_when_dense():
    return _sparse(scaled_dense={"scale": ROWS, "offset": np.full((12, 1), 3, np.int8)})


def _offsets_per_row():
    dense = mb.constexpr_lut_to_dense(indices=INDICES, lut=INTEGERS, name="w")
    return mb.constexpr_blockwise_shift_scale(data=dense, scale=ROWS, offset=np.full((12, 1), 3, np.int8))


@pytest.mark.parametrize(
    ("weight_of", "message"),
    [
        (_sparse_vectors, "w: a sparse table of vectors"),
        (_two_scales, "w: a table behind two scales"),
        (_floats_with_an_offset, "w: a float table with an offset"),
        (_sparse_offset_when_dense, "w: sparse weights with an offset"),
        (_offsets_per_row, r"w: an integer table in \(2, 1\) groups with offsets .*\(12, 1\)"),
    ],
)
def test_forms_that_are_no_palettized_array_are_refused_by_name(weight_of, message):
    with pytest.raises(ValueError, match=message):
        read_palettes(_program(weight_of, ct.target.iOS26))


def test_every_function_of_a_program_is_read(tmp_path):
    one, two = random_leaf((12, 8), seed=1), random_leaf((12, 8), seed=2)
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, leaf in (("first", one), ("second", two)):
        layer = torch.nn.Linear(8, 12)
        path = str(tmp_path / f"{name}.mlpackage")
        from_torch(layer, torch.zeros(1, 8), {"weight": leaf}, minimum_deployment_target="iOS18").save(path)
        descriptor.add_function(path, src_function_name="main", target_function_name=name)
    descriptor.default_function_name = "first"
    with quiet():
        ct.utils.save_multifunction(descriptor, str(tmp_path / "both.mlpackage"))
    palettes = read_palettes(tmp_path / "both.mlpackage")
    assert list(palettes) == ["weight", "second.weight"]
    np.testing.assert_array_equal(palettes["weight"].indices, one.indices)
    np.testing.assert_array_equal(palettes["second.weight"].indices, two.indices)
    assert not audit(tmp_path / "both.mlpackage", {"weight": one}).identical


@pytest.mark.parametrize(
    "options",
    [
        {"n_bits": 4},
        {"n_bits": 2, "granularity": "per_grouped_channel", "group_size": 4},
        {"n_bits": 4, "cluster_dim": 2, "granularity": "per_grouped_channel", "group_size": 4},
        {"n_bits": 4, "enable_per_channel_scale": True},
        {"n_bits": 4, "lut_dtype": "int8"},
    ],
)
def test_state_dicts_of_coremltools_own_torch_palettizer(options):
    from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

    layer = torch.nn.Sequential(torch.nn.Linear(64, 32))
    torch.nn.init.normal_(layer[0].weight)
    config = PostTrainingPalettizerConfig.from_dict({"global_config": options})
    with quiet():
        finished = PostTrainingPalettizer(layer, config).compress()
    leaf = to_params(finished.state_dict())["0.weight"]
    assert isinstance(leaf, px.PalettizedArray)
    np.testing.assert_array_equal(leaf.depalettize(), finished[0].weight.detach().numpy())


def test_audit_of_nothing_says_no(mlmodel, leaves):
    assert not audit(mlmodel, {}).identical
    assert not audit(mlmodel, {"dense1.bias": np.zeros(16, np.float32)}).identical
    assert audit(mlmodel, {}).unasked == tuple(sorted(leaves))


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_entries_that_float16_cannot_tell_from_zero(target):
    """coremltools would raise them to its smallest number; palettax hands over the zero they round to."""
    lut = np.array([-0.5, -1e-9, 1e-9, 0.25], np.float32).reshape(1, 1, 4, 1)
    indices = np.random.default_rng(0).integers(0, 4, (12, 16)).astype(np.uint8)
    leaf = px.PalettizedArray(lut, indices, nbits=2)
    layer = torch.nn.Linear(16, 12)
    mlmodel = from_torch(layer, torch.zeros(1, 16), {"weight": leaf}, minimum_deployment_target=target)
    assert audit(mlmodel, {"weight": leaf}).identical
    assert read_palettes(mlmodel)["weight"].lut.reshape(-1).tolist() == [-0.5, 0.0, 0.0, 0.25]
