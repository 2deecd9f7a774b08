"""Where the palettes of a model in training sit: at parameters, or behind the pruning of torch.nn.utils.prune."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch.nn.utils import parametrize, prune

from palettax.leaf import PalettizedArray
from palettax.torch.differentiable import Palettized
from palettax.torch.parameters import is_being_pruned

_PALETTE = "_palette"
"""What the name of a palette adds to that of a weight that is pruned."""


class Palette(NamedTuple):
    """A palette of a model, and the parameter it is of.

    Attributes:
        names: the dotted names of the weight: several of one that is tied.
        module: the palette.
        original: the parameter.
        mask: of a weight that is being pruned, what is left of it; None of others.
    """

    names: list[str]
    module: Palettized
    original: torch.nn.Parameter
    mask: torch.Tensor | None

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    def step(self) -> None:
        """Count a step."""
        self.module.step(self.original, self.mask)

    def enable(self) -> None:
        """Start now."""
        self.module.enable(self.original, self.mask)

    def palettized(self) -> PalettizedArray:
        """The weight as it is stored."""
        return self.module.palettized(self.original, self.mask)


def palettes_of(model: torch.nn.Module) -> list[Palette]:
    """The palettes of a model, that of a tied parameter once.

    Args:
        model: prepared, or a copy or a wrapper of one that is.
    """
    found: dict[int, Palette] = {}
    for path, owner in model.named_modules(remove_duplicate=False):
        for attribute, module, original, mask in _of_module(owner):
            palette = found.setdefault(id(module), Palette([], module, original, mask))
            palette.names.append(f"{path}.{attribute}" if path else attribute)
    return list(found.values())


def attach(palette: Palettized, owner: torch.nn.Module, attribute: str) -> None:
    """Let a module compute with a palette's values.

    Args:
        palette: of the parameter.
        owner: the module, changed in place.
        attribute: the name of the weight. If it is being pruned, the palette sees what is left of it.
    """
    palette.train(owner.training)
    if is_being_pruned(owner, attribute):
        _attach_behind_pruning(palette, owner, attribute)
        return
    _give_own_class(owner)
    parametrize.register_parametrization(owner, attribute, palette, unsafe=True)
    owner.register_load_state_dict_pre_hook(_TakeDense(attribute))
    # Pruning wants a parameter where the parametrization has a property, and finds it in the nick of time.
    owner.register_parameter = MethodType(_make_way_for_pruning, owner)  # pyright: ignore[reportAttributeAccessIssue]


def detach(model: torch.nn.Module) -> None:
    """Take all palettes off, and make the pruning behind them permanent.

    Args:
        model: changed in place.
    """
    for owner in list(model.modules()):
        for attribute, *_ in list(_of_module(owner)):
            if isinstance(getattr(owner, attribute + _PALETTE, None), Palettized):
                _detach_behind_pruning(owner, attribute)
            else:
                _remove_parametrization(owner, attribute)
            owner.__dict__.pop("register_parameter", None)
            for key, hook in list(owner._load_state_dict_pre_hooks.items()):
                if isinstance(getattr(hook, "hook", None), _TakeDense):
                    del owner._load_state_dict_pre_hooks[key]


def _give_own_class(owner: torch.nn.Module) -> None:
    """Set a parametrized module apart from its copies: they share the class that torch puts its properties on."""
    own = type(owner)
    if parametrize.is_parametrized(owner):
        owner.__class__ = type(own.__name__, own.__bases__, dict(vars(own)))  # pyright: ignore


def _remove_parametrization(owner: torch.nn.Module, attribute: str) -> None:
    """Put the parameter back in the place of the values that are made of it."""
    _give_own_class(owner)
    parametrize.remove_parametrizations(owner, attribute, leave_parametrized=False)


def _of_module(owner: torch.nn.Module) -> Iterator[tuple[str, Palettized, torch.nn.Parameter, torch.Tensor | None]]:
    """Attribute, palette, parameter and mask of every palette of one module."""
    if parametrize.is_parametrized(owner):
        for attribute, steps in owner.parametrizations.items():  # pyright: ignore
            for palette in steps:
                if isinstance(palette, Palettized):
                    yield attribute, palette, steps.original, None
    for name, palette in owner._modules.items():
        if isinstance(palette, Palettized) and name.endswith(_PALETTE):
            attribute = name.removesuffix(_PALETTE)
            # Once the pruning is made permanent there is a plain parameter again.
            pruned = f"{attribute}_orig" in owner._parameters
            yield (
                attribute,
                palette,
                getattr(owner, f"{attribute}_orig" if pruned else attribute),
                owner._buffers[f"{attribute}_mask"] if pruned else None,
            )


def _make_way_for_pruning(owner: torch.nn.Module, name: str, parameter: Any) -> None:
    """`register_parameter` of a module with palettes: `prune` calls it first, with the weight that it will mask."""
    attribute = name.removesuffix("_orig")
    waiting = _of_module(owner) if name != attribute else ()
    found = [(palette, original) for own, palette, original, _ in waiting if own == attribute]
    if not found:
        type(owner).register_parameter(owner, name, parameter)
        return
    palette, original = found[0]
    _remove_parametrization(owner, attribute)
    palette.recipe = palette.recipe.with_pruning()
    type(owner).register_parameter(owner, name, original)
    register = owner.register_forward_pre_hook

    def register_forward_pre_hook(hook: Callable[..., Any], **options: Any) -> Any:
        """Put the palette behind the hook that masks."""
        del owner.__dict__["register_forward_pre_hook"]
        handle = register(hook, **options)
        _attach_behind_pruning(palette, owner, attribute)
        return handle

    owner.register_forward_pre_hook = register_forward_pre_hook  # pyright: ignore[reportAttributeAccessIssue]


def _attach_behind_pruning(palette: Palettized, owner: torch.nn.Module, attribute: str) -> None:
    owner.add_module(attribute + _PALETTE, palette)
    owner.register_forward_pre_hook(_Compute(attribute))
    owner.register_forward_hook(_Release(attribute))
    owner.register_forward_pre_hook = MethodType(_keep_palettes_last, owner)  # pyright: ignore[reportAttributeAccessIssue]


def _keep_palettes_last(owner: torch.nn.Module, hook: Callable[..., Any], **options: Any) -> Any:
    """`register_forward_pre_hook` of a module with palettes behind pruning: each pruning puts its hook at the end."""
    handle = type(owner).register_forward_pre_hook(owner, hook, **options)
    for key in [key for key, own in owner._forward_pre_hooks.items() if isinstance(own, _Compute)]:
        owner._forward_pre_hooks[key] = owner._forward_pre_hooks.pop(key)
    return handle


def _detach_behind_pruning(owner: torch.nn.Module, attribute: str) -> None:
    for key, hook in list(owner._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == attribute:
            hook.remove(owner)  # the mask is in the weight from now on
            owner._forward_pre_hooks.pop(key, None)
    owner.__dict__.pop("register_forward_pre_hook", None)
    # That of coremltools' pruners gives every copy the state of the module that was pruned, whatever came after.
    owner.__dict__.pop("__getstate__", None)
    for hooks in (owner._forward_pre_hooks, owner._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "attribute", None) == attribute]:
            del hooks[key]
    delattr(owner, attribute + _PALETTE)


class _TakeDense:
    """A hook: what a state dict without palettes holds is what is trained, and the table is made anew."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __call__(self, owner: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        inner, plain = f"{prefix}parametrizations.{self.attribute}.", prefix + self.attribute
        if not parametrize.is_parametrized(owner, self.attribute) or f"{inner}original" in state or plain not in state:
            return
        state[f"{inner}original"] = state.pop(plain)
        for place, palette in enumerate(owner.parametrizations[self.attribute]):
            for name, buffer in palette.named_buffers() if isinstance(palette, Palettized) else ():
                state[f"{inner}{place}.{name}"] = torch.zeros_like(buffer) if name == "count" else buffer.clone()


class _Compute:
    """A hook: the weight that the pruning made becomes the one that the palette makes."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __call__(self, owner: Any, args: Any) -> None:
        for attribute, palette, original, mask in _of_module(owner):
            if attribute == self.attribute and mask is not None:
                setattr(owner, attribute, palette(original, mask))


class _Release(_Compute):
    """A hook: after the forward pass, a weight that a copy of the module can hold."""

    def __call__(self, owner: Any, args: Any, output: Any) -> None:
        weight = getattr(owner, self.attribute)
        if not isinstance(weight, torch.nn.Parameter):
            setattr(owner, self.attribute, weight.detach())
