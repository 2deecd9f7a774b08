"""Save and load trees with palettized leaves: safetensors, with packed indices and no pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from palettax._files import replacing
from palettax._paths import identity_of, leaf_name, leaf_names
from palettax._typing import Tree
from palettax.leaf import PalettizedArray, is_palettized, pack, unpack

FORMAT = "palettax-1"
# The float types that NumPy itself has not, bfloat16 and float8, travel as the bits of an unsigned integer.
_CARRIERS = {1: np.uint8, 2: np.uint16}
# What `dtype.isbuiltin` says of them.
_FOREIGN = 2


def save(path: str | os.PathLike[str], tree: Tree) -> None:
    """Write a tree to a safetensors file; `load(path)` gives it back bit for bit.

    Indices are packed at nbits each, in Core ML's order; those outside a mask, which stand for nothing, are left out.
    A leaf that stands in several places is written once, and comes back as one. The file appears whole or not at all.

    Args:
        path: the file; an older one is replaced.
        tree: dicts, lists and tuples of arrays and `PalettizedArray`s. Other containers (dataclasses, named tuples,
            Flax states) are written, and come back, as the nested dict of their leaf paths; `nnx.replace_by_pure_dict`
            puts that back into a state.

    Raises:
        ValueError: a leaf that is no array of numbers or breaks its invariants, or a dict key of another type.
        FileNotFoundError: there is no folder for the file.

    Example:
        >>> import os, tempfile, jax, palettax as px
        >>> small = px.palettize({"w": jax.random.normal(jax.random.key(0), (64, 64))}, px.kmeans(nbits=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     px.save(os.path.join(folder, "small.safetensors"), small)
        ...     px.load(os.path.join(folder, "small.safetensors"))["w"].nbits
        2
    """
    if isinstance(tree, str | os.PathLike):
        raise ValueError(f"the tree is {os.fspath(tree)!r}; the order is save(path, tree)")
    contents = _Contents([], {}, {})
    structure = _describe(tree, (), contents)
    header = {"format": FORMAT, "structure": json.dumps(structure), "leaves": json.dumps(contents.leaves)}
    with replacing(path) as fresh:
        safetensors.numpy.save_file(contents.tensors, fresh, metadata=header)


def load(path: str | os.PathLike[str]) -> Tree:
    """Read what `save` wrote.

    Args:
        path: the file.

    Returns:
        The tree: dicts, lists and tuples, with NumPy arrays and NumPy-backed `PalettizedArray`s.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder, as an .mlpackage is.
        ValueError: the file is truncated, is no safetensors file, or was not written by `save`.

    Example:
        >>> import os, tempfile, numpy as np, palettax as px
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     px.save(os.path.join(folder, "tree.safetensors"), {"layers": [np.arange(3)]})
        ...     px.load(os.path.join(folder, "tree.safetensors"))
        {'layers': [array([0, 1, 2])]}
    """
    if Path(path).is_dir():
        raise IsADirectoryError(
            f"{os.fspath(path)!r} is a folder; load reads what save wrote, "
            "and palettax.coreml.read_palettes the tables of an .mlpackage"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {os.fspath(path)!r}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{os.fspath(path)!r} is truncated or no safetensors file ({error}); write it again"
        ) from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{os.fspath(path)!r} is a safetensors file, but its format is {header.get('format')!r}, not {FORMAT!r}; "
            "read it with safetensors, and write palettized trees with px.save"
        )
    try:
        leaves = [_read_leaf(leaf, tensors) for leaf in json.loads(header["leaves"])]
        return _rebuild(json.loads(header["structure"]), leaves)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} has a damaged header ({type(error).__name__}: {error}); write it again with px.save"
        ) from error


class _Contents(NamedTuple):
    """What a file holds beside the skeleton of the tree."""

    leaves: list[dict[str, Any]]  # a header each
    tensors: dict[str, np.ndarray]
    written: dict[Any, tuple[int, Any]]  # number and leaf by identity: a tied leaf is written once, none is freed


def _describe(tree: Tree, path: tuple[Any, ...], contents: _Contents) -> Any:
    """The JSON skeleton of a tree; fills the headers and the tensors of its leaves on the way."""
    if tree is None:
        return {"none": True}
    if type(tree) in (list, tuple):
        items = [_describe(v, (*path, jax.tree_util.SequenceKey(i)), contents) for i, v in enumerate(tree)]
        return {type(tree).__name__: items}
    if isinstance(tree, dict):
        if not all(isinstance(k, str | int) and not isinstance(k, bool) for k in tree):
            raise ValueError(f"dict keys under '{leaf_name(path)}' are not all strings or integers; rename them")
        items = [[k, _describe(v, (*path, jax.tree_util.DictKey(k)), contents)] for k, v in tree.items()]
        return {"dict": items}
    inside, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: is_palettized(x) or x is not tree)
    if is_palettized(tree) or [key for key, _ in inside] == [()]:
        identity = identity_of(tree)
        if identity not in contents.written:
            contents.written[identity] = _write_leaf(leaf_name(path), tree, contents), tree
        return {"leaf": contents.written[identity][0]}
    if [key for key, _ in inside] == [(jax.tree_util.GetAttrKey("value"),)]:
        # The wrapper that a Flax variable puts around its array.
        return _describe(inside[0][1], path, contents)
    children = dict(zip(leaf_names([key for key, _ in inside]), [child for _, child in inside], strict=True))
    if len(children) < len(inside):
        raise ValueError(f"two fields under '{leaf_name(path)}' have one name; rename one")
    return _describe(children, path, contents)


def _write_leaf(name: str, leaf: Any, contents: _Contents) -> int:
    """Add the parts of a leaf to the tensors and its header to the headers; returns its number."""
    if is_palettized(leaf):
        try:
            leaf.validate()
        except ValueError as error:
            raise ValueError(f"leaf '{name}': {error}") from error
        parts, header = _palettized_parts(leaf)
    else:
        parts, header = {"": leaf}, {}
    keys = {}
    for part, array in parts.items():
        keys[part] = _free_key(f"{name}#{part}" if part else name, contents.tensors)
        contents.tensors[keys[part]] = _carry(name, _as_numpy(name, array))
    dtype = _dtype_name(leaf if is_palettized(leaf) else np.asarray(leaf))
    contents.leaves.append(header | {"dtype": dtype, "tensors": keys})
    return len(contents.leaves) - 1


def _palettized_parts(leaf: PalettizedArray) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors and the header of a palettized leaf; what it has not leaves no trace."""
    header = {"nbits": leaf.nbits, "shape": list(leaf.indices.shape), "vector_axis": leaf.vector_axis}
    if leaf.lut.dtype != leaf.dtype:
        header["lut_dtype"] = _dtype_name(leaf.lut)
    indices, optional = np.asarray(leaf.indices), {"scale": leaf.scale, "kept": leaf.kept}
    if leaf.mask is not None:
        mask = np.asarray(leaf.mask)
        indices, optional["mask"] = indices[mask], pack(mask.view(np.uint8), 1)
    parts = {"lut": leaf.lut, "indices": pack(indices, leaf.nbits)}
    return parts | {part: array for part, array in optional.items() if array is not None}, header


def _dtype_name(leaf: Any) -> str:
    return str(np.dtype(leaf.dtype).newbyteorder("="))


def _as_numpy(name: str, leaf: Any) -> np.ndarray:
    try:
        return np.asarray(leaf)
    except TypeError as error:
        raise ValueError(f"leaf '{name}' is a {type(leaf).__name__} that is no array: {error}; leave it out") from error


def _free_key(name: str, tensors: dict[str, np.ndarray]) -> str:
    """The name, with a mark behind it when it is taken: by another leaf, or by safetensors itself."""
    while name in tensors or name == "__metadata__":
        name += "'"
    return name


def _carry(name: str, array: np.ndarray) -> np.ndarray:
    """The array in a type that safetensors writes."""
    foreign = array.dtype.isbuiltin == _FOREIGN
    if array.dtype.names is not None or array.dtype.kind not in "biufcV" or (array.dtype.kind == "V" and not foreign):
        raise ValueError(f"leaf '{name}' is of {array.dtype}, which is no array of numbers; leave it out")
    # ascontiguousarray would give a scalar an axis.
    array = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    return array.view(_CARRIERS[array.dtype.itemsize]) if foreign else array


def _rebuild(node: Any, leaves: list[Any]) -> Tree:
    ((kind, content),) = node.items()
    if kind == "none":
        return None
    if kind == "dict":
        return {k: _rebuild(v, leaves) for k, v in content}
    if kind in ("list", "tuple"):
        items = [_rebuild(v, leaves) for v in content]
        return items if kind == "list" else tuple(items)
    return leaves[content]


def _read_leaf(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    dtype = jnp.dtype(header["dtype"])
    parts = {part: tensors[key] for part, key in header["tensors"].items()}
    if "nbits" not in header:
        return parts[""].view(dtype)
    nbits, shape = header["nbits"], tuple(header["shape"])
    if "mask" in parts:
        mask = unpack(parts["mask"], 1, shape).astype(bool)
        indices = np.zeros(shape, np.uint8)
        indices[mask] = unpack(parts["indices"], nbits, (int(mask.sum()),))
    else:
        mask, indices = None, unpack(parts["indices"], nbits, shape)
    return PalettizedArray(
        parts["lut"].view(jnp.dtype(header.get("lut_dtype", dtype))),
        indices,
        parts["scale"].view(dtype) if "scale" in parts else None,
        nbits=nbits,
        vector_axis=header["vector_axis"],
        dtype=dtype,
        mask=mask,
        kept=parts["kept"].view(dtype) if "kept" in parts else None,
    ).validate()
