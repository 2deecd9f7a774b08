"""Array and tree aliases that the signatures of this library are written in."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import numpy as np
from jaxtyping import Key

Array = jax.Array | np.ndarray
"""Anything array-valued a user may hold: a JAX array, a tracer of one, or a NumPy array."""

PRNGKey = Key[jax.Array, ""]
"""A typed JAX random key, as `jax.random.key(0)` makes it."""

Tree = Any
"""A pytree. The name in the signature says what its leaves are."""

NBITS = (1, 2, 3, 4, 6, 8)
"""The widths of an index, in bits, that Core ML can hold."""


def is_traced(value: Any) -> bool:
    """Whether a value is unknown because JAX is tracing the computation."""
    return isinstance(value, jax.core.Tracer)
