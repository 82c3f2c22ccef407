import os
import subprocess
import sys

import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

CODE = """
import sys, timm.data, vim2.forecast.cli
from vim2.forecast import Forecaster, evaluate, fit, predict
print([name for name in sys.modules if name.startswith("vim2.classify")])
print({operation.__module__ for operation in timm.data.auto_augment.NAME_TO_OP.values()})
"""


def test_the_forecasting_command_loads_nothing_of_image_training_and_leaves_timm_as_it_is():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
    assert result.stdout == "[]\n{'timm.data.auto_augment'}\n", result.stderr
