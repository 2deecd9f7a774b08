"""What the benchmarks share: times, peak memory, and what the machine is."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(call: Callable[[], object]) -> float:
    """Bytes of resident memory above the start, sampled every half millisecond while the call runs."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is not to be used again unseen
    done, seen, start = threading.Event(), [0], resident()

    def watch() -> None:
        while not done.wait(0.0005):
            seen[0] = max(seen[0], resident() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = call()  # held, as the caller would hold it
    seen[0] = max(seen[0], resident() - start)
    done.set()
    watcher.join()
    del result
    return seen[0]


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def machine(*packages: str) -> str:
    """The processor and the versions of packages, for the foot of a table."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    device = jax.devices()[0]
    accelerator = "" if device.platform == "cpu" else f", {device.device_kind}"
    return (
        f"{model or platform.machine()}, {os.cpu_count()} cores{accelerator}; "
        f"Python {platform.python_version()}, {versions}."
    )
