"""Conversion: the tables and indices in the saved package are the ones that went in, or the leaf is named."""

from __future__ import annotations

import copy

import coremltools as ct
import ml_dtypes
import numpy as np
import pytest
import torch
from coreml_models import Deconvolution, Mixed, Mnist

from palettax.coreml import OptimizationConfig, audit, from_torch, palettize_weights, read_palettes
from palettax.torch import load_into, to_params
from tests.leaves import random_leaf

FRONTENDS = ("export", "trace")
FLOAT32 = ct.precision.FLOAT32
FLOAT8 = ml_dtypes.float8_e5m2


def _saved(mlmodel, tmp_path):
    path = tmp_path / "model.mlpackage"
    mlmodel.save(str(path))
    return path


def _decompressed(path):
    """Every dense weight of a package once coremltools itself has expanded it, by name."""
    from coremltools.converters.mil.frontend.milproto.load import load

    dense = ct.optimize.coreml.decompress_weights(ct.models.MLModel(str(path), skip_model_load=True))
    spec = dense.get_spec()
    program = load(spec, spec.specificationVersion, dense.weights_dir)
    constants = [op for op in program.functions["main"].operations if op.op_type == "const"]
    return [op.outputs[0].val for op in constants if isinstance(op.outputs[0].val, np.ndarray)]


def _mnist_leaves(**form):
    return {
        "conv1.weight": random_leaf((8, 1, 3, 3), seed=1, **form),
        "conv2.weight": random_leaf((8, 8, 3, 3), seed=2, **form),
        "dense1": {"weight": random_leaf((16, 128), seed=3, **form), "bias": np.arange(16, dtype=np.float32)},
        "dense2.weight": random_leaf((12, 16), seed=4, **form),
    }


def _mixed_leaves(forms):
    shapes = {
        "embedding.weight": (20, 12),
        "layers.0.weight": (8, 12, 3),
        "layers.1.weight": (8, 12, 2),
        "matrix": (12, 12),
    }
    return {name: random_leaf(shape, seed=i, **forms(shape)) for i, (name, shape) in enumerate(shapes.items())}


CASES = {
    "1 bit": lambda shape: {"nbits": 1},
    "2 bits": lambda shape: {"nbits": 2},
    "3 bits": lambda shape: {"nbits": 3},
    "4 bits": lambda shape: {"nbits": 4},
    "6 bits": lambda shape: {"nbits": 6},
    "8 bits": lambda shape: {"nbits": 8},
    "axis 0": lambda shape: {"groups": (4, *(1,) * (len(shape) - 1))},
    "axis 1": lambda shape: {"groups": (1, 3, *(1,) * (len(shape) - 2))},
    "both axes": lambda shape: {"groups": (2, 3, *(1,) * (len(shape) - 2))},
    "vectors": lambda shape: {"vector": (1, 2)},
    "grouped vectors": lambda shape: {"nbits": 4, "groups": (2, 3, *(1,) * (len(shape) - 2)), "vector": (0, 2)},
    "levels": lambda shape: {"lut_dtype": np.int8},
    "grouped levels": lambda shape: {"lut_dtype": np.uint8, "groups": (4, *(1,) * (len(shape) - 1))},
    "levels of vectors": lambda shape: {"lut_dtype": np.uint8, "nbits": 4, "vector": (1, 2)},
    "levels behind a scale": lambda shape: {"lut_dtype": np.int8, "groups": _rows(shape, 4), "scale": _rows(shape)},
    "scale": lambda shape: {"nbits": 4, "scale": _rows(shape)},
    "scale along the vectors": lambda shape: {"nbits": 4, "scale": _rows(shape), "vector": (0, 2)},
    "mask": lambda shape: {"mask": True},
    "grouped mask": lambda shape: {"mask": True, "groups": (2, 3, *(1,) * (len(shape) - 2))},
    "mask and scale": lambda shape: {"mask": True, "scale": _rows(shape)},
    "mask and levels": lambda shape: {"mask": True, "groups": _rows(shape, 4), "lut_dtype": np.uint8},
}


def _rows(shape, count=None):
    return (count or shape[0], *(1,) * (len(shape) - 1))


def _check(model, leaves, target, frontend, tmp_path):
    mlmodel = from_torch(
        model, model.example, leaves, minimum_deployment_target=target, compute_precision=FLOAT32, frontend=frontend
    )
    path = _saved(mlmodel, tmp_path)
    result = audit(path, leaves)
    assert result.identical, str(result)
    assert not any(leaf.lut_rounded for leaf in result.leaves.values())
    expanded = _decompressed(path)
    for name, leaf in read_palettes(path).items():
        assert any(np.array_equal(dense, leaf.depalettize()) for dense in expanded), name


@pytest.mark.parametrize("case", CASES)
def test_every_form_at_ios18(case, tmp_path):
    _check(Mixed(), _mixed_leaves(CASES[case]), "iOS18", "export", tmp_path)


@pytest.mark.parametrize("case", [case for case in CASES if "levels" in case or "scale" in case])
def test_what_is_scaled_at_ios26(case, tmp_path):
    _check(Mixed(), _mixed_leaves(CASES[case]), "iOS26", "export", tmp_path)


@pytest.mark.parametrize("case", ["3 bits", "both axes", "grouped vectors", "levels behind a scale", "mask and levels"])
def test_every_form_traced(case, tmp_path):
    _check(Mixed(), _mixed_leaves(CASES[case]), ct.target.iOS18, "trace", tmp_path)


FORMS_OF_ONE = [
    {"scale": (4, 1, 1, 1)},
    {"lut_dtype": np.int8, "scale": (1, 6, 1, 1)},
    {"lut_dtype": np.uint8, "vector": (1, 2), "scale": (1, 6, 1, 1)},
    {"lut_dtype": np.uint8, "mask": True},
]


@pytest.mark.parametrize("target", ["iOS18", "iOS26"])
@pytest.mark.parametrize("form", FORMS_OF_ONE)
def test_every_form_of_a_transposed_convolution(form, target, tmp_path):
    _check(Deconvolution(), {"up.weight": random_leaf((4, 6, 2, 2), 4, **form)}, target, "trace", tmp_path)


@pytest.mark.parametrize("target", ["iOS16", "iOS17"])
@pytest.mark.parametrize("nbits", [1, 2, 4, 6, 8])
def test_the_packed_form(nbits, target, tmp_path):
    _check(Mixed(), _mixed_leaves(lambda shape: {"nbits": nbits}), target, "export", tmp_path)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("target", ["iOS16", "iOS17", "iOS18", "iOS26"])
def test_a_convolutional_net(frontend, target, tmp_path):
    leaves, model = _mnist_leaves(nbits=4), Mnist()
    mlmodel = from_torch(model, model.example, leaves, minimum_deployment_target=target, frontend=frontend)
    result = audit(_saved(mlmodel, tmp_path), leaves)
    assert result.identical
    assert {leaf.lut_dtype for leaf in result.leaves.values()} == {"float16"}
    # One bias was among the leaves and goes by its name, the other by its op's.
    assert result.dense.keys() == {"dense1.bias", "p_dense2_bias" if frontend == "export" else "dense2_bias"}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("groups", [None, (2, 1, 1, 1), (1, 3, 1, 1), (1, 1, 2, 1)])
def test_a_transposed_convolution(frontend, groups, tmp_path):
    _check(Deconvolution(), {"up.weight": random_leaf((4, 6, 2, 2), groups=groups)}, "iOS18", frontend, tmp_path)


@pytest.mark.parametrize("form", [{}, {"groups": (4, 1)}, {"vector": (1, 4)}])
def test_a_scale_at_ios26(form, tmp_path):
    leaves = {"dense1.weight": random_leaf((16, 128), nbits=4, scale=(16, 1), **form)}
    _check(Mnist(), leaves, "iOS26", "export", tmp_path)


@pytest.mark.parametrize(
    ("scale", "form"),
    [((4, 1), {}), ((16, 8), {"groups": (2, 4)}), ((8, 32), {"vector": (1, 2)}), ((1, 64), {"vector": (1, 4)})],
)
def test_a_scale_in_blocks_at_ios26(scale, form, tmp_path):
    leaves = {"dense1.weight": random_leaf((16, 128), nbits=4, scale=scale, **form)}
    mlmodel = from_torch(Mnist(), Mnist.example, leaves, minimum_deployment_target="iOS26")
    assert audit(_saved(mlmodel, tmp_path), leaves).identical
    assert read_palettes(mlmodel)["dense1.weight"].scale.shape == scale


@pytest.mark.parametrize("names", [["embedding.weight"], ["output.weight"], ["output.weight", "embedding.weight"]])
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_tied_weights_are_one_table_under_each_name(names, frontend):
    leaf, model = random_leaf((20, 12)), Mixed()
    leaves = dict.fromkeys(names, leaf)
    mlmodel = from_torch(model, model.example, leaves, minimum_deployment_target="iOS18", frontend=frontend)
    assert sorted(read_palettes(mlmodel)) == sorted(names)
    assert audit(mlmodel, leaves).identical


def test_equal_weights_that_the_pipeline_merges_keep_both_names():
    leaf = random_leaf((12, 12))
    model = torch.nn.Sequential(torch.nn.Linear(12, 12, bias=False), torch.nn.Linear(12, 12, bias=False))
    leaves = {"0.weight": leaf, "1.weight": leaf}
    mlmodel = from_torch(model, torch.zeros(1, 12), leaves, minimum_deployment_target="iOS18")
    assert sorted(read_palettes(mlmodel)) == ["0.weight", "1.weight"]
    assert audit(mlmodel, leaves).identical


class Collision(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a_b = torch.nn.Linear(6, 6)
        self.a = torch.nn.Module()
        self.a.b_weight = torch.nn.Parameter(torch.ones(6, 6))

    def forward(self, x):
        return torch.nn.functional.linear(self.a_b(x), self.a.b_weight)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_names_that_differ_only_in_dots_stay_apart(frontend):
    leaves = {"a_b.weight": random_leaf((6, 6), seed=1), "a.b_weight": random_leaf((6, 6), seed=2)}
    mlmodel = from_torch(Collision(), torch.zeros(1, 6), leaves, minimum_deployment_target="iOS18", frontend=frontend)
    assert audit(mlmodel, leaves).identical


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_float_type_of_leaf_and_model(dtype, model_dtype):
    leaf = random_leaf((12, 16), nbits=4, dtype=dtype)
    model = torch.nn.Linear(16, 12).to(model_dtype)
    mlmodel = from_torch(model, torch.zeros(1, 16), {"weight": leaf}, minimum_deployment_target="iOS18")
    assert audit(mlmodel, {"weight": leaf}).identical


def test_nothing_given_is_touched():
    model, leaves = Mnist().train(), _mnist_leaves()
    before = copy.deepcopy(model.state_dict())
    tables = leaves["conv1.weight"].lut.copy()
    from_torch(model, model.example, leaves, minimum_deployment_target="iOS18")
    assert model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    np.testing.assert_array_equal(tables, leaves["conv1.weight"].lut)


class Gelu(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(8, 8)

    def forward(self, x):
        return torch.nn.functional.gelu(self.dense(x), approximate="tanh")


def test_a_tanh_gelu_stays_one():
    from palettax.coreml.package import operations

    leaves = {"dense.weight": random_leaf((8, 8))}
    mlmodel = from_torch(Gelu(), torch.zeros(1, 8), leaves, minimum_deployment_target="iOS18")
    modes = [op.mode.val for _, op in operations(mlmodel) if op.op_type == "gelu"]
    assert modes == ["TANH_APPROXIMATION"]


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(8, 8, batch_first=True)
        self.dense = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.dense(self.lstm(x)[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # torch's own checks of an LSTM's input
def test_what_export_does_not_convert_is_traced():
    leaves = {"dense.weight": random_leaf((8, 8))}
    mlmodel = from_torch(Recurrent(), torch.zeros(1, 4, 8), leaves, minimum_deployment_target="iOS18")
    assert audit(mlmodel, leaves).identical


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_gates_are_dense_by_any_name_of_theirs_and_then_unique():
    model = Recurrent()
    model.alias = model.lstm.weight_hh_l0
    leaf = random_leaf((32, 8), 2)
    with pytest.warns(UserWarning, match="alias: dense in the package"):
        mlmodel = from_torch(model, torch.zeros(1, 4, 8), {"alias": leaf}, minimum_deployment_target="iOS18")
    assert read_palettes(mlmodel) == {}
    small = palettize_weights(mlmodel, OptimizationConfig({"mode": "unique", "weight_threshold": 100}))
    (table,) = (table for table in read_palettes(small).values() if table.nbits == 2)
    np.testing.assert_array_equal(np.unique(table.lut), np.unique(leaf.lut.astype(np.float16)))
    gates = leaf.depalettize().reshape(4, 8, 8)[[0, 1, 3, 2]]  # in the order of Core ML
    np.testing.assert_array_equal(table.depalettize(), gates.reshape(32, 8).astype(np.float16))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_only_gates_are_dense():
    class Projected(torch.nn.LSTM):
        def __init__(self):
            super().__init__(8, 8, batch_first=True)
            self.proj = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.proj(super().forward(x)[0])

    leaves = {"proj.weight": random_leaf((8, 8))}
    mlmodel = from_torch(Projected(), torch.zeros(1, 4, 8), leaves, minimum_deployment_target="iOS18")
    assert audit(mlmodel, leaves).identical


def test_options_go_through_to_the_converter():
    leaves = {"weight": random_leaf((6, 16))}
    mlmodel = from_torch(
        torch.nn.Linear(16, 6),
        torch.zeros(1, 16),
        leaves,
        minimum_deployment_target="iOS18",
        frontend="trace",
        inputs=[ct.TensorType(name="features", shape=(1, 16), dtype=np.float32)],
        outputs=[ct.TensorType(name="logits", dtype=np.float32)],
        pass_pipeline=ct.PassPipeline.CLEANUP,
    )
    spec = mlmodel.get_spec()
    assert [port.name for port in (*spec.description.input, *spec.description.output)] == ["features", "logits"]
    assert audit(mlmodel, leaves).identical


class Unused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_the_model_does_not_use_is_left_out():
    tree = {name: random_leaf((8, 8)) for name in ("used.weight", "unused.weight")}
    model = load_into(Unused(), tree)
    with pytest.warns(UserWarning, match=r"^unused\.weight: no table in the package"):
        mlmodel = from_torch(model, torch.ones(1, 8), minimum_deployment_target="iOS18")
    assert list(read_palettes(mlmodel)) == ["used.weight"]


@pytest.mark.parametrize(
    ("name", "form", "target", "message"),
    [
        ("unused.weight", {}, "iOS18", "did not become a lookup table"),
        ("used.wieght", {}, "iOS18", "did you mean 'used.weight'"),
        ("used.weight", {}, "iOS15", "iOS15 has no lookup tables; use iOS16"),
        ("used.weight", {}, "iOS81", "did you mean 'iOS18'"),
        ("used.weight", {"nbits": 3}, "iOS17", "used.weight: 3 bits; iOS17 .*Use iOS18"),
        ("used.weight", {"groups": (4, 1)}, "iOS16", "used.weight: 4 groups along axis 0; iOS16"),
        ("used.weight", {"groups": (2, 4)}, "iOS16", "2 groups along axis 0 and 4 groups along axis 1"),
        ("used.weight", {"vector": (1, 2)}, "iOS17", "used.weight: vectors of 2"),
        (
            "used.weight",
            {"scale": (8, 1)},
            "iOS17",
            r"a scale of shape \(8, 1\); .*iOS18.*multiplied.*or iOS26.* as it is",
        ),
        ("used.weight", {"lut_dtype": np.int8}, "iOS17", "a table of int8 levels; .*iOS18.*a table for every block"),
        ("used.weight", {"mask": True}, "iOS16", "used.weight: a mask; iOS16.*Use iOS18 or iOS26"),
        ("used.weight", {"mask": True, "kept": True}, "iOS18", r"used.weight: it has kept values.*px\.depalettize"),
        ("used.weight", {"lut_dtype": FLOAT8}, "iOS26", r"used.weight: its lut holds float8_e5m2.*px\.depalettize"),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, form, target, message):
    with pytest.raises(ValueError, match=message):
        from_torch(Unused(), torch.zeros(1, 8), {name: random_leaf((8, 8), **form)}, minimum_deployment_target=target)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("form", [{}, {"lut_dtype": np.uint8, "scale": (16, 1)}, {"lut_dtype": np.int8, "mask": True}])
def test_a_model_brings_its_own_tables(form, frontend):
    leaves = {"dense1.weight": random_leaf((16, 128), 4, **form), "dense2.weight": random_leaf((12, 16))}
    model = load_into(Mnist(), leaves)
    model.conv2.register_buffer("_COREML_/weight/compression_type", torch.tensor([1]))
    before = copy.deepcopy(model.state_dict())
    mlmodel = from_torch(model, model.example, minimum_deployment_target="iOS18", frontend=frontend)
    assert read_palettes(mlmodel).keys() == leaves.keys()
    assert audit(mlmodel, model).identical
    assert audit(mlmodel, to_params(model.state_dict())).identical
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_tied_weights_are_brought_under_each_name(frontend):
    model = load_into(Mixed(), {"embedding.weight": random_leaf((20, 12))})
    mlmodel = from_torch(model, model.example, minimum_deployment_target="iOS18", frontend=frontend)
    assert sorted(read_palettes(mlmodel)) == ["embedding.weight", "output.weight"]
    assert audit(mlmodel, model).identical


def test_tables_of_parameters_that_are_not_named_are_kept():
    leaves = {"dense1.weight": random_leaf((16, 128), 8), "dense2.weight": random_leaf((12, 16), seed=1)}
    model = load_into(Mnist(), leaves)
    named = {"dense2.weight": random_leaf((12, 16), 4)}
    mlmodel = from_torch(model, model.example, named, minimum_deployment_target="iOS18")
    assert audit(mlmodel, leaves | named).identical


def test_a_model_without_tables_is_refused():
    mlmodel = from_torch(Mnist(), Mnist.example, {}, minimum_deployment_target="iOS18")
    for call in (
        lambda: from_torch(Mnist(), Mnist.example, minimum_deployment_target="iOS18"),
        lambda: audit(mlmodel, Mnist()),
    ):
        with pytest.raises(ValueError, match=r"the Mnist holds no lookup tables: .*pass `palettized`"):
            call()


def test_an_unknown_frontend_is_refused():
    with pytest.raises(ValueError, match="frontend='script'"):
        from_torch(Unused(), torch.zeros(1, 8), {}, minimum_deployment_target="iOS18", frontend="script")


def test_the_converter_is_left_as_it_was():
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil.passes import pass_pipeline
    from coremltools.optimize import _utils as utils

    before = ops._cast, utils.find_indices_for_lut, ops._tqdm, pass_pipeline.tqdm, list(ct.PassPipeline.DEFAULT.passes)
    model = Mnist()
    from_torch(model, model.example, _mnist_leaves(), minimum_deployment_target="iOS18", frontend="trace")
    with pytest.raises(ValueError, match=r"unused\.weight"):
        from_torch(
            Unused(), torch.zeros(1, 8), {"unused.weight": random_leaf((8, 8))}, minimum_deployment_target="iOS18"
        )
    after = ops._cast, utils.find_indices_for_lut, ops._tqdm, pass_pipeline.tqdm, list(ct.PassPipeline.DEFAULT.passes)
    assert before == after


def test_conversion_prints_nothing(capfd):
    model = Mnist()
    from_torch(model, model.example, _mnist_leaves(), minimum_deployment_target="iOS18")
    assert "".join(capfd.readouterr()) == ""
