"""A training step of the MNIST network with every layer at 2 bits in torch: palettax's DKMPalettizer and coremltools'.

The same model, batches and optimizer on both sides, which run in turns in one process. Prints the table and writes it,
with the machine's description, to `bench_torch.md` beside this script.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from coremltools.optimize.torch import palettization as theirs
from measuring import machine, peak_memory, timed
from rich.progress import track

import palettax.torch as ours
from palettax.demo.networks import torch_twin

HERE = Path(__file__)
ROUNDS, BATCH = 10, 128
LAYERS = ("conv1", "conv2", "dense1", "dense2")
OPTIONS = {"n_bits": 2, "weight_threshold": 500}


def trainer(library: Any, model: torch.nn.Module) -> Callable[[], object]:
    """A training step; the first of them prepares the model as well."""
    config = library.DKMPalettizerConfig.from_dict({"module_name_configs": dict.fromkeys(LAYERS, OPTIONS)})
    palettizer = library.DKMPalettizer(copy.deepcopy(model), config)
    random = torch.Generator().manual_seed(0)
    held: list[Any] = []

    def step() -> object:
        if not held:
            prepared = palettizer.prepare().train()
            held.extend([prepared, torch.optim.SGD(prepared.parameters(), lr=0.008)])
        prepared, optimizer = held
        images = torch.randn(BATCH, 1, 28, 28, generator=random)
        labels = torch.randint(10, (BATCH,), generator=random)
        optimizer.zero_grad()
        loss = torch.nn.functional.nll_loss(prepared(images), labels)
        loss.backward()
        optimizer.step()
        palettizer.step()
        return loss

    return step


def main() -> None:
    torch.manual_seed(0)
    model = torch_twin()
    sides = {"coremltools": trainer(theirs, model), "palettax": trainer(ours, model)}
    first = {name: timed(step) for name, step in sides.items()}
    rounds = [
        {name: timed(step) for name, step in sides.items()} for _ in track(range(ROUNDS), description="steps in turns")
    ]
    memory = {name: peak_memory(step) / 2**20 for name, step in sides.items()}
    lines = ["| | first step, s | step, s | peak MiB |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {first[name]:.2f} | {statistics.median(r[name] for r in rounds):.3f} | {memory[name]:.0f} |"
        for name in sides
    ]
    ratios = [r["coremltools"] / r["palettax"] for r in rounds]
    lines.append(
        f"| times less | {first['coremltools'] / first['palettax']:.1f} | {statistics.median(ratios):.1f} "
        f"| {memory['coremltools'] / memory['palettax']:.1f} |"
    )
    lines += [
        "",
        f"A step: forward, backward and update for {BATCH} images; 3,273,504 weights in four layers, each with 4 "
        f"entries, on both sides. The first prepares the model, clusters its weights, and compiles. Medians of "
        f"{ROUNDS} in turns. Peak memory is the resident set above that before a step. "
        f"{machine('jax', 'torch', 'coremltools')}",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    HERE.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
