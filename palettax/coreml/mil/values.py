"""What the functions of ops share: how a value that must be known before the run is read, and where it is laid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Array = Any
"""A NumPy array where the value is known, or a JAX one; both are computed with in the same way."""
Function = Callable[..., Any]
"""Of an op: takes its inputs by their names, returns its output or a tuple of them."""


class UnknownError(ValueError):
    """A value that shapes depend on is known only while the program runs."""


def static(value: Any) -> Any:
    """A parameter as Python has it: a number, or a tuple of numbers.

    Raises:
        UnknownError: it depends on what the program is given.
    """
    if isinstance(value, Tracer):
        raise UnknownError
    return tuple(np.asarray(value).tolist()) if np.ndim(value) else np.asarray(value).item()


def per_channel(values: Array, x: Array) -> Array:
    """One value for each entry of the second axis, so that it meets the axes of x."""
    return jnp.reshape(values, (-1,) + (1,) * (np.ndim(x) - 2))


def axes_of(axes: Any, rank: int) -> tuple[int, ...]:
    """All axes if none are given, and none negative."""
    return tuple(range(rank)) if axes is None else tuple(axis % rank for axis in np.atleast_1d(static(axes)).tolist())
