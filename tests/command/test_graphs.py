"""vim2/command/graphs.py: what can be said of recording without a GPU."""

import warnings

import pytest
import torch
from torch import nn

from vim2.command.errors import UserError
from vim2.command.graphs import record


def test_what_pytorch_puts_right_itself_is_not_warned_of(monkeypatch):
    def recording(module, inputs):
        warnings.warn("Attempting to run cuBLAS, but there was no current CUDA context! Attempting ...", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        module[1].running_mean += 1  # recording runs the model
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recording)
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.warns() as caught:
        assert record(module, (torch.zeros(4, 2),)) is module
    told = [str(warning.message) for warning in caught]
    assert "something else" in told and not any("cuBLAS" in words for words in told)
    assert module[1].running_mean.tolist() == [0, 0]


def test_what_cannot_be_recorded_is_an_error_that_says_what_to_do(monkeypatch):
    def refused(module, inputs):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refused)
    with pytest.raises(UserError, match=r"when stream is capturing\): leave out --cuda-graph\.$"):
        record(nn.Linear(2, 2), (torch.zeros(4, 2),))
