"""What rounding weights to four decimals before clustering costs, by the size of the weights.

coremltools rounds so by default (`rounding_precision=4`), which is fast because few values are left. The other way to
few values is to keep those that float16 tells apart, which is what palettax counts. Both cluster the same random
normal weights of one layer, of standard deviations from 1 down to 1e-6. Prints the table and writes it to
`rounding.md` beside this script, with a figure.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from coremltools.optimize.torch import palettization as theirs
from measuring import machine
from rich.progress import track

import palettax as px
import palettax.torch as ours

HERE = Path(__file__)
NBITS = (2, 4, 8)
SCALES = tuple(10.0**-power for power in range(7))
ROUNDED, UNROUNDED, OURS = "coremltools", "coremltools, unrounded", "palettax"


def sqnr(library: object, layer: torch.nn.Linear, options: dict[str, object]) -> float:
    """Of the weight of a layer after post-training palettization, in dB."""
    config = library.PostTrainingPalettizerConfig.from_dict({"global_config": options})
    small = library.PostTrainingPalettizer(layer, config).compress()
    before, after = ({"weight": one.weight.detach().numpy()} for one in (layer, small))
    return px.report(before, after)["weight"].sqnr


def sides(layer: torch.nn.Linear, nbits: int) -> dict[str, float]:
    """What each way gives."""
    return {
        ROUNDED: sqnr(theirs, layer, {"n_bits": nbits}),
        UNROUNDED: sqnr(theirs, layer, {"n_bits": nbits, "enable_fast_kmeans_mode": False}),
        OURS: sqnr(ours, layer, {"n_bits": nbits}),
    }


def layer_of(scale: float) -> torch.nn.Linear:
    """A layer of random weights."""
    layer = torch.nn.Linear(128, 128, bias=False)
    weights = np.random.default_rng(0).normal(size=(128, 128)) * scale
    layer.weight.data = torch.from_numpy(weights.astype(np.float32))
    return layer


def draw(found: dict[tuple[float, int], dict[str, float]]) -> None:
    """Decibels against the size of the weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for nbits, color in zip(NBITS, ("#2e6f95", "#5b8e5a", "#d1495b"), strict=True):
        for way, style in ((ROUNDED, "o--"), (OURS, "s-")):
            points = [found[scale, nbits][way] for scale in SCALES]
            axis.plot(SCALES, points, style, color=color, markersize=4, label=f"{way}, {nbits} bits")
    axis.set(xscale="log", xlabel="standard deviation of the weights", ylabel="SQNR, dB")
    axis.invert_xaxis()
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.93))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.with_suffix(".png"), dpi=130)


def main() -> None:
    cases = [(scale, nbits) for scale in SCALES for nbits in NBITS]
    found = {case: sides(layer_of(case[0]), case[1]) for case in track(cases, description="layers")}
    lines = [f"| standard deviation | bits | {ROUNDED} | {UNROUNDED} | {OURS} |", "|---|---|---|---|---|"]
    lines += [
        f"| {scale:g} | {nbits} | " + " | ".join(f"{row[way]:.1f}" for way in (ROUNDED, UNROUNDED, OURS)) + " |"
        for (scale, nbits), row in found.items()
    ]
    lines += [
        "",
        "SQNR in dB of 128×128 normal weights, one table a tensor; 0 dB is what zeros would have. Weights are float32, "
        f"tables too. {machine('numpy', 'torch', 'coremltools')}",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    HERE.with_suffix(".md").write_text(text)
    draw(found)


if __name__ == "__main__":
    main()
