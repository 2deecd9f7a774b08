"""Whole trees: what became of every leaf, and what models cost and are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from palettax.plot.look import INK, STYLES, axes_of, check_families, draw_lines
from palettax.report import LeafReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = "Blues"


def report_heat_map(reports: Report | Mapping[str, Report], *, ax: Axes | None = None) -> Axes:
    """Draw a report as a table whose cells are the darker the more they cost.

    Of one report: a row for each leaf, columns for bits a weight, SQNR, bytes, and the increase of the loss where it
    was predicted, each shaded from its least to its most, bytes and losses by their logarithms. Of several: a column of
    SQNR for each, all on one scale. Leaves that are dense, or without error, are white.

    Args:
        reports: what `report` gives, or label to such reports of one tree.
        ax: axes to draw on; None for new ones, as high as the rows need.

    Returns:
        The axes; what the cells say is in `axes.texts`, row by row.

    Raises:
        ValueError: no report, a report without leaves, or reports of different trees.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, palettax as px, palettax.plot
        >>> params = {name: jax.random.normal(jax.random.key(0), (64, 64)) for name in "ab"}
        >>> reports = {f"{b} bits": px.report(params, px.palettize(params, px.kmeans(b))) for b in (2, 4)}
        >>> [text.get_text() for text in px.plot.report_heat_map(reports).texts]
        ['9.4', '20.5', '9.4', '20.5']
    """
    single = isinstance(reports, Report)
    columns = {"": reports} if single else dict(reports)
    if not columns or not all(columns.values()):
        raise ValueError("there is no leaf to draw; give a report, or a label and a report: {'4 bits': px.report(...)}")
    leaves = list(next(iter(columns.values())))
    for label, found in columns.items():
        if list(found) != leaves:
            odd = sorted(set(found) ^ set(leaves)) or "their order"
            raise ValueError(f"the report '{label}' is of another tree ({odd}); draw reports of one tree")
    if single:
        names, shade, words = _figures(cast(Report, reports))
    else:
        names = list(columns)
        sqnr = np.array([[found[leaf].sqnr for found in columns.values()] for leaf in leaves])
        words = [[_decibels(value) for value in row] for row in sqnr]
        shade = _shades(-sqnr)
    axes = axes_of(ax, 1.5 + 0.085 * max(map(len, leaves)) + 0.85 * len(names), 0.7 + 0.27 * len(leaves))
    axes.imshow(shade, cmap=SHADES, vmin=0, vmax=1.25, aspect="auto", interpolation="nearest")
    for row, column in np.ndindex(shade.shape):
        color = "white" if shade[row, column] > 0.75 else INK
        axes.text(column, row, words[row][column], ha="center", va="center", fontsize=8.5, color=color)
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_yticks(range(len(leaves)), leaves, fontsize=9)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    # White lines between the cells.
    axes.set_xticks(np.arange(1, len(names)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(leaves)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    if not single:
        axes.set_xlabel("SQNR, dB", fontsize=9)
    return axes


def _figures(report: Report) -> tuple[list[str], np.ndarray, list[list[str]]]:
    """The columns of one report: their names, shades in 0..1 (NaN for none) and words."""
    rows = list(report.values())
    dense = np.array([leaf.nbits is None for leaf in rows])
    figures = {
        "bits/weight": (np.array([leaf.bits_per_weight for leaf in rows]), [f"{r.bits_per_weight:.3g}" for r in rows]),
        "SQNR dB": (-np.array([leaf.sqnr for leaf in rows]), [_decibels(leaf.sqnr) for leaf in rows]),
        "bytes": (
            np.log([max(leaf.nbytes, 1) for leaf in rows]),
            ["tied" if leaf.tied_to else f"{leaf.nbytes:,}" for leaf in rows],
        ),
    }
    if report.loss_increase is not None:
        losses = np.array([leaf.loss_increase or 0.0 for leaf in rows], np.float64)
        words = ["" if leaf.loss_increase is None else f"{leaf.loss_increase:.2g}" for leaf in rows]
        figures["loss increase"] = np.log(np.where(losses > 0, losses, np.nan)), words
    shades = [_shades(np.where(dense, np.nan, values)) for values, _ in figures.values()]
    words = [list(row) for row in zip(*(words for _, words in figures.values()), strict=True)]
    return list(figures), np.stack(shades, axis=1), words


def _decibels(sqnr: float) -> str:
    return f"{sqnr:.1f}" if np.isfinite(sqnr) else "∞" if sqnr > 0 else "-∞"


def _shades(cost: np.ndarray) -> np.ndarray:
    """A share of 1 for the largest cost, one tenth for the least; NaN where there is none or it is infinite."""
    known = np.isfinite(cost)
    if not known.any():
        return np.full(cost.shape, np.nan)
    low, high = cost[known].min(), cost[known].max()
    share = (np.where(known, cost, low) - low) / (high - low) if high > low else np.zeros(cost.shape)
    return np.where(known, 0.1 + 0.9 * share, np.nan)


def rate_distortion(families: Mapping[str, Sequence[LeafReport]], *, ax: Axes | None = None) -> Axes:
    """Draw what a leaf lost over the bits that it is stored in, tables included: a line for each way.

    The thin line is the best that can be done for Gaussian weights of mean zero, of whatever dimension the vectors:

        SQNR = 20 log₁₀ 2 · bits,   6.02 dB a bit

    Args:
        families: label to reports of leaves: {"kmeans": [px.report(params, small)["kernel"] for small in trees]}.
        ax: axes to draw on; None for new ones.

    Returns:
        The axes: a line for each label, then the thin one. Leaves without error are triangles at the top.

    Raises:
        ValueError: no leaves, or whole reports instead of leaves of them.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, palettax as px, palettax.plot
        >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> leaves = [px.report(params, px.palettize(params, px.kmeans(b)))["w"] for b in (1, 2, 4)]
        >>> px.plot.rate_distortion({"one table": leaves}).lines[0].get_xdata().tolist()
        [1.015625, 2.03125, 4.125]

    References:
        Cover and Thomas, "Elements of information theory", 10.3.2 (the Gaussian's rate-distortion function).
    """
    check_families("LeafReport", families)
    for label, leaves in families.items():
        if any(isinstance(leaf, Report) for leaf in leaves):
            raise ValueError(
                f"'{label}' has a report of a whole tree, which has no SQNR; give a leaf: report['kernel']"
            )
    points = {label: [(leaf.bits_per_weight, leaf.sqnr) for leaf in leaves] for label, leaves in families.items()}
    axes = axes_of(ax, 5.0, 3.4)
    draw_lines(axes, points)
    rates = [rate for family in points.values() for rate, _ in family]
    ends = np.array([min(rates), max(rates)])
    axes.plot(ends, 20 * np.log10(2) * ends, color=INK, linewidth=0.8, zorder=1, label="Gaussian bound, 6.02 dB a bit")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
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

    Raises:
        ValueError: no families, or one without points.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import palettax.plot
        >>> points = {"per tensor": [(10**6, 0.97, "4 bits")]}
        >>> palettax.plot.accuracy_against_size(points, (4 * 10**6, 0.98)).get_xscale()
        'log'
    """
    check_families("point", families)
    axes = axes_of(ax, 6.0, 3.6)
    # Neighbouring families label their points on opposite sides.
    sides = (((-6, 4), "right"), ((6, -9), "left"), ((-6, -9), "right"), ((6, 4), "left"))
    for number, (label, points) in enumerate(families.items()):
        (color, marker), (offset, side) = STYLES[number % len(STYLES)], sides[number % len(sides)]
        ordered = sorted(points)
        axes.plot(
            [p[0] / 1e6 for p in ordered], [100 * p[1] for p in ordered],
            color=color, marker=marker, markersize=5, linewidth=1.2, label=label,
        )  # fmt: skip
        for size, score, name in ordered:
            at = (size / 1e6, 100 * score)
            axes.annotate(name, at, offset, textcoords="offset points", ha=side, fontsize=8, color=color)
    axes.axhline(100 * baseline[1], color=INK, linewidth=0.8, linestyle=":")
    axes.plot(baseline[0] / 1e6, 100 * baseline[1], marker="*", markersize=10, color=INK, linestyle="", label="float16")
    axes.margins(x=0.1, y=0.2)
    axes.set(xscale="log", xlabel="package size, MB", ylabel="accuracy, %")
    low, high = np.log2(axes.get_xlim())
    ticks = 2.0 ** np.arange(np.ceil(low), high, max(1, (high - low) // 8))
    axes.set_xticks(ticks, [f"{t:.2g}" for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return axes
