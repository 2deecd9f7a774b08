"""What all commands say alike: tables, sizes, one JSON object, and errors of one line."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from palettax._commands.interruption import Interruption, interruptible

_BLOCKS = "▁▂▃▄▅▆▇█"
_PIPE_WIDTH = 160
INTERRUPTED, FAILED, DIFFERENT = 130, 2, 1
"""Exit codes: stopped by the user; there was nothing to work with; what was verified is not in order."""


@contextmanager
def plain_errors(interrupted: str) -> Iterator[Interruption]:
    """End with one line on stderr and an exit code, where Python would print a traceback.

    Args:
        interrupted: what to say when the user stops the command.
    """
    with interruptible() as interruption:
        try:
            yield interruption
        except KeyboardInterrupt as error:
            complain(str(error) or interrupted)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if interruption.asked:  # what was interrupted may fail of it later
                complain(interrupted)
                raise typer.Exit(INTERRUPTED) from None
            if not isinstance(error, ValueError | OSError | ImportError):
                traceback.print_exc()  # nobody foresaw it, and whoever mends it needs to know where it was
            complain(f"Error: {error or type(error).__name__}")
            raise typer.Exit(FAILED) from None


def complain(message: str) -> None:
    """One line on stderr, whatever the message."""
    print(" ".join(message.split()), file=sys.stderr)


def say(*lines: str) -> None:
    """Lines on stdout, as they are."""
    for line in lines:
        print(line)


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout; what is not finite is null there."""
    print(json.dumps(_finite(content), ensure_ascii=False, indent=2))


def print_table(columns: dict[str, str], rows: list[tuple[str, ...]]) -> None:
    """A table on stdout, as wide as the terminal.

    Args:
        columns: heading to "left" or "right", or "whole" for a left one that is never cut into lines.
        rows: as many cells each.
    """
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH, highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for heading, kind in columns.items():
        justify = "right" if kind == "right" else "left"
        table.add_column(heading, justify=justify, no_wrap=kind in ("right", "whole"), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def sparkline(counts: np.ndarray) -> str:
    """A histogram in a line; what occurs at all stands above the ground.

    Args:
        counts: (bins,) how often each occurs.

    Example:
        >>> import numpy as np
        >>> sparkline(np.array([0, 1, 7, 14]))
        '▁▂▅█'
    """
    heights = np.ceil(counts / max(counts.max(initial=0), 1) * (len(_BLOCKS) - 1)).astype(int)
    return "".join(_BLOCKS[height] for height in heights)


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape as tables print it."""
    return "×".join(map(str, shape)) or "scalar"


def dtype_text(dtype: str) -> str:
    """A dtype as tables print it.

    Example:
        >>> dtype_text("bfloat16"), dtype_text("int64"), dtype_text("float8_e4m3fn"), dtype_text("bool")
        ('bf16', 'i64', 'f8_e4m3fn', 'bool')
    """
    return re.sub(r"(?<=[a-z])(loat|nt|omplex)(?=\d)", "", dtype)


def sqnr_text(sqnr: float | None) -> str:
    """A ratio in dB; nothing where there is none."""
    return "" if sqnr is None else "∞" if sqnr == math.inf else f"{sqnr:.1f}"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
