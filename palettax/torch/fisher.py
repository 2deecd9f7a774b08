"""How much a torch model's loss cares for every weight: the diagonal of the Fisher information."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import Bool, Float

from palettax._running import Step, Stream, check_count, fingerprint, mean_with
from palettax._typing import Tree
from palettax.sensitivity import examples_at_once
from palettax.torch.load import tensors_by_name
from palettax.torch.state_dict import own_tensors
from palettax.torch.tensors import to_numpy

_Part = tuple[torch.Tensor, Sequence[torch.Tensor]]
"""The losses of k examples, (k,), and for each parameter their gradients, (k, ...)."""

_PROBED = 2
"""Examples whose gradients are computed both ways before one is chosen."""


def fisher_diagonal(
    model: torch.nn.Module,
    dataloader: Iterable[Any],
    loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor],
    *,
    num_samples: int | None = None,
    chunk_size: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 60.0,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """The diagonal of the Fisher information: the mean of the squares of the gradients of single examples.

        F = 1/n · Σ_i (∂ loss_fn(model, example_i) / ∂ parameters)²

    The `sensitivity` to palettize `to_params(model.state_dict())` with, as `palettax.fisher_diagonal` is for JAX. With
    the labels of the data it is the empirical Fisher.

    Examples are taken together by `torch.func.vmap` where the model allows it, and one by one where it does not:
    control flow that depends on data, `.item()`, statistics written in place, an `autograd.Function` without a rule.
    Which of the two is found out on the first examples, where both must give the same gradients; so the result is the
    same either way, and only the time differs. Memory is that of three sets of float32 weights, and of a gradient for
    each example of a chunk.

    Args:
        model: on any device. It is in eval mode meanwhile; that mode, parameters, buffers, `.grad` and the
            attributes that a forward pass sets are afterwards what they were; what it changes inside an attribute, such
            as a list, is not.
        dataloader: an iterable of batches: tensors whose first axis is examples, in tuples, lists or mappings.
        loss_fn: `loss_fn(model, batch) -> loss`, as coremltools' SKMPalettizer takes it. It is given one example at a
            time, as a batch of one, with dicts for mappings of other types; the loss has shape () or (1,).
        num_samples: examples at most; None for all there are.
        chunk_size: examples whose gradients are in memory at a time; None for as many as take the memory of one set of
            gradients, or 64 MiB.
        checkpoint: a file for the mean so far. It is written every `save_every` seconds and when the work ends, be it
            by Ctrl-C. When it exists, the examples that it counts are passed over: give the same batches again. It is
            refused with other weights or another first example; the loss is not looked at.
        save_every: seconds.
        progress: a bar with the time that is left, on a terminal with rich installed.

    Returns:
        For each name of `to_params(model.state_dict())` an array of its shape, float32: zeros for buffers, parameters
        that are frozen and those that the loss does not depend on; one array for all names of a tied parameter.

    Raises:
        ValueError: data and loss in the other order; no examples; no parameter that requires a gradient, or a loss that
            depends on none; a loss that is no scalar; a loss or a gradient that is NaN or infinite, with the batch and
            the example; batches whose tensors disagree on how many examples there are; a checkpoint of other weights.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [torch.tensor([[1.0, 2.0], [3.0, 0.0]])]
        >>> fisher_diagonal(model, batches, lambda model, batch: model(batch).sum())["weight"].tolist()
        [[5.0, 2.0]]

    Reference:
        Kim et al., "SqueezeLLM: dense-and-sparse quantization", arXiv 2306.07629.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, not a torch.nn.Module; the order is model, data, loss")
    if not callable(loss_fn):
        raise ValueError(
            f"dataloader is a {type(dataloader).__name__} and loss_fn a {type(loss_fn).__name__}; data come first, "
            "then the loss, which is called as loss_fn(model, batch)"
        )
    check_count("chunk_size", chunk_size)
    gradients = _Gradients(model, loss_fn)
    weights = list(gradients.parameters.values())
    size = chunk_size or examples_at_once(sum(weight.numel() for weight in weights))

    def step(mean: list[torch.Tensor], batch: Tree, count: int) -> Step:
        total = [torch.zeros_like(m) for m in mean]
        with torch.enable_grad():
            losses, sound = gradients.add_squares(total, batch, size)
        finite = all(bool(own.isfinite().all()) for own in total)
        return Step(mean_with(mean, total, count, len(losses)), losses, sound, finite)

    tensors = tensors_by_name(model)
    of = 0
    if checkpoint is not None:
        of = fingerprint([to_numpy(name, tensor) for name, tensor in tensors.items()], *gradients.parameters)
    start = [torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) for weight in weights]
    grad_mode = torch.is_grad_enabled()
    with (
        # Batches that are made in inference mode have no gradients to go through.
        torch.inference_mode(False),
        torch.set_grad_enabled(grad_mode),
        _as_it_was(model),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "There is a performance drop")  # said of every op without a rule for vmap
        mean = Stream(num_samples, checkpoint, save_every, progress).mean(
            step,
            start,
            dataloader,
            of,
            to_host=lambda m: m.cpu().numpy(),
            onto=lambda z, a: z.copy_(torch.from_numpy(a)),
        )
    arrays = {id(weight): m.cpu().numpy() for weight, m in zip(weights, mean, strict=True)}
    return {
        name: arrays.setdefault(id(tensors.get(name, value)), np.zeros(value.shape, np.float32))
        for name, value in own_tensors(model.state_dict()).items()
    }


class _Loss(torch.nn.Module):
    """The loss as a module around the model, so that `functional_call` puts other tensors where it finds them."""

    def __init__(self, model: torch.nn.Module, loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Any) -> Any:
        return self.loss_fn(self.model, batch)


class _Gradients:
    """The gradients of single examples.

    Attributes:
        parameters: those that have a gradient, each once, by their name in `_Loss`.
        vectorized: whether examples are taken together; None as long as nobody knows.
        depends: whether there was a loss with a gradient.
    """

    def __init__(self, model: torch.nn.Module, loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor]) -> None:
        self.model, self.call = model, _Loss(model, loss_fn)
        named = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
        self.parameters = {name: p for name, p in named.items() if p.requires_grad and p.is_floating_point()}
        self.vectorized: bool | None = None
        self.depends = False
        if not self.parameters:
            raise ValueError(
                f"none of the {len(named)} parameters of the model requires a gradient; "
                "call model.requires_grad_(True), or do so for the layers that are to be palettized"
            )

    def add_squares(
        self, total: list[torch.Tensor], batch: Tree, size: int
    ) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Add those of all examples in place, at most `size` at a time.

        Args:
            total: sums of squares, one for each of the parameters.
            batch: n examples.
            size: how many have their gradients in memory at a time.

        Returns:
            The losses, and whether the squares are finite.
        """
        leaves, treedef = jax.tree.flatten(batch)
        found, first = [], 0
        while first < len(leaves[0]):
            many = size if self.vectorized is not False else 1
            part = [leaf[first : first + many] for leaf in leaves]
            many = len(part[0])
            if self.vectorized is None and many > 1:
                self.vectorized = self._agree([leaf[:_PROBED] for leaf in part], treedef)
                continue
            # As arguments only, gradients are let go before there are the next ones.
            added = _add_squares(total, (self._together if many > 1 else self._alone)(part, treedef))
            if added is None:
                self.vectorized = False
                continue
            found.append(added)
            first += many
        losses, sound = (torch.cat(column).numpy() for column in zip(*found, strict=True))
        return losses, sound

    def _agree(self, leaves: list[Any], treedef: Any) -> bool:
        """Whether examples may be taken together.

        That there is no error is not enough: a module that holds its parameters in a list of its own is not reached by
        `functional_call`, and has no gradient there.
        """
        found = self._together(leaves, treedef)
        if found is None:
            return False
        for i in range(len(leaves[0])):
            _, expected = self._alone([leaf[i : i + 1] for leaf in leaves], treedef)
            largest = max(float(gradient.float().norm()) for gradient in expected)
            if not all(_close(own[i], b[0], largest) for own, b in zip(found[1], expected, strict=True)):
                return False
        return True

    def _alone(self, leaves: list[Any], treedef: Any) -> _Part:
        """Those of a batch of one, by the model with its own parameters."""
        weights, loss = list(self.parameters.values()), self._loss({}, leaves, treedef)
        if not loss.requires_grad and not self.depends:
            raise ValueError(
                "the loss of the first example depends on no parameter that requires a gradient; does loss_fn detach "
                "the output of the model, or run it under torch.no_grad?"
            )
        self.depends = True
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        else:
            gradients = [torch.zeros_like(weight) for weight in weights]
        return loss[None], [gradient[None] for gradient in gradients]

    def _together(self, leaves: list[Any], treedef: Any) -> _Part | None:
        """Those of all examples at once; None where that is not possible."""

        def loss(parameters: dict[str, torch.Tensor], example: list[torch.Tensor]) -> torch.Tensor:
            return self._loss(parameters, [leaf[None] for leaf in example], treedef)

        parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        try:
            # Outside of grad_and_value there is nothing to differentiate.
            with torch.no_grad():
                gradients, losses = torch.func.vmap(torch.func.grad_and_value(loss), (None, 0))(parameters, leaves)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # An error of the model's own is raised again by each example alone.
            return None
        return losses, [gradients[name] for name in parameters]

    def _loss(self, parameters: dict[str, torch.Tensor], leaves: list[Any], treedef: Any) -> torch.Tensor:
        """The loss of a batch of one, with buffers that may be written to."""
        buffers = {name: buffer.clone() for name, buffer in self.call.named_buffers()}
        with _as_it_was(self.model):
            found = torch.func.functional_call(self.call, parameters | buffers, (treedef.unflatten(leaves),))
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            kind = found.dtype if isinstance(found, torch.Tensor) else type(found).__name__
            raise ValueError(f"loss_fn gives {kind}; it must give a tensor of one real number (as in output.loss)")
        if found.shape not in ((), (1,)):
            raise ValueError(
                f"loss_fn gives a tensor of {tuple(found.shape)} for a batch of one example; it must give a scalar"
            )
        return found.reshape(())


@contextmanager
def _as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode in the block; after it, every module has the mode and holds the objects that it had before."""
    modes = [(module, module.training) for module in model.modules()]
    held: list[Any] = [part for module, _ in modes for part in (vars(module), module._parameters, module._buffers)]
    # Scripted modules keep theirs elsewhere.
    before = [(part, dict(part)) for part in held if isinstance(part, dict)]
    try:
        for module, _ in modes:
            # Not by eval(), with which some layers merge weights.
            module.training = False
        yield
    finally:
        for part, contents in before:
            part.update(contents)
            for name in part.keys() - contents.keys():
                del part[name]
        for module, mode in modes:
            module.training = mode


def _add_squares(total: list[torch.Tensor], found: _Part | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Add squares in place; the losses (k,), and whether the squares are finite for each example (k,)."""
    if found is None:
        return None
    losses, gradients = found
    for own, gradient in zip(total, gradients, strict=True):
        for one in gradient:
            own.addcmul_(one.float(), one.float())
    sound = torch.ones(len(losses), dtype=torch.bool)
    # A finite sum of squares has finite squares only: one look at the sum for many at the examples.
    if not all(bool(whole.isfinite()) for whole in [own.sum() for own in total]):
        squares = (gradient.float().square() for gradient in gradients)
        flags = [square.isfinite()[:, None].flatten(1).all(dim=1).cpu() for square in squares]
        sound = torch.stack(flags).all(dim=0)
    return losses.detach().float().cpu(), sound


def _close(found: torch.Tensor, expected: torch.Tensor, largest: float) -> bool:
    """Whether two gradients differ by rounding only, that of terms which cancel included."""
    eps = torch.finfo(expected.dtype).eps
    allowed = eps**0.5 * float(expected.float().norm()) + 10 * eps * largest
    return float((found - expected).float().norm()) <= allowed and bool(found.any()) == bool(expected.any())
