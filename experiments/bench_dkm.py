"""Differentiable k-means: a layer's forward and backward pass beside coremltools' DKM layer, in one process.

Both sides run in turns. Prints the tables and writes them, with the machine's description, to `bench_dkm.md` beside
this script, and a figure. `--quick` leaves out what takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measuring import machine, peak_memory, timed
from rich.progress import track

import palettax as px
import palettax.coreml  # before coremltools, whose import it keeps quiet

HERE = Path(__file__)
ROUNDS = 7
ADJOINTS = {"implicit": px.Implicit(), "one-step": px.OneStep(), "unrolled": px.Unrolled()}


class Case(NamedTuple):
    """A square layer, and what becomes of its weights."""

    side: int
    nbits: int
    max_steps: int
    adjoint: str


def weights_of(side: int) -> np.ndarray:
    """As a linear layer is initialised."""
    limit = side**-0.5
    return np.random.default_rng(0).uniform(-limit, limit, (side, side)).astype(np.float32)


def inputs_of(side: int) -> np.ndarray:
    """Eight inputs."""
    return np.random.default_rng(1).standard_normal((8, side), np.float32)


def compiled(case: Case) -> tuple[Any, Any, Any]:
    """The jitted training step of a layer, its weights and the state of its transform."""
    transform = px.dkm(case.nbits, adjoint=ADJOINTS[case.adjoint], max_steps=case.max_steps, tol=0.0)
    weights, inputs = jnp.asarray(weights_of(case.side)), jnp.asarray(inputs_of(case.side))

    def loss(weights: Any, state: Any) -> tuple[Any, Any]:
        soft, state = transform.update(weights, state)
        return ((inputs @ soft.T) ** 2).sum(), state

    return jax.jit(jax.value_and_grad(loss, has_aux=True)), weights, transform.init(weights)


def ours(case: Case) -> Callable[[], object]:
    """A step, compiled in the first call; the tables go on from step to step."""
    held: list[Any] = []

    def run() -> object:
        if not held:
            held.extend(compiled(case))
        step, weights, state = held
        (_, held[2]), gradient = jax.block_until_ready(step(weights, state))
        return gradient

    return run


def torch_side(case: Case, library: Any, device: str = "cpu") -> Callable[[], object]:
    """A step of the DKM layer of palettax.torch or of coremltools; the first clusters the weights."""
    import torch

    layer = torch.nn.Linear(case.side, case.side, bias=False)
    layer.weight.data = torch.from_numpy(weights_of(case.side))
    options = {"n_bits": case.nbits, "weight_threshold": 10, "kmeans_max_iter": case.max_steps}
    config = library.DKMPalettizerConfig.from_dict({"global_config": options})
    model = library.DKMPalettizer(torch.nn.Sequential(layer).to(device), config).prepare()
    inputs = torch.from_numpy(inputs_of(case.side)).to(device)

    def run() -> object:
        model.zero_grad()
        model(inputs).square().sum().backward()
        return model

    return run


def beside(case: Case) -> str:
    """A row: the first step of each side, then steps in turns, then peak memory of a step."""
    from coremltools.optimize.torch import palettization

    sides = torch_side(case, palettization), ours(case)
    first = [timed(side) for side in sides]
    pairs = [tuple(timed(side) for side in sides) for _ in range(ROUNDS)]
    slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
    memory = [peak_memory(side) / 2**20 for side in sides]
    memory[1] = max(memory[1], planned(case) / 2**20)  # what earlier calls left resident may be used again
    return (
        f"| {case.side}², {case.nbits} bits, {case.max_steps} steps, {case.adjoint} | {first[0]:.1f} | {first[1]:.2f} "
        f"| {first[0] / first[1]:.0f} | {slow:.3f} | {fast:.4f} | {statistics.median(a / b for a, b in pairs):.0f} "
        f"| {memory[0]:.0f} | {memory[1]:.0f} | {memory[0] / memory[1]:.0f} |"
    )


def planned(case: Case) -> int:
    """Bytes of what a step computes with and of its results, by the compiler's own analysis."""
    step, weights, state = compiled(case)
    memory = step.lower(weights, state).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


class Measured(NamedTuple):
    """A case without a rival."""

    case: Case
    first: float  # seconds, compiling included
    seconds: float  # a step
    held: float  # bytes a weight that the compiler sets aside
    given: float  # bytes a weight of results
    peak: float  # bytes a weight, resident

    def row(self) -> str:
        """A line of the table."""
        case = self.case
        return (
            f"| {case.side}², {case.nbits} bits, {case.max_steps} steps, {case.adjoint} | {self.first:.2f} "
            f"| {self.seconds:.3f} | {self.held:.1f} | {self.given:.1f} | {self.peak:.1f} |"
        )


def alone(case: Case) -> Measured:
    """What the rival does not finish, or takes too long for."""
    step, weights, state = compiled(case)
    start = time.perf_counter()
    program = step.lower(weights, state).compile()
    jax.block_until_ready(program(weights, state))
    first = time.perf_counter() - start
    memory = program.memory_analysis()
    size = weights.size
    seconds = statistics.median(
        timed(lambda: jax.block_until_ready(program(weights, state))) for _ in range(3 if size > 2**22 else ROUNDS)
    )
    held, given = memory.temp_size_in_bytes / size, memory.output_size_in_bytes / size
    peak = peak_memory(lambda: jax.block_until_ready(program(weights, state))) / size
    return Measured(case, first, seconds, held, given, peak)


def draw(by_steps: list[Measured], by_bits: list[Measured], by_size: list[Measured]) -> None:
    """Time and memory against steps, bits and weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex="col", layout="constrained")
    columns: list[tuple[str, list[Measured], Callable[[Case], float]]] = [
        ("steps", by_steps, lambda case: case.max_steps),
        ("bits", by_bits, lambda case: case.nbits),
        ("weights", by_size, lambda case: case.side**2),
    ]
    for (label, measured, place), (above, below) in zip(columns, axes.T, strict=True):
        for (adjoint, _), marker in zip(ADJOINTS.items(), "osD", strict=True):
            own = [m for m in measured if m.case.adjoint == adjoint]
            above.plot([place(m.case) for m in own], [m.seconds for m in own], marker=marker, label=adjoint)
            below.plot([place(m.case) for m in own], [m.held for m in own], marker=marker, label=adjoint)
        below.set(xlabel=label, xscale="linear" if label == "bits" else "log")
        above.set(yscale="log")
        below.set(ylim=(0, None))
    axes[0, 0].set(ylabel="seconds a step")
    axes[1, 0].set(ylabel="bytes a weight set aside")
    axes[0, 0].legend(frameon=False)
    for each in axes.flat:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes; write nothing")
    quick = parser.parse_args().quick
    solver = timed(lambda: px.kmeans_lut(weights_of(8), 2))
    lines = [
        "| layer | first step, coremltools, s | palettax, s | times faster | step, coremltools, s | palettax, s "
        "| times faster | peak MiB, coremltools | palettax | times less |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rivals = [Case(256, 4, 3, "implicit")]
    if not quick:
        rivals += [Case(1024, 4, 3, adjoint) for adjoint in ADJOINTS] + [Case(1024, 2, 3, "implicit")]
        rivals += [Case(1024, 4, 10, "implicit")]
    for case in track(rivals, description="beside coremltools"):
        lines.append(beside(case))
        print(lines[-1], flush=True)
    lines += [
        "",
        "| palettax alone | first step, s | step, s | bytes a weight set aside | results | resident peak |",
        "|---|---|---|---|---|---|",
    ]
    side = 1024 if quick else 2048
    by_steps = [Case(side, 4, steps, adjoint) for adjoint in ADJOINTS for steps in (1, 3, 10, 30)]
    by_bits = [Case(side, nbits, 3, adjoint) for adjoint in ADJOINTS for nbits in (1, 2, 4, 6, 8)]
    sizes = (256, 512, 1024) if quick else (256, 512, 1024, 2048, 4096)
    by_size = [Case(size, 4, 3, adjoint) for adjoint in ADJOINTS for size in sizes]
    cases = list(dict.fromkeys([*by_steps, *by_bits, *by_size, Case(1024, 8, 3, "implicit")]))
    found = {}
    for case in track(cases, description="alone"):
        found[case] = alone(case)
        lines.append(found[case].row())
        print(lines[-1], flush=True)
    lines.append("")
    lines.append(
        f"A step is the forward and backward pass of a layer whose weights `px.dkm` trains, for 8 inputs; the first "
        f"compiles it and clusters the weights for the first time. Before all, the solver was compiled, which happens "
        f"once on a machine: {solver:.0f} s. Medians of {ROUNDS}, in turns. Peak memory is the resident set above that "
        f"before the step, results included; what the compiler sets aside is from its own analysis, and the least that "
        f"the first table counts. "
        f"{machine('numpy', 'jax', 'coremltools', 'torch')}"
    )
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    if not quick:
        HERE.with_suffix(".md").write_text(text)
        draw(*([found[case] for case in group] for group in (by_steps, by_bits, by_size)))


if __name__ == "__main__":
    main()
