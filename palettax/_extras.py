"""Optional dependencies: import one, or say which extra brings it."""

from __future__ import annotations

import importlib
from types import ModuleType


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
