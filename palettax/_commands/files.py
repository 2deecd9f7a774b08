"""Files of weights: what kind each is, and reading and writing the ones that hold a tree."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

import palettax as px
from palettax._extras import require
from palettax._files import replacing
from palettax._paths import identity_of, leaf_names
from palettax._typing import Tree
from palettax.checkpoint import FORMAT
from palettax.leaf import is_palettized

PACKAGE, SAFETENSORS, TORCH, ORBAX = ".mlpackage", ".safetensors", ".pt", "orbax"
_SUFFIXES = {".mlpackage": PACKAGE, ".safetensors": SAFETENSORS, ".pt": TORCH, ".pth": TORCH}
_OUTPUTS = {
    PACKAGE: (".mlpackage",),
    SAFETENSORS: (".safetensors",),
    TORCH: (".pt", ".pth", ".safetensors"),
    ORBAX: (".safetensors",),
}
_NESTED = ("state_dict", "model")


class UnsoundError(ValueError):
    """A file that can be read, with weights that contradict each other."""


def kind_of(path: Path) -> str:
    """What kind of file this is, by its suffix; a folder without one of those is an orbax checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a suffix that stands for no kind, or a file where that kind is a folder.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    kind = _SUFFIXES.get(path.suffix.lower(), ORBAX if path.is_dir() else None)
    if kind is None:
        known = ", ".join(_SUFFIXES)
        raise ValueError(
            f"{path}: {path.suffix or 'no suffix'!r} is no kind of weights; use {known} or an orbax folder"
        )
    if path.is_dir() != (kind in (PACKAGE, ORBAX)):
        raise ValueError(
            f"{path} is a {'folder' if path.is_dir() else 'file'}, which no {path.suffix} is; give another"
        )
    return kind


def check_output(source: Path, out: Path, force: bool) -> None:
    """Refuse a place to write to before any work is done.

    Raises:
        ValueError: its suffix does not go with the source, or something is there already.
        FileNotFoundError: its folder is not there.
    """
    kind = kind_of(source)
    allowed = _OUTPUTS[kind]
    if out.suffix not in allowed:
        written = " or ".join(allowed)
        raise ValueError(
            f"{out}: what comes from {'orbax' if kind == ORBAX else source.suffix} is written to {written}"
        )
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: there is no such folder; make it first")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"{out.parent}: this folder may not be written to")
    if out.exists() and kind_of(out) and not force:
        raise ValueError(f"{out} is there already; give --force to replace it")


def read_tree(path: Path) -> tuple[Tree, list[str]]:
    """The weights of a file that holds a tree, on the host.

    Args:
        path: of any kind but a package.

    Returns:
        The tree, its leaves NumPy arrays or `PalettizedArray`s of them; and what else is in the file and was left out.

    Raises:
        ValueError: the file cannot be read.
        UnsoundError: weights that are not on the tables that they come with.
    """
    kind = kind_of(path)
    if kind == SAFETENSORS:
        return _read_safetensors(path), []
    return _read_torch(path) if kind == TORCH else (_read_orbax(path), [])


def named_leaves(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by the names that reports call them by."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_palettized)[0]
    names = leaf_names([path for path, _ in leaves])
    return dict(zip(names, [leaf if is_palettized(leaf) else np.asarray(leaf) for _, leaf in leaves], strict=True))


def write_tree(tree: Tree, out: Path) -> None:
    """Write a tree in the format of the suffix, whole or not at all."""
    if out.suffix.lower() == ".safetensors":
        px.save(out, tree)
        return
    torch = require("torch", "torch")
    from palettax.torch import to_state_dict

    state, first = to_state_dict(tree), {}
    for name, leaf in tree.items():  # tied weights are stored once
        state[name] = state[first.setdefault(identity_of(leaf), name)]
    with replacing(out) as fresh:
        torch.save(state, fresh)


def _read_safetensors(path: Path) -> Tree:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("format") == FORMAT:
                return px.load(path)
            return {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); write it again") from error


def _tensor(file: Any, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (AttributeError, TypeError) as error:
        kind = file.get_slice(name).get_dtype()
        raise ValueError(f"{name}: NumPy has no {kind}; cast it, or leave it out of the file") from error


def _read_torch(path: Path) -> tuple[dict[str, Any], list[str]]:
    torch = require("torch", "torch")
    from palettax.torch import to_params

    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle, zip and torch raise their own, for a file of another kind
        raise ValueError(
            f"{path} holds more than tensors, or is no file of torch ({type(error).__name__}), and nothing is "
            "unpickled here; write it with torch.save(model.state_dict(), ...)"
        ) from error
    left_out = []
    if isinstance(content, Mapping):
        for key in _NESTED:
            if isinstance(content.get(key), Mapping):
                left_out, content = [str(other) for other in content if other != key], content[key]
                break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors; save model.state_dict()")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(tensor).__name__}, no tensor; save model.state_dict() alone")
    try:
        return to_params(content), left_out
    except ValueError as error:
        raise UnsoundError(f"{path}: {error}") from error


def _read_orbax(path: Path) -> Tree:
    require("orbax", "flax")
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of metadata that only a manager writes
    try:
        ocp = require("orbax.checkpoint", "flax")
        if not (path / "_METADATA").exists():
            within = sorted(str(file.parent) for depth in ("*", "*/*") for file in path.glob(f"{depth}/_METADATA"))
            raise ValueError(
                f"{path} is no orbax checkpoint of a tree"
                + (f"; give one of those in it: {', '.join(within[:4])}" if within else "")
            )
        reader = ocp.PyTreeCheckpointer()
        found: Any = reader.metadata(path.absolute())
        found = getattr(found, "item_metadata", found)
        # Neither devices nor shardings of where it was written are needed, nor there.
        on_host = ocp.RestoreArgs(restore_type=np.ndarray)
        arguments = jax.tree.map(lambda _: on_host, getattr(found, "tree", found))
        return reader.restore(path.absolute(), restore_args=arguments)
    except ValueError:
        raise
    except Exception as error:  # what it raises for a damaged folder has no type in common
        raise ValueError(f"{path} cannot be read as an orbax checkpoint ({type(error).__name__}: {error})") from error
    finally:
        logger.setLevel(level)
