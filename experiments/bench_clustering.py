"""Clustering time: palettax beside coremltools' own clustering of the same array, alternating in one process.

Prints a table and writes it, with the machine's description, to `bench_clustering.md` beside this script.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

import palettax as px
import palettax.coreml  # before coremltools, whose import it keeps quiet

ROUNDS = 5


def peer(nbits: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Coremltools' clustering of one array: the function its `palettize_weights` calls for each weight."""
    from coremltools.optimize.coreml._quantization_passes import palettize_weights

    def cluster(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        params = palettize_weights.blockwise_compress(weights, "KMEANS", nbits, [0] * weights.ndim)
        return np.asarray(params.lut).reshape(-1), np.asarray(params.indices)

    return cluster


def ours(nbits: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The exact solver, with its table in the dtype of the weights, as a leaf of a tree gets it."""
    transform = px.kmeans(nbits)

    def cluster(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        small = transform.finalize({"w": weights}, ())["w"]
        return np.asarray(small.lut).reshape(-1), np.asarray(small.indices)

    return cluster


def inertia(weights: np.ndarray, lut: np.ndarray, indices: np.ndarray) -> float:
    """Σ (w - lut[index])² in float64."""
    return float(np.square(weights.astype(np.float64) - lut.astype(np.float64)[indices]).sum())


def peak_memory(call: Callable[[], object]) -> float:
    """MiB of resident memory above the start, sampled every millisecond while the call runs."""
    page, status, done, seen = 4096, Path("/proc/self/statm"), threading.Event(), [0]

    def resident() -> int:
        return int(status.read_text().split()[1]) * page

    start = resident()

    def watch() -> None:
        while not done.wait(0.001):
            seen[0] = max(seen[0], resident() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return seen[0] / 2**20


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


FIRST_CALL = """
import time, numpy as np, palettax as px
weights = np.linspace(-1, 1, 64).astype(np.float16)
start = time.perf_counter()
px.kmeans_lut(weights, 4)
print(time.perf_counter() - start)
"""


def first_call() -> tuple[float, float]:
    """Seconds of the first fit in a new process: with an empty compilation cache, and with the one that it filled."""
    with tempfile.TemporaryDirectory() as cache:
        command, environment = [sys.executable, "-c", FIRST_CALL], {**os.environ, "NUMBA_CACHE_DIR": cache}
        runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    cold, warm = (float(run.stdout) for run in runs)
    return cold, warm


def main() -> None:
    random = np.random.default_rng(0)
    weights = (random.standard_normal((2048, 2048)) * 0.05).astype(np.float16)
    lines = [
        "| 2048×2048 float16 | coremltools, s | palettax, s | ratio | inertia, palettax / coremltools "
        "| peak MiB, coremltools | palettax |",
        "|---|---|---|---|---|---|---|",
    ]
    for nbits in (2, 4, 6, 8):
        calls = [partial(side(nbits), weights) for side in (peer, ours)]
        memory = [peak_memory(call) for call in calls]  # also the warm-up
        pairs = [[timed(call) for call in calls] for _ in range(ROUNDS)]
        slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        error = [inertia(weights, *call()) for call in calls]
        lines.append(
            f"| {nbits} bits | {slow:.3f} | {fast:.3f} | {ratio:.1f} | {error[1] / error[0]:.6f} "
            f"| {memory[0]:.0f} | {memory[1]:.0f} |"
        )
        print(lines[-1], flush=True)
    cold, warm = first_call()
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "jax", "numba", "coremltools"))
    text = "\n".join(lines) + (
        f"\n\nMedians of {ROUNDS} alternating rounds after a warm-up. A machine's first fit compiles: {cold:.1f} s; "
        f"later processes load that: {warm:.1f} s.\n"
        f"Python {platform.python_version()}, {packages}; {platform.machine()}, {os.cpu_count()} cores.\n"
    )
    Path(__file__).with_suffix(".md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
