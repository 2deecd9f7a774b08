"""Recurrent layers, which keep a list of their weights that parametrizations do not reach."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils import parametrize


def follow_parametrizations(model: torch.nn.Module) -> None:
    """Let every recurrent layer that is parametrized compute with what its parametrizations give.

    Args:
        model: changed in place.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.RNNBase) and parametrize.is_parametrized(module):
            module.register_forward_pre_hook(_gather)
            module.register_forward_hook(_release)


def forget_parametrizations(model: torch.nn.Module) -> None:
    """Undo `follow_parametrizations`.

    Args:
        model: changed in place.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.RNNBase):
            for hooks, ours in ((module._forward_pre_hooks, _gather), (module._forward_hooks, _release)):
                for key in [key for key, hook in hooks.items() if hook is ours]:
                    del hooks[key]
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def _gather(module: Any, args: Any) -> None:
    module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def _release(module: Any, args: Any, output: Any) -> None:
    # Values in a graph cannot be copied with the module.
    module._flat_weights = [
        weight if weight is None or weight.is_leaf else weight.detach() for weight in module._flat_weights
    ]
