"""Palettized weights into a torch module, with the buffers that Core ML's converter reads."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from palettax._keys import warn_caller
from palettax._names import flatten_names, nearest, owner_and_attribute
from palettax.leaf import PalettizedArray, as_numpy, depalettize, is_palettized
from palettax.leaf.plain import check_plain
from palettax.torch.state_dict import (
    VERSION,
    metadata,
    metadata_prefix,
    metadata_version,
    off_tables,
    own_tensors,
    to_params,
)
from palettax.torch.tensors import checksum, numpy_dtype, to_numpy, to_tensor


def load_into(model: torch.nn.Module, palettized: Mapping[str, Any]) -> torch.nn.Module:
    """Write weights and their lookup tables into a module, which `coremltools.convert` then keeps as tables.

    Nothing is written unless everything fits. Parameters that `palettized` does not name are left alone; a tied
    parameter carries the buffers on each module that owns it. Buffers that a parameter has, from a pruner or from an
    earlier call, are replaced. Arrays that `to_params` gave share memory with the model and change with it: take their
    `report` before.

    Args:
        model: the module to write into, on any device.
        palettized: leaves by dotted name, or nested dicts of them, `PalettizedArray` or dense, in torch's layout.

    Returns:
        The same module.

    Raises:
        ValueError: a name that the model does not have, a shape that differs, two values for one tied parameter, or a
            leaf with kept values, a lut of float8 or a scale in blocks, for which there are no buffers.

    Example:
        >>> lut = np.array([-1.0, 0.5], np.float32).reshape(1, 1, 2, 1)
        >>> leaf = PalettizedArray(lut, np.array([[0, 1, 1]], np.uint8), nbits=1)
        >>> load_into(torch.nn.Linear(3, 1, bias=False), {"weight": leaf}).weight.tolist()
        [[-1.0, 0.5, 0.5]]
    """
    for name, leaf in flatten_names(palettized).items():
        if is_palettized(leaf):
            check_plain(name, leaf, blocked_scale=False)
    written = write_weights(model, palettized)
    tensors, aliases = tensors_by_name(model), names_by_tensor(model)
    for name, leaf in written.items():
        for alias in aliases[id(tensors[name])]:
            if is_palettized(leaf):
                _register(model, alias, leaf, tensors[name].device)
    if any(map(is_palettized, written.values())):
        _set_buffer(model, VERSION, metadata_version())
    return model


def write_weights(model: torch.nn.Module, palettized: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the dense weights into a module, and drop the buffers of tables that are no longer theirs.

    Args:
        model: the module to write into.
        palettized: as in `load_into`.

    Returns:
        The flat leaves, the palettized ones in the dtype of their parameter.

    Raises:
        ValueError: as in `load_into`.
    """
    targets = tensors_by_name(model)
    leaves = {name: _fit(name, leaf, targets) for name, leaf in flatten_names(palettized).items()}
    dense = {name: to_tensor(name, depalettize(leaf)) for name, leaf in leaves.items()}
    aliases = names_by_tensor(model)
    for name, tensor in dense.items():
        for alias in aliases[id(targets[name])]:
            if alias in dense and not torch.equal(dense[alias], tensor):
                raise ValueError(f"{name}: tied to {alias}, but their values differ; pass one of them")
    with torch.no_grad():
        for name, tensor in dense.items():
            targets[name].copy_(tensor)
            for alias in aliases[id(targets[name])]:
                _unregister(model, alias)
    return leaves


def tables_of(model: torch.nn.Module) -> dict[str, PalettizedArray]:
    """The palettized weights that a module carries in its buffers.

    Args:
        model: from `load_into`, or from a palettizer of this package or of coremltools.

    Returns:
        The leaves by dotted name; without dense parameters.

    Raises:
        ValueError: it carries none, or as in `to_params`.

    Example:
        >>> lut = np.array([-1.0, 0.5], np.float32).reshape(1, 1, 2, 1)
        >>> leaf = PalettizedArray(lut, np.array([[0, 1, 1]], np.uint8), nbits=1)
        >>> list(tables_of(load_into(torch.nn.Linear(3, 1), {"weight": leaf})))
        ['weight']
    """
    leaves = {name: leaf for name, leaf in to_params(dense_tensors(model)).items() if isinstance(leaf, PalettizedArray)}
    if not leaves:
        raise ValueError(
            f"the {type(model).__name__} holds no lookup tables: no parameter has _COREML_ buffers that say [2]; pass "
            "`palettized`, which for a dense model that `from_torch` is to convert is {}; finalize one in training"
        )
    return leaves


def put_tables(model: torch.nn.Module, palettized: Mapping[str, Any]) -> torch.nn.Module:
    """`load_into` of a whole model: tables of an earlier palettization that weights have left since go.

    Args:
        model: the module to write into.
        palettized: as in `load_into`.

    Returns:
        The same module.
    """
    tensors, stale = tensors_by_name(model), off_tables(dense_tensors(model))
    load_into(model, palettized)
    written = {id(tensors[name]) for name in flatten_names(palettized)}
    stale = [name for name in stale if name in tensors and id(tensors[name]) not in written]
    for name in stale:
        _unregister(model, name)
    if stale:
        warn_caller(f"{', '.join(stale)}: changed since it was palettized; its older table is removed")
    return model


def evaluated(model: torch.nn.Module, names: Iterable[str]) -> torch.nn.Module:
    """Put a module in eval mode.

    Args:
        model: changed in place.
        names: of weights that are palettized.

    Returns:
        The same module.

    Raises:
        ValueError: that changes one of them, as layers do that merge others into theirs.
    """
    tensors = {name: tensor for name, tensor in tensors_by_name(model).items() if name in set(names)}
    before = {name: checksum(tensor) for name, tensor in tensors.items() if not tensor.is_meta}
    model.eval()
    for name, found in before.items():
        if checksum(tensors_by_name(model)[name]) != found:
            raise ValueError(
                f"{name}: eval() changes it, as layers do that merge adapters into their weights (LoRA); merge them "
                "for good before it is palettized"
            )
    return model


def dense_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without what has no values in an array: sparse buffers, extra state, the meta device."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_meta
    }


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module, also of one that holds tensors which pruning or a palette has computed: torch copies none."""
    held = [value for module in model.modules() for value in vars(module).values()]
    held += [inner for value in held if isinstance(value, list) for inner in value]
    held += [inner for value in held if isinstance(value, dict) for inner in value.values()]
    computed = [value for value in held if isinstance(value, torch.Tensor) and value.grad_fn is not None]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})


def tensors_by_name(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by every dotted name it has, the tied ones under each."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def names_by_tensor(model: torch.nn.Module) -> dict[int, list[str]]:
    """The names of each parameter and buffer, by the identity of the tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors_by_name(model).items():
        names.setdefault(id(tensor), []).append(name)
    return names


def _fit(name: str, leaf: Any, targets: Mapping[str, torch.Tensor]) -> Any:
    """The leaf in the dtype of its parameter; refuses a wrong name or shape."""
    if name not in targets:
        raise ValueError(f"{name}: the model has no such parameter or buffer; {nearest(name, own_tensors(targets))}")
    target = targets[name]
    leaf = to_numpy(name, leaf) if isinstance(leaf, torch.Tensor) else leaf
    if tuple(leaf.shape) != tuple(target.shape):
        raise ValueError(
            f"{name}: the leaf has shape {tuple(leaf.shape)}, the model's parameter {tuple(target.shape)}; "
            "weights in flax's layout go through palettax.torch.from_flax first"
        )
    return _cast(as_numpy(leaf), numpy_dtype(target.dtype)) if is_palettized(leaf) else leaf


def _cast(leaf: PalettizedArray, dtype: np.dtype) -> PalettizedArray:
    """The same indices over a table of another dtype."""
    if leaf.dtype == dtype:
        return leaf
    floats = {"lut": leaf.lut, "scale": leaf.scale, "kept": leaf.kept}
    # Levels stay what they are: the scale behind them carries the dtype.
    cast = {
        part: array.astype(dtype) for part, array in floats.items() if array is not None and array.dtype == leaf.dtype
    }
    return dataclasses.replace(leaf, **cast, dtype=dtype)


def _register(model: torch.nn.Module, name: str, leaf: PalettizedArray, device: torch.device) -> None:
    """Put the buffers of one leaf on the module that owns it."""
    module, parameter = owner_and_attribute(name)
    for key, tensor in metadata(name, parameter, leaf).items():
        _set_buffer(model.get_submodule(module), key, tensor.to(device))


def _unregister(model: torch.nn.Module, name: str) -> None:
    """Remove the buffers of one parameter, if it has any."""
    module, parameter = owner_and_attribute(name)
    buffers = model.get_submodule(module)._buffers
    for key in [key for key in buffers if key.startswith(metadata_prefix(parameter))]:
        del buffers[key]


def _set_buffer(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Register a buffer, in the place of one of that name."""
    module._buffers.pop(name, None)
    module.register_buffer(name, tensor)
