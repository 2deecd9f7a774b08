"""Ctrl-C: at once while there is nothing to lose, and not in the middle of a file."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interruption:
    """Whether the user wants to stop.

    Attributes:
        asked: since the command began. Python drops a `KeyboardInterrupt` that is raised within a callback of the
            garbage collector, and libraries drop one with a bare `except`, so `check` asks again.
    """

    def __init__(self) -> None:
        self.asked = False
        self._held = False
        self._again: threading.Timer | None = None

    def check(self) -> None:
        """Stop here if that was asked for."""
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def held(self, what: str) -> Iterator[None]:
        """Finish a block before stopping.

        Args:
            what: to say of it then.
        """
        self._held = True
        try:
            self.check()
            yield
        finally:
            self._held = False
        if self.asked:
            raise KeyboardInterrupt(what)

    def _stop(self, number: int, frame: Any) -> None:
        self.asked = True
        if self._held:
            return
        if not _imports(frame) or not hasattr(signal, "pthread_kill"):
            raise KeyboardInterrupt
        # An extension that is half imported may abort of an exception.
        if self._again is None or not self._again.is_alive():
            self._again = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, number))
            self._again.daemon = True
            self._again.start()

    def end(self) -> None:
        """Forget what was asked for."""
        if self._again is not None:
            self._again.cancel()


def _imports(frame: Any) -> bool:
    """Whether a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Handle Ctrl-C, in the main thread, until the block ends."""
    interruption, old = Interruption(), sys.unraisablehook

    def quiet(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            old(unraisable)

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, interruption._stop) if in_main else None
    sys.unraisablehook = quiet
    try:
        yield interruption
    finally:
        interruption.end()
        sys.unraisablehook = old
        if in_main:
            signal.signal(signal.SIGINT, before)
