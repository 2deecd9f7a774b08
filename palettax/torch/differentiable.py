"""Differentiable k-means of JAX as a module of torch: a parametrization of a parameter."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import torch
from torch.autograd.function import once_differentiable

from palettax._typing import Array
from palettax.leaf import PalettizedArray
from palettax.torch.recipe import TrainedRecipe
from palettax.torch.tensors import checksum, numpy_dtype, to_jax, to_numpy, to_tensor, to_torch
from palettax.transforms.trained import DkmState

# The transform sees one leaf, under a name that says nothing: what is compiled for it serves every layer alike.
_LEAF = "weight"


class _State(NamedTuple):
    """`DkmState` of one leaf, as tensors."""

    lut: torch.Tensor
    count: torch.Tensor
    skipped: torch.Tensor

    def to_jax(self) -> DkmState:
        lut, count, skipped = map(to_jax, self)
        return DkmState(count, {_LEAF: lut}, {_LEAF: skipped})

    @classmethod
    def of(cls, state: DkmState, device: torch.device) -> _State:
        return cls(*(to_torch(a, device) for a in (state.luts[_LEAF], state.count, state.skipped[_LEAF])))


class Palettized(torch.nn.Module):
    """The weights a layer computes with, from those that are trained.

    In training the values of `dkm`, with its gradient; in eval mode what `finalize` stores. Before its milestone, the
    weights as they are. The table moves on once for each value of the weights: a second pass over the same ones, such
    as that of activation checkpointing, gives the same values. Table and counts are buffers, so they are in the state
    dict.

    Args:
        recipe: what to do.
        weight: the parameter.
        milestone: the count of steps at which it starts.
        name: of the parameter, for errors.
    """

    lut: torch.Tensor
    count: torch.Tensor
    skipped: torch.Tensor
    steps: torch.Tensor
    enabled: torch.Tensor

    def __init__(self, recipe: TrainedRecipe, weight: torch.Tensor, milestone: int, name: str) -> None:
        super().__init__()
        self.recipe, self.milestone, self.name = recipe, milestone, name
        self._fitted: Any = None
        self._started: tuple[Any, _State] | None = None
        self._stored: tuple[Any, torch.Tensor] | None = None
        like = jax.ShapeDtypeStruct(tuple(weight.shape), numpy_dtype(weight.dtype))
        lut = jax.eval_shape(recipe.training().init, {_LEAF: like}).luts[_LEAF]
        self.register_buffer("lut", torch.zeros(lut.shape, dtype=torch.float32, device=weight.device))
        # Integers: averages of models subtract buffers, which torch does not do with bools.
        for count in ("count", "skipped", "steps", "enabled"):
            self.register_buffer(count, torch.zeros((), dtype=torch.int32, device=weight.device))

    def step(self, original: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Count a step, and start if it is the milestone."""
        self.steps += 1
        if self.steps == self.milestone:
            self.enable(original, mask)

    def enable(self, original: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Use the table from now on; make it, if there is none that has been trained."""
        if bool(self.count > 0):
            self.enabled.fill_(1)
            return
        self._fit(original, mask)
        self.enabled.fill_(1)

    def _fit(self, original: torch.Tensor, mask: torch.Tensor | None) -> None:
        """The first table, of the weights of now."""
        weights = to_numpy(self.name, _masked(original, mask))
        with self._named():
            state = self.recipe.training().init({_LEAF: weights})
        self._keep(_State.of(state, original.device))
        self._fitted = _version(original, mask)

    def _refit(self, original: torch.Tensor, mask: torch.Tensor | None) -> None:
        """A table that has not been trained is one of the weights of now: they may have been loaded since."""
        if self.count == 0 and self._fitted != _version(original, mask):
            self._fit(original, mask)

    @torch.compiler.disable
    def forward(self, original: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The values for a layer to compute with."""
        if not self.enabled:
            return _masked(original, mask)
        if self.training:
            return self._soft(original, mask)
        hard = self._hard(original, mask)
        # Exact: hard + 0.
        return hard + (original - original.detach()) if torch.is_grad_enabled() and original.requires_grad else hard

    def right_inverse(self, values: torch.Tensor) -> torch.Tensor:
        """What is assigned to the weight is what is trained."""
        return values

    def palettized(self, original: torch.Tensor, mask: torch.Tensor | None = None) -> PalettizedArray:
        """The weight as it is stored."""
        self._refit(original, mask)
        weights = to_numpy(self.name, _masked(original, mask))
        with self._named():
            return self.recipe.training().finalize({_LEAF: weights}, self._state.to_jax())[_LEAF]

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """What is wrong with the one leaf is wrong with the parameter."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    @property
    def used(self) -> bool:
        """Whether a layer has computed with its values."""
        return bool(self.enabled) and (bool(self.count > 0) or self._stored is not None)

    @property
    def _state(self) -> _State:
        # Copies: the buffers are written in place, and JAX shares memory with what it is given.
        return _State(self.lut.clone(), self.count.clone(), self.skipped.clone())

    def _keep(self, state: _State) -> None:
        with torch.no_grad():
            for name, tensor in state._asdict().items():
                getattr(self, name).copy_(tensor)

    def _soft(self, original: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        version = _version(original, mask)
        if self._started is None or self._started[0] != version:
            self._refit(original, mask)
            self._started = version, self._state
        values, *new = _Soft.apply(_masked(original, mask), self.recipe, self._started[1])
        self._keep(_State(*new))
        return values

    def _hard(self, original: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        self._refit(original, mask)
        version = _version(original, mask), self.lut._version
        if self._stored is None or self._stored[0] != version:
            with torch.inference_mode(False):
                stored = to_tensor(self.name, self.palettized(original, mask).depalettize()).to(original.device)
            self._stored = version, stored
        return self._stored[1].clone()  # a layer may write to its weight, as an embedding with max_norm does


class _Soft(torch.autograd.Function):
    """The update of `dkm`: soft values, and the next state."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, recipe: TrainedRecipe, state: _State) -> tuple[torch.Tensor, ...]:
        values, after, ctx.gradient = _compiled(recipe)(to_jax(weights), state.to_jax())
        # JAX reads the weights where they lie: changed in place before the backward pass, they are an error there.
        ctx.save_for_backward(weights)
        new = _State.of(jax.block_until_ready(after), weights.device)
        ctx.mark_non_differentiable(*new)
        return to_torch(values, weights.device), *new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        gradient = gradient.to_dense() if gradient.layout is not torch.strided else gradient
        return to_torch(_pulled_back(ctx.gradient, to_jax(gradient)), weights.device), None, None


@functools.cache
def _compiled(recipe: TrainedRecipe) -> Callable[..., Any]:
    """The update, jitted once for all leaves of equal recipes."""
    transform = recipe.training()

    def values(weights: Array, state: DkmState) -> tuple[Array, DkmState]:
        values, state = transform.update({_LEAF: weights}, state)
        return values[_LEAF], state

    def update(weights: Array, state: DkmState) -> tuple[Array, DkmState, Any]:
        out, gradient, after = jax.vjp(lambda weights: values(weights, state), weights, has_aux=True)
        return out, after, gradient

    return jax.jit(update)


@jax.jit
def _pulled_back(gradient: Any, tangent: Array) -> Array:
    return gradient(tangent)[0]


def _masked(original: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return original if mask is None else original * mask.to(original.dtype)


def _version(*tensors: torch.Tensor | None) -> tuple[tuple[int, int, int], ...]:
    """What changes when the values of tensors do; torch does not count what is written to their `.data`."""
    return tuple((t.data_ptr(), t._version, checksum(t)) for t in tensors if t is not None)
