"""Save and load trees with palettized leaves: safetensors, with packed indices and no pickle."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from palettax._paths import leaf_name
from palettax._typing import Tree
from palettax.leaf import PalettizedArray, is_palettized, pack, unpack

FORMAT = "palettax-1"
# safetensors' NumPy side knows no bfloat16 or float8: those travel as the bits of an unsigned integer.
_CARRIERS = {1: np.uint8, 2: np.uint16}


def save(path: str | os.PathLike[str], tree: Tree) -> None:
    """Write a tree to a safetensors file; `load(path)` gives it back bit for bit.

    Indices are packed at nbits each, in Core ML's order. The file appears whole or not at all.

    Args:
        path: the file; an older one is replaced.
        tree: dicts, lists and tuples of arrays and `PalettizedArray`s. Other containers (dataclasses, named tuples,
            Flax states) are written as the nested dict of their leaf paths.

    Raises:
        ValueError: a leaf that is no array of numbers, or two leaves of one path.

    Example:
        >>> import os, tempfile, jax, palettax as px
        >>> small = px.palettize({"w": jax.random.normal(jax.random.key(0), (64, 64))}, px.kmeans(nbits=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     px.save(os.path.join(folder, "small.safetensors"), small)
        ...     px.load(os.path.join(folder, "small.safetensors"))["w"].nbits
        2
    """
    leaves: dict[str, dict[str, Any]] = {}
    tensors: dict[str, np.ndarray] = {}
    structure = _describe(tree, (), leaves, tensors)
    header = {"format": FORMAT, "structure": json.dumps(structure), "leaves": json.dumps(leaves)}
    target = Path(path)
    # A folder, not a temporary file: those are readable by their owner alone.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        fresh = Path(folder) / target.name
        safetensors.numpy.save_file(tensors, fresh, metadata=header)
        os.replace(fresh, target)


def load(path: str | os.PathLike[str]) -> Tree:
    """Read what `save` wrote.

    Args:
        path: the file.

    Returns:
        The tree: dicts, lists and tuples, with NumPy arrays and NumPy-backed `PalettizedArray`s.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is no safetensors file, or was not written by `save`.

    Example:
        >>> import os, tempfile, numpy as np, palettax as px
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     px.save(os.path.join(folder, "tree.safetensors"), {"layers": [np.arange(3)]})
        ...     px.load(os.path.join(folder, "tree.safetensors"))
        {'layers': [array([0, 1, 2])]}
    """
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
        return _rebuild(json.loads(header["structure"]), json.loads(header["leaves"]), tensors)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} has a damaged header ({type(error).__name__}: {error}); write it again with px.save"
        ) from error


def _describe(tree: Tree, path: tuple[Any, ...], leaves: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    """The JSON skeleton of a tree; fills the leaves' headers and tensors on the way."""
    if tree is None:
        return {"none": True}
    if type(tree) in (list, tuple):
        items = [_describe(v, (*path, jax.tree_util.SequenceKey(i)), leaves, tensors) for i, v in enumerate(tree)]
        return {type(tree).__name__: items}
    if isinstance(tree, dict):
        if not all(isinstance(k, str | int) and not isinstance(k, bool) for k in tree):
            raise ValueError(f"dict keys under '{leaf_name(path)}' are not all strings or integers; rename them")
        items = [[k, _describe(v, (*path, jax.tree_util.DictKey(k)), leaves, tensors)] for k, v in tree.items()]
        return {"dict": items}
    inside, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: is_palettized(x) or x is not tree)
    if not is_palettized(tree) and not (len(inside) == 1 and inside[0][0] == ()):
        children: dict[str, Any] = {}
        for key, child in inside:
            children[leaf_name(key)] = child
        return _describe(children, path, leaves, tensors)
    return {"leaf": _write_leaf(leaf_name(path), tree, leaves, tensors)}


def _write_leaf(name: str, leaf: Any, leaves: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    if name in leaves:
        raise ValueError(f"two leaves have the path '{name}'; rename one")
    if is_palettized(leaf):
        leaves[name] = {
            "nbits": leaf.nbits,
            "shape": list(leaf.indices.shape),
            "vector_axis": leaf.vector_axis,
            "dtype": str(np.dtype(leaf.dtype)),
        }
        parts = {f"{name}#lut": leaf.lut, f"{name}#indices": pack(np.asarray(leaf.indices), leaf.nbits)}
        parts |= {} if leaf.scale is None else {f"{name}#scale": leaf.scale}
    else:
        parts = {name: leaf}
        leaves[name] = {"dtype": str(np.asarray(leaf).dtype.newbyteorder("="))}
    for part, array in parts.items():
        if part in tensors:
            raise ValueError(f"leaf '{part}' has the name of a part of a palettized leaf; rename it")
        tensors[part] = _carry(part, np.asarray(array))
    return name


def _carry(name: str, array: np.ndarray) -> np.ndarray:
    """The array in a type that safetensors writes."""
    foreign = array.dtype.names is not None or array.dtype.kind not in "biufcV"
    if foreign or (array.dtype.kind == "V" and array.dtype.itemsize not in _CARRIERS):
        raise ValueError(f"leaf '{name}' is of {array.dtype}, which is no array of numbers; leave it out")
    # ascontiguousarray would give a scalar an axis.
    array = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    return array.view(_CARRIERS[array.dtype.itemsize]) if array.dtype.kind == "V" else array


def _rebuild(node: Any, leaves: dict[str, Any], tensors: dict[str, np.ndarray]) -> Tree:
    ((kind, content),) = node.items()
    if kind == "none":
        return None
    if kind == "dict":
        return {k: _rebuild(v, leaves, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        items = [_rebuild(v, leaves, tensors) for v in content]
        return items if kind == "list" else tuple(items)
    return _read_leaf(content, leaves[content], tensors)


def _read_leaf(name: str, header: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    dtype = jnp.dtype(header["dtype"])
    if "nbits" not in header:
        return tensors[name].view(dtype)
    scale = tensors.get(f"{name}#scale")
    return PalettizedArray(
        tensors[f"{name}#lut"].view(dtype),
        unpack(tensors[f"{name}#indices"], header["nbits"], tuple(header["shape"])),
        None if scale is None else scale.view(dtype),
        nbits=header["nbits"],
        vector_axis=header["vector_axis"],
    ).validate()
