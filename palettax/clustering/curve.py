"""`kmeans_curve`: the least inertia for many numbers of entries."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from palettax._typing import Array, is_traced
from palettax.clustering.checks import as_host, check_finite, check_sensitivity, check_weights, lut_dtype
from palettax.clustering.host import host_call, in_threads
from palettax.clustering.nodes import optimum, prepared
from palettax.clustering.points import all_finite, is_mass, points


def kmeans_curve(
    weights: Float[Array, "*shape"], ks: Sequence[int], *, sensitivity: Float[Array, "*shape"] | None = None
) -> Float[Array, " ks"]:
    """The least inertia that each number of entries allows: a rate-distortion curve.

    curve[i] = min over luts of ks[i] entries of Σ sensitivity · (weight - nearest entry)²

    Convex and falling in k. The weights are put in order once for all of it.

    Args:
        weights: (*shape), any float dtype, finite.
        ks: numbers of entries, each ≥ 1; powers of two or not, in any order.
        sensitivity: (*shape) ≥ 0, or None for ones.

    Returns:
        (len(ks),) float64; under `jit`, where `ks` must be static, of the dtype of a lut.

    Raises:
        ValueError: as `kmeans_lut`, or a k that is not a positive integer.

    Example:
        >>> import numpy as np, palettax as px
        >>> weights = np.array([0, 1, 5, 6, 9], np.float32)
        >>> px.kmeans_curve(weights, [1, 2, 3, 4, 5]).tolist()
        [54.8, 9.166666666666666, 1.0, 0.5, 0.0]

    References:
        Grønlund et al., "Fast exact k-means, k-medians and Bregman divergence clustering in 1D", arXiv 1701.07204.
    """
    check_weights(weights)
    check_finite(weights)
    check_sensitivity(sensitivity, weights)
    numbers = np.asarray(ks)
    if numbers.ndim != 1 or numbers.size == 0 or numbers.dtype.kind not in "iu" or numbers.min() < 1:
        raise ValueError(f"ks={ks!r}; give a list of positive integers")
    args = [as_host(a).reshape(-1) for a in (weights, sensitivity) if a is not None]
    dtype = lut_dtype(weights) if any(map(is_traced, args)) else np.dtype(np.float64)
    return host_call(
        _curves, [jax.ShapeDtypeStruct(numbers.shape, dtype)], *args, numbers.clip(max=2**31 - 1).astype(np.int32)
    )[0]


def _curves(*arrays: np.ndarray) -> None:
    """The curve of every row of a batch. Arrays: weights, maybe sensitivity, ks, then the output."""
    *inputs, ks, curve = (a.reshape(-1, a.shape[-1]) for a in arrays)
    for row in range(len(curve)):
        weights, sensitivity = inputs[0][row], inputs[1][row] if len(inputs) == 2 else None
        with np.errstate(over="ignore"):  # an inertia too large for float32 is infinite
            curve[row] = _curve(weights, sensitivity, ks[row])


def _curve(weights: np.ndarray, sensitivity: np.ndarray | None, ks: np.ndarray) -> np.ndarray:
    if not (all_finite(weights) and (sensitivity is None or is_mass(sensitivity))):
        return np.full(ks.shape, np.nan)
    values, mass, unit, heaviest = prepared(*points(np.ascontiguousarray(weights), sensitivity))
    found = np.empty(ks.shape)

    def fill(a: int) -> None:
        found[a] = optimum(values, mass, np.empty(min(ks[a], values.size)))[0]

    in_threads(fill, list(range(ks.size)))
    with np.errstate(over="ignore"):
        return np.where(found > 0, found * np.float64(heaviest) * unit * unit, 0.0)
