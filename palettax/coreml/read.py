"""Lookup tables out of a package, whoever made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import coremltools as ct

from palettax.coreml.compare import same, same_after_rounding
from palettax.coreml.package import Op, op_name, open_model, operations, read_names, write_names
from palettax.coreml.read_table import LOOKUPS, read_table
from palettax.leaf import PalettizedArray


def read_palettes(mlmodel: ct.models.MLModel | str | Path) -> dict[str, PalettizedArray]:
    """Read every lookup table of a package.

    Args:
        mlmodel: an mlprogram of any maker, or the path of one.

    Returns:
        The palettized weights in the dtype of the package, usually float16, with levels, scale and mask as they are
        there; a table quantized in a way that a `PalettizedArray` does not know is de-quantized. Keys are dotted names
        where `from_torch` noted them, else the op's name without the suffixes of coremltools. Of two functions with
        different weights under one name, the second's begins with the function's name.

    Raises:
        ValueError: the model is no mlprogram, or a weight is in a form that a `PalettizedArray` does not have.
    """
    mlmodel = open_model(mlmodel)
    names = read_names(mlmodel)
    palettes: dict[str, PalettizedArray] = {}
    for function, op, leaf in _tables(mlmodel):
        for name in names.get(op, [op]):
            known = palettes.setdefault(name, leaf)
            if not same(known, leaf):
                palettes[f"{function}.{name}"] = leaf
    return palettes


def record_leaves(
    mlmodel: ct.models.MLModel, leaves: Mapping[str, PalettizedArray], op_names: Mapping[str, str | None]
) -> None:
    """Note in a fresh package which op holds which leaf.

    Args:
        mlmodel: what a conversion gave.
        leaves: the palettized weights that went in.
        op_names: the op that the conversion made of each, if it made one.

    Raises:
        ValueError: a leaf is not a table in the package.
    """
    ops = {op: leaf for _, op, leaf in _tables(mlmodel)} if leaves else {}
    names: dict[str, list[str]] = {}
    for name, leaf in leaves.items():
        made = op_names[name]
        # The pipeline merges equal weights: the leaf may live on under the name of its twin.
        twins = [op for op, found in ops.items() if same_after_rounding(leaf, found)] if made not in ops else []
        holder = made if made in ops else next(iter(twins), None) if made else None
        if holder is None:
            raise ValueError(
                f"{name}: it did not become a lookup table: the converter kept no constant that holds it, because the "
                "model does not use it or the converter computes with it; leave it dense"
            )
        names.setdefault(holder, []).append(name)
    write_names(mlmodel, names)


def _tables(mlmodel: ct.models.MLModel) -> list[tuple[str, str, PalettizedArray]]:
    """Function, op name and weight of every table."""
    return [(function, table_name(op), read_table(op)) for function, op in operations(mlmodel) if op.op_type in LOOKUPS]


def table_name(op: Op) -> str:
    """The name of a weight: of its lookup, or of what makes the table where coremltools only numbered the lookup."""
    name = op_name(op.name)
    maker = op_name(op.lut.op.name) if op.lut.val is None else name
    return maker if name == f"{maker}_1" else name
