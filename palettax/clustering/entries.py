"""Entries and weights on the host: rounding of the ones, nearest of them to the others."""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np

from palettax.clustering.exact import kernel, two_sum

_two_sum = kernel(two_sum)


@kernel
@no_type_check
def rounded(value, digits, least_exponent):
    """A double rounded, half to even, to a float type of so many binary digits and least exponent of a normal."""
    _, exponent = math.frexp(value)
    unit = math.ldexp(1.0, max(exponent - 1, least_exponent) - digits + 1)
    return np.rint(value / unit) * unit if np.isfinite(value) else value


@kernel
@no_type_check
def thresholds_of(lut):
    """What `assign` compares weights with, for an ascending lut of k entries.

    Returns the largest double that is no farther from each entry than from the next, padded with infinities to one less
    than a power of two, and the first of the entries equal to each.
    """
    k = lut.shape[0]
    size = 1
    while size < k:
        size *= 2
    thresholds = np.full(size - 1, np.inf)
    first = np.zeros(size, np.uint8)
    for a in range(1, k):
        total, error = _two_sum(lut[a - 1], lut[a])
        middle = total / 2
        if np.isinf(total):  # halves of such numbers are exact
            middle, error = _two_sum(lut[a - 1] / 2, lut[a] / 2)
        else:
            error += total - 2 * middle  # where a half is too small for all of its digits
        thresholds[a - 1] = np.nextafter(middle, -np.inf) if error < 0.0 else middle
        first[a] = first[a - 1] if lut[a] == lut[a - 1] else a
    return thresholds, first


@kernel
@no_type_check
def slot_of(value, thresholds):
    """How many thresholds are below a value; by bisection without branches."""
    low = 0
    step = (thresholds.shape[0] + 1) // 2
    while step > 0:
        low += step * (thresholds[low + step - 1] < value)
        step //= 2
    return low


@kernel
@no_type_check
def assign_rows(weights, mass, luts, indices, inertia):
    """The nearest entry, of an ascending lut, of every weight of every row; fills `indices` and `inertia`.

    Mass that is empty counts as one. Of equal entries the first is taken, on a threshold the smaller one.
    """
    for row in range(weights.shape[0]):
        lut = luts[row]
        thresholds, first = thresholds_of(lut)
        total = 0.0
        for i in range(weights.shape[1]):
            value = np.float64(weights[row, i])
            slot = first[slot_of(value, thresholds)]
            indices[row, i] = slot
            total += (mass[row, i] if mass.shape[1] else 1.0) * (value - lut[slot]) ** 2
        inertia[row] = total


@kernel
@no_type_check
def round_entries(lut, digits, least_exponent):
    """`rounded`, in place."""
    for a in range(lut.shape[0]):
        lut[a] = rounded(lut[a], digits, least_exponent)
