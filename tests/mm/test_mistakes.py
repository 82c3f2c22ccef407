"""What a user may get wrong: one line that names it, and exit code 2."""

from common.command import run_tool

import functools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from mm_helpers import ROOT, TOOLS, call, make_data, write_config
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import TRANSFORMS
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from vim2.command.errors import UserError
from vim2.mm.backbone import ViM2
from vim2.mm.channels import check_channels
from vim2.mm.commands import test as evaluate
from vim2.mm.commands import train
from vim2.mm.runner import run_errors


@pytest.fixture
def complaint(capfd):
    """What a tool says on stderr."""

    def run(main, *argv):
        code = None

        def keep(arguments):
            nonlocal code
            call(main, *arguments)

        code = run_tool(keep, argv)
        error = capfd.readouterr().err
        assert code == 2 and "Traceback" not in error
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


CONFIGS = {
    "model = dict(": "SyntaxError",
    "model = nothing": "NameError",
    "x = 1 / 0": "ZeroDivisionError",
    "_base_ = './config.py'": "it is among its own bases",
    "_base_ = './none.py'": "none.py",
    "": "has no model",
    "model = 'ViM2'": "has no model",
    "model = dict(type='BaseModel')\ntrain_cfg = dict(max_epochs=1)": "train_dataloader",
}


@pytest.mark.parametrize("text", CONFIGS)
def test_a_config_that_is_none(text, complaint, tmp_path, request):
    request.addfinalizer(functools.partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(400)  # else it takes seconds to reach
    (tmp_path / "config.py").write_text(text)
    assert CONFIGS[text] in complaint(train, tmp_path / "config.py", "--work-dir", tmp_path / "run")


def test_a_config_for_training_alone(complaint, tmp_path):
    (tmp_path / "config.py").write_text("model = dict(type='BaseModel')")
    assert "has no test_dataloader" in complaint(evaluate, tmp_path / "config.py", "none.pth", "--show-dir", "pictures")


OPTIONS = {
    "train_dataloader.batch_size=0": "batch_size should be a positive integer",
    "train_dataloader.num_workers=-1": "num_workers",
    "train_dataloader.sampler.type=Nothing": "Nothing",
    "train_dataloader.dataset.type=Nothing": "Nothing",
    "optim_wrapper.optimizer.lr=nan": "optim_wrapper.optimizer.lr is nan",
    "optim_wrapper.optimizer.weight_decay=inf": "optim_wrapper.optimizer.weight_decay is inf",
    "optim_wrapper.optimizer.lr=-1": "Invalid learning rate: -1",
    "optim_wrapper.optimizer.type=Nothing": "the optim_wrapper with the optimizer Nothing cannot be built",
    "optim_wrapper.optimizer=1": "optim_wrapper",
    "optim_wrapper.constructor=LearningRateDecayOptimizerConstructor optim_wrapper.paramwise_cfg.decay_rate=0.9 "
    "optim_wrapper.paramwise_cfg.decay_type=layer_wise optim_wrapper.paramwise_cfg.num_layers=6": (
        "LearningRateDecayOptimizerConstructor, does not know the model's backbone. A ViM2's layers are known to "
    ),
    "param_scheduler.0.begin=nan": "param_scheduler.0.begin is nan",
    "param_scheduler.9.begin=1": "--cfg-options does not fit",
    "train_cfg.max_iters=1.5": "max_iters",
    "train_cfg=None": "has no train_cfg",
    "model.decode_head.type=Nothing": "Nothing",
    "model.backbone.in_chans=1": "model.data_preprocessor has a mean of 3 values, and model.backbone.in_chans is 1",
    "model.auxiliary_head.num_convs=-1": "AssertionError: assert num_convs >= 0 and",
    "custom_hooks=[dict(type='EMAHook',momentum=0.1)]": "--cfg-options takes no dict(...), got custom_hooks=[dict(",
    "model.backbone.arch=nano": "decode_head.in_channels is (8, 8, 16, 16) (in_index [0, 1, 2, 3]), and model.b",
    "model.backbone.out_indices=(0,1,2)": "model.backbone gives maps of (8, 8, 16) channels",
    "model.auxiliary_head.in_index=7": "model.auxiliary_head.in_channels is 16 (in_index 7), and model.backbone gives",
    "model.auxiliary_head.in_channels=9": "model.auxiliary_head.in_channels is 9",
    "model.backbone.init_cfg.checkpoint=a.pth": "init_cfg has no type",
    "model.backbone.init_cfg.type=Pretraned": "init_cfg has the type 'Pretraned', which there is not",
    "model.backbone.init_cfg.type=Pretrained": "init_cfg has no checkpoint",
    "default_scope=nothing": "nothing, which is not installed",
    "custom_imports.imports=nowhere": "--cfg-options custom_imports: Failed to import nowhere",
    "custom_imports=3": "--cfg-options custom_imports",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_setting_that_cannot_be(option, complaint, configs, tmp_path):
    folder = tmp_path / "work_dirs" / "run"
    (tmp_path / "mine.txt").write_text("")
    assert OPTIONS[option] in complaint(train, configs["mmseg"], "--work-dir", folder, "--cfg-options", *option.split())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_neck_for_another_backbone(complaint, configs, tmp_path):
    option = "model.backbone.out_indices=(1,2,3)"
    said = complaint(train, configs["mmdet"], "--work-dir", tmp_path / "run", "--cfg-options", option)
    assert "model.neck.in_channels is (8, 8, 16, 16), and model.backbone gives maps of (8, 16, 16) channels" in said


def test_necks_and_heads_that_fit():
    model = torch.nn.Module()
    model.backbone = ViM2(arch=dict(depths=[1] * 3, dims=(16, 16, 32), channel_expand=2), out_indices=(0, 1, 2))
    for part in (
        dict(neck=[dict(in_channels=[16, 16, 32]), dict(in_channels=256)], decode_head=dict(in_channels=256)),
        dict(neck=dict(in_channels=[32, 16, 16])),  # YOLOv3's, which reads the last map first
        dict(neck=dict(in_channels=32), panoptic_head=dict(in_channels=[1])),
        dict(neck=dict(embed_dim=8)),
        dict(decode_head=[dict(in_channels=32), dict(in_channels=[16], in_index=[0])], auxiliary_head=None),
        dict(decode_head=dict(in_channels=16, in_index=1), auxiliary_head=[dict(in_channels=16, in_index=0)]),
        dict(panoptic_head=dict(in_channels=[16, 16, 32])),
    ):
        check_channels(part, model)
    with pytest.raises(UserError, match="panoptic_head"):
        check_channels(dict(panoptic_head=dict(in_channels=[16, 16])), model)


def test_images_of_one_channel():
    model = torch.nn.Module()
    model.backbone = ViM2(arch=dict(depths=(1,), dims=(16,), channel_expand=2), in_chans=1, out_indices=(0,))
    for options in (dict(mean=[1.0], std=[2.0]), {}):
        model.data_preprocessor = ImgDataPreprocessor(**options)
        check_channels({}, model)
    model.data_preprocessor = ImgDataPreprocessor(mean=[1.0], std=[2.0], bgr_to_rgb=True)
    with pytest.raises(UserError, match="changes the order of three colours"):
        check_channels({}, model)


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 3, 20, 64)])
def test_images_that_the_backbone_refuses(shape, complaint):
    """Which a step finds out, in training as in testing; other ValueErrors are programming errors."""
    backbone = ViM2(arch=dict(depths=(1,), dims=(16,), channel_expand=2), out_indices=(0,))

    def learn(argv):
        with run_errors():
            backbone(torch.zeros(shape))

    assert "model.backbone cannot take what the pipeline gives: " in complaint(learn)
    with pytest.raises(ValueError, match="another") as error, run_errors():
        raise ValueError("another")
    assert not isinstance(error.value, UserError)


def test_a_test_that_cannot_start_leaves_no_folder(complaint, configs, tmp_path):
    folder = tmp_path / "work_dirs" / "run"
    assert "no checkpoint at" in complaint(evaluate, configs["mmseg"], "none.pth", "--work-dir", folder)
    assert not any(tmp_path.iterdir())


def test_options_without_a_value(configs):
    with pytest.raises(UserError, match=r"takes KEY=VALUE, got model.backbone.arch \(see vim2 mm train --help\)"):
        call(train, configs["mmseg"], "--cfg-options", "model.backbone.arch")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"images": [{"id": 0}], "annotations": [], "categories": []}'])
def test_a_broken_file_of_annotations(text, complaint, tmp_path):
    data = make_data(tmp_path / "data")
    (data / "broken.json").write_text(text)
    config = write_config(tmp_path / "config.py", "mmdet", data)
    option = "{}_dataloader.dataset.ann_file=broken.json"
    for split in ("train", "val"):
        line = complaint(train, config, "--work-dir", tmp_path / "run", "--cfg-options", option.format(split))
        assert f"{split}_dataloader" in line or "no image for training is left" in line
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind, workers, damage", [("mmdet", 0, "cut"), ("mmdet", 0, "missing"), ("mmseg", 1, "empty")])
def test_an_image_that_cannot_be_read(kind, workers, damage, complaint, tmp_path):
    data = make_data(tmp_path / "data", number=2)
    config = write_config(tmp_path / "config.py", kind, data, workers)
    path = data / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:300] if damage == "cut" else b"")
    if damage == "missing":
        path.unlink()
    assert "images/1.png cannot be used" in complaint(train, config, "--work-dir", tmp_path / "run")


@pytest.mark.parametrize(
    "backend, dtype, word",
    [
        ("cv2", "float32", "has floating-point pixels"),
        ("cv2", "int32", "has 32-bit pixels"),
        ("pillow", "float32", "has floating-point pixels"),
        ("pillow", "uint16", "has 16 bits a pixel, which are not read by imdecode_backend='pillow'"),
    ],
)
def test_pixels_that_would_be_cut_off(backend, dtype, word, complaint, tmp_path):
    data = make_data(tmp_path / "data", number=2)
    values = np.linspace(0, 1 if dtype == "float32" else np.iinfo(dtype).max, 64 * 64).reshape(64, 64)
    for path in list((data / "images").iterdir()):
        Image.fromarray(values.astype(dtype)).save(path.with_suffix(".tif"))
        path.unlink()
    extra = f"train_pipeline[0]['imdecode_backend'] = {backend!r}\nfor loader in (train_dataloader, val_dataloader):\n"
    extra += "    loader['dataset']['img_suffix'] = '.tif'\n"
    line = complaint(train, write_config(tmp_path / "c.py", "mmseg", data, extra=extra), "--work-dir", tmp_path / "run")
    assert ".tif cannot be used" in line and word in line


def test_16_bits_are_scaled_and_floats_may_be_read_as_they_are(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "a.tif")
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "b.png")
    read = TRANSFORMS.build(dict(type="LoadImageFromFile"))
    pixels = read(dict(img_path=str(tmp_path / "a.tif")))["img"]
    assert pixels.dtype == np.uint8 and np.abs(pixels - ramp[..., None] / 257).max() < 1
    pillow = TRANSFORMS.build(dict(type="LoadImageFromFile", imdecode_backend="pillow"))
    path = dict(img_path=str(tmp_path / "b.png"))
    assert np.array_equal(pillow(dict(path))["img"], read(dict(path))["img"])
    whole = TRANSFORMS.build(dict(type="LoadImageFromFile", imdecode_backend="pillow", color_type="unchanged"))
    assert whole(dict(img_path=str(tmp_path / "a.tif")))["img"].max() == 65535


def test_a_label_out_of_range(complaint):
    """In a map that was not among those looked at."""

    def learn(argv):
        with run_errors():
            torch.nn.functional.cross_entropy(torch.zeros(1, 2), torch.tensor([7]))

    assert "a label of the data is not among the model's classes: Target 7 is out of bounds" in complaint(learn)


def test_parameters_without_a_gradient_in_several_processes():
    """As those of a stage that is put out and used by no head."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(
            torch.nn.ModuleDict({name: torch.nn.Linear(1, 1) for name in ("used", "spare")})
        )
        model.module.forward = lambda x: model.module["used"](x)
        with pytest.raises(UserError, match=r"no head uses out of model\.backbone\.out_indices"), run_errors():
            for _ in range(2):
                model(torch.ones(1, 1)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_a_full_disk(complaint, configs, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    line = complaint(train, configs["mmseg"], "--work-dir", tmp_path)
    assert "No space left on device" in line and line.endswith("make room.")


def test_ctrl_c(capsys):
    def stop(argv):
        raise KeyboardInterrupt

    assert run_tool(stop) == 130 and capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize(
    "tool", [["train.py"], ["test.py"], ["classify.py", "train"], ["benchmark.py"]], ids=lambda tool: tool[0]
)
def test_ctrl_c_while_modules_are_loaded(tool, tmp_path):
    """torch, here, sends it to itself: what else would be loaded would take too long to hit."""
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    # a program in the background ignores Ctrl-C, and so would those that it starts
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, TOOLS / tool[0], *tool[1:]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, preexec_fn=heed)
    assert done.returncode == 130 and done.stderr == "stopped\n"
