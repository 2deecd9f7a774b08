"""Names of the leaves of a tree, and which of them are one array."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import GetAttrKey

Path = tuple[Any, ...]


def leaf_name(path: Path, separator: str = "/") -> str:
    """The keys on the way to a leaf, joined."""
    return jax.tree_util.keystr(path, simple=True, separator=separator)


def leaf_names(paths: Sequence[Path], separator: str = "/") -> list[str]:
    """The names of all leaves of a tree; the wrapper a Flax `Variable` puts around its one array has no name."""
    children = Counter(path[:-1] for path in paths if path)
    return [
        leaf_name(path[:-1] if _is_wrapper(path) and children[path[:-1]] == 1 else path, separator) for path in paths
    ]


def _is_wrapper(path: Path) -> bool:
    return len(path) > 1 and path[-1] == GetAttrKey("value")


def identity_of(leaf: Any) -> Any:
    """Equal for leaves that are one array; NumPy makes a new object for each view of the same memory."""
    if isinstance(leaf, np.ndarray):
        return leaf.__array_interface__["data"][0], leaf.shape, leaf.strides, leaf.dtype.str
    return id(leaf)
