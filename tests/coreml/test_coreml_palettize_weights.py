"""Packages in and out: what is asked for is exact, and what is not stays as it was, bit for bit."""

from __future__ import annotations

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
from coreml_programs import (
    AXES,
    asked,
    constants,
    convert,
    model,
    normal,
    one_weight,
    peer,
    peer_config,
    readers,
    same_program,
    squared_errors,
)
from coremltools.converters.mil import Builder as mb

import palettax as px
from palettax.coreml import (
    OpPalettizerConfig,
    OptimizationConfig,
    compress_weights,
    decompress_weights,
    get_weights_metadata,
    package_bytes,
    palettize_weights,
    read_palettes,
    save_package,
)
from palettax.coreml.package import operations
from palettax.leaf import same_bits


def in_a_branch():
    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 32)), mb.TensorSpec(shape=(1,))], opset_version=ct.target.iOS18)
    def program(x, choice):
        return mb.cond(
            pred=mb.squeeze(x=mb.greater(x=choice, y=0.0)),
            _true_fn=lambda: mb.linear(x=x, weight=normal(32, 32), name="yes"),
            _false_fn=lambda: mb.linear(x=x, weight=normal(32, 32, seed=1), name="no"),
        )

    return convert(program)


def of_two_functions(tmp_path):
    save_package(model(), tmp_path / "one.mlpackage")
    functions = ct.utils.MultiFunctionDescriptor()
    for name in ("first", "second"):
        functions.add_function(str(tmp_path / "one.mlpackage"), "main", name)
    functions.default_function_name = "second"
    peer(lambda path: ct.utils.save_multifunction(functions, path), str(tmp_path / "two.mlpackage"))
    return ct.models.MLModel(str(tmp_path / "two.mlpackage"), skip_model_load=True)


@pytest.mark.parametrize("kind", ["iOS16", "iOS18", "iOS26", "float32", "branches", "functions"])
def test_what_is_not_asked_for_stays_as_it_is(kind, tmp_path):
    made = {
        "branches": in_a_branch,
        "functions": lambda: of_two_functions(tmp_path),
        "float32": lambda: model(half=False),
    }
    mlmodel = made[kind]() if kind in made else model(kind)
    same = palettize_weights(mlmodel, OptimizationConfig())
    assert same_program(same, mlmodel)


@pytest.mark.parametrize("mode", ["kmeans", "uniform"])
@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("group_size", [0, 4])
def test_tables_are_those_of_the_array_maths(mode, nbits, group_size):
    small = palettize_weights(
        model(), asked(mode=mode, nbits=nbits, granularity="per_grouped_channel", group_size=group_size)
    )
    palettes, weights = read_palettes(small), get_weights_metadata(model(), 100)
    names = readers(model())
    for op, axis in AXES.items():
        values = weights[names[op]].val
        granularity = px.Granularity(group_size or None, axis)
        ours = px.palettize({"": values}, getattr(px, mode)(nbits, granularity=granularity), weight_threshold=0)[""]
        theirs = palettes[names[op].removesuffix("_to_fp16")]
        assert same_bits(np.asarray(ours.lut), theirs.lut), op
        assert same_bits(np.asarray(ours.indices), theirs.indices), op


@pytest.mark.parametrize(
    "keys",
    [
        {"nbits": 2},
        {"nbits": 6, "granularity": "per_grouped_channel", "group_size": 4},
        {"nbits": 4, "granularity": "per_grouped_channel", "group_size": 2, "channel_axis": 1},
        {"nbits": 3, "cluster_dim": 2},
        {"mode": "uniform", "nbits": 3},
    ],
)
@pytest.mark.parametrize("half", [True, False])
def test_beside_coremltools(keys, half, tmp_path):
    """The same ops with tables of the same shapes, errors that are no larger, and a package no larger."""
    mlmodel = one_weight(normal(24, 64), half=half) if "cluster_dim" in keys else model(half=half)
    ours = palettize_weights(mlmodel, asked(**keys))
    theirs = peer(cto.palettize_weights, mlmodel, peer_config(weight_threshold=100, **keys))

    def shapes(small):
        return [
            (op.name, op.op_type, op.lut.shape, op.indices.shape)
            for _, op in operations(small)
            if op.op_type.startswith("constexpr_")
        ]

    assert shapes(ours) == shapes(theirs)
    # A mean that is rounded to float16 in the last place may cost either side a little.
    assert (squared_errors(ours, mlmodel) <= squared_errors(theirs, mlmodel) * (1 + 1e-3)).all()
    sizes = [package_bytes(save_package(m, tmp_path / f"{n}.mlpackage")) for n, m in enumerate((ours, theirs))]
    assert sizes[0] <= sizes[1]


@pytest.mark.parametrize("target", ["iOS18", "iOS26"])
def test_one_scale_for_every_output_channel(target):
    mlmodel = model(target, half=False)
    small = palettize_weights(mlmodel, asked(nbits=3, enable_per_channel_scale=True))
    names, palettes = readers(mlmodel), read_palettes(small)
    for op, axis in AXES.items():
        leaf = palettes[names[op]]
        blocks = leaf.lut.shape[:-2] if target == "iOS18" else leaf.scale.shape
        assert blocks == tuple(n if a == axis else 1 for a, n in enumerate(leaf.shape)), op
    assert (squared_errors(small, mlmodel) <= squared_errors(palettize_weights(mlmodel, asked(nbits=3)), mlmodel)).all()


def test_a_weight_that_cannot_have_what_is_asked_for_is_not_touched():
    """coremltools divides it by its scales first, and leaves it so."""
    with pytest.warns(UserWarning, match="stays as it is: group_size=7 does not divide"):
        small, report = compress_weights(
            model(), asked(nbits=4, granularity="per_grouped_channel", group_size=7, enable_per_channel_scale=True)
        )
    assert same_program(small, model())
    assert all(leaf.skipped for leaf in report.values())


def test_what_holds_infinities_is_left_alone_and_said():
    bad = normal(16, 16)
    bad[0, :3] = -np.inf
    mlmodel = one_weight(bad)
    with pytest.warns(UserWarning, match="3 of its numbers are NaN or infinite"):
        small = palettize_weights(mlmodel, asked(nbits=4))
    assert constants(small) == constants(mlmodel)


def test_reasons():
    weight = model(half=False)
    config = asked(nbits=4, weight_threshold=500).set_op_type("conv", None).set_op_name("left", None)
    with pytest.warns(UserWarning, match="'lineer'.*did you mean 'linear'"):
        report = compress_weights(weight, config.set_op_type("lineer", None)).report
    reasons = {name: leaf.skipped for name, leaf in report.items()}
    names = readers(weight)
    assert reasons[names["conv"]] == "op_type_configs['conv'] is None"
    assert reasons[names["left"]] == "op_name_configs['left'] is None"
    assert reasons[names["add"]] == ""
    assert reasons[names["right_t"]] == ""
    assert reasons["lin_bias_0"] == "it has one axis"


def test_a_weight_that_is_an_output_stays():
    @mb.program(input_specs=[mb.TensorSpec(shape=(4, 16))], opset_version=ct.target.iOS18)
    def program(x):
        return mb.add(x=x, y=1.0), mb.const(val=normal(16, 16), name="out")

    report = compress_weights(convert(program, half=False), asked(nbits=4)).report
    assert [leaf.skipped for leaf in report.values()] == ["no op reads it: it is an output"]


def twice(**second):
    @mb.program(input_specs=[mb.TensorSpec(shape=(16, 16))], opset_version=ct.target.iOS18)
    def program(x):
        weight = mb.const(val=normal(16, 16), name="shared")
        return mb.add(x=mb.linear(x=x, weight=weight, name="one"), y=mb.matmul(x=x, y=weight, name="two", **second))

    return convert(program, half=False)


def test_ops_that_read_one_weight_agree():
    config = asked(nbits=4).set_op_name("two", {"nbits": 2, "weight_threshold": 100})
    with pytest.raises(ValueError, match=r"shared: two ops read it .* one has global_config.*two has op_name"):
        palettize_weights(twice(), config)
    theirs = peer_config(nbits=4)
    theirs.set_op_name("two", cto.OpPalettizerConfig(nbits=2))
    with pytest.raises(ValueError, match="conflict"):
        peer(cto.palettize_weights, twice(), theirs)
    own = palettize_weights(twice(), config.set_op_name("shared", {"nbits": 1, "weight_threshold": 0}))
    assert read_palettes(own)["shared"].nbits == 1


def test_one_table_needs_no_axis_and_groups_do():
    """coremltools leaves a weight alone whose readers have other axes of outputs, even for one table."""
    assert read_palettes(palettize_weights(twice(), asked(nbits=4)))["shared"].nbits == 4
    grouped = {"nbits": 4, "granularity": "per_grouped_channel", "group_size": 4}
    with pytest.warns(UserWarning, match="different axes"):
        assert read_palettes(palettize_weights(twice(), asked(**grouped))) == {}
    by_axis = palettize_weights(twice(), asked(**grouped, channel_axis=0))
    agreed = palettize_weights(twice(transpose_y=True), asked(**grouped))
    assert [read_palettes(small)["shared"].groups for small in (by_axis, agreed)] == [(4, 1), (4, 1)]


@pytest.mark.parametrize(("distinct", "nbits"), [(2, 1), (3, 2), (5, 3), (9, 4), (17, 6), (65, 8)])
@pytest.mark.parametrize("target", ["iOS17", "iOS18"])
def test_unique_finds_the_fewest_bits_and_loses_nothing(distinct, nbits, target):
    values = np.resize(np.linspace(-1, 1, distinct, dtype=np.float32), (20, 24))
    mlmodel = one_weight(values, target)
    small = palettize_weights(mlmodel, asked(mode="unique"))
    (leaf,) = read_palettes(small).values()
    assert leaf.nbits == (4 if nbits == 3 and target == "iOS17" else nbits)
    assert same_bits(leaf.depalettize(), values)


@pytest.mark.parametrize("keys", [{}, {"granularity": "per_grouped_channel", "group_size": 10}])
@pytest.mark.parametrize("half", [True, False])
def test_unique_finds_vectors(keys, half):
    """As coremltools does, but that it fills the table up with zeros."""
    rows = np.random.default_rng(0).standard_normal((7, 2)).astype(np.float32)
    values = rows[np.random.default_rng(1).integers(0, 7, (10, 24))].transpose(0, 2, 1).reshape(20, 24)
    mlmodel = one_weight(values, half=half)
    keys = {"mode": "unique", "cluster_dim": 2, **keys}
    ours = palettize_weights(mlmodel, asked(**keys))
    theirs = peer(cto.palettize_weights, mlmodel, peer_config(weight_threshold=100, **keys))
    (one,), (other,) = (read_palettes(small).values() for small in (ours, theirs))
    assert (one.nbits, one.groups, one.vector_size) == (other.nbits, other.groups, 2)
    assert same_bits(one.lut[..., :7, :], other.lut[..., :7, :])
    assert same_bits(one.depalettize(), other.depalettize())
    assert squared_errors(ours, mlmodel).max() == 0
    with pytest.warns(UserWarning, match="more than 256 distinct values"):
        assert read_palettes(palettize_weights(one_weight(normal(40, 240)), asked(**keys))) == {}


def test_too_many_values_for_unique():
    with pytest.warns(UserWarning, match="more than 256 distinct values"):
        assert read_palettes(palettize_weights(one_weight(normal(20, 24)), asked(mode="unique"))) == {}


def top_entries(weight):
    """Zero and the ten largest values: eleven entries, which is no power of two."""
    flat = weight.flatten()
    lut = [0.0, *np.sort(flat)[-10:].tolist()]
    return lut, [lut.index(value) if value in lut else 0 for value in flat.tolist()]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_custom_functions_get_groups_as_they_are(axis):
    weights, seen = normal(16, 24), []

    def function(weight):
        seen.append(weight.shape)
        return top_entries(weight)

    keys = {} if axis is None else {"granularity": "per_grouped_channel", "group_size": 8, "channel_axis": axis}
    config = OptimizationConfig(OpPalettizerConfig(mode="custom", lut_function=function, weight_threshold=0, **keys))
    (leaf,) = read_palettes(palettize_weights(one_weight(weights), config)).values()
    groups = [weights] if axis is None else np.split(weights, weights.shape[axis] // 8, axis)
    # The axis of the groups comes first.
    assert seen == [group.shape if axis in (None, 0) else group.T.shape for group in groups]
    expected = [np.where(np.isin(group, np.sort(group, axis=None)[-10:]), group, 0) for group in groups]
    np.testing.assert_array_equal(leaf.depalettize(), np.concatenate(expected, axis or 0))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"nbits": 3}, "3 bits; iOS17 holds"),
        ({"nbits": 4, "granularity": "per_grouped_channel", "group_size": 4}, "groups along axis 0; iOS17"),
        ({"nbits": 4, "cluster_dim": 2}, "vectors of 2; iOS17"),
        ({"nbits": 4, "enable_per_channel_scale": True}, "a scale of shape .*; iOS17"),
    ],
)
def test_forms_that_an_older_target_does_not_hold(keys, message):
    with pytest.raises(ValueError, match=message):
        palettize_weights(model("iOS17"), asked(**keys))
    with pytest.raises(ValueError, match="iOS17; convert it for iOS18"):
        palettize_weights(model("iOS17"), asked(nbits=4), joint_compression=True)


def test_programs_without_tables_are_raised():
    small = palettize_weights(model("iOS15"), asked(nbits=4))
    assert ct.target(small.get_spec().specificationVersion) == ct.target.iOS16
    assert len(read_palettes(small)) == len(AXES)


@pytest.mark.parametrize("half", [True, False])
def test_the_dtype_stays(half):
    small = palettize_weights(model(half=half), asked(nbits=2))
    assert {leaf.dtype for leaf in read_palettes(small).values()} == {np.dtype("float16" if half else "float32")}


def test_functions_share_their_tables(tmp_path):
    """A second function costs its ops, no second weight."""
    two = of_two_functions(tmp_path)
    small = palettize_weights(two, asked(nbits=4))
    once = palettize_weights(model(), asked(nbits=4))
    assert small.get_spec().description.defaultFunctionName == "second"
    files = [save_package(m, tmp_path / f"{n}.mlpackage") for n, m in {"small": small, "once": once}.items()]
    weights = [next(file.rglob("weight.bin")).stat().st_size for file in files]
    assert weights[0] == weights[1]
    reports = [compress_weights(m, asked(nbits=4)).report for m in (two, model())]
    assert reports[0].nbytes == reports[1].nbytes
    assert sum(bool(leaf.nbits and leaf.tied_to) for leaf in reports[0].values()) == len(AXES)
    assert len(read_palettes(files[0])) == len(AXES)


def test_branches():
    palettes = read_palettes(palettize_weights(in_a_branch(), asked(nbits=2)))
    assert {name: leaf.nbits for name, leaf in palettes.items()} == {"yes_weight_0": 2, "no_weight_0": 2}


def test_vectors_stay_inside_the_groups_of_a_convolution():
    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 12, 4, 4))], opset_version=ct.target.iOS18)
    def program(x):
        return mb.conv(x=x, weight=normal(24, 3, 3, 3), groups=4, name="conv")

    mlmodel = convert(program, half=False)
    with pytest.warns(UserWarning, match="cluster_dim=4 does not divide the 6 channels of 4 groups"):
        palettize_weights(mlmodel, asked(nbits=2, cluster_dim=4))
    assert len(read_palettes(palettize_weights(mlmodel, asked(nbits=2, cluster_dim=2)))) == 1


def test_other_models_are_refused(unchecked):
    builder = ct.models.neural_network.NeuralNetworkBuilder(
        [("x", ct.models.datatypes.Array(4))], [("y", ct.models.datatypes.Array(4))]
    )
    builder.add_activation("relu", "RELU", "x", "y")
    with pytest.raises(ValueError, match="neuralNetwork; only an mlProgram"):
        palettize_weights(ct.models.MLModel(builder.spec, skip_model_load=True), asked(nbits=4))
    with pytest.raises(ValueError, match="config is a dict; give an OptimizationConfig"):
        palettize_weights(model(), {"nbits": 4})


def test_metadata():
    """As coremltools has it, but for the distinct values of float16, which it may miscount."""
    theirs = peer(cto.get_weights_metadata, model(half=False), weight_threshold=100)
    ours = get_weights_metadata(model(half=False), 100)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert same_bits(weight.val, theirs[name].val)
        assert (weight.sparsity, weight.unique_values) == (theirs[name].sparsity, theirs[name].unique_values)
        both = weight.child_ops, theirs[name].child_ops
        assert len({tuple((op.op_type, op.name) for op in ops) for ops in both}) == 1
    mask = np.triu(np.full((16, 16), -np.inf, np.float32))
    for half in (True, False):
        (weight,) = get_weights_metadata(one_weight(mask, half=half), 100).values()
        assert weight.unique_values == 2
    small = palettize_weights(model(), asked(nbits=3))
    assert {weight.unique_values for weight in get_weights_metadata(small, 100).values()} == {8}


def test_decompressed_and_compressed_again_it_is_the_same():
    config = asked(nbits=4, granularity="per_grouped_channel", group_size=4)
    small = palettize_weights(model(), config)
    first, second = read_palettes(small), read_palettes(palettize_weights(decompress_weights(small), config))
    assert first.keys() == second.keys()
    for one, other in zip(first.values(), second.values(), strict=True):
        assert same_bits(one.lut, other.lut)
        assert same_bits(one.indices, other.indices)
