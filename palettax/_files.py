"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def size_on_disk(path: str | os.PathLike[str]) -> int:
    """The bytes of a file, or of all files of a folder."""
    files = Path(path).rglob("*") if Path(path).is_dir() else [Path(path)]
    return sum(file.stat().st_size for file in files if file.is_file())


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh file to write to, which takes the place of the one at the path when the block ends well.

    Args:
        path: where the file is to be.

    Raises:
        FileNotFoundError: its folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target.name}: there is no folder {os.fspath(target.parent)!r}")
    # Neither a temporary file nor what safetensors writes is readable by others, as any new file may be.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        fresh = Path(folder) / target.name
        fresh.touch()
        mode = fresh.stat().st_mode
        yield fresh
        fresh.chmod(mode)
        os.replace(fresh, target)
