"""`vim2 export --format safetensors`: a run's checkpoint as weights in half precision."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vim2.checkpoints import read_checkpoint, read_metadata, save_checkpoint, save_half_precision
from vim2.classify import predict
from vim2.classify.cli import main as classify
from vim2.classify.facts import read_described
from vim2.classify.training import started_from
from vim2.command.errors import UserError
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


TERMS = {"license": "other", "description": "Fine-tuned from another.", "notes": ["Research only."]}


def test_what_the_checkpoint_tells_goes_on(checkpoint, tmp_path):
    """Its terms above all, to the next training and export; the model, its images and its classes as well."""
    config = dict(input_size=(3, 40, 40), mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0), interpolation="bilinear")
    config |= dict(crop_pct=0.8, crop_mode="center")
    model = timm.create_model("test_vim2", num_classes=2, d_state=2)
    facts = dict(arch="test_vim2", model_kwargs={"d_state": 2}, num_classes=2, in_chans=3, data_config=config)
    facts |= dict(class_names=["dark", "light"], terms=TERMS)
    save_checkpoint({**facts, "state_dict": model.state_dict()}, checkpoint)
    half, again = tmp_path / "half.safetensors", tmp_path / "again.safetensors"
    assert command(checkpoint) == 0
    assert json.loads(read_metadata(half)["license"]) == "other"
    assert read_described(half)[1] == facts
    assert main(["export", "--checkpoint", str(half), "--format", "safetensors", "--output", str(again)]) == 0
    assert read_metadata(again) == read_metadata(half) and again.stat().st_size == half.stat().st_size
    assert main(["export", "--checkpoint", str(half), "--format", "timm", "--output", str(tmp_path / "timm")]) == 0
    assert read_described(tmp_path / "timm")[1]["terms"] == TERMS
    assert started_from(half) == TERMS  # which says already what they began with
    image = dict(images=[tmp_path / "images" / "dark" / "0.png"], device="cpu", output=tmp_path)
    (found,), (expected,) = (predict(checkpoint=file, **image) for file in (half, checkpoint))
    assert found["true_label"] == expected["true_label"] == "dark"


@pytest.mark.parametrize("form", ["safetensors", "timm", "onnx"])
def test_terms_that_are_not_known_are_not_none(form, tmp_path):
    """Of weights alone; those of a run from scratch are free of terms, and so is what is trained from them."""
    bare, out = tmp_path / "bare.pth", tmp_path / f"out.{form}"
    torch.save(timm.create_model("test_vim2", num_classes=2).state_dict(), bare)
    argv = ["export", "--model", "test_vim2", "--format", form, "--output", str(out), "--checkpoint"]
    assert main([*argv, str(bare)]) == 0
    told = "Exported from bare.pth, in which no terms are told."
    if form == "onnx":
        metadata = pytest.importorskip("onnx").load(out).metadata_props
        assert json.loads({prop.key: prop.value for prop in metadata}["description"]) == told
        return
    assert started_from(str(out)) == {"description": f"Fine-tuned from {out.name}. {told}"}
    scratch = dict(arch="test_vim2", num_classes=2, terms={}, state_dict=torch.load(bare))
    save_checkpoint(scratch, tmp_path / "scratch.pth")
    assert main([*argv, str(tmp_path / "scratch.pth")]) == 0
    assert started_from(str(out)) == {}


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"architecture": "resnet"}, None),  # another library's
        ({"license": '"mit"'}, None),
        ({"architecture": '"test_vim2"', "mean": '"grey"'}, "half.safetensors cannot be used: mean must be a finite"),
        ({"architecture": '"hf-hub:a/b"'}, "There is no model hf-hub:a/b"),
        ({"architecture": '"test_vim2"', "model_args": '{"checkpoint_path": "x"}'}, "checkpoint_path is none"),
    ],
)
def test_metadata_is_believed_where_it_can_be_true(metadata, says, tmp_path):
    path = tmp_path / "half.safetensors"
    save_half_precision(timm.create_model("test_vim2").state_dict(), path, metadata)
    if says is None:
        assert read_described(path)[1] == {}
        return
    with pytest.raises(UserError, match=says):
        read_described(path)


def test_rounding_that_costs_accuracy_is_refused(checkpoint, capsys, monkeypatch):
    accuracies = iter([50.0, 49.8])
    monkeypatch.setattr("vim2.export.command.validate", lambda **_: [{"top1": next(accuracies)}])
    assert command(checkpoint, "--data-dir", "images") == 2
    assert "costs 0.20 points" in capsys.readouterr().err
    assert not (checkpoint.parent / "half.safetensors").exists()


def test_mistakes(checkpoint, capsys):
    assert command(checkpoint, "--data-dir", checkpoint.parent / "nowhere") == 2
    assert main(["export", "--model", "test_vim2", "--format", "safetensors", "--output", "x.safetensors"]) == 2
    assert "give --checkpoint FILE" in capsys.readouterr().err
    assert command(checkpoint, "--split", "train") == 2 and "add --data-dir" in capsys.readouterr().err
    assert command(checkpoint, "--output", checkpoint.parent / "half.bin") == 2
    assert "are read by the name NAME.safetensors, got half.bin" in capsys.readouterr().err
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
