"""Lookup tables out of a package, whoever made it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import coremltools as ct
import jax
import numpy as np

from palettax._names import nearest
from palettax._paths import identity_of, leaf_names
from palettax._typing import Tree
from palettax.coreml.compare import rounded, same, same_after_rounding
from palettax.coreml.moves import Move, moved, unmoved
from palettax.coreml.package import (
    Op,
    op_name,
    open_model,
    operations,
    read_moves,
    read_names,
    write_moves,
    write_names,
)
from palettax.coreml.read_table import LOOKUPS, read_table
from palettax.leaf import PalettizedArray, is_palettized


def read_palettes(mlmodel: ct.models.MLModel | str | Path, like: Tree = None) -> Tree:
    """Read every lookup table of a package.

    Args:
        mlmodel: an mlprogram of any maker, or the path of one.
        like: a tree of JAX or NumPy arrays with the names of the package, such as the params that went into it. A copy
            of it is returned, with the tables in the place of its leaves and in their dtypes; tied leaves stay tied.

    Returns:
        A dict; or, with `like`, such a tree. The palettized weights are in the dtype of the package, usually float16,
        with levels, scale and mask as they are there; a table quantized in a way that a `PalettizedArray` does not know
        is de-quantized. Keys are dotted names where `from_torch` or `from_jax` noted them, else the op's name without
        the suffixes of coremltools. Of two functions with different weights under one name, the second's begins with
        the function's name. What `from_jax` had transposed, reshaped or reversed is as it was in JAX.

    Raises:
        ValueError: the model is no mlprogram, or a weight is in a form that a `PalettizedArray` does not have; or
            a table has no leaf of its name and shape in `like`.

    Example:
        >>> import coremltools as ct, jax, jax.numpy as jnp, palettax as px
        >>> from palettax.coreml import from_jax
        >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (64, 64)), "bias": jnp.ones(64)}}
        >>> small = px.palettize(params, px.kmeans(nbits=2))
        >>> mlmodel = from_jax(lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"], jnp.ones((1, 64)), small)
        >>> list(read_palettes(mlmodel))
        ['dense.kernel']
        >>> read_palettes(mlmodel, like=params)["dense"]["kernel"].dtype
        dtype('float32')
    """
    palettes = {name: table.leaf for name, table in noted_palettes(open_model(mlmodel)).items()}
    return palettes if like is None else _in_their_places(palettes, like)


def _in_their_places(palettes: Mapping[str, PalettizedArray], like: Tree) -> Tree:
    """A tree with palettized weights in the place of the leaves of their names."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_palettized)
    names = leaf_names([path for path, _ in paths], ".")
    leaves = dict(zip(names, [leaf for _, leaf in paths], strict=True))
    if len(leaves) < len(names):
        raise ValueError(f"like: {max(names, key=names.count)} is the name of two leaves; give a tree of other keys")
    made: dict[Any, PalettizedArray] = {}
    for name, palette in palettes.items():
        leaf = leaves.get(name)
        if leaf is None:
            raise ValueError(
                f"{name}: the package has a table for it, and `like` no such leaf; {nearest(name, leaves)}"
            )
        if not isinstance(getattr(leaf, "dtype", None), np.dtype):
            raise ValueError(f"{name}: it is a {type(leaf).__name__} in `like`; give arrays of JAX or NumPy")
        if palette.shape != leaf.shape:
            raise ValueError(f"{name}: it is {palette.shape} in the package, and {leaf.shape} in `like`")
        tied, own = made.get(identity_of(leaf)), rounded(palette, leaf.dtype)
        leaves[name] = made[identity_of(leaf)] = tied if tied is not None and same(tied, own) else own
    return jax.tree.unflatten(structure, leaves.values())


class Noted(NamedTuple):
    """A table of a package.

    Attributes:
        leaf: the weight as it was before the conversion.
        stored: as it is in the package.
        moves: what was done to it in between.
    """

    leaf: PalettizedArray
    stored: PalettizedArray
    moves: list[Move]


def noted_palettes(mlmodel: ct.models.MLModel) -> dict[str, Noted]:
    """The tables of a package by the names of `read_palettes`.

    Args:
        mlmodel: an mlprogram.
    """
    names, moves = read_names(mlmodel), read_moves(mlmodel)
    palettes: dict[str, Noted] = {}
    for function, op, stored in _tables(mlmodel):
        for name in names.get(op, [op]):
            done = moves.get(name, [])
            table = Noted(unmoved(stored, done), stored, done)
            if not same(palettes.setdefault(name, table).leaf, table.leaf):
                palettes[f"{function}.{name}"] = table
    return palettes


class Use(NamedTuple):
    """A table that a conversion was to make.

    Attributes:
        name: of the leaf.
        leaf: as it is in the package, but for moves.
        op: the name of the op that was made of it; None if none was.
    """

    name: str
    leaf: PalettizedArray
    op: str | None


def record_leaves(mlmodel: ct.models.MLModel, uses: Iterable[Use], moves: Mapping[str, list[Move]]) -> None:
    """Note in a fresh package which op holds which leaf.

    Args:
        mlmodel: what a conversion gave.
        uses: the tables that went in.
        moves: what was done to them before, by the name of the op.

    Raises:
        ValueError: a leaf is not a table in the package.
    """
    ops = {op: leaf for _, op, leaf in _tables(mlmodel)}
    names: dict[str, list[str]] = {}
    done: dict[str, list[Move]] = {}
    for name, leaf, made in uses:
        own = moves.get(made or "", [])
        # The pipeline merges equal weights: the leaf may live on under the name of its twin.
        twins = (op for op, found in ops.items() if same_after_rounding(functools.reduce(moved, own, leaf), found))
        holder = made if made in ops else next(twins, None) if made else None
        if holder is None:
            raise ValueError(
                f"{name}: it did not become a lookup table: the converter kept no constant that holds it, because the "
                "model does not use it or the converter computes with it; leave it dense"
            )
        if name not in names.setdefault(holder, []):
            names[holder].append(name)
        if own:
            done[name] = own
    write_names(mlmodel, names)
    write_moves(mlmodel, done)


def _tables(mlmodel: ct.models.MLModel) -> list[tuple[str, str, PalettizedArray]]:
    """Function, op name and weight of every table."""
    return [(function, table_name(op), read_table(op)) for function, op in operations(mlmodel) if op.op_type in LOOKUPS]


def table_name(op: Op) -> str:
    """The name of a weight: of its lookup, or of what makes the table where coremltools only numbered the lookup."""
    name = op_name(op.name)
    maker = op_name(op.lut.op.name) if op.lut.val is None else name
    return maker if name == f"{maker}_1" else name
