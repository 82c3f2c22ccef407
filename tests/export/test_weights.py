"""`vim2 export --format safetensors`: a run's checkpoint as weights in half precision."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vim2.checkpoints import read_checkpoint, save_checkpoint
from vim2.classify.cli import main as classify
from vim2.export.cli import main


@pytest.fixture
def checkpoint(tmp_path):
    """Of a run with a moving average, and images of its two classes in two folders."""
    torch.manual_seed(0)
    averaged, plain = (timm.create_model("test_vim2", num_classes=2).state_dict() for _ in range(2))
    facts = dict(arch="test_vim2", num_classes=2, class_names=["dark", "light"])
    save_checkpoint({**facts, "state_dict": plain, "state_dict_ema": averaged}, tmp_path / "best.pth")
    noise = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        for i in range(3):
            path = tmp_path / "images" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(level, level + 50, (40, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "best.pth"


def command(checkpoint, *more):
    folder = checkpoint.parent
    given = ["--checkpoint", checkpoint, "--format", "safetensors", "--output", folder / "half.safetensors", *more]
    return main(["export", *map(str, given)])


def test_the_moving_average_is_written(checkpoint, capsys):
    images = checkpoint.parent / "images"
    assert command(checkpoint, "--data-dir", images) == 0
    assert "in half precision" in capsys.readouterr().out
    halves = read_checkpoint(checkpoint.parent / "half.safetensors")
    expected = torch.load(checkpoint, weights_only=True)["state_dict_ema"]
    assert halves.keys() == expected.keys()
    assert all(torch.equal(halves[name], value.half()) for name, value in expected.items())
    overlay = dict(file=str(checkpoint.parent / "half.safetensors"), num_classes=2)
    model = timm.create_model("test_vim2", pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(value, halves[name].float()) for name, value in model.state_dict().items())


def test_rounding_that_costs_accuracy_is_refused(checkpoint, capsys, monkeypatch):
    accuracies = iter([50.0, 49.8])
    monkeypatch.setattr("vim2.export.command.validate", lambda **_: [{"top1": next(accuracies)}])
    assert command(checkpoint, "--data-dir", "images") == 2
    assert "costs 0.20 points" in capsys.readouterr().err
    assert not (checkpoint.parent / "half.safetensors").exists()


def test_mistakes(checkpoint, capsys):
    assert command(checkpoint, "--data-dir", checkpoint.parent / "nowhere") == 2
    assert main(["export", "--model", "test_vim2", "--format", "safetensors", "--output", "x"]) == 2
    assert "give --checkpoint FILE" in capsys.readouterr().err
    before = checkpoint.read_bytes()
    for form in ("onnx", "pt2", "safetensors"):  # none over the checkpoint itself
        argv = ["export", "--checkpoint", checkpoint, "--format", form, "--output", checkpoint]
        assert main([*map(str, argv)]) == 2 and "is what is read, and would be" in capsys.readouterr().err
    assert classify(["convert", str(checkpoint), f"{checkpoint.parent}/./{checkpoint.name}"]) == 2
    assert "is what is read, and would be" in capsys.readouterr().err and checkpoint.read_bytes() == before
    folder = checkpoint.parent / "folder"
    assert main(["export", "--checkpoint", str(checkpoint), "--format", "timm", "--output", str(folder)]) == 0
    inside = folder / "model.safetensors"
    for form, read, output in (("safetensors", folder, inside), ("timm", inside, folder), ("timm", folder, folder)):
        argv = ["export", "--checkpoint", read, "--format", form, "--output", output]
        assert main([*map(str, argv)]) == 2 and "is what is read, and would be" in capsys.readouterr().err
    weights = torch.load(checkpoint, weights_only=True)
    weights["state_dict_ema"]["norm.weight"][0] = 1e6
    save_checkpoint(weights, checkpoint)
    assert command(checkpoint) == 2
    assert "norm.weight holds values that half precision cannot" in capsys.readouterr().err
    assert not (checkpoint.parent / "half.safetensors").exists()
