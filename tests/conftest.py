import os

import hypothesis
import jaxtyping
import pytest

# A first example pays for compilation. CI repeats the same examples; at a desk, hypothesis looks for new ones.
hypothesis.settings.register_profile("palettax", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("palettax")


@pytest.fixture
def unchecked():
    """Turn the type checker off, so that a test sees the error a user without it sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
