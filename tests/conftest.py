import gc
import os
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest

MOST_MAPS = 30_000

# A first example pays for compilation. CI repeats the same examples; at a desk, hypothesis looks for new ones.
hypothesis.settings.register_profile("palettax", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("palettax")


@pytest.fixture
def unchecked():
    """Turn the type checker off, so that a test sees the error a user without it sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Each compiled program keeps a few; thousands exceed the 65,530 that Linux allows, and XLA then crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        gc.unfreeze()
        jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """Every conversion by coremltools collects garbage, and would look through all that was compiled before."""
    gc.collect()
    gc.freeze()
