"""`palettax compress`: a file of weights in, a smaller one out, and what became of each weight."""

# No postponed annotations: typer reads them as objects.
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import palettax as px
from palettax._commands.app import app, examples
from palettax._commands.console import (
    complain,
    plain_errors,
    print_json,
    print_table,
    say,
    shape_text,
    sqnr_text,
)
from palettax._commands.files import PACKAGE, check_output, kind_of, read_tree, write_tree
from palettax._commands.interruption import Interruption
from palettax._commands.recipe import Palette, Rules, palettize_tree, read_rules
from palettax._commands.weights import bits_and_tables
from palettax._extras import require
from palettax._files import size_on_disk


class _Mode(StrEnum):
    """How tables are made."""

    KMEANS = "kmeans"
    UNIFORM = "uniform"
    UNIQUE = "unique"


class _Done(NamedTuple):
    """What was compressed: the report, what there is to say besides, and how to write it."""

    report: px.Report
    remarks: list[str]
    write: Callable[[], Any]


_EXAMPLES = examples(
    "palettax compress model.safetensors small.safetensors --nbits 4",
    "palettax compress Model.mlpackage Small.mlpackage --config recipe.yaml",
)


@app.command(epilog=_EXAMPLES)
def compress(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="An .mlpackage, .safetensors, .pt or .pth, or an orbax folder.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="An .mlpackage from one; else .safetensors, or .pt from one.")
    ],
    nbits: Annotated[
        int | None,
        typer.Option(metavar="N", help="Bits of an index: 1, 2, 3, 4, 6 or 8.", show_default="4"),
    ] = None,
    mode: Annotated[
        _Mode | None,
        typer.Option(metavar="NAME", help="kmeans, uniform or unique.", show_default="kmeans"),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Channels that share a table.", show_default="all"),
    ] = None,
    channel_axis: Annotated[
        int | None,
        typer.Option(metavar="N", help="Axis of the channels.", show_default="that of the outputs"),
    ] = None,
    vector_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Weights that share an index.", show_default="1"),
    ] = None,
    channel_scale: Annotated[bool, typer.Option("--channel-scale", help="A scale for each channel.")] = False,
    weight_threshold: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="So many weights or fewer stay dense.", show_default="2048"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="YAML", help="In place of these: `global` and `by_path`; for packages, an OptimizationConfig."
        ),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint-compression", help="Of packages: also what is pruned or quantized already.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there; it may be IN.")] = False,
) -> None:
    """Palettize the weights of a file; all else stays as it is."""
    with plain_errors("Interrupted; nothing was written") as interruption:
        check_output(source, out, force)
        options = {
            "mode": None if mode is None else mode.value,
            "nbits": nbits,
            "group_size": group_size,
            "channel_axis": channel_axis,
            "vector_size": vector_size,
            "channel_scale": channel_scale or None,
            "weight_threshold": weight_threshold,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if config is not None and given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(
                f"--config says how weights are palettized; leave out {names}, or write that into {config}"
            )
        before, is_package = size_on_disk(source), kind_of(source) == PACKAGE
        if channel_axis is not None and group_size is None and (is_package or not (channel_scale or vector_size)):
            raise ValueError(f"--channel-axis {channel_axis} is the axis of groups; give --group-size too")
        if is_package:
            done = _package(source, out, _palette(given), config, joint, interruption)
        elif joint:
            raise ValueError(
                f"--joint-compression is for packages, and {source} is none; zeros of a tree: px.keep_zeros"
            )
        else:
            done = _tree(source, out, _palette(given), config, interruption)
        if all(row.nbits is None for row in done.report.values()):
            done.remarks.append(f"Nothing was palettized: {out} holds what {source} does")
        with interruption.held(f"Interrupted; {out} was written, whole"):
            done.write()
    _show(done, source, before, out, as_json)


def _palette(given: dict[str, Any]) -> Palette:
    """What the options ask for; 4 bits where they do not say it."""
    palette = Palette(**given)
    return palette if palette.nbits is not None or palette.mode == "unique" else palette._replace(nbits=4)


def _tree(source: Path, out: Path, palette: Palette, config: Path | None, interruption: Interruption) -> _Done:
    rules = Rules(palette) if config is None else read_rules(config)
    tree, left_out = read_tree(source)
    small, report = palettize_tree(tree, rules, interruption.check)
    remarks = [f"Left out of {out}, as it is no weight: {', '.join(left_out)}"] if left_out else []
    if out.suffix.lower() != ".safetensors":
        remarks.append(f"{out} holds dense weights beside their tables, for Core ML's converter")
    return _Done(report, remarks, lambda: write_tree(small, out))


def _package(
    source: Path, out: Path, palette: Palette, config: Path | None, joint: bool, interruption: Interruption
) -> _Done:
    require("palettax.coreml", "coreml")
    from palettax.coreml import OpPalettizerConfig, OptimizationConfig, compress_weights, save_package

    interruption.check()
    if config is not None:
        chosen = OptimizationConfig.from_yaml(config)
    else:
        chosen = OptimizationConfig(
            OpPalettizerConfig(
                mode=palette.mode,
                nbits=palette.nbits,
                granularity="per_tensor" if palette.group_size is None else "per_grouped_channel",
                group_size=palette.group_size or 0,
                channel_axis=palette.channel_axis,
                cluster_dim=palette.vector_size,
                enable_per_channel_scale=palette.channel_scale,
                weight_threshold=palette.weight_threshold,
            )
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        small, report = compress_weights(source, chosen, joint)
    told = [str(warning.message) for warning in caught if warning.category is UserWarning]
    # What stayed as it is stands in the report.
    remarks = [message for message in told if " stays as it is: " not in message]
    return _Done(report, remarks, lambda: save_package(small, out))


def _show(done: _Done, source: Path, before: int, out: Path, as_json: bool) -> None:
    report, after = done.report, size_on_disk(out)
    if as_json:
        print_json({
            "source": str(source),
            "out": str(out),
            "weights": [{"name": name, **row._asdict()} for name, row in report.items()],
            "nbytes_before": report.nbytes_before,
            "nbytes": report.nbytes,
            "ratio": report.nbytes_before / max(report.nbytes, 1),
            "file_bytes_before": before,
            "file_bytes": after,
            "remarks": done.remarks,
        })  # fmt: skip
        return
    columns = {"weight": "left", "shape": "right", "bits": "right", "SQNR": "right", "bytes": "right", "": "left"}
    print_table(
        columns,
        [
            (name, shape_text(row.shape), f"{row.bits_per_weight:.3g}", _lost(row), f"{row.nbytes:,}", note_of(row))
            for name, row in report.items()
        ],
    )
    say(
        f"Weights: {report.summary()}",
        f"{out}: {after:,} bytes on disk, {before:,} in {source}",
    )
    for remark in done.remarks:
        complain(remark)


def _lost(row: px.LeafReport) -> str:
    return sqnr_text(row.sqnr) if row.nbits is not None else ""


def note_of(row: px.LeafReport) -> str:
    """What a row says in words."""
    if row.nbits is None:
        words = f"dense: {row.skipped}" if row.nbytes == row.nbytes_before else row.skipped
    else:
        words = bits_and_tables(row.nbits, row.groups)
        words += ", larger than dense" if row.nbytes > row.nbytes_before else ""
    return f"{words}, tied to {row.tied_to}" if row.tied_to else words
