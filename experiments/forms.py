"""Every form of a table, in every kind of layer, at every target of Core ML: identical in the package, or refused.

A network of six kinds of layers is palettized in each form, and in each pair of forms, by `px.palettize`. `from_torch`
is asked which layers it refuses; the others are converted together, saved, and audited from the disk. Prints the tables
and writes them, with what each refusal said and the machine's description, to `forms.md` beside this script. Ends with
status 1 if a table differs or the converter fails. `--quick` takes each form alone, at 3 and 4 bits, and writes
nothing; nor does a run that is stopped. About fifty minutes; `--quick`: three.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from measuring import machine
from rich.progress import track

import palettax as px
from palettax.coreml import audit, from_torch, save_package
from palettax.coreml.forms import check_forms, parse_target
from palettax.torch import to_params

HERE = Path(__file__)
BITS = (1, 2, 3, 4, 6, 8)
TARGETS = ("iOS16", "iOS17", "iOS18", "iOS26")
LAYERS = ("Linear", "Conv2d", "Embedding", "Conv1d", "ConvTranspose2d", "MultiheadAttention")
TENSOR, ROWS, COLUMNS, PAIRS, FOURS, SCALE, INT8, UINT8, PRUNED = FORMS = (
    *("per tensor", "groups on axis 0", "groups on axis 1", "vectors of 2", "vectors of 4"),
    *("scale", "int8 LUT", "uint8 LUT", "pruned"),
)
SMALL = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
GROUPS, VECTORS = {ROWS: 0, COLUMNS: 1}, {PAIRS: (2, 0), FOURS: (4, 1)}  # the axis; size and axis
MEANINGLESS = {
    (PAIRS, FOURS): "the vectors of a table have one length",
    (INT8, UINT8): "a table has one dtype",
    **{(TENSOR, form): "a tensor has one table or several" for form in GROUPS},
    **{(TENSOR, form): f"it is {form}, alone" for form in FORMS[3:]},
}
ABOUT = """
Cells list the bits whose tables and indices are in the package bit for bit; small numbers say why others are refused.
Axes are those of torch's weight, of 64 channels, or 192. Groups of 8; on both axes, blocks. Vectors of 2 lie along axis
0 and vectors of 4 along axis 1, so that they meet groups and scales along and across. A scale for each channel of axis
0. Pruned: half of the weights are zero, in a bitmap. Packages compute in float16, to which float tables are rounded.
"""


class Net(torch.nn.Module):
    """Six kinds of layers, one behind the other; of few shapes, since JAX compiles for each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(192, 64)
        self.multiheadattention = torch.nn.MultiheadAttention(64, 4, batch_first=True)
        self.linear = torch.nn.Linear(64, 64)
        self.conv1d = torch.nn.Conv1d(64, 64, 3, padding=1)
        self.conv2d = torch.nn.Conv2d(64, 64, 3, padding=1)
        self.convtranspose2d = torch.nn.ConvTranspose2d(64, 64, 3, stride=2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """An image of sixteen tokens."""
        x = self.embedding(tokens)
        x = torch.relu(self.linear(x + self.multiheadattention(x, x, x, need_weights=False)[0]))
        x = torch.relu(self.conv1d(x.transpose(1, 2)))
        return self.convtranspose2d(torch.relu(self.conv2d(x.reshape(1, 64, 4, 4))))


TOKENS = torch.arange(16, dtype=torch.int32)[None]


class Cell(NamedTuple):
    """What became of one layer; identical where neither refused nor failed."""

    target: str
    form: tuple[str, ...]
    layer: str
    nbits: int
    refused: str
    failed: str

    @property
    def reasons(self) -> frozenset[str]:
        """What the refusal names, without the leaf, its sizes, and what to do about it."""
        short, *more = re.sub(r"^leaf .*?: |^\S+: ", "", self.refused).split(";")
        parts = short.split(" and ") if more else [short]
        return frozenset(re.sub(r"^\d+ (?=groups)| of shape .*", "", part) for part in parts if part)


def weights_of(net: Net, form: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Neighbouring channels of different sizes, so that a scale pays, and half of the weights zero to prune them."""

    def prepared(weight: np.ndarray) -> np.ndarray:
        sizes = np.resize(np.geomspace(0.1, 1, 8, dtype=np.float32), len(weight))
        weight = weight * sizes.reshape(-1, *(1,) * (weight.ndim - 1))
        return np.where(abs(weight) < np.median(abs(weight)), np.float32(0), weight) if PRUNED in form else weight

    tensors = to_params(net.state_dict())
    return {name: prepared(weight) for name, weight in tensors.items() if name.endswith("weight")}


def palettized(weights: dict[str, np.ndarray], form: tuple[str, ...], nbits: int) -> dict[str, px.PalettizedArray]:
    """Clustered, with what the form asks for around that."""
    axes = tuple(GROUPS[part] for part in form if part in GROUPS)
    size, axis = next((VECTORS[part] for part in form if part in VECTORS), (1, None))
    cut = {"group_size": (8,) * len(axes), "channel_axis": axes} if axes else {}
    granularity = px.Granularity(**cut, vector_size=size, vector_axis=axis)
    transform = px.kmeans(nbits, granularity=granularity, key=jax.random.key(0) if size > 1 else None)
    transform = px.with_channel_scale(transform, max_steps=1) if SCALE in form else transform
    dtype = next((part.split()[0] for part in form if part in (INT8, UINT8)), "float32")
    transform = px.quantize_lut(transform, dtype) if dtype != "float32" else transform
    transform = px.keep_zeros(transform, sparse=True) if PRUNED in form else transform
    leaves = px.palettize(weights, transform, weight_threshold=0)
    for name, leaf in leaves.items():
        assert [a for a, groups in enumerate(leaf.groups) if groups > 1] == sorted(axes), name
        assert (SCALE in form) == (leaf.scale is not None and leaf.scale.shape[0] == leaf.shape[0]), name
        assert (leaf.lut.dtype, leaf.mask is not None) == (dtype, PRUNED in form), name
    return leaves


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call gives, and what it says where it refuses."""
    try:
        return call(), ""
    except ValueError as error:
        return None, str(error)


def refusal(net: Net, leaves: Mapping[str, Any], target: str) -> str:
    """What `from_torch` says where it refuses before it converts, else nothing."""
    _, said = attempt(lambda: check_forms(leaves, parse_target(target)))
    if said:
        assert attempt(partial(from_torch, net, TOKENS, leaves, minimum_deployment_target=target)) == (None, said)
    return said


def failure(net: Net, leaves: Mapping[str, Any], target: str) -> str:
    """What went wrong on the way into a package and out of it, else nothing."""
    try:
        mlmodel = from_torch(net, TOKENS, leaves, minimum_deployment_target=target)
        with tempfile.TemporaryDirectory() as folder:
            found = audit(save_package(mlmodel, Path(folder) / "net.mlpackage"), leaves)
    except Exception as error:  # whatever the converter raises is what is looked for
        return f"{type(error).__name__}: {error}"
    return "" if found.identical else str(found)


def failures(net: Net, layers: Mapping[str, Mapping[str, Any]], target: str) -> dict[str, str]:
    """The same for each layer: all in one package, and each in its own where that fails."""
    together = failure(net, {name: leaf for leaves in layers.values() for name, leaf in leaves.items()}, target)
    alone = {layer: failure(net, leaves, target) for layer, leaves in layers.items()} if together else {}
    return alone if any(alone.values()) else dict.fromkeys(layers, together)


def cells(net: Net, form: tuple[str, ...], nbits: int) -> Iterator[Cell]:
    """A form at one width, in every layer at every target."""
    weights, made = weights_of(net, form), {}
    for layer in LAYERS:
        own = {name: weight for name, weight in weights.items() if name.startswith(layer.lower())}
        made[layer] = attempt(partial(palettized, own, form, nbits))
    for target in TARGETS:
        refused = {layer: said or refusal(net, leaves, target) for layer, (leaves, said) in made.items()}
        left = {layer: leaves for layer, (leaves, _) in made.items() if not refused[layer]}
        failed = failures(net, left, target) if left else {}
        yield from (Cell(target, form, layer, nbits, refused[layer], failed.get(layer, "")) for layer in LAYERS)


def widths(nbits: set[int]) -> str:
    """Neighbours as a range."""
    runs = [list(run) for held, run in itertools.groupby(BITS, nbits.__contains__) if held]
    return ", ".join("-".join(map(str, dict.fromkeys((run[0], run[-1])))) for run in runs)


def shown(cells: list[Cell], notes: list[str]) -> str:
    """All widths of a form in a layer: those that are identical, those that failed, and why the others are refused."""
    refused = [cell.reasons for cell in cells if cell.refused]
    reasons = (frozenset.intersection(*refused) or frozenset.union(*refused)) if refused else frozenset()
    numbers = [str(number).translate(SMALL) for number, reason in enumerate(notes, 1) if reason in reasons]
    failed = {cell.nbits for cell in cells if cell.failed}
    identical = {cell.nbits for cell in cells if not cell.refused} - failed
    return " ".join([widths(identical) or "–", *([f"FAILED {widths(failed)}"] if failed else []), *numbers])


def text_of(found: list[Cell]) -> str:
    """The tables, what refusals said, and which pairs are left out."""
    refusals = sorted((cell for cell in found if cell.refused), key=lambda cell: len(cell.reasons))
    said: dict[str, str] = {}
    for cell in refusals:  # those of one reason first, so that its message says that one only
        said |= {reason: said.get(reason, cell.refused) for reason in sorted(cell.reasons)}
    notes, failed = list(said), sum(bool(cell.failed) for cell in found)
    identical = len(found) - len(refusals) - failed
    lines = [f"{len(found):,} cells: {identical:,} identical, {len(refusals):,} refused, {failed:,} FAILED.", ABOUT]
    for target in TARGETS:
        lines += [f"## {target}", "", f"| | {' | '.join(LAYERS)} |", "|---" * (len(LAYERS) + 1) + "|"]
        here = [cell for cell in found if cell.target == target]
        for form in dict.fromkeys(cell.form for cell in here):
            row = [shown([c for c in here if (c.form, c.layer) == (form, layer)], notes) for layer in LAYERS]
            lines.append(f"| {' | '.join([' × '.join(form), *row])} |")
        lines.append("")
    lines += ["## Refusals", "", *(f"{n}. {reason}: `{said[reason]}`" for n, reason in enumerate(notes, 1))]
    lines += ["", "## Pairs without a meaning", "", *(f"- {' × '.join(p)}: {why}" for p, why in MEANINGLESS.items())]
    return "\n".join([*lines, "", machine("jax", "torch", "coremltools", "numpy")]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each form alone, at 3 and 4 bits; write nothing")
    quick = parser.parse_args().quick
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time goes into compiling for small arrays
    torch.manual_seed(0)
    net, found = Net().eval(), []
    pairs = [pair for pair in itertools.combinations(FORMS, 2) if pair not in MEANINGLESS]
    forms = [(form,) for form in FORMS] + ([] if quick else pairs)
    steps = list(itertools.product(BITS[2:4] if quick else BITS, forms))
    for nbits, form in track(steps, description="bits and forms"):
        if form == forms[0]:
            jax.clear_caches()  # programs of other widths, whose mappings of memory Linux limits
        for cell in cells(net, form, nbits):
            found.append(cell)
            if cell.failed:
                print(f"FAILED {cell}", file=sys.stderr)
    text = text_of(found)
    print(text)
    if not quick:
        HERE.with_suffix(".md").write_text(text)
    if any(cell.failed for cell in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
