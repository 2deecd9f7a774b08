"""A package as a program: open it, name its weights, and walk its ops."""

from __future__ import annotations

import hashlib
import itertools
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

from palettax._files import folder_beside, size_on_disk
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
    place = found_at(mlmodel)
    if not place.exists():
        raise FileNotFoundError(f"{mlmodel}: there is no such package")
    try:
        return ct.models.MLModel(str(place), skip_model_load=True)
    except Exception as error:  # what it raises for a file of another kind has no type in common
        raise ValueError(
            f"{str(mlmodel)!r} is no Core ML package ({type(error).__name__}: {error}); give an .mlpackage"
        ) from error


def found_at(path: str | Path) -> Path:
    """Where the package of a path is: beside it, if a process was killed while `save_package` swapped two."""
    target = Path(path).resolve()
    old = _old(target)
    return old if old.exists() and not target.exists() else target


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


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
    kind = spec.WhichOneof("Type")
    if kind is None:
        raise ValueError("the program cannot be read (there is none); is it damaged?")
    if kind != "mlProgram":
        raise ValueError(
            f"the model is a {kind}; only an mlProgram holds lookup tables: convert it "
            "again with convert_to='mlprogram'"
        )
    version = spec.specificationVersion if target is None else max(spec.specificationVersion, target.value)
    try:
        program: Any = load(spec, version, mlmodel.weights_dir or "")
    except Exception as error:  # of damaged weights and of ops that it does not know it raises anything
        raise ValueError(f"the program cannot be read ({type(error).__name__}: {error}); is it damaged?") from error
    program.default_function_name = spec.description.defaultFunctionName or "main"
    for name, function in program.functions.items():
        _name_as_stored(function, spec.mlProgram.functions[name])
    for _, op in list(operations_of(program)):
        # The loader leaves behind what it made branches of before it filled them.
        var = op.outputs[0]
        loose = op.op_type == "const" and not isinstance(var, ListVar) and var.rank == 0 and not var.child_ops
        if loose and var not in op.enclosing_block.outputs:
            op.enclosing_block.remove_ops([op])
    return program


def _name_as_stored(function: Any, stored: Any) -> None:
    """Undo the names that the loader draws, from counters that go on from one program to the next.

    An op of coremltools for writing and reading a state is two in a package; a constant in the place of an input has
    no name there, and gets that of the input.
    """
    ops = list(_walk_stored(stored.block_specializations[stored.opset]))
    names = {op.attributes["name"].immediateValue.tensor.strings.values[0] for op in ops if "name" in op.attributes}
    names |= {output.name for op in ops for output in op.outputs} | set(function.inputs)
    writes = iter([op.attributes["name"] for op in ops if op.type == "write_state"])
    for op in _walk(function.operations):
        if op.op_type == "coreml_update_state":
            write = next(writes).immediateValue.tensor.strings.values
            if write:
                op.name = write[0].removesuffix("_write_state")
            if op.outputs[0].name not in names:  # nobody reads it
                op.outputs[0].name = op.name
        elif op.op_type == "const" and op.name not in names and op.outputs[0].child_ops:
            reader, var = op.outputs[0].child_ops[0], op.outputs[0]
            place = next((name for name, given in reader.inputs.items() if given is var), "value")
            op.name = var.name = next(name for name in _numbered(f"{reader.name}_{place}") if name not in names)
            names.add(op.name)


def _numbered(name: str) -> Iterator[str]:
    """The name, and then it with a number behind."""
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(1))


def _walk_stored(block: Any) -> Iterator[Any]:
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _walk_stored(inner)


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
    _share_equal(edited, shared_from(edited))
    try:
        built: Any = mil_convert(
            edited,
            convert_from="milinternal",
            convert_to="mlprogram",
            compute_units=mlmodel.compute_unit,
            specification_version=max(spec.specificationVersion, *versions),
            model_description=spec.description,
            skip_model_load=mlmodel.__proxy__ is None,
            pass_pipeline=ct.PassPipeline.EMPTY,  # the program is validated once for each pass, of those skipped too
        )
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and type(error) is not RuntimeError:  # which a full disk is
            raise
        raise OSError(
            f"the new package could not be written in {tempfile.gettempdir()!r}, from where it is saved: {error}. "
            "TMPDIR can name another folder"
        ) from error
    return built


def shared_from(program: Program) -> int:
    """From how many elements on equal constants of a program are stored once."""
    return _SHARED_BY_FUNCTIONS if len(program.functions) > 1 else _SHARED


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
        OSError: what could not be written, and where; or a file is there.
    """
    target = Path(path)
    if target.suffix != ".mlpackage":
        raise ValueError(f"{target}: a package's name ends in .mlpackage")
    if target.is_symlink():
        target = target.resolve()
    if target.is_file():
        raise FileExistsError(f"{target} is a file and no package; remove it, or give another name")
    old = _old(target)
    if old.exists():
        shutil.rmtree(old) if target.exists() else old.rename(target)
    with folder_beside(target) as folder:
        fresh, plain = folder / "fresh.mlpackage", folder / "plain"
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
    return Path(path)


def package_bytes(path: str | Path) -> int:
    """The bytes of every file in a package."""
    return size_on_disk(path)
