import errno
import gc
import os
import random
import signal
import subprocess
import sys
import uuid
import weakref

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from vim2.command.errors import UserError
from vim2.command.runs import find_last, identity, own_folder, read_last, restore_optimizer, seed_everything
from vim2.files import write_atomically


def test_a_run_is_only_gone_on_with_when_asked_for(tmp_path, capsys):
    assert find_last(tmp_path, resume=False) is None
    assert find_last(tmp_path, resume=True) is None
    assert "starting from the beginning" in capsys.readouterr().out
    torch.save({}, tmp_path / "last.pth")
    with pytest.raises(UserError, match="holds a run already: add --resume"):  # rather than write over it
        find_last(tmp_path, resume=False)
    assert find_last(tmp_path, resume=True) == tmp_path / "last.pth"


def test_only_a_whole_last_pth_is_gone_on_with(tmp_path):
    path = tmp_path / "last.pth"
    content = {"options": dict, "optimizer": dict, "history": list}
    whole = {"options": {}, "optimizer": {}, "history": [{"epoch": 1, "loss": 0.5}], "more": torch.ones(2)}
    torch.save(whole, path)
    assert read_last(path, content, {"loss"}).keys() == whole.keys()
    with pytest.raises(UserError, match=r"is not a last.pth .* Or else"):
        read_last(path, {**content, "args": dict}, {"loss"}, "Or else.")
    for changed in (
        {"optimizer": [1]},
        {"history": None},
        {"history": [{"epoch": 2, "loss": 0.5}]},
        {"history": [{"epoch": 1}]},
        {"history": [{"epoch": 1, "loss": "low"}]},
        {"history": [[1, 0.5]]},
    ):
        torch.save({**whole, **changed}, path)
        with pytest.raises(UserError, match=f"its {next(iter(changed))} is damaged"):
            read_last(path, content, {"loss"})
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="truncated"):
        read_last(path, content, {"loss"})


HOLDER = """
import os, sys, time
from pathlib import Path
from vim2.command.runs import own_folder

with own_folder(Path(sys.argv[1]), None):
    child = os.fork()  # as a loader forks its workers
    if child:
        print(child, flush=True)
    time.sleep(120)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_a_folder_belongs_to_one_run_until_its_process_ends(tmp_path):
    with own_folder(tmp_path / "run", None), pytest.raises(UserError, match="Another run is writing to"):
        own_folder(tmp_path / "run", None).__enter__()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match="Another run is writing to"), own_folder(tmp_path / "run", None):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # which lives on, but does not keep others out
        with own_folder(tmp_path / "run", None):
            pass
        assert not list((tmp_path / "run").iterdir())
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_a_run_that_has_been_overtaken_is_refused(tmp_path):
    last = tmp_path / "last.pth"
    torch.save({}, last)
    found = identity(last)
    with own_folder(tmp_path, found):
        write_atomically(last, last.read_bytes())
    with pytest.raises(UserError, match="Another run"), own_folder(tmp_path, found):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_without_locks_a_run_goes_on(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with own_folder(tmp_path, None), own_folder(tmp_path, None):
        write_atomically(tmp_path / "last.pth", b"")


def test_a_run_sweeps_its_folder(tmp_path):
    leftovers = [tmp_path / f".{name}.{uuid.uuid4().hex}" for name in ("last.pth", "curves.png")]
    for path in leftovers:
        path.touch()
    with own_folder(tmp_path, None):
        assert not any(path.exists() for path in leftovers)


def test_seeds_fix_every_generator_and_differ_with_each_number():
    def draw(*numbers):
        seed_everything(*numbers)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw(3, 1) == draw(3, 1)
    assert len({draw(*numbers) for numbers in ((3, 1), (3, 2), (1, 3), (3, 1, 1))}) == 4


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("name", ["adamw", "lookahead_adamw"])
def test_a_restored_optimiser_goes_with_its_run(name, steps):
    """At once, as any other: Python's collector does not see how much of a GPU's memory waits for it."""

    def make(steps):
        weight = nn.Parameter(torch.ones(2))
        weight.grad = torch.ones(2)
        optimizer = create_optimizer_v2([weight], opt=name, lr=0.1)
        for _ in range(steps):
            optimizer.step()
        return weight, optimizer

    state = make(1)[1].state_dict()
    gc.disable()
    try:
        weight, optimizer = make(0)
        restore_optimizer(optimizer, state, "last.pth")
        for _ in range(steps):
            optimizer.step()
        gone = weakref.ref(weight)
        del weight, optimizer
        assert gone() is None
    finally:
        gc.enable()
