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


def difference(treedef: Any, tree: Any) -> str:
    """How the leaves of a tree differ from those of a structure, by name: its error messages print whole arrays.

    Args:
        treedef: the structure that is wanted.
        tree: of another one.

    Example:
        >>> difference(jax.tree.structure({"a": 0, "b": 0}), {"a": 0, "c": 0})
        "'b' is missing, 'c' is not known"
    """
    wanted = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    want, have = ([leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(t)[0]] for t in (wanted, tree))
    missing, unknown = [name for name in want if name not in have], [name for name in have if name not in want]
    parts = [f"{_listed(missing)} missing"] * bool(missing) + [f"{_listed(unknown)} not known"] * bool(unknown)
    return ", ".join(parts) or "the leaves have the same names, in containers of other types"


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _is_wrapper(path: Path) -> bool:
    return len(path) > 1 and path[-1] == GetAttrKey("value")


def identity_of(leaf: Any) -> Any:
    """Equal for leaves that are one array; NumPy makes a new object for each view of the same memory."""
    if isinstance(leaf, np.ndarray):
        return leaf.__array_interface__["data"][0], leaf.shape, leaf.strides, leaf.dtype.str
    return id(leaf)
