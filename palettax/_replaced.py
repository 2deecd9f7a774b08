"""Another value for a name of someone else's, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def replaced(module: ModuleType | type, name: str, value: Any) -> Iterator[None]:
    """Another value for a name in a module, or in a class, until the block ends.

    Args:
        module: it.
        name: of something in it.
        value: what to put there.
    """
    original = vars(module)[name]
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
