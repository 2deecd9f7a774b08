"""Differentiable k-means on a GPU: a layer's forward and backward pass in JAX, in torch, and by coremltools' layer.

The three run in turns, in one process. Prints the table and writes it, with the machine's description, to
`bench_gpu.md` beside this script. Needs a GPU that torch and JAX both use, and XLA_PYTHON_CLIENT_PREALLOCATE=false in
the environment: else JAX takes three quarters of the GPU's memory for itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import jax
from bench_dkm import ROUNDS, Case, compiled, ours, torch_side
from measuring import machine, timed

import palettax as px
import palettax.coreml  # before coremltools, whose import it keeps quiet
import palettax.torch

HERE = Path(__file__)
MEMORY = "Peak: of torch's allocator in coremltools' first step. Set aside: as XLA says, results included."


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
    from coremltools.optimize.torch import palettization

    sides = {
        "coremltools": finished(torch_side(case, palettization, "cuda")),
        "JAX": finished(ours(case)),
        "torch": finished(torch_side(case, px.torch, "cuda")),
    }
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = [timed(sides["coremltools"])]
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    first += [timed(sides[name]) for name in ("JAX", "torch")]
    rounds = [[1000 * timed(side) for side in sides.values()] for _ in range(ROUNDS)]
    cells = [f"{case.side}², {case.nbits} bits", *(f"{seconds:.2f}" for seconds in first)]
    cells += [f"{statistics.median(column):.2f}" for column in zip(*rounds, strict=True)]
    return "| " + " | ".join([*cells, f"{peak:.0f}", f"{set_aside(case):.0f}"]) + " |"


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
        "| peak MiB, coremltools | set aside MiB, JAX |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side, nbits in [(1024, 2), (1024, 4), (1024, 8), (4096, 2), (4096, 4)]:
        lines.append(row(Case(side, nbits, 3, "implicit")))
        print(lines[-1], flush=True)
    lines += ["", MEMORY, "", machine("numpy", "jax", "coremltools", "torch")]
    HERE.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
