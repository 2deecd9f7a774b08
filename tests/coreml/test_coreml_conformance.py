"""coremltools' own tests of `palettize_weights`, seen from outside and asked of both libraries."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
from coreml_programs import AXES, convert, model, normal, one_weight, outputs, peer, same_program, squared_errors
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types

import palettax.coreml as pc
from palettax.coreml import decompress_weights, get_weights_metadata
from palettax.coreml.package import operations
from palettax.coreml.scoped import quiet
from palettax.leaf import same_bits


class Library(NamedTuple):
    """What both have under the same names."""

    module: Any

    def op(self, **keys):
        return self.module.OpPalettizerConfig(**{"weight_threshold": 0, **keys})

    def config(self, **keys):
        return self.module.OptimizationConfig(self.op(**keys) if keys else None)

    def small(self, mlmodel, config=None, **keys):
        """The palettized model; coremltools writes to its log what palettax warns of."""
        with warnings.catch_warnings(action="ignore"):
            return peer(self.module.palettize_weights, mlmodel, config or self.config(**keys))


@pytest.fixture(params=[pc, cto], ids=["palettax", "coremltools"])
def library(request):
    return Library(request.param)


def compressed(mlmodel):
    return [op for _, op in operations(mlmodel) if op.op_type.startswith("constexpr_")]


def kinds(mlmodel):
    return [op.op_type for op in compressed(mlmodel)]


def the_weight(mlmodel):
    """The value of the only weight."""
    (value,) = (
        weight.val for weight in get_weights_metadata(decompress_weights(mlmodel), 0).values() if weight.val.ndim > 1
    )
    return value


def program(build, *shapes, half=False, dtype=types.fp32, target="iOS18"):
    """A model of what a function builds from inputs of these shapes."""
    specs = [mb.TensorSpec(shape=shape, dtype=dtype) for shape in shapes]
    return convert(mb.program(input_specs=specs, opset_version=ct.target[target])(build), target, half)


def shared(weight):
    """Two ops of different types that read one weight, its outputs along the same axis."""

    def build(x):
        read = mb.const(val=weight, name="shared")
        two = mb.matmul(x=x, y=read, transpose_y=True, name="two")
        return mb.add(x=mb.linear(x=x, weight=read, name="one"), y=two)

    return program(build, weight.shape)


@pytest.mark.parametrize(
    ("shape", "threshold", "tables"), [((20, 24), 479, 1), ((20, 24), 480, 0), ((1, 9), 0, 0), ((1, 10), 0, 1)], ids=str
)
def test_sizes(library, shape, threshold, tables):
    """More elements than the threshold, and at least ten."""
    weight = np.resize(np.float32([0, 1]), shape)
    assert len(compressed(library.small(one_weight(weight), nbits=1, weight_threshold=threshold))) == tables


def test_what_has_one_axis_stays(library):
    mlmodel = program(lambda x: mb.mul(x=x, y=normal(4096)), (4096,))
    assert compressed(library.small(mlmodel, nbits=4)) == []


@pytest.mark.parametrize(("dtype", "tables"), [(np.int8, {pc: 0, cto: 1}), (np.int32, {pc: 0, cto: 0})])
def test_integers(library, dtype, tables):
    """Of a byte of them palettax says that they are no floats; coremltools makes a table of them."""

    def build(indices):
        return mb.cast(x=mb.gather(x=np.arange(40, dtype=dtype).reshape(10, 4) % 4, indices=indices), dtype="fp32")

    mlmodel = program(build, (2,), dtype=types.int32)
    assert len(compressed(library.small(mlmodel, nbits=4))) == tables[library.module]
    config = library.config(nbits=4)
    config.set_op_type("gather", None)
    assert compressed(library.small(mlmodel, config)) == []
    if dtype == np.int8:
        (row,) = pc.compress_weights(mlmodel, Library(pc).config(nbits=4)).report.values()
        assert (row.skipped, row.dtype, row.nbytes) == ("int8 is not floating", "int8", 40)


def test_metadata_is_of_as_many_elements_as_the_threshold(library):
    mlmodel = one_weight(normal(20, 24))
    counts = [len(peer(library.module.get_weights_metadata, mlmodel, weight_threshold=t)) for t in (480, 481)]
    assert counts == [1, 0]


def test_the_smallest_integer_is_no_zero():
    """It has no magnitude of its own type."""

    def build(indices):
        return mb.cast(x=mb.gather(x=np.full((10, 4), -128, np.int8), indices=indices), dtype="fp32")

    (found,) = get_weights_metadata(program(build, (2,), dtype=types.int32), 10).values()
    assert (found.sparsity, found.unique_values) == (0, 1)


def test_integers_that_are_stored_once_are_counted_once():
    numbers = np.arange(400).reshape(100, 4).astype(np.int8)

    def build(indices):
        tables = [mb.const(val=numbers.copy(), name=name) for name in ("one", "two")]
        rows = [mb.cast(x=mb.gather(x=table, indices=indices), dtype="fp32") for table in tables]
        return mb.add(x=rows[0], y=rows[1]), mb.gather_nd(x=tables[0], indices=mb.expand_dims(x=indices, axes=[1]))

    config = pc.OptimizationConfig({"nbits": 4}, {"gather": None})  # of ops that read one, one is left alone
    report = pc.compress_weights(program(build, (2,), dtype=types.int32), config).report
    assert report.nbytes == max(row.nbytes for row in report.values()) == 400


def test_metadata_of_a_small_example(library):
    weight = np.float32([[0, 2, 2, 1e-13, 1], [5, 0, 1, 1, 0]])
    ((name, found),) = peer(library.module.get_weights_metadata, shared(weight), weight_threshold=10).items()
    assert (name, found.sparsity, found.unique_values) == ("shared", 0.4, 5)
    assert [(op.op_type, op.name) for op in found.child_ops] == [("matmul", "two"), ("linear", "one")]
    assert same_bits(found.val, weight)


@pytest.mark.parametrize(
    ("setter", "name", "tables"),
    [("type", "lin", 0), ("type", "line.*", 0), ("type", "linear", 1), ("name", "li.*", 0), ("name", "lin", 1)],
)
def test_names_are_exact(library, setter, name, tables):
    config = library.config()
    getattr(config, f"set_op_{setter}")(name, library.op(nbits=2))
    assert len(compressed(library.small(one_weight(normal(20, 24)), config))) == tables


SHARED = [
    # what is set for the op types and names, besides a global config; whether the two ops agree
    ({}, {}, True),
    ({"linear": {}, "matmul": {}}, {}, True),
    ({"linear": {"nbits": 2}}, {}, False),
    ({"linear": None}, {}, False),
    ({"linear": {"weight_threshold": 7}}, {}, False),
    ({}, {"one": {"nbits": 2}}, False),
    ({}, {"one": {"nbits": 2}, "two": {"nbits": 2}}, True),
    ({}, {"one": {"nbits": 2}, "two": {"nbits": 3}}, False),
    ({"linear": {"nbits": 2}}, {"shared": {"nbits": 1}}, True),
]


@pytest.mark.parametrize(("by_type", "by_name", "agree"), SHARED)
def test_what_ops_that_share_a_weight_are_to_get(library, by_type, by_name, agree):
    config = library.config(nbits=4)
    for name, keys in by_type.items():
        config.set_op_type(name, None if keys is None else library.op(**{"nbits": 4, **keys}))
    for name, keys in by_name.items():
        config.set_op_name(name, library.op(**keys))
    mlmodel = shared(normal(16, 16))
    if agree:
        assert len(compressed(library.small(mlmodel, config))) == 1
    else:
        with pytest.raises(ValueError, match="conflict"):
            library.small(mlmodel, config)


def test_an_op_that_reads_an_output_says_what_becomes_of_it(library):
    def build(x):
        weight = mb.const(val=normal(16, 16), name="out")
        return mb.linear(x=x, weight=weight), weight

    small = library.small(program(build, (4, 16)), nbits=2)
    assert len(compressed(small)) == 1
    assert len(np.unique(outputs(small, [normal(4, 16)])[1])) == 4


def test_an_output_that_is_asked_for_by_name():
    """coremltools looks for the first op that reads it, and fails."""
    mlmodel = program(lambda x: (mb.add(x=x, y=1.0), mb.const(val=normal(16, 16), name="out")), (4, 16))
    small = pc.palettize_weights(mlmodel, pc.OptimizationConfig(op_name_configs={"out": Library(pc).op(nbits=2)}))
    assert len(np.unique(outputs(small, [normal(4, 16)])[1])) == 4


def test_an_output_of_a_branch_stays():
    def build(x, choice):
        weights = [normal(16, 16), normal(16, 16, seed=1)]
        return mb.cond(
            pred=mb.squeeze(x=mb.greater(x=choice, y=0.0)),
            _true_fn=lambda: mb.const(val=weights[0], name="yes"),
            _false_fn=lambda: mb.const(val=weights[1], name="no"),
        )

    mlmodel = program(build, (4, 16), (1,))
    config = pc.OptimizationConfig(Library(pc).op(nbits=2), op_name_configs={"yes": Library(pc).op(nbits=2)})
    report = pc.compress_weights(mlmodel, config).report
    assert [row.skipped for row in report.values()] == [
        "it is an output of a branch or a loop",
        "no op reads it: it is an output",
    ]


def test_every_op_that_reads_a_weight(library):
    h = np.zeros((1, 8), np.float32)

    def build(indices):
        x = mb.expand_dims(x=mb.gather(x=normal(40, 16), indices=indices, axis=0, name="gather"), axes=[1])
        ih, hh = normal(32, 16), normal(32, 8)
        x, *_ = mb.lstm(x=x, initial_h=h, initial_c=h, weight_ih=ih, weight_hh=hh, name="lstm")
        x, _ = mb.gru(x=x, initial_h=h, weight_ih=normal(24, 8), weight_hh=normal(24, 8, seed=1), name="gru")
        x, _ = mb.rnn(x=x, initial_h=h, weight_ih=normal(8, 8), weight_hh=normal(8, 8, seed=1), name="rnn")
        return mb.mul(x=x, y=normal(2, 1, 8), name="mul")

    small = library.small(program(build, (2,), dtype=types.int32), nbits=2)
    found = [reader.op_type for op in compressed(small) for reader in op.outputs[0].child_ops]
    assert found == ["gather", "lstm", "lstm", "gru", "gru", "rnn", "rnn", "mul"]


def test_unique_in_groups(library):
    """Exact tables, derived by hand."""
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    keys = {"mode": "unique", "granularity": "per_grouped_channel", "group_size": 2}
    (rows,) = compressed(library.small(one_weight(weight), channel_axis=0, **keys))
    assert rows.lut.val.tolist() == [[[[v] for v in range(8)]], [[[v] for v in range(8, 16)]]]
    assert rows.indices.val.astype(int).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    (columns,) = compressed(library.small(one_weight(weight), channel_axis=1, **keys))
    assert columns.lut.val.reshape(2, 8).tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
    assert columns.lut.shape == (1, 2, 8, 1)
    assert columns.indices.val.astype(int).tolist() == [[a, a + 1] * 2 for a in (0, 2, 4, 6)]
    assert {types.builtin_to_string(op.indices.dtype) for op in (rows, columns)} == {"uint3"}


SHAPES = {"conv1d": (16, 8, 3), "conv2d": (8, 6, 3, 2), "conv3d": (8, 4, 2, 2, 2), "linear": (20, 18)}


@pytest.mark.parametrize("mode", ["kmeans", "uniform", "unique"])
@pytest.mark.parametrize("nbits", [1, 2, 4, 6, 8])
def test_a_lattice_of_as_many_values_as_entries_is_kept(library, mode, nbits):
    """In weights of two axes to five."""
    lattice = np.linspace(-1, 1, 2**nbits, dtype=np.float32)
    weights = {name: np.resize(lattice, shape) for name, shape in SHAPES.items()}

    def build(a, b, c, x):
        convolved = [mb.conv(x=x, weight=w) for x, w in zip((a, b, c), weights.values(), strict=False)]
        return (*convolved, mb.linear(x=x, weight=weights["linear"]))

    mlmodel = program(build, (1, 8, 5), (1, 6, 5, 5), (1, 4, 4, 4, 4), (1, 18))
    small = library.small(mlmodel, mode=mode, **({} if mode == "unique" else {"nbits": nbits}))
    assert len(compressed(small)) == len(SHAPES)
    pairs = [[w.val for w in get_weights_metadata(m, 25).values()] for m in (small, mlmodel)]
    for one, other in zip(*pairs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 if library.module is pc else 1e-2)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize(("nbits", "mode"), [(1, "kmeans"), (3, "kmeans"), (3, "uniform"), (8, "uniform")])
@pytest.mark.parametrize("half", [True, False])
def test_groups_along_any_axis(library, axis, nbits, mode, half):
    weight = normal(8, 6, 4)
    mlmodel = program(lambda x: mb.conv(x=x, weight=weight, name="conv"), (1, 6, 9), half=half)
    keys = {"granularity": "per_grouped_channel", "group_size": 2, "channel_axis": axis}
    if axis < 0 and library.module is cto:  # it takes this for blocks along several axes
        with pytest.raises(NotImplementedError):
            library.small(mlmodel, mode=mode, nbits=nbits, **keys)
        return
    grouped, whole = (library.small(mlmodel, mode=mode, nbits=nbits, **more) for more in (keys, {}))
    (table,) = compressed(grouped)
    blocks = [weight.shape[axis] // 2 if a == axis % 3 else 1 for a in range(3)]
    assert table.lut.shape == (*blocks, 2**nbits, 1)
    assert types.builtin_to_string(table.indices.dtype) == f"uint{nbits}"
    assert squared_errors(grouped, mlmodel).sum() < squared_errors(whole, mlmodel).sum()


@pytest.mark.parametrize(
    "keys",
    [
        {"granularity": "per_grouped_channel", "group_size": 0, "channel_axis": 1},
        {"group_size": 7, "channel_axis": 9, "num_kmeans_workers": 4},
    ],
    ids=["no size", "per tensor"],
)
def test_keys_that_change_nothing(keys):
    one, other = (Library(pc).small(model(), nbits=3, weight_threshold=100, **more) for more in (keys, {}))
    assert same_program(one, other)


GROUPS_OF_7 = {"granularity": "per_grouped_channel", "group_size": 7}


@pytest.mark.parametrize(
    ("keys", "tables", "why"),
    [
        (GROUPS_OF_7, ["one", "two"], ""),
        ({**GROUPS_OF_7, "group_size": 2}, ["two"], "group_size=2 does not divide"),
        ({"cluster_dim": 2}, ["two"], "vector_size=2 does not divide"),
        ({**GROUPS_OF_7, "cluster_dim": 2}, [], "vectors of 2 would straddle the groups of 7"),
    ],
    ids=["groups", "odd groups", "odd vectors", "vectors of two groups"],
)
def test_what_does_not_divide_stays_and_the_other_does_not(library, keys, tables, why):
    """Of weights of 35 and 28 outputs; coremltools says so in its log."""
    weights = {"one": normal(35, 28), "two": normal(28, 35)}

    def build(x):
        return mb.linear(x=mb.linear(x=x, weight=weights["one"], name="one"), weight=weights["two"], name="two")

    with quiet(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        small = library.module.palettize_weights(program(build, (1, 28)), library.config(nbits=2, **keys))
    assert [op.name for op in compressed(small)] == [f"{name}_weight_0_palettized" for name in tables]
    if library.module is pc:
        said = [str(warning.message) for warning in warned]
        assert [text.split("_")[0] for text in said] == [name for name in weights if name not in tables]
        assert not said or why in said[-1]


def test_an_axis_that_the_weight_does_not_have():
    """coremltools raises, whatever the other weights are."""
    with pytest.warns(UserWarning, match="stays as it is: channel_axis=2 is not an axis"):
        small = pc.palettize_weights(
            one_weight(normal(35, 28)), Library(pc).config(nbits=2, **GROUPS_OF_7, channel_axis=2)
        )
    assert compressed(small) == []
    with pytest.raises(ValueError, match="Invalid channel_axis"):
        Library(cto).small(one_weight(normal(35, 28)), nbits=2, **GROUPS_OF_7, channel_axis=2)


@pytest.mark.parametrize(
    "keys", [{}, {"cluster_dim": 2}, {"enable_per_channel_scale": True}], ids=["one table", "vectors", "scale"]
)
def test_ops_that_have_their_outputs_along_different_axes(library, keys):
    """coremltools leaves the weight alone even where nothing depends on the axis."""

    def build(x):
        weight = mb.const(val=normal(16, 16), name="shared")
        return mb.add(x=mb.linear(x=x, weight=weight), y=mb.matmul(x=x, y=weight))

    small = library.small(program(build, (16, 16)), nbits=2, **keys)
    assert len(compressed(small)) == (library.module is pc and not keys)


@pytest.mark.parametrize("op", ["linear", "conv", "conv_transpose", "matmul"])
@pytest.mark.parametrize("keys", [{}, {"granularity": "per_grouped_channel", "group_size": 8}])
def test_vectors_lie_along_the_outputs(library, op, keys):
    """One index for two outputs, and tables of vectors of two."""

    def build(x):
        if op == "linear":
            return mb.linear(x=x, weight=normal(16, 24), name="op")
        if op == "matmul":
            return mb.matmul(x=x, y=normal(24, 16), name="op")
        x = mb.reshape(x=x, shape=(1, 24, 2, 2))
        if op == "conv":
            return mb.conv(x=x, weight=normal(16, 24, 2, 2), name="op")
        return mb.conv_transpose(x=x, weight=normal(24, 16, 2, 2), name="op")

    mlmodel = program(build, (4, 24))
    axis = {"linear": 0, "conv": 0, "conv_transpose": 1, "matmul": 1}[op]
    (table,) = compressed(library.small(mlmodel, nbits=3, cluster_dim=2, **keys))
    shape = list(table.outputs[0].shape)
    assert shape[axis] == 16
    assert table.vector_axis.val % len(shape) == axis
    assert table.indices.shape == tuple(8 if a == axis else n for a, n in enumerate(shape))
    groups = tuple(2 if a == axis and keys else 1 for a in range(len(shape)))
    assert table.lut.shape == (*groups, 8, 2)


ENTRIES = np.float32([[-1, 0], [0, 1], [0.5, 0], [2, 2]])


def nearest_entries(group):
    """For each pair along the first axis of a group."""
    pairs = np.stack([group[::2], group[1::2]], axis=-1)
    return np.abs(pairs[..., None, :] - ENTRIES).sum(axis=-1).argmin(axis=-1)


@pytest.mark.parametrize("axis", [1, 2])
def test_custom_functions_get_the_axis_of_groups_in_the_place_of_the_first(library, axis):
    weights, seen = normal(8, 6, 4), []

    def function(group):
        seen.append(group)
        return np.float32([-1, 1]), (group > 0).reshape(-1)

    keys = {"granularity": "per_grouped_channel", "group_size": 2, "channel_axis": axis}
    mlmodel = program(lambda x: mb.conv(x=x, weight=weights, name="conv"), (1, 6, 9))
    small = library.small(mlmodel, mode="custom", lut_function=function, **keys)
    front = weights.swapaxes(0, axis)
    assert all(map(np.array_equal, seen, np.split(front, len(front) // 2)))
    np.testing.assert_array_equal(the_weight(small), np.sign(weights))


@pytest.mark.parametrize("axis", [None, 0, 2])
def test_custom_functions_of_vectors(library, axis):
    """They get a group with the axis of the vectors in front, changed for the first."""
    weights, seen = normal(8, 6, 4), []

    def function(group):
        seen.append(group)
        return ENTRIES, nearest_entries(group).reshape(-1)

    keys = {} if axis is None else {"granularity": "per_grouped_channel", "group_size": 4, "channel_axis": axis}
    mlmodel = program(lambda x: mb.conv(x=x, weight=weights, name="conv"), (1, 6, 9))
    (table,) = compressed(library.small(mlmodel, mode="custom", lut_function=function, cluster_dim=2, **keys))
    front = weights.swapaxes(0, axis or 0)
    groups = [front] if axis is None else np.split(front, len(front) // 4)
    assert all(map(np.array_equal, seen, groups))
    chosen = nearest_entries(front).swapaxes(0, axis or 0)
    np.testing.assert_array_equal(table.indices.val.astype(int), chosen)
    assert table.lut.val.reshape(-1, 4, 2).tolist() == [ENTRIES.tolist()] * len(groups)


@pytest.mark.parametrize("target", ["iOS18", "iOS26"])
def test_vectors_under_a_scale(target):
    """iOS18 has no place for a scale behind vectors, and coremltools fails."""
    weight = normal(64, 48) * np.geomspace(0.1, 1, 64, dtype=np.float32)[:, None]
    mlmodel, keys = one_weight(weight, target), {"nbits": 3, "cluster_dim": 2, "enable_per_channel_scale": True}
    if target == "iOS18":
        with pytest.raises(ValueError, match="vector_axis"):
            Library(cto).small(mlmodel, **keys)
    scaled, plain = (
        Library(pc).small(mlmodel, **{**keys, **more}) for more in ({}, {"enable_per_channel_scale": False})
    )
    (leaf,) = pc.read_palettes(scaled).values()
    assert leaf.vector_size == 2
    if target == "iOS26":
        assert leaf.scale.shape == (64, 1)
    assert squared_errors(scaled, mlmodel).sum() < squared_errors(plain, mlmodel).sum()


@pytest.mark.parametrize("keys", [{}, {"granularity": "per_grouped_channel", "group_size": 4}])
def test_a_table_can_be_pruned_and_quantized_further_by_coremltools(library, keys):
    """The ops that it makes of its own tables."""
    before = library.small(model(), nbits=4, weight_threshold=100, **keys)
    pruner = cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=100)
    quantizer = cto.OpLinearQuantizerConfig(granularity="per_tensor", weight_threshold=1)
    pruned = peer(cto.prune_weights, before, cto.OptimizationConfig(pruner), joint_compression=True)
    quantized = peer(cto.linear_quantize_weights, before, cto.OptimizationConfig(quantizer), joint_compression=True)
    count = len(compressed(before))
    assert kinds(pruned) == ["constexpr_lut_to_sparse", "constexpr_sparse_to_dense"] * count
    assert kinds(quantized) == ["constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"] * count
    for weight in get_weights_metadata(pruned, 100).values():
        assert weight.sparsity >= 0.5
    quantizer = cto.OptimizationConfig(cto.OpLinearQuantizerConfig(granularity="per_channel", weight_threshold=1))
    with pytest.raises(NotImplementedError, match="per-tensor"):
        peer(cto.linear_quantize_weights, before, quantizer, joint_compression=True)


@pytest.mark.parametrize("keys", [{}, {"granularity": "per_grouped_channel", "group_size": 4}])
def test_pruned_first(library, keys):
    """The same ops as the other way round."""
    pruner = cto.OptimizationConfig(cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=100))
    config = library.config(nbits=4, weight_threshold=100, **keys)
    pruned = peer(cto.prune_weights, model(), pruner)
    ops = compressed(peer(library.module.palettize_weights, pruned, config, joint_compression=True))
    assert [op.op_type for op in ops] == ["constexpr_lut_to_sparse", "constexpr_sparse_to_dense"] * len(AXES)
    for op in ops[::2]:
        assert types.builtin_to_string(op.indices_mask.dtype) == "uint1"
        assert types.builtin_to_string(op.indices_nonzero_data.dtype) == "uint4"
        assert op.lut.shape[-2:] == (16, 1)
        assert (max(op.lut.shape[:-2]) > 1) == bool(keys)


@pytest.mark.parametrize("made", ["pruned", "quantized"])
def test_what_is_set_for_an_op_holds_for_what_its_weight_is_made_from(library, made):
    """By type, and by name."""
    config = library.config()
    config.set_op_type("conv", library.op(nbits=2))
    config.set_op_name("lin_cast_fp16", library.op(nbits=3))
    if made == "pruned":
        pruner = cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=100)
        before = peer(cto.prune_weights, model(), cto.OptimizationConfig(pruner))
    else:
        quantizer = cto.OpLinearQuantizerConfig(weight_threshold=100)
        before = peer(cto.linear_quantize_weights, model(), cto.OptimizationConfig(quantizer))
    small = peer(library.module.palettize_weights, before, config, joint_compression=True)
    widths = [op.lut.shape[-2].bit_length() - 1 for op in compressed(small) if "lut" in op.op_type]
    assert widths == [2, 3]


def narrow(numbers, nbits):
    return np.uint8(numbers).astype(types.nptype_from_builtin(types.string_to_builtin(f"uint{nbits}")))


LUT = np.arange(12, dtype=np.float32).reshape(1, 1, 4, 3)


@pytest.mark.parametrize("axis", [0, -1])
def test_vectors_of_a_table_are_read_along_any_axis(axis):
    """Index i stands for 3i, 3i + 1, 3i + 2, one after the other."""
    indices = narrow([[0, 3], [2, 1]], 2)

    def build(x):
        weight = mb.constexpr_lut_to_dense(indices=indices, lut=LUT, vector_axis=np.int32(axis), name="w")
        return mb.add(x=x, y=weight)

    mlmodel = program(build, (6, 2) if axis == 0 else (2, 6))
    by_hand = np.float32([[0, 9], [1, 10], [2, 11], [6, 3], [7, 4], [8, 5]])
    expected = by_hand if axis == 0 else np.float32([[0, 1, 2, 9, 10, 11], [6, 7, 8, 3, 4, 5]])
    np.testing.assert_array_equal(the_weight(mlmodel), expected)
    np.testing.assert_array_equal(the_weight(peer(cto.decompress_weights, mlmodel)), expected)


def test_vectors_of_several_tables_along_a_third_axis():
    """A table for each half of the first axis: the second has a hundred more."""
    indices = narrow([[[0, 1], [1, 0]], [[1, 1], [0, 0]]], 1)
    lut = np.float32([[[1, 2], [3, 4]], [[101, 102], [103, 104]]]).reshape(2, 1, 1, 2, 2)

    def build(x):
        return mb.add(x=x, y=mb.constexpr_lut_to_dense(indices=indices, lut=lut, vector_axis=np.int32(2), name="w"))

    expected = np.float32([[[1, 2, 3, 4], [3, 4, 1, 2]], [[103, 104, 103, 104], [101, 102, 101, 102]]])
    mlmodel = program(build, (2, 2, 4))
    np.testing.assert_array_equal(the_weight(mlmodel), expected)
    np.testing.assert_array_equal(the_weight(peer(cto.decompress_weights, mlmodel)), expected)


def test_a_table_of_what_is_left_of_a_pruned_weight():
    mask = np.uint8([[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 1]])

    def build(x):
        inside, values = mb.constexpr_lut_to_sparse(
            indices_mask=narrow(mask, 1),
            indices_nonzero_data=narrow([0, 1, 1, 0, 1, 0, 1], 1),
            lut=np.float32([2, 5]).reshape(1, 1, 2, 1),
        )
        return mb.add(x=x, y=mb.constexpr_sparse_to_dense(nonzero_data=values, mask=inside, name="w"))

    mlmodel = program(build, (2, 6))
    expected = np.float32([[2, 0, 5, 5, 0, 2], [0, 5, 0, 0, 2, 5]])
    np.testing.assert_array_equal(the_weight(mlmodel), expected)
    np.testing.assert_array_equal(the_weight(peer(cto.decompress_weights, mlmodel)), expected)


def test_vectors_of_what_is_left_of_a_pruned_weight():
    """A bit of the mask for each vector."""

    def build(x):
        inside, values = mb.constexpr_lut_to_sparse(
            indices_mask=narrow([[1, 0, 1], [0, 1, 0]], 1),
            indices_nonzero_data=narrow([1, 0, 1], 1),
            lut=np.float32([[2, 3], [5, 7]]).reshape(1, 1, 2, 2),
            vector_axis=np.int32(0),
        )
        return mb.add(x=x, y=mb.constexpr_sparse_to_dense(nonzero_data=values, mask=inside, name="w"))

    mlmodel = program(build, (4, 3))
    expected = np.float32([[5, 0, 2], [7, 0, 3], [0, 5, 0], [0, 7, 0]])
    np.testing.assert_array_equal(the_weight(mlmodel), expected)
    np.testing.assert_array_equal(the_weight(peer(cto.decompress_weights, mlmodel)), expected)
