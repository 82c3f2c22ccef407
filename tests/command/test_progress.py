"""What a run says while it goes on."""

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


def test_the_first_step_of_a_process_is_explained_and_no_other(monkeypatch):
    explained = []
    monkeypatch.setattr(progress, "_started", False)
    monkeypatch.setattr(progress, "say_if_slow", lambda text, _: explained.append(text) or nullcontext())
    for _ in range(2):
        assert list(progress.progress_bar([1, 2, 3], "epoch", Processes(torch.device("cpu")))) == [1, 2, 3]
    assert explained == [progress.COMPILING]
