"""What a run says while it goes on."""

import io
import os
import sys
import time
from contextlib import nullcontext

import torch

from vim2.command import progress
from vim2.command.processes import Processes


def test_a_line_is_said_only_where_it_takes_long(capsys):
    with progress.say_if_slow("slow", seconds=0.01):
        time.sleep(0.5)
    with progress.say_if_slow("quick", seconds=60):
        pass
    assert capsys.readouterr().out == "slow\n"


def test_what_the_output_cannot_write_is_escaped(monkeypatch):
    """Names of files that are not UTF-8 are lone surrogates to Python."""
    for encoding, written in (("utf-8", "käse\\udce4 · 1\n"), ("ascii", "k\\xe4se\\udce4 \\xb7 1\n")):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        progress.say("käse\udce4 · 1")
        assert sys.stdout.buffer.getvalue() == written.encode()


def test_a_reader_that_leaves_stops_no_command(monkeypatch):
    """As `vim2 predict ... | head -1`, whose files are still to be written."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        for line in ("first", "second"):
            progress.say(line)


def test_without_outputs_nothing_is_said(monkeypatch):
    """As after `>&- 2>&-`, where Python has neither."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    progress.say("line")
    progress.say("line", as_error=True)
    assert list(progress.progress_bar([1], "epoch", Processes(torch.device("cpu")))) == [1]


def test_the_first_step_of_a_process_is_explained_and_no_other(monkeypatch):
    explained = []
    monkeypatch.setattr(progress, "_started", False)
    monkeypatch.setattr(progress, "say_if_slow", lambda text, _: explained.append(text) or nullcontext())
    assert list(progress.progress_bar([1, 2], "decode", Processes(torch.device("cpu")), has_kernels=False)) == [1, 2]
    assert not explained
    for _ in range(2):
        assert list(progress.progress_bar([1, 2, 3], "epoch", Processes(torch.device("cpu")))) == [1, 2, 3]
    assert explained == [progress.COMPILING]
