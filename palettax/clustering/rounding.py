"""Tables rounded to a narrow dtype, with a gradient: what training can afford in every step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from palettax._typing import Array
from palettax.clustering.levels import level_values, stored_levels

HALVES = (np.dtype(np.float16), np.dtype(jnp.bfloat16))


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What becomes of a table on its way to storage.

    Attributes:
        dtype: float16 or bfloat16; int8, uint8 or a float8, whose levels have a step; None to stay as it is.
        step_dtype: the float dtype that a step is stored in.
        levels: the lowest and the highest integer level that is used, about zero; None for all there are.
    """

    dtype: np.dtype | None
    step_dtype: np.dtype
    levels: tuple[int, int] | None = None

    def stored(
        self, lut: Float[jax.Array, "k d"], zero: Any
    ) -> tuple[Shaped[jax.Array, "k d"], Float[jax.Array, ""] | None]:
        """The table as it is stored, and the step of its levels if it has them: max |entry| over the largest level.

        Args:
            lut: float32 or float64.
            zero: bool: whether the entry nearest to zero is to be zero; None for no.
        """
        lut = _pinned(lut, zero)
        if self.dtype is not None and self.has_levels:
            numbers, step = self._levels(lut)
            return jnp.asarray(stored_levels(numbers, self.dtype)), step.astype(self.step_dtype)
        return (lut if self.dtype is None else rounded(lut, self.dtype)).astype(self.step_dtype), None

    def __call__(self, lut: Float[jax.Array, "k d"], zero: Any) -> Float[jax.Array, "k d"]:
        """The table as it will be read back from storage; its gradient is that of the table."""
        lut = _pinned(lut, zero)
        if self.dtype is None:
            return lut
        fixed = jax.lax.stop_gradient(lut)
        if self.has_levels:
            numbers, step = self._levels(fixed)
            read = rounded(numbers * step, self.step_dtype)
        else:
            read = rounded(fixed, self.dtype)
        return lut + (read - fixed)

    @property
    def has_levels(self) -> bool:
        """Whether the dtype has levels, and they a step."""
        return self.dtype is not None and self.dtype not in HALVES

    def _levels(self, lut: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The numbers that levels are, and their step: the smallest with which no entry lies outside."""
        dtype = np.dtype(self.dtype)
        values = level_values(dtype)
        low, high = (values.min(), values.max()) if self.levels is None else map(float, self.levels)
        # Of a side without levels, all entries are clipped to zero.
        step = rounded(jnp.stack([lut / end for end in (low, high) if end]).max(), self.step_dtype)
        step = jnp.maximum(step, float(jnp.finfo(self.step_dtype).tiny))
        numbers = jnp.clip(lut / step, low, high)
        integer = dtype in (np.int8, np.uint8)
        return jnp.round(numbers) if integer else rounded(numbers, dtype), step


def _pinned(lut: jax.Array, zero: Any) -> jax.Array:
    if zero is None:
        return lut
    nearest = jnp.arange(lut.shape[0]) == abs(lut[:, 0]).argmin()
    return jnp.where((zero & nearest)[:, None], 0, lut)


def rounded(values: Float[Array, "*shape"], dtype: np.dtype) -> Float[jax.Array, "*shape"]:
    """What a cast to a float dtype and back gives. XLA may leave out such a pair, and with it the rounding.

    `jax.lax.reduce_precision` knows neither the largest float8_e4m3fn nor subnormal numbers.

    Args:
        values: float32 or float64.
        dtype: a float; one as wide as that of the values changes nothing. What overflows becomes infinite.
    """
    narrow, wide = jnp.finfo(dtype), jnp.finfo(values.dtype)
    if narrow.nmant >= wide.nmant:
        return jnp.asarray(values)
    spacing = jnp.maximum(jnp.frexp(values)[1] - 1, narrow.minexp) - narrow.nmant
    nearest = jnp.ldexp(jnp.round(jnp.ldexp(values, -spacing)), spacing)
    return jnp.where(abs(nearest) > float(narrow.max), jnp.copysign(jnp.inf, values), nearest)


def narrow_dtype(dtype: Any) -> np.dtype | None:
    """A dtype that tables can be rounded to, also by name; None for none."""
    if dtype is None:
        return None
    narrow = np.dtype(jnp.dtype(dtype))
    if narrow not in HALVES:
        level_values(narrow)  # refuses others
    return narrow


def check_levels(levels: tuple[int, int], dtype: np.dtype | None) -> None:
    """Refuse levels that tables of the dtype do not have."""
    if dtype not in (np.int8, np.uint8):
        raise ValueError(f"levels={levels!r} with lut_dtype={dtype}; only int8 and uint8 have integer levels")
    integers = all(isinstance(end, int | np.integer) and not isinstance(end, bool) for end in levels)
    if len(levels) != 2 or not integers or not -128 <= levels[0] <= 0 <= levels[1] <= 127 or levels[0] == levels[1]:
        raise ValueError(f"levels={levels!r}; give the lowest, -128 to 0, and the highest, 0 to 127")
