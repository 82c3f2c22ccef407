"""The rooms of the two command lines know nothing of one another."""

import os
import subprocess
import sys

import pytest

FORECAST = """
import sys, timm.data, vim2.forecast.cli
from vim2.forecast import fit, evaluate, predict
print([name for name in sys.modules if name.startswith("vim2.classify")])
print({f.__module__ for f in timm.data.auto_augment.NAME_TO_OP.values()})
"""
CLASSIFY = """
import sys, vim2.classify.cli
from vim2.classify import train, validate, predict
print([name for name in sys.modules if name.startswith("vim2.forecast")])
"""


@pytest.mark.parametrize(("code", "out"), [(FORECAST, "[]\n{'timm.data.auto_augment'}\n"), (CLASSIFY, "[]\n")])
def test_a_command_line_loads_nothing_of_the_other(code, out):
    if code is FORECAST:
        pytest.importorskip("pandas", reason="vim2.forecast needs pandas")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.stdout == out, result.stderr
