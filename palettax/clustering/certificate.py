"""`certify`: how far a lookup table can be from the best one, with proof."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Float

from palettax._typing import Array, is_traced
from palettax.clustering.assignment import host_assign
from palettax.clustering.checks import FLOATS, as_host, check_finite, check_sensitivity, check_weights, lut_dtype
from palettax.clustering.exact import exact_clusters, power_of_two
from palettax.clustering.histogram import all_finite, is_mass, weighted_points
from palettax.clustering.host import host_call


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
        is needed. Under `jit` and `vmap`, an array of that.

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
    (values, mass), _ = weighted_points(np.ascontiguousarray(weights), sensitivity)
    values, mass = values[mass > 0], mass[mass > 0]
    entries = np.sort(lut.astype(np.float64))
    with np.errstate(over="ignore"):
        last_bit = np.spacing(np.abs(entries).astype(np.promote_types(lut.dtype, np.float32))).astype(np.float64) / 2
        # Tables within half an ulp of this one: with the means of its cells, and as near as may be to the optimum.
        tables = [np.clip(_cell_means(values, mass, entries), entries - last_bit, entries + last_bit)]
        bound, unit = 0.0, power_of_two(values)
        if values.size > lut.size:
            best = exact_clusters(values, mass, lut.size)
            bound, unit = best.bound, best.unit
            tables.append(np.clip(best.centroids, entries - last_bit, entries + last_bit))
        inertia = min(_inertia(values, mass, table, unit) for table in tables)
    if inertia == 0:
        return 0.0
    return max(inertia / bound - 1, 0.0) if bound > 0 else np.inf


def _cell_means(values: np.ndarray, mass: np.ndarray, lut: np.ndarray) -> np.ndarray:
    """The mean of each entry's cell; an entry without one stays."""
    slots = np.empty(values.size, np.uint8)
    host_assign(values, lut, slots)
    weight = np.bincount(slots, mass, lut.size)
    # A correction to the entry, not a mean from scratch: exact where the cell holds one value.
    offset = np.bincount(slots, mass * (values - lut[slots]), lut.size)
    return lut + np.divide(offset, weight, out=np.zeros_like(offset), where=weight > 0)


def _inertia(values: np.ndarray, mass: np.ndarray, lut: np.ndarray, unit: float) -> float:
    """Σ mass · (value - nearest entry)², values in multiples of a unit."""
    slots = np.empty(values.size, np.uint8)
    host_assign(values, lut, slots)
    return float(mass @ ((values - lut[slots]) / unit) ** 2)
