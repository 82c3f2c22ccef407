import importlib.util
import types
import warnings

import pytest
import torch

from vim2.ops import backend


@pytest.mark.parametrize(("value", "default"), [(None, "auto"), ("", "auto"), ("torch", "torch")])
def test_the_environment_names_the_default(value, default, monkeypatch):
    monkeypatch.delenv("VIM2_SCAN_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("VIM2_SCAN_BACKEND", value)
    spec = importlib.util.spec_from_file_location("backend_anew", backend.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert default == anew.DEFAULT_BACKEND


def gpu_tensor(dtype=torch.float32):
    """What is asked of a tensor on a GPU."""
    device = torch.device("cuda", 0)
    return types.SimpleNamespace(dtype=dtype, device=device, is_cuda=True, is_meta=False, get_device=lambda: 0)


def test_on_a_gpu_it_is_triton_but_for_double_precision(monkeypatch):
    monkeypatch.setattr(backend, "DEFAULT_BACKEND", "auto")
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "IS_ROCM", False)
    for default in (None, "auto"):  # what is remembered and what is worked out agree
        assert backend.resolve_backend(default, gpu_tensor(), gpu_tensor(torch.bfloat16)) == "triton"
        assert backend.resolve_backend(default, gpu_tensor(), gpu_tensor(torch.float64)) == "torch"
    with pytest.raises(ValueError, match="on one device"):
        backend.resolve_backend(None, gpu_tensor(), torch.zeros(1))
    with pytest.raises(ValueError, match="must be float16"):
        backend.resolve_backend(None, gpu_tensor(), gpu_tensor(torch.int32))


def test_amd_gpus_never_see_nvidias_instructions(monkeypatch):
    monkeypatch.setattr(backend, "DEFAULT_BACKEND", "auto")
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "IS_ROCM", True)
    monkeypatch.setattr(backend, "_warned", set())
    with pytest.warns(UserWarning, match="for NVIDIA's GPUs"):
        assert backend.resolve_backend(None, gpu_tensor()) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said
        assert backend.resolve_backend("auto", gpu_tensor()) == "torch"
    with pytest.raises(RuntimeError, match="use the backend 'torch'"):
        backend.resolve_backend("triton", gpu_tensor())
