"""What the array functions refuse, and how they keep float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from palettax._typing import NBITS, Array, is_traced
from palettax.clustering.points import all_finite

FLOATS = [np.dtype(t) for t in (np.float16, jnp.bfloat16, np.float32, np.float64)]
Method = Literal["exact", "lloyd"]
F = TypeVar("F", bound=Callable[..., Any])


def check_nbits(nbits: int) -> None:
    """Refuse widths that Core ML cannot hold."""
    if isinstance(nbits, bool) or not isinstance(nbits, int | np.integer) or nbits not in NBITS:
        raise ValueError(f"nbits={nbits!r:.60}; an index has one of {NBITS} bits: pick one of those")


def check_weights(weights: Any) -> None:
    """Refuse what is no float array with elements."""
    if not hasattr(weights, "dtype") or not hasattr(weights, "shape") or callable(getattr(weights, "size", None)):
        raise ValueError(f"weights are of type {type(weights).__name__}; pass a NumPy or JAX array")
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(f"weights are {weights.dtype}; only floats have a palette: cast them or leave them out")
    if weights.dtype not in FLOATS:
        raise ValueError(
            f"weights are {weights.dtype}; cast them to float16, bfloat16, float32 or float64 of this machine"
        )
    if weights.size == 0:
        raise ValueError(f"weights {weights.shape} are empty; there is nothing to cluster: leave them out")


def resolve_method(method: str | None, vector_size: int, key: Array | None) -> Method:
    """The way to cluster; refuses one that there is not, and vectors without a key."""
    if method not in (None, *get_args(Method)):
        raise ValueError(f'method={method!r}; choose "exact" or "lloyd"')
    if isinstance(vector_size, bool) or not isinstance(vector_size, int | np.integer) or vector_size < 1:
        raise ValueError(f"vector_size={vector_size!r}; it must be a positive integer")
    if vector_size == 1:
        return cast(Method, method or "exact")
    if method == "exact":
        raise ValueError(f'vector_size={vector_size} with method="exact"; vectors have no exact method: use "lloyd"')
    if key is None:
        raise ValueError(
            f"vector_size={vector_size} without a key; vectors start at random: pass key=jax.random.key(0)"
        )
    if not hasattr(key, "dtype"):
        raise ValueError(f"key={key!r}; give a key of JAX: jax.random.key(0)")
    return "lloyd"


def as_host(array: Array) -> Array:
    """A concrete array, sharded ones included, as NumPy's; a traced one as it is."""
    return array if is_traced(array) else np.asarray(array)


def check_finite(weights: Array) -> None:
    """Refuse NaN and infinities, when the values are known."""
    if is_traced(weights):
        return
    values = np.asarray(weights)
    if all_finite(values):
        return
    nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    raise ValueError(
        f"{nan} NaN and {infinite} infinite of {values.size} values; replace them, or leave the "
        'array dense (palettize(..., nonfinite="keep"))'
    )


def check_sensitivity(sensitivity: Array | None, weights: Any, *, infinite: bool = False) -> None:
    """Refuse a sensitivity that is not one finite number ≥ 0 per weight; `infinite` ones may be at weights of zero."""
    if sensitivity is None:
        return
    if not hasattr(sensitivity, "shape") or tuple(sensitivity.shape) != tuple(weights.shape):
        found = getattr(sensitivity, "shape", type(sensitivity).__name__)
        raise ValueError(f"sensitivity is {found} and weights are {weights.shape}; give one number per weight")
    if jnp.issubdtype(sensitivity.dtype, jnp.complexfloating):
        raise ValueError(f"sensitivity is {sensitivity.dtype}; it weighs squared errors: give real numbers")
    if is_traced(sensitivity):
        return
    values = np.asarray(sensitivity)
    values = values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)
    bad = ~np.isfinite(values)
    if infinite:
        bad &= ~(np.isposinf(values) & (is_traced(weights) or np.asarray(weights) == 0))
    bad = int(bad.sum())
    negative = int((values < 0).sum())
    if bad or negative:
        raise ValueError(
            f"sensitivity has {negative} negative and {bad} NaN or infinite of {values.size} values; "
            "it weighs squared errors: use squared gradients, or clip it at 0"
        )


def vectors_of(weights: Array, vector_size: int) -> Array:
    """(..., m·d) -> (..., m, d)."""
    if weights.ndim == 0 or weights.shape[-1] % vector_size:
        raise ValueError(f"vector_size={vector_size} does not divide the last axis of {weights.shape}")
    return weights.reshape(*weights.shape[:-1], -1, vector_size)


def lut_dtype(weights: Array) -> np.dtype:
    """The dtype of a fitted table: float64 for float64 weights, else float32."""
    return np.dtype(np.float64 if weights.dtype == np.float64 else np.float32)


def float64_stays(function: F) -> F:
    """Let NumPy float64 input through at full width: JAX would cut it to float32 without a word.

    While JAX's x64 mode is off, a call with such input runs with the mode on and returns NumPy arrays.
    """

    @functools.wraps(function)
    def wide(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        found = any(isinstance(a, np.ndarray) and a.dtype == np.float64 for a in given)
        if not found or jax.config.read("jax_enable_x64"):
            return function(*args, **kwargs)
        if any(map(is_traced, given)):  # what is computed with JAX's arrays has their width
            args, kwargs = jax.tree.map(_narrowed, (args, kwargs))
            return function(*args, **kwargs)
        with jax.enable_x64(True):
            return jax.tree.map(lambda a: a if is_traced(a) else np.asarray(a), function(*args, **kwargs))

    return cast(F, wide)


def _narrowed(value: Any) -> Any:
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float64 else value
