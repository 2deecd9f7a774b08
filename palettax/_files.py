"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh file to write to, which takes the place of the one at the path when the block ends well.

    Args:
        path: where the file is to be; its folder exists.
    """
    target = Path(path)
    # Neither a temporary file nor what safetensors writes is readable by others, as any new file may be.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        fresh = Path(folder) / target.name
        fresh.touch()
        mode = fresh.stat().st_mode
        yield fresh
        fresh.chmod(mode)
        os.replace(fresh, target)
