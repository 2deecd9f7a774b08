"""EfficientNet-lite0 with palettized weights: k-means, and k-means weighted by sensitivity.

No labels are needed. The sensitivity is the true Fisher information F: the mean of (∂ loss / ∂ w)² with the cross
entropy as the loss and labels that are drawn from the network's own softmax. ½ Σ F · (w - ŵ)² then predicts the
divergence of Kullback and Leibler between the classes of the float network and those of the palettized one.

Images are crops of the photographs of `lite0.py`. Every other photograph, in their order there, is held out. A seed
draws the crops for calibration, and the labels. Prints the tables and writes them, with the machine's description, to
`skm_lite0.md` beside this script, and a figure. `--quick` is a trial of one seed that writes nothing. On cores that
are shared, `OMP_NUM_THREADS=1` is faster.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from lite0 import PHOTOGRAPHS, images, load
from measuring import machine
from rich.progress import track

import palettax as px
import palettax.torch

HERE = Path(__file__)
SEEDS, WIDTHS, GROUPS = (0, 1, 2), (2, 3, 4, 6, 8), (None, 16)
EACH, CALIBRATION, HELD_OUT, BATCH = 24, 64, 8, 16  # crops of a photograph; in all; of a held-out photograph; at once
WAYS = {"k-means": None, "sensitivity": 0.0, "sensitivity + mean": 1.0}
"""What is added to the sensitivities of a leaf, in units of their mean; None for plain k-means."""

FOUND = (
    "Predicted loss and KL are near each other: within a factor of 2 at 4 bits, and of 1.5 at 6 and 8. Sensitivity "
    "lowers the prediction everywhere, at a cost of 0.5 to 4 dB of SQNR; with the mean added, of at most 0.3 dB. KL "
    "follows at 8 bits, where it falls by 41 to 53 %. At 6 bits only sensitivity + mean with one table for a tensor "
    "lowers it. At 4 bits, where most classes change, it rises with one table for a tensor and falls with one for 16 "
    "channels; at 2 and 3 bits next to no class is kept, however tables are made."
)

Params = dict[str, Any]


class Case(NamedTuple):
    """How large tables are."""

    nbits: int
    group_size: int | None  # output channels of a table; leaves that it does not divide have one table

    def palettize(self, params: Params, sensitivity: Params | None) -> Params:
        """The tree with tables."""
        transform = px.kmeans(self.nbits)
        if size := self.group_size:
            grouped = px.kmeans(self.nbits, granularity=px.Granularity(group_size=size, channel_axis=0))
            transform = px.partition(
                {True: grouped, False: transform},
                lambda leaves: jax.tree.map(lambda leaf: leaf.shape[0] % size == 0, leaves),
            )
        return px.palettize(params, transform, sensitivity=sensitivity, weight_threshold=2048)


class Score(NamedTuple):
    """How good a palettized network is."""

    sqnr: float
    predicted: float
    error: float  # of logits
    agreement: float
    divergence: float
    nbytes: int
    seconds: float  # of processor time, to palettize


def weighed(fisher: Params, added: float | None) -> Params | None:
    """What `px.palettize` is given."""
    return None if added is None else {name: leaf + added * leaf.mean() for name, leaf in fisher.items()}


def split(quick: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops for calibration and held-out ones."""
    crops = images(EACH).unflatten(0, (-1, EACH))
    return crops[::2].flatten(0, 1), crops[1::2, : 2 if quick else HELD_OUT].flatten(0, 1)


def logits_of(model: torch.nn.Module, crops: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in crops.split(BATCH)]).double()


def fisher_of(model: torch.nn.Module, pool: torch.Tensor, seed: int, count: int) -> Params:
    """The diagonal of the true Fisher information."""
    random = torch.Generator().manual_seed(seed)
    crops = pool[torch.randperm(len(pool), generator=random)[:count]]
    labels = torch.multinomial(logits_of(model, crops).softmax(dim=1), 1, generator=random)[:, 0]

    def loss(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    batches = zip(crops.split(BATCH), labels.split(BATCH), strict=True)
    return px.torch.fisher_diagonal(model, batches, loss, progress=False)


def sqnr_of(params: Params, small: Params) -> float:
    """Of all palettized weights, in dB."""
    signal = noise = 0.0
    for name, leaf in small.items():
        if isinstance(leaf, px.PalettizedArray):
            exact = np.asarray(params[name], np.float64)
            signal += np.square(exact).sum()
            noise += np.square(exact - np.asarray(px.depalettize(leaf))).sum()
    return float(10 * np.log10(signal / noise))


class Bench(NamedTuple):
    """What all measurements share."""

    model: torch.nn.Module
    params: Params
    held_out: torch.Tensor
    exact: torch.Tensor  # logits of the float network
    fishers: list[Params]

    def scores(self, case: Case, added: float | None) -> list[Score]:
        """One for each seed. Plain k-means differs in what is predicted only."""
        found: list[Score] = []
        for fisher in self.fishers:
            if not found or added is not None:
                start = time.process_time()
                small = jax.block_until_ready(case.palettize(self.params, weighed(fisher, added)))
                seconds = time.process_time() - start
                now = logits_of(px.torch.load_into(copy.deepcopy(self.model), small), self.held_out)
            report = px.report(self.params, small, sensitivity=fisher)
            logs, logs_now = self.exact.log_softmax(dim=1), now.log_softmax(dim=1)
            found.append(
                Score(
                    sqnr=sqnr_of(self.params, small),
                    predicted=report.loss_increase or 0.0,
                    error=float((now - self.exact).square().mean().sqrt() / self.exact.std()),
                    agreement=float((now.argmax(dim=1) == self.exact.argmax(dim=1)).double().mean()),
                    divergence=float((logs.exp() * (logs - logs_now)).sum(dim=1).mean()),
                    nbytes=report.nbytes,
                    seconds=seconds,
                )
            )
        return found


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float], digits: int | None = None) -> str:
    """Mean ± standard deviation, which is left out where nothing differs; of three digits in all if None is given."""
    mean, deviation = mean_and_deviation(values)
    digits = max(0, 2 - math.floor(math.log10(mean))) if digits is None else digits
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")


def row(case: Case, way: str, found: list[Score]) -> str:
    """A line of the table."""
    table = f"{case.group_size} channels" if case.group_size else "tensor"
    cells = [
        spread([score.sqnr for score in found], 1),
        spread([score.predicted for score in found]),
        spread([score.error for score in found]),
        spread([100 * score.agreement for score in found], 1),
        spread([score.divergence for score in found]),
    ]
    return f"| {case.nbits} | {table} | {found[0].nbytes / 1e6:.2f} | {way} | {' | '.join(cells)} |"


def ratio(found: dict[tuple[Case, str], list[Score]], nbits: int, way: str, field: str) -> str:
    """A cell of the second table: relative to plain k-means with the same tables."""
    means = [
        statistics.mean(getattr(score, field) for score in found[Case(nbits, size), own])
        for size in GROUPS
        for own in (way, "k-means")
    ]
    return f"{means[0] / means[1]:.2f}, {means[2] / means[3]:.2f}"


def tables(found: dict[tuple[Case, str], list[Score]]) -> list[str]:
    """Both of them."""
    names = ("bits", "table per", "MB", "weighed by", "SQNR, dB", "predicted loss", "logit error", "top-1, %", "KL")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    lines += [row(case, way, scores) for (case, way), scores in found.items()]
    lines += [
        "",
        "| bits | over k-means; per tensor, per 16 channels | predicted loss | logit error | KL |",
        "|---" * 5 + "|",
    ]
    for nbits, way in itertools.product(sorted({case.nbits for case, _ in found}), [*WAYS][1:]):
        cells = [ratio(found, nbits, way, field) for field in ("predicted", "error", "divergence")]
        lines.append(f"| {nbits} | {way} | {' | '.join(cells)} |")
    return lines


def draw(found: dict[tuple[Case, str], list[Score]]) -> None:
    """Errors of logits, and the same relative to plain k-means, against bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (errors, shares) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for (group_size, line), (way, color) in itertools.product(
        zip(GROUPS, ("-", "--"), strict=True), zip(WAYS, ("C0", "C1", "C2"), strict=True)
    ):
        own = [[score.error for score in found[Case(nbits, group_size), way]] for nbits in WIDTHS]
        plain = [found[Case(nbits, group_size), "k-means"][0].error for nbits in WIDTHS]
        share = [[error / base for error in errs] for errs, base in zip(own, plain, strict=True)]
        label = f"{way}, {f'{group_size} channels' if group_size else 'tensor'}"
        style = {"color": color, "linestyle": line, "marker": "s" if group_size else "o", "markersize": 4}
        for axes, values in ((errors, own), (shares, share)):
            axes.errorbar(WIDTHS, *zip(*map(mean_and_deviation, values), strict=True), label=label, **style)
    errors.set(ylabel="rms error of logits / their standard deviation", yscale="log")
    errors.legend(frameon=False, fontsize="small")
    shares.set(ylabel="the same, relative to k-means with such tables", ylim=(0, None))
    for axes in (errors, shares):
        axes.set(xlabel="bits", xticks=WIDTHS)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.with_suffix(".png"), dpi=130)


def notes(bench: Bench, found: dict[tuple[Case, str], list[Score]], count: int, seconds: float) -> list[str]:
    """What the table is of."""
    large = [leaf for leaf in bench.params.values() if leaf.size > 2048]
    cut = [leaf for leaf in large if leaf.shape[0] % 16 == 0]
    total, weights, grouped = (sum(leaf.size for leaf in own) for own in (bench.params.values(), large, cut))
    photographs = [name for names in PHOTOGRAPHS.values() for name in names]
    times = [score.seconds for scores in found.values() for score in scores]
    return [
        f"SQNR: of all palettized weights, {100 * weights / total:.1f} % of the {total / 1e6:.2f} million, in "
        f"{len(large)} leaves. 16 divides the output channels of {len(cut)} of them, {100 * grouped / weights:.0f} % "
        "of these weights; the others, the last layer among them, have one table. Predicted loss: ½ Σ F · (w - ŵ)². "
        "Logit error: rms of the difference over the standard deviation of float logits. Top-1: the share of crops "
        "with the class that float weights give. KL: from the classes of the float network to those of the "
        "palettized one, in nats, which the predicted loss is to foretell. The last three are of "
        f"{len(bench.held_out)} held-out crops: {len(bench.held_out) // len(photographs[1::2])} each of "
        f"{', '.join(photographs[1::2])}.",
        "",
        FOUND,
        "",
        f"Sensitivity: the true Fisher information F of {count} crops, drawn from {EACH} each of "
        f"{', '.join(photographs[::2])}; {seconds:.0f} s of processor time; palettizing took {min(times):.1f} to "
        f"{max(times):.1f} s of it. `+ mean`: every leaf's own mean is added. Mean ± standard deviation over "
        f"{len(bench.fishers)} seeds (crops for calibration, labels); held-out crops are the same for all, so that "
        "± leaves out what other photographs would change. Batch norms are left as they are.",
        "",
        machine("numpy", "jax", "torch"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few crops and widths; write nothing")
    quick = parser.parse_args().quick
    model, (pool, held_out) = load(), split(quick)
    count, seeds = (16, SEEDS[:1]) if quick else (CALIBRATION, SEEDS)
    start = time.process_time()
    fishers = [fisher_of(model, pool, seed, count) for seed in track(seeds, description="sensitivities")]
    seconds = (time.process_time() - start) / len(seeds)
    params = px.torch.to_params(model.state_dict())
    bench = Bench(model, params, held_out, logits_of(model, held_out), fishers)
    cases = [Case(nbits, size) for nbits in ((3, 4) if quick else WIDTHS) for size in GROUPS]
    found: dict[tuple[Case, str], list[Score]] = {}
    for case, way in track([*itertools.product(cases, WAYS)], description="palettes"):
        found[case, way] = bench.scores(case, WAYS[way])
        print(row(case, way, found[case, way]), flush=True)
    text = "\n".join([*tables(found), "", *notes(bench, found, count, seconds)]) + "\n"
    print("\n" + text)
    if not quick:
        HERE.with_suffix(".md").write_text(text)
        draw(found)


if __name__ == "__main__":
    main()
