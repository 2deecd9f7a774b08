"""The search for the step of a table of narrow entries, and with it for their levels.

Steps are scanned from large to small, until cutting off the extremes alone costs more than the best so far. From a step
to the next, entries hardly move: most steps look at levels near the last ones only. The levels found have a step of
their own, by least squares; from the lowest minima of the scan, levels and step are alternated until neither improves,
and the levels of the best step are searched among all of them.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np

from palettax.clustering.entries import rounded
from palettax.clustering.exact import kernel, power_of_two
from palettax.clustering.level_path import Format, choose, choose_among, error, rows_below, summed
from palettax.clustering.nodes import prepared

# Steps an octave in the scan, those of them that all levels are searched for, and its length.
STEPS, WHOLE, OCTAVES = 96, 4, 16
# Levels on either side of the expected one that a search near a path looks at, and how many minima are descended from.
RADIUS, MINIMA = 3, 4
# The scan splits the points at multiples of a fraction of a step: an error of second order.
PLACES = 4096


@kernel
@no_type_check
def fit_rows(values, mass, levels, form, chosen, steps):
    """Fit every row of ascending values: fills the numbers of its levels and its step.

    The step is NaN where a value or a mass is not finite or a mass is negative.
    """
    for row in range(values.shape[0]):
        sound = np.isfinite(values[row, 0]) and np.isfinite(values[row, -1])
        for m in mass[row]:
            sound &= 0.0 <= m < np.inf
        chosen[row] = levels.values.shape[0] // 2
        steps[row] = _fit_row(values[row], mass[row], levels, form, chosen[row]) if sound else np.nan


@kernel
@no_type_check
def _fit_row(values, mass, levels, form, chosen):
    """The step for weighted points in ascending order; fills `chosen` with the levels' numbers."""
    values, mass = _distinct(values, mass)
    most = min(chosen.shape[0], levels.values.shape[0])
    if values.shape[0] <= most:
        step, exact = _fit_few(values, mass, levels, form, chosen)
        if exact:
            return step
    zero = levels.values.shape[0] // 2
    if np.max(np.abs(values[mass > 0.0])) < form.smallest * levels.values[zero + 1] / 2.0:
        chosen[:] = zero
        return form.smallest
    values, mass, scale, _ = prepared(values, mass)
    exponent = form.least_exponent - (math.frexp(scale)[1] - 1)
    form = Format(form.digits, exponent, form.smallest / scale, form.largest / scale)
    sums = summed(values, mass)
    if values.shape[0] <= most:
        starts = np.empty(1)
        starts[0], _ = _fit_few(values, mass, levels, form, chosen)
        paths = chosen.copy().reshape(1, -1)
    else:
        starts, paths = _scan(values, sums, levels, form, chosen.shape[0])
    best, least = starts[0], np.inf
    for i in range(starts.shape[0]):
        step, cost = _descend(values, sums, levels, form, starts[i], paths[i], np.int64(RADIUS))
        if cost < least:
            best, least = step, cost
    step, _ = _descend(values, sums, levels, form, best, chosen, levels.values.shape[0])
    return step * scale


@kernel
@no_type_check
def _distinct(values, mass):
    """Sorted values in float64, equal ones joined, and the mass at each; mass of zero everywhere counts as one."""
    heaviest = power_of_two(np.max(mass)) if mass.shape[0] else 0.0
    m = 0
    joined, total = np.empty(values.shape[0]), np.empty(values.shape[0])
    for i in range(values.shape[0]):
        here = mass[i] / heaviest if heaviest > 0.0 else 1.0
        if m and values[i] == joined[m - 1]:
            total[m - 1] += here
        else:
            joined[m] = values[i] + 0.0
            total[m] = here
            m += 1
    return joined[:m], total[:m]


@kernel
@no_type_check
def _normal(step, form):
    return min(max(rounded(step, form.digits, form.least_exponent), form.smallest), form.largest)


@kernel
@no_type_check
def _fit_few(values, mass, levels, form, chosen):
    """The step for no more points than entries, and whether every point is met: the farthest is on a level, or nearly.

    Fills `chosen` with the level nearest to each point, the last repeated.
    """
    m = values.shape[0]
    reach = max(-values[0], values[m - 1])
    best, least = 1.0, np.inf
    hits = np.empty(m, np.int64)
    table = levels.values
    # Whole levels first, from the smallest; then the fractions of a float8.
    for level in np.concatenate((table[table >= 1.0], table[(table > 0.0) & (table < 1.0)][::-1])):
        guess = _normal(reach / level, form) if reach > 0.0 else 1.0
        place = math.ldexp(1.0, math.frexp(guess)[1] - form.digits)
        for ulps in (0, -1, 1, -2, 2):
            step = _normal(guess + ulps * place, form)
            cost, exact = 0.0, True
            for i in range(m):
                hits[i] = _nearest(values[i] / step, table)
                miss = values[i] - rounded(table[hits[i]] * step, form.digits, form.least_exponent)
                cost += mass[i] * miss * miss
                exact &= miss == 0.0
                if cost > least:
                    break
            if exact or cost < least:
                best, least = step, cost
                for i in range(chosen.shape[0]):  # not by slices: see `_splice` of the exact solver
                    chosen[i] = hits[min(i, m - 1)]
            if exact:
                return step, True
    return best, False


@kernel
@no_type_check
def _nearest(value, levels):
    a = min(np.searchsorted(levels, value), levels.shape[0] - 1)
    return a - 1 if a > 0 and value - levels[a - 1] < levels[a] - value else a


@kernel
@no_type_check
def _scan(values, sums, levels, form, k):
    """The steps, by least squares, and the paths at the lowest minima of a scan."""
    n = values.shape[0]
    largest = levels.values[-1]
    start = min(2.0 * max(max(-values[0], values[n - 1]) / largest, form.smallest), form.largest)
    costs, steps = np.empty(OCTAVES * STEPS), np.empty(OCTAVES * STEPS)
    paths = np.empty((OCTAVES * STEPS, k), np.int64)
    mass, moment = np.empty(levels.middles.shape[0]), np.empty(levels.middles.shape[0])
    places = np.linspace(-largest, largest, PLACES + 1)
    rows = np.empty(0, np.int64)
    least = np.inf
    tried, since = 0, 0
    last = start
    while tried < costs.shape[0]:
        step = start * 2.0 ** (-tried / STEPS)
        # What lies beyond the farthest entries costs this at least.
        edge = step * largest
        cut = error(sums, n, edge) - error(sums, np.searchsorted(values, edge), edge)
        cut += error(sums, np.searchsorted(values, -edge), -edge) - error(sums, 0, -edge)
        if cut > least or step < form.smallest:
            break
        path = paths[tried]
        if tried % (STEPS // WHOLE) == 0:
            since = tried
            rows = rows_below(values, places * step)
            radius = levels.values.shape[0]
        else:
            radius = RADIUS
            _follow(levels.values, paths[tried - 1], last / step, path)
        last = step
        scale = 2.0 ** ((since - tried) / STEPS) * PLACES / (2.0 * largest)
        for u in range(mass.shape[0]):
            row = rows[int(levels.middles[u] * scale + (PLACES // 2 + 0.5))]
            mass[u], moment[u] = sums[row, 0], sums[row, 1]
        costs[tried], steps[tried] = choose_among(
            values, sums, levels, levels.values * step, mass, moment, form.largest, path, radius
        )
        least = min(least, costs[tried])
        tried += 1
    minima = _local_minima(costs[:tried])
    around = np.empty(MINIMA, np.int64)
    found = 0
    while found < MINIMA and np.min(minima) < np.inf:
        around[found] = np.argmin(minima)
        minima[around[found]] = np.inf
        found += 1
    return steps[around[:found]], paths[around[:found]]


@kernel
@no_type_check
def _local_minima(costs):
    """The costs below both neighbours; infinity in place of the others."""
    minima = costs.copy()
    for i in range(costs.shape[0]):
        if costs[max(i - 1, 0)] < costs[i] or costs[min(i + 1, costs.shape[0] - 1)] < costs[i]:
            minima[i] = np.inf
    return minima


@kernel
@no_type_check
def _follow(levels, path, growth, expected):
    """The levels nearest to those of a path whose step was larger."""
    a = 0
    for layer in range(path.shape[0]):
        target = levels[path[layer]] * growth
        while a + 1 < levels.shape[0] and levels[a] + levels[a + 1] < 2.0 * target:
            a += 1
        expected[layer] = a


@kernel
@no_type_check
def _descend(values, sums, levels, form, step, chosen, radius):
    """Alternate levels and least-squares step while the inertia falls; returns (step, inertia) and fills `chosen`."""
    best, least = step, np.inf
    path = chosen.copy()
    for _ in range(4):
        step = _normal(step, form)
        cost, better = choose(values, sums, levels, form, step, path, radius)
        if cost >= least:
            break
        best, least, step = step, cost, better
        for i in range(path.shape[0]):
            chosen[i] = path[i]
    return best, least
