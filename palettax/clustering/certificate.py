"""`certify`: how far a lookup table can be from the best one, with proof."""

from __future__ import annotations

from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Float

from palettax._typing import Array, is_traced
from palettax.clustering.checks import FLOATS, as_host, check_finite, check_sensitivity, check_weights, lut_dtype
from palettax.clustering.entries import slot_of, thresholds_of
from palettax.clustering.exact import kernel
from palettax.clustering.host import host_call
from palettax.clustering.nodes import optimum, prepared
from palettax.clustering.points import all_finite, is_mass, points


def certify(
    weights: Float[Array, "*shape"],
    lut: Float[Array, " k"],
    *,
    sensitivity: Float[Array, "*shape"] | None = None,
) -> float | Float[jax.Array, ""]:
    """Prove that a lut's inertia is within a fraction of the optimum.

    certify = inertia(lut) / bound - 1,   bound ≤ min over every lut of k values of Σ sensitivity · (w - nearest)²

    The bound is the Lagrangian dual of the clustering problem: it holds whatever made the lut. An entry counts as known
    to half an ulp of float32 (for a float64 lut, of float64), so that the last bit of an optimal table is not held
    against it. A table rounded to 16 bits pays for that.

    Args:
        weights: (*shape), any float dtype, finite.
        lut: (k,), in any order; k is the number of entries it is compared at.
        sensitivity: (*shape) ≥ 0, or None for ones.

    Returns:
        A float ≥ 0; 0 is optimal, 0.01 is at most 1 % above the optimum, infinity is a table with error where none
        is needed, or where doubles resolve too little for a bound. Under `jit` and `vmap`, an array of that.

    Raises:
        ValueError: as `kmeans_lut`, or a lut that is not one row of 1 to 256 finite floats.

    Example:
        >>> import numpy as np, palettax as px
        >>> weights = np.random.default_rng(0).normal(size=5000).astype(np.float32)
        >>> px.certify(weights, px.kmeans_lut(weights, 4).lut) < 1e-9
        True
        >>> px.certify(weights, px.uniform_lut(weights, 4).lut) > 0.5
        True

    References:
        Grønlund et al., arXiv 1701.07204; Aggarwal, Schieber, Tokuyama, Discrete & Computational Geometry 12, 1994.
    """
    check_weights(weights)
    check_finite(weights)
    check_sensitivity(sensitivity, weights)
    found = f"{lut.dtype}{tuple(lut.shape)}" if hasattr(lut, "dtype") else type(lut).__name__
    if not hasattr(lut, "dtype") or lut.ndim != 1 or not 1 <= lut.size <= 256 or lut.dtype not in FLOATS:
        raise ValueError(f"lut is {found}; certify takes one row of 1 to 256 floats")
    check_finite(lut)
    args = [weights, lut] if sensitivity is None else [weights, sensitivity, lut]
    result = [jax.ShapeDtypeStruct((), lut_dtype(weights))]
    (excess,) = host_call(_certify, result, *(as_host(a).reshape(-1) for a in args))
    return excess if is_traced(excess) else float(excess)


def _certify(*arrays: np.ndarray) -> None:
    """Certify every row of a batch. Arrays: weights, maybe sensitivity, lut, then the output."""
    *inputs, lut, excess = arrays
    rows = [a.reshape(-1, a.shape[-1]) for a in inputs]
    luts, flat = lut.reshape(-1, lut.shape[-1]), excess.reshape(-1)
    for i in range(flat.size):
        flat[i] = _excess(rows[0][i], rows[1][i] if len(rows) == 2 else None, luts[i])


def _excess(weights: np.ndarray, sensitivity: np.ndarray | None, lut: np.ndarray) -> float:
    if not (all_finite(weights) and np.isfinite(lut).all() and (sensitivity is None or is_mass(sensitivity))):
        return np.nan
    found = points(np.ascontiguousarray(weights), sensitivity)
    last_bit = np.spacing(np.abs(lut).astype(np.promote_types(lut.dtype, np.float32))).astype(np.float64) / 2
    order = np.argsort(lut, kind="stable")
    with np.errstate(over="ignore"):
        return float(_relative_excess(*found, lut.astype(np.float64)[order], last_bit[order]))


@kernel
@no_type_check
def _relative_excess(values, mass, lut, last_bit):
    """Inertia over the least inertia, less one; an entry may be off by its last bit."""
    values, mass, scale, _ = prepared(values, mass)
    lut, last_bit = lut / scale, last_bit / scale
    # Tables within half an ulp of this one: with the means of its cells, and as near as may be to the optimum.
    table = _cell_means(values, mass, lut)
    inertia = _inertia(values, mass, np.minimum(np.maximum(table, lut - last_bit), lut + last_bit))
    best = np.empty(lut.shape[0])
    cost, bound, _ = optimum(values, mass, best)
    if cost > 0.0:
        inertia = min(inertia, _inertia(values, mass, np.minimum(np.maximum(best, lut - last_bit), lut + last_bit)))
    if inertia == 0.0:
        return 0.0
    return max(inertia / bound - 1.0, 0.0) if bound > 0.0 else np.inf


@kernel
@no_type_check
def _cell_means(values, mass, lut):
    """The mean of each entry's cell; an entry without one stays."""
    thresholds, first = thresholds_of(lut)
    weight, offset = np.zeros(lut.shape[0]), np.zeros(lut.shape[0])
    for i in range(values.shape[0]):
        slot = first[slot_of(values[i], thresholds)]
        here = mass[i] if mass.shape[0] else 1.0
        weight[slot] += here
        # A correction to the entry, not a mean from scratch: exact where the cell holds one value.
        offset[slot] += here * (values[i] - lut[slot])
    return lut + np.where(weight > 0.0, offset / np.where(weight > 0.0, weight, 1.0), 0.0)


@kernel
@no_type_check
def _inertia(values, mass, lut):
    """Σ mass · (value - nearest entry)²."""
    thresholds, first = thresholds_of(lut)
    total = 0.0
    for i in range(values.shape[0]):
        here = mass[i] if mass.shape[0] else 1.0
        total += here * (values[i] - lut[first[slot_of(values[i], thresholds)]]) ** 2
    return total
