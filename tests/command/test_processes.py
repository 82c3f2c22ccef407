import pytest
import torch

from vim2.command.errors import UserError
from vim2.command.processes import choose_device, start_processes


@pytest.mark.parametrize("name", ["gpu", "tpu9", "meta"])
def test_a_device_that_cannot_be_used_is_one_line(name):
    with pytest.raises(UserError, match=rf"{name}.*--device cpu"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    assert choose_device() == torch.device("cpu")
    with pytest.raises(UserError, match="--device cpu"):
        choose_device("cuda")


def test_launching_wrongly(monkeypatch):
    assert start_processes("cpu", "tools/x.py").world_size == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match=r"torchrun --nproc-per-node=GPUS tools/x.py \.\.\."):
        start_processes("cpu", "tools/x.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"torchrun --nproc-per-node=2 tools/x.py \.\.\."):
        start_processes("cpu", "tools/x.py")
