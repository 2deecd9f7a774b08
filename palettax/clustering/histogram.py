"""Front end of the host solver: the sorted distinct values of a group of weights, and the mass at each.

A 16-bit float takes at most 65,536 values, so its bits are counted and nothing is sorted; what depends on a value alone
is computed once per bit pattern and looked up. (NumPy's float16 sort is also plainly wrong on some CPUs.) Wider floats
are sorted.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, no_type_check

import numpy as np

from palettax.clustering.exact import kernel, power_of_two

PATTERNS = 65536


class Histogram(NamedTuple):
    """The distinct values of n weights.

    Attributes:
        values: (m,) float64, strictly ascending; -0 counts as 0.
        mass: (m,) float64: the sensitivity that falls on each value, its count when there is no sensitivity.
    """

    values: np.ndarray
    mass: np.ndarray


def histogram(weights: np.ndarray, sensitivity: np.ndarray | None) -> Histogram:
    """Count the distinct values of finite weights.

    Args:
        weights: (n,) floating, finite, contiguous.
        sensitivity: (n,) floating and not negative, or None for ones.
    """
    ones = np.empty(0)  # stands for unit weights: no n-long array of them is made
    if weights.dtype.itemsize == 2:
        bits = weights.view(np.uint16)
        counts, mass = _count_bits(bits, ones if sensitivity is None else sensitivity.astype(np.float64))
        patterns, values = finite_patterns(weights.dtype)
        occupied = counts[patterns] > 0
        return Histogram(*_merge_equal(values[occupied], mass[patterns[occupied]]))
    if sensitivity is None:
        return Histogram(*_merge_equal(np.sort(weights).astype(np.float64), ones))
    order = np.argsort(weights, kind="stable")
    return Histogram(*_merge_equal(weights[order].astype(np.float64), sensitivity[order].astype(np.float64)))


def weighted_points(weights: np.ndarray, sensitivity: np.ndarray | None) -> tuple[Histogram, float]:
    """The histogram with masses brought to at most about one, and the power of two that they were divided by.

    A sensitivity that is zero everywhere counts as one everywhere.
    """
    unit = 1.0
    if sensitivity is not None:
        sensitivity = sensitivity.astype(np.float64)
        unit = power_of_two(sensitivity) if sensitivity.any() else 0.0
        sensitivity = sensitivity / unit if unit else None
    values, mass = histogram(weights, sensitivity)
    heaviest = power_of_two(mass)
    return Histogram(values, mass / heaviest), heaviest * (unit or 1.0)


def is_mass(sensitivity: np.ndarray) -> bool:
    """Whether every entry is a finite number ≥ 0."""
    return bool((sensitivity >= 0).all() and np.isfinite(sensitivity).all())


@cache
def finite_patterns(dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The bit patterns, uint16, of the finite values of a 16-bit float type in ascending order; the values, float64."""
    # Negative floats descend with their bits, the others ascend.
    patterns = np.concatenate([np.arange(0xFFFF, 0x7FFF, -1), np.arange(0x8000)]).astype(np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaNs are among the patterns
        values = patterns.view(dtype).astype(np.float64)
    return patterns[np.isfinite(values)], values[np.isfinite(values)]


def all_finite(weights: np.ndarray) -> bool:
    """Whether no weight is NaN or infinite; for 16-bit floats by their exponent bits, ten times faster."""
    if weights.dtype.itemsize != 2:
        return bool(np.isfinite(weights).all())
    exponent = np.array(np.inf, weights.dtype).view(np.uint16)
    return not ((weights.view(np.uint16) & exponent) == exponent).any()


@kernel
@no_type_check
def _count_bits(bits, sensitivity):
    """How often each bit pattern occurs, and the sensitivity that falls on it; empty `sensitivity` means ones."""
    counts = np.zeros(PATTERNS, np.int64)
    for b in bits:
        counts[b] += 1
    if sensitivity.shape[0] == 0:
        return counts, counts.astype(np.float64)
    mass = np.zeros(PATTERNS)
    for i in range(bits.shape[0]):
        mass[bits[i]] += sensitivity[i]
    return counts, mass


@kernel
@no_type_check
def look_up_bits(bits, table, out):
    """`out[i] = table[bits[i]]`."""
    for i in range(bits.shape[0]):
        out[i] = table[bits[i]]


@kernel
@no_type_check
def _merge_equal(values, mass):
    """Join runs of equal values; empty `mass` means ones."""
    m = 0
    merged = np.empty_like(values)
    total = np.empty_like(values)
    for i in range(values.shape[0]):
        here = mass[i] if mass.shape[0] else 1.0
        if m and values[i] == merged[m - 1]:
            total[m - 1] += here
        else:
            merged[m] = values[i] + 0.0
            total[m] = here
            m += 1
    return merged[:m].copy(), total[:m].copy()
