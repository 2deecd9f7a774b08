"""How far long work has come, on a terminal or in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

Advance = Callable[[int, int | None], None]
"""Says how much is done, and how much there is, if that is known."""


@contextmanager
def progress_bar(description: str, unit: str, *, shown: bool = True) -> Iterator[Advance]:
    """A bar with the time that is left, on stderr; nothing without rich, or where no one looks.

    Args:
        description: what is going on.
        unit: what is counted.
        shown: False for no bar.
    """
    try:
        if not shown:
            raise ImportError
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda done, total: None
        return
    console = Console(file=sys.stderr)
    # rich needs ipywidgets to draw over what it has drawn.
    in_notebook = console.is_jupyter and find_spec("ipywidgets") is not None
    columns = TextColumn(description), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not (console.is_terminal or in_notebook)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
