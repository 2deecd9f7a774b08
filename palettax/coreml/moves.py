"""What a program does to a weight before it computes with it, done to the table instead, and undone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from palettax.leaf import PalettizedArray
from palettax.leaf.reshaping import fewest_blocks

Leaf = TypeVar("Leaf", PalettizedArray, np.ndarray)
Move = tuple[str, list[int]]
"""What is done to a weight: "transpose" with the order of its axes, "reverse" with some of them, or "reshape" with its
shape before, and behind that the new one."""


def moved(leaf: Leaf, move: Move) -> Leaf:
    """A weight after a move.

    Args:
        leaf: before it, palettized or dense.
        move: what is done.

    Raises:
        ValueError: a table would be torn apart.

    Example:
        >>> leaf = PalettizedArray(np.ones((1, 1, 2, 1), np.float32), np.zeros((2, 3), np.uint8), nbits=1)
        >>> moved(leaf, ("transpose", [1, 0])).shape
        (3, 2)
    """
    name, numbers = move
    if name == "transpose":
        return leaf.transpose(*numbers)
    if name == "reshape":
        return leaf.reshape(*numbers[leaf.ndim :])
    for axis in numbers:
        leaf = leaf.take(np.arange(leaf.shape[axis])[::-1], axis)
    return leaf


def unmoved(leaf: PalettizedArray, moves: Sequence[Move]) -> PalettizedArray:
    """A palettized weight before all moves; of equal tables beside each other that a reshape left, one remains.

    Args:
        leaf: after them.
        moves: what was done, in order.

    Example:
        >>> leaf = PalettizedArray(np.ones((1, 1, 2, 1), np.float32), np.zeros((2, 3), np.uint8), nbits=1)
        >>> moves = [("transpose", [1, 0]), ("reshape", [3, 2, 6])]
        >>> unmoved(moved(moved(leaf, moves[0]), moves[1]), moves).shape
        (2, 3)
    """
    for name, numbers in reversed(moves):
        if name == "transpose":
            leaf = leaf.transpose(*np.argsort(numbers).tolist())
        elif name == "reverse":
            leaf = moved(leaf, (name, numbers))
        else:
            leaf = leaf.reshape(*numbers[: -leaf.ndim])
    if all(name != "reshape" for name, _ in moves):
        return leaf
    scale = None if leaf.scale is None else fewest_blocks(np.asarray(leaf.scale), leaf.ndim)
    return dataclasses.replace(leaf, lut=fewest_blocks(np.asarray(leaf.lut), leaf.ndim), scale=scale)
