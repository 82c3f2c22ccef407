"""The console command: what it says without a command, of one that does not exist, and where packages are missing."""

import subprocess
import sys

import pytest

import vim2_cli


def run(*argv, missing=None):
    """A process of `vim2 ARGV`, in which one package cannot be imported."""
    code = f"import sys; sys.modules[{missing!r}] = None\n" if missing else "import sys\n"
    code += f"import vim2_cli; code = vim2_cli.main({list(argv)!r}); print('torch' in sys.modules); sys.exit(code)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path()})


def path() -> str:
    return str(next(p for p in map(str, sys.path) if p and vim2_cli.__file__.startswith(p)))


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_loads_nothing(argv):
    done = run(*argv)
    assert done.returncode == 0 and done.stdout.endswith("\nFalse\n") and not done.stderr
    for command in ("train", "validate", "predict", "visualize", "convert", "export", "forecast fit", "mm train"):
        assert f"\n  {command} " in done.stdout


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
