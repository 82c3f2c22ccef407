"""What holds for every tool in tools/."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
COMMANDS = sorted(path for path in TOOLS.rglob("*.py") if "__main__" in path.read_text() and path.name != "vim2_cli.py")


def test_there_are_commands():
    assert {"classify.py", "forecast.py", "train.py", "benchmark.py", "vmamba.py"} <= {path.name for path in COMMANDS}


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(TOOLS)))
def test_common_comes_before_what_loads_pytorch(path):
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    packages = [name.partition(".")[0] for name in modules]
    assert next(name for name in packages if name not in ("sys", "pathlib")) in ("common", "vim2_cli")


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_openmp_is_told_to_sleep_unless_told_otherwise(given, expected):
    code = "import os, sys, vim2_cli; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": str(TOOLS)} | ({"OMP_WAIT_POLICY": given} if given else {})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected, "False"]


def test_scripts_in_folders_run_from_anywhere(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent)}
    command = [sys.executable, str(TOOLS / "comparisons" / "vmamba.py"), "nowhere"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: nowhere holds no classification/models/vmamba.py.\n"
