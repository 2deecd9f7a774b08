"""The Typer application that every command registers with."""

from __future__ import annotations

import typer


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
