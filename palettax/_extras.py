"""Optional dependencies: import one, or say which extra brings it; and change one for a while."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: the module's name.
        extra: the extra of palettax that installs it.

    Returns:
        The module.

    Raises:
        ImportError: it is not installed; the message names the extra.

    Example:
        >>> require("json", "cli").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Of "a.b" it may be "a" that is missing.
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ImportError(f"{module} is not installed; run: pip install 'palettax[{extra}]'", name=module) from error


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
