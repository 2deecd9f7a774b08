"""The triple that every transform is, and how a function of one leaf becomes one."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from palettax._paths import difference, identity_of, leaf_names
from palettax._typing import Tree, is_traced
from palettax.leaf import PalettizedArray, depalettize, is_palettized


class UpdateFunction(Protocol):
    """`(params, state, *, sensitivity) -> (params, state)`."""

    def __call__(self, params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> tuple[Tree, Tree]:
        """Snap the values, keep the structure."""
        ...


class FinalizeFunction(Protocol):
    """`(params, state, *, sensitivity) -> tree with PalettizedArray leaves`."""

    def __call__(self, params: Tree, state: Tree, *, sensitivity: Tree | None = None) -> Tree:
        """Change the storage."""
        ...


class PaletteTransformation(NamedTuple):
    """Three pure functions over parameter trees, composed as optax composes its pairs.

    Attributes:
        init: `params -> state`. State is arrays only: what the next step needs.
        update: `(params, state, *, sensitivity=None) -> (params, state)`. The same structure, shapes and dtypes, every
            leaf dense and holding the values its palette gives. What a training step calls.
        finalize: `(params, state, *, sensitivity=None) -> tree`. Changes storage: leaves become `PalettizedArray`.
            For hard transforms `depalettize(finalize(p, s)) == update(p, s)[0]`.

    A leaf that is a `PalettizedArray` already is expanded by a transform that acts on it, kept by one that does not.
    """

    init: Callable[[Tree], Tree]
    update: UpdateFunction
    finalize: FinalizeFunction

    def __repr__(self) -> str:
        return "PaletteTransformation()"  # what its functions close over has no short name


def check_transform(role: str, transform: Any) -> None:
    """Refuse what is no transform where one is wanted; `role` is what it was given as."""
    if not isinstance(transform, PaletteTransformation):
        raise ValueError(f"{role} is {transform!r:.60}; give a transform, such as kmeans(4)")


class MaskedNode:
    """Stands where a leaf is hidden from a transform: a pytree without leaves."""

    def __repr__(self) -> str:
        return "MaskedNode()"


jax.tree_util.register_pytree_node(MaskedNode, lambda _: ((), None), lambda *_: MaskedNode())


def is_node(leaf: Any) -> bool:
    """Whether a tree map should stop here: at a palettized leaf, or at a hidden one."""
    return is_palettized(leaf) or isinstance(leaf, MaskedNode)


def map_leaves(function: Callable[..., Any], params: Tree, *rest: Tree | None) -> Tree:
    """Apply `function(name, leaf, *rest_leaves)` to every leaf; errors name the leaf.

    A leaf that stands in several places, such as a tied embedding, with the same of everything else in all of them, is
    given to the function once, under its first name, and the result stands in all of them.

    Args:
        function: of the path of a leaf, the leaf, and the leaves of `rest` at its place.
        params: the tree. Hidden leaves pass through.
        rest: trees of its structure; None gives None for every leaf.

    Raises:
        ValueError: what the function raised, with the leaf's path, shape and dtype in front; a tensor of torch; or
            another structure.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_node)
    columns = [[None] * len(paths) if tree is None else aligned(treedef, tree, "sensitivity") for tree in rest]
    names = leaf_names([path for path, _ in paths])
    done: dict[Any, Any] = {}
    results = []
    for name, (_, leaf), *others in zip(names, paths, *columns, strict=True):
        same = tuple(map(identity_of, (leaf, *others)))
        if same not in done:
            try:
                if callable(getattr(leaf, "size", None)):
                    raise ValueError("it is no NumPy or JAX array; convert it, torch state dicts by px.torch.to_params")
                done[same] = leaf if isinstance(leaf, MaskedNode) else function(name, leaf, *others)
            except ValueError as error:
                shape = tuple(getattr(leaf, "shape", ()))
                dtype = getattr(leaf, "dtype", type(leaf).__name__)
                raise ValueError(f"leaf '{name}' {shape} {dtype}: {error}") from error
        results.append(done[same])
    return jax.tree.unflatten(treedef, results)


def shared(params: Tree, sensitivity: Tree | None) -> Tree | None:
    """Sensitivities in which the places of a tied leaf have one sum, equal arrays counted once."""
    if sensitivity is None:
        return None
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_node)
    column = aligned(treedef, sensitivity, "sensitivity")
    found: dict[Any, dict[Any, Any]] = {}
    for leaf, own in zip(leaves, column, strict=True):
        if own is not None and not isinstance(own, MaskedNode):
            distinct = found.setdefault(identity_of(leaf), {})
            if not any(_equal(own, other) for other in distinct.values()):
                distinct[identity_of(own)] = own
    sums = {same: functools.reduce(operator.add, distinct.values()) for same, distinct in found.items()}
    return jax.tree.unflatten(
        treedef, [sums.get(identity_of(leaf), own) for leaf, own in zip(leaves, column, strict=True)]
    )


def _equal(one: Any, other: Any) -> bool:
    """Whether two arrays are one, or known to be equal: a `tree.map` makes copies of one for every place."""
    return one is other or (not is_traced(one) and not is_traced(other) and np.array_equal(one, other))


def placed_like(weights: Any, small: PalettizedArray) -> PalettizedArray:
    """The leaf with its indices spread over devices as the weights are; those of vectors stay together."""
    if is_traced(weights) or not isinstance(weights, jax.Array) or len(weights.sharding.device_set) == 1:
        return small
    if small.vector_size > 1:
        return small
    return dataclasses.replace(small, indices=jax.device_put(small.indices, weights.sharding))


def aligned(treedef: Any, tree: Tree, name: str) -> list[Any]:
    """The leaves of a tree at the places of the leaves of params, or a `ValueError` that says it has others."""
    try:
        return treedef.flatten_up_to(tree)
    except ValueError:
        how = difference(treedef, tree)
        raise ValueError(f"{name} has another structure than params; give it one entry per leaf: {how}") from None


def identity() -> PaletteTransformation:
    """The transform that leaves every leaf as it is.

    Example:
        >>> import palettax as px
        >>> px.identity().update({"w": 1.0}, ())
        ({'w': 1.0}, ())
    """
    return PaletteTransformation(
        init=lambda params: (),
        update=lambda params, state, *, sensitivity=None: (depalettize(params), state),
        finalize=lambda params, state, *, sensitivity=None: params,
    )


@jax.custom_jvp
def with_gradient_of(value: Any, stand_in: Any) -> Any:
    """`value`, bit for bit, with the gradient of what stands in for it."""
    return value


@with_gradient_of.defjvp
def _with_gradient_of_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    return primals[0], tangents[1]


def is_stateful(state: Tree) -> bool:
    """Whether a transform's state holds anything: then its updates follow the weights, one after the other."""
    return bool(jax.tree.leaves(state))
