"""A package as a program: open it, name its weights, and walk its ops."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.converter import mil_convert
from coremltools.converters.mil.frontend.milproto.load import load
from coremltools.converters.mil.mil import Program
from coremltools.converters.mil.mil.var import ListVar

from palettax._files import size_on_disk
from palettax.coreml.moves import Move

Op = Any
"""An op of coremltools, which has its inputs as attributes that no type declares."""

_SHARED, _SHARED_BY_FUNCTIONS = 100, 10
"""From how many elements equal constants are stored once: as coremltools does in one function, and what it can."""

METADATA_KEY, MOVES_KEY = "palettax.leaves", "palettax.moves"
_SUFFIXES = re.compile(r"(_cast_fp16|_to_fp16|_palettized|_sparsified|_quantized|_pcs)+$")


def open_model(mlmodel: ct.models.MLModel | str | Path) -> ct.models.MLModel:
    """The model itself, or the one at a path, without compiling it."""
    if isinstance(mlmodel, ct.models.MLModel):
        return mlmodel
    if not isinstance(mlmodel, str | Path):
        raise ValueError(
            f"a {type(mlmodel).__name__} is no Core ML model; give an MLModel, or the path of an .mlpackage"
        )
    if not Path(mlmodel).exists():
        raise FileNotFoundError(f"{mlmodel}: there is no such package")
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

    Returns:
        The name of the function and the op, one after the other.

    Raises:
        ValueError: the model is not an mlprogram.
    """
    return operations_of(load_program(mlmodel))


def load_program(mlmodel: ct.models.MLModel, target: ct.target | None = None) -> Program:
    """The program of a package, its weights in memory.

    Args:
        mlmodel: an mlprogram.
        target: raise an older program to this one.

    Raises:
        ValueError: the model is not an mlprogram.
    """
    spec = mlmodel.get_spec()
    if spec.WhichOneof("Type") != "mlProgram":
        raise ValueError(f"the model is a {spec.WhichOneof('Type')}; only an mlProgram holds lookup tables")
    version = spec.specificationVersion if target is None else max(spec.specificationVersion, target.value)
    try:
        program: Any = load(spec, version, mlmodel.weights_dir or "")
    except Exception as error:  # of damaged weights and of ops that it does not know it raises anything
        raise ValueError(f"the program cannot be read ({type(error).__name__}: {error}); is it damaged?") from error
    program.default_function_name = spec.description.defaultFunctionName or "main"
    for _, op in list(operations_of(program)):
        # The loader leaves behind what it made branches of before it filled them.
        var = op.outputs[0]
        loose = op.op_type == "const" and not isinstance(var, ListVar) and var.rank == 0 and not var.child_ops
        if loose and var not in op.enclosing_block.outputs:
            op.enclosing_block.remove_ops([op])
    return program


def operations_of(program: Program) -> Iterator[tuple[str, Op]]:
    """Every op of a program, nested blocks included, the default function first, with the name of its function."""
    default = program.default_function_name
    for name in sorted(program.functions, key=lambda name: (name != default, name)):
        for op in _walk(program.functions[name].operations):
            yield name, op


def rebuild(program: Program, mlmodel: ct.models.MLModel) -> ct.models.MLModel:
    """A model of a program that was loaded and edited: whatever was not edited is as it was, bit for bit.

    Args:
        program: from `load_program`; it is not to be used again.
        mlmodel: the model that it was loaded from.

    Returns:
        The model with the description and the metadata of the old one. What the program itself notes of its converter,
        which the metadata repeat, is dropped.
    """
    spec = mlmodel.get_spec()
    edited: Any = program
    edited.skip_all_passes = True
    versions = [function.opset_version.value for function in program.functions.values()]
    edited.export_as_multifunction = len(program.functions) > 1 or bool(spec.description.defaultFunctionName)
    _share_equal(edited, _SHARED_BY_FUNCTIONS if edited.export_as_multifunction else _SHARED)
    built: Any = mil_convert(
        edited,
        convert_from="milinternal",
        convert_to="mlprogram",
        compute_units=mlmodel.compute_unit,
        specification_version=max(spec.specificationVersion, *versions),
        model_description=spec.description,
        skip_model_load=mlmodel.__proxy__ is None,
    )
    return built


def _share_equal(program: Program, smallest: int) -> None:
    """Let equal constants of so many elements be stored once."""
    for _, op in operations_of(program):
        value = op.outputs[0].val if op.op_type == "const" else None
        if isinstance(value, np.ndarray) and value.size >= smallest:
            kind = f"{op.outputs[0].dtype.__type_info__()} {value.shape} "
            op.weight_id = hashlib.blake2b(kind.encode() + value.tobytes()).hexdigest()


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
    """The leaves noted for each op, by the op's name; none in a package of another maker."""
    return json.loads(mlmodel.user_defined_metadata.get(METADATA_KEY, "{}"))


def write_names(mlmodel: ct.models.MLModel, names: dict[str, list[str]]) -> None:
    """Note in the package which leaves each op stands for."""
    mlmodel.user_defined_metadata[METADATA_KEY] = json.dumps(names, sort_keys=True)


def read_moves(mlmodel: ct.models.MLModel) -> dict[str, list[Move]]:
    """What was done to each leaf before it went into the package, by the name of the leaf."""
    noted = json.loads(mlmodel.user_defined_metadata.get(MOVES_KEY, "{}"))
    return {leaf: [(kind, numbers) for kind, numbers in moves] for leaf, moves in noted.items()}


def write_moves(mlmodel: ct.models.MLModel, moves: dict[str, list[Move]]) -> None:
    """Note in the package what was done to each leaf, if anything was."""
    if moves:
        mlmodel.user_defined_metadata[MOVES_KEY] = json.dumps(moves, sort_keys=True)


def save_package(mlmodel: ct.models.MLModel, path: str | Path) -> Path:
    """Write a package whole or not at all; an older one at the path is replaced.

    Folders cannot be swapped in one step. For that moment the older one lies beside the path, under its name with a dot
    in front and `.old` behind; if the process is killed right then, the next call puts it back first.

    Args:
        mlmodel: the model.
        path: ends in `.mlpackage`.

    Returns:
        The path.

    Raises:
        ValueError: another suffix.
        OSError: what could not be written, and where.
    """
    target = Path(path)
    if target.suffix != ".mlpackage":
        raise ValueError(f"{target}: a package's name ends in .mlpackage")
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        shutil.rmtree(old) if target.exists() else old.rename(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        fresh = Path(folder) / target.name
        plain = Path(folder) / "plain"
        plain.mkdir()
        try:
            mlmodel.save(str(fresh))
        except Exception as error:  # a full disk is a RuntimeError of its own there
            raise OSError(f"{target} could not be written: {error}") from error
        fresh.chmod(plain.stat().st_mode)  # a temporary folder, which it was copied from, is nobody else's to read
        try:
            if target.exists():
                target.rename(old)
            fresh.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
    shutil.rmtree(old, ignore_errors=True)
    return target


def package_bytes(path: str | Path) -> int:
    """The bytes of every file in a package."""
    return size_on_disk(path)
