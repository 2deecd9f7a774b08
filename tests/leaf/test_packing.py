"""Bit packing against the bytes of Core ML."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import palettax.coreml
from palettax.leaf import pack, packed_size, unpack

assert palettax.coreml  # imported first: it brings coremltools in without its noise

WIDTHS = range(1, 9)


@given(nbits=st.sampled_from(WIDTHS), shape=st.lists(st.integers(0, 7), max_size=4), seed=st.integers(0, 2**32 - 1))
def test_round_trip(nbits, shape, seed):
    indices = np.random.default_rng(seed).integers(0, 2**nbits, shape).astype(np.uint8)
    packed = pack(indices, nbits)
    assert packed.dtype == np.uint8
    assert packed.size == packed_size(indices.size, nbits) == int(np.ceil(indices.size * nbits / 8))
    back = unpack(packed, nbits, tuple(shape))
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, indices)


@given(nbits=st.sampled_from(WIDTHS), values=st.lists(st.integers(0, 255), max_size=20))
def test_the_stream_is_one_little_endian_number(nbits, values):
    values = [v % 2**nbits for v in values]
    number = sum(v << (i * nbits) for i, v in enumerate(values))
    expected = list(number.to_bytes(-(-len(values) * nbits // 8), "little"))
    assert pack(np.array(values, np.uint8), nbits).tolist() == expected


@pytest.mark.parametrize(
    ("nbits", "indices", "expected"),
    [
        (3, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1], [136, 198, 250, 8]),
        (6, [0, 1, 2, 3], [64, 32, 12]),
        (1, [1, 0, 0, 0, 0, 0, 0, 0, 1], [1, 1]),
        (8, [7, 255], [7, 255]),
    ],
)
def test_the_bytes_core_ml_stores(nbits, indices, expected):
    assert pack(np.array(indices, np.uint8), nbits).tolist() == expected


@pytest.mark.parametrize("nbits", WIDTHS)
def test_coremltools_packs_and_unpacks_the_same(nbits):
    from coremltools.optimize._utils import pack_elements_into_bits, restore_elements_from_packed_bits

    for size in (1, 2, 7, 8, 61, 1000):
        indices = np.random.default_rng(size).integers(0, 2**nbits, size).astype(np.uint8)
        packed = pack(indices, nbits)
        np.testing.assert_array_equal(packed, pack_elements_into_bits(indices, nbits))
        np.testing.assert_array_equal(indices, restore_elements_from_packed_bits(packed, nbits, size))


def test_arrays_in_any_memory_order_are_read_row_major():
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(pack(indices.T, 4), pack(np.ascontiguousarray(indices.T), 4))
    np.testing.assert_array_equal(pack(np.asfortranarray(indices), 4), pack(indices, 4))


@pytest.mark.parametrize("nbits", range(1, 8))
def test_an_index_that_does_not_fit(nbits):
    with pytest.raises(ValueError, match=f"index {2**nbits} does not fit in nbits={nbits}"):
        pack(np.array([0, 2**nbits], np.uint8), nbits)


def test_a_stream_that_is_too_short():
    with pytest.raises(ValueError, match=r"2 bytes hold fewer than the 6 indices of 3 bits that shape \(2, 3\) needs"):
        unpack(np.zeros(2, np.uint8), 3, (2, 3))
