"""Front end of the exact solver: the values of a group of weights in ascending order, and the mass at each.

A 16-bit float takes at most 65,536 values, so its bits are counted and nothing is sorted; what depends on a value alone
is computed once per bit pattern and looked up. (NumPy's float16 sort is also plainly wrong on some CPUs.) Wider floats
are sorted.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, no_type_check

import numpy as np

from palettax.clustering.exact import kernel

PATTERNS = 65536
ONES = np.empty(0)
"""Stands for a mass of one at every point: no n-long array of them is made."""


class Points(NamedTuple):
    """The values of n weights, and how much an error at each costs.

    Attributes:
        values: (m,) ascending, float32, or float64 for float64: of 16-bit weights the distinct ones, of wider ones all.
        mass: (m,) float64: the sensitivity that falls on each value, or its count; (0,) for one everywhere.
    """

    values: np.ndarray
    mass: np.ndarray


def points(weights: np.ndarray, sensitivity: np.ndarray | None) -> Points:
    """Put finite weights in order.

    Args:
        weights: (n,) floating, finite, contiguous.
        sensitivity: (n,) real and not negative, or None for ones.
    """
    mass = ONES if sensitivity is None else sensitivity.astype(np.float64)
    if weights.dtype.itemsize == 2:
        return Points(*count_points(weights.view(np.uint16), mass, *finite_patterns(weights.dtype))[:2])
    return Points(*(rows[0] for rows in sorted_rows(weights[None], mass[None])))


def sorted_rows(weights: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every row in ascending order, 16-bit floats as float32, and its mass likewise.

    Args:
        weights: (rows, n), floating.
        mass: (rows, n), real; (rows, 0) for one everywhere. Comes back as float64.
    """
    wide = weights.astype(np.promote_types(weights.dtype, np.float32))
    if mass.shape[1] == 0:
        wide.sort(axis=-1)
        return wide, mass.astype(np.float64, copy=False)
    order = np.argsort(wide, axis=-1)
    wide, mass = np.take_along_axis(wide, order, axis=-1), np.take_along_axis(mass, order, axis=-1)
    del order  # eight bytes a weight
    return wide, mass.astype(np.float64, copy=False)


def distinct_count(weights: np.ndarray) -> int:
    """The number of distinct values of weights (n,); -0 counts as 0, and all NaN as one."""
    finite = np.isfinite(weights)
    others = np.unique(weights[~finite].astype(np.float64)).size
    weights = weights if finite.all() else weights[finite]
    if not weights.size:
        return others
    values = points(np.ascontiguousarray(weights), None).values
    return others + int(np.count_nonzero(np.diff(values)) + 1)


def mass_rows(sensitivity: np.ndarray | None, rows: int) -> np.ndarray:
    """Sensitivities (rows, n) with ones in the rows that are zero everywhere; (rows, 0) for None."""
    if sensitivity is None:
        return np.empty((rows, 0))
    empty = ~(sensitivity != 0).any(axis=1)
    return np.where(empty[:, None], 1, sensitivity) if empty.any() else sensitivity


def is_mass(sensitivity: np.ndarray) -> bool:
    """Whether every entry is a finite number ≥ 0."""
    return bool((sensitivity >= 0).all() and np.isfinite(sensitivity).all())


@cache
def finite_patterns(dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The bit patterns, uint16, of the finite values of a 16-bit float type in ascending order; the values, float32."""
    # Negative floats descend with their bits, the others ascend.
    patterns = np.concatenate([np.arange(0xFFFF, 0x7FFF, -1), np.arange(0x8000)]).astype(np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaNs are among the patterns
        values = patterns.view(dtype).astype(np.float32) + np.float32(0)
    return patterns[np.isfinite(values)], values[np.isfinite(values)]


def all_finite(weights: np.ndarray) -> bool:
    """Whether no weight is NaN or infinite; for 16-bit floats by their exponent bits, ten times faster."""
    if weights.dtype.itemsize != 2:
        return bool(np.isfinite(weights).all())
    exponent = np.array(np.inf, weights.dtype).view(np.uint16)
    return not ((weights.view(np.uint16) & exponent) == exponent).any()


@kernel
@no_type_check
def count_points(bits, sensitivity, patterns, pattern_values):
    """The distinct values of 16-bit floats by their bits, the mass at each, and whether all are finite and ≥ 0.

    Mass that is empty or zero everywhere counts as one everywhere. -0 is 0: the two are neighbours among the patterns.
    """
    sound, weighted = True, False
    for s in sensitivity:
        sound &= 0.0 <= s < np.inf
        weighted |= s > 0.0
    counts = np.zeros(PATTERNS, np.int64)
    for b in bits:
        counts[b] += 1
    mass = np.zeros(PATTERNS if weighted else 0)
    if weighted:
        for i in range(bits.shape[0]):
            mass[bits[i]] += sensitivity[i]
    values, masses = np.empty(patterns.shape[0], np.float32), np.empty(patterns.shape[0])
    m, seen = 0, 0
    for p in range(patterns.shape[0]):
        b = patterns[p]
        if counts[b] == 0:
            continue
        seen += counts[b]
        here = mass[b] if weighted else np.float64(counts[b])
        if m and values[m - 1] == pattern_values[p]:
            masses[m - 1] += here
        else:
            values[m] = pattern_values[p]
            masses[m] = here
            m += 1
    return values[:m], masses[:m], sound and seen == bits.shape[0]
