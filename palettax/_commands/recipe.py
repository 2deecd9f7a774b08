"""What the options, or the file of `--config`, ask for: a transform for each leaf of a tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import palettax as px
from palettax._paths import identity_of, leaf_names
from palettax._progress import progress_bar
from palettax._typing import Tree
from palettax.leaf import is_palettized
from palettax.palettize import WEIGHT_THRESHOLD, count_nonfinite


class Palette(NamedTuple):
    """How a leaf is palettized; `channel_axis=None` goes by the conventions of Flax and torch."""

    mode: str = "kmeans"
    nbits: int | None = None
    group_size: int | None = None
    channel_axis: int | None = None
    vector_size: int = 1
    channel_scale: bool = False
    weight_threshold: int = WEIGHT_THRESHOLD

    @property
    def granularity(self) -> px.Granularity:
        """Which weights share a table, and how many an index."""
        return px.Granularity(self.group_size, self.channel_axis, vector_size=self.vector_size)

    def transform(self) -> px.PaletteTransformation:
        """The transform that makes it."""
        if self.mode == "unique":
            inner = px.unique(self.nbits, granularity=self.granularity)
        elif self.mode == "uniform":
            inner = px.uniform(4 if self.nbits is None else self.nbits, granularity=self.granularity)
        else:
            key = jax.random.key(0) if self.vector_size > 1 else None
            inner = px.kmeans(4 if self.nbits is None else self.nbits, granularity=self.granularity, key=key)
        return px.with_channel_scale(inner, channel_axis=self.channel_axis) if self.channel_scale else inner


class Rules(NamedTuple):
    """Palettes by the path of a leaf: that of the first regex found in it, or else the global one."""

    everywhere: Palette | None
    by_path: Mapping[str, Palette | None] = MappingProxyType({})

    def choose(self, name: str) -> tuple[Palette | None, str]:
        """What holds for a leaf, and where that is said."""
        for pattern, palette in self.by_path.items():
            if re.search(pattern, name):
                return palette, f"by_path[{pattern!r}]"
        return self.everywhere, "global"


def read_rules(path: Path) -> Rules:
    """Read the file of `--config`.

    Raises:
        ValueError: naming the key, and the nearest one that there is.
    """
    from palettax._commands.config import TreeConfig

    return TreeConfig.from_yaml(path).rules()


def palettize_tree(tree: Tree, rules: Rules, check: Callable[[], None] = lambda: None) -> tuple[Tree, px.Report]:
    """Palettize leaf by leaf, as far as the rules go.

    Args:
        tree: what `read_tree` gave.
        rules: what to do to each leaf.
        check: called before each leaf.

    Returns:
        The tree, and what became of each leaf; a leaf that stayed dense says why.

    Raises:
        ValueError: a regex that is found in no path, or a palette that there is not.
    """
    px.by_path([(pattern, None) for pattern in rules.by_path]).init(tree)
    for palette in (rules.everywhere, *rules.by_path.values()):
        if palette is not None:
            palette.transform()  # refuses what is wrong even where no leaf asks for it
    found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_palettized)
    names = leaf_names([path for path, _ in found])
    leaves: list[Any] = [leaf for _, leaf in found]
    done: dict[Any, Any] = {}
    small, reasons = [], {}
    with progress_bar("palettizing", "leaves") as advance:
        for number, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
            check()
            advance(number, len(leaves))
            palette, where = rules.choose(name)
            reason = _why_dense(name, leaf, palette, where)
            if palette is not None and not reason:
                same = identity_of(leaf), palette
                if same not in done:
                    done[same] = px.palettize({name: leaf}, palette.transform(), weight_threshold=0)[name]
                leaf = done[same]
            elif reason:
                reasons[name] = reason
            small.append(leaf)
        advance(len(leaves), len(leaves))
    smaller = jax.tree.unflatten(treedef, small)
    report = px.report(tree, smaller)
    return smaller, px.Report({
        name: row if row.nbits is not None else row._replace(skipped=reasons.get(name, row.skipped))
        for name, row in report.items()
    })  # fmt: skip


def _why_dense(name: str, leaf: Any, palette: Palette | None, where: str) -> str:
    """Why a leaf stays as it is; empty if it is palettized."""
    dtype = leaf.dtype if is_palettized(leaf) else np.asarray(leaf).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"{dtype} is not floating"
    if palette is None:
        return f"{where} is null"
    if leaf.size <= palette.weight_threshold:
        return f"≤ weight_threshold={palette.weight_threshold}"
    if not is_palettized(leaf) and (bad := count_nonfinite(leaf)):
        return f"{bad} NaN or infinite values"
    try:
        palette.granularity.groups(leaf.shape, name)
        if palette.channel_scale:
            px.Granularity(1, palette.channel_axis).groups(leaf.shape, name)
    except ValueError as error:
        return str(error)
    return ""
