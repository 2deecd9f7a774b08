"""Sensitive k-means on every matrix of MiniLM: palettax beside coremltools, with the same sensitivities.

The sensitivities are the Fisher information that `skm_minilm.py` computes for its first seed, with each matrix's mean
added. Both sides cluster every matrix at 2, 3 and 4 bits, one table a matrix, one after the other. Prints a line for
each width and writes them to `skm_inertia.md` beside this script. `--quick` takes the matrices of one layer only and
writes nothing. About four minutes, nearly all of them coremltools'.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench_skm import PACKAGES, Layer
from measuring import machine, timed
from minilm import load
from rich.progress import track
from skm_minilm import fisher_of, pool_of, split_of

HERE = Path(__file__)
BITS = (2, 3, 4)


class Result(NamedTuple):
    """Both sides on one matrix."""

    ratio: float  # of weighted inertia, ours by theirs
    slow: float  # seconds
    fast: float


def layers(quick: bool) -> Iterator[Layer]:
    """The matrices with their sensitivities."""
    params, tokenizer = load()
    pool = pool_of(params, tokenizer)
    fisher = fisher_of(params, pool, split_of(0, len(pool.ids), quick))
    for name, weights in params.items():
        if np.ndim(weights) == 2 and (not quick or "layer.0." in name):
            own = np.asarray(fisher[name])
            yield Layer(name, np.asarray(weights), own + own.mean())


def result(layer: Layer, nbits: int) -> Result:
    """Cluster one matrix on both sides."""
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = layer.ours(nbits), layer.theirs(nbits, Path(folder))
        slow = timed(lambda: found.update(theirs=theirs()))
    ours()  # compiles
    fast = timed(lambda: found.update(ours=ours()))
    return Result(layer.inertia(found["ours"]) / layer.inertia(found["theirs"]), slow, fast)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer; write nothing")
    quick = parser.parse_args().quick
    logging.disable(logging.INFO)  # coremltools tells of every worker
    matrices = list(layers(quick))
    lines = [
        "| bits | matrices | weighted inertia, palettax / coremltools: least | mean | largest "
        "| coremltools, s | palettax, s | times faster |",
        "|---" * 8 + "|",
    ]
    for nbits in BITS:
        found = [result(layer, nbits) for layer in track(matrices, description=f"{nbits} bits")]
        ratios, slow, fast = np.array([r.ratio for r in found]), sum(r.slow for r in found), sum(r.fast for r in found)
        lines.append(
            f"| {nbits} | {len(found)} | {ratios.min():.9f} | {ratios.mean():.9f} | {ratios.max():.9f} "
            f"| {slow:.1f} | {fast:.2f} | {slow / fast:.0f} |"
        )
        print(lines[-1], flush=True)
    lines += ["", f"{sum(m.weights.size for m in matrices):,} weights. Inertias in float64. {machine(*PACKAGES)}"]
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    if not quick:
        HERE.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
