"""The weights of a file, dense or palettized, with what they cost and what form they are in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from palettax._commands.files import PACKAGE, kind_of, named_leaves, read_tree
from palettax._extras import require
from palettax.leaf import PalettizedArray, as_numpy, depalettize, has_levels, is_palettized


class Weight(NamedTuple):
    """One weight of a file.

    Attributes:
        leaf: a palettized array, or the values.
        form: it in words.
        nbytes: what is stored for it.
    """

    leaf: PalettizedArray | np.ndarray
    form: str
    nbytes: int

    def values(self) -> np.ndarray:
        """The weight as a dense array."""
        return np.asarray(depalettize(as_numpy(self.leaf)))


def read_weights(path: Path) -> dict[str, Weight]:
    """Every weight of a file by name; of a package, the float constants by the names of their ops."""
    if kind_of(path) != PACKAGE:
        return {name: _weight(leaf) for name, leaf in named_leaves(read_tree(path)[0]).items()}
    require("palettax.coreml", "coreml")
    from palettax._commands.package import package_weights

    return {name: _weight(*found) for name, found in package_weights(path).items()}


def _weight(leaf: Any, form: str = "", nbytes: int | None = None) -> Weight:
    return Weight(leaf, form or form_of(leaf), leaf.nbytes if nbytes is None else nbytes)


def form_of(leaf: Any) -> str:
    """The form of a leaf in words.

    Example:
        >>> lut = np.zeros((2, 1, 16, 1), np.int8)
        >>> scale = np.ones((1, 1), np.float32)
        >>> form_of(PalettizedArray(lut, np.zeros((4, 3), np.uint8), scale, nbits=4, dtype=np.float32))
        '4 bits, 2 luts, int8'
    """
    if not is_palettized(leaf):
        return "dense"
    words = [bits_and_tables(leaf.nbits, leaf.groups)]
    if leaf.vector_size > 1:
        words.append(f"vectors of {leaf.vector_size}")
    if has_levels(leaf):
        words.append(str(leaf.lut.dtype))
    elif leaf.scale is not None:
        words.append(f"{leaf.scale.size} scale{'s' * (leaf.scale.size > 1)}")
    if leaf.mask is not None:
        share = 1 - float(np.asarray(leaf.mask).mean())
        words.append(f"{'pruned' if leaf.kept is None else 'kept dense'} {share:.0%}")
    return ", ".join(words)


def bits_and_tables(nbits: int, groups: tuple[int, ...]) -> str:
    """How wide an index is, and how many tables there are.

    Example:
        >>> bits_and_tables(1, (1, 1)), bits_and_tables(4, (8, 1))
        ('1 bit, 1 lut', '4 bits, 8 luts')
    """
    tables = math.prod(groups)
    return f"{nbits} bit{'s' * (nbits > 1)}, {tables} lut{'s' * (tables > 1)}"
