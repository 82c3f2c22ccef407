"""tools/benchmarks/gpu_tables.sh: every table's command is one that its tool takes, and what is measured is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.forecast import make_parser
from vim2.benchmark.command import _make_parser

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "benchmarks" / "gpu_tables.sh"
PYTHON = """#!{python}
import json, os, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps([*sys.argv[1:], os.environ.get("TORCHINDUCTOR_FREEZING", "")]) + "\\n")
print("a table")
if os.path.exists({calls!r} + ".stop"):
    sys.exit(130)
sys.exit("no GPU is here" if "--ops" in sys.argv and not os.path.exists({calls!r} + ".gpu") else 0)
"""


@pytest.fixture
def tables(tmp_path):
    """Runs the script with a Python that notes what it is called with; the scans fail until there is a file
    `calls.gpu`."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON.format(python=sys.executable, calls=str(calls)))
    python.chmod(0o755)

    def run(*names):
        environment = os.environ | {"PYTHON": str(python)}
        done = subprocess.run(
            ["bash", SCRIPT, tmp_path / "tables", *names], env=environment, capture_output=True, text=True
        )
        called = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        calls.unlink(missing_ok=True)
        return done, called

    return run


def test_commands_are_those_of_their_tools(tables):
    _, calls = tables()
    assert len(calls) > 10
    for tool, *arguments, frozen in calls:
        assert (ROOT / tool).is_file()
        assert (frozen == "1") == ("reduce-overhead" in arguments)
        if tool == "tools/benchmark.py":
            args = _make_parser().parse_args(arguments)
            assert args.amp == "bf16" and (args.model or args.ops is not None or args.compilations)
        elif tool == "tools/benchmarks/forecast.py":
            args = make_parser().parse_args(arguments)
            assert bool(args.names) != bool(args.variates or args.lookbacks)  # a table is one of both
        else:
            assert tool == "tools/benchmarks/mm.py"
            assert all((ROOT / name).is_file() for name in arguments if name.startswith(("mmdet_", "mmseg_")))


def test_what_failed_is_tried_again_and_the_rest_kept(tables, tmp_path):
    done, calls = tables()
    assert done.returncode == 1
    assert done.stderr == (
        "no GPU is here\nnot measured: scans (their NAME.log says why; the same command tries again)\n"
    )
    names = {path.stem for path in (tmp_path / "tables").glob("*.md")}
    assert len(names) == len(calls) - 1 and "scans" not in names
    assert (tmp_path / "tables" / "models.md").read_text() == "a table\n"
    (tmp_path / "calls.gpu").touch()
    done, calls = tables()
    assert done.returncode == 0 and [call[1] for call in calls] == ["--ops"]


def test_tables_by_name(tables, tmp_path):
    done, calls = tables("large", "states")
    assert done.returncode == 0 and len(calls) == 2
    assert {path.name for path in (tmp_path / "tables").glob("*.md")} == {"large.md", "states.md"}
    done, calls = tables("models", "larger")
    assert done.returncode == 2 and not calls and "no table larger, of: models " in done.stderr


def test_ctrl_c_ends_it(tables, tmp_path):
    """The tools exit with 130 then, and no other table is begun."""
    (tmp_path / "calls.stop").touch()
    done, calls = tables("large", "states")
    assert done.returncode == 130 and len(calls) == 1
    assert not list((tmp_path / "tables").glob("*.md"))
    (tmp_path / "calls.stop").unlink()
    done, calls = tables("large", "states")
    assert done.returncode == 0 and len(calls) == 2


def test_an_option_is_no_folder():
    done = subprocess.run(["bash", SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")
