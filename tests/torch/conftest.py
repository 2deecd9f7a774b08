"""What every test of small torch models wants."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Layers this small spend their time waiting for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
