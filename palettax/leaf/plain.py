"""The forms of a palettized weight that the adapters hand on, and the refusal of the others."""

from __future__ import annotations

import numpy as np

from palettax.leaf import PalettizedArray, has_levels

_LEVELS = (np.dtype(np.int8), np.dtype(np.uint8))


def check_plain(name: str, leaf: PalettizedArray, *, blocked_scale: bool) -> None:
    """Refuse what torch's buffers and Core ML's tables here do not hold.

    Args:
        name: of the leaf, for messages.
        leaf: a palettized weight.
        blocked_scale: a scale may have any blocks, not only those that torch's buffers can say.

    Raises:
        ValueError: the leaf has kept values, a table of float8, or a scale in blocks that is not allowed.
    """
    if leaf.kept is not None:
        raise ValueError(
            f"{name}: it has kept values, and weights outside a table are handed on only where they are zero; "
            "expand it with px.depalettize, or build it without them"
        )
    if leaf.lut.dtype != leaf.dtype and np.dtype(leaf.lut.dtype) not in _LEVELS:
        raise ValueError(
            f"{name}: its lut holds {leaf.lut.dtype} levels, and only int8, uint8 and tables in the weight's own "
            f"{leaf.dtype} are handed on; expand it with px.depalettize, or build it with one of those"
        )
    if leaf.scale is not None and not blocked_scale and not _has_buffer(leaf, leaf.scale.shape):
        raise ValueError(
            f"{name}: its scale {tuple(leaf.scale.shape)} has blocks along the weight {leaf.shape}, and torch's "
            "buffers hold one that broadcasts; expand it with px.depalettize, or build it with one scale per channel"
        )


def _has_buffer(leaf: PalettizedArray, scale: tuple[int, ...]) -> bool:
    """Whether torch has buffers for the scale: behind a float table it broadcasts, or tables of levels carry it."""
    if broadcasts(scale, leaf.shape):
        return True
    return has_levels(leaf) and all(n % s == 0 for n, s in zip(leaf.indices.shape, scale, strict=True))


def broadcasts(scale: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a scale of the weight's rank broadcasts to the weight.

    Args:
        scale: its shape.
        shape: that of the weight.

    Returns:
        The answer.

    Example:
        >>> broadcasts((4, 1), (4, 6)), broadcasts((2, 1), (4, 6))
        (True, False)
    """
    return all(blocks in (1, length) for blocks, length in zip(scale, shape, strict=True))
