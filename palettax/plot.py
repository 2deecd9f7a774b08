"""Figures: each takes what the library returns and gives back matplotlib axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from palettax._extras import require
from palettax._typing import Array
from palettax.leaf import PalettizedArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FILL, _ACCENT = "#1f2933", "#c3cfdb", "#d1495b"


def histogram(weights: Float[Array, ...], palettized: PalettizedArray, *, ax: Axes | None = None) -> Axes:
    """Draw the distribution of a weight with the entries of its lookup tables below it.

    Args:
        weights: the dense weight.
        palettized: what became of it; one row of ticks per table, the first 16 of them.
        ax: axes to draw on; None for new ones.

    Returns:
        The axes.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, palettax as px, palettax.plot
        >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> small = px.palettize(params, px.kmeans(nbits=4))
        >>> px.plot.histogram(params["w"], small["w"]).get_xlabel()
        'weight'
    """
    pyplot = require("matplotlib.pyplot", "plot")
    axes: Axes = ax or pyplot.subplots(figsize=(5, 2.6))[1]
    values = np.asarray(weights, np.float64).reshape(-1)
    tables = np.asarray(palettized.lut, np.float64).reshape(-1, palettized.lut.shape[-2] * palettized.lut.shape[-1])[
        :16
    ]
    # Tails a thousandth of the weights long would flatten the rest; the entries are all in view.
    low, high = np.quantile(values, [0.0005, 0.9995])
    low, high = min(low, tables.min()), max(high, tables.max())
    density, edges = np.histogram(values, bins=120, range=(low, high), density=True)
    axes.stairs(density, edges, fill=True, color=_FILL, linewidth=0)
    top = density.max()
    height = 0.16 * top / len(tables)
    for row, table in enumerate(tables):
        bottom = -(row + 1) * height
        axes.vlines(table, bottom, bottom + 0.85 * height, color=_ACCENT, linewidth=1.1 if table.size <= 64 else 0.5)
    axes.axhline(0, color=_INK, linewidth=0.6)
    axes.set(xlim=(low, high), ylim=(-0.2 * top, 1.08 * top), xlabel="weight", yticks=[])
    axes.spines[["left", "top", "right"]].set_visible(False)
    return axes


def accuracy_against_size(
    families: Mapping[str, Sequence[tuple[int, float, str]]],
    baseline: tuple[int, float],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draw accuracy over size, one line per family of models, beside the uncompressed one.

    Args:
        families: label to points (bytes, accuracy in 0..1, name).
        baseline: bytes and accuracy of the uncompressed model.
        ax: axes to draw on; None for new ones.

    Returns:
        The axes, bytes on a logarithmic axis in MB.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import palettax.plot
        >>> points = {"per tensor": [(10**6, 0.97, "4 bits")]}
        >>> palettax.plot.accuracy_against_size(points, (4 * 10**6, 0.98)).get_xscale()
        'log'
    """
    pyplot = require("matplotlib.pyplot", "plot")
    axes: Axes = ax or pyplot.subplots(figsize=(6, 3.6))[1]
    # Neighbouring families label their points on opposite sides.
    styles = (
        (_ACCENT, "o", (-6, 4), "right"),
        ("#2e6f95", "s", (6, -9), "left"),
        ("#5b8e5a", "D", (-6, -9), "right"),
    )
    for (label, points), (color, marker, offset, side) in zip(families.items(), styles, strict=False):
        ordered = sorted(points)
        axes.plot(
            [p[0] / 1e6 for p in ordered], [100 * p[1] for p in ordered],
            color=color, marker=marker, markersize=5, linewidth=1.2, label=label,
        )  # fmt: skip
        for size, score, name in ordered:
            at = (size / 1e6, 100 * score)
            axes.annotate(name, at, offset, textcoords="offset points", ha=side, fontsize=8, color=color)
    axes.axhline(100 * baseline[1], color=_INK, linewidth=0.8, linestyle=":")
    axes.plot(
        baseline[0] / 1e6, 100 * baseline[1], marker="*", markersize=10, color=_INK, linestyle="", label="float16"
    )
    axes.margins(x=0.1, y=0.2)
    axes.set(xscale="log", xlabel="package size, MB", ylabel="accuracy, %")
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return axes
