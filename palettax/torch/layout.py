"""Flax's layout to torch's and back, for dense and for palettized weights: axes move, nothing is clustered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from palettax._names import nearest, owner_and_attribute
from palettax._paths import leaf_names
from palettax._typing import Tree
from palettax.leaf import is_palettized

Flattened = Mapping[str, tuple[int, ...]]
_RENAMED = {"scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}


def from_flax(params: Tree, *, flattened: Flattened | None = None) -> dict[str, Any]:
    """Name and lay out flax parameters as torch does.

    `kernel` becomes `weight`: (in, out) -> (out, in) at rank 2, and (*spatial, in, out) -> (out, in, *spatial), that is
    a convolution, at rank 3, 4 and 5. `scale` and `embedding` become `weight`, `mean` and `var` the running ones.
    The rank is all there is to go by: kernels of flax's attention and of its transposed convolutions are neither.

    Args:
        params: nested dicts, an `nnx.State` or a `FrozenDict`; leaves dense or `PalettizedArray`, in flax's layout.
        flattened: for a dense layer that reads a flattened feature map, by its dotted name, the (*spatial, channels)
            shape of that map: torch flattens the channels first, so the layer's inputs are reordered.

    Returns:
        Leaves by dotted torch name, ready for `to_state_dict` or `load_into`. Dense ones are NumPy arrays.

    Raises:
        ValueError: two leaves of one torch name, a wrong entry of `flattened`, or a palettized leaf whose groups or
            vectors the reordering of `flattened` would tear apart.

    Example:
        >>> params = {"dense": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}
        >>> {name: leaf.shape for name, leaf in from_flax(params).items()}
        {'dense.bias': (2,), 'dense.weight': (2, 3)}
    """
    leaves = _with_names(params)
    maps = _check_flattened(flattened, leaves)
    torch_leaves: dict[str, Any] = {}
    for name, leaf in leaves:
        renamed = _torch_name(name, len(leaf.shape))
        if renamed in torch_leaves:
            raise ValueError(f"{name}: another leaf is already called {renamed} in torch; rename one")
        torch_leaves[renamed] = _to_torch(name, leaf, maps)
    return torch_leaves


def to_flax(params: Mapping[str, Any], like: Tree, *, flattened: Flattened | None = None) -> Tree:
    """Name and lay out torch parameters as flax does: the inverse of `from_flax`.

    Args:
        params: leaves by dotted torch name, dense or `PalettizedArray`. `num_batches_tracked` is dropped.
        like: a tree of flax parameters, arrays or shapes, that says which names, ranks and structure to give.
        flattened: as in `from_flax`.

    Returns:
        A tree of the structure of `like`. Dense leaves are NumPy arrays.

    Raises:
        ValueError: a leaf that is missing, left over or of another shape than in `like`, or as in `from_flax`.

    Example:
        >>> like = {"dense": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}
        >>> to_flax(from_flax(like), like)["dense"]["kernel"].shape
        (3, 2)
    """
    template, maps = _with_names(like), _check_flattened(flattened, _with_names(like))
    sources = {name: _torch_name(name, len(leaf.shape)) for name, leaf in template}
    extra = {name for name in params if owner_and_attribute(name)[1] != "num_batches_tracked"} - set(sources.values())
    if extra:
        raise ValueError(f"{min(extra)}: no leaf of `like` stands for it; {nearest(min(extra), sources.values())}")
    leaves = []
    for name, expected in template:
        if sources[name] not in params:
            raise ValueError(f"{name}: its torch name {sources[name]} is missing; {nearest(sources[name], params)}")
        leaf = _to_flax(name, params[sources[name]], maps)
        if tuple(leaf.shape) != tuple(expected.shape):
            raise ValueError(f"{name}: {sources[name]} gives shape {tuple(leaf.shape)}, not {tuple(expected.shape)}")
        leaves.append(leaf)
    return jax.tree.structure(like, is_leaf=is_palettized).unflatten(leaves)


def _with_names(tree: Tree) -> list[tuple[str, Any]]:
    """The leaves of a tree with their dotted names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_palettized)[0]
    names = leaf_names([path for path, _ in leaves], separator=".")
    return list(zip(names, [leaf for _, leaf in leaves], strict=True))


def _torch_name(name: str, rank: int) -> str:
    """The torch name of a flax leaf of that rank."""
    module, attribute = owner_and_attribute(name)
    renamed = "weight" if attribute == "kernel" and 2 <= rank <= 5 else _RENAMED.get(attribute, attribute)
    return f"{module}.{renamed}" if module else renamed


def _axes(name: str, rank: int) -> tuple[int, ...]:
    """The flax axis that each torch axis is."""
    if owner_and_attribute(name)[1] == "kernel" and 2 <= rank <= 5:
        return (rank - 1, rank - 2, *range(rank - 2))
    return tuple(range(rank))


def _to_torch(name: str, leaf: Any, maps: Flattened) -> Any:
    leaf = leaf if is_palettized(leaf) else np.asarray(leaf)
    moved = leaf.transpose(*_axes(name, leaf.ndim)) if leaf.ndim else leaf
    return _reorder_inputs(name, moved, maps, channels_first=True)


def _to_flax(name: str, leaf: Any, maps: Flattened) -> Any:
    leaf = leaf if is_palettized(leaf) else np.asarray(leaf)
    ordered = _reorder_inputs(name, leaf, maps, channels_first=False)
    return ordered.transpose(*np.argsort(_axes(name, leaf.ndim)).tolist()) if leaf.ndim else ordered


def _reorder_inputs(name: str, leaf: Any, maps: Flattened, *, channels_first: bool) -> Any:
    """Reorder the inputs of a torch-layout (out, in) weight that reads a flattened feature map."""
    layer, attribute = owner_and_attribute(name)
    if attribute != "kernel" or layer not in maps:
        return leaf
    feature_map = maps[layer]
    order = np.moveaxis(np.arange(math.prod(feature_map)).reshape(feature_map), -1, 0).reshape(-1)
    try:
        return leaf.take(order if channels_first else np.argsort(order), axis=1)
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}. It reads a flattened {feature_map} map: group or vectorise it along its output axis, "
            "or convert the dense weight with from_flax and palettize that"
        ) from error


def _check_flattened(flattened: Flattened | None, leaves: list[tuple[str, Any]]) -> Flattened:
    """Check that each entry names a rank-2 kernel and covers its inputs."""
    kernels = {owner_and_attribute(n)[0]: leaf.shape for n, leaf in leaves if owner_and_attribute(n)[1] == "kernel"}
    for layer, feature_map in (flattened or {}).items():
        if layer not in kernels:
            raise ValueError(f"flattened names {layer!r}, which has no kernel; {nearest(layer, kernels)}")
        shape = tuple(kernels[layer])
        if len(shape) != 2 or math.prod(feature_map) != shape[0]:
            raise ValueError(
                f"{layer}.kernel: flattened gives {feature_map}, {math.prod(feature_map)} inputs in all; the kernel "
                f"has shape {shape} and must be (inputs, outputs)"
            )
    return flattened or {}
