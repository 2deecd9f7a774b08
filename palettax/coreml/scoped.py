"""Settings of coremltools that hold for one conversion and are then put back."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
from coremltools.converters.mil.frontend.torch import ops
from coremltools.converters.mil.mil import Builder
from coremltools.converters.mil.mil.passes import pass_pipeline

_HARMLESS = (
    (ResourceWarning, "Implicitly cleaning up <TemporaryDirectory"),
    (UserWarning, r"(Input|Output), '.*', of the source model, has been renamed"),
    (DeprecationWarning, r"Function _TORCH_OPS_REGISTRY\.\w+ is deprecated"),
    (UserWarning, r"The tensor attributes? self\.[\w.]*_flat_weights"),
    (FutureWarning, r".*isinstance\(treespec, LeafSpec\).* is deprecated"),
    (DeprecationWarning, r".*torch\.jit\.\w+.* is (deprecated|not supported)"),
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, the log below errors, and the warnings that a sound conversion gives."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        for category, message in _HARMLESS:
            warnings.filterwarnings("ignore", message, category)
        for module, name in ((ops, "_tqdm"), (pass_pipeline, "tqdm")):
            stack.enter_context(_replaced(module, name, functools.partial(getattr(module, name), disable=True)))
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def casts_of_length_one() -> Iterator[None]:
    """Let a traced size, a constant of shape (1,), become a Python number.

    coremltools 9.0 calls `int(array([n]))` for it, which NumPy 2.4 made an error.
    """
    original = ops._cast

    def cast(context: Any, node: Any, dtype: type, dtype_name: str) -> None:
        source: Any = ops._get_inputs(context, node, expected=1)[0]
        if source.can_be_folded_to_const() and np.ndim(source.val) and np.size(source.val) == 1:
            builder: Any = Builder
            context.add(builder.const(val=dtype(np.asarray(source.val).item()), name=node.name), node.name)
        else:
            original(context, node, dtype, dtype_name)

    with _replaced(ops, "_cast", cast):
        yield


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Another value for a name in a module, until the block ends."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
