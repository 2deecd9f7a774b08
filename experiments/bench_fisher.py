"""The memory and time of `px.fisher_diagonal` and `px.torch.fisher_diagonal` against the size of micro-batches.

A perceptron of 20 million weights, random, on 32 random examples. Memory is the resident set above that before the
call, the second of its kind, in units of one tree of gradients; it may be four of them and one for each example of a
micro-batch. JAX compiles in every call, and the compiler's memory is counted; on a CPU it takes one example at a time,
whatever it is told. Prints the table and writes it, with the machine's description, to `bench_fisher.md` beside this
script, and a figure.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from measuring import machine, peak_memory, timed
from rich.progress import track

import palettax as px
import palettax.torch

HERE = Path(__file__)
WIDTHS = (784, 4096, 4096, 10)
EXAMPLES, SIZES = 32, (1, 2, 4, 8, 16)
TREE = 4 * sum(a * b for a, b in pairwise(WIDTHS))  # bytes


def data() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((EXAMPLES, WIDTHS[0])).astype(np.float32)
    return inputs, random.integers(0, WIDTHS[-1], EXAMPLES)


def kernels() -> list[np.ndarray]:
    """(in, out) of every layer."""
    random = np.random.default_rng(1)
    shapes = pairwise(WIDTHS)
    return [(random.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32) for shape in shapes]


def in_jax(size: int) -> Callable[[], Any]:
    """By `px.fisher_diagonal`, compiled anew in every call."""
    params = [jnp.asarray(kernel) for kernel in kernels()]

    def loss(params: Any, example: Any) -> Any:
        hidden, label = example
        for kernel in params[:-1]:
            hidden = jax.nn.relu(hidden @ kernel)
        return -jax.nn.log_softmax(hidden @ params[-1])[label]

    return lambda: jax.block_until_ready(
        px.fisher_diagonal(loss, params, [data()], micro_batch_size=size, progress=False)
    )


def in_torch(size: int) -> Callable[[], Any]:
    """By `px.torch.fisher_diagonal`."""
    layers = [torch.nn.Linear(*shape, bias=False) for shape in pairwise(WIDTHS)]
    for layer, kernel in zip(layers, kernels(), strict=True):
        layer.weight.data = torch.from_numpy(kernel.T.copy())
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    batches = [tuple(torch.from_numpy(a) for a in data())]

    def loss(model: Any, batch: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    return lambda: px.torch.fisher_diagonal(model, batches, loss, chunk_size=size, progress=False)


def draw(found: dict[str, list[tuple[float, float]]]) -> None:
    """Memory and time against the size of a micro-batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for (name, rows), marker in zip(found.items(), "os", strict=True):
        memory.plot(SIZES, [trees for trees, _ in rows], marker=marker, label=name)
        seconds.plot(SIZES, [1e3 * time / EXAMPLES for _, time in rows], marker=marker, label=name)
    memory.plot(SIZES, [4 + size for size in SIZES], color="black", linewidth=0.8, linestyle=":", label="allowed")
    memory.set(ylabel="peak memory, trees of gradients", yscale="log")
    seconds.set(ylabel="ms an example", ylim=(0, None))
    for axis in (memory, seconds):
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, map(str, SIZES))
        axis.set_xlabel("examples in a micro-batch")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False)
    figure.savefig(HERE.with_suffix(".png"), dpi=130)


def main() -> None:
    sides = {"px.fisher_diagonal": in_jax, "px.torch.fisher_diagonal": in_torch}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for size in track(SIZES, description="micro-batches"):
        for name, side in sides.items():
            call = side(size)
            call()
            found[name].append((peak_memory(call) / TREE, timed(call)))
    lines = [
        "| examples in a micro-batch | allowed, trees | " + " | ".join(f"{name}, trees | s" for name in sides) + " |",
        "|---" * (2 + 2 * len(sides)) + "|",
    ]
    for place, size in enumerate(SIZES):
        cells = [f"{trees:.2f} | {seconds:.2f}" for trees, seconds in (found[name][place] for name in sides)]
        lines.append(f"| {size} | {4 + size} | " + " | ".join(cells) + " |")
    lines += ["", f"A tree is {TREE / 2**20:.0f} MiB; {EXAMPLES} examples. {machine('jax', 'torch')}"]
    text = "\n".join(lines) + "\n"
    print(text)
    HERE.with_suffix(".md").write_text(text)
    draw(found)


if __name__ == "__main__":
    main()
