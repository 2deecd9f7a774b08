"""The exact optimum of many points by way of a few of them.

Take some of the points as nodes, the first and the last among them, and let every other point split its mass between
the nodes on its two sides so that its mean stays. For any lut the squared error of the nodes exceeds that of the points
by at most Σ mass · (node - point)², a constant, and by all of it when both nodes of every split point have the same
nearest entry: min over entries of (v - entry)² is v² less a convex function of v, which lies below its chords. So the
optimum over nodes, less the constant, bounds the optimum over points from below; and once the two nodes beside each of
its boundaries are neighbours among the points too, it is that optimum. Until then, nodes are added beside boundaries.

A few nodes per cluster are enough to start from when they are spread as the entries of a good lut are: by the cube root
of the density (Panter and Dite, "Quantization distortion in pulse-count modulation with nonuniform spacing of levels",
Proceedings of the IRE 39, 1951). Of the points there are then a few linear passes; what searches sees nodes only.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from palettax.clustering.exact import kernel, optimal_path, power_of_two

# Neighbouring boundaries shift together at little cost, the less the more there are: hence nodes by the square of
# k, as far as searching them all pays.
LEAST_NODES, MOST_NODES = 256, 36_000
REACH = 3
PIECES = 8


@kernel
@no_type_check
def take_distinct(values, lut):
    """Fill `lut` with the distinct values if they are at most k, the last repeated; say whether they are."""
    m = 0
    for i in range(values.shape[0]):
        if m == 0 or values[i] > lut[m - 1]:
            if m == lut.shape[0]:
                return False
            lut[m] = values[i] + 0.0  # -0 becomes 0
            m += 1
    lut[m:] = lut[m - 1]
    return True


@kernel
@no_type_check
def fit_points(values, mass, lut):
    """Fill `lut` with the optimal entries for ascending values; returns (probes, whether the optimum is proven).

    An empty `mass` means one everywhere, as does one of zero everywhere. Values that fit into the lut all get an entry.
    Values that are not finite, or mass that is not or is negative, fill the lut with NaN.
    """
    lut[:] = np.nan
    if not (np.isfinite(values[0]) and np.isfinite(values[-1])):
        return 0, False
    for m in mass:
        if not 0.0 <= m < np.inf:
            return 0, False
    if take_distinct(values, lut):
        return 0, True
    values, mass, scale, _ = prepared(values, mass)
    cost, bound, probes = optimum(values, mass, lut)
    for a in range(lut.shape[0]):
        lut[a] *= scale
    return probes, cost - bound <= 1e-9 * cost


@kernel
@no_type_check
def prepared(values, mass):
    """The points that count, in units that keep squares in range: (values, mass, unit of values, unit of mass)."""
    heaviest = 0.0
    for m in mass:
        heaviest = max(heaviest, m)
    heaviest = power_of_two(heaviest)
    if heaviest == 0.0:
        mass, heaviest = mass[:0], 1.0
    else:
        keep = mass / heaviest > 0.0
        if not np.all(keep):
            values, mass = values[keep], mass[keep]
        mass = mass / heaviest
    scale = power_of_two(max(abs(np.float64(values[0])), abs(np.float64(values[-1]))))
    if scale == 0.0 or 1e-60 < scale < 1e60:
        return values, mass, 1.0, heaviest
    scaled = np.empty_like(values)
    for i in range(values.shape[0]):
        scaled[i] = values[i] / scale
    return scaled, mass, scale, heaviest


@kernel
@no_type_check
def optimum(values, mass, lut):
    """Fill `lut` with the optimal k entries; returns (cost, lower bound on every cost, probes).

    Values ascend; each has positive mass, or `mass` is empty and each has mass one.
    """
    if take_distinct(values, lut):
        return 0.0, 0.0, 0
    k = lut.shape[0]
    nodes, penalty = _first_nodes(values, mass, k)
    weight, moment, inside = _gather(values, mass, nodes)
    while nodes.shape[0] <= k:
        nodes, weight, moment, inside = _split(values, mass, nodes, weight, moment, inside, inside)
    # Nodes in units that a double holds exactly: about the median where all values are near it, else about zero.
    first, last, origin = np.float64(values[0]), np.float64(values[-1]), np.float64(values[values.shape[0] // 2])
    if min(first / origin, last / origin) < 0.5 or max(first / origin, last / origin) > 2.0:
        origin = 0.0
    unit = power_of_two(max(abs(first - origin), abs(last - origin)))
    penalty /= unit * unit
    probes = 0
    while True:
        points, loads = _project(values, mass, nodes, weight, moment, origin, unit)
        path, sparse_cost, bound, penalty, tries = optimal_path(points, loads, k, penalty)
        probes += tries
        straddled = np.zeros(inside.shape[0], np.bool_)
        settled = True
        for a in range(1, k):
            boundary = path[a] - 1
            if inside[boundary]:
                settled = False
                straddled[max(boundary - REACH, 0) : boundary + REACH + 1] = True
        if settled:
            break
        nodes, weight, moment, inside = _split(values, mass, nodes, weight, moment, inside, straddled & inside)
    cost = _means(values, mass, nodes, path, lut)
    return cost, cost - (sparse_cost - bound) * unit * unit, probes


@kernel
@no_type_check
def _first_nodes(values, mass, k):
    """Positions of the first nodes, ascending in value, and Panter and Dite's slope of the cost: (∫ f^⅓)³ / (6 k³)."""
    n = values.shape[0]
    wanted = max(LEAST_NODES, min((16 + 2 * k) * k, MOST_NODES), 4 * k)
    blocks = min(4 * wanted, n - 1)
    share = np.empty(blocks)
    total = 0.0
    for b in range(blocks):
        left, right = b * (n - 1) // blocks, (b + 1) * (n - 1) // blocks
        weight = np.float64(right - left) if mass.shape[0] == 0 else np.sum(mass[left + 1 : right + 1])
        gap = np.float64(values[right]) - np.float64(values[left])
        share[b] = np.cbrt(weight * gap * gap)
        total += share[b]
    penalty = (total / k) ** 3 / 6.0
    positions = np.empty(min(n, wanted + blocks + 2), np.int64)
    positions[0] = 0
    m = 1
    if n <= 2 * wanted:
        positions = np.empty(n, np.int64)
        positions[0] = 0
        for i in range(1, n):
            if values[i] > values[positions[m - 1]]:
                positions[m] = i
                m += 1
        positions[m - 1] = n - 1  # the last of its value
        return positions[:m], penalty
    passed = 0.0
    for b in range(blocks):
        left, right = b * (n - 1) // blocks, (b + 1) * (n - 1) // blocks
        before = int(passed / total * wanted)
        passed += share[b]
        count = min(int(passed / total * wanted) - before, right - left)
        for c in range(1, count + 1):
            i = left + c * (right - left) // count
            if values[i] > values[positions[m - 1]]:
                positions[m] = i
                m += 1
    m += values[n - 1] > values[positions[m - 1]]
    positions[m - 1] = n - 1  # the last of its value
    return positions[:m], penalty


@kernel
@no_type_check
def _between(values, mass, left, right):
    """Of the points between two nodes: mass, first moment about the left node, whether any has a value of its own."""
    low, high = values[left], values[right]
    origin = np.float64(low)
    weight, moment = 0.0, 0.0
    inside = False
    for i in range(left + 1, right):
        here = mass[i] if mass.shape[0] else 1.0
        weight += here
        moment += here * (np.float64(values[i]) - origin)
        inside |= low < values[i] < high
    return weight, moment, inside


@kernel
@no_type_check
def _gather(values, mass, nodes):
    """`_between` for every pair of neighbouring nodes."""
    m = nodes.shape[0] - 1
    weight, moment, inside = np.empty(m), np.empty(m), np.empty(m, np.bool_)
    for b in range(m):
        weight[b], moment[b], inside[b] = _between(values, mass, nodes[b], nodes[b + 1])
    return weight, moment, inside


@kernel
@no_type_check
def _split(values, mass, nodes, weight, moment, inside, chosen):
    """Add nodes between the chosen pairs of neighbours, each of which has a point with a value of its own."""
    m = nodes.shape[0]
    size = m + np.sum(chosen) * (PIECES - 1)
    new = np.empty(size, np.int64)
    new_weight, new_moment, new_inside = np.empty(size - 1), np.empty(size - 1), np.empty(size - 1, np.bool_)
    new[0] = nodes[0]
    count = 1
    for b in range(m - 1):
        left, right = nodes[b], nodes[b + 1]
        if not chosen[b]:
            new[count] = right
            new_weight[count - 1], new_moment[count - 1], new_inside[count - 1] = weight[b], moment[b], inside[b]
            count += 1
            continue
        first = left + np.searchsorted(values[left:right], values[left], side="right")
        last = left + np.searchsorted(values[left:right], values[right], side="left") - 1
        pieces = min(PIECES - 1, last - first + 1)
        for p in range(pieces):
            i = first + p * (last - first) // max(pieces - 1, 1)
            if values[i] > values[new[count - 1]]:
                new[count] = i
                count += 1
        new[count] = right
        count += 1
        for c in range(count - 1, 0, -1):
            new_weight[c - 1], new_moment[c - 1], new_inside[c - 1] = _between(values, mass, new[c - 1], new[c])
            if new[c - 1] == left:
                break
    return new[:count], new_weight[: count - 1], new_moment[: count - 1], new_inside[: count - 1]


@kernel
@no_type_check
def _project(values, mass, nodes, weight, moment, origin, unit):
    """The nodes in units about an origin, and the mass that each carries: its own and its share of its neighbours'."""
    m = nodes.shape[0]
    points, loads = np.empty(m), np.empty(m)
    for b in range(m):
        points[b] = (np.float64(values[nodes[b]]) - origin) / unit
        loads[b] = mass[nodes[b]] if mass.shape[0] else 1.0
    for b in range(m - 1):
        share = min(moment[b] / (np.float64(values[nodes[b + 1]]) - np.float64(values[nodes[b]])), weight[b])
        loads[b] += weight[b] - share
        loads[b + 1] += share
    return points, loads


@kernel
@no_type_check
def _means(values, mass, nodes, path, lut):
    """Fill `lut` with the mean of the points of each cluster of nodes; returns their squared error, from the points."""
    k = path.shape[0] - 1
    total = 0.0
    start = 0
    for a in range(k):
        stop = values.shape[0]
        if a < k - 1:
            # Points of the last node's value are its own.
            node = nodes[path[a + 1] - 1]
            stop = node + np.searchsorted(values[node : nodes[path[a + 1]]], values[node], side="right")
        origin = np.float64(values[start])
        weight, offset = 0.0, 0.0
        for i in range(start, stop):
            here = mass[i] if mass.shape[0] else 1.0
            weight += here
            offset += here * (np.float64(values[i]) - origin)
        lut[a] = origin + offset / weight
        for i in range(start, stop):
            here = mass[i] if mass.shape[0] else 1.0
            total += here * (np.float64(values[i]) - lut[a]) ** 2
        start = stop
    return total
