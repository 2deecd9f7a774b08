"""Dotted names: nested dicts flattened to them, and the nearest ones to a name that is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def flatten_names(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Flatten nested mappings to one dict keyed by dotted names.

    Args:
        tree: mappings of mappings; whatever is not a mapping is a leaf. A flat dict of dotted names stays as it is.

    Returns:
        The leaves by dotted name, in order.

    Raises:
        ValueError: two leaves have one name.

    Example:
        >>> flatten_names({"conv": {"weight": 1}, "dense.bias": 2})
        {'conv.weight': 1, 'dense.bias': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = flatten_names(value) if isinstance(value, Mapping) else None
        named = {str(key): value} if inner is None else {f"{key}.{name}": leaf for name, leaf in inner.items()}
        for name, leaf in named.items():
            if name in flat:
                raise ValueError(f"{name}: two leaves have this name; rename one")
            flat[name] = leaf
    return flat


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about a wrong name: the right names that look most like it.

    Args:
        name: the wrong name.
        names: the right ones.

    Returns:
        A clause without a full stop.

    Example:
        >>> nearest("dense.wieght", ["dense.weight", "conv.bias"])
        "did you mean 'dense.weight'?"
    """
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"the names are {', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''}"


def owner_and_attribute(name: str) -> tuple[str, str]:
    """Split `block.0.weight` into the module `block.0` and its attribute `weight`."""
    module, _, attribute = name.rpartition(".")
    return module, attribute
