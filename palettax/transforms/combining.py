"""Transforms made of transforms."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from palettax._paths import identity_of, leaf_names
from palettax._typing import Tree, is_traced
from palettax.leaf import depalettize, is_palettized
from palettax.transforms.base import (
    MaskedNode,
    PaletteTransformation,
    aligned,
    check_transform,
    identity,
    is_node,
    map_leaves,
    placed_like,
    shared,
)
from palettax.transforms.elements import hide_elements, is_element_mask, keep_elements


def chain(*transforms: PaletteTransformation) -> PaletteTransformation:
    """Apply transforms one after the other; none at all is `identity`.

    Associative: `chain(a, chain(b, c))` and `chain(chain(a, b), c)` do the same as `chain(a, b, c)`.

    Args:
        transforms: the first is applied first. In `finalize`, a leaf keeps the storage of the last that acted on it.

    Example:
        >>> import jax, palettax as px
        >>> weights = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> px.palettize(weights, px.chain(px.kmeans(8), px.kmeans(2)))["w"].nbits
        2
    """
    for transform in transforms:
        check_transform("one of them", transform)

    def init(params: Tree) -> Tree:
        return tuple(t.init(params) for t in transforms)

    def update(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> tuple[Tree, Tree]:
        states = []
        for t, s in zip(transforms, state, strict=True):
            params, s = t.update(params, s, sensitivity=sensitivity)
            states.append(s)
        return depalettize(params), tuple(states)

    def finalize(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> Tree:
        for t, s in zip(transforms, state, strict=True):
            params = t.finalize(params, s, sensitivity=sensitivity)
        return params

    return PaletteTransformation(init, update, finalize)


def masked(inner: PaletteTransformation, mask: Tree | Callable[[Tree], Tree]) -> PaletteTransformation:
    """Apply a transform to some leaves, or to some elements of them, and pass the others through.

    Elements that are left out keep their values and have no say in the table. A palettized leaf stores which they are
    in a bitmap, and their values unless all are zero.

    Args:
        inner: the transform.
        mask: a tree of the structure of params, or a function from params to one; True means "transform it". Each of
            its leaves is a bool, or an array of bools of the shape of the leaf of params: one for every element.

    Raises:
        ValueError: from `update` and `finalize`: an array of bools of another shape than the leaf, or for vectors,
            whose elements share an index.

    Example:
        >>> import jax, palettax as px
        >>> weights = {"a": jax.random.normal(jax.random.key(0), (64, 64)), "b": jax.numpy.ones((64, 64))}
        >>> small = px.palettize(weights, px.masked(px.kmeans(4), {"a": True, "b": False}))
        >>> type(small["a"]).__name__, small["b"].shape
        ('PalettizedArray', (64, 64))
        >>> small = px.palettize(weights, px.masked(px.kmeans(4), {"a": abs(weights["a"]) < 3, "b": False}))
        >>> bool((small["a"].depalettize() == weights["a"])[abs(weights["a"]) >= 3].all())
        True
    """
    check_transform("inner", inner)

    def marked(name: str, leaf: Any, k: Any, sensitivity: Any) -> Any:
        return hide_elements(sensitivity, leaf, k) if is_element_mask(k) else sensitivity

    def seen(params: Tree, sensitivity: Tree | None, keep: Tree) -> tuple[Tree, Tree | None]:
        """What the inner transform sees: hidden leaves and elements are out of its sight."""
        visible = _hide(params, keep, params, "params")
        if any(map(is_element_mask, jax.tree.leaves(keep))):
            sensitivity = map_leaves(marked, params, keep, shared(params, sensitivity))
        return visible, _hide(params, keep, sensitivity, "sensitivity")

    def back(params: Tree, inside: Tree, keep: Tree) -> Tree:
        """What became of what was seen, beside what was not."""

        def kept(name: str, new: Any, old: Any, k: Any) -> Any:
            if not is_element_mask(k):
                return new
            new = keep_elements(new, depalettize(old), k)
            return placed_like(old, new) if is_palettized(new) else new

        if any(map(is_element_mask, jax.tree.leaves(keep))):
            inside = map_leaves(kept, inside, params, keep)
        return _restore(params, inside)

    def init(params: Tree) -> Tree:
        return inner.init(_hide(params, _resolved(mask, params), params, "params"))

    def update(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> tuple[Tree, Tree]:
        keep = _one_for_ties(params, _resolved(mask, params))
        visible, mass = seen(params, sensitivity, keep)
        new, state = inner.update(visible, state, sensitivity=mass)
        return depalettize(back(params, new, keep)), state

    def finalize(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> Tree:
        keep = _one_for_ties(params, _resolved(mask, params))
        visible, mass = seen(params, sensitivity, keep)
        return back(params, inner.finalize(visible, state, sensitivity=mass), keep)

    return PaletteTransformation(init, update, finalize)


def _resolved(tree: Tree | Callable[[Tree], Tree], params: Tree) -> Tree:
    """The tree, or what the function makes of params, all dense; a module that can be called is a tree."""
    is_function = callable(tree) and jax.tree_util.all_leaves([tree])
    return tree(depalettize(params)) if is_function else tree


def _one_for_ties(params: Tree, keep: Tree) -> Tree:
    """The mask, with one array for all places of a tied leaf whose masks are equal, so that the tie holds."""
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_node)
    found: dict[Any, Any] = {}
    masks = [
        found.setdefault((identity_of(leaf), np.asarray(k).tobytes()), k)
        if is_element_mask(k) and not is_traced(k)
        else k
        for leaf, k in zip(leaves, aligned(treedef, keep, "mask"), strict=True)
    ]
    return jax.tree.unflatten(treedef, masks)


def _hide(params: Tree, keep: Tree, tree: Tree | None, name: str) -> Tree | None:
    """`tree`, aligned with params, its leaves hidden where `keep` is false."""
    if tree is None:
        return None
    treedef = jax.tree.structure(params, is_leaf=is_node)
    leaves = zip(aligned(treedef, keep, "mask"), aligned(treedef, tree, name), strict=True)
    return jax.tree.unflatten(
        treedef,
        [leaf if is_element_mask(k) or (k and not isinstance(k, MaskedNode)) else MaskedNode() for k, leaf in leaves],
    )


def _restore(params: Tree, inside: Tree) -> Tree:
    """What a transform made of the leaves it saw, beside the ones it did not."""
    return jax.tree.map(lambda leaf, new: leaf if isinstance(new, MaskedNode) else new, params, inside, is_leaf=is_node)


def partition(
    transforms: Mapping[Hashable, PaletteTransformation], labels: Tree | Callable[[Tree], Tree]
) -> PaletteTransformation:
    """Give every leaf the transform of its label.

    Args:
        transforms: label to transform.
        labels: a tree of labels of the structure of params, or a function from params to one.

    Raises:
        ValueError: from `init`, `update` and `finalize`: a label without a transform.

    Example:
        >>> import jax, palettax as px
        >>> weights = {"a": jax.random.normal(jax.random.key(0), (64, 64)), "b": jax.numpy.ones((64, 64))}
        >>> small = px.palettize(weights, px.partition({"fine": px.kmeans(8), "coarse": px.kmeans(1)},
        ...                                            {"a": "fine", "b": "coarse"}))
        >>> small["a"].nbits, small["b"].nbits
        (8, 1)
    """
    for label, transform in transforms.items():
        check_transform(f"what label {label!r} does", transform)

    def mask_for(label: Hashable) -> Callable[[Tree], Tree]:
        def mask(params: Tree) -> Tree:
            tree = _resolved(labels, params)
            unknown = set(jax.tree.leaves(tree)) - set(transforms)
            if unknown:
                raise ValueError(f"labels {sorted(map(str, unknown))} have no transform; there are {list(transforms)}")
            return jax.tree.map(lambda found: found == label, tree)

        return mask

    return chain(*(masked(t, mask_for(label)) for label, t in transforms.items()))


def by_path(rules: Sequence[tuple[str, PaletteTransformation | None]]) -> PaletteTransformation:
    """Choose the transform of a leaf by its path: the first rule whose regex is found in it.

    Paths join the keys by "/": `encoder/0/kernel`. A leaf that no rule matches is left dense.

    Args:
        rules: (regex, transform), tried in order with `re.search`; None as a transform leaves the leaf dense.

    Raises:
        ValueError: from `init`, `update` and `finalize`: a regex found in no path, with the paths there are.

    Example:
        >>> import jax, palettax as px
        >>> weights = {n: jax.random.normal(jax.random.key(0), (64, 64)) for n in ("embed", "head", "norm")}
        >>> small = px.palettize(weights, px.by_path([("embed", px.kmeans(8)), ("norm", None), (".*", px.kmeans(4))]))
        >>> small["embed"].nbits, small["head"].nbits, small["norm"].shape
        (8, 4, (64, 64))
    """
    if isinstance(rules, Mapping) or not all(isinstance(rule, tuple | list) and len(rule) == 2 for rule in rules):
        raise ValueError(f"rules are of type {type(rules).__name__}; give a list of (regex, transform or None)")
    for pattern, transform in rules:
        if transform is not None:
            check_transform(f"what rule {pattern!r} does", transform)
    patterns = [_compiled(pattern) for pattern, _ in rules]
    unmatched = len(rules)

    def labels(params: Tree) -> Tree:
        paths, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_node)
        names = leaf_names([path for path, _ in paths])
        for pattern in patterns:
            if not any(map(pattern.search, names)):
                shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
                raise ValueError(f"regex {pattern.pattern!r} matches no leaf; the leaves are {shown}")
        first = [next((i for i, p in enumerate(patterns) if p.search(name)), unmatched) for name in names]
        return jax.tree.unflatten(treedef, first)

    transforms = {i: identity() if t is None else t for i, (_, t) in enumerate(rules)}
    return partition({**transforms, unmatched: identity()}, labels)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
