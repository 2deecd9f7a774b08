"""Train the network, with a callback after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from palettax.demo.data import Digits
from palettax.demo.networks import DigitNet

BATCH = 64


def steps_per_epoch(digits: Digits) -> int:
    """Whole batches in the training set."""
    return len(digits.train_images) // BATCH


def train(digits: Digits, epochs: int, seed: int, on_step: Callable[[float], None]) -> DigitNet:
    """Adam with a cosine schedule on the negative log-likelihood; `on_step` gets each step's loss."""
    model = DigitNet(nnx.Rngs(seed))
    schedule = optax.cosine_decay_schedule(2e-3, epochs * steps_per_epoch(digits))
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    model.train()
    for images, labels in _batches(digits, epochs, seed):
        on_step(float(_step(model, optimizer, images, labels)))
    model.eval()
    return model


@nnx.jit
def _step(model: DigitNet, optimizer: nnx.Optimizer, images: Any, labels: Any) -> Any:
    def loss(model: DigitNet) -> Any:
        return -jnp.take_along_axis(model(images), labels[:, None], axis=1).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def _batches(digits: Digits, epochs: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        order = random.permutation(len(digits.train_images))[: steps_per_epoch(digits) * BATCH]
        for rows in order.reshape(-1, BATCH):
            yield digits.train_images[rows], digits.train_labels[rows]
