"""The first import of `palettax.coreml`: coremltools without its import-time noise, or which extra to install."""

from __future__ import annotations

import logging
import warnings

from palettax._extras import require

require("torch", "coreml")
_logger = logging.getLogger("coremltools")
_level = _logger.level
# It logs a line for each of Apple's runtime libraries that is absent and each untested version that is present.
_logger.setLevel(logging.ERROR)
try:
    with warnings.catch_warnings():
        # Its docstrings hold escapes that Python deprecates, which warn whenever they are compiled anew.
        warnings.filterwarnings("ignore", "invalid escape sequence")
        require("coremltools", "coreml")
finally:
    _logger.setLevel(_level)
