"""The Typer application that every command registers with."""

# No postponed annotations: typer reads them as objects.
from typing import Annotated

import typer

import palettax as px


def examples(*lines: str) -> str:
    """What stands below the help of a command: lines that can be typed as they are."""
    return "\n\n".join(["Examples:", *(f"  {line}" for line in lines)])


app = typer.Typer(
    help="Compress neural-network weights into small lookup tables: w ≈ lut\\[indices].",
    epilog=examples(
        "palettax compress model.safetensors small.safetensors --nbits 4",
        "palettax verify small.safetensors model.safetensors",
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(asked: bool) -> bool:
    if asked:
        typer.echo(px.__version__)
        raise typer.Exit
    return asked


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version.")
    ] = False,
) -> None:
    """What holds for all commands; `--version` has been dealt with by now."""
    del version
