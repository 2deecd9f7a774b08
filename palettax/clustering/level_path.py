"""The levels of least squared error for a given step.

k ascending levels are a path whose link (a, b) moves the points between two entries, split at their midpoint, to the
nearer one. With S and M the sums of mass · value and of mass of all points up to the midpoint, a link costs
(b - a) (2 S - (a + b) M), so a step needs the sums at the midpoints only. The cost is concave Monge: the best origin of
a link rises with its end and with the number of links before it, and all k layers together take O(levels²) links
(Knuth; Yao).

Yao, "Efficient dynamic programming using quadrangle inequalities", STOC 1980. Wu, "Optimal quantization by matrix
searching", Journal of Algorithms 12, 1991.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, no_type_check

import numpy as np

from palettax.clustering.entries import rounded
from palettax.clustering.exact import kernel


class Levels(NamedTuple):
    """The numbers that a narrow dtype holds, and the places where the points between two of them split."""

    values: np.ndarray  # (levels,) ascending
    middles: np.ndarray  # the distinct midpoints of two levels, ascending
    middle: np.ndarray  # (levels, levels): which of them lies between two levels


class Format(NamedTuple):
    """A float type: binary digits, least exponent of a normal number, smallest normal and largest number."""

    digits: int
    least_exponent: int
    smallest: float
    largest: float


@cache
def with_middles(levels: bytes) -> Levels:
    """Levels, float64, with their midpoints."""
    values = np.frombuffer(levels)
    middles, middle = np.unique((values[:, None] + values) / 2, return_inverse=True)
    return Levels(values, middles, middle.reshape(values.size, -1).astype(np.int32))


@kernel
@no_type_check
def summed(values, mass):
    """Row i: Σ mass · value^(0, 1, 2) of the points before i, less that of the negative ones.

    Summed from zero outwards, so that sums over small values are not differences of large ones.
    """
    n = values.shape[0]
    sums = np.zeros((n + 1, 3))
    zero = np.searchsorted(values, 0.0)
    for i in range(zero, n):
        term = mass[i]
        for column in range(3):
            sums[i + 1, column] = sums[i, column] + term
            term *= values[i]
    for i in range(zero - 1, -1, -1):
        term = mass[i]
        for column in range(3):
            sums[i, column] = sums[i + 1, column] - term
            term *= values[i]
    return sums


@kernel
@no_type_check
def error(sums, row, entry):
    """Σ mass · (value - entry)² of the points before a row."""
    return sums[row, 2] - 2.0 * entry * sums[row, 1] + entry * entry * sums[row, 0]


@kernel
@no_type_check
def rows_below(values, places):
    """How many values are at most each of the ascending places; each search gallops from where the last one ended."""
    n = values.shape[0]
    below = np.empty(places.shape[0], np.int64)
    row = 0
    for u in range(places.shape[0]):
        stride = 1
        while row + stride <= n and values[row + stride - 1] <= places[u]:
            row += stride
            stride *= 2
        end = min(row + stride, n + 1)
        while row + 1 < end:
            half = (row + end) // 2
            if values[half - 1] <= places[u]:
                row = half
            else:
                end = half
        below[u] = row
    return below


@kernel
@no_type_check
def entries_of(levels, step, form):
    """`levels * step` as a float type computes it, without overflow."""
    entries = np.empty(levels.shape[0])
    for a in range(levels.shape[0]):
        entries[a] = rounded(levels[a] * step, form.digits, form.least_exponent)
    return entries


@kernel
@no_type_check
def choose(values, sums, levels, form, step, chosen, radius):
    """The levels of least inertia for a step; fills `chosen` and returns the inertia and the best step for them.

    Only levels within a radius of the ones in `chosen` are looked at. Levels that no point is nearest to are left out,
    and the last is repeated in their stead.
    """
    entries = entries_of(levels.values, step, form)
    below = rows_below(values, levels.middles * step)
    return choose_among(values, sums, levels, entries, sums[below, 0], sums[below, 1], form.largest, chosen, radius)


@kernel
@no_type_check
def choose_among(values, sums, levels, entries, mass, moment, limit, chosen, radius):
    """`choose` for given entries, of which those beyond a limit are out, and given sums up to the midpoints."""
    n = values.shape[0]
    first, stop = np.searchsorted(entries, -limit), np.searchsorted(entries, limit, "right")
    k = min(chosen.shape[0], stop - first)
    # One entry beyond the extremes on either side is enough.
    bottom = min(max(np.searchsorted(entries, values[0], "right") - 1, first), stop - 1)
    top = max(min(np.searchsorted(entries, values[n - 1]) + 1, stop), min(bottom + k, stop))
    bottom = min(bottom, top - k)
    low, high = np.empty(k, np.int64), np.empty(k, np.int64)
    expected = bottom - 1
    for layer in range(k):
        expected = min(max(chosen[layer], expected + 1), top - k + layer)
        low[layer] = max(expected - radius, bottom + layer)
        high[layer] = min(expected + radius, top - k + layer)
    least = _shortest_path(entries, sums, mass, moment, levels.middle, low, high, radius >= top - bottom, chosen)

    product, square = 0.0, 0.0
    used = 0
    start_mass, start_moment = sums[0, 0], sums[0, 1]
    for layer in range(k):
        a = chosen[layer]
        if layer == k - 1:
            end_mass, end_moment = sums[n, 0], sums[n, 1]
        else:
            u = levels.middle[a, chosen[layer + 1]]
            end_mass, end_moment = mass[u], moment[u]
        if end_mass > start_mass:
            level = levels.values[a]
            product += level * (end_moment - start_moment)
            square += level * level * (end_mass - start_mass)
            chosen[used] = a
            used += 1
        start_mass, start_moment = end_mass, end_moment
    chosen[used:] = chosen[used - 1]
    return least, product / square if product > 0.0 else entries[-1] / levels.values[-1]


@kernel
@no_type_check
def _shortest_path(entries, sums, mass, moment, middle, low, high, whole, path):
    """Fill `path` with the levels of a best path, of which each layer has a range, and return its cost."""
    k, n = low.shape[0], sums.shape[0] - 1
    span = np.max(high - low) + 1
    cost, before = np.empty(span), np.empty(span)
    origin = np.empty((k, span), np.int32)
    origin[0] = low[0]
    for b in range(low[0], high[0] + 1):
        cost[b - low[0]] = -error(sums, 0, entries[b])
    for layer in range(1, k):
        cost, before = before, cost
        bottom, last = low[layer - 1], high[layer - 1]
        for b in range(high[layer], low[layer] - 1, -1):
            first = max(origin[layer - 1, min(b, high[layer - 1]) - bottom], bottom) if whole else bottom
            least = np.inf
            best = first
            entry, to = entries[b], middle[b]
            for a in range(first, min(last, b - 1) + 1):
                u = to[a]
                total = before[a - bottom] + (entry - entries[a]) * (2.0 * moment[u] - (entry + entries[a]) * mass[u])
                if total < least:
                    least = total
                    best = a
            cost[b - low[layer]] = least
            origin[layer, b - low[layer]] = best
            last = best
    least = np.inf
    end = low[k - 1]
    for b in range(low[k - 1], high[k - 1] + 1):
        total = cost[b - low[k - 1]] + error(sums, n, entries[b])
        if total < least:
            least = total
            end = b
    for layer in range(k - 1, -1, -1):
        path[layer] = end
        end = origin[layer, end - low[layer]]
    return least
