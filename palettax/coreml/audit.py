"""Is what is in the package what we computed? Bit by bit, and what stayed dense."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import coremltools as ct
import jax
import numpy as np
from jax.tree_util import DictKey

from palettax._names import flatten_names
from palettax._paths import leaf_names
from palettax._typing import Tree
from palettax.coreml.compare import rounded
from palettax.coreml.forms import in_package, target_of
from palettax.coreml.moves import moved
from palettax.coreml.package import op_name, open_model, operations
from palettax.coreml.read import Noted, noted_palettes
from palettax.coreml.read_table import decompresses
from palettax.coreml.weights import is_weight
from palettax.leaf import PalettizedArray, as_numpy, has_levels, is_palettized, same_bits
from palettax.leaf.plain import check_plain


@dataclasses.dataclass(frozen=True)
class LeafAudit:
    """One palettized weight beside its table in the package.

    Attributes:
        found: its name in the package, or None: it is missing.
        lut_identical: the table, rounded to the dtype of the package, is there bit for bit.
        indices_identical: so are the indices, and the axis of the vectors.
        scale_identical: so is the scale, or neither has one.
        mask_identical: so is the mask, or neither has one.
        lut_dtype: the dtype of the table in the package; of levels, that and the dtype of their scale.
        lut_rounded: our table, or its scale, had to be rounded to that dtype.
        nbytes: of table, indices, scale and mask in the package.
    """

    found: str | None = None
    lut_identical: bool = False
    indices_identical: bool = False
    scale_identical: bool = False
    mask_identical: bool = False
    lut_dtype: str | None = None
    lut_rounded: bool = False
    nbytes: int = 0

    @property
    def identical(self) -> bool:
        """Whether every part is there, bit for bit."""
        return self.lut_identical and self.indices_identical and self.scale_identical and self.mask_identical


class Dense(NamedTuple):
    """A constant of the package that is no part of a table.

    Attributes:
        shape: of the constant.
        dtype: of the constant.
        nbytes: of the constant.
        reason: why it is dense, as far as the package and the weights tell.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Audit:
    """What a package holds of the weights that were meant to go into it.

    Attributes:
        leaves: per palettized weight, by name.
        dense: every constant of at least 10 floats, or integers of one byte, that is not part of a table, by the name
            of its leaf where there is one, else of its op. They are listed, not compared.
        unasked: tables in the package that stand for none of the weights.
    """

    leaves: dict[str, LeafAudit]
    dense: dict[str, Dense]
    unasked: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether there are palettized weights and each is in the package, bit for bit, in every function."""
        found = tuple(f".{leaf.found}" for leaf in self.leaves.values())
        differs_elsewhere = any(name.endswith(found) for name in self.unasked)
        return bool(self.leaves) and not differs_elsewhere and all(leaf.identical for leaf in self.leaves.values())

    def __str__(self) -> str:
        rows = [("leaf", "lut", "indices", "scale", "mask", "dtype", "bytes", "")]
        rows += [_row(name, leaf) for name, leaf in self.leaves.items()]
        for name, dense in self.dense.items():
            shape = "x".join(map(str, dense.shape))
            rows.append((name, "dense", shape, "", "", dense.dtype, f"{dense.nbytes:,}", dense.reason))
        rows += [(name, "not asked for", *[""] * 6) for name in self.unasked]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        verdict = "identical" if self.identical else "NOT identical" if self.leaves else "nothing to compare"
        once = {leaf.found: leaf.nbytes for leaf in self.leaves.values()}
        sizes = [sum(once.values()), sum(part.nbytes for part in self.dense.values())]
        last = (
            f"{len(self.leaves)} palettized, {sizes[0]:,} bytes: {verdict}; {len(self.dense)} dense, {sizes[1]:,} bytes"
        )
        return "\n".join([*lines, last])


def audit(mlmodel: ct.models.MLModel | str | Path, palettized: Tree) -> Audit:
    """Compare a package with the weights that were meant to go into it.

    Args:
        mlmodel: an mlprogram, or the path of one.
        palettized: leaves by dotted name, or a tree of them: what was given to `from_torch` or `from_jax`; the dense
            ones are ignored. Or a torch module, for the tables that it carries in its buffers.

    Returns:
        The comparison, on raw bits; print it to read it.

    Raises:
        ValueError: as in `read_palettes`, or a leaf with kept values or a table of float8, which no package holds.
    """
    mlmodel = open_model(mlmodel)
    palettes = noted_palettes(mlmodel)
    leaves = _named(palettized)
    target = target_of(mlmodel)
    compared = {name: _compare(name, leaf, palettes, target) for name, leaf in leaves.items() if is_palettized(leaf)}
    constants = _dense(mlmodel)
    missing = [name for name, leaf in compared.items() if leaf.found is None]
    for name in [name for name in missing if constants.keys().isdisjoint(_ops_of(name))]:
        compared[name] = next(
            (compared[twin] for twin in compared if _is_twin(twin, name, compared, leaves)), LeafAudit()
        )
    known = {op: name for name in leaves for op in _ops_of(name)}
    unasked = tuple(sorted(palettes.keys() - {leaf.found for leaf in compared.values()}))
    dense = {known.get(op, op): value for op, value in constants.items()}
    return Audit(compared, {name: _listed(value, leaves.get(name)) for name, value in dense.items()}, unasked)


def _ops_of(name: str) -> tuple[str, ...]:
    """What a plain conversion may call a parameter: export puts a prefix in front, trace does so before a digit."""
    plain = op_name(name)
    return (plain, f"p_{plain}", f"b_{plain}", f"op_{plain.removeprefix('p_')}")


def _named(tree: Tree) -> dict[str, Any]:
    """Leaves by dotted name, those of a dict in its order; of a torch module, the tables in its buffers."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tree, torch.nn.Module):
        from palettax.torch.load import tables_of

        return tables_of(tree)
    named: dict[str, Any] = {}
    for top, part in (flatten_names(tree) if isinstance(tree, dict) else {"": tree}).items():
        paths = jax.tree_util.tree_flatten_with_path(part, is_leaf=is_palettized)[0]
        names = leaf_names([(*[DictKey(top)] * bool(top), *path) for path, _ in paths], ".")
        named |= zip(names, [leaf for _, leaf in paths], strict=True)
    return named


def _is_twin(twin: str, name: str, compared: Mapping[str, LeafAudit], leaves: Mapping[str, Any]) -> bool:
    """Whether a leaf that was found is equal to another: converters store equal constants once, under one name."""
    if compared[twin].found is None:
        return False
    parts = [jax.tree.flatten(as_numpy(leaves[leaf])) for leaf in (twin, name)]
    return parts[0][1] == parts[1][1] and all(map(same_bits, parts[0][0], parts[1][0]))


def _compare(name: str, ours: PalettizedArray, palettes: Mapping[str, Noted], target: ct.target) -> LeafAudit:
    """One leaf beside its table."""
    check_plain(name, ours, blocked_scale=True)
    found = next((key for key in (name, *_ops_of(name)) if key in palettes), None)
    if found is None:
        return LeafAudit()
    theirs = palettes[found].stored
    held = functools.reduce(moved, palettes[found].moves, in_package(ours, target))
    expected = rounded(held, theirs.dtype)
    dtype = np.dtype(theirs.dtype).name
    return LeafAudit(
        found=found,
        lut_identical=same_bits(expected.lut, theirs.lut),
        indices_identical=same_bits(expected.indices, theirs.indices) and held.vector_axis == theirs.vector_axis,
        scale_identical=same_bits(expected.scale, theirs.scale),
        mask_identical=same_bits(expected.mask, theirs.mask),
        lut_dtype=f"{theirs.lut.dtype} of {dtype}" if has_levels(theirs) else dtype,
        nbytes=theirs.nbytes,
        lut_rounded=not (_same_numbers(held.lut, expected.lut) and _same_numbers(held.scale, expected.scale)),
    )


def _same_numbers(one: Any, other: Any) -> bool:
    """Whether two arrays of one shape, of whatever dtypes, hold the same numbers."""
    if one is None or other is None:
        return one is other
    return np.array_equal(one.astype(np.float64), other.astype(np.float64))


def _listed(value: np.ndarray, given: Any) -> Dense:
    """A dense constant, and why it is dense."""
    if is_palettized(given):
        reason = "its table did not get into the package"
    elif not np.issubdtype(value.dtype, np.floating):
        reason = f"{value.dtype.name} is not floating"
    elif value.ndim < 2:
        reason = "it has one axis"
    else:
        reason = "no table was given for it" if given is None else "it was given dense"
    return Dense(value.shape, value.dtype.name, value.nbytes, reason)


def _dense(mlmodel: ct.models.MLModel) -> dict[str, np.ndarray]:
    """The constants that some op other than a decompressing one reads."""
    dense = {}
    for _, op in operations(mlmodel):
        readers = op.outputs[0].child_ops
        if op.op_type == "const" and is_weight(op) and not all(map(decompresses, readers)):
            dense[op_name(op.name)] = op.outputs[0].val
    return dense


def _row(name: str, leaf: LeafAudit) -> tuple[str, ...]:
    if leaf.found is None:
        return (name, *("missing",) * 4, "-", "", "")
    parts = (leaf.lut_identical, leaf.indices_identical, leaf.scale_identical, leaf.mask_identical)
    words = tuple("identical" if part else "DIFFERENT" for part in parts)
    dtype = f"{leaf.lut_dtype} (rounded)" if leaf.lut_rounded else str(leaf.lut_dtype)
    return (name, *words, dtype, f"{leaf.nbytes:,}", "")
