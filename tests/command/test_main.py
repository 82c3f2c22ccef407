import errno
import sys
from types import ModuleType

import pytest
import torch

from vim2.command.errors import UserError
from vim2.command.main import Command, run_command
from vim2.files import NotWritten

COMMANDS = {"train": Command("use less", resumable=True), "predict": Command(extra="pictures"), "none": Command()}

LACKS = "sample.py: error: {} needs nowhere, which is not installed: pip install {}.\n"


@pytest.fixture
def main(monkeypatch):
    """The command line of a package in which every command ends as its argument says."""

    def end(argv):
        endings = {
            "stop": KeyboardInterrupt(),
            "full": torch.OutOfMemoryError(),
            "killed": RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "torch": RuntimeError("[fail] DefaultCPUAllocator: can't: you tried to allocate 7500000000 bytes."),
            "sizes": RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"),
            "numpy": MemoryError("Unable to allocate 3 TiB"),
            "bad": UserError("What is\n   wrong: run 'a  b.py'.\n"),
        }
        endings["lacks"] = ModuleNotFoundError("No module named 'nowhere.at'", name="nowhere.at")
        endings["closed"] = NotWritten(errno.EROFS, "Could not write a.json (Read-only file system)")
        endings["disk"] = OSError(errno.ENOSPC, "No space left on device")
        if argv:
            raise endings[argv[0]]

    package = ModuleType("sample_package")
    package.train = package.predict = end

    def missing(name):
        raise ImportError("It needs this package.")

    package.__getattr__ = missing
    monkeypatch.setitem(sys.modules, "sample_package", package)
    return lambda argv: run_command("sample.py", "usage: sample.py", "sample_package", COMMANDS, argv)


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        (["train"], 0, ""),
        (["trian"], 2, "sample.py: error: unknown command trian; did you mean train? (of train, predict, none)\n"),
        (["train", "bad"], 2, "sample.py: error: What is wrong: run 'a  b.py'.\n"),
        (["none"], 2, "sample.py: error: It needs this package.\n"),
        (["train", "lacks"], 2, LACKS.format("train", "nowhere")),
        (["predict", "lacks"], 2, LACKS.format("predict", '"vim2[pictures]", or nowhere')),
        (["train", "full"], 2, "sample.py: error: The GPU's memory is full: use less.\n"),
        (
            ["train", "torch"],
            2,
            "sample.py: error: The memory is full: 7.5 GB more are needed; use less, or a smaller model.\n",
        ),
        (["train", "sizes"], 2, "sample.py: error: The memory is full; use less, or a smaller model.\n"),
        (["train", "numpy"], 2, "sample.py: error: The memory is full; use less, or a smaller model.\n"),
        (["predict", "full"], 2, "sample.py: error: The GPU's memory is full: use a smaller --batch-size.\n"),
        (
            ["train", "killed"],
            2,
            "sample.py: error: A process that reads data was ended from outside, as where memory is full (DataLoader "
            "worker (pid 7) is killed by signal: Killed): use fewer of them, or make memory free.\n",
        ),
        (["train", "disk"], 2, "sample.py: error: No space left on device: make room.\n"),
        (
            ["train", "closed"],
            2,
            "sample.py: error: Could not write a.json (Read-only file system): choose another folder to write to.\n",
        ),
        (["train", "stop"], 130, "sample.py: stopped; it goes on with --resume\n"),
        (["predict", "stop"], 130, "sample.py: stopped\n"),
    ],
    ids=str,
)
def test_a_command_ends_in_one_line_and_an_exit_code(main, capsys, argv, code, line):
    assert main(argv) == code
    assert capsys.readouterr().err == line


def test_one_process_of_several_speaks(main, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "bad"]) == 2
    assert capsys.readouterr().err == ""
    assert main(["train", "full"]) == 2  # of which the others know nothing
    assert "memory is full" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_usage(main, capsys, argv):
    assert main(argv) == 0
    assert capsys.readouterr().out == "usage: sample.py\n"
