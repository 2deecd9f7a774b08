"""The command line: `palettax compress`, `inspect`, `verify` and `demo`."""

from __future__ import annotations

import sys

from palettax._extras import require


def main() -> None:
    """Run the command line; without its extra, say which to install."""
    try:
        require("rich", "cli")
        require("typer", "cli")
        from palettax._commands import app
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(2)  # 1 is a difference that `verify` found
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        sys.exit(130)
    app()
