"""Run again whatever takes under half an hour on two cores, one script after the other, and say what was left out.

    python experiments/results.py [--data FOLDER] [--only WORD] [--all]

Each script writes its own table and figure beside itself. One that fails does not stop the others; the exit code says
whether any did.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

HERE = Path(__file__).parent
LIMIT = 30


class Script(NamedTuple):
    """A script, how many minutes it takes on two cores, and whether it needs the MNIST files, or a GPU."""

    name: str
    minutes: int
    data: bool = False
    gpu: bool = False


SCRIPTS = (
    Script("rounding", 1),
    Script("bench_torch", 1),
    Script("bench_gpu", 2, gpu=True),
    Script("bench_fisher", 2),
    Script("figures", 4),
    Script("skm_inertia", 4),
    Script("run_packages", 4),
    Script("bench_clustering", 6),
    Script("bench_dkm", 8),
    Script("bench_skm", 8),
    Script("demo", 5),
    Script("export_networks", 10),
    Script("skm_lite0", 10),
    Script("skm_minilm", 15),
    Script("run_errors", 15),
    Script("bench_coreml", 30),
    Script("forms", 50),
    Script("skm_mnist", 120, data=True),
    Script("train_mnist", 300, data=True),
)


def why_not(script: Script, options: argparse.Namespace) -> str:
    """Why a script is left out; empty if it is not."""
    if script.data and options.data is None:
        return "it needs the four MNIST files: give --data"
    if script.gpu and shutil.which("nvidia-smi") is None:
        return "it needs a GPU"
    if script.minutes >= LIMIT and not options.all:
        return f"it takes about {script.minutes} minutes: give --all"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of the four MNIST IDX files")
    parser.add_argument("--only", default="", help="what the names of scripts must have in them")
    parser.add_argument("--all", action="store_true", help=f"also what takes {LIMIT} minutes or more")
    options = parser.parse_args()
    console = Console()
    named = [script for script in SCRIPTS if options.only in script.name]
    skipped = {script.name: reason for script in named if (reason := why_not(script, options))}
    chosen = [script for script in named if script.name not in skipped]
    outcomes: dict[str, str] = {}
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        for number, script in enumerate(chosen, 1):
            left = sum(other.minutes for other in chosen[number - 1 :])
            task = progress.add_task(f"{number} of {len(chosen)}: {script.name}, about {left} minutes left")
            command = [sys.executable, str(HERE / f"{script.name}.py")]
            command += ["--data", str(options.data)] if script.data else []
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            outcomes[script.name] = f"{(time.perf_counter() - start) / 60:.1f} minutes"
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no word why"])[-1]
                outcomes[script.name] = f"FAILED: {last}"
            progress.remove_task(task)
            console.print(f"{script.name}: {outcomes[script.name]}", highlight=False)
    for name, reason in skipped.items():
        console.print(f"{name}: left out, {reason}", highlight=False)
    sys.exit(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
