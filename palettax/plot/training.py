"""Training: how a table moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from palettax._typing import Array
from palettax.plot.look import ACCENT, FILL, INK, axes_of, densities

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def lut_trajectories(
    luts: Float[Array, "steps ..."],
    weights: Float[Array, "*shape"] | None = None,
    *,
    steps: Int[Array, " steps"] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw where the entries of a table went in training, and beside them the weights for which they ended there.

    Args:
        luts: (steps, k), the table after each step; or (steps, *groups, k, 1) as `DkmState.luts` of a leaf stack, with
            one group.
        weights: (*shape), the dense weights at the end; their histogram stands at the right. None for no histogram.
        steps: (steps,), the number of each step; None for 1, 2, 3.
        ax: axes to draw on; None for new ones.

    Returns:
        The axes: a line for each entry. The histogram is `axes.child_axes[0]`.

    Raises:
        ValueError: no steps, several tables at a step, vectors, entries that are not finite, or a number of steps that
            is another.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, jax.numpy as jnp, palettax as px, palettax.plot
        >>> weights = jax.random.normal(jax.random.key(0), (64, 64))
        >>> palette = px.dkm(nbits=2)
        >>> state, luts = palette.init({"w": weights}), []
        >>> for step in range(3):
        ...     _, state = palette.update({"w": weights * 0.9**step}, state)
        ...     luts.append(state.luts["w"])
        >>> len(px.plot.lut_trajectories(jnp.stack(luts), weights).lines)
        4
    """
    tables = np.asarray(luts, np.float64)
    if tables.ndim < 2 or not tables.size:
        raise ValueError(f"luts is {tables.shape}; give (steps, k): the tables of all steps, stacked")
    if tables.ndim > 2:
        if tables.shape[-1] != 1:
            raise ValueError(f"luts is {tables.shape}: tables of vectors, whose entries are no numbers; draw one axis")
        if any(n != 1 for n in tables.shape[1:-2]):
            raise ValueError(
                f"luts is {tables.shape}: several tables at a step; give those of one group, such as "
                f"luts[:, {', '.join('0' for _ in tables.shape[1:-2])}]"
            )
        tables = tables.reshape(len(tables), tables.shape[-2])
    if not np.isfinite(tables).all():
        raise ValueError("luts hold NaN or infinities; there is no place for those")
    numbers = np.arange(1, len(tables) + 1) if steps is None else np.asarray(steps)
    if numbers.shape != (len(tables),):
        raise ValueError(f"{len(tables)} tables and steps of {numbers.shape}; give a number for each table")
    axes = axes_of(ax, 5.0, 3.0)
    k = tables.shape[1]
    thickness = 1.3 if k <= 16 else 0.6 if k <= 64 else 0.3
    axes.plot(numbers, tables, color=ACCENT, linewidth=thickness, marker="." if len(tables) == 1 else "")
    axes.set(xlabel="step", ylabel="entry")
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)
    if weights is not None:
        _draw_beside(axes, np.asarray(weights, np.float64).reshape(-1), tables, thickness)
    return axes


def _draw_beside(axes: Axes, values: np.ndarray, tables: np.ndarray, thickness: float) -> None:
    """The histogram of the weights on the axis of the entries, with a line where each entry ended."""
    density, edges = densities(values, tables, bins=80)
    beside = axes.inset_axes((1.02, 0, 0.25, 1), sharey=axes)
    beside.stairs(density, edges, orientation="horizontal", fill=True, color=FILL, linewidth=0)
    beside.hlines(tables[-1], 0, density.max(), color=ACCENT, linewidth=thickness)
    beside.axvline(0, color=INK, linewidth=0.6)
    beside.set(xlim=(0, 1.05 * density.max()), xticks=[])
    beside.tick_params(left=False, labelleft=False)
    beside.spines[:].set_visible(False)
    axes.set_ylim(edges[0], edges[-1])
