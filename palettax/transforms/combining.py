"""Transforms made of transforms."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence

import jax

from palettax._paths import leaf_names
from palettax._typing import Tree
from palettax.leaf import depalettize, is_palettized
from palettax.transforms.base import MaskedNode, PaletteTransformation, aligned, identity, is_node


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
    """Apply a transform to some leaves and pass the others through.

    Args:
        inner: the transform.
        mask: a tree of bools of the structure of params, or a function from params to one; True means "transform it".

    Example:
        >>> import jax, palettax as px
        >>> weights = {"a": jax.random.normal(jax.random.key(0), (64, 64)), "b": jax.numpy.ones((64, 64))}
        >>> small = px.palettize(weights, px.masked(px.kmeans(4), {"a": True, "b": False}))
        >>> type(small["a"]).__name__, small["b"].shape
        ('PalettizedArray', (64, 64))
    """

    def select(params: Tree, tree: Tree | None, name: str = "sensitivity") -> Tree | None:
        keep = mask(_shapes(params)) if callable(mask) else mask
        return _hide(params, keep, tree, name)

    def init(params: Tree) -> Tree:
        return inner.init(select(params, params))

    def update(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> tuple[Tree, Tree]:
        new, state = inner.update(select(params, params), state, sensitivity=select(params, sensitivity))
        return depalettize(_restore(params, new)), state

    def finalize(params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> Tree:
        return _restore(params, inner.finalize(select(params, params), state, sensitivity=select(params, sensitivity)))

    return PaletteTransformation(init, update, finalize)


def _shapes(params: Tree) -> Tree:
    """Params with the shape and dtype in the place of each palettized leaf, for a mask to look at."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_palettized(leaf) else leaf,
        params,
        is_leaf=is_palettized,
    )


def _hide(params: Tree, keep: Tree, tree: Tree | None, name: str) -> Tree | None:
    """`tree`, aligned with params, its leaves hidden where `keep` is false."""
    if tree is None:
        return None
    treedef = jax.tree.structure(params, is_leaf=is_node)
    leaves = zip(aligned(treedef, keep, "mask"), aligned(treedef, tree, name), strict=True)
    return jax.tree.unflatten(
        treedef, [MaskedNode() if isinstance(k, MaskedNode) or not k else leaf for k, leaf in leaves]
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

    def mask_for(label: Hashable) -> Callable[[Tree], Tree]:
        def mask(params: Tree) -> Tree:
            tree = labels(params) if callable(labels) else labels
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
        raise ValueError(f"rules are {rules!r}; give a list of (regex, transform or None)")
    for pattern, transform in rules:
        if not (transform is None or isinstance(transform, PaletteTransformation)):
            raise ValueError(
                f"rule {pattern!r} has a {type(transform).__name__}; give a transform, such as kmeans(4), or None"
            )
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
