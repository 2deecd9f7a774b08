"""`palettax inspect`: what the weights of a file look like."""

# No postponed annotations: typer reads them as objects.
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer

import palettax as px
from palettax._commands.app import app, examples
from palettax._commands.console import (
    dtype_text,
    plain_errors,
    print_json,
    print_table,
    say,
    shape_text,
    sparkline,
    sqnr_text,
)
from palettax._commands.files import PACKAGE, kind_of
from palettax._commands.weights import Weight, read_weights
from palettax._files import size_on_disk

_BINS = 10
_EXAMPLES = examples(
    "palettax inspect small.safetensors --reference model.safetensors",
    "palettax inspect Small.mlpackage --json",
)


@app.command(epilog=_EXAMPLES)
def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An .mlpackage, .safetensors, .pt or .pth, or an orbax folder.")
    ],
    reference: Annotated[
        Path | None, typer.Option(help="The dense weights: what was lost is said beside each weight.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show each weight of a file: its form, what it costs, how it is spread."""
    with plain_errors("Interrupted"):
        weights = read_weights(file)
        dense = None if reference is None else _by_both_names(reference, kind_of(file) == PACKAGE)
        rows = [_row(name, weight, dense) for name, weight in weights.items()]
        size = size_on_disk(file)
    if as_json:
        print_json({"file": str(file), "file_bytes": size, "weights": rows})
        return
    columns = {"weight": "left", "shape": "right", "dtype": "whole", "bits": "right", "bytes": "right"}
    columns |= {"SQNR": "right"} if dense is not None else {}
    columns |= {"values": "whole", "form": "left"}
    print_table(columns, [_cells(row, dense is not None) for row in rows])
    total, count = sum(row["nbytes"] for row in rows), sum(row["size"] for row in rows)
    say(f"{len(rows)} weights, {total:,} bytes, {8 * total / max(count, 1):.3g} bits a weight; {size:,} bytes on disk")


def _by_both_names(reference: Path, in_package: bool) -> dict[str, Weight]:
    """The weights of the reference, also by the names that a package would give them."""
    found = read_weights(reference)
    if not in_package:
        return found
    from palettax.coreml.package import op_name

    return {op_name(name): weight for name, weight in found.items()} | found


def _row(name: str, weight: Weight, dense: dict[str, Weight] | None) -> dict[str, Any]:
    values = weight.values()
    row = {
        "name": name,
        "shape": list(values.shape),
        "size": values.size,
        "dtype": str(values.dtype),
        "form": weight.form,
        "bits_per_weight": 8 * weight.nbytes / max(values.size, 1),
        "nbytes": weight.nbytes,
        "histogram": _histogram(values),
    }
    if dense is None:
        return row
    other = dense.get(name)
    if other is None:
        return row | {"sqnr": None, "remark": "not in the reference"}
    before = other.values()
    if before.shape != values.shape:
        return row | {"sqnr": None, "remark": f"{shape_text(before.shape)} in the reference"}
    return row | {"sqnr": px.report({name: before}, {name: values})[name].sqnr}


def _histogram(values: np.ndarray) -> dict[str, Any] | None:
    """How often values occur between the least and the greatest; None for what is no real number."""
    if values.size == 0 or not (jnp.issubdtype(values.dtype, jnp.floating) or values.dtype.kind in "biu"):
        return None
    wide = values.reshape(-1).astype(np.float64)
    wide = wide[np.isfinite(wide)]
    if wide.size == 0:
        return None
    counts, edges = np.histogram(wide, _BINS)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}


def _cells(row: dict[str, Any], compared: bool) -> tuple[str, ...]:
    histogram = row["histogram"]
    line = "" if histogram is None else sparkline(np.array(histogram["counts"]))
    form = ", ".join(filter(None, (row["form"], row.get("remark"))))
    lost = (sqnr_text(row["sqnr"]),) if compared else ()
    bits, nbytes = f"{row['bits_per_weight']:.3g}", f"{row['nbytes']:,}"
    return (row["name"], shape_text(tuple(row["shape"])), dtype_text(row["dtype"]), bits, nbytes, *lost, line, form)
