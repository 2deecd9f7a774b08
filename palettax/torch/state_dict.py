"""Torch state dicts in and out, with the buffers in which Core ML's converter looks for lookup tables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from palettax._names import flatten_names, owner_and_attribute
from palettax._typing import NBITS
from palettax.clustering.levels import ZERO_LEVEL
from palettax.leaf import (
    PalettizedArray,
    as_numpy,
    has_levels,
    is_palettized,
    multiply_scales,
    same_bits,
    scaled_lut,
    spread,
    table_scale,
    tables_per_scale,
)
from palettax.leaf.plain import broadcasts, check_plain
from palettax.torch.match import match_indices
from palettax.torch.tensors import to_numpy, to_tensor

VERSION = "_COREML_/metadata_version"
PRUNED, _PALETTIZED, _QUANTIZED = 1, 2, 3
_TABLES = [_PALETTIZED], [_PALETTIZED, _QUANTIZED], [PRUNED, _PALETTIZED], [PRUNED, _PALETTIZED, _QUANTIZED]
# Levels behind a scale that is not their table's are written as level / 2^7, about the size of the scaled weights.
_SHIFT = 7
_BUFFER = re.compile(r"(?P<module>.*\.)?_COREML_/(?P<parameter>.+)/(?P<field>[^/]+)")


class OffTableError(ValueError):
    """A weight is not on the table in its buffers."""


def own_tensors(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict without those that say how it was compressed."""
    return {n: t for n, t in state_dict.items() if isinstance(t, torch.Tensor) and "_COREML_/" not in n}


def to_params(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray | PalettizedArray]:
    """Read a torch state dict as parameters: NumPy views, and the palettized ones as tables and indices.

    Args:
        state_dict: tensors by dotted name. `_COREML_/...` buffers, from `to_state_dict`, `load_into` or
            coremltools' own palettizers, are consumed: their parameter becomes a `PalettizedArray`, or stays dense
            where they only say that it was pruned.

    Returns:
        The leaves by the same names, in the same order. Dense ones share memory with tensors on the CPU. A quantized
        table comes back as levels where they, and one scale, give it bit for bit, else as floats. Zeros of a pruned
        weight are outside its mask.

    Raises:
        ValueError: a buffer without its parameter or in a form that is no lookup table, a weight that is not on its
            table, or a value that is no dense tensor.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> {name: leaf.shape for name, leaf in to_params(layer.state_dict()).items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    if isinstance(state_dict, torch.nn.Module):
        raise ValueError(f"to_params takes a state dict, not a {type(state_dict).__name__}; pass model.state_dict()")
    dense, buffers = _split(state_dict)
    if orphans := buffers.keys() - dense.keys():
        raise ValueError(
            f"{min(orphans)}: its _COREML_ buffers are here, the parameter is not; pass the whole state dict"
        )
    return {name: _read(name, leaf, buffers[name]) if name in buffers else leaf for name, leaf in dense.items()}


def off_tables(state_dict: Mapping[str, Any]) -> list[str]:
    """The names of weights that are not on the table in their buffers.

    Args:
        state_dict: tensors by dotted name, all of them dense.
    """
    matches = {key: match for key in state_dict if (match := _BUFFER.fullmatch(key))}
    names = {(match["module"] or "") + match["parameter"] for match in matches.values()}
    dense, buffers = _split({key: value for key, value in state_dict.items() if key in matches or key in names})
    found = []
    for name in buffers.keys() & dense.keys():  # one that pruning computes is not in the state dict
        try:
            _read(name, dense[name], buffers[name])
        except OffTableError:
            found.append(name)
        except ValueError:  # of a form that is not ours
            continue
    return sorted(found)


def _split(state_dict: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """The parameters, and the buffers of each by their fields."""
    dense: dict[str, np.ndarray] = {}
    buffers: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in state_dict.items():
        if owner_and_attribute(key)[1] == VERSION:
            continue
        if match := _BUFFER.fullmatch(key):
            name = (match["module"] or "") + match["parameter"]
            buffers.setdefault(name, {})[match["field"]] = to_numpy(key, tensor)
        else:
            dense[key] = to_numpy(key, tensor)
    return dense, buffers


def to_state_dict(palettized: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Write parameters as a torch state dict: dense tensors, plus the buffers that carry the lookup tables.

    `to_params(to_state_dict(x))` gives x back, but: where a table repeats an entry, its lowest index; a weight that is
    zero, or -0, outside the mask if there is one; and a table for each block of the scale, if levels have a scale in
    blocks that are neither their groups nor channels.

    Args:
        palettized: leaves by dotted name, or nested dicts of them; `PalettizedArray` or dense.

    Returns:
        New tensors by dotted name, in the dtype of their leaf. A palettized `conv.weight` comes with
        `conv._COREML_/weight/{compression_type,lut,vector_axis,palettization_scale}`, a table of levels also with
        `{quantization_n_bits,quantization_scale,zero_point}`.

    Raises:
        ValueError: two leaves of one name, a dtype that torch does not have, or a leaf with kept values, a lut of
            float8 or a scale in blocks, for which there are no buffers.

    Example:
        >>> lut = np.array([-1.0, 0.5], np.float32).reshape(1, 1, 2, 1)
        >>> leaf = PalettizedArray(lut, np.array([[0, 1, 1]], np.uint8), nbits=1)
        >>> list(to_state_dict({"a": {"weight": leaf}}))
        ['a.weight', 'a._COREML_/weight/compression_type', 'a._COREML_/weight/lut', '_COREML_/metadata_version']
    """
    state, leaves = {}, flatten_names(palettized)
    for name, leaf in leaves.items():
        if not is_palettized(leaf):
            state[name] = to_tensor(name, leaf)
            continue
        leaf = as_numpy(leaf)
        state[name] = to_tensor(name, leaf.depalettize())
        module, parameter = owner_and_attribute(name)
        prefix = f"{module}." if module else ""
        state |= {f"{prefix}{key}": tensor for key, tensor in metadata(name, parameter, leaf).items()}
    if any(map(is_palettized, leaves.values())):
        state[VERSION] = metadata_version()
    return state


def metadata(name: str, parameter: str, leaf: PalettizedArray) -> dict[str, torch.Tensor]:
    """The buffers that tell Core ML's converter the table of one parameter.

    Args:
        name: the leaf's dotted name, for messages.
        parameter: the parameter's name within its module.
        leaf: the palettized weight.

    Returns:
        Tensors by buffer name.

    Raises:
        ValueError: the leaf is in a form for which there are no buffers.
    """
    check_plain(name, leaf, blocked_scale=False)
    fields = _levels_fields(leaf) if has_levels(leaf) else {"lut": leaf.lut, "palettization_scale": leaf.scale}
    applied = (PRUNED, leaf.mask is not None), (_PALETTIZED, True), (_QUANTIZED, has_levels(leaf))
    fields["compression_type"] = np.array([kind for kind, done in applied if done], np.int64)
    if leaf.vector_axis is not None:
        fields["vector_axis"] = np.array(leaf.vector_axis, np.int64)
    present = {field: value for field, value in sorted(fields.items()) if value is not None}
    return {f"{metadata_prefix(parameter)}{field}": to_tensor(name, value) for field, value in present.items()}


def _levels_fields(leaf: PalettizedArray) -> dict[str, Any]:
    """The table of a leaf of levels as floats, and what makes levels of them."""
    leaf, behind = as_numpy(leaf), None
    scale: Any = leaf.scale
    step: Any = table_scale(leaf)
    if step is None or step.shape[-1] > 1:
        leaf, behind = _shifted(leaf) if broadcasts(scale.shape, leaf.shape) else (tables_per_scale(leaf), None)
        step = table_scale(leaf)
    return {
        "lut": scaled_lut(leaf),
        "palettization_scale": behind,
        "quantization_n_bits": np.array(8, np.int64),
        "quantization_scale": step,
        "zero_point": np.full(step.shape, ZERO_LEVEL, np.uint8) if leaf.lut.dtype == np.uint8 else None,
    }


def _shifted(leaf: PalettizedArray) -> tuple[PalettizedArray, np.ndarray]:
    """The leaf with a power of two for its scale, and the scale to put behind it; nothing is rounded."""
    scale = np.asarray(leaf.scale)
    with np.errstate(over="ignore"):
        scales = {shift: scale * leaf.dtype.type(2.0**shift) for shift in range(_SHIFT, -1, -1)}
    shift = next((shift for shift, behind in scales.items() if np.isfinite(behind).all()), 0)
    one = np.full((1,) * leaf.ndim, 2.0**-shift, leaf.dtype)
    return dataclasses.replace(leaf, scale=one), scales[shift]


def metadata_prefix(parameter: str) -> str:
    """What the names of a parameter's buffers begin with."""
    return f"_COREML_/{parameter}/"


def metadata_version() -> torch.Tensor:
    """The version of the buffer protocol, which belongs on the root module."""
    return torch.tensor(1)


def _read(name: str, weight: np.ndarray, fields: dict[str, np.ndarray]) -> np.ndarray | PalettizedArray:
    """One dense weight and its buffers, as tables and indices."""
    # A pruner of coremltools that is finalized after the palettizer adds its word once more at the end.
    types = list(dict.fromkeys(fields.get("compression_type", np.zeros(0, int)).reshape(-1).tolist()))
    if types == [PRUNED]:
        return weight
    if types not in _TABLES or "lut" not in fields:
        raise ValueError(
            f"{name}: compression_type {types} with the buffers {sorted(fields)} is no lookup table ([2] and lut); "
            "remove its _COREML_ buffers to read it as a dense weight"
        )
    lut = _whole_table(name, fields["lut"], weight)
    axis = int(fields.get("vector_axis", np.zeros((), int))) % weight.ndim if lut.shape[-1] > 1 else None
    scale = fields.get("palettization_scale")
    if scale is not None:
        scale = scale.astype(weight.dtype).reshape(scale.shape + (1,) * (weight.ndim - scale.ndim))
        if scale.ndim != weight.ndim or not broadcasts(scale.shape, weight.shape):
            raise ValueError(
                f"{name}: a palettization_scale of shape {scale.shape} does not broadcast to {weight.shape}; "
                "remove its _COREML_ buffers to read it as a dense weight"
            )
    vectors = [lut.shape[-1] if a == axis else 1 for a in range(weight.ndim)]
    if any(n % (v * g) for n, v, g in zip(weight.shape, vectors, lut.shape[:-2], strict=True)):
        raise ValueError(f"{name}: a lut of shape {lut.shape} does not divide the weight {weight.shape}")
    # Elements of a vector share an index, so there the zeros of a pruned weight have to be on the table.
    mask = weight != 0 if PRUNED in types and axis is None else None
    indices, missing = match_indices(weight, lut, vector_axis=axis, scale=scale, mask=mask)
    if missing:
        raise OffTableError(
            f"{name}: {missing} of {indices.size} entries are not on the table (was the weight changed or cast after "
            "it was palettized?); palettize it again, or remove its _COREML_ buffers"
        )
    nbits = lut.shape[-2].bit_length() - 1
    leaf = PalettizedArray(lut, indices, scale, nbits=nbits, vector_axis=axis, mask=mask).validate()
    return _with_levels(leaf, fields) if _QUANTIZED in types else leaf


def _with_levels(leaf: PalettizedArray, fields: dict[str, np.ndarray]) -> PalettizedArray:
    """The leaf with the levels that its float table was made of; the leaf itself where they do not give it back."""
    step, zero = fields.get("quantization_scale"), fields.get("zero_point")
    bits = int(fields.get("quantization_n_bits", np.array(8)))
    if step is None or bits != 8 or step.ndim != leaf.lut.ndim or step.shape[-2:] != (1, 1):
        return leaf
    if any(g % s for g, s in zip(leaf.groups, step.shape, strict=False)):
        return leaf
    if zero is not None and (zero != (ZERO_LEVEL if zero.dtype == np.uint8 else 0)).any():
        return leaf
    step = step[..., 0, 0].astype(leaf.dtype)
    with np.errstate(all="ignore"):
        found = np.rint(leaf.lut.astype(np.float64) / spread(step, leaf.groups)[..., None, None].astype(np.float64))
        found = np.nan_to_num(found).clip(-128, 127)
    unsigned = zero is not None and zero.dtype == np.uint8
    levels = (found + ZERO_LEVEL).astype(np.uint8) if unsigned else found.astype(np.int8)
    small = dataclasses.replace(leaf, lut=levels, scale=step)
    if not same_bits(scaled_lut(small), leaf.lut):
        return leaf
    if leaf.scale is None:
        return small.validate()
    small = dataclasses.replace(small, scale=multiply_scales(leaf.scale, step)).validate()
    return small if same_bits(small.depalettize(), leaf.depalettize()) else leaf


def _whole_table(name: str, lut: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The table at rank + 2 and with 2^nbits entries, the last one repeated as often as needed."""
    if lut.ndim == weight.ndim + 1:
        lut = lut[..., None]
    widths = [nbits for nbits in NBITS if lut.ndim > 1 and 2**nbits >= lut.shape[-2]]
    if lut.ndim != weight.ndim + 2 or not widths:
        raise ValueError(f"{name}: a lut of shape {lut.shape} fits no weight of shape {weight.shape}")
    missing = 2 ** widths[0] - lut.shape[-2]
    padded = np.concatenate([lut, np.repeat(lut[..., -1:, :], missing, axis=-2)], axis=-2)
    return padded.astype(weight.dtype)
