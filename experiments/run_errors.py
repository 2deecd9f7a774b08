"""What compressed Core ML packages compute: palettax beside coremltools, run here on the same inputs.

The MNIST network (random weights), EfficientNet-lite0 and MiniLM-L6 (their own) and ResNet-50 (random) are converted to
float16 and palettized by both sides by k-means, at 2 to 8 bits, a table a tensor or for 16 channels. Every package is
evaluated by `palettax.coreml.as_function`, and its output compared with that of the float16 package: the ratio of
signal to noise, in dB, over all inputs.

Writes the table, with the machine's description, to `run_errors.md` beside this script, and a figure. `--network` takes
one network only and writes nothing. A quarter of an hour.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bench_coreml import SETTINGS, SPARED, ours, package, theirs
from lite0 import images
from measuring import machine
from minilm import load as load_minilm
from rich.progress import track

import palettax.coreml as pc

HERE = Path(__file__)
NAMES = ("MNIST", "EfficientNet-lite0", "MiniLM-L6", "ResNet-50")
COUNT = 8
SENTENCES = (
    ("A cat sleeps on the sofa.", "Interest rates rose again this quarter."),
    ("The train was late.", "She plays the violin every evening after work."),
    ("Water boils at a lower temperature in the mountains.", "He forgot his keys."),
    ("The committee postponed its decision until spring.", "Bread is best when it is fresh."),
)


class Row(NamedTuple):
    """One network at one setting: dB of palettax and of coremltools."""

    network: str
    setting: str
    ours: float
    theirs: float

    def line(self) -> str:
        """A row of the table."""
        return f"| {self.network} | {self.setting} | {self.ours:.2f} | {self.theirs:.2f} |"


def inputs(name: str) -> list[tuple[np.ndarray, ...]]:
    """A few of what the network takes."""
    if name == "MNIST":
        return [(np.random.default_rng(seed).normal(size=(1, 1, 28, 28)),) for seed in range(COUNT)]
    if name == "MiniLM-L6":
        _, tokenizer = load_minilm()
        return [tokenizer(pair) for pair in SENTENCES]
    photographs = images(COUNT)
    return [(one[None].numpy(),) for one in photographs[:: len(photographs) // COUNT]]


def outputs(mlmodel: Any, given: list[tuple[np.ndarray, ...]]) -> np.ndarray:
    """What a package computes of all inputs, in a row."""
    evaluate = pc.as_function(mlmodel)
    names = [feature.name for feature in mlmodel.get_spec().description.input]
    return np.concatenate([
        np.ravel(next(iter(evaluate(dict(zip(names, one, strict=True))).values()))).astype(np.float64) for one in given
    ])  # fmt: skip


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    """Signal to noise."""
    with np.errstate(divide="ignore"):
        return float(10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum()))


def draw(rows: list[Row]) -> None:
    """Decibels against bits, a panel for each network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(NAMES), figsize=(3.2 * len(NAMES), 3.4), layout="constrained")
    for panel, network in zip(axes, NAMES, strict=True):
        for marker, grouped in (("o", False), ("s", True)):
            own = [row for row in rows if row.network == network and ("groups" in row.setting) == grouped]
            bits = [int(row.setting.split()[0]) for row in own]
            kind = "groups of 16" if grouped else "per tensor"
            for side, style in (("theirs", "--"), ("ours", "-")):
                label = f"{'palettax' if side == 'ours' else 'coremltools'}, {kind}"
                color = "tab:blue" if side == "ours" else "tab:orange"
                panel.plot(bits, [getattr(row, side) for row in own], marker + style, color=color, label=label)
        panel.set(title=network, xlabel="bits", xticks=[2, 3, 4, 6, 8])
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("signal to noise of the output, dB")
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(HERE.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NAMES, help="this one only; write nothing")
    chosen = parser.parse_args().network
    warnings.simplefilter("ignore")
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    rows: list[Row] = []
    for name in [chosen] if chosen else NAMES:
        mlmodel, given = package(name), inputs(name)
        expected = outputs(mlmodel, given)
        for setting in track([s for s in SETTINGS if s not in SPARED.get(name, ())], name):
            found = [decibels(outputs(side(mlmodel, SETTINGS[setting]), given), expected) for side in (ours, theirs)]
            rows.append(Row(name, setting, *found))
            print(rows[-1].line(), flush=True)
    head = "| network | setting | palettax, dB | coremltools, dB |\n|---|---|---|---|"
    foot = (
        f"Output of the palettized package beside that of the float16 package, over {COUNT} inputs (MiniLM-L6: "
        f"{2 * len(SENTENCES)} sentences). {machine('jax', 'coremltools', 'numpy')}"
    )
    text = "\n".join([head, *(row.line() for row in rows), "", foot]) + "\n"
    print("\n" + text)
    if not chosen:
        HERE.with_suffix(".md").write_text(text)
        draw(rows)


if __name__ == "__main__":
    main()
