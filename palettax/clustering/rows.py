"""Exact k-means of many groups of weights at once, on all cores."""

from __future__ import annotations

from typing import no_type_check

import jax.numpy as jnp
import numpy as np

from palettax.clustering.entries import assign_rows, round_entries, slot_of, thresholds_of
from palettax.clustering.exact import kernel
from palettax.clustering.host import in_threads
from palettax.clustering.nodes import fit_points
from palettax.clustering.points import PATTERNS, count_points, finite_patterns, mass_rows, sorted_rows

# Shorter rows of 16-bit floats are sorted as float32: quicker than going through the counts of all bits.
LEAST_COUNTED = 16384
# Weights that a thread takes at a time.
TASK = 1 << 18


def fit_rows(
    weights: np.ndarray,
    sensitivity: np.ndarray | None,
    lut: np.ndarray,
    indices: np.ndarray,
    inertia: np.ndarray,
    num_steps: np.ndarray,
    converged: np.ndarray,
) -> None:
    """Find the optimal lut of every row, rounded to the dtype of `lut`, and the nearest entry of every weight.

    Args:
        weights: (rows, n), floating.
        sensitivity: (rows, n), real, or None.
        lut: (rows, k), filled; NaN for rows that hold NaN, infinities or a sensitivity that is no mass.
        indices: (rows, n) uint8, filled.
        inertia: (rows,), filled.
        num_steps: (rows,) int32, filled: probes.
        converged: (rows,) bool, filled: whether the optimum is proven.
    """
    weights = np.ascontiguousarray(weights)
    rows, n = weights.shape
    mass = mass_rows(sensitivity, rows)
    finfo = jnp.finfo(lut.dtype)
    precision = int(finfo.nmant) + 1, int(finfo.minexp)
    entries, errors = np.empty(lut.shape), np.zeros(rows)
    counted = weights.dtype.itemsize == 2 and n >= LEAST_COUNTED

    def fit(part: tuple[slice, slice]) -> None:
        taken = part[0]
        results = *precision, entries[taken], num_steps[taken], converged[taken]
        if counted:
            bits, patterns = weights[taken].view(np.uint16), finite_patterns(weights.dtype)
            own = mass[part] if mass.dtype == np.float32 else mass[part].astype(np.float64)
            _fit_bits(bits, own, *patterns, *results, indices[taken], errors[taken])
        else:
            _fit_sorted(*sorted_rows(weights[taken], mass[part]), *results)

    step = max(1, TASK // n)
    in_threads(fit, [(slice(row, row + step), slice(None)) for row in range(0, rows, step)])
    if not counted:
        errors = nearest_entries(weights, mass, entries, indices)
    with np.errstate(over="ignore"):  # an inertia too large for float32 is infinite
        lut[:], inertia[:] = entries, errors


def nearest_entries(weights: np.ndarray, mass: np.ndarray, lut: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Find the nearest entry of every weight of every row, on all cores.

    Args:
        weights: (rows, n), floating.
        mass: (rows, n), or (rows, 0) where every weight counts as one.
        lut: (rows, k) float64, ascending.
        indices: (rows, n) uint8, filled; of equal entries the first, and the smaller one where two are as near.

    Returns:
        The weighted squared error of every row.
    """
    rows, n = weights.shape

    def assign(part: tuple[slice, slice]) -> np.ndarray:
        wide = weights[part].astype(np.promote_types(weights.dtype, np.float32), copy=False)
        partial = np.empty(len(wide))
        assign_rows(wide, mass[part].astype(np.float64), lut[part[0]], indices[part], partial)
        return partial

    step = max(1, TASK // n)
    pieces = [(slice(row, row + step), slice(i, i + TASK)) for row in range(0, rows, step) for i in range(0, n, TASK)]
    errors = np.zeros(rows)
    for (taken, _), partial in zip(pieces, in_threads(assign, pieces), strict=True):
        errors[taken] += partial
    return errors


@kernel
@no_type_check
def _fit_sorted(values, mass, digits, least_exponent, luts, num_steps, converged):
    for row in range(values.shape[0]):
        num_steps[row], converged[row] = fit_points(values[row], mass[row], luts[row])
        round_entries(luts[row], digits, least_exponent)


@kernel
@no_type_check
def _fit_bits(
    bits, mass, patterns, pattern_values, digits, least_exponent, luts, num_steps, converged, indices, inertia
):
    table = np.zeros(PATTERNS, np.uint8)
    for row in range(bits.shape[0]):
        lut = luts[row]
        values, masses, sound = count_points(bits[row], mass[row], patterns, pattern_values)
        if sound:
            num_steps[row], converged[row] = fit_points(values, masses, lut)
            round_entries(lut, digits, least_exponent)
        else:
            lut[:], num_steps[row], converged[row] = np.nan, 0, False
        thresholds, first = thresholds_of(lut)
        slot = 0
        for p in range(patterns.shape[0]):
            while slot < thresholds.shape[0] and thresholds[slot] < pattern_values[p]:
                slot += 1
            table[patterns[p]] = first[slot]
        for i in range(bits.shape[1]):
            indices[row, i] = table[bits[row, i]]
        total = 0.0
        for i in range(values.shape[0]):
            total += masses[i] * (values[i] - lut[first[slot_of(values[i], thresholds)]]) ** 2
        inertia[row] = total if sound else np.nan
