"""Models of a user's own, from files and modules that register them with timm."""

import sys
from types import SimpleNamespace

import pytest
import torch
from classify_helpers import TINY
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vim2.classify.cli import main
from vim2.classify.models import create_model
from vim2.classify.options import TrainOptions
from vim2.classify.training import Run
from vim2.command.errors import UserError
from vim2.command.own_models import import_models
from vim2.export.command import export

OWN = """
from own_layers import NAME, Mean
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

default_cfgs = generate_default_cfgs({"own_net": {"input_size": (3, 32, 32)}})

class Own(nn.Module):
    def __init__(self, num_classes=1000, in_chans=3, drop_rate=0.0, width=8, fault=None):
        super().__init__()
        self.num_classes, self.fault = 7 if fault == "other classes" else num_classes, fault
        self.layers = nn.Sequential(nn.Conv2d(in_chans, width, 4, 4), nn.GELU(), Mean(), nn.Linear(width, num_classes))

    def forward(self, x):
        if self.fault == "28 pixels" and x.shape[-1] != 28:
            raise ValueError("no digits")
        y = self.layers(x.unsqueeze(0) if self.fault == "its own" else x)
        if self.fault == "in training" and self.training:
            return y, y
        return {"scores": y} if self.fault == "a dict" else y

@register_model
def own_net(pretrained=False, **kwargs):
    model = build_model_with_cfg(Own, NAME, pretrained, **kwargs)
    if kwargs.get("fault") == "its mean":
        model.pretrained_cfg["mean"] = (0.5, 0.5)
    return model

@register_model
def bare_net(pretrained=False, **kwargs):
    return Own()

@register_model
def torch_net(pretrained=False, num_classes=1000, **kwargs):
    model = nn.Sequential(nn.Flatten(), nn.Linear(7, num_classes))
    model.num_classes, model.pretrained_cfg = num_classes, dict(default_cfgs["own_net"].default.to_dict())
    return model
"""
LAYERS = """
from torch import nn

NAME = "own_net"

class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A file that registers a model, and one beside it that it imports."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_layers.py").write_text(LAYERS)
    (folder / "own_models.py").write_text(OWN)
    return folder / "own_models.py"


@pytest.fixture(autouse=True)
def clean_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_model_of_a_file_is_trained_resumed_validated_and_used(own, data, tmp_path, fails):
    run = tmp_path / "run"
    argv = ["train", "--data-dir", data, *TINY, "--output", tmp_path, "--experiment", "run", "--epochs", 1]
    argv = [*map(str, argv), "--model", "own_net", "--model-kwargs", "width=6", "--in-chans", "1"]
    imports = ["--imports", str(own)]
    assert "yours come with --imports" in fails(*argv, "--model", "another_net")
    bare = fails(*argv, "--model", "bare_net", "--model-kwargs", *imports)
    assert "bare_net has no num_classes of 3 and no pretrained_cfg" in bare
    assert "own_net has no gradient checkpointing" in fails(*argv, *imports, "--grad-checkpointing")
    assert main([*argv, *imports]) == 0
    assert main([*argv, "--epochs", "2", "--resume", *imports]) == 0
    of_run = ["--checkpoint", str(run / "best.pth"), "--device", "cpu"]
    assert main(["validate", "--data-dir", str(data), "-j", "0", *of_run, *imports]) == 0
    image = next(data.glob("val/red/*"))
    assert main(["predict", str(image), *of_run, "--output", str(tmp_path / "predictions"), *imports]) == 0
    exported = ["--format", "safetensors", "--output", str(tmp_path / "own.safetensors")]
    export([*of_run[:2], *exported, *imports])
    assert (tmp_path / "own.safetensors").stat().st_size > 0
    with pytest.raises(UserError, match="Own has no num_features, which timm's config tells"):
        export([*of_run[:2], "--format", "timm", "--output", str(tmp_path / "own"), *imports])
    assert create_model("own_net", imports=[str(own)]).layers[0].out_channels == 8  # a second time changes nothing


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("other classes", "own_net has no num_classes of 3, as timm's models have: make it by"),
        ("its own", "The model fails on images of 32 x 32 pixels, and of any usual size (RuntimeError: "),
        ("28 pixels", "leave --img-size out, and give its pretrained_cfg an input_size of (3, 28, 28)."),
        ("a dict", "The model gives a dict for images, not scores of their classes, (1, 3): change its forward."),
        ("in training", "The model, in training, gives a tuple for images, not scores of their classes, (8, 3)"),
        ("its mean", "The pretrained_cfg of own_net cannot be used: mean must be 3 numbers, one a channel, got [0"),
        ("width=-1", "own_net cannot be made with these --model-kwargs (width=-1): "),
    ],
)
def test_a_model_that_cannot_be_trained_is_told_in_one_line(fault, words, own, data, tmp_path, fails):
    argv = ["train", "--data-dir", data, *TINY, "--output", tmp_path, "--model", "own_net", "--imports", own]
    error = fails(*argv, "--model-kwargs", fault if "=" in fault else f"fault={fault}")
    assert words in error
    if "=" in fault or fault == "its own":
        assert f"({own}, line " in error


def test_files_of_pytorch_are_not_told_as_ones_own(own, data, tmp_path, fails):
    argv = ["train", "--data-dir", data, *TINY, "--output", tmp_path, "--model", "torch_net", "--imports", own]
    error = fails(*argv)
    assert error.rstrip().endswith("): change the model, its arguments or --img-size.") and ", line " not in error


def test_unused_parameters_cannot_be_trained_by_several_processes():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    model[1].register_parameter("unused", nn.Parameter(torch.zeros(1)))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        run = SimpleNamespace(trained=DistributedDataParallel(model), num_classes=3, options=TrainOptions(model="mine"))
        Run.scores(run, torch.zeros(2, 3, 2, 2)).sum().backward()
        with pytest.raises(UserError, match="mine has parameters that its scores do not depend on"):
            Run.scores(run, torch.zeros(2, 3, 2, 2))
    finally:
        torch.distributed.destroy_process_group()


def test_a_package_is_imported_as_one(tmp_path):
    (folder := tmp_path / "own_package").mkdir()
    (folder / "layers.py").write_text("WIDTH = 8")
    (folder / "__init__.py").write_text("from .layers import WIDTH")
    import_models([str(folder / "__init__.py")])
    assert sys.modules["own_package"].WIDTH == 8


def test_a_checkpoint_imports_nothing(own, data, tmp_path):
    """A file that a checkpoint names may be anybody's: only the command line is believed."""
    argv = ["train", "--data-dir", data, *TINY, "--output", tmp_path, "--experiment", "run", "--epochs", 1]
    assert main([*map(str, argv), "--imports", str(own)]) == 0
    (trap := tmp_path / "trap.py").write_text("raise SystemExit('run by a checkpoint')")
    last = tmp_path / "run" / "last.pth"
    content = torch.load(last, weights_only=True)
    content["args"]["imports"] = [str(trap)]
    torch.save(content, last)
    assert main([*map(str, argv), "--epochs", "2", "--resume"]) == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.py", None, "There is no file missing.py for --imports"),
        ("./no_such_file", None, "There is no module ./no_such_file for --imports: give a file, FILE.py, or"),
        ("no_such_package.models", None, "There is no module no_such_package.models for --imports: give a file, FILE"),
        ("faulty.py", "def f(:", "Cannot import faulty.py: SyntaxError: invalid syntax (faulty.py, line 1)."),
        ("failing.py", "\n1 / 0", "Cannot import failing.py: ZeroDivisionError: division by zero ("),
        ("reading.py", "import json\njson.loads('')", "reading.py, line 2)."),
        ("dotted.name.py", "", "dotted.name is no name of a module, for its dot; rename it."),
        ("ending.py", "raise SystemExit(3)", "Cannot import ending.py: SystemExit: 3 ("),
        ("json.py", "", "has its name; rename the file"),
        ("sys.py", "", "a module of Python has its name; rename the file"),
    ],
)
def test_what_cannot_be_imported_is_told_in_one_line(name, content, words, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    (tmp_path / "x.png").touch()
    error = fails("predict", "x.png", "--model", "test_vim2", "--pretrained", "--imports", name)
    assert words in error
