"""One weight: its distribution with its tables, and the error that tables of every width leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from palettax._typing import Array
from palettax.clustering import LutFit, kmeans_curve
from palettax.leaf import PalettizedArray
from palettax.leaf.scales import scaled_lut
from palettax.plot.look import ACCENT, FILL, INK, axes_of, check_families, densities, draw_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def histogram(weights: Float[Array, ...], palettized: PalettizedArray, *, ax: Axes | None = None) -> Axes:
    """Draw the distribution of a weight with the entries of its lookup tables below it.

    Args:
        weights: the dense weight.
        palettized: what became of it; one row of ticks per table, the first 16 of them.
        ax: axes to draw on; None for new ones.

    Returns:
        The axes.

    Raises:
        ValueError: no weights, or tables that stand behind several scales each.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, palettax as px, palettax.plot
        >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> small = px.palettize(params, px.kmeans(nbits=4))
        >>> px.plot.histogram(params["w"], small["w"]).get_xlabel()
        'weight'
    """
    axes = axes_of(ax, 5.0, 2.6)
    values = np.asarray(weights, np.float64).reshape(-1)
    lut = palettized.lut if palettized.scale is None else scaled_lut(palettized)
    if lut is None:
        raise ValueError(
            f"the tables of {tuple(palettized.shape)} have several scales each, so no entries in units of the weight; "
            "give a weight with one scale per table, or with none"
        )
    tables = np.asarray(lut, np.float64).reshape(-1, lut.shape[-2] * lut.shape[-1])[:16]
    density, edges = densities(values, tables, bins=120)
    axes.stairs(density, edges, fill=True, color=FILL, linewidth=0)
    top = density.max()
    height = 0.16 * top / len(tables)
    for row, table in enumerate(tables):
        bottom = -(row + 1) * height
        axes.vlines(table, bottom, bottom + 0.85 * height, color=ACCENT, linewidth=1.1 if table.size <= 64 else 0.5)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(-0.2 * top, 1.08 * top), xlabel="weight", yticks=[])
    axes.spines[["left", "top", "right"]].set_visible(False)
    return axes


def error_against_bits(
    weights: Float[Array, "*shape"],
    fits: Mapping[str, Sequence[LutFit]],
    *,
    sensitivity: Float[Array, "*shape"] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the error of tables of several widths, a line for each way to make them, below the least error there is.

        SQNR = 10 log₁₀(Σ sensitivity · w² / inertia),   bits a weight = log₂ k / vector_size

    The thin curve is `kmeans_curve`: no table of scalars is above it. Tables without error are triangles at the top.

    Args:
        weights: (*shape), what all tables were made for.
        fits: label to the fits of one way, in any order: {"uniform": [px.uniform_lut(weights, b) for b in (2, 4)]}.
        sensitivity: (*shape) ≥ 0, with which the fits were made; None for ones.
        ax: axes to draw on; None for new ones.

    Returns:
        The axes: a line for each label, then the curve.

    Raises:
        ValueError: no fits, fits of another weight, or weights that are all zero.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, palettax as px, palettax.plot
        >>> weights = jax.random.normal(jax.random.key(0), (64, 64))
        >>> fits = {"exact": [px.kmeans_lut(weights, b) for b in (1, 2)]}
        >>> fits["uniform"] = [px.uniform_lut(weights, b) for b in (1, 2)]
        >>> [line.get_label() for line in px.plot.error_against_bits(weights, fits).lines if line.get_xdata().size > 2]
        ['the least of scalars']
    """
    check_families("LutFit", fits)
    values = np.asarray(weights, np.float64)
    signal = (values**2 if sensitivity is None else values**2 * np.asarray(sensitivity, np.float64)).sum()
    if signal == 0:
        raise ValueError("all weights are zero; there is no signal to compare an error with")
    points = {
        label: [_rate_and_sqnr(label, fit, values.shape, signal) for fit in chosen] for label, chosen in fits.items()
    }
    axes = axes_of(ax, 5.0, 3.4)
    draw_lines(axes, points)
    rates = [rate for family in points.values() for rate, _ in family]
    low, high = max(min(rates), 0), min(max(rates), 8)
    ks = np.unique(np.round(2 ** np.linspace(low, high, max(2, round(6 * (high - low)) + 1))).astype(int))
    least = np.asarray(kmeans_curve(weights, ks.tolist(), sensitivity=sensitivity))
    ks, least = ks[least > 0], least[least > 0]
    axes.plot(
        np.log2(ks), 10 * np.log10(signal / least), color=INK, linewidth=0.8, zorder=1, label="the least of scalars"
    )
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    return axes


def _rate_and_sqnr(label: str, fit: LutFit, shape: tuple[int, ...], signal: float) -> tuple[float, float]:
    """The point of a fit."""
    found, (k, size) = tuple(fit.indices.shape), (*fit.lut.shape, 1)[:2]
    if np.ndim(fit.inertia) or (*found[:-1], found[-1] * size if found else 1) != (shape or (1,)):
        raise ValueError(
            f"a fit of '{label}' has indices {found} for weights {shape}; give fits of these weights, of one table each"
        )
    inertia = float(fit.inertia)
    return float(np.log2(k)) / size, float(10 * np.log10(signal / inertia)) if inertia > 0 else np.inf
