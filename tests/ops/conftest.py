"""Makes comparison.py importable from the folders below, and has what they share."""

import sys

import pytest


@pytest.fixture(autouse=True)
def forget_launches():
    """Launches are made anew, with what a test has patched, and not remembered beyond it."""

    def forget():
        for name, module in list(sys.modules.items()):
            if name.startswith("vim2.ops.") and ".triton." in name:
                for value in vars(module).values():
                    if hasattr(value, "cache_clear"):
                        value.cache_clear()

    forget()
    yield
    forget()
