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

from palettax._paths import leaf_name, leaf_names
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
            Flax states) are written, and come back, as the nested dict of their leaf paths; `nnx.replace_by_pure_dict`
            puts that back into a state.

    Raises:
        ValueError: a leaf that is no array of numbers or breaks its invariants, or a dict key of another type.

    Example:
        >>> import os, tempfile, jax, palettax as px
        >>> small = px.palettize({"w": jax.random.normal(jax.random.key(0), (64, 64))}, px.kmeans(nbits=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     px.save(os.path.join(folder, "small.safetensors"), small)
        ...     px.load(os.path.join(folder, "small.safetensors"))["w"].nbits
        2
    """
    leaves: list[dict[str, Any]] = []
    tensors: dict[str, np.ndarray] = {}
    structure = _describe(tree, (), leaves, tensors)
    header = {"format": FORMAT, "structure": json.dumps(structure), "leaves": json.dumps(leaves)}
    target = Path(path)
    # Neither a temporary file nor what safetensors writes is readable by others, as any new file may be.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        fresh = Path(folder) / target.name
        fresh.touch()
        mode = fresh.stat().st_mode
        safetensors.numpy.save_file(tensors, fresh, metadata=header)
        fresh.chmod(mode)
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
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} has a damaged header ({type(error).__name__}: {error}); write it again with px.save"
        ) from error


def _describe(tree: Tree, path: tuple[Any, ...], leaves: list[dict[str, Any]], tensors: dict[str, np.ndarray]) -> Any:
    """The JSON skeleton of a tree; fills the headers and the tensors of its leaves on the way."""
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
    if is_palettized(tree) or [key for key, _ in inside] == [()]:
        return {"leaf": _write_leaf(leaf_name(path), tree, leaves, tensors)}
    if [key for key, _ in inside] == [(jax.tree_util.GetAttrKey("value"),)]:
        # The wrapper that a Flax variable puts around its array.
        return _describe(inside[0][1], path, leaves, tensors)
    children = dict(zip(leaf_names([key for key, _ in inside]), [child for _, child in inside], strict=True))
    if len(children) < len(inside):
        raise ValueError(f"two fields under '{leaf_name(path)}' have one name; rename one")
    return _describe(children, path, leaves, tensors)


def _write_leaf(name: str, leaf: Any, leaves: list[dict[str, Any]], tensors: dict[str, np.ndarray]) -> int:
    """Add the parts of a leaf to the tensors and its header to the headers; returns its number."""
    if is_palettized(leaf):
        try:
            leaf.validate()
        except ValueError as error:
            raise ValueError(f"leaf '{name}': {error}") from error
        parts = {"lut": leaf.lut, "indices": pack(np.asarray(leaf.indices), leaf.nbits)}
        parts |= {} if leaf.scale is None else {"scale": leaf.scale}
        header = {"nbits": leaf.nbits, "shape": list(leaf.indices.shape), "vector_axis": leaf.vector_axis}
    else:
        parts, header = {"": leaf}, {}
    keys = {}
    for part, array in parts.items():
        keys[part] = _free_key(f"{name}#{part}" if part else name, tensors)
        tensors[keys[part]] = _carry(name, _as_numpy(name, array))
    dtype = leaf.dtype if is_palettized(leaf) else np.asarray(leaf).dtype
    leaves.append(header | {"dtype": str(np.dtype(dtype).newbyteorder("=")), "tensors": keys})
    return len(leaves) - 1


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
    foreign = array.dtype.names is not None or array.dtype.kind not in "biufcV"
    if foreign or (array.dtype.kind == "V" and array.dtype.itemsize not in _CARRIERS):
        raise ValueError(f"leaf '{name}' is of {array.dtype}, which is no array of numbers; leave it out")
    # ascontiguousarray would give a scalar an axis.
    array = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    return array.view(_CARRIERS[array.dtype.itemsize]) if array.dtype.kind == "V" else array


def _rebuild(node: Any, leaves: list[dict[str, Any]], tensors: dict[str, np.ndarray]) -> Tree:
    ((kind, content),) = node.items()
    if kind == "none":
        return None
    if kind == "dict":
        return {k: _rebuild(v, leaves, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        items = [_rebuild(v, leaves, tensors) for v in content]
        return items if kind == "list" else tuple(items)
    return _read_leaf(leaves[content], tensors)


def _read_leaf(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    dtype = jnp.dtype(header["dtype"])
    parts = {part: tensors[key] for part, key in header["tensors"].items()}
    if "nbits" not in header:
        return parts[""].view(dtype)
    return PalettizedArray(
        parts["lut"].view(dtype),
        unpack(parts["indices"], header["nbits"], tuple(header["shape"])),
        parts["scale"].view(dtype) if "scale" in parts else None,
        nbits=header["nbits"],
        vector_axis=header["vector_axis"],
    ).validate()
