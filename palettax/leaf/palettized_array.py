"""`PalettizedArray`: one weight tensor as a lookup table and indices, in Core ML's own layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from palettax._typing import NBITS, Array, Tree, is_traced
from palettax.leaf.packing import packed_size


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("lut", "indices", "scale"),
    meta_fields=("nbits", "vector_axis", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class PalettizedArray:
    """A weight tensor stored as `weight = lut[group, indices] · scale`.

    Invariants, with r the rank and k = 2^nbits (`validate` checks them):

    - `indices` is uint8 of rank r, every entry below k. Its shape is the weight's, but on `vector_axis`, where one
      index stands for `vector_size` consecutive weights.
    - `lut` has shape `(*groups, k, vector_size)` and rank r + 2. `groups[a]` divides `indices.shape[a]`: axis a is cut
      into that many equal consecutive blocks and each block has a table of its own.
    - `vector_size` is 1 exactly when `vector_axis` is None.
    - `scale` is None, or has rank r and broadcasts to the weight.
    - `lut` (and `scale`) have the dtype of the weight, which `dtype` names.

    A pytree of `lut`, `indices` and `scale`; the rest is static, so it passes through `jit`, `vmap` and `tree_map`.

    Example:
        >>> import numpy as np, palettax as px
        >>> lut = np.array([-1.0, 0.5], np.float32).reshape(1, 1, 2, 1)
        >>> small = px.PalettizedArray(lut, np.array([[0, 1, 1]], np.uint8), nbits=1)
        >>> px.depalettize(small).tolist()
        [[-1.0, 0.5, 0.5]]
    """

    lut: Float[Array, "*groups k vector"]
    indices: UInt8[Array, "*shape"]
    scale: Float[Array, "*scale"] | None = None
    nbits: int = dataclasses.field(kw_only=True)
    vector_axis: int | None = dataclasses.field(kw_only=True, default=None)
    dtype: Any = dataclasses.field(kw_only=True, default=None)

    def __post_init__(self) -> None:
        # JAX rebuilds the dataclass around placeholders: only a real table knows its dtype.
        if self.dtype is None and hasattr(self.lut, "dtype"):
            object.__setattr__(self, "dtype", np.dtype(self.lut.dtype))

    @property
    def vector_size(self) -> int:
        """Weights per index."""
        return self.lut.shape[-1]

    @property
    def groups(self) -> tuple[int, ...]:
        """Tables per axis."""
        return tuple(self.lut.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight this stands for."""
        shape = list(self.indices.shape)
        if self.vector_axis is not None:
            shape[self.vector_axis] *= self.vector_size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """The rank of the weight."""
        return len(self.indices.shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes when stored: packed indices, tables and scales."""
        floats = math.prod(self.lut.shape) + (0 if self.scale is None else math.prod(self.scale.shape))
        return packed_size(math.prod(self.indices.shape), self.nbits) + floats * np.dtype(self.dtype).itemsize

    @property
    def bits_per_weight(self) -> float:
        """8·nbytes / size: what a weight costs, tables and scales included."""
        return 8 * self.nbytes / max(self.size, 1)

    def validate(self) -> PalettizedArray:
        """Check the invariants of the class.

        Returns:
            The array itself, so that a call can end in `.validate()`.

        Raises:
            ValueError: naming the invariant that does not hold and what was found.
        """
        if self.nbits not in NBITS:
            raise ValueError(f"nbits={self.nbits!r}; Core ML holds {NBITS}")
        lut, indices, k = self.lut, self.indices, 2**self.nbits
        rank = len(indices.shape)
        if len(lut.shape) != rank + 2:
            raise ValueError(
                f"lut {lut.shape} must have the rank of indices {indices.shape} plus 2: (*groups, k, vector)"
            )
        if lut.shape[-2] != k:
            raise ValueError(f"lut {lut.shape} has {lut.shape[-2]} entries; nbits={self.nbits} needs {k}")
        for axis, (groups, length) in enumerate(zip(self.groups, indices.shape, strict=True)):
            if groups < 1 or length % groups:
                raise ValueError(f"{groups} groups do not divide axis {axis} of indices {indices.shape}")
        if (self.vector_size == 1) != (self.vector_axis is None):
            raise ValueError(f"vector_size={self.vector_size} with vector_axis={self.vector_axis}: set both or neither")
        if self.vector_axis is not None and not 0 <= self.vector_axis < rank:
            raise ValueError(f"vector_axis={self.vector_axis} is not an axis of indices {indices.shape}")
        if np.dtype(indices.dtype) != np.uint8:
            raise ValueError(f"indices are {indices.dtype}; they must be uint8")
        if not jnp.issubdtype(lut.dtype, jnp.floating) or np.dtype(lut.dtype) != np.dtype(self.dtype):
            raise ValueError(f"lut is {lut.dtype}; it must be floating and of the weight's dtype {self.dtype}")
        if self.scale is not None and np.dtype(self.scale.dtype) != np.dtype(self.dtype):
            raise ValueError(f"scale is {self.scale.dtype}; it must be of the weight's dtype {self.dtype}")
        if self.scale is not None and len(self.scale.shape) != rank:
            raise ValueError(f"scale {self.scale.shape} must have the rank of the weight {self.shape}")
        if self.scale is not None and np.broadcast_shapes(self.scale.shape, self.shape) != self.shape:
            raise ValueError(f"scale {self.scale.shape} does not broadcast to the weight {self.shape}")
        if not is_traced(indices) and indices.size and int(np.asarray(indices).max()) >= k:
            raise ValueError(f"index {int(np.asarray(indices).max())} is outside the {k} entries of the lut")
        return self

    def depalettize(self) -> Float[Array, ...]:
        """The dense weight, `lut[group, indices] · scale`, in `dtype`; NumPy when every part is NumPy."""
        xp = np if isinstance(self.lut, np.ndarray) and isinstance(self.indices, np.ndarray) else jnp
        k, vector_size = self.lut.shape[-2:]
        group = xp.zeros((1,) * self.ndim, np.int32)
        for axis, (groups, length) in enumerate(zip(self.groups, self.indices.shape, strict=True)):
            block = xp.arange(length, dtype=np.int32) // (length // groups)
            group = group * groups + block.reshape([-1 if a == axis else 1 for a in range(self.ndim)])
        weight = self.lut.reshape(-1, vector_size)[group * k + self.indices]
        weight = weight[..., 0] if self.vector_axis is None else _join_vectors(xp, weight, self.vector_axis)
        return weight if self.scale is None else weight * self.scale

    def transpose(self, *axes: int) -> PalettizedArray:
        """Reorder the axes of the weight; nothing is clustered or looked up again.

        `depalettize(x.transpose(*axes)) == depalettize(x).transpose(*axes)`.

        Args:
            axes: a permutation of `range(ndim)`; none at all reverses the axes, as in NumPy.
        """
        order = tuple(a + self.ndim if a < 0 else a for a in axes) or tuple(reversed(range(self.ndim)))
        if sorted(order) != list(range(self.ndim)):
            raise ValueError(f"axes {axes} are not a permutation of the {self.ndim} axes of {self.shape}")
        return dataclasses.replace(
            self,
            lut=self.lut.transpose(*order, self.ndim, self.ndim + 1),
            indices=self.indices.transpose(order),
            scale=None if self.scale is None else self.scale.transpose(order),
            vector_axis=None if self.vector_axis is None else order.index(self.vector_axis),
        )

    def take(self, order: Sequence[int] | np.ndarray, axis: int) -> PalettizedArray:
        """Reorder the elements along one axis; nothing is clustered again.

        `depalettize(x.take(order, axis)) == depalettize(x).take(order, axis)`.

        Args:
            order: a permutation of `range(shape[axis])`.
            axis: the axis.

        Raises:
            ValueError: the order would tear apart a group or a vector along that axis, so no table could hold it.
        """
        if not -self.ndim <= axis < self.ndim:
            raise ValueError(f"axis={axis} is not an axis of {self.shape}")
        axis %= self.ndim
        order = np.asarray(order)
        length, groups = self.shape[axis], self.groups[axis]
        if sorted(order.tolist()) != list(range(length)):
            raise ValueError(f"order is not a permutation of the {length} elements on axis {axis}")
        vector_size = self.vector_size if axis == self.vector_axis else 1
        vectors = _whole_blocks(order, length // vector_size, axis, "vectors")
        whole = _whole_blocks(order, groups, axis, "groups", ordered=False)
        scale = self.scale
        if scale is not None and scale.shape[axis] > 1:
            scale = scale.take(order, axis=axis)
        return dataclasses.replace(
            self, lut=self.lut.take(whole, axis=axis), indices=self.indices.take(vectors, axis=axis), scale=scale
        )


def _whole_blocks(order: np.ndarray, blocks: int, axis: int, noun: str, ordered: bool = True) -> np.ndarray:
    """Which old block each of `blocks` new consecutive blocks is; refuses an order that mixes them."""
    size = order.size // blocks
    rows = order.reshape(blocks, size)
    if not ordered:
        rows = np.sort(rows, axis=1)
    if (rows != rows[:, :1] // size * size + np.arange(size)).any():
        raise ValueError(
            f"reordering axis {axis} would tear its {blocks} {noun} of {size} apart; palettize along another axis"
        )
    return rows[:, 0] // size


def _join_vectors(xp: Any, vectors: Array, axis: int) -> Array:
    """(..., d, ..., v) with the vector last -> (..., d·v, ...) with the vector laid out along `axis`."""
    moved = xp.moveaxis(vectors, -1, axis + 1)
    shape = list(moved.shape)
    shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    return moved.reshape(shape)


def is_palettized(leaf: Any) -> bool:
    """Whether a leaf is a `PalettizedArray`: the `is_leaf` of every tree map in this library."""
    return isinstance(leaf, PalettizedArray)


def depalettize(tree: Tree) -> Tree:
    """Replace every `PalettizedArray` of a tree by its dense weight, `lut[indices]`.

    Args:
        tree: any pytree; leaves that are not palettized are passed on untouched.

    Returns:
        A tree of the same structure whose leaves are all dense, each in its own dtype.

    Example:
        >>> import jax, palettax as px
        >>> weights = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> dense = px.depalettize(px.palettize(weights, px.kmeans(nbits=2)))
        >>> len(set(dense["w"].ravel().tolist()))
        4
    """
    return jax.tree.map(lambda leaf: leaf.depalettize() if is_palettized(leaf) else leaf, tree, is_leaf=is_palettized)
