"""`fast_conversion`: what coremltools finds, found fast, and put back."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import coremltools as ct
import numpy as np
import pytest
import torch
from coreml_models import Mnist
from coremltools.converters.mil.frontend.torch import ops
from coremltools.optimize import _utils as utils
from hypothesis import given
from hypothesis import strategies as st

from palettax.coreml import audit
from palettax.coreml.scoped import quiet
from palettax.torch import load_into
from palettax.torch.conversion import fast_conversion
from tests.leaves import random_leaf

ORIGINAL = utils.find_indices_for_lut
VECTORS = {"nbits": 4, "vector": (1, 4)}


@st.composite
def searches(draw):
    """Weights, tables and the axis of vectors; values that are entries, near to entries, tied, or far from all."""
    cuts = draw(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 4)), min_size=1, max_size=3))
    axis, size = draw(st.tuples(st.integers(0, len(cuts) - 1), st.sampled_from([1, 1, 2, 3, 4])))
    nbits = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    kind = draw(st.sampled_from(["entries", "integers", "close", "far", "tiny"]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = [g * n * (size if a == axis else 1) for a, (g, n) in enumerate(cuts)]
    lut_shape = (*(g for g, _ in cuts), 2**nbits, size)
    spans = {"entries": 5, "integers": 5, "close": 0, "far": 3, "tiny": 3}
    lut = random.integers(-spans[kind], spans[kind] + 1, lut_shape).astype(dtype)
    lut = lut + random.random(lut_shape).astype(dtype) * (kind == "close")
    values = random.choice(lut.reshape(-1), shape)
    if kind == "integers":
        values = values + random.choice(np.array([-0.5, 0, 0.5], dtype), shape)
    elif kind == "close":
        values = values * (1 + random.choice(np.array([-4, 0, 4], dtype), shape) * np.finfo(dtype).eps)
    elif kind == "far":
        values = values + random.choice(np.array([1e4, -1e4], dtype), shape)
    elif kind == "tiny":
        lut, values = lut * np.finfo(dtype).tiny, values * np.finfo(dtype).tiny
    negative = draw(st.booleans())
    return values.astype(dtype), lut.astype(dtype), (axis - len(cuts) * negative) if size > 1 else None


@given(searches())
def test_the_indices_are_those_of_coremltools(search):
    with np.errstate(over="ignore"):  # coremltools squares
        expected = ORIGINAL(*search)
        with fast_conversion():
            found = utils.find_indices_for_lut(*search)
    assert found.dtype == expected.dtype
    assert found.dtype.metadata == expected.dtype.metadata
    np.testing.assert_array_equal(found, expected)


def test_whole_vectors_of_the_table_are_found_in_a_large_block():
    random = np.random.default_rng(0)
    lut = random.standard_normal((2, 1, 256, 2)).astype(np.float32)
    choice = random.integers(0, 256, (64, 128))
    weight = np.stack([lut[row // 32, 0, choice[row]].reshape(-1) for row in range(64)])
    with fast_conversion():
        np.testing.assert_array_equal(utils.find_indices_for_lut(weight, lut, 1), choice)


def test_a_vector_off_the_table_is_searched_part_by_part(monkeypatch):
    monkeypatch.setattr("palettax.torch.conversion._SLAB", 64)
    random = np.random.default_rng(0)
    weight, lut = random.standard_normal((24, 10)), random.standard_normal((2, 1, 8, 3))
    expected = ORIGINAL(weight, lut, 0)
    with fast_conversion():
        np.testing.assert_array_equal(utils.find_indices_for_lut(weight, lut, 0), expected)


@pytest.mark.parametrize(
    ("data", "lut", "axis"),
    [
        (np.zeros((2, 2)), np.zeros((1, 1, 32, 1)), None),
        (np.zeros((2, 2)), np.zeros((1, 4, 1)), None),
        (np.zeros((2, 2)), np.zeros((1, 1, 4, 2)), None),
        (np.zeros((2, 2)), np.zeros((1, 1, 4, 2)), 5),
        (np.zeros((2, 3)), np.zeros((1, 1, 4, 2)), 1),
        (np.zeros((2, 3)), np.zeros((1, 2, 4, 1)), None),
    ],
)
def test_what_coremltools_refuses_it_refuses_still(data, lut, axis):
    with pytest.raises((ValueError, KeyError)) as expected:
        ORIGINAL(data, lut, axis)
    with fast_conversion(), pytest.raises(expected.type) as found:
        utils.find_indices_for_lut(data, lut, axis)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("values", [[np.nan, 1, 2], [np.inf, 1, 2]])
def test_what_is_not_finite_is_left_to_coremltools(values):
    data, lut = np.array(values, np.float32), np.array([1, 2, np.inf, 3], np.float32).reshape(1, 4, 1)
    with np.errstate(invalid="ignore"), fast_conversion():
        np.testing.assert_array_equal(utils.find_indices_for_lut(data, lut), ORIGINAL(data, lut))


def test_all_is_put_back_also_after_an_error_and_from_within():
    before = utils.find_indices_for_lut, ops._cast
    with fast_conversion():
        outer = utils.find_indices_for_lut, ops._cast
        assert outer[0] is not before[0]
        assert outer[1] is not before[1]
        with pytest.raises(RuntimeError), fast_conversion():
            raise RuntimeError
        assert (utils.find_indices_for_lut, ops._cast) == outer
    assert (utils.find_indices_for_lut, ops._cast) == before


@pytest.mark.parametrize("target", [ct.target.iOS18, ct.target.iOS26])
@pytest.mark.parametrize(
    "form", [{"nbits": 8}, {"lut_dtype": np.uint8, "groups": (4, 1)}, {"mask": True, "seed": 1}, VECTORS]
)
def test_a_plain_conversion_of_a_traced_model(form, target):
    leaves = {"dense1.weight": random_leaf((16, 128), **form)}
    model = load_into(Mnist().eval(), leaves)
    with quiet(), torch.no_grad():
        traced = torch.jit.trace(model, model.example)
        inputs = [ct.TensorType(shape=model.example.shape)]
        with fast_conversion():
            mlmodel = ct.convert(traced, inputs=inputs, minimum_deployment_target=target, skip_model_load=True)
    assert audit(mlmodel, model).identical


@pytest.mark.slow
def test_a_large_layer_takes_seconds_and_little_memory():
    code = """
        import resource, time
        import numpy as np, torch
        import palettax as px, palettax.coreml, palettax.torch, coremltools as ct
        from palettax.torch.conversion import fast_conversion
        random = np.random.default_rng(0)
        lut = np.sort(random.choice(np.linspace(-1, 1, 4001).astype(np.float16), 256, replace=False))
        indices = random.integers(0, 256, (4096, 4096), dtype=np.uint8)
        leaf = px.PalettizedArray(lut.astype(np.float32).reshape(1, 1, 256, 1), indices, nbits=8)
        layer = palettax.torch.load_into(torch.nn.Linear(4096, 4096), {"weight": leaf})
        start = time.perf_counter()
        with fast_conversion():
            program = torch.export.export(layer, (torch.zeros(1, 4096),)).run_decompositions({})
            mlmodel = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        assert palettax.coreml.audit(mlmodel, layer).identical
        print(f"{seconds:.1f} s, {peak:.2f} GiB")
        assert seconds < 10 and peak < 2
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
