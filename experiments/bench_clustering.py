"""Clustering: palettax beside coremltools, kmeans1d, scikit-learn and flash1dkmeans, on the same arrays in one process.

Both sides run in turns. Prints a table and writes it, with the machine's description, to `bench_clustering.md` beside
this script, and a figure of time against entries and against weights. `--quick` leaves out what takes minutes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from measuring import machine, peak_memory, timed
from rich.progress import track

import palettax as px
import palettax.coreml  # before coremltools, whose import it keeps quiet

HERE = Path(__file__)
PACKAGES = ("numpy", "jax", "numba", "coremltools", "kmeans1d", "scikit-learn", "flash1dkmeans")
ROUNDS, LONG = 5, 20.0  # rounds; a rival that takes longer than so many seconds runs once


Side = Callable[[], np.ndarray | px.PalettizedArray]
"""Clusters an array; the result says what each weight became."""


class Case(NamedTuple):
    """One row of the table: an array, a rival, and how each side clusters it."""

    name: str
    rival_name: str
    weights: np.ndarray
    ours: Side
    rival: Side
    wanted: float | None  # the ratio that is promised
    nbits: int | None = None  # for one exact table, whose certificate is shown


def ours(weights: np.ndarray, nbits: int, granularity: px.Granularity | None = None) -> Side:
    """The transform, on NumPy arrays: table in the dtype of the weights, indices and all."""
    key = jax.random.key(0) if granularity and granularity.vector_size > 1 else None
    transform = px.kmeans(nbits, granularity=granularity or px.Granularity(), key=key)

    def cluster() -> px.PalettizedArray:
        small = jax.block_until_ready(transform.finalize(weights, ()))
        return small

    return cluster


def coremltools_side(weights: np.ndarray, nbits: int, group_size: int = 0) -> Side:
    """The function that its `palettize_weights` calls for each weight; groups of rows."""
    from coremltools.optimize.coreml._quantization_passes import palettize_weights

    blocks = [group_size] + [0] * (weights.ndim - 1)

    def cluster() -> np.ndarray:
        params = palettize_weights.blockwise_compress(weights, "KMEANS", nbits, blocks)
        lut, indices = np.asarray(params.lut), np.asarray(params.indices)
        tables = lut.reshape(lut.shape[0], -1)
        rows = indices.reshape(len(tables), -1)
        return np.take_along_axis(tables, rows.astype(np.int64), axis=1).reshape(weights.shape)

    return cluster


def kmeans1d_side(weights: np.ndarray, k: int) -> Side:
    import kmeans1d

    def cluster() -> np.ndarray:
        indices, centroids = kmeans1d.cluster(weights, k)
        return np.asarray(centroids)[np.asarray(indices)]

    return cluster


def flash1dkmeans_side(weights: np.ndarray, k: int) -> Side:
    import flash1dkmeans

    def cluster() -> np.ndarray:
        centroids, indices = flash1dkmeans.kmeans_1d(weights, k, random_state=0)
        return np.asarray(centroids)[np.asarray(indices)]

    return cluster


def sklearn_side(weights: np.ndarray, k: int, vector_size: int) -> Side:
    from sklearn.cluster import KMeans

    vectors = weights.reshape(-1, vector_size)

    def cluster() -> np.ndarray:
        found = KMeans(k, n_init=10, random_state=0).fit(vectors)
        return found.cluster_centers_[found.labels_].reshape(weights.shape)

    return cluster


def inertia(weights: np.ndarray, fit: np.ndarray | px.PalettizedArray) -> float:
    """Σ (w - value)² in float64."""
    values = fit.depalettize() if isinstance(fit, px.PalettizedArray) else fit
    return float(np.square(weights.astype(np.float64) - np.asarray(values, np.float64)).sum())


def cases(quick: bool) -> list[Case]:
    random = np.random.default_rng(0)
    half = (random.standard_normal((2048, 2048)) * 0.05).astype(np.float16)
    single = random.standard_normal(1_000_000).astype(np.float32)
    pairs = random.standard_normal(262_144).astype(np.float32)
    found = []
    for nbits, wanted in ((2, None), (4, 30), (6, None), (8, 40)):
        sides = ours(half, nbits), coremltools_side(half, nbits)
        found.append(Case(f"2048×2048 float16, {nbits} bits", "coremltools", half, *sides, wanted, nbits))
    for nbits, wanted in ((4, 20), (8, 100)):
        sides = ours(half, nbits, px.Granularity(group_size=16)), coremltools_side(half, nbits, 16)
        found.append(Case(f"the same in groups of 16 rows, {nbits} bits", "coremltools", half, *sides, wanted))
    for nbits, wanted in ((4, 15), (8, 100)):
        name, rivals = f"1,000,000 float32, {nbits} bits", (kmeans1d_side, flash1dkmeans_side)
        for rival, ratio in zip(rivals, (wanted, None), strict=True):
            sides = ours(single, nbits), rival(single, 2**nbits)
            found.append(Case(name, rival.__name__.removesuffix("_side"), single, *sides, ratio, nbits))
    for size, nbits in itertools.product((2, 4), (2, 4, 6)):
        sides = ours(pairs, nbits, px.Granularity(vector_size=size)), sklearn_side(pairs, 2**nbits, size)
        name = f"262,144 float32 as vectors of {size}, {nbits} bits"
        found.append(Case(name, "scikit-learn, n_init=10", pairs, *sides, 5))
    return [case for case in found if not (quick and ", 8 bits" in case.name)]


def row(case: Case) -> str:
    case.ours()  # compiles
    memory = peak_memory(case.ours)
    theirs: list[np.ndarray] = []
    start = time.perf_counter()
    theirs_memory = peak_memory(lambda: theirs.append(case.rival()))
    first = time.perf_counter() - start
    if first > LONG:
        pairs = [(first, statistics.median(timed(case.ours) for _ in range(ROUNDS)))]
    else:
        pairs = [(timed(case.rival), timed(case.ours)) for _ in range(ROUNDS)]
    slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    mine = case.ours()
    gap = "" if case.nbits is None else f"{px.certify(case.weights, px.kmeans_lut(case.weights, case.nbits).lut):.0e}"
    error = inertia(case.weights, mine) / inertia(case.weights, theirs[0])
    promised = "" if case.wanted is None else f"{case.wanted:g}"
    return (
        f"| {case.name} | {case.rival_name} | {slow:.3f} | {fast:.4f} | {ratio:.0f} | {promised} | {error:.6f} | {gap} "
        f"| {theirs_memory / 2**20:.0f} | {memory / 2**20:.0f} | {memory / case.weights.size:.1f} |"
    )


FIRST_CALL = """
import time, numpy as np, jax, palettax as px
weights = np.linspace(-1, 1, {size}).astype(np.{dtype})
options = dict(vector_size=2, key=jax.random.key(0)) if {vectors} else dict()
start = time.perf_counter()
jax.block_until_ready(px.kmeans_lut(weights, 4, **options))
print(time.perf_counter() - start)
"""


def first_calls() -> list[str]:
    """Seconds of the first fit in a new process: with an empty compilation cache, and with the one that it filled."""
    lines = ["| first fit in a process | compiling, s | compiled before, s |", "|---|---|---|"]
    kinds = [
        ("16-bit floats, 65,536", 65536, "float16", False),
        ("float32, 65,536", 65536, "float32", False),
        ("vectors of 2", 65536, "float32", True),
    ]
    for name, size, dtype, vectors in kinds:
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
            script = FIRST_CALL.format(size=size, dtype=dtype, vectors=vectors)
            command = [sys.executable, "-c", script]
            runs = [
                subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)
            ]
        lines.append(f"| {name} | {float(runs[0].stdout):.1f} | {float(runs[1].stdout):.1f} |")
    return lines


def draw(quick: bool) -> None:
    """Time against the number of entries, and against the number of weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    random = np.random.default_rng(0)
    single = random.standard_normal(200_000 if quick else 1_000_000).astype(np.float32)
    sides: dict[str, Callable[[np.ndarray, int], Side]] = {
        "palettax, exact": lambda w, b: ours(w, b),
        "flash1dkmeans, approximate": lambda w, b: flash1dkmeans_side(w, 2**b),
        "kmeans1d, exact": lambda w, b: kmeans1d_side(w, 2**b),
    }
    figure, (by_k, by_n) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for (name, side), marker in zip(sides.items(), "osD", strict=True):
        widths = [b for b in (1, 2, 3, 4, 6, 8) if not name.startswith("kmeans1d") or b <= (3 if quick else 6)]
        by_k.plot([2**b for b in widths], [best(side(single, b)) for b in widths], marker=marker, label=name)
        sizes = [10**p for p in (3, 4, 5, 6, 7) if not (name.startswith("kmeans1d") and p > (5 if quick else 6))]
        draws = [random.standard_normal(n).astype(np.float32) for n in sizes]
        by_n.plot(sizes, [best(side(w, 4)) for w in draws], marker=marker, label=name)
    by_k.set(xscale="log", yscale="log", xlabel="entries", ylabel="seconds", title=f"{single.size:,} float32")
    by_k.set_xticks([2, 4, 8, 16, 64, 256], ["2", "4", "8", "16", "64", "256"], minor=False)
    by_k.minorticks_off()
    by_n.set(xscale="log", xlabel="weights", title="16 entries")
    by_n.legend(frameon=False)
    for axes in (by_k, by_n):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.with_suffix(".png"), dpi=130)


def best(side: Side) -> float:
    """The least of three times, of one where a call takes long; after a warm-up."""
    first = timed(side)
    return first if first > LONG / 4 else min(timed(side) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out the rivals that take minutes; write nothing")
    quick = parser.parse_args().quick
    lines = [
        "| input | rival | rival, s | palettax, s | times faster | promised | inertia, palettax / rival | certify "
        "| peak MiB, rival | palettax | bytes a weight |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in track(cases(quick), description="clustering"):
        lines.append(row(case))
        print(lines[-1], flush=True)
    lines += ["", *first_calls(), ""]
    lines.append(
        f"Medians of {ROUNDS} rounds in turns after a warm-up; a rival that takes over {LONG:g} s ran once. Peak "
        f"memory is the resident set above that before the call, results included. {machine(*PACKAGES)}"
    )
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    if not quick:
        HERE.with_suffix(".md").write_text(text)
        draw(quick)


if __name__ == "__main__":
    main()
