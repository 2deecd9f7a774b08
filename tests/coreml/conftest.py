"""Warnings of coremltools that no test can be blamed for."""

from __future__ import annotations

import importlib

import pytest


@pytest.hookimpl(trylast=True)  # after jaxtyping's hook, so that palettax is checked
def pytest_configure(config: pytest.Config) -> None:
    # coremltools leaves the temporary directory of a failed conversion to the garbage collector.
    config.addinivalue_line("filterwarnings", "ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning")
    # Imported by a test module, coremltools would warn of its own docstrings; palettax imports it quietly.
    importlib.import_module("palettax.coreml")
