"""The first import of `palettax.coreml`: coremltools without its import-time noise, or which extra to install."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from palettax._extras import require


def import_quietly(module: str) -> Any:
    """A module of coremltools, imported without its noise."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    # It logs a line for each of Apple's runtime libraries that is absent and each untested version that is present.
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Its docstrings hold escapes that Python deprecates, which warn whenever they are compiled anew.
            warnings.filterwarnings("ignore", ".*invalid escape sequence")
            return require(module, "coreml")
    finally:
        logger.setLevel(level)


import_quietly("coremltools")


def from_torch(*_: Any, **__: Any) -> Any:
    """Stands for the real one where there is no torch.

    Raises:
        ImportError: always; it says which extra to install.
    """
    require("torch", "torch")
