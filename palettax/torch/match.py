"""From a dense weight that lies on its tables back to the indices: equality of bits, no search for a neighbour."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8


def match_indices(
    weight: Float[np.ndarray, "*shape"],
    lut: Float[np.ndarray, "*groups k vector"],
    *,
    vector_axis: int | None = None,
    scale: Float[np.ndarray, "*scale"] | None = None,
    mask: Bool[np.ndarray, "*shape"] | None = None,
) -> tuple[UInt8[np.ndarray, "*indices"], int]:
    """Read off which table entry each weight is.

    Args:
        weight: the dense weight, every element equal to `lut[index] · scale` bit for bit.
        lut: one table per block of the weight, in the weight's dtype.
        vector_axis: the axis the vectors of the table lie along, if they are longer than 1.
        scale: of the weight's rank and dtype, broadcasts to the weight.
        mask: False where a weight is on no table: there the index is 0. Scalars only.

    Returns:
        The indices, the lowest one where entries repeat, and how many of them had no equal entry.

    Example:
        >>> lut = np.array([-1.0, 0.5], np.float32).reshape(1, 2, 1)
        >>> indices, missing = match_indices(np.array([0.5, -1.0, 7.0], np.float32), lut)
        >>> indices.tolist(), missing
        ([1, 0, 0], 1)
    """
    vectors = [lut.shape[-1] if axis == vector_axis else 1 for axis in range(weight.ndim)]
    shape = [length // vector for length, vector in zip(weight.shape, vectors, strict=True)]
    # Within a cell there is one table and one scale: a scale along an axis cuts it into single indices.
    scaled = [False] * weight.ndim if scale is None else [length > 1 for length in scale.shape]
    cells = [n if s else g for n, s, g in zip(shape, scaled, lut.shape[:-2], strict=True)]
    indices, missing = np.zeros(shape, np.uint8), 0
    for cell in np.ndindex(*cells):
        bounds = [(c * (n // m), (c + 1) * (n // m)) for c, n, m in zip(cell, shape, cells, strict=True)]
        here = tuple(slice(a, b) for a, b in bounds)
        inside = tuple(slice(a * v, b * v) for (a, b), v in zip(bounds, vectors, strict=True))
        table = lut[tuple(c * g // m for c, g, m in zip(cell, lut.shape[:-2], cells, strict=True))]
        if scale is not None:
            part = scale[tuple(i if s else slice(None) for i, s in zip(inside, scaled, strict=True))]
            table = table * part.reshape(-1)
        found, hit = _match_rows(_rows(weight[inside], vector_axis, lut.shape[-1]), table)
        if mask is not None:
            inner = mask[inside].reshape(-1)
            found, hit = np.where(inner, found, 0), hit | ~inner
        indices[here] = found.reshape(indices[here].shape)
        missing += int(hit.size - hit.sum())
    return indices, missing


def _rows(block: Shaped[np.ndarray, ...], axis: int | None, vector: int) -> Shaped[np.ndarray, "n vector"]:
    """The vectors of a block, one a row, in the order of its indices."""
    if axis is None:
        return block.reshape(-1, 1)
    split = block.reshape(*block.shape[:axis], block.shape[axis] // vector, vector, *block.shape[axis + 1 :])
    return np.moveaxis(split, axis + 1, -1).reshape(-1, vector)


def _match_rows(
    rows: Float[np.ndarray, "n vector"], table: Float[np.ndarray, "k vector"]
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The first table row equal to each row, and whether there is one."""
    k, hit = len(table), np.ones(len(rows), bool)
    code, table_code = np.zeros(len(rows), np.int64), np.zeros(k, np.int64)
    for column in range(table.shape[1]):
        rank, table_rank, equal = _rank(_bits(rows[:, column]), _bits(table[:, column]))
        code, table_code, both = _rank(code * k + rank, table_code * k + table_rank)
        hit &= equal & both
    return np.unique(table_code, return_index=True)[1][code], hit


def _rank(
    values: Shaped[np.ndarray, " n"], table: Shaped[np.ndarray, " k"]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " k"], Bool[np.ndarray, " n"]]:
    """The positions of values and of table entries among the distinct entries, and which values are entries."""
    distinct = np.unique(table)
    at = np.searchsorted(distinct, values).clip(max=len(distinct) - 1)
    return at, np.searchsorted(distinct, table), distinct[at] == values


def _bits(values: Float[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
    """The bits of floats as integers, so that -0, 0 and the narrow types are told apart and sorted right."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
