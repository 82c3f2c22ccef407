"""The console command: what it says without a command, of one that does not exist, and where packages are missing."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vim2_cli

TOOLS = Path(vim2_cli.__file__).parent


def run(*argv, missing="none"):
    """A process of `vim2 ARGV`, in which one package cannot be imported, and which says whether PyTorch was."""
    code = f"import sys; sys.modules[{missing!r}] = None; import vim2_cli; code = vim2_cli.main({list(argv)!r})"
    code += "; print(bool(sys.modules.get('torch'))); sys.exit(code)"
    env = {"PYTHONPATH": f"{TOOLS}:{TOOLS.parent}"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_loads_nothing(argv):
    done = run(*argv)
    assert done.returncode == 0 and done.stdout.endswith("\nFalse\n") and not done.stderr


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["forecast", "--help"], ["forecast", "fit", "--help"]])
def test_a_reader_of_the_help_may_leave(argv):
    done = run_without_readers(*argv)
    assert done.returncode == 0 and not done.stderr


def run_without_readers(*argv, stderr=subprocess.PIPE):
    """A process of `vim2 ARGV` whose reader has left, as `head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vim2_cli", *argv]
    env = {"PYTHONPATH": f"{TOOLS}:{TOOLS.parent}"}
    try:
        return subprocess.run(command, stdout=writing, stderr=stderr or writing, text=True, env=env)
    finally:
        os.close(writing)


def test_an_error_without_a_reader_keeps_its_exit_code():
    assert run_without_readers("predict", "nowhere.png", stderr=None).returncode == 2


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "vim2_cli"], capture_output=True, text=True, cwd=TOOLS)
    assert done.returncode == 0 and done.stdout == vim2_cli.USAGE + "\n"


@pytest.mark.parametrize("name", vim2_cli._PACKAGES)
def test_help_names_every_command(name):
    if name == "mm":
        pytest.importorskip("mmengine")
    commands = importlib.import_module(f"{vim2_cli._PACKAGES[name]}.cli").COMMANDS
    assert name in vim2_cli._GROUPS or name in commands
    for command in commands:
        words = f"{name} {command}" if name in vim2_cli._GROUPS else command
        assert f"\n  {words} " in vim2_cli.USAGE


def test_unknown_command(capsys):
    assert vim2_cli.main(["trian", "--help"]) == 2
    assert capsys.readouterr().err == "vim2: error: unknown command trian; did you mean train? (see vim2 --help)\n"


@pytest.mark.parametrize("argv", [["train", "--help"], ["mm", "train", "x"]])
def test_without_pytorch(argv):
    done = run(*argv, missing="torch")
    told = f"vim2: error: {argv[0]} needs torch, which is not installed: pip install torch.\n"
    assert done.returncode == 2 and done.stderr == told


def test_without_openmmlab(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmengine" or name.startswith("vim2.mm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mmengine", None)
    assert vim2_cli.main(["mm", "test"]) == 2
    told = 'vim2: error: mm needs mmengine, which is not installed: pip install "vim2[mm]".\n'
    assert capsys.readouterr().err == told


def test_version(capsys):
    assert vim2_cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vim2 0.")
