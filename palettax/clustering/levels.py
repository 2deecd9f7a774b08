"""Lookup tables in a narrow dtype: entries chosen among the levels it can hold, times a step, not rounded to them.

    minimise over step, k levels and indices:  Σ sensitivity · (weight - step · level[index])²

The levels are optimal for their step; `level_search` finds both.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped, UInt8

from palettax._typing import Array
from palettax.clustering.checks import lut_dtype
from palettax.clustering.entries import assign_rows
from palettax.clustering.host import host_call, in_threads
from palettax.clustering.level_path import Format, with_middles
from palettax.clustering.level_search import fit_rows
from palettax.clustering.points import count_points, finite_patterns, mass_rows, sorted_rows
from palettax.clustering.rows import LEAST_COUNTED, TASK

ZERO_LEVEL = 128
"""What an unsigned table stores for zero."""
# Rows that a thread takes at a time, at most.
SEARCHES = 16


class QuantizedFit(NamedTuple):
    """Lookup tables of narrow entries: the value of an entry is its level times its group's step.

    Attributes:
        lut: (groups, k), for vectors (groups, k, d), int8, uint8 (128 stands for 0) or float8: the levels, ascending.
            A group that needs fewer than k repeats the last.
        step: (groups,) of `step_dtype`, positive.
        indices: uint8 (groups, n): the entry nearest to each weight, the lowest on ties.
        inertia: (groups,) Σ sensitivity · (weight - step · level[index])².
    """

    lut: Shaped[Array, "groups k *vector"]
    step: Float[Array, " groups"]
    indices: UInt8[Array, "groups n"]
    inertia: Float[Array, " groups"]


def level_values(dtype: np.typing.DTypeLike) -> np.ndarray:
    """The numbers a narrow dtype holds: (levels,) float64, ascending, symmetric about a zero.

    Args:
        dtype: int8 and uint8 have the integers -127..127, uint8 stored with 128 added; a float8 its finite values.

    Raises:
        ValueError: another dtype.
    """
    dtype = np.dtype(dtype)
    if dtype in (np.int8, np.uint8):
        return np.arange(-127.0, 128.0)
    if dtype not in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        raise ValueError(f"a lookup table of {dtype}; choose int8, uint8, float8_e4m3fn or float8_e5m2")
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)] + 0.0)


def quantized_lut(
    weights: Float[Array, "groups n"],
    k: int,
    dtype: np.typing.DTypeLike,
    sensitivity: Float[Array, "groups n"] | None,
    *,
    step_dtype: np.typing.DTypeLike | None = None,
) -> QuantizedFit:
    """Fit the k entries `step · level` of least squared error to every row.

    The levels are optimal for the step; the step is the best of those searched. A step is rounded to `step_dtype`, and
    an entry as `level.astype(step_dtype) * step` rounds, before levels are chosen and indices found. A step is a normal
    number, because accelerators take subnormal ones for 0: where `step_dtype` has too little range for the weights, the
    step is its smallest normal number, and small weights are resolved less well or lost.

    A row that lies on such a grid, constants included, is reproduced exactly. A sensitivity of zero everywhere counts
    as one everywhere. Works under `jit` and `vmap`; a row with NaN or infinity then gets a NaN step.

    Args:
        weights: (groups, n), any float dtype.
        k: entries of a table, at most 256.
        dtype: int8, uint8, float8_e4m3fn or float8_e5m2.
        sensitivity: (groups, n), ≥ 0, or None for ones.
        step_dtype: a float dtype; None for the weights'.

    Raises:
        ValueError: a dtype that has no levels.
    """
    levels = level_values(dtype)
    step_dtype = np.dtype(weights.dtype if step_dtype is None else step_dtype)
    results = [
        jax.ShapeDtypeStruct((k,), np.float32),
        jax.ShapeDtypeStruct((), step_dtype),
        jax.ShapeDtypeStruct((weights.shape[1],), np.uint8),
        jax.ShapeDtypeStruct((), lut_dtype(weights)),
    ]
    # The levels travel with the weights: the host function gets arrays only.
    table = np.broadcast_to(levels.astype(np.float32), (weights.shape[0], levels.size))
    args = [weights, table] if sensitivity is None else [weights, table, sensitivity]
    lut, *rest = host_call(_fit_groups, results, *args)
    return QuantizedFit(stored_levels(lut, dtype), *rest)


def stored_levels(levels: Float[Array, "*lut"], dtype: np.typing.DTypeLike) -> Shaped[Array, "*lut"]:
    """Levels as their dtype stores them."""
    narrow = np.dtype(dtype)
    return (levels + ZERO_LEVEL if narrow == np.uint8 else levels).astype(narrow)


def _fit_groups(*arrays: np.ndarray) -> None:
    """Fit every row of a batch, on all cores. Arrays: weights, levels, maybe sensitivity, the fields of the fit."""
    inputs = [a.reshape(-1, a.shape[-1]) for a in arrays[:-4]]
    lut, step, indices, inertia = arrays[-4:]
    lut, indices = (a.reshape(-1, a.shape[-1]) for a in (lut, indices))
    step, inertia = step.reshape(-1), inertia.reshape(-1)
    table = inputs[1][0].astype(np.float64)
    levels = with_middles(table.tobytes())
    info = jnp.finfo(step.dtype)
    form = Format(int(info.nmant) + 1, int(info.minexp), float(info.smallest_normal), float(info.max))

    def fit(rows: slice) -> None:
        weights = np.ascontiguousarray(inputs[0][rows])
        mass = mass_rows(inputs[2][rows] if len(inputs) == 3 else None, len(weights)).astype(np.float64)
        chosen = np.empty((len(weights), lut.shape[1]), np.int64)
        steps, errors = np.empty(len(weights)), np.empty(len(weights))
        if weights.dtype.itemsize == 2 and weights.shape[1] >= LEAST_COUNTED:
            for i in range(len(weights)):
                bits = weights[i].view(np.uint16)
                values, total, sound = count_points(bits, mass[i], *finite_patterns(weights.dtype))
                values = values[None] if sound else np.full((1, 1), np.nan, np.float32)
                fit_rows(values, total[None], levels, form, chosen[i : i + 1], steps[i : i + 1])
        else:
            fit_rows(*sorted_rows(weights, mass), levels, form, chosen, steps)
        lut[rows], step[rows] = table[chosen], steps
        entries = (lut[rows].astype(step.dtype) * step[rows, None]).astype(np.float64)
        wide = weights.astype(np.promote_types(weights.dtype, np.float32), copy=False)
        assign_rows(wide, mass, entries, indices[rows], errors)
        with np.errstate(over="ignore"):  # an inertia too large for its dtype is infinite
            inertia[rows] = errors

    # A search takes about a millisecond whatever the length of a row.
    size = min(max(1, TASK // inputs[0].shape[1]), SEARCHES)
    in_threads(fit, [slice(i, i + size) for i in range(0, step.size, size)])
