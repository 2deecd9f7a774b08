"""What palettization did to every leaf."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from palettax._paths import difference, identity_of, leaf_names
from palettax._typing import Tree
from palettax.clustering.points import distinct_count
from palettax.leaf import PalettizedArray, as_numpy, depalettize, is_palettized, split_blocks
from palettax.palettize import WEIGHT_THRESHOLD, count_nonfinite
from palettax.transforms.base import aligned, shared


class LeafReport(NamedTuple):
    """What became of one leaf.

    Attributes:
        shape: of the weight.
        dtype: of the weight.
        nbits: bits per index; None for a leaf that stayed dense.
        groups: tables per axis; () for a dense leaf.
        bits_per_weight: 8 · nbytes / size, tables included.
        sqnr: 10 log₁₀(Σ w² / Σ (w - ŵ)²) in dB; infinite where nothing changed, as of leaves that are no floats.
        nbytes: stored bytes now.
        nbytes_before: stored bytes of the dense leaf.
        skipped: why the leaf is dense; "" when it is palettized.
        tied_to: the leaf whose array this is too, whose bytes are not counted again; "" for a leaf of its own.
        loss_increase: ½ Σ sensitivity · (w - ŵ)², in units of the loss when sensitivities are Fisher information; None
            without sensitivities.
        unweighted: groups in which all sensitivities are zero, so that every weight counts as one.
    """

    shape: tuple[int, ...]
    dtype: str
    nbits: int | None
    groups: tuple[int, ...]
    bits_per_weight: float
    sqnr: float
    nbytes: int
    nbytes_before: int
    skipped: str
    tied_to: str = ""
    loss_increase: float | None = None
    unweighted: int = 0


class Report(dict[str, LeafReport]):
    """Path to `LeafReport`, in the order of the tree; prints as a table."""

    @property
    def nbytes(self) -> int:
        """Stored bytes of the whole tree now."""
        return sum(leaf.nbytes for leaf in self.values() if not leaf.tied_to)

    @property
    def nbytes_before(self) -> int:
        """Stored bytes of the whole dense tree."""
        return sum(leaf.nbytes_before for leaf in self.values() if not leaf.tied_to)

    def summary(self) -> str:
        """How many bytes became how many."""
        before, now = self.nbytes_before, self.nbytes
        times = (
            f"{now / before:.2f} times larger"
            if now > before > 0
            else f"{before / now if now else 1:.2f} times smaller"
        )
        return f"{before:,} bytes became {now:,}: {times}"

    @property
    def loss_increase(self) -> float | None:
        """½ Σ sensitivity · (w - ŵ)² of the whole tree; None without sensitivities."""
        own = [leaf.loss_increase for leaf in self.values() if leaf.loss_increase is not None and not leaf.tied_to]
        return float(sum(own)) if own else None

    def __str__(self) -> str:
        weighed = self.loss_increase is not None
        rows = [["leaf", "shape", "dtype", "bits/weight", "SQNR dB", "bytes", *["loss increase"] * weighed, ""]]
        for name, leaf in self.items():
            loss = "" if leaf.loss_increase is None else f"{leaf.loss_increase:.3g}"
            rows.append([
                name, "×".join(map(str, leaf.shape)), leaf.dtype, f"{leaf.bits_per_weight:.3g}", f"{leaf.sqnr:.1f}",
                f"{leaf.nbytes:,}", *[loss] * weighed, _note(leaf),
            ])  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(self.summary())
        return "\n".join([*lines, f"predicted loss increase: {self.loss_increase:.3g}"] if weighed else lines)


def report(
    params: Tree, palettized: Tree, *, sensitivity: Tree | None = None, weight_threshold: int = WEIGHT_THRESHOLD
) -> Report:
    """Say for every leaf what it costs now, what it lost, and if it stayed dense, why.

    Args:
        params: the dense tree that was palettized.
        palettized: what `palettize` made of it.
        sensitivity: the Fisher information that `fisher_diagonal` gives: the report then predicts by how much each leaf
            raises the loss, ½ Σ sensitivity · (w - ŵ)², which compares leaves of any scale. With labels drawn from the
            model it is right to an order of magnitude while the loss is nearly quadratic, and most often too low; with
            those of the data, which a trained model fits, much too low. Other sensitivities give other units.
        weight_threshold: the threshold that was used; it decides which reason is given to leaves that are smaller than
            all that are palettized.

    Returns:
        A dict from path to `LeafReport`; `print` shows it as a table.

    Raises:
        ValueError: the trees have different structures, or stand in the other order.

    Example:
        >>> import jax, palettax as px
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64)), "bias": jax.numpy.zeros(64)}
        >>> leaves = px.report(params, px.palettize(params, px.kmeans(nbits=4)))
        >>> leaves["kernel"].nbytes, leaves["bias"].skipped
        (2112, '≤ weight_threshold=2048')
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_palettized)
    try:
        after = treedef.flatten_up_to(palettized)
    except ValueError:
        raise ValueError(f"params and palettized are different trees: {difference(treedef, palettized)}") from None
    names = leaf_names([path for path, _ in paths])
    if any(is_palettized(before) for _, before in paths) and not any(map(is_palettized, after)):
        raise ValueError("params is palettized and palettized is not; the order is report(params, palettized)")
    masses = (
        [None] * len(paths) if sensitivity is None else aligned(treedef, shared(params, sensitivity), "sensitivity")
    )
    smallest = min((leaf.size for leaf in after if isinstance(leaf, PalettizedArray)), default=np.inf)
    rows, first = {}, {}
    for name, (_, before), now, mass in zip(names, paths, after, masses, strict=True):
        tied_to = first.setdefault((identity_of(before), identity_of(now)), name) if hasattr(before, "shape") else name
        threshold = weight_threshold if getattr(before, "size", 0) < smallest else 0
        row = _leaf_report(before, now, threshold)._replace(tied_to="" if tied_to == name else tied_to)
        rows[name] = row if mass is None else _weighed(name, row, before, now, np.asarray(mass))
    return Report(rows)


def _weighed(name: str, row: LeafReport, before: Any, now: Any, mass: np.ndarray) -> LeafReport:
    """The row with what sensitivities say."""
    if row.dtype.startswith("key") or not jnp.issubdtype(jnp.dtype(row.dtype), jnp.floating):
        return row
    if mass.shape != row.shape:
        raise ValueError(f"leaf '{name}' is {row.shape} and its sensitivity {mass.shape}; give one number per weight")
    dense, after = (_dense(leaf).astype(np.float64) for leaf in (before, now))
    finite = np.isfinite(dense)  # what was not stayed as it is
    error = np.where(finite, dense, 0) - np.where(finite, after, 0)
    zero = 0
    if isinstance(now, PalettizedArray):
        zero = int((~np.asarray(split_blocks(mass != 0, now.groups)).any(axis=1)).sum())
    return row._replace(loss_increase=float((mass.astype(np.float64) * error**2).sum() / 2), unweighted=zero)


def _note(leaf: LeafReport) -> str:
    """What a row says in words."""
    if leaf.nbits is None:
        # A weight of a package may be small already and stay so.
        words = [f"dense: {leaf.skipped}" if leaf.nbytes == leaf.nbytes_before else leaf.skipped]
    else:
        words = [f"{leaf.nbits} bits", f"{int(np.prod(leaf.groups))} lut"]
        if leaf.nbytes > leaf.nbytes_before:
            words.append("larger than dense")
        if np.isnan(leaf.sqnr):
            words.append("NaN: in its table, or in the weights that it was made of")
    if leaf.unweighted:
        words.append(f"sensitivity is zero in {leaf.unweighted}: unweighted there")
    return ", ".join([*words, f"tied to {leaf.tied_to}"] if leaf.tied_to else words)


def _leaf_report(before: Any, now: Any, weight_threshold: int) -> LeafReport:
    array = _dense(before) if isinstance(before, PalettizedArray) else before
    is_key = hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    dense = np.asarray(jax.random.key_data(array) if is_key else array)
    small = isinstance(now, PalettizedArray)
    return LeafReport(
        shape=dense.shape,
        dtype=str(dense.dtype),
        nbits=now.nbits if small else None,
        groups=now.groups if small else (),
        bits_per_weight=8 * (now.nbytes if small else dense.nbytes) / max(dense.size, 1),
        sqnr=_sqnr(dense, now),
        nbytes=now.nbytes if small else dense.nbytes,
        nbytes_before=dense.nbytes,
        skipped="" if small else _why_dense(dense, weight_threshold),
    )


def _dense(leaf: Any) -> np.ndarray:
    """A leaf's weights, computed on the host."""
    return np.asarray(depalettize(as_numpy(leaf)) if is_palettized(leaf) else leaf)


def _sqnr(before: np.ndarray, now: Any) -> float:
    if not jnp.issubdtype(before.dtype, jnp.floating):
        return np.inf
    after = _dense(now)
    if after.shape != before.shape:
        raise ValueError(f"a leaf of {before.shape} became one of {after.shape}; give the tree that was palettized")
    finite = np.isfinite(before)  # what was not is no signal
    before, after = (np.where(finite, a, 0).astype(np.float64) for a in (before, after))
    signal, noise = np.sum(np.square(before)), np.sum(np.square(before - after))
    if noise == 0 or signal == 0:
        return float(np.inf if noise == 0 else -np.inf)
    return float(10 * np.log10(signal / noise))


def _why_dense(weights: np.ndarray, weight_threshold: int) -> str:
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        return f"{weights.dtype} is not floating"
    if weights.size <= weight_threshold:
        return f"≤ weight_threshold={weight_threshold}"
    if count_nonfinite(weights):
        return f"{count_nonfinite(weights)} NaN or infinite values"
    distinct = distinct_count(weights.reshape(-1))
    return f"left dense by the transform ({distinct} distinct values)"
