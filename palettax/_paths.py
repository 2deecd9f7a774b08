"""Names of the leaves of a tree."""

from __future__ import annotations

from typing import Any

import jax
from jax.tree_util import GetAttrKey


def leaf_name(path: tuple[Any, ...]) -> str:
    """The keys on the way to a leaf, joined by "/"; the wrapper a Flax `Variable` puts around its array has no name."""
    if path and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")
