"""How much of a weight one lookup table serves."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Shaped

from palettax._typing import Array


@dataclasses.dataclass(frozen=True)
class Granularity:
    """The shape of the blocks that share a lookup table, and how many weights share an index.

    The default is one table for the whole tensor, one index per weight.

    Attributes:
        group_size: channels that share a table: consecutive slices along `channel_axis`. None for all of them.
        channel_axis: the axis that is cut into groups; negative counts from the end. Output channels are axis 0 of
            torch's weights and axis -1 of Flax's kernels.
        vector_size: weights per index (coremltools' `cluster_dim`).
        vector_axis: the axis along which those weights are neighbours; None for `channel_axis`.

    Example:
        >>> import palettax as px
        >>> px.Granularity(group_size=16, channel_axis=-1).groups((64, 48))
        (1, 3)
    """

    group_size: int | None = None
    channel_axis: int = 0
    vector_size: int = 1
    vector_axis: int | None = None

    def __post_init__(self) -> None:
        for name in ("group_size", "vector_size"):
            value = getattr(self, name)
            if value is None and name == "group_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name}={value!r}; it must be a positive integer")
        if isinstance(self.channel_axis, bool) or not isinstance(self.channel_axis, int | np.integer):
            raise ValueError(f"channel_axis={self.channel_axis!r}; it must be the number of an axis")

    def groups(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Tables per axis for a weight of this shape.

        Raises:
            ValueError: `channel_axis` is no axis of it, or `group_size` does not divide that axis.
        """
        if self.group_size is None:
            return (1,) * len(shape)
        if not -len(shape) <= self.channel_axis < len(shape):
            raise ValueError(f"channel_axis={self.channel_axis} is not an axis of shape {shape}")
        axis = self.channel_axis % len(shape)
        if shape[axis] % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide the {shape[axis]} channels on axis {axis} of {shape}; "
                f"sizes that do: {', '.join(map(str, _near_divisors(shape[axis], self.group_size)))}"
            )
        return tuple(shape[a] // self.group_size if a == axis else 1 for a in range(len(shape)))


PER_TENSOR = Granularity()


def _near_divisors(length: int, wanted: int) -> list[int]:
    """The divisors of an axis nearest to a size, in order: up to two below and two above."""
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    return [d for d in divisors if d < wanted][-2:] + [d for d in divisors if d > wanted][:2]


def split_blocks(weights: Shaped[Array, "*shape"], groups: tuple[int, ...]) -> Shaped[Array, "blocks n"]:
    """Cut a weight into equal blocks, one row each, in row-major order of the blocks.

    Args:
        weights: (*shape).
        groups: blocks per axis; each divides its axis.
    """
    rank = weights.ndim
    cut = weights.reshape([d for g, length in zip(groups, weights.shape, strict=True) for d in (g, length // g)])
    return cut.transpose([*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]).reshape(math.prod(groups), -1)


def merge_blocks(
    rows: Shaped[Array, "blocks n"], groups: tuple[int, ...], shape: tuple[int, ...]
) -> Shaped[Array, "*shape"]:
    """The inverse of `split_blocks`: `merge_blocks(split_blocks(x, g), g, x.shape) == x`."""
    rank = len(shape)
    blocks = rows.reshape([*groups, *(length // g for g, length in zip(groups, shape, strict=True))])
    return blocks.transpose([a for i in range(rank) for a in (i, rank + i)]).reshape(shape)
