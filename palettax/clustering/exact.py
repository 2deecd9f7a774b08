"""Exact weighted k-means in one dimension, in time O(n log n) per Lagrangian probe and memory O(n) whatever k is.

Optimal clusters of sorted points are intervals, so a clustering is a path 0 = b₀ < b₁ < … < b_k = n whose link (i, j)
costs the squared error of the points i..j-1 about their mean. That cost is concave Monge, hence the cost C(k) of the
best k-link path is convex in k and

    C(k) = max_λ  [ min over paths of any length of (cost + λ · links) - λ k ].

A probe solves the inner problem with a monotone queue. The outer maximum takes a few probes; where C is linear around k
several path lengths tie, and a k-link path is spliced from a shorter and a longer optimal one. The maximum is a lower
bound for every clustering; less what rounding may have added, it says how good an answer is proven to be.

Grønlund, Larsen, Mathiasen, Nielsen, Schneider, Song, "Fast exact k-means, k-medians and Bregman divergence clustering
in 1D", arXiv 1701.07204, 2017. Aggarwal, Schieber, Tokuyama, "Finding a minimum-weight k-link path in graphs with the
concave Monge property and applications", Discrete & Computational Geometry 12, 1994.
"""

from __future__ import annotations

import math
from typing import Any, no_type_check

import numba as nb
import numpy as np
from numba import njit
from numba.extending import intrinsic

# Kernels hold no GIL, so groups run on all cores from plain Python threads. Numba compiles the bare function: it can
# take no type-checking wrapper.
kernel: Any = njit(cache=True, nogil=True, error_model="numpy")
inlined: Any = njit(cache=True, nogil=True, error_model="numpy", forceinline=True)

MAX_PROBES = 64


@kernel
@no_type_check
def power_of_two(value):
    """The power of two at or below a number ≥ 0; 0 for 0. Division by it is exact."""
    return math.ldexp(1.0, math.frexp(value)[1] - 1) if value > 0.0 else 0.0


@no_type_check
def two_sum(a, b):
    """The rounded sum of two floats, or arrays of them, and its exact rounding error (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


_two_sum = kernel(two_sum)


@intrinsic
@no_type_check
def _fused_multiply_add(typing_context, a, b, c):
    """A · b + c, rounded once."""
    return nb.float64(nb.float64, nb.float64, nb.float64), lambda context, builder, signature, args: builder.fma(*args)


@kernel
@no_type_check
def _two_product(a, b):
    """The rounded product of two doubles and its exact rounding error."""
    p = a * b
    return p, _fused_multiply_add(a, b, -p)


@kernel
@no_type_check
def _prefix_sums(values, mass):
    """Row i: Σ w, Σ w v and Σ w v² over the first i points, each as a high and a low double.

    In plain doubles the cost of a link cancels to nothing once its points are close together beside their mean.
    """
    n = values.shape[0]
    sums = np.zeros((n + 1, 6))
    for i in range(n):
        first, first_low = _two_product(mass[i], values[i])
        second, second_low = _two_product(first, values[i])
        second_low += first_low * values[i]
        for column, high, low in ((0, mass[i], 0.0), (2, first, first_low), (4, second, second_low)):
            total, error = _two_sum(sums[i, column], high)
            low += error + sums[i, column + 1]
            total, low = _two_sum(total, low)
            sums[i + 1, column] = total
            sums[i + 1, column + 1] = low
    return sums


@kernel
@no_type_check
def _between(sums, i, j, column):
    """A prefix sum's share of the points i..j-1, as a high and a low double."""
    high, low = _two_sum(sums[j, column], -sums[i, column])
    return _two_sum(high, low + (sums[j, column + 1] - sums[i, column + 1]))


@kernel
@no_type_check
def _link_parts(sums, i, j):
    """Squared error of the points i..j-1 about their mean m, in three parts of falling size that add up to it.

    (Q - m S) - m r - r²/W with the residue r = S - m W.
    """
    mass, mass_low = _between(sums, i, j, 0)
    first, first_low = _between(sums, i, j, 2)
    second, second_low = _between(sums, i, j, 4)
    mean = first / mass
    p, p_low = _two_product(mean, mass)
    residue = (first - p) + (first_low - p_low - mean * mass_low)
    p, p_low = _two_product(mean, first)
    return second, -p, (second_low - p_low - mean * first_low) - mean * residue - residue * residue / mass


@kernel
@no_type_check
def _link_cost(sums, i, j):
    """Squared error of the points i..j-1 about their mean."""
    second, product, rest = _link_parts(sums, i, j)
    return max((second + product) + rest, 0.0)


@kernel
@no_type_check
def _exact_link_cost(sums, i, j):
    """`_link_cost` as a high and a low double."""
    second, product, rest = _link_parts(sums, i, j)
    cost, low = _two_sum(second, product)
    cost, low = _two_sum(cost, low + rest)
    return (cost, low) if cost > 0.0 else (0.0, 0.0)


@inlined
@no_type_check
def _advantage(sums, cost, rival, j, end):
    """How much longer the way to an end by the last link from `rival` is than by that from `j`."""
    theirs, ours = _link_cost(sums, rival, end), _link_cost(sums, j, end)
    gain = (cost[rival] - cost[j]) + (theirs - ours)
    if abs(gain) > 2.0**-48 * (theirs + ours):
        return gain
    # What tells two long links apart may be far below an ulp of either.
    theirs, theirs_low = _exact_link_cost(sums, rival, end)
    ours, ours_low = _exact_link_cost(sums, j, end)
    return (cost[rival] - cost[j]) + ((theirs - ours) + (theirs_low - ours_low))


@kernel
@no_type_check
def _shortest_path(sums, penalty, cost, parent, heads, starts):
    """Min over paths 0 → n of Σ (link + penalty); fills `parent` and returns (path value, links).

    `heads[front..back]` are the origins that are still best for some end; origin h is so from `starts` on. A later
    origin, once ahead, stays ahead (Monge), so one crossing point per neighbouring pair describes the queue.
    """
    n = sums.shape[0] - 1
    cost[0] = 0.0
    front = 0
    back = 0
    heads[0] = 0
    starts[0] = 1
    for j in range(1, n + 1):
        while front < back and starts[front + 1] <= j:
            front += 1
        origin = np.int64(heads[front])
        cost[j] = cost[origin] + _link_cost(sums, origin, j) + penalty
        parent[j] = origin
        if j == n:
            break
        while True:
            rival = np.int64(heads[back])
            low = max(starts[back], j + 1)
            if _advantage(sums, cost, rival, j, low) > 0.0:
                if back == front:
                    heads[back] = j
                    starts[back] = j + 1
                    break
                back -= 1
                continue
            # j loses at `low`: gallop, then bisect, to the first end where it does not.
            step = 1
            high = min(low + step, n)
            while high > low and _advantage(sums, cost, rival, j, high) < 0.0:
                low = high
                step *= 2
                high = min(low + step, n)
            if high == low:
                break
            while low + 1 < high:
                middle = (low + high) // 2
                if _advantage(sums, cost, rival, j, middle) >= 0.0:
                    high = middle
                else:
                    low = middle
            back += 1
            heads[back] = j
            starts[back] = high
            break
    links = 0
    j = n
    while j > 0:
        j = parent[j]
        links += 1
    return cost[n], links


@kernel
@no_type_check
def _walk(parent, links):
    """The boundaries of the path that `parent` describes."""
    boundaries = np.empty(links + 1, np.int64)
    j = parent.shape[0] - 1
    for a in range(links, 0, -1):
        boundaries[a] = j
        j = parent[j]
    boundaries[0] = 0
    return boundaries


@kernel
@no_type_check
def _splice(short, long, k):
    """A k-link path: the head of a longer optimal path, the tail of a shorter one; as good as both if they tie."""
    shift = k + 1 - short.shape[0]
    for i in range(short.shape[0] - 1):
        if short[i] <= long[i + shift] and long[i + shift + 1] <= short[i + 1]:
            break
    path = np.empty(k + 1, np.int64)
    # Not by slices: numba would compile what it says of those whose lengths differ, for three seconds.
    for a in range(k + 1):
        path[a] = long[a] if a <= i + shift else short[a - shift]
    return path


@kernel
@no_type_check
def _split_further(short, k):
    """A path of k links that holds the boundaries of a shorter one."""
    path = np.empty(k + 1, np.int64)
    extra = k + 1 - short.shape[0]
    filled = 0
    for a in range(short.shape[0] - 1):
        path[filled] = short[a]
        filled += 1
        for j in range(short[a] + 1, short[a + 1]):
            if extra == 0:
                break
            path[filled] = j
            filled += 1
            extra -= 1
    path[filled] = short[-1]
    return path


@kernel
@no_type_check
def _path_cost(sums, boundaries):
    total = 0.0
    for a in range(boundaries.shape[0] - 1):
        total += _link_cost(sums, boundaries[a], boundaries[a + 1])
    return total


@kernel
@no_type_check
def optimal_path(values, mass, k, penalty):
    """The best path of k links over ascending points, of which there are more than k.

    Maximises the dual over the penalty, starting at the one given; returns (boundaries, cost, a lower bound on the cost
    of every path of k links, the last penalty, probes). The bound is below the cost by rounding only.
    """
    n = values.shape[0]
    sums = _prefix_sums(values, mass)
    cost = np.empty(n + 1)
    parent = np.zeros(n + 1, np.int32)
    heads = np.empty(n + 1, np.int32)
    starts = np.empty(n + 1, np.int32)
    # Brackets: at `low` paths have too many links, at `high` too few. All points apart and all in one are the first.
    low, long, long_cost = 0.0, np.arange(n + 1), 0.0
    short = np.array([0, n])
    high, short_cost = np.inf, _link_cost(sums, short[0], short[1])
    penalty = min(penalty, short_cost)
    # What n double-double additions may lose, in the cost of a path.
    lost = (n + 16) * 2.0**-105 * sums[n, 4]
    bound = -np.inf
    found, least = short, np.inf
    for probe in range(1, MAX_PROBES + 1):
        value, links = _shortest_path(sums, penalty, cost, parent, heads, starts)
        # Rounding may have added an ulp of the path's value a link.
        bound = max(bound, value - penalty * k - links * (2.0**-52 * value + lost))
        chord = (short_cost - long_cost) / (long.shape[0] - short.shape[0])
        if links == k:
            path = _walk(parent, links)
            inertia = _path_cost(sums, path)
            if penalty <= 4.0 * inertia:
                return path, inertia, bound - k * lost, penalty, probe
            if inertia < least:
                found, least = path, inertia
            # The same path is optimal down to C(k) - C(k+1), and beside a far larger penalty its cost would drown.
            penalty = inertia
            continue
        if penalty == chord and (links >= long.shape[0] - 1 or links <= short.shape[0] - 1):
            # Nothing beats the ends of the chord on it, so every length between them ties.
            path = _splice(short, long, k)
            return path, _path_cost(sums, path), bound - k * lost, penalty, probe
        if links > k:
            low, long, long_cost = penalty, _walk(parent, links), value - penalty * links
        else:
            high, short, short_cost = penalty, _walk(parent, links), value - penalty * links
        if low == 0.0:
            penalty *= min((links / k) ** 3, 1.0) / 4.0 ** (probe - 1)
        elif high == np.inf:
            penalty *= max((links / k) ** 3, 1.0) * 4.0 ** (probe - 1)
        elif probe % 2 == 0 or long.shape[0] - short.shape[0] <= 4:
            penalty = (short_cost - long_cost) / (long.shape[0] - short.shape[0])
        elif probe < 6:
            # k grows like λ^(-1/3): interpolate between the brackets in the logarithms.
            across = np.log((long.shape[0] - 1) / k) / np.log((long.shape[0] - 1) / (short.shape[0] - 1))
            penalty = low * (high / low) ** across
        else:
            penalty = np.sqrt(low * high)
    # Rounding hides how costs of different lengths differ: splitting the shorter path further is no worse than it.
    path = _split_further(short, k)
    inertia = _path_cost(sums, path)
    if least <= inertia:
        path, inertia = found, least
    return path, inertia, bound - k * lost, penalty, MAX_PROBES
