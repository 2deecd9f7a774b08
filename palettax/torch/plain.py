"""The forms of a palettized weight that the adapters hand on, and the refusal of the others."""

from __future__ import annotations

from palettax.leaf import PalettizedArray


def check_plain(name: str, leaf: PalettizedArray, *, blocked_scale: bool) -> None:
    """Refuse what torch's buffers and Core ML's tables here do not hold.

    Args:
        name: of the leaf, for messages.
        leaf: a palettized weight.
        blocked_scale: a scale may have blocks, not only lengths of 1 and of the whole axis.

    Raises:
        ValueError: the leaf has a mask, a table of levels, or a scale in blocks that is not allowed.
    """
    if leaf.mask is not None:
        raise ValueError(
            f"{name}: it has a mask, and only weights that all lie on a table are handed on; expand it with "
            "px.depalettize, or build it without a mask"
        )
    if leaf.lut.dtype != leaf.dtype:
        raise ValueError(
            f"{name}: its lut holds {leaf.lut.dtype} levels, and only tables in the weight's own {leaf.dtype} are "
            "handed on; expand it with px.depalettize, or build it without quantizing its lut"
        )
    if leaf.scale is not None and not blocked_scale and not broadcasts(leaf.scale.shape, leaf.shape):
        raise ValueError(
            f"{name}: its scale {tuple(leaf.scale.shape)} has blocks along the weight {leaf.shape}, and torch's "
            "buffers hold one that broadcasts; expand it with px.depalettize, or build it with one scale per channel"
        )


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
