"""Makes comparison.py importable from the folders below, and has what they share."""

import every_kernel
import pytest


@pytest.fixture(autouse=True)
def forget_launches():
    """Launches are made anew, with what a test has patched, and not remembered beyond it."""
    every_kernel.forget_launches()
    yield
    every_kernel.forget_launches()
