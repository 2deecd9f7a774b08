"""`certify`: how far a lookup table can be from the best one, with proof."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from palettax._typing import Array, is_traced
from palettax.clustering.assignment import host_assign
from palettax.clustering.checks import check_finite, check_sensitivity, check_weights, float64_stays, lut_dtype
from palettax.clustering.exact import exact_clusters
from palettax.clustering.histogram import histogram
from palettax.clustering.host import host_call


@float64_stays
def certify(
    weights: Float[Array, "*shape"],
    lut: Float[Array, " k"],
    *,
    sensitivity: Float[Array, "*shape"] | None = None,
) -> float | Float[jax.Array, ""]:
    """Prove that a lut's inertia is within a fraction of the optimum.

    certify = inertia(lut) / bound - 1,   bound ≤ min over every lut of k values of Σ sensitivity · (w - nearest)²

    The bound is the Lagrangian dual of the clustering problem: it holds whatever made the lut. An entry equal to the
    mean of its cell rounded to the lut's dtype counts as that mean, so storing a table in float16 is not held against
    the clustering.

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
    if lut.ndim != 1 or not 1 <= lut.size <= 256 or not jnp.issubdtype(lut.dtype, jnp.floating):
        raise ValueError(f"lut is {lut.dtype}{tuple(lut.shape)}; certify takes one row of 1 to 256 floats")
    check_finite(lut)
    args = [weights, lut] if sensitivity is None else [weights, sensitivity, lut]
    result = [jax.ShapeDtypeStruct((), lut_dtype(weights))]
    (excess,) = host_call(_certify, result, *(a.reshape(-1) for a in args))
    return excess if is_traced(excess) else float(excess)


def _certify(*arrays: np.ndarray) -> None:
    """Certify every row of a batch. Arrays: weights, maybe sensitivity, lut, then the output."""
    *inputs, lut, excess = arrays
    rows = [a.reshape(-1, a.shape[-1]) for a in inputs]
    luts, flat = lut.reshape(-1, lut.shape[-1]), excess.reshape(-1)
    for i in range(flat.size):
        flat[i] = _excess(rows[0][i], rows[1][i] if len(rows) == 2 else None, luts[i])


def _excess(weights: np.ndarray, sensitivity: np.ndarray | None, lut: np.ndarray) -> float:
    if not (np.isfinite(weights).all() and np.isfinite(lut).all()):
        return np.nan
    if sensitivity is not None and not sensitivity.any():
        sensitivity = None
    values, mass = histogram(np.ascontiguousarray(weights), sensitivity)
    values, mass = values[mass > 0], mass[mass > 0]
    inertia = _inertia(values, mass, np.sort(lut.astype(np.float64)), lut.dtype)
    if values.size <= lut.size:
        return 0.0 if inertia == 0 else np.inf
    return max(inertia / exact_clusters(values, mass, lut.size).bound - 1, 0.0)


def _inertia(values: np.ndarray, mass: np.ndarray, lut: np.ndarray, dtype: np.dtype) -> float:
    """Σ mass · (value - nearest entry)², an entry that is its cell's rounded mean counting as the mean itself."""
    slots = np.empty(values.size, np.uint8)
    host_assign(values, lut, slots)
    centre = np.bincount(slots, mass, lut.size)
    with np.errstate(invalid="ignore"):
        # A correction to the entry, not a mean from scratch: exact where the cell holds one value.
        mean = lut + np.bincount(slots, mass * (values - lut[slots]), lut.size) / centre
    return float(mass @ (values - np.where(mean.astype(dtype) == lut, mean, lut)[slots]) ** 2)
