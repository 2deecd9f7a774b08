"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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
    # Neither a temporary file nor what safetensors writes is readable by others, as any new file may be.
    with folder_beside(target) as folder:
        fresh = folder / target.name
        fresh.touch()
        mode = fresh.stat().st_mode
        yield fresh
        fresh.chmod(mode)
        os.replace(fresh, target)


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A folder on the disk of the target, which is gone afterwards.

    A process that is killed leaves its folder behind; the next one that writes the same target removes it. That a
    folder is in use is known by a lock, which ends with its process.

    Args:
        target: what is to be written.

    Raises:
        FileNotFoundError: the folder of the target does not exist.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target.name}: there is no folder {os.fspath(target.parent)!r}")
    prefix = f".{target.name}.writing-"
    for left in target.parent.glob(f"{glob.escape(prefix)}*"):
        with _lock(left) as alone:
            if alone:
                shutil.rmtree(left, ignore_errors=True)
    with ExitStack() as held:
        while True:
            try:
                folder = Path(held.enter_context(tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix)))
            except OSError as error:  # of the kind that its number says, such as PermissionError
                said = f"{error.strerror}; nothing can be written there"
                raise OSError(error.errno, said, os.fspath(target)) from error
            held.enter_context(_lock(folder))
            if folder.exists():  # another process may have removed it before it was locked
                break
        yield folder


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether nobody else held the lock of a folder, and it is held now; False where there are no locks."""
    with ExitStack() as held:
        try:
            handle = os.open(folder, os.O_RDONLY)
            held.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (OSError, AttributeError):
            yield False
        else:
            yield True
