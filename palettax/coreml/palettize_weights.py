"""`palettize_weights`: a package in, a smaller one out, and what became of every weight."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Program, types
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

from palettax._keys import warn_caller
from palettax._names import nearest
from palettax._progress import progress_bar
from palettax.coreml.config import OpPalettizerConfig, OptimizationConfig, names_of
from palettax.coreml.forms import check_forms, in_package
from palettax.coreml.inject import replace_weight
from palettax.coreml.package import Op, load_program, open_model, operations_of, rebuild, shared_from
from palettax.coreml.read_table import decompresses
from palettax.coreml.recipe import in_bits_of, transform_of, unfit
from palettax.coreml.scoped import quiet
from palettax.coreml.weights import (
    Numbers,
    compressed_row,
    is_floating,
    named_weights,
    numbers_of,
    output_axis,
    weights_of,
)
from palettax.leaf import PalettizedArray, is_palettized, shift_tables, spread
from palettax.palettize import palettize
from palettax.report import LeafReport, Report, report


class Compressed(NamedTuple):
    """A smaller model, and what became of its weights.

    Attributes:
        mlmodel: the model.
        report: by the name of each weight, what it costs now, what it lost, and if it was left as it was, why.
    """

    mlmodel: ct.models.MLModel
    report: Report


def palettize_weights(
    mlmodel: ct.models.MLModel | str | Path, config: Any, joint_compression: bool = False
) -> ct.models.MLModel:
    """Palettize the weights of a Core ML model; all else stays as it is, bit for bit.

    A weight that an op reads and the program returns is returned as its table gives it.

    Args:
        mlmodel: an mlprogram of any number of functions, or the path of one; it is not changed. One from before iOS16,
            which has no lookup tables, is raised to iOS16.
        config: an `OptimizationConfig`, or coremltools' own.
        joint_compression: also palettize what is pruned, without an entry for zeros, and what is quantized, under its
            scales. Without it, what is compressed in any way stays as it is.

    Returns:
        The smaller model. A warning says which weights the configuration asks for and did not get, and why;
        `compress_weights` also gives that for every weight.

    Raises:
        ValueError: a model of another kind, a form of table that its deployment target does not hold, ops that read one
            weight with different configurations, or `joint_compression` before iOS18.

    Example:
        >>> import coremltools as ct, numpy as np, torch
        >>> from palettax.coreml import OpPalettizerConfig, OptimizationConfig, from_torch, read_palettes
        >>> model = from_torch(torch.nn.Linear(64, 64), torch.ones(1, 64), {}, minimum_deployment_target="iOS18")
        >>> small = palettize_weights(model, OptimizationConfig(OpPalettizerConfig(nbits=4)))
        >>> [leaf.nbits for leaf in read_palettes(small).values()]
        [4]
    """
    return _palettize(mlmodel, config, joint_compression)[0]


def compress_weights(
    mlmodel: ct.models.MLModel | str | Path, config: Any, joint_compression: bool = False
) -> Compressed:
    """What `palettize_weights` does, and what became of every weight.

    Args:
        mlmodel: as there.
        config: as there.
        joint_compression: as there.

    Returns:
        The model and a report, which prints as a table.
    """
    small, weights = _palettize(mlmodel, config, joint_compression)
    return Compressed(small, Report({weight.name: _row(weight) for weight in weights}))


@dataclasses.dataclass
class _Weight:
    """A weight on its way.

    Attributes:
        name: of its op, behind that of its function where another function has the name too.
        op: the constant, or the last op of those that decompress it.
        config: how it is palettized; None: it stays as it is.
        reason: why it stays.
        asked: whether it was to be palettized all the same.
        numbers: what is stored for it, if that can be palettized.
        small: what became of it, as its target holds it.
        tied_to: the weight that it is stored with, if it is equal to one before it.
    """

    name: str
    op: Op
    config: OpPalettizerConfig | None = None
    reason: str = ""
    asked: bool = False
    numbers: Numbers | None = None
    small: PalettizedArray | None = None
    tied_to: str = ""


def _palettize(mlmodel: Any, config: Any, joint: bool) -> tuple[ct.models.MLModel, list[_Weight]]:
    """The smaller model, and the weights."""
    mlmodel, config = open_model(mlmodel), OptimizationConfig.of(config)
    with quiet():
        program = load_program(mlmodel, ct.target.iOS16)
        target = next(iter(program.functions.values())).opset_version
        if joint and target < ct.target.iOS18:
            raise ValueError(f"joint_compression=True: the model is for {target.name}; convert it for iOS18 or later")
        _warn_unmatched(config, program)
        weights = [_planned(name, op, config, joint) for name, op in named_weights(program)]
        _cluster(weights, target)
        _tie(weights, shared_from(program))
        for block, group in itertools.groupby(weights, lambda weight: weight.op.enclosing_block):
            with block:
                for weight in group:
                    if weight.small is not None:
                        replace_weight(weight.op, weight.small, weight.small.dtype, f"{weight.op.name}_palettized")
        small = rebuild(program, mlmodel)
    for weight in weights:
        if weight.asked and weight.small is None:
            warn_caller(f"{weight.name} stays as it is: {weight.reason}")
    return small, weights


def _warn_unmatched(config: OptimizationConfig, program: Program) -> None:
    names = {op.name for _, op in operations_of(program) if op.op_type != "const"}
    names |= {name for _, op in weights_of(program) for name in names_of(op)}
    for name in config.op_name_configs:
        if name not in names:
            warn_caller(f"op_name_configs[{name!r}]: no op and no weight has this name; {nearest(name, names)}")
    for op_type in config.op_type_configs:
        known = SSAOpRegistry.core_ops
        if op_type not in known:
            warn_caller(f"op_type_configs[{op_type!r}]: there is no such type of op; {nearest(op_type, known)}")


def _planned(name: str, op: Op, config: OptimizationConfig, joint: bool) -> _Weight:
    """A weight with its configuration, or why it stays as it is."""
    weight, var = _Weight(name, op), op.outputs[0]
    if not is_floating(op):
        weight.reason = f"{types.builtin_to_string(var.dtype)} is not floating"
        return weight
    choice, size = config.choose(op), int(np.prod(var.shape))
    if choice.config is None:
        weight.reason = choice.where if not op.outputs[-1].child_ops else f"{choice.where} is None"
    elif op.enclosing_block.outer_op is not None and any(v in op.enclosing_block.outputs for v in op.outputs):
        weight.reason = "it is an output of a branch or a loop"
    elif var.rank < 2:
        weight.reason = "it has one axis"
    elif size <= choice.config.weight_threshold:
        weight.reason = f"its {size} elements do not exceed weight_threshold={choice.config.weight_threshold}"
    elif decompresses(op) and not joint:
        weight.reason = "it is compressed already; joint_compression=True compresses it further"
    elif (numbers := numbers_of(op)) is None:
        weight.asked = True
        weight.reason = f"it is compressed already, by {op.op_type}; decompress_weights gives it back"
    else:
        weight.asked, weight.numbers = True, numbers
        weight.reason = unfit(choice.config, op, numbers)
        weight.config = None if weight.reason else choice.config
    return weight


def _cluster(weights: list[_Weight], target: ct.target) -> None:
    """Give every weight that has a configuration its table, or the reason why it gets none."""
    todo = [weight for weight in weights if weight.config is not None]
    known: dict[tuple[Any, ...], tuple[PalettizedArray | None, str]] = {}
    with progress_bar("palettizing", "weights") as advance:
        for done, weight in enumerate(todo):
            advance(done, len(todo))
            same = _identity(weight, weight.numbers)
            if same not in known:
                known[same] = _table(weight, target)
            weight.small, weight.reason = known[same]
        advance(len(todo), len(todo))


def _tie(weights: list[_Weight], smallest: int) -> None:
    """Note which weights of at least so many elements are stored with one before them."""
    first: dict[tuple[Any, ...], str] = {}
    for weight in weights:
        numbers = weight.numbers or (numbers_of(weight.op) if weight.op.op_type == "const" else None)
        if numbers is not None and numbers.values.size >= smallest:
            name = first.setdefault((*_identity(weight, numbers), weight.small is None), weight.name)
            weight.tied_to = "" if name == weight.name else name


def _identity(weight: _Weight, numbers: Any) -> tuple[Any, ...]:
    """Equal for weights that become equal tables: the functions of a program often share theirs."""
    parts = (numbers.values, numbers.scale, numbers.offset, numbers.mask)
    digests = (None if part is None else hashlib.blake2b(part.tobytes()).digest() for part in parts)
    return (*digests, numbers.values.shape, numbers.values.dtype, id(weight.config), output_axis(weight.op))


def _table(weight: _Weight, target: ct.target) -> tuple[PalettizedArray | None, str]:
    """A weight as a table in a form that the target holds, or why it has none."""
    numbers: Any = weight.numbers
    config: Any = weight.config
    mass = None
    if numbers.scale is not None:
        mass = {weight.name: spread(np.square(numbers.scale.astype(np.float32)), numbers.values.shape)}
    transform = transform_of(config, weight.op, numbers)
    small = palettize({weight.name: numbers.values}, transform, sensitivity=mass, weight_threshold=0)[weight.name]
    if not is_palettized(small):
        return None, f"it has more than 256 distinct values, too many for mode={config.mode!r}"
    if numbers.scale is not None:
        small = dataclasses.replace(small, scale=numbers.scale)
    if numbers.offset is not None:
        small = shift_tables(small, numbers.offset)
    if config.nbits is None:
        small = in_bits_of(small, target)
    check_forms({weight.name: small}, target)
    return in_package(small, target), ""


def _row(weight: _Weight) -> LeafReport:
    """What a report says of a weight."""
    if weight.numbers is None:
        return compressed_row(weight.op)._replace(skipped=weight.reason, tied_to=weight.tied_to)
    before = weight.numbers.dense()
    row = report({"": before}, {"": before if weight.small is None else weight.small})[""]
    return row._replace(skipped=weight.reason, tied_to=weight.tied_to)
