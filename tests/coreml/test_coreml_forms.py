"""What each target holds: the form of a leaf in a package, the ops that hold it, and that coremltools agrees."""

from __future__ import annotations

import dataclasses

import coremltools as ct
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import palettax as px
from palettax.coreml import audit, from_torch, read_palettes
from palettax.coreml.forms import check_forms, in_package
from palettax.coreml.package import operations
from palettax.coreml.scoped import quiet
from tests.leaves import assert_same, assert_same_bits, forms, random_leaf, with_mask

HANDED_ON = (None, np.int8, np.uint8)


class Weights(torch.nn.Module):
    """Parameters of any shapes, each read by one op."""

    def __init__(self, leaves):
        super().__init__()
        for name, leaf in leaves.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(leaf.shape)))

    def forward(self, x):
        return sum((weight * x).sum() for weight in self.parameters())


def _convert(leaves, target, tmp_path, precision=ct.precision.FLOAT32, frontend="export"):
    options = dict(minimum_deployment_target=target, compute_precision=precision, frontend=frontend)
    path = tmp_path / "model.mlpackage"
    from_torch(Weights(leaves), torch.zeros(1), leaves, **options).save(str(path))
    return ct.models.MLModel(str(path), skip_model_load=True)


def _constants(mlmodel):
    return [op.outputs[0].val for _, op in operations(mlmodel) if op.op_type == "const"]


def _with_odd_scale(leaf, seed=0):
    """The leaf with a scale that rounds when it is multiplied."""
    if leaf.scale is None:
        return leaf
    random = np.random.default_rng(seed)
    return dataclasses.replace(leaf, scale=(random.random(leaf.scale.shape) + 0.1).astype(leaf.dtype))


def _random_leaves(count, seed):
    """Leaves of many forms, without kept values and float8."""
    random = np.random.default_rng(seed)
    leaves = {}
    for number in range(count):
        cuts = random.integers(1, (3, 4), (random.integers(1, 5), 2))
        axis, size = int(random.integers(len(cuts))), int(random.choice([1, 1, 2, 3]))
        shape = tuple(int(g * n * (size if a == axis else 1)) for a, (g, n) in enumerate(cuts))
        divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in shape]
        leaf = random_leaf(
            shape,
            int(random.choice([1, 2, 3, 4, 6, 8])),
            groups=tuple(int(g) for g, _ in cuts),
            vector=(axis, size) if size > 1 else None,
            scale=tuple(int(random.choice(d)) for d in divisors) if random.random() < 0.6 else None,
            dtype=(np.float16, ml_dtypes.bfloat16, np.float32, np.float64)[random.integers(4)],
            lut_dtype=HANDED_ON[random.integers(3)],
            mask=size == 1 and bool(random.random() < 0.5),
            seed=number,
        )
        leaves[f"w{number}"] = _with_odd_scale(leaf, number)
    return leaves


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("precision", [ct.precision.FLOAT16, ct.precision.FLOAT32])
@pytest.mark.parametrize("target", ["iOS18", "iOS26"])
def test_any_form_is_in_the_package_and_coremltools_expands_it_to_the_same(target, precision, seed, tmp_path):
    leaves = _random_leaves(80, seed)
    frontend = "trace" if seed else "export"
    mlmodel = _convert(leaves, target, tmp_path, precision, frontend)
    result = audit(mlmodel, leaves)
    assert result.identical, str(result)
    palettes = read_palettes(mlmodel)
    with quiet():
        expanded = _constants(ct.optimize.coreml.decompress_weights(mlmodel))
    expanded = {(v.shape, v.dtype, (v + 0).tobytes()) for v in expanded if isinstance(v, np.ndarray)}
    for name, leaf in leaves.items():
        found = palettes[name].depalettize() + 0
        assert (found.shape, found.dtype, found.tobytes()) in expanded, name
        if precision == ct.precision.FLOAT32 and leaf.dtype == np.float32:
            np.testing.assert_array_equal(found, leaf.depalettize())


@given(forms(), st.sampled_from([ct.target.iOS18, ct.target.iOS26]), st.integers(0, 2**32 - 1))
def test_a_leaf_in_a_package_is_the_same_weight(form, target, seed):
    leaf = random_leaf(
        **form | {"kept": False, "lut_dtype": form["lut_dtype"] if form["lut_dtype"] in HANDED_ON else None}
    )
    leaf = _with_odd_scale(leaf, seed)
    check_forms({"w": leaf}, target)
    held = in_package(leaf, target).validate()
    assert_same_bits(held.depalettize(), leaf.depalettize())
    if target == ct.target.iOS18 and held.lut.dtype == held.dtype and held.mask is None:
        assert held.scale is None
    if target == ct.target.iOS26 and (leaf.mask is None or leaf.mask.any()):
        assert_same(held, leaf)


LEVELS = {"lut_dtype": np.uint8, "groups": (4, 1)}
ROWS = {"scale": (12, 1)}
SHIFT, TABLE = "blockwise_shift_scale", "lut_to_dense"
SPARSE = ("lut_to_sparse", "sparse_to_dense")
SCALED = ("lut_to_sparse", "sparse_blockwise_shift_scale", "sparse_to_dense")
OPS = {
    "table": ({}, (TABLE,), (TABLE,)),
    "scale": (ROWS, (TABLE,), (TABLE, SHIFT)),
    "scale along vectors": (ROWS | {"vector": (0, 2)}, (TABLE,), (TABLE, SHIFT)),
    "levels": (LEVELS, (SHIFT, TABLE), (TABLE, SHIFT)),
    "levels of vectors": (LEVELS | {"vector": (1, 4)}, (SHIFT, TABLE), (TABLE, SHIFT)),
    "levels and scale": (LEVELS | ROWS, (SHIFT, TABLE), (TABLE, SHIFT)),
    "levels and scale along vectors": (ROWS | {"lut_dtype": np.int8, "vector": (0, 3)}, (SHIFT, TABLE), (TABLE, SHIFT)),
    "mask": ({"mask": True}, SPARSE, SPARSE),
    "mask and scale": ({"mask": True} | ROWS, SCALED, SCALED),
    "mask and levels": ({"mask": True} | LEVELS, SCALED, SCALED),
    "mask, levels and scale": ({"mask": True} | LEVELS | ROWS, SCALED, SCALED),
}


@pytest.mark.parametrize("target", ["iOS18", "iOS26"])
def test_the_ops_that_the_pipeline_leaves(target, tmp_path):
    leaves = {f"w{i}": random_leaf((12, 16), 4, seed=i, **form) for i, (form, *_) in enumerate(OPS.values())}
    for name, leaf in leaves.items():
        if leaf.mask is not None:
            leaves[name] = with_mask(dataclasses.replace(leaf, mask=None), kept=False)
    mlmodel = _convert(leaves, target, tmp_path, ct.precision.FLOAT16)
    found = [op for _, op in operations(mlmodel) if op.op_type.startswith("constexpr_")]
    for (name, leaf), (_, *expected) in zip(leaves.items(), OPS.values(), strict=True):
        ours = {op.op_type.removeprefix("constexpr_"): op for op in found if op.name.split("_")[0] == name}
        assert tuple(ours) == expected[target == "iOS26"]
        if leaf.lut.dtype != leaf.dtype:
            (shift,) = (op for op_type, op in ours.items() if "shift_scale" in op_type)
            assert (None if shift.offset is None else set(shift.offset.val.reshape(-1).tolist())) == (
                {128} if leaf.lut.dtype == np.uint8 else None
            )


def _as(lut, dtype=np.float32, scale=None, indices=None, shape=(4, 4), mask=None):
    lut = np.array(lut).reshape(1, 1, -1, 1)
    if indices is None:
        indices = np.random.default_rng(0).integers(0, lut.shape[2], shape).astype(np.uint8)
    if mask is not None:
        indices = np.where(mask, indices, np.uint8(0))
    if scale is None and lut.dtype != dtype:
        scale = np.full((1, 1), 0.5, dtype)
    nbits = lut.size.bit_length() - 1
    return px.PalettizedArray(lut, indices, scale, nbits=nbits, dtype=dtype, mask=mask).validate()


ODD = {
    "zeros": _as(np.zeros(4, np.int8), scale=np.zeros((1, 1), np.float32)),
    "zeros of a step": _as(np.full(4, 128, np.uint8)),
    "float zeros": _as(np.zeros(4, np.float32)),
    "a constant": _as(np.full(16, 7, np.int8)),
    "repeated levels": _as(np.array([-3, 5, 5, 5], np.int8)),
    "levels that are not negative": _as(np.arange(16, dtype=np.int8)),
    "the least and the greatest level": _as(np.array([-128, 127], np.int8)),
    "few weights": _as(np.array([1, 2], np.int8), shape=(1, 3)),
    "one weight": _as(np.array([1, 2], np.uint8), shape=(1, 1)),
    "few weights in a mask": _as(np.array([1, 2], np.int8), shape=(2, 2), mask=np.eye(2, dtype=bool)),
    "one weight in a mask": _as(
        np.array([1.0, 2.0], np.float32), shape=(4, 4), mask=np.eye(16, dtype=bool)[3].reshape(4, 4)
    ),
    "no weight in a mask": _as(np.array([1.0, 2.0], np.float32), mask=np.zeros((4, 4), bool)),
    "no level in a mask": _as(np.array([1, 2], np.uint8), mask=np.zeros((4, 4), bool)),
    "all weights in a mask": _as(np.array([1, 2], np.uint8), mask=np.ones((4, 4), bool)),
    "zeros in a mask": _as(np.array([0, 2], np.int8), mask=np.ones((4, 4), bool)),
    "a step that float16 cannot tell from zero": _as(
        np.arange(4, dtype=np.int8), scale=np.full((1, 1), 1e-9, np.float32)
    ),
    "a row that float16 cannot tell from zero": _as(
        np.arange(4.0, dtype=np.float32), scale=np.array([[1], [2], [1e-9], [3]], np.float32)
    ),
}


@pytest.mark.parametrize("precision", [ct.precision.FLOAT16, ct.precision.FLOAT32])
@pytest.mark.parametrize("target", ["iOS18", "iOS26"])
def test_odd_tables(target, precision, tmp_path):
    leaves = {f"w{i}": leaf for i, leaf in enumerate(ODD.values())}
    mlmodel = _convert(leaves, target, tmp_path, precision)
    result, palettes = audit(mlmodel, leaves), read_palettes(mlmodel)
    for (name, leaf), odd in zip(leaves.items(), ODD, strict=True):
        assert result.leaves[name].identical, f"{odd}: {result}"
        found = palettes[name]
        if leaf.mask is None or leaf.mask.any():
            assert found.lut.dtype == (leaf.lut.dtype if leaf.lut.dtype != leaf.dtype else found.dtype), odd
        if precision == ct.precision.FLOAT32:
            np.testing.assert_array_equal(found.depalettize(), leaf.depalettize())
