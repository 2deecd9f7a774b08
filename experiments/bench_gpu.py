"""Differentiable k-means on a GPU: a layer's forward and backward pass in JAX, in torch, and by coremltools' layer.

The three run in turns, in one process. Prints the table and writes it, with the machine's description, to
`bench_gpu.md` beside this script. Needs a GPU that torch and JAX both use.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import jax
from bench_dkm import ROUNDS, Case, compiled, coremltools_side, inputs_of, ours, weights_of
from measuring import machine, timed

import palettax as px
import palettax.torch

HERE = Path(__file__)
GIVES_UP = 60.0
"""Seconds: a side whose first step takes longer runs no more."""


def torch_side(case: Case) -> Callable[[], object]:
    """A step of palettax.torch: the tensors stay on the GPU."""
    import torch

    layer = torch.nn.Linear(case.side, case.side, bias=False)
    layer.weight.data = torch.from_numpy(weights_of(case.side))
    config = px.torch.DKMPalettizerConfig.from_dict({"global_config": {"n_bits": case.nbits, "weight_threshold": 10}})
    model = px.torch.DKMPalettizer(torch.nn.Sequential(layer).cuda(), config).prepare()
    inputs = torch.from_numpy(inputs_of(case.side)).cuda()

    def run() -> object:
        model.zero_grad()
        model(inputs).square().sum().backward()
        return model

    return run


def finished(side: Callable[[], object]) -> Callable[[], object]:
    """Until the GPU is done."""
    import torch

    def run() -> object:
        result = jax.block_until_ready(side())
        torch.cuda.synchronize()
        return result

    return run


def row(case: Case) -> str:
    """First steps, and medians of steps in turns."""
    import torch

    sides = {
        "coremltools": finished(coremltools_side(case, "cuda")),
        "JAX": finished(ours(case)),
        "torch": finished(torch_side(case)),
    }
    first, memory = {}, {}
    for name, side in list(sides.items()):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            first[name] = timed(side)
        except torch.OutOfMemoryError:
            first[name] = float("inf")
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        if first[name] > GIVES_UP:
            del sides[name]
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            times[name].append(1000 * timed(side))
    cells = [f"{first[name]:.2f}" for name in first]
    cells += [f"{statistics.median(times[name]):.2f}" if name in times else "" for name in first]
    return (
        f"| {case.side}², {case.nbits} bits | " + " | ".join(cells) + f" | {memory['coremltools']:.0f} "
        f"| {set_aside(case):.0f} |"
    )


def set_aside(case: Case) -> float:
    """MiB that the compiler sets aside for a step in JAX, its results included."""
    step, weights, state = compiled(case)
    memory = step.lower(weights, state).compile().memory_analysis()
    return (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20


def main() -> None:
    if jax.default_backend() != "gpu":
        print("JAX has no GPU here: nothing to measure")
        return
    lines = [
        "| layer | first step, coremltools, s | JAX, s | torch, s | step, coremltools, ms | JAX, ms | torch, ms "
        "| peak MiB, coremltools | JAX |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side, nbits in [(1024, 2), (1024, 4), (1024, 8), (4096, 2), (4096, 4)]:
        lines.append(row(Case(side, nbits, 3, "implicit")))
        print(lines[-1], flush=True)
    lines += ["", machine("numpy", "jax", "coremltools", "torch")]
    HERE.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
