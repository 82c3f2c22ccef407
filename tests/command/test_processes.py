import os
import signal
import subprocess
import sys

import pytest
import torch

from vim2 import TSM2, TSM2Config
from vim2.classify.cli import main as classify
from vim2.command.errors import UserError
from vim2.command.processes import choose_device, ctrl_c_put_off, start_processes
from vim2.export.onnx import export_onnx
from vim2.forecast.cli import main as forecast
from vim2.ops import backend


@pytest.mark.parametrize("name", ["gpu", "tpu9", "meta", "mps"])
def test_a_device_that_cannot_be_used_is_one_line(name):
    with pytest.raises(UserError, match=rf"{name}.*--device cpu") as error:
        choose_device(name)
    assert len(str(error.value)) < 200  # without all devices for which PyTorch has the operator


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    assert choose_device() == torch.device("cpu")
    with pytest.raises(UserError, match="--device cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["mamba_ssm", "fast"])
def test_a_backend_that_cannot_run_here_is_one_line(name, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "DEFAULT_BACKEND", name)
    monkeypatch.setattr(backend, "HAS_MAMBA_SSM", False)
    told = f"VIM2_SCAN_BACKEND={name} cannot be used on cpu.*unset it"
    with pytest.raises(UserError, match=told):
        choose_device("cpu")
    with pytest.raises(UserError, match=told):
        start_processes("cpu", "vim2 train")
    pytest.importorskip("onnxscript", reason="ONNX files need onnx and onnxscript")
    with pytest.raises(UserError, match=told):
        export_onnx(TSM2(TSM2Config(lookback=16, horizon=4)), tmp_path / "model.onnx")


@pytest.mark.parametrize("command", ["classify train --data-dir", "forecast fit"])
def test_a_device_without_float64_is_refused_before_anything_starts(command, monkeypatch, tmp_path, failing):
    """As Apple's is."""
    room, *argv = command.split()
    if room == "forecast":
        pytest.importorskip("pandas", reason="vim2.forecast needs pandas")
    zeros = torch.zeros

    def without_float64(*size, dtype=None, device=None, **options):
        if torch.device(device or "cpu").type == "mps":
            assert dtype == torch.float64
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return zeros(*size, dtype=dtype, device=device, **options)

    monkeypatch.setattr(torch, "zeros", without_float64)
    main = {"classify": classify, "forecast": forecast}[room]
    error = failing(main, "vim2")(*argv, tmp_path / "none", "--device", "mps", "--output", tmp_path / "runs")
    assert "The device mps cannot be used (Cannot convert" in error and "--device cpu" in error
    assert not any(tmp_path.iterdir())


def test_launching_wrongly(monkeypatch):
    assert start_processes("cpu", "vim2 x").world_size == 1
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):  # empty is unset
        monkeypatch.setenv(name, "")
    assert start_processes("cpu", "vim2 x").world_size == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match=r"torchrun --no-python --nproc-per-node=GPUS vim2 x \.\.\."):
        start_processes("cpu", "vim2 x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"torchrun --no-python --nproc-per-node=2 vim2 x \.\.\."):
        start_processes("cpu", "vim2 x")


def test_where_signals_cannot_be_put_off(monkeypatch):
    monkeypatch.delattr(signal, "pthread_sigmask")  # Windows has none
    with ctrl_c_put_off():
        pass


def test_ctrl_c_is_not_for_those_that_are_started_while_it_is_put_off():
    """They go on, until one asks for it, and then end without a word."""
    code = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
from vim2.command.processes import die_of_ctrl_c
print("goes on", flush=True)
die_of_ctrl_c()
print("is not stopped")
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with ctrl_c_put_off():
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert process.communicate() == ("goes on\n", "") and process.returncode == -signal.SIGINT
