"""Elements of a leaf that its table leaves out."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palettax._typing import Array, is_traced
from palettax.clustering.checks import float64_stays
from palettax.leaf import PalettizedArray


def is_element_mask(mask: Any) -> bool:
    """Whether a mask speaks of the elements of a leaf, not of the leaf as a whole."""
    return getattr(mask, "ndim", 0) > 0


def hide_elements(weights: Any, mask: Any) -> Any:
    """Weights with a neighbour's value where the mask is False, so that no table is stretched to what it leaves out."""
    if not is_element_mask(mask):
        return weights
    if mask.shape != weights.shape or mask.dtype != np.bool_:
        raise ValueError(f"mask is {mask.dtype}{mask.shape}; give one bool for the leaf, or one for each element")
    xp = numpy_of(weights, mask)
    weights, flat = xp.asarray(weights), xp.asarray(mask).reshape(-1)
    places = xp.where(flat, xp.arange(flat.size), xp.argmax(flat))
    before = np.maximum.accumulate(places) if xp is np else jax.lax.cummax(places)
    return weights.reshape(-1)[before].reshape(weights.shape)


def weigh_elements(sensitivity: Array | None, weights: Any, mask: Any) -> Array | None:
    """Sensitivities with zero where the mask is False."""
    if not is_element_mask(mask):
        return sensitivity
    xp = numpy_of(weights, mask, sensitivity)
    mass = xp.ones(weights.shape, np.float32) if sensitivity is None else xp.asarray(sensitivity)
    return xp.where(mask, mass, mass.dtype.type(0))


@float64_stays
def keep_elements(leaf: Any, weights: Any, mask: Any, *, zeros: bool = False) -> Any:
    """A leaf, palettized or dense, with the weights as they were where the mask is False; `zeros`: they are zero."""
    if not is_element_mask(mask):
        return leaf
    xp = numpy_of(weights, mask)
    if not isinstance(leaf, PalettizedArray):
        return xp.where(mask, leaf, weights)
    if leaf.vector_size > 1:
        raise ValueError(f"vectors of {leaf.vector_size}: elements of a vector share an index, left out or not")
    if leaf.mask is not None:
        raise ValueError("the leaf leaves out elements already; combine the two masks into one")
    if not zeros and is_traced(mask):
        raise ValueError("the mask is unknown under jit, and with it how many elements to keep; close over its values")
    zeros = zeros or (not is_traced(weights) and not np.asarray(weights)[~np.asarray(mask)].any())
    kept = None if zeros else jnp.asarray(weights)[~np.asarray(mask)]
    return dataclasses.replace(leaf, indices=jnp.where(mask, leaf.indices, 0), mask=jnp.asarray(mask), kept=kept)


def numpy_of(*arrays: Any) -> Any:
    """NumPy, which keeps float64, for concrete arrays; jax.numpy while tracing."""
    return jnp if any(map(is_traced, arrays)) else np
