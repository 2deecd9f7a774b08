"""For those who call `coremltools.convert` themselves: the same result, in less time and memory."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from palettax._extras import require
from palettax._replaced import replaced
from palettax._typing import NBITS
from palettax.torch.match import match_indices

_Search = Callable[..., np.ndarray]
_FLOATS = {np.dtype(dtype) for dtype in (np.float16, np.float32, np.float64)}
_ENTRIES = {2**nbits for nbits in NBITS}
# Weights, and distances to entries, that are held at a time.
_CHUNK = _SLAB = 1 << 20


@contextlib.contextmanager
def fast_conversion() -> Iterator[None]:
    """Let `coremltools.convert` find the indices of palettized weights fast, until the block ends.

    coremltools 9.0 recovers an index by the distances of a weight to every entry, all held at once: time and
    memory grow with both. Here the same indices are found by sorting the table. Sizes of traced models, which
    NumPy 2.4 made an error there, convert too. `palettax.coreml.from_torch` needs none of this.

    Raises:
        ImportError: coremltools is not installed.

    Example:
        >>> import warnings, torch, coremltools as ct
        >>> layer = torch.nn.Linear(8, 8)
        >>> with fast_conversion(), warnings.catch_warnings(action="ignore"):
        ...     program = torch.export.export(layer, (torch.ones(1, 8),)).run_decompositions({})
        ...     mlmodel = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    """
    utils = _coremltools("coremltools.optimize._utils")
    name = "find_indices_for_lut"
    with replaced(utils, name, functools.partial(_find_indices, getattr(utils, name))), casts_of_length_one():
        yield


@contextlib.contextmanager
def casts_of_length_one() -> Iterator[None]:
    """Let a traced size, a constant of shape (1,), become a Python number, until the block ends.

    coremltools 9.0 calls `int(array([n]))` for it, which NumPy 2.4 made an error.
    """
    ops = _coremltools("coremltools.converters.mil.frontend.torch.ops")
    original = ops._cast

    def cast(context: Any, node: Any, dtype: type, dtype_name: str) -> None:
        source = ops._get_inputs(context, node, expected=1)[0]
        if source.can_be_folded_to_const() and np.ndim(source.val) and np.size(source.val) == 1:
            context.add(ops.mb.const(val=dtype(np.asarray(source.val).item()), name=node.name), node.name)
        else:
            original(context, node, dtype, dtype_name)

    with replaced(ops, "_cast", cast):
        yield


def _coremltools(module: str) -> ModuleType:
    """A module of coremltools, or the error that says what to install."""
    require("coremltools", "coreml")
    return importlib.import_module(module)


def _find_indices(
    original: _Search, data: np.ndarray, lut: np.ndarray, vector_axis: Any = None
) -> Shaped[np.ndarray, "*indices"]:
    """The indices that `original`, coremltools' search, finds, in the integer type that it gives them."""
    if not _is_sound(data, lut, vector_axis):
        return original(data, lut, vector_axis)
    dtype = np.result_type(data, lut)
    axis = None if lut.shape[-1] == 1 else int(vector_axis) % data.ndim
    vectors = [lut.shape[-1] if a == axis else 1 for a in range(data.ndim)]
    places = [n // v for n, v in zip(data.shape, vectors, strict=True)]
    indices = np.empty(places, np.uint8)
    for group in np.ndindex(lut.shape[:-2]):
        block = data[_part(group, data.shape, lut.shape)].astype(dtype, copy=False)
        table = lut[group].astype(dtype, copy=False)
        found = nearest(block, table[:, 0]) if axis is None else _nearest_vectors(original, block, table, axis)
        indices[_part(group, places, lut.shape)] = found
    types = _coremltools("coremltools.converters.mil.mil.types")
    return indices.astype(types.nptype_from_builtin(types.string_to_builtin(f"uint{lut.shape[-2].bit_length() - 1}")))


def _part(group: tuple[int, ...], shape: Sequence[int], groups: Sequence[int]) -> tuple[slice, ...]:
    """The block of an array that one of the groups along each axis is."""
    sizes = [n // g for n, g in zip(shape, groups[: len(shape)], strict=True)]
    return tuple(slice(g * size, (g + 1) * size) for g, size in zip(group, sizes, strict=True))


def _is_sound(data: np.ndarray, lut: np.ndarray, vector_axis: Any) -> bool:
    """Whether finite floats are sought in tables that fit them; for others, coremltools says what it has to say."""
    if lut.ndim != data.ndim + 2 or not data.size or lut.shape[-2] not in _ENTRIES:
        return False
    if {data.dtype, lut.dtype, np.result_type(data, lut)} - _FLOATS:
        return False
    vectors = [1] * data.ndim
    if lut.shape[-1] != 1:
        if vector_axis is None or not -data.ndim <= vector_axis < data.ndim:
            return False
        vectors[int(vector_axis)] = lut.shape[-1]
    fits = all(g and v and n % (g * v) == 0 for n, g, v in zip(data.shape, lut.shape[:-2], vectors, strict=True))
    return fits and bool(np.isfinite(data).all() and np.isfinite(lut).all())


def nearest(values: Float[np.ndarray, "*shape"], table: Float[np.ndarray, " k"]) -> UInt8[np.ndarray, "*shape"]:
    """The first entry at the least distance from each value, in O(log k) each.

    Args:
        values: any floats, finite.
        table: of the same dtype, in any order.

    Returns:
        The indices. Distances are rounded to the dtype, as are those of a search through the whole table.

    Example:
        >>> nearest(np.array([0.9, 0.0, -3.0]), np.array([1.0, -1.0, 1.0, 5.0])).tolist()
        [0, 0, 1]
    """
    # NumPy sorts float16 wrongly on some processors.
    order = np.argsort(table.astype(np.float64), kind="stable")
    entries = table[order]
    first = order[np.searchsorted(entries, entries)]
    flat, found = values.reshape(-1), np.empty(values.size, np.uint8)
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        at = np.searchsorted(entries, chunk).clip(max=len(entries) - 1)
        result = first[at]
        between = np.flatnonzero(entries[at] != chunk)
        if between.size:
            result[between] = _nearest_between(chunk[between], entries, order)
        found[start : start + _CHUNK] = result
    return found.reshape(values.shape)


@np.errstate(over="ignore")  # all infinite distances are equal, here as there
def _nearest_between(
    values: Float[np.ndarray, " n"], entries: Float[np.ndarray, " k"], order: Int[np.ndarray, " k"]
) -> Int[np.ndarray, " n"]:
    """The same for values that are no entries. Rounded distances may tie over a run of the sorted entries."""
    above = np.searchsorted(entries, values).clip(max=len(entries) - 1)
    below = (np.searchsorted(entries, values) - 1).clip(min=0)

    def distance(at: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return np.abs(values - entries[at])

    least = np.minimum(distance(below), distance(above))
    start = np.where(distance(below) == least, below, above)
    end = np.where(distance(above) == least, above, below)
    # Bisection: the distance falls up to the value and rises behind it.
    for step in (1 << j for j in reversed(range(len(entries).bit_length()))):
        left, right = start - step, end + step
        start = np.where((left >= 0) & (distance(left.clip(min=0)) == least), left, start)
        end = np.where((right < len(entries)) & (distance(right.clip(max=len(entries) - 1)) == least), right, end)
    return _least_in_runs(order, start, end)


def _least_in_runs(
    order: Int[np.ndarray, " k"], start: Int[np.ndarray, " n"], end: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """The least of `order[start..end]` for each run, from the least of every 2^j neighbours."""
    k = len(order)
    rows = [order]
    for width in (1 << j for j in range(k.bit_length() - 1)):
        rows.append(np.minimum(rows[-1], np.append(rows[-1][width:], np.full(width, k))))
    level = np.frexp((end - start + 1).astype(np.float64))[1] - 1
    least = np.stack(rows)
    return np.minimum(least[level, start], least[level, end + 1 - (1 << level)])


def _nearest_vectors(
    original: _Search,
    block: Float[np.ndarray, "*shape"],
    table: Float[np.ndarray, "k vector"],
    axis: int,
) -> UInt8[np.ndarray, "*indices"]:
    """Equality where every vector is in the table, else the search of coremltools, part by part."""
    lut = table[(None,) * block.ndim]
    zero = block.dtype.type(0)  # added to -0, it makes 0, as a distance sees it
    indices, missing = match_indices(block + zero, lut + zero, vector_axis=axis)
    if not missing and _are_apart(table):
        return indices
    sizes = [table.shape[1] if a == axis else 1 for a in range(block.ndim)]
    along = int(np.argmax(indices.shape))
    step = max(1, _SLAB * indices.shape[along] // (indices.size * len(table)))
    for start in range(0, indices.shape[along], step):
        here = (slice(None),) * along
        inside = (*here, slice(start * sizes[along], (start + step) * sizes[along]))
        indices[(*here, slice(start, start + step))] = original(block[inside], lut, axis)
    return indices


def _are_apart(table: Float[np.ndarray, "k vector"]) -> bool:
    """Whether no squared difference of two entries is rounded to zero, so that only equals have no distance."""
    steps = np.diff(np.sort(table.astype(np.float64), axis=0), axis=0).astype(table.dtype)
    return bool((np.square(steps[steps > 0]) > 0).all())
