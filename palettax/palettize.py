"""The front door: a parameter tree in, a tree with `PalettizedArray` leaves out."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from palettax._typing import Tree, is_traced
from palettax.leaf import depalettize, is_palettized
from palettax.transforms import PaletteTransformation, masked
from palettax.transforms.base import check_transform, map_leaves

WEIGHT_THRESHOLD = 2048


def palettize(
    params: Tree,
    transform: PaletteTransformation,
    *,
    sensitivity: Tree | None = None,
    weight_threshold: int = WEIGHT_THRESHOLD,
    nonfinite: Literal["raise", "keep"] = "raise",
) -> Tree:
    """Palettize a parameter tree: every large float leaf becomes `lut[indices]`.

    Args:
        params: any pytree of arrays, `nnx.state(model, nnx.Param)` included. Nothing in it is changed. Leaves that are
            palettized already are palettized anew from their values. A leaf that stands in several places is clustered
            once and stays tied (under `jit`, where nothing tells that two leaves are one, each is clustered).
        transform: what to do, for example `kmeans(4)` or `by_path([...])`.
        sensitivity: a tree of the structure of params, each leaf ≥ 0: what a squared error of each weight costs. None
            in the place of a leaf weighs its errors alike.
        weight_threshold: leaves of at most this many weights stay dense.
        nonfinite: a leaf that holds NaN or infinity is an error ("raise"), or stays dense ("keep").

    Returns:
        The tree, with a `PalettizedArray` for each leaf that was palettized and the very array for each that was not.
        `report(params, palettized)` says which, and why.

    Raises:
        ValueError: naming the leaf, what was found and what to do: integer leaves above the threshold, NaN or
            infinities (under `jit` their lut is NaN instead), a group size that does not divide its axis, a regex that
            matches no leaf, a sensitivity that is negative or of another shape; or params that are no tree of arrays.

    Example:
        >>> import jax, palettax as px
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64)), "bias": jax.numpy.zeros(64)}
        >>> small = px.palettize(params, px.kmeans(nbits=4))
        >>> small["kernel"].indices.shape, small["kernel"].bits_per_weight, small["bias"].shape
        ((64, 64), 4.125, (64,))
    """
    leaves = jax.tree.leaves(params, is_leaf=is_palettized)
    if len(leaves) == 1 and leaves[0] is params and not hasattr(params, "shape"):
        raise ValueError(
            f"params is of type {type(params).__name__}, no tree of arrays; pass the parameters themselves: "
            "px.torch.to_params(model.state_dict()), nnx.state(model, nnx.Param), or what Linen's init returned"
        )
    check_transform("transform", transform)
    if nonfinite not in ("raise", "keep"):
        raise ValueError(f'nonfinite={nonfinite!r}; choose "raise" or "keep"')

    def eligible(name: str, leaf: Any) -> bool:
        if not hasattr(leaf, "size") or leaf.size <= weight_threshold:
            return False
        if nonfinite == "raise":
            return True
        if is_traced(leaf):
            raise ValueError('nonfinite="keep" looks at values, which are unknown under jit; use "raise"')
        return count_nonfinite(depalettize(leaf)) == 0

    keep = map_leaves(eligible, params)
    inner = masked(transform, lambda _: keep)
    return inner.finalize(params, inner.init(params), sensitivity=sensitivity)


def count_nonfinite(leaf: Any) -> int:
    """NaN and infinities in a concrete float leaf."""
    return int((~np.isfinite(np.asarray(leaf))).sum()) if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
