"""`PalettizedArray`: one weight tensor as a lookup table and indices, in Core ML's own layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Num, UInt8

from palettax._typing import Array, Tree
from palettax.leaf import dense
from palettax.leaf.blocks import join_vectors
from palettax.leaf.invariants import check_mask, check_scale, check_tables, has_values, indices_stored
from palettax.leaf.packing import packed_size
from palettax.leaf.reshaping import axis_of_vectors, reshape_blocks


@partial(
    jax.tree_util.register_dataclass,
    # Linen compares the shape of the first one with the weight's.
    data_fields=("indices", "lut", "scale", "mask", "kept"),
    meta_fields=("nbits", "vector_axis", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class PalettizedArray:
    """A weight tensor stored as `weight = lut[group, indices] · scale`, and `kept` values where `mask` is False.

    Invariants, with r the rank and k = 2^nbits (`validate` checks them):

    - `indices` is uint8 of rank r, every entry below k. Its shape is the weight's, but on `vector_axis`, where one
      index stands for `vector_size` consecutive weights.
    - `lut` has shape `(*groups, k, vector_size)` and rank r + 2. `groups[a]` divides `indices.shape[a]`: axis a is cut
      into that many equal consecutive blocks and each block has a table of its own.
    - `vector_size` is 1 exactly when `vector_axis` is None.
    - `dtype` is the float dtype of the weight, and of `scale` and `kept`.
    - `lut` has that dtype too, or holds levels: int8, uint8, float8_e4m3fn or float8_e5m2. Levels need a `scale`, and
      `dtype` passed by name. A level stands for level · scale, a uint8 one for (level - 128) · scale.
    - `scale` is None, or has rank r: `scale.shape[a]` divides the weight's axis a, which is cut into that many equal
      consecutive blocks (Core ML's blockwise scale). Lengths of 1 and of the whole axis are blocks as others are.
    - `mask` is None, or bool of the weight's shape: False where the weight is not from the table. There `indices` is 0.
      It goes with scalars only (`vector_size` 1).
    - `kept` needs a `mask`. It is one row, the weights at its Falses in row-major order; None: all of them are zero.

    A pytree of `lut`, `indices`, `scale`, `mask` and `kept`; the rest is static, so it passes through `jit` and
    `tree_map`, and while it holds neither vectors nor kept values, whose axes would move, through `vmap`.

    Example:
        >>> import numpy as np, palettax as px
        >>> lut = np.array([-1.0, 0.5], np.float32).reshape(1, 1, 2, 1)
        >>> small = px.PalettizedArray(lut, np.array([[0, 1, 1]], np.uint8), nbits=1)
        >>> px.depalettize(small).tolist()
        [[-1.0, 0.5, 0.5]]
    """

    lut: Num[Array, "*groups k vector"]
    indices: UInt8[Array, "*shape"]
    scale: Float[Array, "*scale"] | None = None
    nbits: int = dataclasses.field(kw_only=True)
    vector_axis: int | None = dataclasses.field(kw_only=True, default=None)
    dtype: Any = dataclasses.field(kw_only=True, default=None)
    mask: Bool[Array, "*weight"] | None = dataclasses.field(kw_only=True, default=None)
    kept: Float[Array, "*kept"] | None = dataclasses.field(kw_only=True, default=None)

    def __post_init__(self) -> None:
        # JAX rebuilds the dataclass around placeholders: only a real table knows its dtype.
        dtype = getattr(self.lut, "dtype", None) if self.dtype is None else self.dtype
        object.__setattr__(self, "dtype", None if dtype is None else np.dtype(dtype))

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
        """Bytes when stored: packed indices, those outside a mask left out; the mask in bits; all else as it is.

        Where the mask has no values (under `jit`), its Falses are counted by `kept`, or else as if there were none.
        """
        indices = packed_size(indices_stored(self.mask, self.kept, self.indices), self.nbits)
        mask = 0 if self.mask is None else packed_size(math.prod(self.mask.shape), 1)
        rest = [part for part in (self.lut, self.scale, self.kept) if part is not None]
        return indices + mask + sum(math.prod(part.shape) * np.dtype(part.dtype).itemsize for part in rest)

    @property
    def bits_per_weight(self) -> float:
        """8·nbytes / size: what a weight costs, everything that is stored included."""
        return 8 * self.nbytes / max(self.size, 1)

    def validate(self) -> PalettizedArray:
        """Check the invariants of the class.

        Returns:
            The array itself, so that a call can end in `.validate()`.

        Raises:
            ValueError: naming the invariant that does not hold and what was found.
        """
        check_tables(self.lut, self.indices, self.nbits, self.vector_axis)
        check_scale(self.lut, self.scale, self.shape, self.dtype)
        check_mask(self.mask, self.kept, self.indices, self.vector_size, self.dtype)
        return self

    def depalettize(self) -> Float[Array, ...]:
        """The dense weight in `dtype`, computed in it; NumPy when every part is NumPy."""
        if self.indices.dtype != np.uint8:
            raise ValueError(
                f"indices are {self.indices.dtype}, not uint8: what was mapped over the tree changed them too; give "
                "jax.tree.map is_leaf=lambda leaf: isinstance(leaf, px.PalettizedArray), or depalettize first"
            )
        xp = np if all(isinstance(part, np.ndarray) for part in jax.tree.leaves(self)) else jnp
        k, vector_size = self.lut.shape[-2:]
        group = dense.group_numbers(xp, self.groups, self.indices.shape)
        weight = dense.level_numbers(xp, xp.asarray(self.lut), self.dtype).reshape(-1, vector_size)[
            group * k + self.indices
        ]
        weight = weight[..., 0] if self.vector_axis is None else join_vectors(weight, self.vector_axis)
        if self.scale is not None:
            weight = dense.multiply_blocks(weight, self.scale)
        return weight if self.mask is None else dense.fill_kept(xp, weight, self.mask, self.kept)

    def transpose(self, *axes: int) -> PalettizedArray:
        """Reorder the axes of the weight; nothing is clustered or looked up again.

        `depalettize(x.transpose(*axes)) == depalettize(x).transpose(*axes)`.

        Args:
            axes: a permutation of `range(ndim)`; none at all reverses the axes, as in NumPy.

        Raises:
            ValueError: no permutation, or kept values whose mask is traced, so that their order is not known.
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
            mask=None if self.mask is None else self.mask.transpose(order),
            kept=self._moved_kept(lambda places: places.transpose(order)),
        )

    def take(self, order: Sequence[int] | np.ndarray, axis: int) -> PalettizedArray:
        """Reorder the elements along one axis; nothing is clustered again.

        `depalettize(x.take(order, axis)) == depalettize(x).take(order, axis)`.

        Args:
            order: a permutation of `range(shape[axis])`.
            axis: the axis.

        Raises:
            ValueError: the order would tear apart a group, a vector or a block of the scale along that axis, so that
                no table or scale could hold it; or kept values whose mask is traced.
        """
        if not -self.ndim <= axis < self.ndim:
            raise ValueError(f"axis={axis} is not an axis of {self.shape}")
        axis %= self.ndim
        order = np.asarray(order)
        length, groups = self.shape[axis], self.groups[axis]
        if sorted(order.tolist()) != list(range(length)):
            raise ValueError(f"order is not a permutation of the {length} elements on axis {axis}")
        vector_size = self.vector_size if axis == self.vector_axis else 1
        vectors = dense.whole_blocks(order, length // vector_size, axis, "vectors")
        whole = dense.whole_blocks(order, groups, axis, "groups", ordered=False)
        scale = self.scale
        if scale is not None:
            scaled = dense.whole_blocks(order, scale.shape[axis], axis, "blocks of the scale", ordered=False)
            scale = scale.take(scaled, axis=axis)
        return dataclasses.replace(
            self,
            lut=self.lut.take(whole, axis=axis),
            indices=self.indices.take(vectors, axis=axis),
            scale=scale,
            mask=None if self.mask is None else self.mask.take(order, axis=axis),
            kept=self._moved_kept(lambda places: places.take(order, axis=axis)),
        )

    def reshape(self, *shape: Any) -> PalettizedArray:
        """The weight in another shape; nothing is clustered again, and a table is repeated where its group is cut.

        `depalettize(x.reshape(*shape)) == depalettize(x).reshape(*shape)`.

        Args:
            shape: of the same number of weights, as numbers or as one sequence of them; one may be -1, as in NumPy.

        Raises:
            ValueError: another number of weights, or vectors that the new shape would tear apart.
        """
        new = np.broadcast_to(np.int8(0), self.shape).reshape(shape[0] if len(shape) == 1 else shape).shape
        size, axis = self.vector_size, self.vector_axis
        places = list(new)
        if axis is not None:
            axis = axis_of_vectors(self.shape, axis, size, new)
            places[axis] //= size
        return dataclasses.replace(
            self,
            lut=reshape_blocks(self.lut, self.indices.shape, tuple(places)),
            indices=self.indices.reshape(places),
            scale=None if self.scale is None else reshape_blocks(self.scale, self.shape, new),
            vector_axis=axis,
            mask=None if self.mask is None else self.mask.reshape(new),
        )

    def __jax_array__(self) -> jax.Array:
        """The dense weight, wherever JAX wants an array: a layer computes with it as with any other."""
        return jnp.asarray(AS_ARRAY.get()(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The dense weight in NumPy."""
        return np.array(self.depalettize(), dtype=dtype)

    def __getitem__(self, key: Any) -> jax.Array:
        """Elements of the dense weight."""
        return jnp.asarray(self)[key]

    def __len__(self) -> int:
        """The length of the first axis."""
        return self.shape[0]

    def __iter__(self) -> Iterator[jax.Array]:
        """The rows of the dense weight."""
        return iter(jnp.asarray(self))

    @property
    def T(self) -> PalettizedArray:
        """The transpose, still palettized."""
        return self.transpose()

    def _moved_kept(self, move: Callable[[np.ndarray], np.ndarray]) -> Array | None:
        """The kept values in their new order, when `move` is what becomes of the weights."""
        if self.kept is None or self.mask is None:
            return self.kept
        if not has_values(self.mask):
            raise ValueError("kept values cannot be put in order while the mask is traced; move the leaf outside jit")
        mask = np.asarray(self.mask)
        return self.kept[dense.kept_order(mask, move(np.arange(mask.size).reshape(mask.shape)))]


AS_ARRAY: ContextVar[Callable[[PalettizedArray], Array]] = ContextVar("as_array", default=PalettizedArray.depalettize)
"""What JAX computes with in the place of a palettized weight; a conversion puts an op of its own here."""


def is_palettized(leaf: Any) -> bool:
    """Whether a leaf is a `PalettizedArray`: the `is_leaf` of every tree map in this library."""
    return isinstance(leaf, PalettizedArray)


def depalettize(tree: Tree) -> Tree:
    """Replace every `PalettizedArray` of a tree by its dense weight, `lut[indices] · scale`.

    Args:
        tree: any pytree; leaves that are not palettized are passed on untouched.

    Returns:
        A tree of the same structure whose leaves are all dense, each in its own dtype; tied leaves stay tied.

    Example:
        >>> import jax, palettax as px
        >>> weights = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> dense = px.depalettize(px.palettize(weights, px.kmeans(nbits=2)))
        >>> len(set(dense["w"].ravel().tolist()))
        4
    """
    done: dict[int, Array] = {}

    def dense(leaf: Any) -> Any:
        if not is_palettized(leaf):
            return leaf
        if id(leaf) not in done:
            done[id(leaf)] = leaf.depalettize()
        return done[id(leaf)]

    return jax.tree.map(dense, tree, is_leaf=is_palettized)
