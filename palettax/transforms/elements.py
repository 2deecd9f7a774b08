"""Elements of a leaf that its table leaves out.

On the way to the transform that makes the table they are marked in the sensitivities: -0 instead of 0. Products with
positive scales keep the mark, and a transform that does not know it sees weights whose errors cost nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from palettax._typing import Array, is_traced
from palettax.clustering.checks import check_sensitivity, float64_stays
from palettax.leaf import PalettizedArray


def is_element_mask(mask: Any) -> bool:
    """Whether a mask speaks of the elements of a leaf, not of the leaf as a whole."""
    return getattr(mask, "ndim", 0) > 0


def hide_elements(sensitivity: Array | None, weights: Any, mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Sensitivities with the mark of a hidden element where the mask is False."""
    check_sensitivity(sensitivity, weights, infinite=True)
    if mask.shape != weights.shape or mask.dtype != np.bool_:
        raise ValueError(f"mask is {mask.dtype}{mask.shape}; give one bool for the leaf, or one for each element")
    xp = numpy_of(mask, sensitivity)
    mass = xp.ones(weights.shape, np.float32) if sensitivity is None else xp.asarray(sensitivity)
    mass = mass.astype(xp.promote_types(mass.dtype, np.float32))
    return xp.where(mask, abs(mass), mass.dtype.type(-0.0))


def hidden_elements(sensitivity: Array) -> Bool[Array, ...]:
    """Where sensitivities carry the mark."""
    return (sensitivity == 0) & numpy_of(sensitivity).signbit(sensitivity)


def finite_mass(mass: Array) -> Array:
    """Sensitivities of which infinite ones are as good as that: an entry settles there.

    They are of zeros that are to have an entry; its last bits are set afterwards.
    """
    xp = numpy_of(mass)
    endless = xp.isinf(mass)
    if not is_traced(endless) and not endless.any():
        return mass
    finite = xp.where(endless, mass.dtype.type(0), mass)
    total = finite.sum()
    share = finite / xp.where(total > 0, total, mass.dtype.type(1))
    return xp.where(endless.any(), xp.where(endless, mass.dtype.type(2.0**20), share), mass)


def fill_hidden(rows: Float[Array, "groups n"], hidden: Any) -> Float[Array, "groups n"]:
    """Rows with a visible value of the row in the place of hidden ones; zeros in a row that has none."""
    xp = numpy_of(rows, hidden)
    first = hidden.argmin(axis=1)[:, None]
    value = xp.where(hidden.all(axis=1)[:, None], rows.dtype.type(0), xp.take_along_axis(rows, first, axis=1))
    return xp.where(hidden, value, rows)


@float64_stays
def keep_elements(leaf: Any, weights: Any, mask: Bool[Array, "*shape"], *, zeros: bool = False) -> Any:
    """A leaf, palettized or dense, with the weights as they were where the mask is False; `zeros`: they are zero."""
    xp = numpy_of(weights, mask)
    if not isinstance(leaf, PalettizedArray):
        return leaf if leaf is weights else xp.where(mask, leaf, weights)
    if leaf.vector_size > 1:
        raise ValueError(f"vectors of {leaf.vector_size}: elements of a vector share an index, left out or not")
    if leaf.mask is not None:
        raise ValueError("the leaf leaves out elements already; combine the two masks into one")
    if not zeros and is_traced(mask):
        raise ValueError("the mask is unknown under jit, and with it how many elements to keep; close over its values")
    if not is_traced(mask) and np.asarray(mask).all():
        return leaf
    kept = None if zeros else xp.asarray(weights)[~np.asarray(mask)]
    if kept is not None and xp is np and not (kept.any() or np.signbit(kept).any()):
        kept = None
    indices = jnp.where(mask, leaf.indices, 0)
    return dataclasses.replace(leaf, indices=indices, mask=mask, kept=None if kept is None else jnp.asarray(kept))


def numpy_of(*arrays: Any) -> Any:
    """NumPy, which keeps float64, for concrete arrays; jax.numpy while tracing."""
    return jnp if any(map(is_traced, arrays)) else np
