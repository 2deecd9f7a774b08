"""Guards for passes of coremltools 9.0 that fail at sound programs, or get them wrong without a word."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

from palettax._replaced import replaced
from palettax.coreml.package import Op


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Keep the passes from those ops, until the block ends."""
    with contextlib.ExitStack() as stack:
        for name, method, fails_at in _GUARDED:
            owner = type(PASS_REGISTRY[f"common::{name}"])
            stack.enter_context(replaced(owner, method, _guarded(vars(owner)[method], fails_at)))
        owner: Any = type(PASS_REGISTRY["common::const_deduplication"])
        equal = staticmethod(functools.partial(_equal_ops, owner.find_constexprs))
        stack.enter_context(replaced(owner, "find_constexprs", equal))
        yield


def _equal_ops(find: Callable[..., dict[Any, Any]], blocks: Any) -> dict[Any, Any]:
    """Ops to merge, without those of two results, of which one would be merged and the other left without its op."""
    return {var: others for var, others in find(blocks).items() if len(var.op.outputs) == 1}


def _has_a_table(conv: Op, *_: Any) -> bool:
    """A bias behind a transpose is added to weights that are not there yet."""
    return conv.op_type in ("conv", "conv_transpose") and conv.weight.val is None


def _subtracts_what_others_read(_: Op, add: Op) -> bool:
    """What is subtracted is negated in place, for all who read it."""
    return add.op_type == "sub" and add.y.val is not None and len(add.y.child_ops) > 1


def _subtracts_the_product(_: Op, add: Op, *__: Any) -> bool:
    """A constant less a product becomes the product less the constant."""
    return add.op_type == "sub" and add.x.val is not None


_GUARDED: tuple[tuple[str, str, Callable[..., bool]], ...] = (
    ("fuse_conv_bias", "_try_to_transform_transpose_pattern", _has_a_table),
    ("fuse_conv_bias", "_try_to_transform", _subtracts_what_others_read),
    ("fuse_matmul_weight_bias", "_try_to_transform", _subtracts_the_product),
)
"""A pass, its method that fuses two ops or says that it did not, and at which ops it fails."""


def _guarded(method: Any, fails_at: Callable[..., bool]) -> Any:
    static = isinstance(method, staticmethod)
    original = method.__func__ if static else method

    @functools.wraps(original)
    def call(*arguments: Any) -> Any:
        ops = arguments if static else arguments[1:]
        return False if fails_at(*ops) else original(*arguments)

    return staticmethod(call) if static else call
