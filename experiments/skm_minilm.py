"""MiniLM sentence embeddings from palettized weights: k-means, and k-means weighted by sensitivity.

No labels are needed. Take an embedding e(w) as the mean of a Gaussian of variance one; its true Fisher information is
the mean of (∂ loss / ∂ w)² with loss = ½ |e(w) - target|² and the target drawn from the Gaussian. ½ Σ F · (w - ŵ)² then
foretells ½ |e(w) - e(ŵ)|², which for embeddings of length one is 1 - cosine.

Sentences are the first ones of docstrings in the standard library, numpy, jax, torch and scikit-learn. A seed draws
those for calibration, those that are held out, and the targets. Prints the tables and writes them, with the machine's
description, to `skm_minilm.md` beside this script, and a figure. `--quick` is a trial of one seed that writes nothing.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import random
import re
import statistics
import sysconfig
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measuring import machine
from minilm import Params, Tokenizer, encode, load
from rich.progress import track

import palettax as px

HERE = Path(__file__)
PACKAGES, SHARE = ("numpy", "jax", "torch", "sklearn"), 800  # sentences of each, and of the standard library
NOT_ITS_OWN = {"site-packages", "dist-packages", "test", "tests", "testing", "_vendor"}
SEEDS, WIDTHS, GROUPS = (0, 1, 2), (2, 3, 4, 6, 8), (None, 16)
CALIBRATION, HELD_OUT, QUERIES, NEIGHBOURS, BATCH = 256, 3000, 1000, 10, 64
WORDS = "embeddings.word_embeddings.weight"

encode_compiled = jax.jit(encode)


class Way(NamedTuple):
    """How weights are weighed."""

    name: str
    added: float | None  # to the sensitivities of a leaf, in units of their mean; None for plain k-means
    words: bool = True  # the word embeddings too

    def sensitivity(self, fisher: Params) -> Params | None:
        """What `px.palettize` is given."""
        if self.added is None:
            return None
        weighed = {name: leaf + self.added * leaf.mean() for name, leaf in fisher.items()}
        return weighed if self.words else {**weighed, WORDS: jnp.ones_like(fisher[WORDS])}


PLAIN, RAW, DAMPED = WAYS = (Way("k-means", None), Way("sensitivity", 0.0), Way("sensitivity + mean", 1.0))
OTHERS = (
    *(Way(f"sensitivity + {added:g} · mean", added) for added in (0.1, 0.3, 3.0, 10.0)),
    Way("sensitivity + mean, word embeddings by plain k-means", 1.0, words=False),
)


class Case(NamedTuple):
    """One row of the table."""

    nbits: int
    group_size: int | None

    def palettize(self, params: Params, sensitivity: Params | None) -> Params:
        """The tree with tables; the outputs of a layer are cut into groups, and the features of word embeddings."""
        granularity = px.Granularity(group_size=self.group_size, channel_axis=None)
        return px.palettize(params, px.kmeans(self.nbits, granularity=granularity), sensitivity=sensitivity)


SECOND = Case(4, None)
"""The case of the second table."""


class Pool(NamedTuple):
    """All sentences."""

    ids: np.ndarray  # (n, length)
    mask: np.ndarray  # (n, length)
    exact: np.ndarray  # (n, 384), embeddings of the float weights


class Split(NamedTuple):
    """What a seed draws."""

    seed: int
    calibration: np.ndarray  # numbers of sentences
    held_out: np.ndarray  # the first of them are queries


class Score(NamedTuple):
    """How good embeddings are."""

    error: float  # the mean of 1 - cosine
    recall: float
    foretold: float  # the error, from the sensitivities
    nbytes: int
    seconds: float  # of processor time, to palettize


def docstring_sentences(root: Path) -> Iterator[str]:
    """First sentences of 5 to 40 words of all docstrings below a folder."""
    for file in sorted(root.rglob("*.py")):
        if NOT_ITS_OWN & set(file.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                nodes = list(ast.walk(ast.parse(file.read_bytes())))
        except SyntaxError:
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for docstring in filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, documented))):
            sentence = re.split(r"(?<=[.!?])\s", " ".join(docstring.split("\n\n")[0].split()))[0]
            if sentence.isascii() and sentence.endswith(".") and 5 <= len(sentence.split()) <= 40:
                yield sentence


def sentences() -> list[str]:
    """As many of every package, none twice; the same in every run."""
    specs = [importlib.util.find_spec(name) for name in PACKAGES]
    roots = [Path(sysconfig.get_path("stdlib")), *(Path(spec.origin).parent for spec in specs if spec and spec.origin)]
    found: list[str] = []
    for root in track(roots, description="docstrings"):
        own = sorted(set(docstring_sentences(root)) - set(found))
        found += random.Random(0).sample(own, SHARE)
    return found


def embed(params: Params, pool: Pool, rows: np.ndarray) -> np.ndarray:
    """Embeddings of some sentences (n, 384), the short ones first, so that no batch is longer than it must be."""
    result = np.zeros((len(rows), pool.exact.shape[1]), np.float32)
    order = np.argsort(pool.mask[rows].sum(axis=1), kind="stable")
    for part in np.split(order, range(BATCH, len(rows), BATCH)):
        own = rows[part]
        length = -(-pool.mask[own].sum(axis=1).max() // 16) * 16
        result[part] = encode_compiled(params, pool.ids[own, :length], pool.mask[own, :length])
    return result


def pool_of(params: Params, tokenizer: Tokenizer) -> Pool:
    """All sentences, and what the float weights say of them."""
    ids, mask = tokenizer(sentences())
    empty = Pool(ids, mask, np.zeros((len(ids), 384), np.float32))
    return empty._replace(exact=embed(params, empty, np.arange(len(ids))))


def split_of(seed: int, count: int, quick: bool) -> Split:
    order = np.random.default_rng(seed).permutation(count)
    calibration, held_out = (32, 500) if quick else (CALIBRATION, HELD_OUT)
    return Split(seed, order[:calibration], order[calibration : calibration + held_out])


def fisher_of(params: Params, pool: Pool, split: Split) -> Params:
    """The diagonal of the true Fisher information of the embeddings."""

    def embedding(params: Params, example: Any) -> jax.Array:
        return encode(params, example["ids"][None], example["mask"][None])[0]

    def loss(params: Params, example: Any) -> jax.Array:
        return jnp.square(embedding(params, example) - example["target"]).sum() / 2

    def sample(params: Params, example: Any, key: jax.Array) -> Any:
        mean = embedding(params, example)
        return {**example, "target": mean + jax.random.normal(key, mean.shape)}

    parts = np.split(split.calibration, range(32, len(split.calibration), 32))
    batches = ({"ids": pool.ids[part], "mask": pool.mask[part]} for part in parts)
    return px.fisher_diagonal(loss, params, batches, sample=sample, key=jax.random.key(split.seed), progress=False)


def recall(exact: np.ndarray, found: np.ndarray, queries: int) -> float:
    """The share of the nearest neighbours of the queries that are still among the nearest."""
    near = []
    for embeddings in (exact, found):
        cosines = embeddings[:queries] @ embeddings.T
        np.fill_diagonal(cosines, -np.inf)
        near.append(np.argpartition(-cosines, NEIGHBOURS, axis=1)[:, :NEIGHBOURS])
    return float((near[0][:, :, None] == near[1][:, None]).any(axis=2).mean())


class Bench(NamedTuple):
    """What all measurements share."""

    params: Params
    pool: Pool
    splits: list[Split]
    fishers: list[Params]

    def scores(self, case: Case, way: Way) -> list[Score]:
        """One for each seed. Plain k-means is the same for all."""
        found = []
        for split, fisher in zip(self.splits, self.fishers, strict=True):
            if not found or way.added is not None:
                start = time.process_time()
                small = jax.block_until_ready(case.palettize(self.params, way.sensitivity(fisher)))
                seconds, dense = time.process_time() - start, px.depalettize(small)
                nbytes = sum(leaf.nbytes for leaf in small.values())
            exact, now = self.pool.exact[split.held_out], embed(dense, self.pool, split.held_out)
            error = float((1 - (exact * now).sum(axis=1, dtype=np.float64)).mean())
            foretold = sum(float((f * (dense[name] - self.params[name]) ** 2).sum()) for name, f in fisher.items()) / 2
            queries = min(QUERIES, len(exact))
            found.append(Score(error, recall(exact, now, queries), foretold, nbytes, seconds))
        return found


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def row(case: Case, found: dict[Way, list[Score]]) -> str:
    """A line of the first table."""
    table = f"{case.group_size} rows" if case.group_size else "tensor"
    cosines = [spread([1 - score.error for score in found[way]], 5) for way in WAYS]
    recalls = [spread([100 * score.recall for score in found[way]], 1) for way in WAYS]
    megabytes = found[PLAIN][0].nbytes / 1e6
    return f"| {case.nbits} | {table} | {megabytes:.1f} | " + " | ".join(cosines + recalls) + " |"


def other_row(way: Way, found: list[Score]) -> str:
    """A line of the second table."""
    cells = [spread([getattr(score, field) for score in found], 4) for field in ("foretold", "error")]
    return f"| {way.name} | {' | '.join(cells)} | {spread([100 * score.recall for score in found], 1)} |"


def draw(found: dict[tuple[Case, Way], list[Score]]) -> None:
    """Errors, the same relative to plain k-means, and recall, against bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (errors, shares, recalls) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    plain, colors = [found[Case(nbits, None), PLAIN] for nbits in WIDTHS], ("C0", "C1", "C2")
    for (group_size, line), (way, color) in itertools.product(
        zip(GROUPS, ("-", "--"), strict=True), zip(WAYS, colors, strict=True)
    ):
        own = [found[Case(nbits, group_size), way] for nbits in WIDTHS]
        lost = [[score.error for score in scores] for scores in own]
        share = [[a.error / b.error for a, b in zip(*pair, strict=True)] for pair in zip(own, plain, strict=True)]
        recalled = [[100 * score.recall for score in scores] for scores in own]
        label = f"{way.name}, {f'{group_size} rows' if group_size else 'tensor'}"
        style = {"color": color, "linestyle": line, "marker": "s" if group_size else "o", "markersize": 4}
        for axes, values in ((errors, lost), (shares, share), (recalls, recalled)):
            axes.errorbar(WIDTHS, *zip(*map(mean_and_deviation, values), strict=True), label=label, **style)
    errors.set(ylabel="1 - cosine", yscale="log")
    errors.legend(frameon=False, fontsize="small")
    shares.set(ylabel="1 - cosine, relative to k-means per tensor", ylim=(0, None))
    recalls.set(ylabel=f"recall@{NEIGHBOURS}, %")
    for axes in (errors, shares, recalls):
        axes.set(xlabel="bits", xticks=WIDTHS)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.with_suffix(".png"), dpi=130)


def tables(found: dict[tuple[Case, Way], list[Score]], cases: list[Case]) -> list[str]:
    """Both of them."""
    names = [f"{what}, {way.name}" for what in ("cosine", f"recall@{NEIGHBOURS}, %") for way in WAYS]
    lines = ["| bits | table per | MB | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    lines += [row(case, {way: found[case, way] for way in WAYS}) for case in cases]
    lines += ["", f"| {SECOND.nbits} bits, table per tensor | foretold | 1 - cosine | recall@{NEIGHBOURS}, % |"]
    return [*lines, "|---|---|---|---|", *(other_row(way, found[SECOND, way]) for way in (*WAYS, *OTHERS))]


def notes(bench: Bench, found: dict[tuple[Case, Way], list[Score]], seconds: float) -> list[str]:
    """What the tables are of."""
    split = bench.splits[0]
    held_out, queries = len(split.held_out), min(QUERIES, len(split.held_out))
    nbytes = sum(leaf.nbytes for leaf in bench.params.values())
    unseen = statistics.mean(float((fisher[WORDS].max(axis=1) == 0).mean()) for fisher in bench.fishers)
    times = [score.seconds for scores in found.values() for score in scores]
    return [
        f"Cosine: with the embeddings of the float weights ({nbytes / 1e6:.1f} MB), of {held_out:,} held-out "
        f"sentences. Recall@{NEIGHBOURS}: of the {NEIGHBOURS} nearest of them to each of {queries:,}, the share that "
        f"is still found. Mean ± standard deviation over {len(bench.splits)} seeds (split, targets).",
        "",
        f"Sensitivity: the Fisher information F of {len(split.calibration)} other sentences, {seconds:.0f} s of "
        f"processor time; palettizing all leaves took {min(times):.1f} to {max(times):.1f} s of it. `+ mean`: every "
        "leaf's own mean is added. Foretold: ½ Σ F · (w - ŵ)², which is 1 - cosine if errors of weights do not add "
        "up. Word embeddings are weighed as everything else, but for the last row of the second table; the "
        f"sensitivity of the {100 * unseen:.0f} % of tokens that no calibration sentence has is zero, or the mean. "
        "16 does not divide their 30,522 rows: 16 of their 384 features share a table instead.",
        "",
        machine("numpy", "jax", "torch", "scikit-learn"),
    ]


def fishers_of(params: Params, pool: Pool, splits: list[Split]) -> tuple[list[Params], float]:
    """The sensitivities of every seed, and seconds of processor time for one."""
    start = time.process_time()
    found = [jax.block_until_ready(fisher_of(params, pool, s)) for s in track(splits, description="sensitivities")]
    return found, (time.process_time() - start) / len(splits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a folder of model.safetensors and vocab.txt; see minilm.py")
    parser.add_argument("--quick", action="store_true", help="one seed, few sentences and widths; write nothing")
    options = parser.parse_args()
    params, tokenizer = load(options.weights)
    pool = pool_of(params, tokenizer)
    splits = [split_of(seed, len(pool.ids), options.quick) for seed in (SEEDS[:1] if options.quick else SEEDS)]
    fishers, seconds = fishers_of(params, pool, splits)
    bench = Bench(params, pool, splits, fishers)
    cases = [Case(nbits, size) for nbits in ((3, 4) if options.quick else WIDTHS) for size in GROUPS]
    runs = [*itertools.product(cases, WAYS), *itertools.product([SECOND], OTHERS)]
    found: dict[tuple[Case, Way], list[Score]] = {}
    for case, way in track(runs, description="palettes"):
        found[case, way] = bench.scores(case, way)
        print(case, other_row(way, found[case, way]), flush=True)
    text = "\n".join([*tables(found, cases), "", *notes(bench, found, seconds)]) + "\n"
    print("\n" + text)
    if not options.quick:
        HERE.with_suffix(".md").write_text(text)
        draw(found)


if __name__ == "__main__":
    main()
