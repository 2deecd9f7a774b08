"""Palettized arrays built by hand, and their equality on bits."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

import palettax as px

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)


def random_leaf(
    shape: tuple[int, ...],
    nbits: int = 2,
    *,
    groups: tuple[int, ...] | None = None,
    vector: tuple[int, int] | None = None,
    scale: tuple[int, ...] | None = None,
    dtype: Any = np.float32,
    seed: int = 0,
) -> px.PalettizedArray:
    """Random tables without repeated entries and random indices; `vector` is (axis, size)."""
    random = np.random.default_rng(seed)
    axis, size = vector or (None, 1)
    indices_shape = [n // size if a == axis else n for a, n in enumerate(shape)]
    # Values that even bfloat16 tells apart, in another order for every table and every place in a vector.
    pool = np.outer([1, -1], np.linspace(1, 2, 129)[:128]).reshape(-1)
    tables = np.broadcast_to(pool, (*(groups or (1,) * len(shape)), size, 256))
    lut = random.permuted(tables, axis=-1)[..., : 2**nbits].swapaxes(-1, -2) / 8
    return px.PalettizedArray(
        lut.astype(dtype),
        random.integers(0, 2**nbits, indices_shape).astype(np.uint8),
        None if scale is None else (2.0 ** random.integers(-4, 4, scale)).astype(dtype),
        nbits=nbits,
        vector_axis=axis,
    ).validate()


def assert_same(found: Any, expected: Any) -> None:
    """Equality of leaves, dense or palettized, in every part, on bits."""
    assert type(found) is type(expected)
    if not isinstance(expected, px.PalettizedArray):
        assert_same_bits(found, expected)
        return
    assert (found.nbits, found.vector_axis, found.shape) == (expected.nbits, expected.vector_axis, expected.shape)
    assert_same_bits(found.lut, expected.lut)
    assert_same_bits(found.indices, expected.indices)
    assert (found.scale is None) == (expected.scale is None)
    if expected.scale is not None:
        assert_same_bits(found.scale, expected.scale)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()
