"""Palettized arrays built by hand, in every form they may have, and their equality on bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import palettax as px

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
LEVELS = (np.int8, np.uint8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
NO_BUFFERS = {
    "kept": (dict(shape=(6, 4), mask=True, kept=True), "it has kept values"),
    "float8": (dict(shape=(6, 4), lut_dtype=ml_dtypes.float8_e4m3fn), "its lut holds float8_e4m3fn levels"),
    "blocks": (dict(shape=(6, 4), scale=(3, 1)), r"its scale \(3, 1\) has blocks along the weight \(6, 4\)"),
    "blocks that tear vectors of levels": (
        dict(shape=(6, 4), scale=(2, 4), vector=(1, 2), lut_dtype=np.int8),
        r"its scale \(2, 4\) has blocks along the weight \(6, 4\)",
    ),
}
"""Arguments of `random_leaf` for what torch's buffers do not hold, and what the refusal says."""


def random_leaf(
    shape: tuple[int, ...],
    nbits: int = 2,
    *,
    groups: tuple[int, ...] | None = None,
    vector: tuple[int, int] | None = None,
    scale: tuple[int, ...] | None = None,
    dtype: Any = np.float32,
    seed: int = 0,
    lut_dtype: Any = None,
    mask: bool = False,
    kept: bool = False,
) -> px.PalettizedArray:
    """Random tables without repeated entries and random indices; `vector` is (axis, size).

    With a `lut_dtype` the tables are levels, whose entries may repeat. With `mask`, some weights are zero, or `kept`.
    """
    random = np.random.default_rng(seed)
    axis, size = vector or (None, 1)
    indices_shape = [n // size if a == axis else n for a, n in enumerate(shape)]
    # Values that even bfloat16 tells apart, in another order for every table and every place in a vector.
    pool = np.outer([1, -1], np.linspace(1, 2, 129)[:128]).reshape(-1)
    tables = np.broadcast_to(pool, (*(groups or (1,) * len(shape)), size, 256))
    lut = random.permuted(tables, axis=-1)[..., : 2**nbits].swapaxes(-1, -2) / 8
    leaf = px.PalettizedArray(
        lut.astype(dtype),
        random.integers(0, 2**nbits, indices_shape).astype(np.uint8),
        None if scale is None else (2.0 ** random.integers(-4, 4, scale)).astype(dtype),
        nbits=nbits,
        vector_axis=axis,
    ).validate()
    leaf = leaf if lut_dtype is None else with_levels(leaf, lut_dtype, seed)
    return with_mask(leaf, kept=kept, share=random.choice([0.0, 0.5, 0.9, 1.0]), seed=seed) if mask else leaf


def with_levels(leaf: px.PalettizedArray, lut_dtype: Any, seed: int = 0) -> px.PalettizedArray:
    """The leaf with a table of random levels; a leaf with no scale gets one."""
    random, lut_dtype = np.random.default_rng(seed), np.dtype(lut_dtype)
    levels = np.arange(256, dtype=np.uint8).view(lut_dtype)
    if lut_dtype.kind not in "iu":
        # So small that no weight overflows float16.
        values = levels.astype(np.float32)
        levels = levels[np.isfinite(values) & (abs(np.nan_to_num(values)) <= 64)]
    scale = np.full((1,) * leaf.ndim, 0.25, leaf.dtype) if leaf.scale is None else leaf.scale
    return dataclasses.replace(leaf, lut=random.choice(levels, leaf.lut.shape), scale=scale).validate()


def with_mask(leaf: px.PalettizedArray, *, kept: bool, share: float = 0.5, seed: int = 0) -> px.PalettizedArray:
    """The leaf with about that share of its weights on the table, the others zero, or kept."""
    random = np.random.default_rng(seed)
    mask = random.random(leaf.shape) < share
    values = random.standard_normal(int((~mask).sum())).astype(leaf.dtype) if kept else None
    indices = np.where(mask, leaf.indices, np.uint8(0))
    return dataclasses.replace(leaf, indices=indices, mask=mask, kept=values).validate()


@st.composite
def forms(draw: st.DrawFn, dtypes: Any = DTYPES) -> dict[str, Any]:
    """Arguments of `random_leaf`: any rank, groups, vectors, scale, levels and mask that go together."""
    cuts = draw(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 3)), min_size=1, max_size=4))
    axis, size = draw(st.tuples(st.integers(0, len(cuts) - 1), st.sampled_from([1, 1, 2, 3])))
    shape = tuple(g * n * (size if a == axis else 1) for a, (g, n) in enumerate(cuts))
    divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in shape]
    mask = size == 1 and draw(st.booleans())
    return {
        "shape": shape,
        "nbits": draw(st.sampled_from([1, 2, 3, 4, 6, 8])),
        "groups": tuple(g for g, _ in cuts),
        "vector": (axis, size) if size > 1 else None,
        "scale": tuple(draw(st.sampled_from(d)) for d in divisors) if draw(st.booleans()) else None,
        "dtype": draw(st.sampled_from(dtypes)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "lut_dtype": draw(st.sampled_from([None, *LEVELS])),
        "mask": mask,
        "kept": mask and draw(st.booleans()),
    }


def assert_same(found: Any, expected: Any) -> None:
    """Equality of leaves, dense or palettized, in every part, on bits."""
    assert type(found) is type(expected)
    if not isinstance(expected, px.PalettizedArray):
        assert_same_bits(found, expected)
        return
    for static in ("nbits", "vector_axis", "dtype", "shape"):
        assert getattr(found, static) == getattr(expected, static)
    for part in ("lut", "indices", "scale", "mask", "kept"):
        one, other = getattr(found, part), getattr(expected, part)
        assert (one is None) == (other is None)
        if other is not None:
            assert_same_bits(one, other)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()
