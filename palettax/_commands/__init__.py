"""The commands behind `palettax.cli`, which has made sure that typer and rich are there."""

from palettax._commands import compress as compress
from palettax._commands import demo as demo
from palettax._commands import inspect as inspect
from palettax._commands import verify as verify
from palettax._commands.app import app as app
