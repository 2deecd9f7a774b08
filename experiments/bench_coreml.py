"""Whole Core ML packages palettized: palettax beside coremltools' `palettize_weights`, on the same float16 packages.

The MNIST network, EfficientNet-lite0, MiniLM-L6 and ResNet-50 (random weights) are converted once, for iOS18. Then, in
one process, both sides palettize each by k-means, in turns, and every call is timed whole: the package in memory in,
the smaller one out. Of every weight the squared errors are compared, and of the packages the sizes; weights that one
side left alone are to be as they were. Before the table, palettax runs once on the smallest network: what the first
call compiles, or reads from numba's cache, is printed and not in the table.

Prints the table and writes it, with the machine's description, to `bench_coreml.md` beside this script, and a figure.
Most of the time is coremltools' at 8 bits in groups, which the two large networks are spared; `--network` takes one
network only and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from export_networks import inputs_of
from measuring import machine, peak_memory
from rich.progress import track
from torch_networks import NETWORKS

import palettax.coreml as pc
from palettax.demo.networks import torch_twin

# After palettax.coreml, which keeps its import quiet.
import coremltools.optimize.coreml as cto  # isort: skip

HERE = Path(__file__)
ROUNDS, LONG = 3, 20.0  # rounds; a side that takes longer than so many seconds runs once
GROUPED = {"granularity": "per_grouped_channel", "group_size": 16}
SETTINGS: dict[str, dict[str, Any]] = {f"{nbits} bits": {"nbits": nbits} for nbits in (2, 3, 4, 6, 8)}
SETTINGS |= {f"{nbits} bits, groups of 16": {"nbits": nbits, **GROUPED} for nbits in (2, 4, 8)}
SPARED = {"MiniLM-L6": ("8 bits, groups of 16",), "ResNet-50": ("8 bits, groups of 16",)}
HEAD = (
    "| network | setting | weights palettized | palettax, s | coremltools, s | ratio | peak memory, MiB: palettax "
    "| coremltools | largest error to coremltools' | of all weights | package, KiB: palettax | coremltools |"
)


class Row(NamedTuple):
    """One network at one setting, by both sides."""

    network: str
    setting: str
    palettized: int
    ours: float
    theirs: float
    memory: tuple[float, float]
    worst: float
    total: float
    sizes: tuple[int, int]

    def line(self) -> str:
        """A row of the table."""
        cells = (
            *(self.network, self.setting, self.palettized, f"{self.ours:.2f}", f"{self.theirs:.2f}"),
            *(f"{self.theirs / self.ours:.1f}×", *(f"{bytes / 2**20:.0f}" for bytes in self.memory)),
            *(f"{self.worst:.4f}", f"{self.total:.4f}", *(f"{size / 1024:.1f}" for size in self.sizes)),
        )
        return f"| {' | '.join(map(str, cells))} |"


def package(name: str) -> Any:
    """The network as a float16 package for iOS18."""
    if name == "MNIST":
        model, inputs = torch_twin(), (torch.zeros(1, 1, 28, 28),)
    else:
        model, inputs = NETWORKS[name](), inputs_of(name)
    return pc.from_torch(model.eval(), inputs, {}, minimum_deployment_target="iOS18")


def ours(mlmodel: Any, keys: dict[str, Any]) -> Any:
    return pc.palettize_weights(mlmodel, pc.OptimizationConfig(pc.OpPalettizerConfig(**keys)))


def theirs(mlmodel: Any, keys: dict[str, Any]) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):
        return cto.palettize_weights(mlmodel, cto.OptimizationConfig(cto.OpPalettizerConfig(**keys)))


def values(mlmodel: Any) -> list[np.ndarray]:
    """Every weight, decompressed, in order."""
    return [weight.val.astype(np.float64) for weight in pc.get_weights_metadata(mlmodel, 0).values()]


def errors(mlmodel: Any, dense: list[np.ndarray]) -> np.ndarray:
    return np.array([np.square(a - b).sum() for a, b in zip(values(mlmodel), dense, strict=True)])


def in_turns(mlmodel: Any, keys: dict[str, Any]) -> tuple[list[Any], list[float]]:
    """What both sides make of a package, and the median of their seconds."""
    times: list[list[float]] = [[], []]
    small = [None, None]
    for count in range(ROUNDS):
        for side, call in enumerate((ours, theirs)):
            if count == 0 or max(times[side]) < LONG:
                start = time.perf_counter()
                small[side] = call(mlmodel, keys)
                times[side].append(time.perf_counter() - start)
    return small, [statistics.median(own) for own in times]


def compare(name: str, mlmodel: Any, dense: list[np.ndarray], setting: str) -> Row:
    """Both sides: times, memory, errors and sizes."""
    keys = SETTINGS[setting]
    small, seconds = in_turns(mlmodel, keys)
    memory = [
        peak_memory(lambda call=call: call(mlmodel, keys)) if took < LONG else np.nan
        for call, took in zip((ours, theirs), seconds, strict=True)
    ]
    found, expected = (errors(one, dense) for one in small)
    assert (found[expected == 0] == 0).all(), "a weight changed that coremltools leaves as it is"
    both = (found > 0) & (expected > 0)
    with tempfile.TemporaryDirectory() as folder:
        sizes = [pc.package_bytes(pc.save_package(one, Path(folder) / f"{i}.mlpackage")) for i, one in enumerate(small)]
    return Row(
        *(name, setting, len(pc.read_palettes(small[0])), *seconds, (memory[0], memory[1])),
        worst=float((found[both] / expected[both]).max(initial=0)),
        total=float(found.sum() / expected.sum()),
        sizes=(sizes[0], sizes[1]),
    )


def draw(rows: list[Row], path: Path) -> None:
    """Seconds of both sides at every setting, a panel for each network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks = list(dict.fromkeys(row.network for row in rows))
    figure, axes = pyplot.subplots(1, len(networks), figsize=(3.2 * len(networks), 3.4), sharey=True)
    for panel, network in zip(np.atleast_1d(axes), networks, strict=True):
        for marker, grouped in (("o", False), ("s", True)):
            own = [row for row in rows if row.network == network and ("groups" in row.setting) == grouped]
            bits = [int(row.setting.split()[0]) for row in own]
            kind = "groups of 16" if grouped else "per tensor"
            for side, color in (("theirs", "tab:orange"), ("ours", "tab:blue")):
                label = f"{'palettax' if side == 'ours' else 'coremltools'}, {kind}"
                panel.semilogy(bits, [getattr(row, side) for row in own], f"{marker}-", color=color, label=label)
        panel.set(title=network, xlabel="bits", xticks=[2, 3, 4, 6, 8])
    np.atleast_1d(axes)[0].set_ylabel("seconds for the package")
    np.atleast_1d(axes)[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["MNIST", "EfficientNet-lite0", "MiniLM-L6", "ResNet-50"]
    parser.add_argument("--network", choices=names, help="this one only; write nothing")
    chosen = parser.parse_args().network
    warnings.simplefilter("ignore")
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    first = package("MNIST")
    start = time.perf_counter()
    for keys in ({"nbits": 4}, {"nbits": 4, **GROUPED}):
        ours(first, keys)
    took = time.perf_counter() - start
    compiled = f"The first two calls of palettax, on the MNIST network: {took:.1f} s, with what numba has cached."
    rows: list[Row] = []
    for name in [chosen] if chosen else names:
        mlmodel = package(name)
        dense = values(mlmodel)
        for setting in track([s for s in SETTINGS if s not in SPARED.get(name, ())], f"{name}"):
            rows.append(compare(name, mlmodel, dense, setting))
            print(rows[-1].line(), flush=True)
    foot = [
        f"Medians of {ROUNDS} rounds in turns; a side that takes over {LONG:g} s runs once. {compiled}",
        "Peak memory is the resident set above that before the call, result included; not taken of a side that takes "
        f"over {LONG:g} s. An error of 1 is coremltools', smaller is better.",
        machine("numpy", "jax", "numba", "coremltools", "scikit-learn"),
    ]
    text = "\n".join([HEAD, "|---" * HEAD.count(" | ") + "|---|", *(row.line() for row in rows), "", *foot, ""])
    if chosen:
        print("\n".join(foot))
        return
    HERE.with_suffix(".md").write_text(f"# Whole packages, beside coremltools\n\n{text}")
    draw(rows, HERE.with_suffix(".png"))


if __name__ == "__main__":
    main()
