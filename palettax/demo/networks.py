"""The MNIST network twice: in Flax to train, in torch for Core ML's converter to read."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from jaxtyping import Float

FEATURE_MAP = (7, 7, 64)
"""What the flattened layer reads: height, width, channels."""


class DigitNet(nnx.Module):
    """Two 5×5 convolutions, each with ReLU and 2×2 pooling, then 1,024 hidden units: 3.27 million weights."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 32, (5, 5), rngs=rngs)
        self.bn1 = nnx.BatchNorm(32, momentum=0.99, epsilon=1e-3, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (5, 5), rngs=rngs)
        self.dense1 = nnx.Linear(7 * 7 * 64, 1024, rngs=rngs)
        self.dropout = nnx.Dropout(0.4, rngs=rngs)
        self.dense2 = nnx.Linear(1024, 10, rngs=rngs)

    def __call__(self, images: Float[jax.Array, "n 28 28 1"]) -> Float[jax.Array, "n 10"]:
        """Log-probabilities of the ten digits."""
        features = _pooled(self.conv2(self.bn1(_pooled(self.conv1(images)))))
        hidden = nnx.relu(self.dense1(features.reshape(features.shape[0], -1)))
        return jax.nn.log_softmax(self.dense2(self.dropout(hidden)))


def _pooled(features: jax.Array) -> jax.Array:
    return nnx.max_pool(nnx.relu(features), (2, 2), strides=(2, 2))


def torch_twin() -> torch.nn.Module:
    """The same network in torch, under the same names, channels first."""
    nn = torch.nn
    layers: dict[str, Any] = {
        "conv1": nn.Conv2d(1, 32, 5, padding=2),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "bn1": nn.BatchNorm2d(32, eps=1e-3, momentum=0.01),
        "conv2": nn.Conv2d(32, 64, 5, padding=2),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "dense1": nn.Linear(7 * 7 * 64, 1024),
        "relu3": nn.ReLU(),
        "dropout": nn.Dropout(0.4),
        "dense2": nn.Linear(1024, 10),
        "softmax": nn.LogSoftmax(dim=-1),
    }
    return nn.Sequential(OrderedDict(layers)).eval()


def accuracy(model: DigitNet, images: Any, labels: Any, batch: int = 500) -> float:
    """The share of images whose most probable digit is the label."""
    model.eval()
    predict = nnx.jit(lambda m, x: m(x).argmax(-1))
    hits = [
        jnp.sum(predict(model, images[i : i + batch]) == labels[i : i + batch]) for i in range(0, len(images), batch)
    ]
    return float(sum(hits)) / len(images)
