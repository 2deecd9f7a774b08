"""Train with the rounding that 8-bit activations will have: `fake_quantize_activations` for Flax modules."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from palettax._extras import require
from palettax._typing import Array

Dtype = Literal["int8", "uint8"]


def scale_and_zero_point(low: ArrayLike, high: ArrayLike, dtype: Dtype = "int8") -> tuple[jax.Array, jax.Array]:
    """Lay 256 levels over a range and 0.0: value = scale · (level - zero_point).

    scale = (max(high, 0) - min(low, 0)) / 255,   zero_point = lowest level - round(min(low, 0) / scale)

    Args:
        low: the smallest value, finite, of any shape.
        high: the largest value, at least `low`.
        dtype: "int8" for levels -128..127, "uint8" for 0..255, else ValueError. Both stand for the same values.

    Returns:
        scale float32, positive; zero_point of `dtype`. 0.0 has a level, the ends of the range are within half a step.

    Example:
        >>> scale, zero_point = scale_and_zero_point(-1.0, 254.0, "uint8")
        >>> float(scale), int(zero_point)
        (1.0, 1)
    """
    lowest = _lowest_level(dtype)
    low, high = jnp.minimum(jnp.asarray(low, jnp.float32), 0), jnp.maximum(jnp.asarray(high, jnp.float32), 0)
    # Halved, a range as wide as float32 does not overflow. The smallest normal number still has an inverse.
    half, tiny = high / 2 - low / 2, jnp.finfo(jnp.float32).tiny
    # Not low / scale, which jit may round otherwise: of low = -high, this is the same tie everywhere.
    zero_point = lowest - jnp.rint(low / 2 / jnp.maximum(half, tiny) * 255)
    return jnp.maximum(half / 127.5, tiny), zero_point.astype(dtype)


def fake_quantize(
    values: Float[Array, "*shape"], low: ArrayLike, high: ArrayLike, dtype: Dtype = "int8"
) -> Float[jax.Array, "*shape"]:
    """Round values to the 256 levels of a range, and back.

    level = clip(round(value / scale) + zero_point, lowest level, highest level),   scale · (level - zero_point)

    The gradient is 1 for values that round to a level, 0 for those that are clipped, and 0 for the range.

    Args:
        values: any shape and float dtype; NaN stays NaN, infinities become the ends.
        low: the smallest value of the range, finite, of a shape that broadcasts to that of the values.
        high: the largest. A range of [0, 0] is no range, and leaves the values as they are.
        dtype: "int8" or "uint8", see `scale_and_zero_point`.

    Returns:
        At most 256 different values, of the shape and dtype of `values`, computed in float32. In bfloat16, some levels
        coincide where 0 is far from the middle of the range.

    Example:
        >>> import jax.numpy as jnp
        >>> print(fake_quantize(jnp.array([-9.0, 0.0, 0.4, 0.6, 300.0]), -1.0, 254.0))
        [ -1.   0.   0.   1. 254.]

    References:
        Bengio et al. 2013, Estimating or propagating gradients through stochastic neurons, arXiv:1308.3432.
    """
    lowest, values = _lowest_level(dtype), jnp.asarray(values)
    scale, zero_point = (a.astype(jnp.float32) for a in scale_and_zero_point(low, high, dtype))
    fixed, ends = jax.lax.stop_gradient(values), jnp.finfo(values.dtype)
    level = jnp.rint(fixed.astype(jnp.float32) * (1 / scale)) + zero_point
    rounded = (jnp.clip(level, lowest, lowest + 255) - zero_point) * scale
    # The last level may lie half a step outside the range, where float16 has infinity.
    rounded = jax.lax.stop_gradient(jnp.clip(rounded, float(ends.min), float(ends.max)).astype(values.dtype))
    # Values come in as an exact zero: value + (rounded - value) can be an ulp off, and 0.0 no longer 0.0.
    straight = rounded + jnp.where((level >= lowest) & (level <= lowest + 255), values - fixed, 0)
    return jnp.where(jnp.logical_or(low, high), straight, values)


def fake_quantize_activations(module: Any, dtype: Dtype = "int8", *, momentum: float = 0.99) -> Any:
    """Wrap a Flax module so that it trains with its output rounded to 8 bits.

    low ← momentum · low + (1 - momentum) · min(output),   high likewise;   then `fake_quantize(output, low, high)`

    The first batch sets the range. A batch with NaN or infinities leaves it, as an empty one does, and while all
    outputs were 0 there is none. Eval mode uses the range and leaves it; without one, outputs pass unchanged.

    Args:
        module: NNX or Linen, its output one float array. All arguments of a call go on to it, `use_running_average` if
            it takes that keyword.
        dtype: "int8" or "uint8"; same outputs, other levels stored: see `scale_and_zero_point`.
        momentum: 0 to 1, the part of the range that a batch leaves.

    Returns:
        A module of that kind around `.module`, with the range `low`, `high` in float32. NNX: in `nnx.BatchStat`, the
        mode set by `eval()`, `train()` or `nnx.view`. Linen: in "batch_stats", mutable in training, the mode set by
        the argument `use_running_average` of the call or of `.clone`, as for `nn.BatchNorm`.

    Raises:
        ValueError: no Flax module, another dtype, a momentum outside 0 to 1; in the call, any other output.
        ImportError: flax is not installed.

    Example:
        >>> import jax, jax.numpy as jnp, palettax as px
        >>> from flax import nnx
        >>> batch = jax.random.normal(jax.random.key(0), (1000, 8))
        >>> model = px.fake_quantize_activations(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
        >>> trained = model(batch)
        >>> model.eval()
        >>> len(jnp.unique(model(batch))) <= 256
        True

    References:
        Jacob et al. 2018, Quantization and training of neural networks, arXiv:1712.05877.
    """
    require("flax", "flax")
    from flax import linen, nnx

    _lowest_level(dtype)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum}; give a number from 0 to 1")
    for kind, wrapper in zip((nnx.Module, linen.Module), _wrappers(), strict=True):
        if isinstance(module, kind):
            return wrapper(module, dtype, float(momentum))
    found = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
    raise ValueError(f"found {found}, no Flax module; give an instance of an nnx.Module or a linen.Module")


@functools.cache
def _wrappers() -> tuple[type, type]:
    """The NNX and the Linen wrapper: made on demand, since their base classes need flax."""
    from flax import linen, nnx

    class FakeQuantizedNNX(nnx.Module):
        def __init__(self, module: Any, dtype: Any, momentum: float) -> None:
            self.module, self.dtype, self.momentum, self.use_running_average = module, dtype, momentum, False
            self.low, self.high = (nnx.BatchStat(jnp.zeros((), jnp.float32)) for _ in range(2))

        def __call__(self, *args: Any, use_running_average: bool | None = None, **kwargs: Any) -> jax.Array:
            output = _output(self.module, args, kwargs, use_running_average)
            if not (self.use_running_average if use_running_average is None else use_running_average):
                self.low[...], self.high[...] = _follow(output, self.low[...], self.high[...], self.momentum)
            return fake_quantize(output, self.low[...], self.high[...], self.dtype)

        def set_view(self, use_running_average: bool | None = None) -> None:
            """Set the mode; `nnx.view` calls this."""
            self.use_running_average = self.use_running_average if use_running_average is None else use_running_average

    class FakeQuantized(linen.Module):
        module: Any
        dtype: Dtype
        momentum: float
        use_running_average: bool | None = None

        @linen.compact
        def __call__(self, *args: Any, use_running_average: bool | None = None, **kwargs: Any) -> jax.Array:
            stored = linen.merge_param("use_running_average", self.use_running_average, use_running_average)
            output = _output(self.module, args, kwargs, use_running_average)
            low, high = (self.variable("batch_stats", n, jnp.zeros, (), jnp.float32) for n in ("low", "high"))
            if not stored and not self.is_initializing():
                low.value, high.value = _follow(output, low.value, high.value, self.momentum)
            return fake_quantize(output, low.value, high.value, self.dtype)

    return FakeQuantizedNNX, FakeQuantized


def _output(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], use_running_average: bool | None) -> jax.Array:
    """Call the wrapped module, in the mode of the call where it takes one, and refuse what cannot be quantized."""
    if use_running_average is not None and "use_running_average" in inspect.signature(module.__call__).parameters:
        kwargs = {**kwargs, "use_running_average": use_running_average}
    output = module(*args, **kwargs)
    if not isinstance(output, Array) or not jnp.issubdtype(output.dtype, jnp.floating):
        found = getattr(output, "dtype", type(output).__name__)
        raise ValueError(f"{type(module).__name__} gave {found}; wrap a module whose output is one float array")
    return jnp.asarray(output)


def _follow(output: jax.Array, low: jax.Array, high: jax.Array, momentum: float) -> tuple[jax.Array, jax.Array]:
    """Move a range towards that of a batch; the first batch sets it, one that is not finite leaves it."""
    batch = jax.lax.stop_gradient(output).astype(jnp.float32)
    # Of no values at all, the extremes are infinite.
    batch_low, batch_high = batch.min(initial=jnp.inf), batch.max(initial=-jnp.inf)
    finite = jnp.isfinite(batch_low) & jnp.isfinite(batch_high)
    keep = jnp.where(jnp.logical_or(low, high), momentum, 0.0)
    low, high = (jnp.where(finite, keep * a + (1 - keep) * b, a) for a, b in ((low, batch_low), (high, batch_high)))
    return low, high


def _lowest_level(dtype: str) -> int:
    if dtype not in ("int8", "uint8"):
        raise ValueError(f"dtype={dtype!r}; give 'int8' or 'uint8'")
    return -128 if dtype == "int8" else 0
