"""Runs that are cut off: what is left of them on disk, and what becomes of them when they are resumed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from mm_helpers import call, make_data, metrics, write_config
from mmengine.hooks import CheckpointHook
from mmengine.runner import ValLoop

from vim2.command.errors import UserError
from vim2.mm.checkpoint_hook import find_newest_checkpoint
from vim2.mm.commands import train
from vim2.mm.loading import allow_checkpoints

EVERY_STEP = [f"default_hooks.checkpoint.{key}" for key in ("interval=1", "by_epoch=False", "max_keep_ckpts=-1")]
NO_VALIDATION = [f"val_{part}=None" for part in ("cfg", "dataloader", "evaluator")]
RANDOM = """
backbone = model["backbone"]
backbone["drop_path_rate"] = 0.5
pipeline = train_dataloader["dataset"]["pipeline"]
pipeline[2:2] = [dict(type="RandomFlip", prob=0.5), dict(type="PhotoMetricDistortion")]
"""


def read(path):
    allow_checkpoints()  # once more: the forks of MMEngine have taken it back in loading
    return torch.load(path, map_location="cpu")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind, length", [("mmdet", "train_cfg.max_epochs=2"), ("mmseg", "train_cfg.max_iters=4")])
def test_a_resumed_run_ends_with_the_same_weights(kind, length, workers, data, tmp_path):
    """By epochs (two of two steps) and by iterations, with models and images that are changed at random, from a
    checkpoint within an epoch or between two; without a seed in the config, from the one that the first run drew."""
    config = write_config(tmp_path / "config.py", kind, data, workers, RANDOM)
    seed = [] if workers else ["randomness.seed=None"]
    options = ["--cfg-options", length, *EVERY_STEP, *NO_VALIDATION, *seed]
    call(train, config, "--work-dir", tmp_path / "whole", *options)
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "whole" / f"iter_{1 if workers else 2}.pth", tmp_path / "cut")
    call(train, config, "--work-dir", tmp_path / "cut", "--resume", *options)
    whole, resumed = (read(tmp_path / run / "iter_4.pth") for run in ("whole", "cut"))
    assert [name for name, value in whole["state_dict"].items() if not value.equal(resumed["state_dict"][name])] == []
    assert (whole["meta"]["epoch"], whole["meta"]["iter"]) == (resumed["meta"]["epoch"], resumed["meta"]["iter"])
    losses = [c["message_hub"]["log_scalars"]["train/loss"].data[0].tolist() for c in (whole, resumed)]
    assert losses[0] == losses[1] and len(set(losses[0])) == 4


class Stopped(Exception):
    pass


@pytest.fixture
def stop_before(monkeypatch):
    """Cuts a run off when it is about to put a file in its place."""

    def stop(name):
        replace = os.replace

        def check(source, target):
            if Path(target).name == name:
                raise Stopped
            return replace(source, target)

        monkeypatch.setattr("os.replace", check)

    return stop


class TestOneCheckpointIsKept:
    OPTIONS = ("--cfg-options", "default_hooks.checkpoint.max_keep_ckpts=1", "train_cfg.max_iters=3", *NO_VALIDATION)

    @pytest.mark.parametrize("name, left", [("iter_2.pth", 1), ("last_checkpoint", 0)])
    def test_the_old_one_stays_until_the_new_one_stands(self, name, left, configs, tmp_path, stop_before, monkeypatch):
        stop_before(name)
        with pytest.raises(Stopped):
            call(train, configs["mmseg"], "--work-dir", tmp_path, *self.OPTIONS)
        monkeypatch.undo()
        assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_1.pth"]
        assert (tmp_path / "last_checkpoint").is_file() == bool(left)
        call(train, configs["mmseg"], "--work-dir", tmp_path, "--resume", *self.OPTIONS)
        assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_3.pth"]
        assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "iter_3.pth")
        logs = "".join(path.read_text() for path in tmp_path.glob("*/vis_data/scalars.json"))
        steps = [json.loads(line)["step"] for line in logs.splitlines()]
        assert sorted(steps)[-2:] == [2, 3] and steps.count(1) == 1  # the first step was not made again

    def test_the_old_one_goes_when_a_run_is_resumed_that_was_killed_before_it_went(
        self, configs, tmp_path, monkeypatch
    ):
        def stop(path, *args):
            raise Stopped

        monkeypatch.setattr("os.remove", stop)
        with pytest.raises(Stopped):
            call(train, configs["mmseg"], "--work-dir", tmp_path, *self.OPTIONS)
        monkeypatch.undo()
        assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["iter_1.pth", "iter_2.pth"]
        call(train, configs["mmseg"], "--work-dir", tmp_path, "--resume", *self.OPTIONS)
        assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_3.pth"]

    def test_the_best_one_stays_until_a_better_one_stands(self, configs, tmp_path, stop_before, monkeypatch):
        options = ["default_hooks.checkpoint.save_best=mIoU", "train_cfg.val_interval=1"]
        monkeypatch.setitem(CheckpointHook.rule_map, "greater", lambda new, old: True)
        stop_before("best_mIoU_iter_2.pth")
        with pytest.raises(Stopped):
            call(train, configs["mmseg"], "--work-dir", tmp_path, "--cfg-options", *options)
        assert [path.name for path in tmp_path.glob("best*")] == ["best_mIoU_iter_1.pth"]
        monkeypatch.undo()
        monkeypatch.setitem(CheckpointHook.rule_map, "greater", lambda new, old: True)
        call(train, configs["mmseg"], "--work-dir", tmp_path, "--cfg-options", *options)
        assert sorted(path.name for path in tmp_path.glob("best*"))[-1] == "best_mIoU_iter_2.pth"


def test_what_a_killed_run_was_writing_is_removed(configs, tmp_path):
    half = tmp_path / f".iter_7.pth.{'0f' * 16}"
    half.write_bytes(b"half of it")
    call(train, configs["mmseg"], "--work-dir", tmp_path, "--cfg-options", *NO_VALIDATION, "train_cfg.max_iters=1")
    assert not half.exists() and (tmp_path / "iter_1.pth").is_file()


@pytest.mark.parametrize("kind", ["mmdet", "mmseg"])
def test_a_run_that_was_cut_off_in_validation(kind, configs, tmp_path, monkeypatch):
    """Is validated when it is resumed, once."""

    def stop(loop):
        raise Stopped

    monkeypatch.setattr(ValLoop, "run", stop)
    with pytest.raises(Stopped):
        call(train, configs[kind], "--work-dir", tmp_path)
    monkeypatch.undo()
    option = f"default_hooks.checkpoint.save_best={'coco/bbox_mAP' if kind == 'mmdet' else 'mIoU'}"
    call(train, configs[kind], "--work-dir", tmp_path, "--resume", "--cfg-options", option)
    assert ("coco/bbox_mAP" if kind == "mmdet" else "mIoU") in metrics(tmp_path)
    assert len(list(tmp_path.glob("best_*.pth"))) == 1
    logs = set(tmp_path.glob("*/vis_data/scalars.json"))
    call(train, configs[kind], "--work-dir", tmp_path, "--resume", "--cfg-options", option)
    assert set(tmp_path.glob("*/vis_data/scalars.json")) == logs


class TestNewestCheckpoint:
    @pytest.fixture
    def work_dir(self, tmp_path):
        """Of a run whose checkpoints are numbered as they were written, and that has named its second one."""
        for i in (1, 2, 3):
            path = tmp_path / f"epoch_{i}.pth"
            torch.save({"meta": {}, "message_hub": {}, "state_dict": {}}, path)
            os.utime(path, (i, i))
        torch.save({"meta": {}, "message_hub": {}, "state_dict": {}}, tmp_path / "best_epoch_1.pth")
        self.name_last(tmp_path, 2.5, "/moved/epoch_2.pth")
        return tmp_path

    def name_last(self, work_dir, time, name):
        (work_dir / "last_checkpoint").write_text(name)
        os.utime(work_dir / "last_checkpoint", (time, time))

    def newest(self, work_dir):
        found = find_newest_checkpoint(str(work_dir))
        return found and Path(found).name

    def test_one_written_just_before_the_run_was_cut_off(self, work_dir):
        assert self.newest(work_dir) == "epoch_3.pth"

    def test_the_named_one_where_others_are_of_an_older_run(self, work_dir):
        self.name_last(work_dir, 4, str(work_dir / "epoch_2.pth"))
        assert self.newest(work_dir) == "epoch_2.pth"

    @pytest.mark.parametrize("name", ["", "epoch_9.pth"])
    def test_a_name_of_nothing(self, work_dir, name):
        self.name_last(work_dir, 4, name)
        assert self.newest(work_dir) == "epoch_3.pth"

    def test_damaged_ones_are_passed_over_with_a_word(self, work_dir, capsys):
        for i in (3, 2):
            path = work_dir / f"epoch_{i}.pth"
            path.write_bytes(path.read_bytes()[:200])
            os.utime(path, (i, i))
        assert self.newest(work_dir) == "epoch_1.pth"
        assert (
            capsys.readouterr().err == "epoch_3.pth and epoch_2.pth cannot be read: the run goes on from epoch_1.pth.\n"
        )

    def test_all_are_damaged(self, work_dir):
        for path in work_dir.glob("epoch*"):
            path.write_bytes(b"")
        with pytest.raises(UserError, match="None of the 3 checkpoints in"):
            find_newest_checkpoint(str(work_dir))

    def test_there_is_none(self, tmp_path):
        assert find_newest_checkpoint(str(tmp_path)) is None


def test_other_images_are_refused(configs, tmp_path):
    options = ["--cfg-options", *NO_VALIDATION, "train_cfg.max_iters=1"]
    call(train, configs["mmseg"], "--work-dir", tmp_path / "run", *options)
    config = write_config(tmp_path / "more.py", "mmseg", make_data(tmp_path / "data", number=5))
    with pytest.raises(UserError, match=r"iter_1\.pth is of a training on 4 images, and train_dataloader now has 5"):
        call(train, config, "--work-dir", tmp_path / "run", "--resume", *options)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["mmdet", "mmseg"])
def test_samples_for_which_shared_memory_has_no_room_are_told(kind, configs, tmp_path, fill_shared_memory):
    """PyTorch alone would wait for them forever."""
    fill_shared_memory()
    options = ["--cfg-options", *NO_VALIDATION, "train_dataloader.num_workers=2"]
    with pytest.raises(UserError, match=r"shared memory .*No space left.*: use fewer num_workers") as caught:
        call(train, configs[kind], "--work-dir", tmp_path / "run", *options)
    assert caught.value.one_process
