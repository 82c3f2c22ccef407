"""Tests of tools/comparisons/exported_file.py."""

import pytest
import torch

from tools.comparisons import exported_file
from vim2.classify.models import create_model
from vim2.command.errors import UserError


def test_a_file_is_compared_and_stages_are_told(monkeypatch, tmp_path, capsys):
    torch.manual_seed(0)
    same = create_model("test_vim2").eval()
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: same)
    path = tmp_path / "test_vim2.pt2"
    path.touch()
    options = ["--img-size", "32", "--batch-size", "1", "3", "--repeats", "1"]
    exported_file.main([str(path), "--model", "test_vim2", *options])
    printed, told = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in printed.splitlines()[3:]]
    assert rows == [["32 x 32", "1", "0.0e+00"], ["32 x 32", "3", "0.0e+00"]]
    stages = [line.partition(": ")[2] for line in told.splitlines() if " s: " in line]
    assert stages[:2] == ["making test_vim2", f"loading {path}"]
    assert stages[2:5] == [
        "32 x 32, batch 1: first run in eager mode",
        "32 x 32, batch 1: first run in AOTInductor",
        "32 x 32, batch 1: comparing",
    ]
    other = create_model("test_vim2", num_classes=3).eval()
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: other)
    with pytest.raises(UserError, match=r"AOTInductor gives \(1, 3\), and the model \(1, 1000\)"):
        exported_file.main([str(path), "--model", "test_vim2", *options])
    with pytest.raises(SystemExit):
        exported_file.main([str(path), "--model", "test_vim2", "--batch-size", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err
