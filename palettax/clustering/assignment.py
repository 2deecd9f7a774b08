"""The nearest entry of a lookup table, and the way back."""

from __future__ import annotations

from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from palettax._typing import Array
from palettax.clustering.checks import float64_stays, vectors_of
from palettax.clustering.exact import kernel, two_sum

_two_sum = kernel(two_sum)

# Distances to vectors are formed for this many weights at a time, never as one (n, k) array.
BLOCK = 16384


@float64_stays
def lookup(lut: Float[Array, "*lut"], indices: UInt8[Array, "*shape"]) -> Float[Array, ...]:
    """Expand indices: `lut[indices]`.

    Args:
        lut: (k,), or (k, vector_size); any float dtype.
        indices: uint8 (*shape), each below k.

    Returns:
        The values, of the lut's dtype: (*shape), with a vector lut (*shape[:-1], shape[-1] · vector_size).

    Example:
        >>> import numpy as np, palettax as px
        >>> px.lookup(np.array([-1.0, 0.5], np.float32), np.array([0, 1, 1], np.uint8)).tolist()
        [-1.0, 0.5, 0.5]
    """
    values = jnp.asarray(lut)[jnp.asarray(indices)]
    return values if lut.ndim == 1 else values.reshape(*indices.shape[:-1], -1)


@float64_stays
def assign(weights: Float[Array, "*shape"], lut: Float[Array, "*lut"]) -> UInt8[Array, ...]:
    """The nearest lut entry of every weight: `argmin_j |weight - lut[j]|`.

    Exact for scalars: a weight on either side of the true midpoint of two entries goes to that side, however the
    midpoint rounds; on it, to the smaller entry, and of equal entries to the one of lowest index. XLA takes subnormal
    numbers for 0.

    Args:
        weights: (*shape), any float dtype. NaN goes to some entry.
        lut: (k,) in any order, or (k, vector_size); k at most 256.

    Returns:
        uint8 (*shape), the last axis divided by vector_size.

    Raises:
        ValueError: more than 256 entries, or a last axis that vector_size does not divide.

    Example:
        >>> import numpy as np, palettax as px
        >>> px.assign(np.array([0.11, 0.19, 0.3], np.float32), np.array([0.0, 0.1, 0.2, 0.3], np.float32)).tolist()
        [1, 2, 3]
    """
    if lut.shape[0] > 256:
        raise ValueError(f"lut has {lut.shape[0]} entries; an index is one byte, so at most 256")
    dtype = jnp.promote_types(jnp.promote_types(weights.dtype, lut.dtype), jnp.float32)
    # Indices are constants to differentiation, and not every step to them has a derivative.
    weights, lut = (jax.lax.stop_gradient(jnp.asarray(a, dtype)) for a in (weights, lut))
    if lut.ndim == 2:
        return _nearest_vectors(vectors_of(weights, lut.shape[1]), lut)
    order = jnp.argsort(lut)
    entries = lut[order]
    slot = jnp.searchsorted(_thresholds(entries), weights, side="left")
    return order[jnp.searchsorted(entries, entries, side="left")[slot]].astype(jnp.uint8)


def _thresholds(lut: Float[jax.Array, " k"]) -> Float[jax.Array, " k-1"]:
    """The largest value of the dtype that is no farther from each ascending entry than from the next."""
    a, b = lut[:-1] / 2, lut[1:] / 2
    middle, error = two_sum(a, b)
    return jnp.where(error < 0, jnp.nextafter(middle, jnp.full_like(middle, -jnp.inf)), middle)


def _nearest_vectors(vectors: Float[Array, "*shape d"], lut: Float[jax.Array, "k d"]) -> UInt8[jax.Array, "*shape"]:
    def nearest(vector: jax.Array) -> jax.Array:
        return jnp.argmin(jnp.sum((vector - lut) ** 2, axis=-1)).astype(jnp.uint8)

    flat = vectors.reshape(-1, lut.shape[1])
    return jax.lax.map(nearest, flat, batch_size=BLOCK).reshape(vectors.shape[:-1])


@kernel
@no_type_check
def host_thresholds(lut):
    """`_thresholds` on the host, in float64."""
    thresholds = np.empty(lut.shape[0] - 1)
    for a in range(lut.shape[0] - 1):
        middle, error = _two_sum(lut[a] / 2, lut[a + 1] / 2)
        thresholds[a] = np.nextafter(middle, -np.inf) if error < 0.0 else middle
    return thresholds


@kernel
@no_type_check
def host_assign(weights, lut, indices):
    """`assign` on the host, for an ascending float64 lut; fills `indices`."""
    thresholds = host_thresholds(lut)
    first = np.searchsorted(lut, lut)
    for i in range(weights.shape[0]):
        low, high = 0, thresholds.shape[0]
        while low < high:
            middle = (low + high) // 2
            if thresholds[middle] < weights[i]:
                low = middle + 1
            else:
                high = middle
        indices[i] = first[low]
