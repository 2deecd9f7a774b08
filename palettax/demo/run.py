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
from palettax.coreml import as_function, audit, from_jax, from_torch, package_bytes, save_package
from palettax.coreml.package import open_model
from palettax.demo.data import Digits
from palettax.demo.networks import FEATURE_MAP, DigitNet, torch_twin
from palettax.torch import from_flax

TARGET = "iOS18"
FLATTENED = {"dense1": FEATURE_MAP}
PER_TENSOR, GROUPED = "tensor", "16 channels"
JAX, TORCH = "jax", "torch"


@dataclasses.dataclass(frozen=True)
class Row:
    """One package.

    Attributes:
        name: of the package, without its suffix.
        family: which granularity.
        route: what it was converted from: "jax", or "torch".
        nbits: bits per index; None for the float16 package.
        accuracy: of the saved package, run on held-out digits.
        nbytes: of the whole package.
        ratio: of those bytes to the float16 package's.
        identical: whether every lut and index in the package is the one computed; None where there are none.
    """

    name: str
    family: str
    route: str
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
    route: str = JAX


def recipes() -> dict[str, Recipe]:
    """What the demo tries, by the name of the package."""
    found = {f"{b}bit": Recipe(PER_TENSOR, b, px.kmeans(b)) for b in (8, 6, 4, 3, 2)}
    groups = px.Granularity(group_size=16, channel_axis=-1)
    for b in (4, 3, 2):
        # The last layer has 10 output channels, which 16 does not divide: it keeps one table.
        rules = [("dense2", px.kmeans(b)), ("", px.kmeans(b, granularity=groups))]
        found[f"{b}bit-grouped"] = Recipe(GROUPED, b, px.by_path(rules))
    found["4bit-by-torch"] = Recipe(PER_TENSOR, 4, px.kmeans(4), TORCH)
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

    def write(name: str, weights: Any, route: str) -> tuple[Path, Any]:
        """The package, and the weights by the names that they have in it."""
        if route == JAX:
            mlmodel = from_jax(
                nnx.merge(graph, weights, rest), np.zeros((1, 28, 28, 1), np.float32), minimum_deployment_target=TARGET
            )
        else:
            weights = from_flax(nnx.to_pure_dict(weights), flattened=FLATTENED)
            leaves = weights | from_flax(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
            image = torch.zeros(1, 1, 28, 28)
            mlmodel = from_torch(torch_twin(), image, leaves, minimum_deployment_target=TARGET)
        return save_package(mlmodel, folder / f"{name}.mlpackage"), weights

    def score(path: Path, route: str) -> float:
        images = digits.test_images if route == JAX else digits.test_images.transpose(0, 3, 1, 2)
        return package_accuracy(path, images, digits.test_labels)

    path, _ = write("float16", params, JAX)
    whole = package_bytes(path)
    yield Row("float16", "", JAX, None, score(path, JAX), whole, 1.0, None)
    for name, recipe in chosen.items():
        path, small = write(name, px.palettize(params, recipe.transform), recipe.route)
        size, same = package_bytes(path), audit(path, small).identical
        yield Row(name, recipe.family, recipe.route, recipe.nbits, score(path, recipe.route), size, size / whole, same)


def package_accuracy(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images to whose label a saved package gives the largest output.

    Args:
        path: of a package with one input, a single image, and one output.
        images: one after the other, as it takes them.
        labels: of the images.
    """
    mlmodel = open_model(path)
    evaluate, (feature,) = as_function(mlmodel), mlmodel.get_spec().description.input
    hits = [
        int(next(iter(evaluate({feature.name: x[None]}).values())).argmax()) == y
        for x, y in zip(images, labels, strict=True)
    ]
    return float(np.mean(hits))


def markdown(rows: list[Row]) -> str:
    """The rows as a table."""
    lines = [
        "| package | from | bits | lut per | accuracy | bytes | of float16 | lut and indices identical |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        identical = {True: "yes", False: "no", None: ""}[row.identical]
        lines.append(
            f"| {row.name} | {row.route} | {row.nbits or 16} | {row.family} | {row.accuracy:.1%} | {row.nbytes:,} "
            f"| {row.ratio:.3f} | {identical} |"
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
            (row.nbytes, row.accuracy, f"{row.nbits} bit") for row in small if (row.family, row.route) == (family, JAX)
        ]
        for family in (PER_TENSOR, GROUPED)
    }
    figure, ax = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    accuracy_against_size(families, (baseline.nbytes, baseline.accuracy), ax=ax)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
