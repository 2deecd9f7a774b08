"""A package as a program: open it, name its weights, and walk its ops."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coremltools as ct
from coremltools.converters.mil.frontend.milproto.load import load

Op = Any
"""An op of coremltools, which has its inputs as attributes that no type declares."""

METADATA_KEY = "palettax.leaves"
_SUFFIXES = re.compile(r"(_cast_fp16|_to_fp16|_palettized|_pcs)+$")


def open_model(mlmodel: ct.models.MLModel | str | Path) -> ct.models.MLModel:
    """The model itself, or the one at a path, without compiling it."""
    if isinstance(mlmodel, ct.models.MLModel):
        return mlmodel
    try:
        return ct.models.MLModel(str(mlmodel), skip_model_load=True)
    except Exception as error:  # what it raises for a file of another kind has no type in common
        raise ValueError(
            f"{str(mlmodel)!r} is no Core ML package ({type(error).__name__}); give an .mlpackage"
        ) from error


def operations(mlmodel: ct.models.MLModel) -> Iterator[tuple[str, Op]]:
    """Every op of a package, nested blocks included, the default function first.

    Args:
        mlmodel: an mlprogram.

    Yields:
        The name of the function and the op.

    Raises:
        ValueError: the model is not an mlprogram.
    """
    spec = mlmodel.get_spec()
    if spec.WhichOneof("Type") != "mlProgram":
        raise ValueError(f"the model is a {spec.WhichOneof('Type')}; only an mlProgram holds lookup tables")
    program = load(spec, spec.specificationVersion, mlmodel.weights_dir or "")
    default = spec.description.defaultFunctionName or "main"
    for name in sorted(program.functions, key=lambda name: (name != default, name)):
        for op in _walk(program.functions[name].operations):
            yield name, op


def _walk(ops: Any) -> Iterator[Op]:
    for op in ops:
        yield op
        for block in op.blocks:
            yield from _walk(block.operations)


def op_name(name: str) -> str:
    """The name that Core ML gives to the op of a weight.

    Args:
        name: a dotted name, or an op's.

    Returns:
        It in letters, digits and underscores, not beginning with a digit, without coremltools' suffixes.

    Example:
        >>> op_name("0.weight"), op_name("dense.weight_cast_fp16")
        ('p_0_weight', 'dense_weight')
    """
    clean = _SUFFIXES.sub("", re.sub(r"\W", "_", name, flags=re.ASCII))
    return f"p_{clean}" if clean[:1].isdigit() else clean


def read_names(mlmodel: ct.models.MLModel) -> dict[str, list[str]]:
    """The leaves that `from_torch` noted for each op, by the op's name; none in a package of another maker."""
    return json.loads(mlmodel.user_defined_metadata.get(METADATA_KEY, "{}"))


def write_names(mlmodel: ct.models.MLModel, names: dict[str, list[str]]) -> None:
    """Note in the package which leaves each op stands for."""
    mlmodel.user_defined_metadata[METADATA_KEY] = json.dumps(names, sort_keys=True)


def save_package(mlmodel: ct.models.MLModel, path: str | Path) -> Path:
    """Write a package whole or not at all; an older one at the path is replaced.

    Args:
        mlmodel: the model.
        path: ends in `.mlpackage`.

    Returns:
        The path.
    """
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        fresh, old = Path(folder) / target.name, Path(folder) / "old"
        mlmodel.save(str(fresh))
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    return target


def package_bytes(path: str | Path) -> int:
    """The bytes of every file in a package."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
