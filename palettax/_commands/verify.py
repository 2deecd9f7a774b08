"""`palettax verify`: whether a small file is what it should be, bit for bit."""

# No postponed annotations: typer reads them as objects.
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

import palettax as px
from palettax._commands.app import app, examples
from palettax._commands.console import DIFFERENT, plain_errors, print_json, print_table, say, sqnr_text
from palettax._commands.files import PACKAGE, UnsoundError, kind_of, named_leaves, read_tree
from palettax._commands.palettes import faults_of, misplaced
from palettax._commands.weights import form_of
from palettax._extras import require
from palettax.leaf import PalettizedArray, as_numpy, depalettize, is_palettized, same_bits

Problem = tuple[str, str]
"""The name of what differs, and how."""

_EXAMPLES = examples(
    "palettax verify Small.mlpackage Model.mlpackage --inputs x.npz",
    "palettax verify small.safetensors model.safetensors --json",
)


class _Checked(NamedTuple):
    """A table beside the weight that it stands for; `misplaced` counts indices that are not of the nearest entry."""

    name: str
    form: str
    sqnr: float
    misplaced: int


class _Verdict(NamedTuple):
    """What was compared: the tables, how much else is identical, what is not in order, and outputs if asked for."""

    palettized: list[_Checked]
    identical: int
    problems: list[Problem]
    outputs: Sequence[Any] = ()


@app.command(epilog=_EXAMPLES)
def verify(
    small: Annotated[Path, typer.Argument(metavar="SMALL", help="The file with the tables.")],
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE", help="The file that it was made from.")],
    inputs: Annotated[
        Path | None, typer.Option(help="An .npz file with an array for each input: run both packages on it.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="The largest difference of outputs allowed, over their range.")
    ] = None,
    outputs_only: Annotated[
        bool,
        typer.Option(
            "--outputs-only", help="Compare what the two compute, and nothing else; needs --inputs and --tolerance."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare bit for bit what is not palettized, and check every table against its weights.

    A package is compared with the one that it was compressed from: two conversions of a model differ in their ops,
    and for them there is --outputs-only. With --inputs, what the two compute is compared too; they run here, not by
    Core ML.

    Exit code 0: all is in order. 1: something differs, and the output names it. 2: there was nothing to compare.
    """
    with plain_errors("Interrupted"):
        kinds = [kind_of(path) == PACKAGE for path in (small, reference)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{small} and {reference}: a package is compared with a package; give two of one kind")
        if not kinds[0] and inputs is not None:
            raise ValueError(f"--inputs: {small} is no package, and only a package can be run")
        if tolerance is not None and inputs is None:
            raise ValueError("--tolerance is for outputs; give --inputs too")
        if outputs_only and (inputs is None or tolerance is None):
            raise ValueError("--outputs-only: give --inputs, to run both on, and the --tolerance that is allowed")
        verdict = _Verdict([], 0, [])
        if not outputs_only:
            verdict = _packages(small, reference) if kinds[0] else _trees(small, reference)
        if inputs is not None:
            verdict = _with_outputs(verdict, small, reference, inputs, tolerance)
    ok = not verdict.problems
    if as_json:
        print_json({
            "ok": ok,
            "palettized": [row._asdict() for row in verdict.palettized],
            "identical": verdict.identical,
            "problems": [{"name": name, "problem": problem} for name, problem in verdict.problems],
            "outputs": [row._asdict() for row in verdict.outputs],
        })  # fmt: skip
    else:
        count = len(verdict.palettized) or "NOTHING"
        found = f"{count} palettized, {verdict.identical} others identical"
        if outputs_only:
            found = f"{len(verdict.outputs)} outputs compared"
        else:
            columns = {"palettized": "left", "SQNR": "right", "not nearest": "right", "form": "left"}
            cells = [(row.name, sqnr_text(row.sqnr), f"{row.misplaced:,}", row.form) for row in verdict.palettized]
            print_table(columns, cells)
        if ok and any(row.misplaced for row in verdict.palettized):
            say("not nearest: by less than what rounding of the weights, the table and its scale hides")
        say(*(f"{name}: {problem}" for name, problem in verdict.problems))
        if verdict.outputs:
            columns = {"output": "left", "SQNR": "right", "largest difference": "right"}
            print_table(columns, [(row.name, sqnr_text(row.sqnr), f"{row.error:.2%}") for row in verdict.outputs])
        say(f"{found}: all is in order" if ok else f"{found}, NOT in order: {len(verdict.problems)}")
    if not ok:
        raise typer.Exit(DIFFERENT)


def _packages(small: Path, reference: Path) -> _Verdict:
    require("palettax.coreml", "coreml")
    from palettax._commands.package import compare_packages

    palettes, identical, problems = compare_packages(small, reference)
    checked = []
    for palette in palettes:
        if palette.leaf is None:
            problems.append((palette.name, palette.problem))
        elif palette.reference is not None and palette.reference.shape == palette.leaf.shape:
            checked.append(_check(palette.name, palette.leaf, palette.reference, problems))
    return _Verdict(checked, identical, problems)


def _with_outputs(verdict: _Verdict, small: Path, reference: Path, inputs: Path, tolerance: float | None) -> _Verdict:
    from palettax._commands.package import compare_outputs

    outputs = compare_outputs(small, reference, inputs)
    problems = [
        (row.name, "this output has another shape, or NaN, or other infinities") for row in outputs if not row.sound
    ]
    problems += [
        (row.name, f"this output differs by {row.error:.2%} of its range, and {tolerance:.2%} are allowed")
        for row in outputs
        if row.sound and tolerance is not None and row.error > tolerance
    ]
    return verdict._replace(outputs=outputs, problems=[*verdict.problems, *problems])


def _trees(small: Path, reference: Path) -> _Verdict:
    wanted = named_leaves(read_tree(reference)[0])
    try:
        found = named_leaves(read_tree(small)[0])
    except UnsoundError as error:
        return _Verdict([], 0, [(str(small), str(error))])
    problems: list[Problem] = [(name, "is missing") for name in wanted if name not in found]
    problems += [(name, "is not in the reference") for name in found if name not in wanted]
    checked, identical = [], 0
    for name, leaf in found.items():
        if name not in wanted:
            continue
        other = wanted[name]
        if leaf.shape != other.shape or leaf.dtype != other.dtype:
            here, there = (f"{one.dtype} {tuple(one.shape)}" for one in (leaf, other))
            problems.append((name, f"it is {here}, the reference {there}"))
        elif is_palettized(leaf):
            checked.append(_check(name, leaf, np.asarray(depalettize(as_numpy(other))), problems))
        elif not is_palettized(other) and same_bits(leaf, other):
            identical += 1
        else:
            problems.append((name, "it is dense, and its bits are not those of the reference"))
    return _Verdict(checked, identical, problems)


def _check(name: str, leaf: PalettizedArray, dense: np.ndarray, problems: list[Problem]) -> _Checked:
    """One table; what is wrong with it is added to the problems."""
    faults = faults_of(leaf)
    far, too_far = (0, 0) if faults else misplaced(leaf, dense)
    if too_far:
        faults.append(f"{too_far} of {leaf.indices.size} indices are not those of the nearest entry")
    if bad := int((~np.isfinite(dense)).sum()):
        faults.append(f"{bad} of its weights are NaN or infinite in the reference")
    values = np.asarray(as_numpy(leaf).depalettize())
    if leaf.mask is not None and (other := int(((values != dense) & ~np.asarray(leaf.mask)).sum())):
        faults.append(f"{other} of its weights that have no entry are not those of the reference")
    problems += [(name, fault) for fault in faults]
    sqnr = px.report({name: dense}, {name: values})[name].sqnr
    return _Checked(name, form_of(leaf), sqnr, far)
