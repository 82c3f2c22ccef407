"""From a config to a trained, evaluated, resumed, tested and drawn model, in one process and in several."""

from common.command import run_tool

import gc
import json
import os
import pickle
import re
import shutil
import socket
import weakref
import zipfile

import numpy as np
import pytest
import torch
from mm_helpers import ROOT, SIDE, TOOLS, annotation, call, make_data, metrics, run, write_config, write_instances
from mmengine.config import Config
from PIL import Image
from two_processes import start_two

from vim2.command.errors import UserError
from vim2.mm.commands import predict as demo
from vim2.mm.commands import test as evaluate
from vim2.mm.commands import train
from vim2.mm.loading import allow_checkpoints

KINDS = ("mmdet", "mmseg")
LAST = {"mmdet": "epoch_1.pth", "mmseg": "iter_2.pth"}
KEYS = {"mmdet": ("coco/bbox_mAP", "coco/segm_mAP"), "mmseg": ("mIoU", "aAcc")}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, configs):
    """The work dir of a finished run for each library, not to be changed."""
    folder = tmp_path_factory.mktemp("work_dirs")
    for kind in KINDS:
        call(train, configs[kind], "--work-dir", folder / kind)
    return {kind: folder / kind for kind in KINDS}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def losses(work_dir):
    """Of every step that was logged, in the order of the runs."""
    paths = sorted(work_dir.glob("*/vis_data/scalars.json"))
    return [row for path in paths for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]


@pytest.mark.parametrize("kind", KINDS)
class TestOneProcess:
    def test_trains_and_evaluates(self, kind, trained):
        assert (trained[kind] / LAST[kind]).is_file()
        rows = losses(trained[kind])
        assert len(rows) == 2 and all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
        assert all(0 <= metrics(trained[kind])[key] <= 100 for key in KEYS[kind])

    def test_resumes_where_it_ended(self, kind, trained, configs, tmp_path):
        shutil.copytree(trained[kind], tmp_path / "run")
        key, name = {"mmdet": ("max_epochs", "epoch_2.pth"), "mmseg": ("max_iters", "iter_4.pth")}[kind]
        options = [f"train_cfg.{key}={2 if kind == 'mmdet' else 4}", "train_cfg.val_interval=10"]
        call(train, configs[kind], "--work-dir", tmp_path / "run", "--resume", "--cfg-options", *options)
        assert [row["step"] for row in losses(tmp_path / "run")] == [1, 2, 3, 4]
        paths = trained[kind] / LAST[kind], tmp_path / "run" / name
        allow_checkpoints()  # once more: the forks of MMEngine have taken it back in loading
        before, after = (torch.load(path, map_location="cpu") for path in paths)
        steps = [next(iter(c["optimizer"]["state"].values()))["step"].item() for c in (before, after)]
        assert steps == [2, 4]
        assert len(after["message_hub"]["log_scalars"]["train/loss"].data[0]) == 4  # the history went on, too

    def test_testing_gives_what_validation_gave(self, kind, trained, configs, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        out = tmp_path / ("predictions.pkl" if kind == "mmdet" else "maps")
        argv = [configs[kind], trained[kind] / LAST[kind], "--work-dir", "run", "--out", out]
        call(evaluate, *argv, "--show-dir", "pictures")
        path = next(tmp_path.glob("run/*/*.json"))
        result, expected = json.loads(path.read_text()), metrics(trained[kind])
        assert {key: result[key] for key in KEYS[kind]} == {key: expected[key] for key in KEYS[kind]}
        assert len(list(tmp_path.glob("pictures/**/*.png"))) == 4
        if kind == "mmdet":
            predictions = pickle.loads(out.read_bytes())
            assert len(predictions) == 4 and "masks" in predictions[0]["pred_instances"]
        else:
            assert np.unique(np.asarray(Image.open(out / "0.png"))).max() <= 1

    def test_outputs_do_not_replace_the_data(self, kind, trained, configs, data, tmp_path):
        before = {path: path.read_bytes() for path in data.rglob("*.png")}
        option, folder = {"mmdet": ("--show-dir", "images"), "mmseg": ("--out", "maps")}[kind]
        argv = [configs[kind], trained[kind] / LAST[kind], "--work-dir", tmp_path / "run", option, data / folder]
        with pytest.raises(UserError, match=f"{option} .* holds what is tested on, which would be written over"):
            call(evaluate, *argv)
        assert {path: path.read_bytes() for path in data.rglob("*.png")} == before

    def test_nor_the_files_that_the_data_are_links_to(self, kind, trained, configs, data, tmp_path):
        option, folder = {"mmdet": ("--show-dir", "images"), "mmseg": ("--out", "maps")}[kind]
        linked = tmp_path / "linked"
        shutil.copytree(data, linked, copy_function=os.symlink)
        argv = [configs[kind], trained[kind] / LAST[kind], "--work-dir", tmp_path / "run", option, data / folder]
        with pytest.raises(UserError, match=f"{option} .* holds what is tested on"):
            call(evaluate, *argv, "--cfg-options", f"test_dataloader.dataset.data_root={linked}")

    @pytest.mark.parametrize("option", ["--out", "--show-dir"])
    def test_outputs_that_cannot_be_written_cost_no_testing(
        self, kind, option, trained, configs, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("mmengine.runner.Runner.test", lambda runner: pytest.fail("it was tested"))
        (tmp_path / "file").touch()
        argv = [configs[kind], trained[kind] / LAST[kind], "--work-dir", tmp_path / "run"]
        with pytest.raises(UserError, match=rf"Nothing can be written into .*file.*: choose another {option}"):
            call(evaluate, *argv, option, tmp_path / "file" / "inside" / "out.pkl")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_draws_images(self, kind, trained, configs, data, tmp_path, capsys):
        argv = ["--config", configs[kind], "--checkpoint", trained[kind] / LAST[kind], "--out-dir", tmp_path]
        call(demo, data / "images", data / "images" / "0.png", *argv, "--score-thr", "0")
        assert [path.name for path in sorted(tmp_path.iterdir())] == [f"{i}.png" for i in range(4)]
        drawn = np.asarray(Image.open(tmp_path / "0.png").convert("RGB"))
        plain = np.asarray(Image.open(data / "images" / "0.png"))
        assert drawn.shape[0] >= SIDE and (drawn.shape != plain.shape or (drawn != plain).any())
        if kind == "mmdet":
            assert re.search(r"0\.png: [1-9]\d* objects", capsys.readouterr().out)

    def test_draws_upright_and_leaves_out_what_is_hidden(self, kind, trained, configs, tmp_path, capsys):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned to the right
        (tmp_path / "in").mkdir()
        Image.new("RGB", (96, 64)).save(tmp_path / "in" / "turned.jpg", exif=exif)
        Image.fromarray(np.linspace(0, 65535, 64 * 96, dtype=np.uint16).reshape(64, 96)).save(
            tmp_path / "in" / "16.png"
        )
        for name in ("._16.png", "1.gif", "deeper/1.png"):
            (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "in" / name).write_bytes(b"no image")
        argv = ["--config", configs[kind], "--checkpoint", trained[kind] / LAST[kind], "--out-dir", tmp_path / "out"]
        call(demo, tmp_path / "in", *argv, "--score-thr", "1")
        out = capsys.readouterr().out
        assert "1 in folders of it (deeper/1.png); 1 hidden (._16.png); 1 named as other images" in out
        width, height = Image.open(tmp_path / "out" / "turned.png").size
        assert height > width
        if kind == "mmdet":  # with nothing drawn, the picture is the image
            drawn = np.asarray(Image.open(tmp_path / "out" / "16.png").convert("L"), np.int64)
            assert drawn[0, 0] == 0 and drawn[-1, -1] == 255 and abs(drawn.mean() - 127.5) < 1

    def test_a_picture_that_cannot_be_written(self, kind, trained, configs, data, tmp_path):
        (tmp_path / "0.png").mkdir()
        argv = ["--config", configs[kind], "--checkpoint", trained[kind] / LAST[kind], "--out-dir", tmp_path]
        with pytest.raises(UserError, match=r"Could not write .*0\.png .*choose another --out-dir"):
            call(demo, data / "images" / "0.png", *argv)
        assert [path.name for path in tmp_path.iterdir()] == ["0.png"]

    def test_draws_no_image_that_is_too_small(self, kind, trained, configs, tmp_path):
        Image.new("RGB", (16, 12)).save(tmp_path / "small.png")
        argv = ["--config", configs[kind], "--checkpoint", trained[kind] / LAST[kind], "--out-dir", tmp_path / "out"]
        if kind == "mmdet":  # whose images are resized first
            call(demo, tmp_path / "small.png", *argv)
        else:
            with pytest.raises(UserError, match=r"small\.png is no image for this model: .*at least 32 x 32"):
                call(demo, tmp_path / "small.png", *argv)

    def test_a_checkpoint_of_another_model(self, kind, trained, configs, tmp_path):
        other = KINDS[1 - KINDS.index(kind)]
        with pytest.raises(UserError, match="is not of this config's model"):
            call(evaluate, configs[kind], trained[other] / LAST[other], "--work-dir", tmp_path)
        with pytest.raises(UserError, match="is not of this config's model"):
            call(train, configs[kind], "--work-dir", tmp_path, "--resume", trained[other] / LAST[other])

    @pytest.mark.parametrize(
        "options, message",
        [
            (["model.backbone.arch=huge"], "There is no ViM2 of arch 'huge'"),
            (["model.backbone.out_indices=[0,1,2,4]"], "out_indices must lie within 0 to 3"),
            (["optim_wrapper.type=AmpOptimWrapper"], "needs a GPU"),
        ],
    )
    def test_bad_settings(self, kind, configs, tmp_path, options, message):
        if torch.cuda.is_available() and "GPU" in message:
            pytest.skip("there is a GPU")
        with pytest.raises(UserError, match=message):
            call(train, configs[kind], "--work-dir", tmp_path, "--cfg-options", *options)

    def test_no_checkpoint(self, kind, configs, tmp_path):
        with pytest.raises(UserError, match=r"none\.pth"):
            call(evaluate, configs[kind], tmp_path / "none.pth", "--work-dir", tmp_path)
        with pytest.raises(UserError, match=r"no checkpoint at .*none\.pth"):
            call(train, configs[kind], "--work-dir", tmp_path, "--resume", tmp_path / "none.pth")
        with pytest.raises(UserError, match=r"no checkpoint at .*none\.pth"):
            call(train, configs[kind], "--work-dir", tmp_path, "--cfg-options", f"load_from={tmp_path}/none.pth")

    def test_a_damaged_checkpoint(self, kind, trained, configs, data, tmp_path):
        path = tmp_path / "cut.pth"
        path.write_bytes((trained[kind] / LAST[kind]).read_bytes()[:1000])
        flipped = bytearray((trained[kind] / LAST[kind]).read_bytes())
        with zipfile.ZipFile(trained[kind] / LAST[kind]) as archive:
            largest = max(archive.infolist(), key=lambda info: info.file_size)
            flipped[flipped.index(archive.read(largest))] ^= 1  # one bit
        (tmp_path / "flipped.pth").write_bytes(flipped)
        (tmp_path / "text.png").write_text("no checkpoint")
        with pytest.raises(UserError, match=r"text\.png is damaged .*: it begins as no file of torch\.save does\.$"):
            call(evaluate, configs[kind], tmp_path / "text.png", "--work-dir", tmp_path)
        for name in ("cut", "flipped"):
            with pytest.raises(UserError, match=rf"{name}\.pth is damaged"):
                call(evaluate, configs[kind], tmp_path / f"{name}.pth", "--work-dir", tmp_path)
        with pytest.raises(UserError, match=r"cut\.pth is damaged"):
            call(demo, data / "images", "--config", configs[kind], "--checkpoint", path, "--out-dir", tmp_path)
        for options in (["--resume", path], ["--cfg-options", f"load_from={path}"]):
            with pytest.raises(UserError, match=r"cut\.pth is damaged"):
                call(train, configs[kind], "--work-dir", tmp_path, *options)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("default_hooks.checkpoint.save_best=mAP", r"save_best is mAP, and the validation gives aAcc, mIoU, mAcc: set"),
        ("val_evaluator.iou_metrics=['mDog']", r"evaluator cannot be used: metrics \['mDog'\] is not supported\.$"),
        ("param_scheduler.0.type=CosineLR", r"^CosineLR is not in the mmseg::parameter scheduler registry\.$"),
        ("train_cfg.max_iter=3", r"^train_cfg cannot be used: .*max_iter"),
    ],
)
def test_names_that_are_known_late(option, says, configs, tmp_path):
    with pytest.raises(UserError, match=says):
        call(train, configs["mmseg"], "--work-dir", tmp_path / "run", "--cfg-options", option)


def test_a_moving_average_is_tested(configs, tmp_path):
    """The hook has a model of its own, which the checkpoint goes into as well, and tests with that."""
    config = tmp_path / "average.py"
    config.write_text(
        f"_base_ = {str(configs['mmseg'])!r}\n"
        "custom_hooks = [dict(type='EMAHook', momentum=0.3)]\n"
        "optim_wrapper = dict(optimizer=dict(lr=0.1))\n"
        "param_scheduler = []\n"
    )
    call(train, config, "--work-dir", tmp_path / "run")
    call(evaluate, config, tmp_path / "run" / LAST["mmseg"], "--work-dir", tmp_path / "test")
    tested = json.loads(next((tmp_path / "test").glob("*/*.json")).read_text())
    assert {key: tested[key] for key in KEYS["mmseg"]} == {key: metrics(tmp_path / "run")[key] for key in KEYS["mmseg"]}


def test_segmenters_with_augmentation(trained, configs, tmp_path):
    call(evaluate, configs["mmseg"], trained["mmseg"] / LAST["mmseg"], "--work-dir", tmp_path, "--tta")
    assert "mIoU" in json.loads(next(tmp_path.glob("*/*.json")).read_text())


def test_detectors_with_augmentation(configs, tmp_path):
    """Of boxes: MMDetection cannot merge masks."""
    config = tmp_path / "boxes.py"
    config.write_text(
        f"_base_ = {str(configs['mmdet'])!r}\n"
        "model = dict(type='FasterRCNN', roi_head=dict(mask_roi_extractor=None, mask_head=None))\n"
        "val_evaluator = dict(metric='bbox')\n"
        "test_evaluator = dict(metric='bbox')\n"
    )
    call(train, config, "--work-dir", tmp_path, "--cfg-options", "train_cfg.val_interval=10")
    call(evaluate, config, tmp_path / "epoch_1.pth", "--work-dir", tmp_path / "test", "--tta")
    assert "coco/bbox_mAP" in json.loads(next((tmp_path / "test").glob("*/*.json")).read_text())
    with pytest.raises(UserError, match="MMDetection has no test-time augmentation of masks"):
        call(evaluate, configs["mmdet"], tmp_path / "epoch_1.pth", "--work-dir", tmp_path, "--tta")


def test_initial_weights_are_in_the_first_step(trained, configs, tmp_path):
    """A detector starts from a segmenter's backbone, and a file that does not fit stops it before any step."""
    pretrained = ["model.backbone.init_cfg.type=Pretrained", f"model.backbone.init_cfg.checkpoint={trained['mmseg']}"]
    options = [*pretrained[:1], f"{pretrained[1]}/iter_2.pth", "optim_wrapper.optimizer.lr=0.0"]
    call(train, configs["mmdet"], "--work-dir", tmp_path, "--cfg-options", *options, "train_cfg.val_interval=10")
    weights = [
        torch.load(path, map_location="cpu")["state_dict"]["backbone.stages.0.blocks.0.layers.0.mixer.in_proj.weight"]
        for path in (trained["mmseg"] / "iter_2.pth", tmp_path / "epoch_1.pth")
    ]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-7)  # the schedule ends at 1e-6, not quite at 0
    with pytest.raises(UserError, match="does not fit a ViM2 backbone"):
        options = [*options, "model.backbone.depths=[1,1,2,1]"]
        call(train, configs["mmdet"], "--work-dir", tmp_path / "other", "--cfg-options", *options)


def test_starting_from_a_whole_model(trained, configs, tmp_path):
    """Its heads may be others, its backbone may not."""
    last = trained["mmseg"] / "iter_2.pth"
    start = ["--work-dir", tmp_path, "--cfg-options", "train_cfg.val_interval=10"]
    call(train, configs["mmdet"], *start, f"load_from={last}", "optim_wrapper.optimizer.lr=0.0")
    name = "backbone.stages.0.blocks.0.layers.0.mixer.in_proj.weight"
    weights = [torch.load(path, map_location="cpu")["state_dict"][name] for path in (last, tmp_path / "epoch_1.pth")]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-7)  # the schedule ends at 1e-6, not quite at 0
    torch.save({"stages.0.weight": torch.ones(1)}, tmp_path / "alone.pth")
    for path, options in ((last, ["model.backbone.depths=[1,1,2,1]"]), (tmp_path / "alone.pth", [])):
        with pytest.raises(UserError, match=r"does not fit the model's backbone: of its \d+ weights, \d+ are missing"):
            call(train, configs["mmdet"], *start, f"load_from={path}", *options)
    (tmp_path / "damaged.pth").write_bytes(last.read_bytes()[:1000])
    for path, message in (("none.pth", "no checkpoint at none"), (tmp_path / "damaged.pth", "is damaged")):
        with pytest.raises(UserError, match=message):
            call(train, configs["mmdet"], *start, "model.init_cfg.type=Pretrained", f"model.init_cfg.checkpoint={path}")


def test_layer_decay_in_a_config(configs, tmp_path):
    config = tmp_path / "decay.py"
    paramwise = "dict(_delete_=True, layer_decay_rate=0.5)"
    wrapper = f"dict(constructor='ViM2LayerDecayOptimWrapperConstructor', paramwise_cfg={paramwise})"
    config.write_text(f"_base_ = {str(configs['mmseg'])!r}\noptim_wrapper = {wrapper}\n")
    call(train, config, "--work-dir", tmp_path / "run", "--cfg-options", "train_cfg.val_interval=10")
    groups = torch.load(tmp_path / "run" / "iter_2.pth", map_location="cpu")["optimizer"]["param_groups"]
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales == [0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5, 1.0]


def test_automatic_scaling_of_the_rate(configs, tmp_path):
    call(
        train, configs["mmseg"], "--work-dir", tmp_path, "--auto-scale-lr", "--cfg-options", "train_cfg.val_interval=9"
    )
    groups = torch.load(tmp_path / "iter_2.pth", map_location="cpu")["optimizer"]["param_groups"]
    assert groups[0]["initial_lr"] == pytest.approx(3e-4 * 2 / 8)


def test_objects_of_every_size_and_none(tmp_path):
    """An image without objects, one with a box of one pixel, one whose mask is empty, one that is a crowd."""
    data = make_data(tmp_path / "data")
    images = [dict(id=i, file_name=f"{i}.png", width=SIDE, height=SIDE) for i in range(4)]
    empty_mask = dict(size=[SIDE, SIDE], counts=[SIDE * SIDE])
    crowd = dict(size=[SIDE, SIDE], counts=[0, 600, SIDE * SIDE - 600])
    annotations = [
        annotation(1, 1, 1, [10, 10, 1, 1]),
        {**annotation(2, 2, 1, [5, 5, 20, 20]), "segmentation": empty_mask},
        {**annotation(3, 3, 2, [5, 5, 20, 20]), "segmentation": crowd, "iscrowd": 1},
    ]
    write_instances(data, images, annotations)
    extra = "train_dataloader['dataset'].update(filter_cfg=dict(filter_empty_gt=False, min_size=0))\n"
    config = write_config(tmp_path / "odd.py", "mmdet", data, extra=extra)
    call(train, config, "--work-dir", tmp_path / "run")
    rows = losses(tmp_path / "run")
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)


def test_no_image_has_an_object(tmp_path):
    data = make_data(tmp_path / "data")
    write_instances(data, [dict(id=i, file_name=f"{i}.png", width=SIDE, height=SIDE) for i in range(4)], [])
    config = write_config(tmp_path / "none.py", "mmdet", data)
    with pytest.raises(UserError, match="no image for training is left: none has annotations"):
        call(train, config, "--work-dir", tmp_path / "run")


@pytest.mark.parametrize("kind, name", [("mmdet", "instances.json"), ("mmseg", "0.png")])
def test_no_data(kind, name, tmp_path):
    config = write_config(tmp_path / "none.py", kind, tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        call(train, config, "--work-dir", tmp_path / "run")


def test_a_checkpoint_survives_a_write_that_fails(configs, tmp_path, monkeypatch):
    options = ["--cfg-options", "train_cfg.val_interval=10"]
    call(train, configs["mmseg"], "--work-dir", tmp_path, *options)
    before = (tmp_path / "iter_2.pth").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        call(train, configs["mmseg"], "--work-dir", tmp_path, *options)
    assert (tmp_path / "iter_2.pth").read_bytes() == before
    assert not list(tmp_path.glob(".iter*"))


def test_the_group_of_processes_ends_before_python_does():
    """Though a cycle, such as a Runner, holds it: its threads must not live on."""
    alive = []

    class Holder:
        def __init__(self):
            self.itself, self.group = self, torch.distributed.group.WORLD
            alive.append(weakref.ref(self))

    def main(argv):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        Holder()

    gc.disable()
    try:
        assert run_tool(main) == 0
    finally:
        gc.enable()
    assert alive[0]() is None and not torch.distributed.is_initialized()


class TestSeveralProcesses:
    @pytest.mark.parametrize("kind", KINDS)
    def test_training_on_cpus(self, kind, configs, tmp_path):
        if kind == "mmseg":  # as users start it
            done = run(TOOLS / "dist_train.sh", configs[kind], 2, "--work-dir", tmp_path, env={"PORT": free_port()})
            code, error = done.returncode, done.stderr
        else:
            argv = ["train", configs[kind], "--launcher", "pytorch", "--work-dir", tmp_path]
            two = start_two("vim2.mm.cli", ["vim2.mm.commands", "mmdet.models", "mmdet.datasets"], *argv)
            error = two.communicate()[1]
            code = two.returncode
        assert code == 0, error[-2000:]
        rows = losses(tmp_path)
        steps = 1 if kind == "mmdet" else 2  # four images in batches of 2, by epochs and by iterations
        assert len(rows) == steps and all(np.isfinite(row["loss"]) for row in rows)
        assert all(key in metrics(tmp_path) for key in KEYS[kind])
        assert "SyncBN" not in str(Config.fromfile(next(tmp_path.glob("*.py"))).model)

    def test_testing_on_cpus(self, trained, configs, tmp_path):
        checkpoint = trained["mmdet"] / LAST["mmdet"]
        argv = ["test", configs["mmdet"], checkpoint, "--launcher", "pytorch", "--work-dir", tmp_path]
        two = start_two("vim2.mm.cli", ["vim2.mm.commands", "mmdet.models", "mmdet.datasets"], *argv)
        error = two.communicate()[1]
        assert two.returncode == 0, error[-2000:]
        result, expected = json.loads(next(tmp_path.glob("*/*.json")).read_text()), metrics(trained["mmdet"])
        assert {key: result[key] for key in KEYS["mmdet"]} == {key: expected[key] for key in KEYS["mmdet"]}

    @pytest.mark.parametrize(("command", "given"), [("train", ["config.py"]), ("test", ["config.py", "last.pth"])])
    def test_scripts_start_what_was_asked_for(self, command, given, tmp_path):
        """Here a program that prints its arguments; dist_train.sh also starts a training above."""
        (tmp_path / "python").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
        (tmp_path / "python").chmod(0o755)
        env = {"PYTHON": str(tmp_path / "python"), "PORT": "29501"}
        done = run(TOOLS / f"dist_{command}.sh", *given, 2, "--work-dir", "work", env=env)
        words, tool = done.stdout.split("\n")[:-1], str(TOOLS / f"{command}.py")
        assert words[:2] == ["-m", "torch.distributed.run"]
        assert words[words.index(tool) :] == [tool, *given, "--launcher", "pytorch", "--work-dir", "work"]
        where = {"--nnodes=1", "--node-rank=0", "--master-addr=127.0.0.1", "--master-port=29501", "--nproc-per-node=2"}
        assert set(words[2 : words.index(tool)]) == where

    def test_spawned_workers_find_the_operators(self, data, tmp_path):
        """With a script that is not ours: only its config names vim2.mm."""
        config = write_config(tmp_path / "spawn.py", "mmdet", data, workers=1)
        (tmp_path / "script.py").write_text(
            "import sys\n"
            "from mmengine.config import Config\n"
            "from mmengine.registry import init_default_scope\n"
            "from mmengine.runner import Runner\n"
            "if __name__ == '__main__':\n"
            "    import multiprocessing\n"
            "    multiprocessing.set_start_method('spawn')\n"
            "    config = Config.fromfile(sys.argv[1])\n"
            "    init_default_scope('mmdet')\n"
            "    batches = list(Runner.build_dataloader(config.train_dataloader, seed=0))\n"
            "    print(len(batches), len(batches[0]['inputs']))\n"
        )
        done = run(tmp_path / "script.py", config)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split()[-2:] == ["2", "2"]

    @pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh", "slurm_train.sh"])
    def test_scripts_say_what_they_need(self, script):
        done = run(TOOLS / script)
        assert done.returncode == 2 and done.stderr.startswith("usage: ")

    def test_slurm_starts_what_was_asked_for(self, tmp_path):
        (tmp_path / "srun").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
        (tmp_path / "srun").chmod(0o755)
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "GPUS": "4", "SRUN_ARGS": "--time=1 --exclusive"}
        done = run(TOOLS / "slurm_train.sh", "gpus", "job", "config.py", "work", "--resume", env=env)
        words = done.stdout.split()
        assert {"--partition=gpus", "--ntasks=4", "--gres=gpu:4", "--exclusive", "--launcher=slurm"} <= set(words)
        assert words[-4:] == ["config.py", "--work-dir=work", "--launcher=slurm", "--resume"]


def test_error_is_one_line_and_exit_code_2(configs, tmp_path, capfd):
    def check(code, stderr, name):
        assert code == 2
        errors = [line for line in stderr.splitlines() if line.removeprefix("vim2: ").startswith("error: ")]
        assert len(errors) == 1 and name in errors[0] and "Traceback" not in stderr

    done = run(TOOLS / "train.py", "none.py", cwd=tmp_path)
    check(done.returncode, done.stderr, "none.py")
    weights = ["model.backbone.init_cfg.type=Pretrained", "model.backbone.init_cfg.checkpoint=none.pth"]
    argv = [configs["mmseg"], "--work-dir", tmp_path, "--cfg-options", *weights]
    code = run_tool(lambda _: call(train, *argv))
    check(code, capfd.readouterr().err, "none.pth")


def test_all_of_it_from_the_root_of_the_repository():
    """What the READMEs tell users to run names files that exist."""
    for readme in ROOT.glob("mm*_configs/README.md"):
        for word in re.findall(r"(?:tools|mm\w+_configs)/[\w./-]+\.(?:py|sh)\b", readme.read_text()):
            assert (ROOT / word).is_file(), word
