"""What all figures have in common: colours, new axes, lines of SQNR over bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from palettax._extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FILL, ACCENT = "#1f2933", "#c3cfdb", "#d1495b"
STYLES = (
    (ACCENT, "o"),
    ("#2e6f95", "s"),
    ("#5b8e5a", "D"),
    ("#d9a441", "v"),
    ("#7d5ba6", "P"),
    ("#6b7a89", "X"),
)
"""A colour and a marker for every line of a figure; they begin anew after the last."""


def axes_of(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes that were given, or new ones in a figure of this size in inches."""
    size = width, height
    return require("matplotlib.pyplot", "plot").subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def densities(values: np.ndarray, tables: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Densities and edges of a histogram in which all entries are in view, and all weights but a thousandth.

    Args:
        values: the weights.
        tables: the entries.
        bins: how many.

    Raises:
        ValueError: no weights, or weights that are not finite.
    """
    if not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"{values.size} weights, {(~np.isfinite(values)).sum()} of them NaN or infinite; draw finite ones"
        )
    # Tails would flatten the rest.
    low, high = np.quantile(values, [0.0005, 0.9995])
    low, high = min(low, tables.min()), max(high, tables.max())
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    return np.histogram(values, bins=bins, range=(low, high), density=True)


def check_families(what: str, families: Any) -> None:
    """Refuse lines without points.

    Args:
        what: the points are, such as "LutFit".
        families: label to points.
    """
    if not isinstance(families, Mapping) or not families:
        raise ValueError(f"nothing to draw; give a label and its {what}s: {{'exact': [...]}}")
    for label, points in families.items():
        if not len(points):
            raise ValueError(f"'{label}' has no points; give it a {what}, or leave it out")


def draw_lines(axes: Axes, families: Mapping[str, Iterable[tuple[float, float]]]) -> None:
    """Draw SQNR over bits, a line for each label; what is lossless is a triangle at the top, beyond the scale.

    What has no signal, so that its SQNR is no number or -∞, has no place.
    """
    any_lossless = False
    for (label, points), (color, marker) in zip(families.items(), itertools.cycle(STYLES), strict=False):
        bits, sqnr = np.array(sorted(points), np.float64).T
        lossy, lossless = np.isfinite(sqnr), np.isposinf(sqnr)
        axes.plot(bits[lossy], sqnr[lossy], color=color, marker=marker, markersize=4.5, linewidth=1.2, label=label)
        axes.plot(
            bits[lossless], np.full(lossless.sum(), 0.97), transform=axes.get_xaxis_transform(), clip_on=False,
            color=color, marker="^", markersize=7, linestyle="", fillstyle="none",
        )  # fmt: skip
        any_lossless |= lossless.any()
    if any_lossless:
        axes.plot([], [], color=INK, marker="^", markersize=7, linestyle="", fillstyle="none", label="no error")
    axes.set(xlabel="bits a weight", ylabel="SQNR, dB")
    axes.spines[["top", "right"]].set_visible(False)
