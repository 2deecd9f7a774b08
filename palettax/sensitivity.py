"""How much the loss cares for every weight: the diagonal of the Fisher information, and what stands in for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from palettax._paths import identity_of, leaf_names
from palettax._running import Step, Stream, check_count, fingerprint, mean_with
from palettax._typing import Array, PRNGKey, Tree
from palettax.leaf import depalettize, is_palettized

GRADIENT_BYTES = 2**26
"""What the gradients of a micro-batch may take when a single tree of them takes less."""


def fisher_diagonal(
    loss_fn: Callable[[Tree, Tree], Any],
    params: Tree,
    batches: Iterable[Tree],
    *,
    num_samples: int | None = None,
    batched: bool = False,
    sample: Callable[[Tree, Tree, PRNGKey], Tree] | None = None,
    key: PRNGKey | None = None,
    micro_batch_size: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 60.0,
    progress: bool = True,
) -> Tree:
    """The diagonal of the Fisher information: the mean of the squares of the gradients of single examples.

        F = 1/n · Σ_i (∂ loss(params, example_i) / ∂ params)²

    ½ Σ F · (w - ŵ)² is about what the loss loses when weights w become ŵ, so it is the `sensitivity` to palettize with.
    With the loss a negative log-likelihood and the labels of the data, F is the empirical Fisher; with `sample`, which
    draws the label from the model, it is the Fisher information itself. (A square of the mean gradient is neither.)
    Its diagonal does not see that errors of many weights add up: at few bits, or of few examples, F plus its own mean
    in each leaf is often the better sensitivity.

    Memory is that of three trees of float32, and of a gradient for each example of a micro-batch. Batches of one size
    share one trace, and smaller ones of their kind with them. They may be spread over devices along their first axis.

    Args:
        loss_fn: `loss_fn(params, example) -> scalar`, without dropout and with batch norm as in inference. A weight
            that the loss does not depend on, `stop_gradient` included, gets zero.
        params: any pytree. Float leaves get a gradient; one array that stands in several places gets that of all of
            them. Palettized leaves count as their values.
        batches: an iterable of pytrees of arrays whose first axis is examples.
        num_samples: examples at most; None for all there are.
        batched: whether loss_fn takes a batch of examples, and gives the loss of each or their mean. It is given one
            example at a time all the same, as a batch of one.
        sample: `sample(params, example, key) -> example`, with its label drawn from the model: the true Fisher. It is
            given one example, `batched` or not. What it draws depends on the key and the number of the example only.
        key: for `sample`; required there.
        micro_batch_size: examples whose gradients are in memory at a time, at most; None for as many as take the memory
            of one tree of gradients, or 64 MiB, but at most 64. On a CPU they are taken one by one, which is faster.
        checkpoint: a file for the mean so far. It is written every `save_every` seconds and when the work ends, be it
            by Ctrl-C. When it exists, the examples that it counts are passed over: give the same batches again. It is
            refused with other weights or another first example; the loss is not looked at.
        save_every: seconds.
        progress: a bar with the time that is left, on a terminal with rich installed.

    Returns:
        A tree of the structure of params: float32 (float64 for float64 leaves of JAX's x64 mode), and zeros for leaves
        of integers; None for what is no array.

    Raises:
        ValueError: no examples; no float leaf; a loss that is no scalar; a loss or a gradient that is NaN or infinite,
            with the batch and the example; batches whose leaves disagree on how many examples there are; `sample`
            without a key; a checkpoint of other weights.

    Example:
        >>> import jax, jax.numpy as jnp, palettax as px
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> loss = lambda params, example: (params["w"] * example["x"]).sum()
        >>> px.fisher_diagonal(loss, params, [{"x": jnp.array([[1.0, 2.0], [3.0, 0.0]])}])["w"].tolist()
        [5.0, 2.0]

    References:
        Kim et al., "SqueezeLLM: dense-and-sparse quantization", arXiv 2306.07629, for palettes. Kunstner et al.,
        "Limitations of the empirical Fisher approximation", arXiv 1905.12558, for what `sample` changes.
    """
    if not callable(loss_fn) or callable(batches):
        found = type(loss_fn).__name__, type(params).__name__, type(batches).__name__
        raise ValueError(f"loss_fn, params and batches are {', '.join(found)}; the order is loss_fn, params, batches")
    if sample is not None and key is None:
        raise ValueError("sample without a key; it draws at random: pass key=jax.random.key(0)")
    if sample is None and key is not None:
        raise ValueError("a key without sample; only labels that sample draws from the model are random")
    leaves = _Leaves.of(params)
    check_count("micro_batch_size", micro_batch_size)
    if all(device.platform == "cpu" for device in leaves.floats[0].devices()):
        size = 1  # squares of a single gradient are added as they are computed; those of several wait in memory
    else:
        size = micro_batch_size or examples_at_once(sum(array.size for array in leaves.floats))

    def loss_of(floats: list[Array], example: Tree, number: Array) -> Array:
        tree = leaves.tree(floats)
        if sample is not None and key is not None:
            example = jax.lax.stop_gradient(sample(tree, example, jax.random.fold_in(key, number)))
        found = loss_fn(tree, jax.tree.map(lambda a: a[None], example) if batched else example)
        return _scalar(found, batched)

    def gradients_of(floats: list[Array], part: tuple[Tree, Array], count: Array) -> tuple[Array, list[Array]]:
        """Losses and gradients of the examples in a part."""
        examples, numbers = part
        return jax.vmap(jax.value_and_grad(loss_of), (None, 0, 0))(floats, examples, count + numbers)

    @partial(jax.jit, static_argnames="steps")
    def added(
        floats: list[Array], mean: list[Array], parts: tuple[Tree, Array], count: Array, live: Array, steps: int
    ) -> tuple:
        """The mean with the first `live` examples of a batch, their losses, and whether their sum is finite."""

        def of_part(total: list[Array], part: tuple[Tree, Array]) -> tuple[list[Array], Array]:
            losses, gradients = gradients_of(floats, part, count)
            used = [
                jnp.where(_as_column(part[1] < live, g), jnp.square(g.astype(t.dtype)), 0).sum(axis=0)
                for g, t in zip(gradients, total, strict=True)
            ]
            return [a + b for a, b in zip(total, used, strict=True)], losses

        total, losses = jax.lax.scan(of_part, [jnp.zeros_like(m) for m in mean], _cut(parts, steps))
        finite = jnp.stack([jnp.isfinite(t).all() for t in total]).all()
        return mean_with(mean, total, count, live), losses.T.reshape(-1), finite

    @partial(jax.jit, static_argnames="steps")
    def sound_ones(floats: list[Array], parts: tuple[Tree, Array], count: Array, steps: int) -> Array:
        """Whether the square of the gradient of every example is finite. To ask this every time would take memory."""

        def of_part(part: tuple[Tree, Array]) -> Array:
            _, gradients = gradients_of(floats, part, count)
            own = [jnp.isfinite(jnp.square(g.astype(jnp.float32))).reshape(g.shape[0], -1).all(1) for g in gradients]
            return jnp.stack(own).all(axis=0)

        return jax.lax.map(of_part, _cut(parts, steps)).T.reshape(-1)

    largest: dict[Any, int] = {}

    def step(mean: list[Array], batch: Tree, count: int) -> Step:
        live = jax.tree.leaves(batch)[0].shape[0]
        arrays = jax.tree.map(lambda a: a if isinstance(a, jax.Array) else np.asarray(a), batch)
        spread = max(jax.tree.leaves(arrays), key=_shards)
        whole = live
        if _shards(spread) == 1:  # then the last batch can be filled up to be as the others
            alike = jax.tree.structure(arrays), *[(a.shape[1:], a.dtype) for a in jax.tree.leaves(arrays)]
            whole = largest[alike] = max(largest.get(alike, 0), live)
            whole = _steps(whole, size) * -(-whole // _steps(whole, size))
        numbers = _spread_like(spread, np.arange(whole, dtype=np.int32))
        parts = jax.tree.map(lambda a: _filled(a, whole), arrays), numbers
        steps = _steps(whole, size, _shards(spread))
        new, losses, finite = added(leaves.floats, mean, parts, jnp.int32(count), jnp.int32(live), steps)
        finite, each = bool(finite), np.ones(live, bool)
        if not finite:
            each = np.asarray(sound_ones(leaves.floats, parts, jnp.int32(count), steps))[:live]
        return Step(new, np.asarray(losses)[:live], each, finite)

    of = 0 if checkpoint is None else fingerprint([*leaves.floats, *_bits_of(key)], *leaves.names)
    stream = Stream(num_samples, checkpoint, save_every, progress)
    return leaves.result(stream.mean(step, leaves.zeros(), batches, of))


def examples_at_once(weights: int) -> int:
    """How many examples have their gradients of so many weights in memory at a time, where no one says."""
    return max(1, min(GRADIENT_BYTES // (4 * max(weights, 1)), 64))


def second_moment(activations: Any) -> Tree:
    """The mean square of every feature: how much a layer's output feels an error of the weights that read it.

        E[x²], over all axes but the last

    A sensitivity without labels or gradients: for a layer `x @ kernel`, `jnp.broadcast_to(E[x²][:, None],
    kernel.shape)` weighs an error of a weight by the error of the output that it makes.

    Args:
        activations: what layers read: an array or a dict of arrays (..., features), or an iterable of batches of them.

    Returns:
        The tree of a batch, with (features,) for every leaf; float32, or float64 for float64 in JAX's x64 mode.

    Raises:
        ValueError: no batch, a leaf that is a scalar or holds integers, batches of different features, NaN or
            infinities.

    Example:
        >>> import jax.numpy as jnp, palettax as px
        >>> px.second_moment({"dense": jnp.array([[1.0, 2.0], [3.0, 0.0]])})["dense"].tolist()
        [5.0, 2.0]

    References:
        Sun et al., "A simple and effective pruning approach for large language models", arXiv 2306.11695.
    """
    whole = isinstance(activations, Mapping) or hasattr(activations, "shape")
    tree, mean, counts = None, [], []
    for number, batch in enumerate([activations] if whole else activations):
        paths, structure = jax.tree_util.tree_flatten_with_path(batch)
        names = leaf_names([path for path, _ in paths])
        at = [f"batch {number}, '{name}'" if name else f"batch {number}" for name in names]
        found = [_square_of_features(name, leaf) for name, (_, leaf) in zip(at, paths, strict=True)]
        if tree is None:
            tree, mean, counts = structure, [jnp.zeros_like(square) for square, _ in found], [0] * len(found)
        if structure != tree or [m.shape for m in mean] != [square.shape for square, _ in found]:
            raise ValueError(f"batch {number} has other layers or features than the first; give all alike")
        counts = [have + more for have, (_, more) in zip(counts, found, strict=True)]
        mean = [m + (s - m) * (more / have) for m, (s, more), have in zip(mean, found, counts, strict=True)]
    if tree is None or not mean:
        raise ValueError("activations hold nothing; give at least one batch")
    return jax.tree.unflatten(tree, mean)


class _Leaves(NamedTuple):
    """A tree taken apart into the arrays that have a gradient, each once, and the rest.

    Attributes:
        treedef: its structure.
        names: of all leaves.
        leaves: all of them.
        places: for every leaf the number of its array; None for one without a gradient.
        floats: the arrays.
    """

    treedef: Any
    names: list[str]
    leaves: list[Any]
    places: list[int | None]
    floats: list[jax.Array]

    @classmethod
    def of(cls, params: Tree) -> _Leaves:
        """Take it apart."""
        paths, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_palettized)
        found: dict[Any, int] = {}
        leaves, places, floats = [], [], []
        names = leaf_names([path for path, _ in paths])
        for name, (_, leaf) in zip(names, paths, strict=True):
            if jnp.issubdtype(getattr(leaf, "dtype", np.int8), jnp.complexfloating):
                raise ValueError(f"leaf '{name}' is {leaf.dtype}; take it apart into two real leaves")
            has_gradient = isinstance(leaf, float) or jnp.issubdtype(getattr(leaf, "dtype", np.int8), jnp.floating)
            # Python makes one object of equal floats.
            same = ("place", len(leaves)) if isinstance(leaf, float) else identity_of(leaf)
            number = found.setdefault(same, len(floats)) if has_gradient else None
            if number == len(floats):
                floats.append(jnp.asarray(depalettize(leaf)))
            leaves.append(leaf)
            places.append(number)
        if not floats:
            raise ValueError(
                f"params have no float leaf, only {names or 'none at all'}; there is no gradient to square"
            )
        return cls(treedef, names, leaves, places, floats)

    def tree(self, floats: list[Array]) -> Tree:
        """The tree with other arrays in the place of those that have a gradient."""
        together = zip(self.leaves, self.places, strict=True)
        return jax.tree.unflatten(self.treedef, [leaf if i is None else floats[i] for leaf, i in together])

    def zeros(self) -> list[Array]:
        """What a mean of squares starts from, spread over devices as the weights are."""

        def zero(array: jax.Array) -> jax.Array:
            # What is put on one device by name cannot meet batches on several.
            device = array.sharding if len(array.sharding.device_set) > 1 else None
            return jnp.zeros(array.shape, jnp.promote_types(array.dtype, jnp.float32), device=device)

        return [zero(array) for array in self.floats]

    def result(self, mean: list[Array]) -> Tree:
        """The tree of the mean, zeros where there is no gradient."""
        rest = [jnp.zeros(leaf.shape) if hasattr(leaf, "shape") else None for leaf in self.leaves]
        together = zip(rest, self.places, strict=True)
        return jax.tree.unflatten(self.treedef, [zero if i is None else mean[i] for zero, i in together])


def _scalar(found: Any, batched: bool) -> Array:
    """The loss of one example, or a `ValueError` that says what it is instead."""
    if not isinstance(found, Array | np.generic | int | float | complex):
        raise ValueError(f"loss_fn gives a {type(found).__name__}; it must give a real number, and nothing beside it")
    shape, dtype = getattr(found, "shape", ()), jnp.result_type(found)
    if shape == () or (batched and shape == (1,)):
        if jnp.issubdtype(dtype, jnp.floating):
            return jnp.asarray(found).reshape(())
        raise ValueError(f"loss_fn gives {dtype}; it must give a real number")
    hint = "the loss of each example, or their mean" if batched else "a number for one example (or pass batched=True)"
    raise ValueError(f"loss_fn gives an array of {shape} for one example; it must give {hint}")


def _shards(array: Array) -> int:
    """Over how many devices the first axis is spread."""
    if not isinstance(array, jax.Array):
        return 1
    return array.shape[0] // array.sharding.shard_shape(array.shape)[0]


def _steps(count: int, size: int, shards: int = 1) -> int:
    """In how many parts of about `size` a batch goes; where it is spread, each part is spread alike."""
    steps = -(-count // max(size, shards))
    while shards > 1 and count % (steps * shards):
        steps += 1
    return steps


def _cut(batch: Tree, steps: int) -> Tree:
    """The batch in parts on a new first axis.

    Neighbours go to different parts: of a batch that is spread over devices, each has its share of every part.
    """
    return jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, steps, *a.shape[1:]), 1, 0), batch)


def _spread_like(leaf: Array, numbers: np.ndarray) -> Array:
    """The numbers of examples, spread over devices as the examples are."""
    sharding = getattr(leaf, "sharding", None)
    if _shards(leaf) == 1 or not isinstance(sharding, NamedSharding):
        return numbers
    return jax.device_put(numbers, sharding.update(spec=PartitionSpec(sharding.spec[0])))


def _filled(array: Array, size: int) -> Array:
    """The array with its last example repeated until there are `size`."""
    missing = size - array.shape[0]
    if not missing:
        return array
    xp = np if isinstance(array, np.ndarray) else jnp
    return xp.concatenate([array, xp.repeat(array[-1:], missing, axis=0)])


def _as_column(flags: Array, like: Array) -> Array:
    return flags.reshape(-1, *[1] * (like.ndim - 1))


def _bits_of(key: PRNGKey | None) -> list[Array]:
    return [] if key is None else [jax.random.key_data(key)]


def _square_of_features(name: str, leaf: Any) -> tuple[Array, int]:
    """The mean square over all axes but the last, and over how many rows."""
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.ndim == 0:
        found = f"{getattr(leaf, 'dtype', type(leaf).__name__)}{getattr(leaf, 'shape', '')}"
        raise ValueError(f"{name} is {found}; activations are floats (..., features)")
    if not array.size:
        raise ValueError(f"{name} is empty {array.shape}; leave it out")
    array = jnp.asarray(array)
    rows = array.astype(jnp.promote_types(array.dtype, jnp.float32)).reshape(-1, array.shape[-1])
    square = jnp.square(rows).mean(axis=0)
    if not jnp.isfinite(square).all():
        raise ValueError(f"{name} holds NaN or infinities, or squares that are; leave that batch out")
    return square, rows.shape[0]
