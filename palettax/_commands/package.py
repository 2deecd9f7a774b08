"""The weights of a package, and two packages op by op."""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sympy
from coremltools.converters.mil.mil import types

from palettax.coreml.constexpr import value_of
from palettax.coreml.evaluate import run
from palettax.coreml.package import Op, load_program, op_name, open_model, operations_of, read_names
from palettax.coreml.read import table_name
from palettax.coreml.read_table import decompresses, lookup_of, read_table
from palettax.coreml.scoped import quiet
from palettax.coreml.weights import compressed_row, is_constant, is_part, weights_of
from palettax.leaf import PalettizedArray, same_bits
from palettax.report import report

Leaf = PalettizedArray | np.ndarray

_NOTES = ("com.github.apple.coremltools.", "palettax.")


def package_weights(path: Path) -> dict[str, tuple[Leaf, str, int | None]]:
    """Every weight of a package.

    Args:
        path: of an mlprogram.

    Returns:
        By name, as `read_palettes` gives names: the palettized array, or the values; its form where the array does not
        tell it; and its bytes likewise.
    """
    with quiet():
        mlmodel = open_model(path)
        noted, found = read_names(mlmodel), {}
        for function, op in weights_of(load_program(mlmodel)):
            own = weight_name(op)
            for name in noted.get(own, [own]):
                free = next(key for key in (name, f"{function}.{name}", f"{function}.{op.name}") if key not in found)
                found[free] = _read(op)
        return found


def _read(op: Op) -> tuple[Leaf, str, int | None]:
    if not decompresses(op):
        return np.asarray(op.outputs[0].val), "", None
    lookup = lookup_of(op)
    if lookup is not None:
        try:
            return read_table(lookup), "", None
        except ValueError:  # a form that a PalettizedArray does not have
            pass
    return value_of(op.outputs[0]), f"compressed by {op.op_type.removeprefix('constexpr_')}", compressed_row(op).nbytes


def weight_name(op: Op) -> str:
    """The name of the weight that an op is, or is the last one to decompress."""
    lookup = lookup_of(op)
    return op_name(op.name) if lookup is None else table_name(lookup)


class Palette(NamedTuple):
    """A table of the one package, and the weight of the other that it stands for.

    Attributes:
        name: of the weight.
        leaf: None if it cannot be read.
        reference: None if the other package has no such weight.
        problem: why it cannot be read.
    """

    name: str
    leaf: PalettizedArray | None
    reference: np.ndarray | None
    problem: str = ""


def compare_packages(small: Path, reference: Path) -> tuple[list[Palette], int, list[tuple[str, str]]]:
    """Everything of two packages, side by side.

    Args:
        small: the package with the tables.
        reference: the one that it was made from.

    Returns:
        The tables; how many other ops are identical; and the others, by name, with what differs about them.
    """
    with quiet():
        models = [open_model(path) for path in (small, reference)]
        ours, theirs = (list(_items(load_program(model))) for model in models)
    problems = [("package", what) for what in _descriptions_differ(*models)]
    known = {item.key: item for item in theirs}
    order, count = [item.key for item in ours], Counter(item.key for item in theirs)
    for sign, gone in (("is in the reference only", count - Counter(order)), ("is added", Counter(order) - count)):
        problems += [(name, f"the {op_type} {sign}") for (_, op_type, name) in gone]
    if not problems and order != [item.key for item in theirs]:
        problems.append(("package", "its ops are in another order"))
    palettes, identical = [], 0
    for item in ours:
        twin = known.get(item.key)
        lookup = lookup_of(item.op) if item.is_weight else None
        if lookup is not None:
            palettes.append(_palette(item, lookup, twin))
        if twin is None:
            continue
        if what := _differ(item, twin, palettized=lookup is not None):
            problems.append((item.key[2], what))
        elif lookup is None:
            identical += 1
    return palettes, identical, problems


class Output(NamedTuple):
    """One output of two packages for the same inputs.

    Attributes:
        name: of the feature.
        sqnr: of the first package's values, in dB; inf where they are equal.
        error: the largest difference over the range of the second package's values.
        sound: whether the shapes are the same, nothing is NaN, and the same is infinite.
    """

    name: str
    sqnr: float
    error: float
    sound: bool


def compare_outputs(small: Path, reference: Path, inputs: Path) -> list[Output]:
    """What two packages compute, evaluated here.

    Args:
        small: the one package.
        reference: the other.
        inputs: an .npz file with an array for each input.
    """
    try:
        file = np.load(inputs, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{inputs} is no .npz file; write it with np.savez(path, name=array)") from error
    if isinstance(file, np.ndarray):
        raise ValueError(f"{inputs} holds one array without a name; write it with np.savez(path, input_name=array)")
    with file:
        given = {name: file[name] for name in file.files}
    found, expected = (run(path, given) for path in (small, reference))
    if found.keys() != expected.keys():
        names = [", ".join(sorted(outputs)) for outputs in (found, expected)]
        raise ValueError(f"the outputs of {small} are {names[0]}, those of {reference} {names[1]}; use the same names")
    return [_output(name, found[name], value) for name, value in expected.items()]


def _output(name: str, found: Any, expected: Any) -> Output:
    if isinstance(expected, str | int):  # the label of a classifier
        return Output(name, math.inf if found == expected else -math.inf, float(found != expected), True)
    one, other = (np.asarray(list(v.values()) if isinstance(v, dict) else v, np.float64) for v in (found, expected))
    finite = np.isfinite(other)
    if one.shape != other.shape or np.isnan(one).any() or (one[~finite] != other[~finite]).any():
        return Output(name, -math.inf, math.inf, False)
    sqnr = report({name: other}, {name: one})[name].sqnr
    one, other = one[finite], other[finite]
    error, spread = abs(one - other).max(initial=0), np.ptp(other) if other.size else 0
    return Output(name, sqnr, float(error / (spread or abs(other).max(initial=0) or 1)), True)


class _Item(NamedTuple):
    """An op beside which that of another program can stand.

    Attributes:
        key: function, type and name: every weight is of the type "weight", and its name is without suffixes, but
            numbered where that leaves two of one name.
        op: the op.
        is_weight: whether it is a constant, or the last of those that decompress one.
        types: of its outputs; lengths that are unknown are numbered as they appear in the program.
    """

    key: tuple[str, str, str]
    op: Op
    is_weight: bool
    types: list[str]


def _items(program: Any) -> Iterator[_Item]:
    taken: Counter[tuple[str, str, str]] = Counter()
    symbols: dict[Any, Any] = {}

    for function, op in operations_of(program):
        constant = is_constant(op)
        if constant and is_part(op):
            continue
        key = (function, "weight", weight_name(op)) if constant else (function, op.op_type, op.name)
        taken[key] += 1
        name = key[2] if taken[key] == 1 else f"{key[2]} ({taken[key]})"
        outputs = op.outputs[-1:] if constant else op.outputs
        yield _Item((function, key[1], name), op, constant, [_type(var, symbols) for var in outputs])


def _palette(item: _Item, lookup: Op, twin: _Item | None) -> Palette:
    reference = None if twin is None else np.asarray(value_of(twin.op.outputs[0]))
    try:
        return Palette(item.key[2], read_table(lookup), reference)
    except (ValueError, IndexError) as error:
        return Palette(item.key[2], None, reference, str(error))


def _differ(one: _Item, other: _Item, palettized: bool) -> str:
    """What differs between two ops; empty if nothing does. Of a table, only what stands around it is compared."""
    if one.is_weight:
        if one.types != other.types:
            return f"it is {one.types[0]}, the reference {other.types[0]}"
        return "" if palettized else _constants_differ(one.op, other.op)
    if one.types != other.types or [var.name for var in one.op.outputs] != [var.name for var in other.op.outputs]:
        return "its outputs differ in name or type"
    if one.op.inputs.keys() != other.op.inputs.keys():
        return "its inputs differ"
    for name in one.op.inputs:
        if _names(one.op.inputs[name]) != _names(other.op.inputs[name]):
            return f"its input {name} is another"
    blocks = [[(_names(b.inputs), _names(b.outputs)) for b in op.blocks] for op in (one.op, other.op)]
    return "" if blocks[0] == blocks[1] else "its blocks differ"


def _constants_differ(one: Op, other: Op) -> str:
    """What differs between two constants, or between all that they are decompressed from."""
    if one.op_type != other.op_type:
        return f"it is made by {one.op_type}, in the reference by {other.op_type}"
    if one.op_type == "const":
        first, second = one.outputs[0].val, other.outputs[0].val
        if same_bits(first, second):
            return ""
        first, second = np.asarray(first), np.asarray(second)
        return f"{int((first != second).sum())} of its {first.size} values differ from the reference's"
    for name, var in one.inputs.items():
        twin = other.inputs.get(name)
        if (var is None) != (twin is None):
            return f"its {name} is there in one of the packages"
        if var is not None and (what := _constants_differ(var.op, twin.op)):
            return f"{name}: {what}"
    return ""


def _names(given: Any) -> Any:
    """The names of variables, those of weights without suffixes."""
    if isinstance(given, list | tuple):
        return tuple(map(_names, given))
    op = getattr(given, "op", None)
    if op is not None and is_constant(op):
        return weight_name(op)
    return getattr(given, "name", None)


def _type(var: Any, symbols: dict[Any, Any]) -> str:
    kind = var.sym_type
    if not types.is_tensor(kind):
        return str(kind.__type_info__())
    lengths = []
    for length in kind.get_shape():
        for symbol in sorted(getattr(length, "free_symbols", ()), key=lambda symbol: (len(symbol.name), symbol.name)):
            symbols.setdefault(symbol, sympy.Symbol(f"n{len(symbols)}"))
        lengths.append(str(length.subs(symbols) if hasattr(length, "subs") else length))
    return f"{kind.get_primitive().__type_info__()} {tuple(lengths)}"


def _descriptions_differ(one: Any, other: Any) -> Iterator[str]:
    """How two models differ outside their programs: in all but what converters note of themselves."""
    ours, theirs = (model.get_spec().description for model in (one, other))
    for description in (ours, theirs):
        noted = description.metadata.userDefined
        for key in [key for key in noted if key.startswith(_NOTES)]:
            del noted[key]
    for field in ours.DESCRIPTOR.fields:
        if _in_bytes(getattr(ours, field.name)) != _in_bytes(getattr(theirs, field.name)):
            yield f"its description has another {field.name}"


def _in_bytes(value: Any) -> Any:
    """The value of a protobuf field, for comparison."""
    if hasattr(value, "SerializeToString"):
        return value.SerializeToString(deterministic=True)
    return value if isinstance(value, str | bytes) else list(map(_in_bytes, value))
