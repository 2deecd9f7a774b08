"""How much of a weight one lookup table serves."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Granularity:
    """The shape of the blocks that share a lookup table, and how many weights share an index.

    The default is one table for the whole tensor, one index per weight.

    Attributes:
        group_size: channels that share a table: consecutive slices along `channel_axis`. None for all of them. A tuple
            cuts several axes at once, one size for each axis of `channel_axis`.
        channel_axis: the axis, or axes, cut into groups; negative counts from the end. None chooses per leaf: the
            output channels, or the input channels where the sizes do not fit those. In a leaf called `kernel`, as
            Flax calls them, outputs are axis -1 and inputs axis -2; in every other leaf, as in torch, 0 and 1.
        vector_size: weights per index (coremltools' `cluster_dim`). It divides the group: no vector straddles two.
        vector_axis: the axis along which those weights are neighbours; None for `channel_axis`, the first if several.

    Raises:
        ValueError: a value of another type, or sizes and axes that do not pair up.

    Example:
        >>> import palettax as px
        >>> px.Granularity(group_size=16, channel_axis=-1).groups((64, 48))
        (1, 3)
        >>> px.Granularity(group_size=(16, 8), channel_axis=(0, 1)).groups((64, 48))
        (4, 6)
        >>> px.Granularity(group_size=16, channel_axis=None).groups((100, 48), "dense/kernel")
        (1, 3)
    """

    group_size: int | tuple[int, ...] | None = None
    channel_axis: int | tuple[int, ...] | None = 0
    vector_size: int = 1
    vector_axis: int | None = None

    def __post_init__(self) -> None:
        sizes, axes = self.group_size, self.channel_axis
        if sizes is not None and not all(_is_integer(size) and size > 0 for size in _as_tuple(sizes)):
            raise ValueError(f"group_size={sizes!r}; it must be a positive integer, a tuple of them, or None")
        if axes is not None and not all(map(_is_integer, _as_tuple(axes))):
            raise ValueError(f"channel_axis={axes!r}; it must be the number of an axis, a tuple of them, or None")
        if not _is_integer(self.vector_size) or self.vector_size < 1:
            raise ValueError(f"vector_size={self.vector_size!r}; it must be a positive integer")
        if self.vector_axis is not None and not _is_integer(self.vector_axis):
            raise ValueError(f"vector_axis={self.vector_axis!r}; it must be the number of an axis, or None")
        paired = isinstance(sizes, tuple) == isinstance(axes, tuple) and _as_tuple(axes)
        if not paired or (sizes is not None and len(_as_tuple(sizes)) != len(_as_tuple(axes))):
            raise ValueError(
                f"group_size={sizes!r} with channel_axis={axes!r}; give one size per axis, such as "
                "group_size=(16, 8) with channel_axis=(0, 1)"
            )
        if len(set(_as_tuple(axes))) < len(_as_tuple(axes)):
            raise ValueError(f"channel_axis={axes!r} names an axis twice; name each once")

    def groups(self, shape: tuple[int, ...], name: str = "") -> tuple[int, ...]:
        """Tables per axis for a weight of this shape.

        Args:
            shape: of the weight.
            name: of the leaf, its keys joined by "/" or "."; what `channel_axis=None` goes by.

        Returns:
            One count per axis. Each divides the axis, and along the axis of the vectors the number of vectors too.

        Raises:
            ValueError: an axis that the shape does not have, or a size that does not divide its axis.
        """
        counts = [1] * len(shape)
        if self.group_size is not None:
            for size, axis in zip(_as_tuple(self.group_size), self._channel_axes(shape, name), strict=True):
                if shape[axis] % size:
                    raise ValueError(
                        f"group_size={size} does not divide the {shape[axis]} channels on axis {axis} of {shape}; "
                        f"sizes that do: {_near_divisors(shape[axis], size)}"
                    )
                counts[axis] = max(shape[axis] // size, 1)
        axis = self.vector_axis_of(shape, name)
        if axis is not None and (group := shape[axis] // counts[axis]) % self.vector_size:
            raise ValueError(
                f"vectors of {self.vector_size} would straddle the groups of {group} on axis {axis} of {shape}; "
                f"group sizes that hold whole ones: {_near_divisors(shape[axis], group, self.vector_size)}"
            )
        return tuple(counts)

    def vector_axis_of(self, shape: tuple[int, ...], name: str = "") -> int | None:
        """The axis, counted from the front, that the vectors of a weight of this shape lie along.

        Args:
            shape: of the weight.
            name: of the leaf, as in `groups`.

        Returns:
            The axis; None for scalars (`vector_size=1`).

        Raises:
            ValueError: the shape does not have the axis, or `vector_size` does not divide it.

        Example:
            >>> import palettax as px
            >>> px.Granularity(vector_size=2, vector_axis=-1).vector_axis_of((64, 48))
            1
        """
        if self.vector_size == 1:
            return None
        if self.vector_axis is None:
            axis = self._channel_axes(shape, name)[0]
        else:
            axis = _from_the_front("vector_axis", self.vector_axis, shape)
        if shape[axis] % self.vector_size:
            raise ValueError(
                f"vector_size={self.vector_size} does not divide the {shape[axis]} weights on axis {axis} of {shape}; "
                f"sizes that do: {_near_divisors(shape[axis], self.vector_size)}"
            )
        return axis

    def _channel_axes(self, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
        """The channel axes, counted from the front."""
        if self.channel_axis is None:
            return (self._chosen_axis(shape, name),)
        axes = tuple(_from_the_front("channel_axis", axis, shape) for axis in _as_tuple(self.channel_axis))
        if len(set(axes)) < len(axes):
            raise ValueError(f"channel_axis={self.channel_axis} names an axis of {shape} twice; name each once")
        return axes

    def _chosen_axis(self, shape: tuple[int, ...], name: str) -> int:
        """The output channels where the sizes fit them, else the input channels."""
        axes = channel_axes(name, len(shape))
        candidates = {kind: a for kind, a in zip(("output", "input"), axes, strict=True) if 0 <= a < len(shape)}
        if not candidates:
            raise ValueError(f"channel_axis=None: shape {shape} has no channels to choose from; leave it dense")
        for axis in candidates.values():
            if self._fits(shape, axis):
                return axis
        if self.group_size is None:
            wanted, what, steps = self.vector_size, f"vector_size={self.vector_size}", [1] * len(candidates)
        else:
            wanted, steps = _as_tuple(self.group_size)[0], [self._step(shape, axis) for axis in candidates.values()]
            what = f"group_size={wanted}" + (f", in vectors of {max(steps)}," if max(steps) > 1 else "")
        found = [
            f"the {shape[axis]} {kind} channels on axis {axis} ({_near_divisors(shape[axis], wanted, step)} would)"
            for (kind, axis), step in zip(candidates.items(), steps, strict=True)
        ]
        raise ValueError(f"{what} does not divide {' or '.join(found)} of {shape}; use one of those sizes")

    def _fits(self, shape: tuple[int, ...], axis: int) -> bool:
        """Whether groups and vectors come out even when this is the channel axis."""
        size = shape[axis] if self.group_size is None else _as_tuple(self.group_size)[0]
        return shape[axis] % max(size, 1) == 0 and size % self._step(shape, axis) == 0

    def _step(self, shape: tuple[int, ...], axis: int) -> int:
        """What a group along an axis is a multiple of: the vector, when it lies along that axis."""
        along = self.vector_axis is None or self.vector_axis % len(shape) == axis
        return self.vector_size if along else 1


def channel_axes(name: str, rank: int) -> tuple[int, int]:
    """The axes of output and input channels by the conventions of Flax (`kernel`) and torch (every other name)."""
    return (rank - 1, rank - 2) if re.split(r"[/.]", name)[-1] == "kernel" else (0, 1)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _from_the_front(argument: str, axis: int, shape: tuple[int, ...]) -> int:
    """The axis counted from the front; refuses one that the shape does not have."""
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{argument}={axis} is not an axis of shape {shape}; it has {len(shape)}")
    return int(axis) % len(shape)


def _near_divisors(length: int, wanted: int, multiple: int = 1) -> str:
    """The multiples of a number that divide an axis, nearest to a size: up to two below and two above."""
    divisors = [d for d in range(multiple, length + 1, multiple) if length % d == 0]
    near = [d for d in divisors if d < wanted][-2:] + [d for d in divisors if d > wanted][:2]
    return ", ".join(map(str, near)) or "none"


PER_TENSOR = Granularity()
