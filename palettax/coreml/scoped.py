"""Settings of coremltools that hold for one conversion and are then put back."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Iterator

from coremltools.converters.mil.mil.passes import pass_pipeline

from palettax._replaced import replaced
from palettax.coreml.mended import mended

_TORCH_OPS = "coremltools.converters.mil.frontend.torch.ops"
"""Which it has imported if there is torch."""
_HARMLESS = (
    (ResourceWarning, "Implicitly cleaning up <TemporaryDirectory"),
    (UserWarning, r"(Input|Output), '.*', of the source model, has been renamed"),
    (DeprecationWarning, r"Function _TORCH_OPS_REGISTRY\.\w+ is deprecated"),
    (UserWarning, r"The tensor attributes? self\.[\w.]*_flat_weights"),
    (FutureWarning, r".*isinstance\(treespec, LeafSpec\).* is deprecated"),
    (UserWarning, r"torch\.quantize_per_tensor, .* are deprecated"),
    (DeprecationWarning, r".*torch\.jit\.\w+.* is (deprecated|not supported)"),
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, the log below errors, and the warnings that a sound conversion gives; guard its passes."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        for category, message in _HARMLESS:
            warnings.filterwarnings("ignore", message, category)
        for module, name in ((sys.modules.get(_TORCH_OPS), "_tqdm"), (pass_pipeline, "tqdm")):
            if module is not None:
                stack.enter_context(replaced(module, name, functools.partial(getattr(module, name), disable=True)))
        stack.enter_context(mended())
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
