"""State dicts: what goes out comes back, bit for bit, and what is no lookup table is refused by name."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import palettax as px
from palettax.torch import to_params, to_state_dict
from palettax.torch.match import match_indices
from palettax.torch.tensors import bit_sum, checksum
from tests.leaves import DTYPES, NO_BUFFERS, assert_same, assert_same_bits, forms, random_leaf

FORMS = {
    "tensor": dict(shape=(6, 8)),
    "axis 0": dict(shape=(6, 8), groups=(3, 1)),
    "axis 1": dict(shape=(6, 8), groups=(1, 4)),
    "both axes": dict(shape=(6, 8), groups=(2, 4)),
    "vectors": dict(shape=(6, 8), vector=(1, 2)),
    "grouped vectors": dict(shape=(8, 6), groups=(2, 3), vector=(0, 4)),
    "scale": dict(shape=(6, 8), scale=(6, 1)),
    "grouped scale": dict(shape=(6, 8), groups=(3, 2), scale=(6, 1)),
    "scale along the vectors": dict(shape=(6, 8), vector=(1, 2), scale=(6, 8)),
    "convolution": dict(shape=(4, 6, 3, 3), groups=(2, 1, 1, 1), vector=(1, 2), scale=(4, 1, 1, 1)),
    "bias": dict(shape=(12,), groups=(3,)),
}


INTEGERS = (np.int8, np.uint8)
LEVEL_FORMS = {
    "levels": dict(shape=(6, 8)),
    "grouped levels": dict(shape=(6, 8), groups=(3, 2), scale=(3, 2)),
    "levels scaled as one": dict(shape=(6, 8), groups=(3, 2)),
    "levels scaled by channels": dict(shape=(6, 8), groups=(3, 1), scale=(6, 1)),
    "levels of channels scaled by columns": dict(shape=(6, 8), groups=(6, 1), scale=(1, 8)),
    "levels of vectors": dict(shape=(8, 6), groups=(2, 3), vector=(0, 4), scale=(2, 1)),
    "levels of vectors scaled by channels": dict(shape=(8, 6), groups=(1, 3), vector=(0, 4), scale=(8, 1)),
    "levels of a convolution": dict(shape=(4, 6, 3, 3), groups=(2, 1, 1, 1), scale=(4, 1, 1, 1)),
}
LEVEL_FORMS |= {f"pruned {name}": form | {"mask": True} for name, form in LEVEL_FORMS.items() if "vector" not in form}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("form", FORMS)
def test_round_trip(form, dtype):
    leaves = {"a.weight": random_leaf(**FORMS[form], nbits=2, dtype=dtype), "b": np.arange(3.0).astype(dtype)}
    returned = to_params(to_state_dict(leaves))
    assert list(returned) == list(leaves)
    for name, leaf in leaves.items():
        assert_same(returned[name], leaf)


def _as_read(leaf):
    """The leaf in the form that says the same with the lowest indices, and with its zeros outside the mask."""
    tables = leaf.lut.reshape(-1, *leaf.lut.shape[-2:]).tolist()
    lowest = np.array([[table.index(entry) for entry in table] for table in tables], np.float32)
    # A leaf whose entries are indices looks those up.
    lut = lowest.reshape(*leaf.groups, -1, 1)
    indices = px.PalettizedArray(lut, leaf.indices, nbits=leaf.nbits).depalettize().astype(np.uint8)
    mask = leaf.mask
    if mask is not None:
        mask = leaf.depalettize() != 0
        indices = np.where(mask, indices, np.uint8(0))
    return dataclasses.replace(leaf, indices=indices, mask=mask)


def _with_odd_scale(leaf, seed=0):
    """The leaf with a scale that rounds when it is multiplied."""
    random = np.random.default_rng(seed)
    return dataclasses.replace(leaf, scale=(random.random(leaf.scale.shape) + 0.1).astype(leaf.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("lut_dtype", INTEGERS)
@pytest.mark.parametrize("form", LEVEL_FORMS)
def test_round_trip_of_levels(form, lut_dtype, dtype):
    form = LEVEL_FORMS[form]
    leaf = _with_odd_scale(random_leaf(**form, nbits=4, lut_dtype=lut_dtype, dtype=dtype, seed=4))
    state = to_state_dict({"w": leaf})
    assert_same_bits(to_params({"w": state["w"]})["w"], leaf.depalettize())
    assert_same(to_params(state)["w"], _as_read(leaf))


def _is_refused(leaf):
    try:
        to_state_dict({"w": leaf})
    except ValueError:
        return True
    return False


@given(forms(), st.integers(0, 2**32 - 1))
def test_every_form_comes_back_or_is_refused(form, seed):
    leaf = random_leaf(**form)
    # Float entries, unlike levels, may become equal when a scale rounds them.
    leaf = _with_odd_scale(leaf, seed) if leaf.lut.dtype in INTEGERS else leaf
    levels = leaf.lut.dtype in INTEGERS
    blocks = leaf.scale is not None and any(s not in (1, n) for s, n in zip(leaf.scale.shape, leaf.shape, strict=True))
    if _is_refused(leaf):
        assert leaf.kept is not None or blocks or not (levels or leaf.lut.dtype == leaf.dtype)
        return
    assert levels or not blocks
    state = to_state_dict({"w": leaf})
    found = to_params(state)["w"]
    assert_same_bits(found.depalettize() + 0, leaf.depalettize() + 0)  # -0 may come back as 0, outside the mask
    assert (found.lut.dtype, found.mask is None) == (leaf.lut.dtype, leaf.mask is None)
    if found.groups == leaf.groups:
        assert_same(found, _as_read(leaf))
    else:
        assert leaf.lut.dtype in INTEGERS
        assert not any(n % s for n, s in zip(leaf.indices.shape, leaf.scale.shape, strict=True))


@pytest.mark.parametrize("lut_dtype", INTEGERS)
def test_levels_with_a_scale_per_block_come_back_with_a_table_per_block(lut_dtype):
    leaf = _with_odd_scale(random_leaf((6, 8), 4, groups=(1, 2), scale=(6, 2), lut_dtype=lut_dtype))
    found = to_params(to_state_dict({"w": leaf}))["w"]
    assert (found.groups, found.lut.dtype) == ((6, 2), lut_dtype)
    assert_same_bits(found.scale, leaf.scale)
    assert_same_bits(found.depalettize(), leaf.depalettize())


def test_the_buffers_of_levels():
    leaf = random_leaf((6, 8), groups=(3, 1), scale=(3, 1), lut_dtype=np.uint8, mask=True)
    buffers = to_state_dict({"w": leaf})
    assert buffers["_COREML_/w/compression_type"].tolist() == [1, 2, 3]
    assert buffers["_COREML_/w/quantization_n_bits"].tolist() == 8
    assert buffers["_COREML_/w/quantization_scale"].shape == (3, 1, 1, 1)
    assert buffers["_COREML_/w/zero_point"].dtype == torch.uint8
    assert set(buffers["_COREML_/w/zero_point"].reshape(-1).tolist()) == {128}
    table = (leaf.lut.astype(np.float32) - 128) * leaf.scale[..., None, None]
    assert_same_bits(buffers["_COREML_/w/lut"].numpy(), table)
    assert "_COREML_/w/palettization_scale" not in buffers


def test_levels_behind_a_scale_that_overflows_when_it_is_shifted():
    leaf = random_leaf((6, 8), lut_dtype=np.int8, scale=(6, 1), dtype=np.float16)
    leaf = dataclasses.replace(leaf, scale=np.linspace(300, 515, 6).astype(np.float16)[:, None])
    state = to_state_dict({"w": leaf})
    assert state["_COREML_/w/quantization_scale"].item() == 2**-6
    assert_same(to_params(state)["w"], _as_read(leaf))


@pytest.mark.parametrize(
    "changes",
    [
        dict(quantization_n_bits=torch.tensor(4)),
        dict(quantization_scale=torch.ones(1)),
        dict(quantization_scale=torch.ones(4, 1, 1, 1)),
        dict(quantization_scale=torch.full((1, 1, 1, 1), 0.3)),
        dict(zero_point=torch.full((1, 1, 1, 1), 127, dtype=torch.uint8)),
    ],
)
def test_a_quantized_table_that_levels_do_not_give_is_read_as_floats(changes):
    leaf = random_leaf((6, 8), 4, lut_dtype=np.int8)
    state = to_state_dict({"w": leaf}) | {f"_COREML_/w/{field}": value for field, value in changes.items()}
    found = to_params(state)["w"]
    assert (found.lut.dtype, found.scale) == (np.float32, None)
    assert_same_bits(found.depalettize(), leaf.depalettize())


def test_a_table_of_zeros_with_a_scale_of_zero():
    leaf = random_leaf((6, 8), lut_dtype=np.int8)
    leaf = dataclasses.replace(leaf, lut=np.zeros_like(leaf.lut), scale=np.zeros_like(leaf.scale))
    assert_same(to_params(to_state_dict({"w": leaf}))["w"], _as_read(leaf))


def test_a_pruned_weight_without_a_table_is_dense():
    weight = torch.eye(3)
    assert_same(to_params({"w": weight, "_COREML_/w/compression_type": torch.tensor([1])})["w"], weight.numpy())


def test_a_pruned_table_of_vectors_holds_the_zeros():
    leaf = random_leaf((6, 8), vector=(1, 2))
    leaf = dataclasses.replace(leaf, lut=np.concatenate([leaf.lut[..., :3, :], 0 * leaf.lut[..., :1, :]], axis=-2))
    state = to_state_dict({"w": leaf}) | {"_COREML_/w/compression_type": torch.tensor([1, 2])}
    assert_same(to_params(state)["w"], leaf)


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 6, 8])
def test_round_trip_of_every_width(nbits):
    dtype = np.float32
    leaf = random_leaf((8, 64), nbits, groups=(2, 1), dtype=dtype)
    assert_same(to_params(to_state_dict({"w": leaf}))["w"], leaf)


@pytest.mark.parametrize(("form", "message"), NO_BUFFERS.values(), ids=NO_BUFFERS)
def test_forms_that_have_no_buffers_are_refused_by_name(form, message):
    with pytest.raises(ValueError, match=rf"a\.weight: .*{message}.*px\.depalettize, or build it with"):
        to_state_dict({"a": {"weight": random_leaf(**form)}})


def test_a_scale_in_blocks_is_no_scale_of_ours():
    state = to_state_dict({"w": random_leaf((6, 8), scale=(6, 1))})
    state["_COREML_/w/palettization_scale"] = state["_COREML_/w/palettization_scale"][:3]
    with pytest.raises(ValueError, match=r"w: a palettization_scale of shape \(3, 1\) does not broadcast to \(6, 8\)"):
        to_params(state)


def test_the_dense_tensor_is_the_depalettized_weight():
    leaf = random_leaf((6, 8), groups=(3, 1), scale=(6, 1))
    np.testing.assert_array_equal(to_state_dict({"w": leaf})["w"].numpy(), leaf.depalettize())


def test_buffers_lie_on_the_owning_module():
    leaf = random_leaf((6, 8), vector=(1, 2), scale=(6, 1))
    fields = {"compression_type", "lut", "vector_axis", "palettization_scale"}
    expected = {"a.b.weight", "w", "_COREML_/metadata_version"}
    expected |= {f"a.b._COREML_/weight/{field}" for field in fields} | {f"_COREML_/w/{field}" for field in fields}
    assert set(to_state_dict({"a": {"b": {"weight": leaf}}, "w": leaf})) == expected


def test_without_palettized_leaves_there_are_no_buffers():
    assert list(to_state_dict({"w": np.zeros(3, np.float32)})) == ["w"]


def test_a_module_takes_the_dense_part_of_the_state_dict():
    leaf = random_leaf((2, 4))
    layer = torch.nn.Linear(4, 2, bias=False)
    result = layer.load_state_dict(to_state_dict({"weight": leaf}), strict=False)
    assert result.missing_keys == []
    np.testing.assert_array_equal(layer.weight.detach().numpy(), leaf.depalettize())


def test_repeated_entries_give_the_lowest_index_and_the_same_weight():
    lut = np.array([1.0, 2.0, 2.0, 2.0], np.float32).reshape(1, 4, 1)
    leaf = px.PalettizedArray(lut, np.array([0, 3, 2], np.uint8), nbits=2)
    returned = to_params(to_state_dict({"w": leaf}))["w"]
    assert returned.indices.tolist() == [0, 1, 1]
    assert_same_bits(returned.depalettize(), leaf.depalettize())


def test_signed_zeros_are_told_apart():
    lut = np.array([0.0, -0.0], np.float32).reshape(1, 2, 1)
    leaf = px.PalettizedArray(lut, np.array([0, 1, 1, 0], np.uint8), nbits=1)
    assert_same(to_params(to_state_dict({"w": leaf}))["w"], leaf)


@pytest.mark.parametrize("entries", [2, 3, 5, 12, 20, 100])
def test_a_table_of_another_size_is_completed_with_its_last_entry(entries):
    lut = torch.arange(entries, dtype=torch.float32)
    weight = lut[torch.arange(200) % entries]
    state = {"w": weight, "_COREML_/w/compression_type": torch.tensor([2]), "_COREML_/w/lut": lut.reshape(1, entries)}
    leaf = to_params(state)["w"]
    assert 2**leaf.nbits >= entries
    assert set(leaf.lut[0, entries - 1 :, 0].tolist()) == {entries - 1.0}
    np.testing.assert_array_equal(leaf.depalettize(), weight.numpy())


def test_vectors_match_the_way_a_loop_would():
    leaf = random_leaf((4, 6), nbits=3, groups=(2, 1), vector=(1, 3))
    weight = leaf.depalettize()
    indices, missing = match_indices(weight, leaf.lut, vector_axis=1)
    assert missing == 0
    for row, column in itertools.product(range(4), range(2)):
        table = leaf.lut[row // 2, 0].tolist()
        assert indices[row, column] == table.index(weight[row, 3 * column : 3 * column + 3].tolist())


def test_arrays_share_memory_with_the_tensors():
    tensor = torch.zeros(3)
    array = to_params({"w": tensor})["w"]
    tensor += 1
    assert array.tolist() == [1, 1, 1]


def test_tensors_share_no_memory_with_the_arrays():
    array = np.zeros(3, np.float32)
    to_state_dict({"w": array})["w"].add_(1)
    assert array.tolist() == [0, 0, 0]


def test_bfloat16_is_a_view():
    tensor = torch.randn(5, 3).to(torch.bfloat16)
    array = to_params({"w": tensor})["w"]
    assert array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())
    tensor.zero_()
    assert not array.any()


def _broken(**changes):
    state = to_state_dict({"conv.weight": random_leaf((4, 6))})
    return state | {key.replace("_w_", "conv._COREML_/weight/"): value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: _broken(**{"conv.weight": torch.full((4, 6), 7.0)}), "24 of 24 entries are not on the table"),
        (lambda: _broken(_w_compression_type=torch.tensor([3])), r"compression_type \[3\]"),
        (lambda: _broken(_w_compression_type=torch.tensor([2, 1])), r"compression_type \[2, 1\]"),
        (lambda: _broken(_w_compression_type=torch.tensor([1, 2]), **{"conv.weight": torch.eye(6)[:4] * 7}), "4 of 24"),
        (lambda: _broken(_w_lut=torch.zeros(4)), r"lut of shape \(4,\)"),
        (lambda: _broken(_w_lut=torch.zeros(1, 1, 257, 1)), r"lut of shape \(1, 1, 257, 1\)"),
        (lambda: _broken(_w_lut=torch.zeros(3, 1, 4, 1)), "does not divide"),
        (lambda: _broken(**{"conv.weight": "text"}), "found str"),
        (lambda: {k: v for k, v in _broken().items() if k != "conv.weight"}, "the parameter is not"),
    ],
)
def test_what_is_no_table_is_refused_by_name(state, message):
    with pytest.raises(ValueError, match=rf"conv\.weight: .*{message}"):
        to_params(state())


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"a\.b: two leaves"):
        to_state_dict({"a": {"b": np.zeros(1)}, "a.b": np.zeros(1)})


@pytest.mark.parametrize(
    ("missing", "package", "extra"), [("torch", "torch", "torch"), ("coremltools", "coreml", "coreml")]
)
def test_a_missing_package_names_its_extra(missing, package, extra):
    code = f"import sys; sys.modules['{missing}'] = None\nimport palettax\nimport palettax.{package}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"ImportError: {missing} is not installed; run: pip install 'palettax[{extra}]'" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8])
def test_checksums_see_what_changes(dtype):
    """`bit_sum` is for other devices than the CPU."""
    torch.manual_seed(0)
    tensor = (torch.rand(64, 3) * 200 - 100 if dtype.is_floating_point else torch.rand(64, 3) * 200).to(dtype)
    others = [tensor.flip(0), tensor.roll(1), tensor * 2, torch.zeros_like(tensor)]
    others += [-tensor, tensor.abs()] if dtype.is_floating_point else []
    for summed in (checksum, bit_sum):
        assert summed(tensor) == summed(tensor.clone()) == summed(tensor.t().contiguous().t())
        assert all(summed(tensor) != summed(other) for other in others)
