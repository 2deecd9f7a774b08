"""Train palettes on MNIST: float, post-training k-means, straight-through and DKM with each adjoint, over three seeds.

Three settings. "one layer" is the tutorial of coremltools' DKMPalettizer: its network, SGD at 0.008, batches of 128,
two epochs in float, then two more with palettes in conv2. "every layer" palettizes all leaves above 500 weights, with
Adam and a cosine schedule; "transformer" does so, at 2 bits, to a small transformer of image patches. Accuracies are of
the hard network that `finalize` gives, on the 10,000 held-out digits.

Every run is added to `train_mnist.json` when it ends, and those that are there are not run again: the script can be
stopped and started. Then it writes `train_mnist.md` and `train_mnist.png`. Needs `--data`, a folder of the four IDX
files. All runs take hours on two cores; `--only every,2` runs what has those words in its name.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from measuring import machine
from rich.progress import track

import palettax as px
import palettax.coreml  # before coremltools, whose import it keeps quiet
import palettax.torch
from palettax.demo.data import Digits, load_digits
from palettax.demo.networks import DigitNet, accuracy

HERE = Path(__file__)
RESULTS = HERE.with_suffix(".json")
BATCH, EPOCHS, THRESHOLD = 128, 2, 500
SETTINGS = {"one layer": (4, 2, 1), "every layer": (4, 2, 1), "transformer": (2,)}
ADJOINTS = {"implicit": px.Implicit(), "one-step": px.OneStep(), "unrolled": px.Unrolled()}
PEER, TORCH = "coremltools", "palettax.torch"
METHODS = ("post-training", "straight-through", *ADJOINTS, TORCH, PEER)
TORCH_RUNS = [("one layer", 4), ("every layer", 2)]  # the rival takes too long for more
SEEDS = (0, 1, 2)


class Run(NamedTuple):
    """One network."""

    setting: str
    nbits: int  # 32 for float
    method: str
    seed: int

    @property
    def name(self) -> str:
        """What its result goes by."""
        return f"{self.setting}, {self.nbits} bits, {self.method}, seed {self.seed}"


def runs() -> Iterator[Run]:
    """All of them, what is claimed first."""
    claimed = [(s, b, m) for s, b, m in (("every layer", 2, "implicit"), ("every layer", 1, "implicit"))]
    claimed += [("one layer", 4, "implicit")]
    floats = [(setting, 32, "float") for setting in SETTINGS]
    every = [(s, b, m) for s, widths in SETTINGS.items() for b in widths for m in METHODS]
    rest = [spec for spec in every if spec not in claimed and (spec[2] not in (TORCH, PEER) or spec[:2] in TORCH_RUNS)]
    for seed, spec in itertools.product(SEEDS, [*floats, *claimed]):
        yield Run(*spec, seed)
    for spec, seed in itertools.product(rest, SEEDS):
        yield Run(*spec, seed)


class Block(nnx.Module):
    """Attention and two dense layers, each with a residual connection."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        """The same tokens, with what they attend to."""
        tokens = tokens + self.attention(self.norms[0](tokens))
        return tokens + self.down(nnx.gelu(self.up(self.norms[1](tokens))))


class Transformer(nnx.Module):
    """Sixteen patches of 7×7 pixels, two blocks of width 64: 105,000 weights."""

    def __init__(self, rngs: nnx.Rngs, width: int = 64) -> None:
        self.embed, self.head = nnx.Linear(49, width, rngs=rngs), nnx.Linear(width, 10, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (16, width)))
        self.blocks = nnx.List([Block(width, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, images: Any) -> Any:
        """Log-probabilities of the ten digits."""
        patches = images.reshape(-1, 4, 7, 4, 7).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 49)
        tokens = self.embed(patches) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return jax.nn.log_softmax(self.head(self.norm(tokens).mean(axis=1)))


def transform_of(run: Run) -> px.PaletteTransformation:
    """What the weights go through before the network uses them."""
    if run.method in ("float", "post-training"):
        return px.identity()
    if run.method == "straight-through":
        inner = px.straight_through(run.nbits, weight_threshold=THRESHOLD)
    else:
        inner = px.dkm(run.nbits, weight_threshold=THRESHOLD, adjoint=ADJOINTS[run.method], max_steps=3)
    return px.by_path([("conv2/kernel", inner)]) if run.setting == "one layer" else inner


def optimizer_of(setting: str) -> optax.GradientTransformation:
    """SGD as in the tutorial, or Adam."""
    if setting == "one layer":
        return optax.sgd(0.008)
    return optax.adam(optax.cosine_decay_schedule(1e-3, EPOCHS * (60_000 // BATCH)))


def train(
    model: Any, digits: Digits, transform: px.PaletteTransformation, optimizer: Any, seed: int, steps: int
) -> Any:
    """Train in place; returns the state of the transform."""
    model.train()
    held = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    state = transform.init(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model: Any, held: nnx.Optimizer, state: Any, images: Any, labels: Any) -> Any:
        def loss(model: Any, state: Any) -> Any:
            graph, params, rest = nnx.split(model, nnx.Param, ...)
            soft, state = transform.update(params, state)
            running = nnx.merge(graph, soft, rest)
            value = -jnp.take_along_axis(running(images), labels[:, None], axis=1).mean()
            return value, (state, nnx.split(running, nnx.Param, ...)[2])

        (_, (state, rest)), gradients = nnx.value_and_grad(loss, has_aux=True)(model, state)
        nnx.update(model, rest)
        held.update(model, gradients)
        return state

    for rows in batches(seed, steps, len(digits.train_images)):
        state = step(model, held, state, digits.train_images[rows], digits.train_labels[rows])
    return jax.block_until_ready(state)


def batches(seed: int, steps: int, size: int) -> np.ndarray:
    """The images of every step."""
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(size) for _ in range(EPOCHS)])
    return order[: steps * BATCH].reshape(steps, BATCH)


@cache
def pretrained(setting: str, seed: int, data: Path, steps: int) -> Any:
    """The float network that all runs of a seed start from."""
    model = Transformer(nnx.Rngs(seed)) if setting == "transformer" else DigitNet(nnx.Rngs(seed))
    train(model, load_digits(data, seed), px.identity(), optimizer_of(setting), seed, steps)
    return model


def result_of(run: Run, data: Path, steps: int) -> dict[str, float]:
    """Train one network from the float one on, and measure it."""
    digits = load_digits(data, run.seed)
    model = nnx.clone(pretrained(run.setting, run.seed, data, steps))
    transform = transform_of(run)
    start = time.perf_counter()
    state = train(model, digits, transform, optimizer_of(run.setting), run.seed + 100, steps)
    seconds = time.perf_counter() - start
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    small = transform.finalize(params, state)
    if run.method == "post-training":
        small = px.palettize(params, post_training(run), weight_threshold=THRESHOLD)
    hard = nnx.merge(graph, px.depalettize(small), rest)
    return {"accuracy": accuracy(hard, digits.test_images, digits.test_labels), "seconds": seconds}


def torch_result_of(run: Run, data: Path, steps: int) -> dict[str, float]:
    """The same for the DKMPalettizer of palettax.torch or of coremltools, from the same float network, in torch."""
    import torch
    from coremltools.optimize.torch import palettization

    from palettax.demo.networks import FEATURE_MAP, torch_twin

    library = palettization if run.method == PEER else px.torch

    torch.manual_seed(run.seed)
    digits = load_digits(data, run.seed)
    flax_model = pretrained(run.setting, run.seed, data, steps)
    leaves = px.torch.from_flax(
        nnx.state(flax_model, nnx.Any(nnx.Param, nnx.BatchStat)), flattened={"dense1": FEATURE_MAP}
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    twin = px.torch.load_into(torch_twin(), leaves).to(device)
    layer = {"n_bits": run.nbits, "weight_threshold": THRESHOLD}
    layers = ["conv2"] if run.setting == "one layer" else ["conv1", "conv2", "dense1", "dense2"]
    config = library.DKMPalettizerConfig.from_dict({"module_name_configs": dict.fromkeys(layers, layer)})
    palettizer = library.DKMPalettizer(twin.train(), config)
    model = palettizer.prepare()
    one_layer = run.setting == "one layer"
    optimizer = torch.optim.SGD(model.parameters(), 0.008) if one_layer else torch.optim.Adam(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda count: 1.0 if one_layer else 0.5 * (1 + np.cos(np.pi * min(count / steps, 1)))
    )
    start = time.perf_counter()
    for rows in batches(run.seed + 100, steps, len(digits.train_images)):
        optimizer.zero_grad()
        images = torch.from_numpy(digits.train_images[rows].transpose(0, 3, 1, 2)).to(device)
        labels = torch.from_numpy(digits.train_labels[rows]).long().to(device)
        loss = torch.nn.functional.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        palettizer.step()
    seconds = time.perf_counter() - start
    hard = palettizer.finalize().eval()
    with torch.no_grad():
        parts = np.split(digits.test_images.transpose(0, 3, 1, 2), 20)
        scores = [hard(torch.from_numpy(part).to(device)).cpu() for part in parts]
    hits = torch.cat(scores).argmax(dim=1).numpy() == digits.test_labels
    return {"accuracy": float(hits.mean()), "seconds": seconds}


def post_training(run: Run) -> px.PaletteTransformation:
    """k-means of the trained weights."""
    inner = px.kmeans(run.nbits)
    return px.by_path([("conv2/kernel", inner)]) if run.setting == "one layer" else inner


def summary(found: dict[str, dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, in per cent."""

    def cell(setting: str, nbits: int, method: str) -> str:
        own = [found[name]["accuracy"] for s in SEEDS if (name := Run(setting, nbits, method, s).name) in found]
        if not own:
            return ""
        spread = f" ± {100 * statistics.stdev(own):.2f}" if len(own) > 1 else ""
        return f"{100 * statistics.mean(own):.2f}{spread}" + ("" if len(own) == len(SEEDS) else f" ({len(own)} seeds)")

    lines = []
    for setting, widths in SETTINGS.items():
        lines += [f"| {setting} | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
        lines += [f"| {b} bits | " + " | ".join(cell(setting, b, m) for m in METHODS) + " |" for b in widths]
        lines += ["", f"Float, trained as long: {cell(setting, 32, 'float')}.", ""]
    return "\n".join(lines)


def machines(found: dict[str, dict[str, Any]]) -> str:
    """Where the networks were trained, and how many."""
    counts = Counter(result["machine"] for result in found.values())
    return "\n".join(f"{count} networks: {name}" for name, count in counts.most_common())


def draw(found: dict[str, dict[str, Any]]) -> None:
    """Accuracy against bits for every method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, setting in zip(axes, [name for name, widths in SETTINGS.items() if len(widths) > 1], strict=True):
        for method, marker in zip(METHODS, "vsoD^XP", strict=True):
            points = [
                (b, [found[name]["accuracy"] for s in SEEDS if (name := Run(setting, b, method, s).name) in found])
                for b in (1, 2, 4)
            ]
            points = [(b, own) for b, own in points if own]
            errors = [100 * (1 - statistics.mean(own)) for _, own in points]
            axis.plot([b for b, _ in points], errors, marker=marker, label=method)
        floats = [found[name]["accuracy"] for s in SEEDS if (name := Run(setting, 32, "float", s).name) in found]
        if floats:
            axis.axhline(
                100 * (1 - statistics.mean(floats)), color="black", linewidth=0.8, linestyle=":", label="float"
            )
        axis.set(xlabel="bits", ylabel="error, %", yscale="log", title=setting)
        axis.set_xticks([1, 2, 4], ["1", "2", "4"])
        axis.grid(alpha=0.3, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(HERE.with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of the four MNIST IDX files")
    parser.add_argument("--only", default="", help="words, with commas between them, that the names of runs must have")
    parser.add_argument("--steps", type=int, default=EPOCHS * (60_000 // BATCH), help="fewer: a trial; writes nothing")
    options = parser.parse_args()
    trial = options.steps != parser.get_default("steps")
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() and not trial else {}
    wanted = [run for run in runs() if all(word.strip() in run.name for word in options.only.split(","))]
    for run in track([run for run in wanted if run.name not in found], description="networks"):
        measure = torch_result_of if run.method in (TORCH, PEER) else result_of
        packages = ("jax", "torch", "coremltools") if run.method in (TORCH, PEER) else ("jax", "flax", "optax")
        found[run.name] = {**measure(run, options.data, options.steps), "machine": machine(*packages)}
        print(run.name, found[run.name], flush=True)
        if not trial:
            RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    text = f"{summary(found)}\n{machines(found)}\n"
    print(text)
    if not trial:
        HERE.with_suffix(".md").write_text(text)
        draw(found)


if __name__ == "__main__":
    main()
