"""`uniform_lut`: evenly spaced entries from the smallest weight to the largest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from palettax._typing import Array, is_traced
from palettax.clustering.assignment import assign, assign_groups, lookup
from palettax.clustering.checks import check_finite, check_nbits, check_weights, float64_stays, lut_dtype
from palettax.clustering.fit import LutFit, fit_of


@float64_stays
def uniform_lut(weights: Float[Array, "*shape"], nbits: int) -> LutFit:
    """Space 2^nbits entries evenly over the range of the weights.

    lut[j] = min + j · (max - min) / (2^nbits - 1),   index = the nearest entry

    Args:
        weights: (*shape), any float dtype, finite.
        nbits: 1, 2, 3, 4, 6 or 8.

    Returns:
        `LutFit`; lut (2^nbits,) float32 (float64 for float64), ascending, its ends exactly the extremes.

    Raises:
        ValueError: integer or empty weights, NaN or infinities, a width Core ML can't hold.

    Example:
        >>> import numpy as np, palettax as px
        >>> fit = px.uniform_lut(np.array([0.0, 0.2, 0.6, 0.75], np.float32), nbits=2)
        >>> print(fit.lut, fit.indices)
        [0.   0.25 0.5  0.75] [0 1 2 3]
    """
    check_weights(weights)
    check_nbits(nbits)
    check_finite(weights)
    points = jnp.asarray(weights, lut_dtype(weights))
    lut = _spaced(jnp, points.min(), points.max(), nbits)
    indices = assign(points, lut)
    inertia = jnp.sum((points - lookup(lut, indices)) ** 2)
    return LutFit(lut, indices, inertia, jnp.zeros((), jnp.int32), jnp.isfinite(points).all())


def uniform_groups(weights: Float[Array, "groups n"], nbits: int) -> LutFit:
    """`uniform_lut` of every row; concrete rows stay on the host, where nothing is compiled for their shape."""
    if is_traced(weights):
        return jax.vmap(lambda row: uniform_lut(row, nbits))(weights)
    points = weights.astype(lut_dtype(weights))
    with np.errstate(over="ignore", invalid="ignore"):
        lut = _spaced(np, points.min(axis=1), points.max(axis=1), nbits)
    return fit_of(points, lut, assign_groups(points, lut, None))


def _spaced(xp: Any, low: Array, high: Array, nbits: int) -> Array:
    """Entries from low to high, on the last axis."""
    low, high = low[..., None], high[..., None]
    # In NumPy either way: XLA would multiply by a rounded reciprocal.
    part = np.arange(2**nbits, dtype=low.dtype) / low.dtype.type(2**nbits - 1)
    # The first form is exact for constants; the second does not overflow where the range does.
    span = high - low
    lut = xp.where(xp.isfinite(span), low + part * span, low * (1 - part) + high * part)
    return xp.concatenate([lut[..., :-1], high], axis=-1)
