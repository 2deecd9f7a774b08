"""Palettize the trained network in several ways, convert, save, read back, compare; then a table and figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import nnx

import palettax as px
from palettax.coreml import audit, from_torch, package_bytes, read_palettes, save_package
from palettax.demo.data import Digits
from palettax.demo.networks import FEATURE_MAP, DigitNet, accuracy, torch_twin
from palettax.torch import from_flax, to_flax

TARGET = "iOS18"
FLATTENED = {"dense1": FEATURE_MAP}
PER_TENSOR, GROUPED = "tensor", "16 channels"


@dataclasses.dataclass(frozen=True)
class Row:
    """One package.

    Attributes:
        name: of the package, without its suffix.
        family: which granularity.
        nbits: bits per index; None for the float16 package.
        accuracy: on held-out digits, of the weights as they were read back from the package.
        nbytes: of the whole package.
        ratio: of those bytes to the float16 package's.
        identical: whether every lut and index in the package is the one computed; None where there are none.
    """

    name: str
    family: str
    nbits: int | None
    accuracy: float
    nbytes: int
    ratio: float
    identical: bool | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one package is palettized."""

    family: str
    nbits: int
    transform: px.PaletteTransformation


def recipes() -> dict[str, Recipe]:
    """What the demo tries, by the name of the package."""
    found = {f"{b}bit": Recipe(PER_TENSOR, b, px.kmeans(b)) for b in (8, 6, 4, 3, 2)}
    groups = px.Granularity(group_size=16, channel_axis=-1)
    for b in (4, 3, 2):
        # The last layer has 10 output channels, which 16 does not divide: it keeps one table.
        rules = [("dense2", px.kmeans(b)), ("", px.kmeans(b, granularity=groups))]
        found[f"{b}bit-grouped"] = Recipe(GROUPED, b, px.by_path(rules))
    return found


def run_recipes(model: DigitNet, digits: Digits, folder: Path, chosen: Mapping[str, Recipe]) -> Iterator[Row]:
    """Write one package per recipe, the float16 one first, and yield its row.

    Args:
        model: the trained network, in evaluation mode.
        digits: the held-out ones are used.
        folder: where the packages go.
        chosen: the recipes, by the name of the package.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    dense = nnx.to_pure_dict(params)
    statistics = from_flax(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    def score(tree: Any) -> float:
        nnx.replace_by_pure_dict(params, tree)
        return accuracy(nnx.merge(graph, params, rest), digits.test_images, digits.test_labels)

    def write(name: str, leaves: dict[str, Any]) -> Path:
        image = torch.zeros(1, 1, 28, 28)
        mlmodel = from_torch(torch_twin(), image, leaves | statistics, minimum_deployment_target=TARGET)
        return save_package(mlmodel, folder / f"{name}.mlpackage")

    whole = package_bytes(write("float16", from_flax(dense, flattened=FLATTENED)))
    yield Row("float16", "", None, score(dense), whole, 1.0, None)
    for name, recipe in chosen.items():
        leaves = from_flax(px.palettize(dense, recipe.transform), flattened=FLATTENED)
        path = write(name, leaves)
        comparison = audit(path, leaves)
        from_disk = leaves | {n: leaf.depalettize().astype(np.float32) for n, leaf in read_palettes(path).items()}
        size = package_bytes(path)
        scored = score(to_flax(from_disk, dense, flattened=FLATTENED))
        yield Row(name, recipe.family, recipe.nbits, scored, size, size / whole, comparison.identical)


def markdown(rows: list[Row]) -> str:
    """The rows as a table."""
    lines = [
        "| package | bits | lut per | accuracy | bytes | of float16 | lut and indices identical |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        identical = {True: "yes", False: "no", None: ""}[row.identical]
        lines.append(
            f"| {row.name} | {row.nbits or 16} | {row.family} | {row.accuracy:.1%} | {row.nbytes:,} | {row.ratio:.3f} "
            f"| {identical} |"
        )
    return "\n".join(lines) + "\n"


def write_results(rows: list[Row], model: DigitNet, folder: Path) -> None:
    """Write `table.json`, `table.md`, `histograms.png` and `accuracy.png`."""
    (folder / "table.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
    (folder / "table.md").write_text(markdown(rows))
    _draw_histograms(nnx.to_pure_dict(nnx.state(model, nnx.Param)), folder / "histograms.png")
    _draw_accuracy(rows, folder / "accuracy.png")


def _draw_histograms(params: Any, path: Path) -> None:
    """Every palettized layer at several widths: the distribution above, its lookup table below."""
    from matplotlib import pyplot

    from palettax.plot import histogram

    layers, widths = ("conv2", "dense1", "dense2"), (6, 4, 3, 2)
    figure, axes = pyplot.subplots(len(layers), len(widths), figsize=(12, 6), layout="constrained", sharex="row")
    limits = {layer: (np.inf, -np.inf) for layer in layers}
    for column, nbits in enumerate(widths):
        small = px.palettize(params, px.kmeans(nbits))
        for row, layer in enumerate(layers):
            ax = histogram(params[layer]["kernel"], small[layer]["kernel"], ax=axes[row, column])
            low, high = zip(limits[layer], ax.get_xlim(), strict=True)
            limits[layer] = (min(low), max(high))
            ax.set_xlim(limits[layer])
            ax.set(xlabel="weight" if row == len(layers) - 1 else "", title=f"{nbits} bits" if row == 0 else "")
            if column == 0:
                ax.set_ylabel(layer)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_accuracy(rows: list[Row], path: Path) -> None:
    from matplotlib import pyplot

    from palettax.plot import accuracy_against_size

    baseline, *small = rows
    families = {
        f"one lut per {family}": [
            (row.nbytes, row.accuracy, f"{row.nbits} bit") for row in small if row.family == family
        ]
        for family in (PER_TENSOR, GROUPED)
    }
    figure, ax = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    accuracy_against_size(families, (baseline.nbytes, baseline.accuracy), ax=ax)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
