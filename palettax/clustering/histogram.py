"""Front end of the host solver: the sorted distinct values of a group of weights, and the mass at each.

A 16-bit float takes at most 65,536 values, so counting them needs no sort: the bits of a weight, remapped to ascend
with its value, are its bin. (NumPy's float16 sort is also plainly wrong on some CPUs.) Wider floats are sorted.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, no_type_check

import numpy as np

from palettax.clustering.exact import kernel


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
        weights: (n,) floating, finite.
        sensitivity: (n,) floating and not negative, or None for ones.
    """
    if weights.dtype.itemsize == 2:
        counts, mass = _count_bins(bins(weights), _ones(sensitivity))
        occupied = np.flatnonzero(counts)
        values, mass = bin_values(weights.dtype)[occupied], mass[occupied]
    elif sensitivity is None:
        values, mass = np.sort(weights).astype(np.float64), _ones(None)
    else:
        order = np.argsort(weights, kind="stable")
        values, mass = weights[order].astype(np.float64), sensitivity[order].astype(np.float64)
    return Histogram(*_merge_equal(values, mass))


def _ones(sensitivity: np.ndarray | None) -> np.ndarray:
    """An empty array stands for unit weights: no n-long array of ones is made."""
    return np.empty(0) if sensitivity is None else sensitivity.astype(np.float64)


def bins(weights: np.ndarray) -> np.ndarray:
    """The bin, uint16, of 16-bit floats: their bits, remapped to ascend with the value."""
    bits = weights.view(np.uint16)
    # Negative floats descend with their bits and carry the top bit; the others follow them.
    return bits ^ np.where(bits >> 15, np.uint16(0xFFFF), np.uint16(0x8000))


@cache
def bin_values(dtype: np.dtype) -> np.ndarray:
    """The value, float64, of every bin of a 16-bit float type; NaN and infinities at both ends."""
    bins = np.arange(65536, dtype=np.uint16)
    bits = bins ^ np.where(bins >> 15, np.uint16(0x8000), np.uint16(0xFFFF))
    with np.errstate(invalid="ignore"):  # signalling NaNs are among the bit patterns
        return np.asarray(bits.view(dtype), np.float64)


@kernel
@no_type_check
def _count_bins(bins, sensitivity):
    counts = np.zeros(65536, np.int64)
    for b in bins:
        counts[b] += 1
    if sensitivity.shape[0] == 0:
        return counts, counts.astype(np.float64)
    mass = np.zeros(65536)
    for i in range(bins.shape[0]):
        mass[bins[i]] += sensitivity[i]
    return counts, mass


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
