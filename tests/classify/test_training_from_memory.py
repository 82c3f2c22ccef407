"""The commands on packs, and on class folders with --in-memory."""

import json

import numpy as np
import pytest
import torch
from classify_helpers import TINY, make_pack, pack_folders
from devices import needs_gpu
from two_processes import start_two

from vim2.classify import UserError, predict, train, validate
from vim2.classify.training import Run
from vim2.command.processes import Processes

LEARNT = ("train_loss", "val_loss", "ema_val_loss", "top1", "ema_top1", "lr")
RANDOM = [
    *("--mixup", "0.8", "--cutmix", "1.0", "--reprob", "0.5", "--recount", "2", "--scale", "0.3", "1"),
    *("--drop-path", "0.2", "--drop", "0.1", "--model-ema", "--model-ema-decay", "0.9"),
    *("--grad-accum-steps", "3", "--clip-grad", "1", "--aa", "rand-m9-mstd0.5-inc1"),
]


@pytest.fixture(scope="module")
def pack(data, tmp_path_factory):
    """The tests' class folders as a pack with both splits."""
    return pack_folders(data, tmp_path_factory.mktemp("packs") / "colours.npz")


def learnt(run):
    return [{name: row[name] for name in LEARNT if name in row} for row in run["history"]]


def test_a_run_on_a_pack_goes_on_exactly(pack, tmp_path, monkeypatch):
    argv = ["--data-dir", str(pack), *TINY, *RANDOM, "--epochs", "3", "--output", str(tmp_path), "--experiment"]
    whole = train([*argv, "whole"])
    train_epoch = Run.train_epoch

    def stop_in_the_second(run, epoch):
        row = train_epoch(run, epoch)
        if epoch == 1:
            raise KeyboardInterrupt
        return row

    with monkeypatch.context() as context:
        context.setattr(Run, "train_epoch", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            train([*argv, "cut"])
    cut = train([*argv, "cut", "--resume"])
    assert learnt(cut) == learnt(whole) and len(learnt(cut)) == 3
    last = [torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("cut", "whole")]
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(last[0][key][name], value) for name, value in last[1][key].items())


def test_no_image_is_decoded_for_a_folder_that_cannot_be_written(pack, tmp_path, monkeypatch):
    monkeypatch.setattr("vim2.classify.memory.train_loader", lambda *_, **__: pytest.fail("images were decoded"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Nothing can be written into .*: choose another --output"):
        train(["--data-dir", str(pack), *TINY, "--output", str(tmp_path / "file")])


def test_a_run_on_a_pack_learns_and_serves_everything_else(pack, data, tmp_path, capsys):
    argv = ["--data-dir", str(pack), *TINY, "--output", str(tmp_path), "--lr", "3e-3", "--warmup-epochs", "0"]
    run = train([*argv, "--epochs", "3", "--scale", "0.5", "1", "--color-jitter", "0.1"])
    out = capsys.readouterr().out
    assert "36 images to train on in memory, 36 x 40 pixels as they are" in out
    assert run["folder"] == str(tmp_path / "test_vim2-colours")
    assert run["best"]["top1"] > 60  # chance is 33
    checkpoint = f"{run['folder']}/best.pth"
    options = dict(checkpoint=checkpoint, workers=2, output=str(tmp_path), device="cpu", batch_size=8)
    scores = validate(data_dir=str(pack), **options)[0]
    assert scores["images"] == 15 and scores["top1"] == run["best"]["top1"]
    assert scores["loss"] == pytest.approx(run["best"]["val_loss"], rel=1e-5)
    found = predict(images=[str(data / "val" / "red" / "0.png")], checkpoint=checkpoint, output=str(tmp_path))
    assert {top["label"] for top in found[0]["top"]} == {"red", "green", "blue"}


def test_a_pack_is_trained_on_with_the_recipe(pack, tmp_path):
    argv = ["--data-dir", str(pack), *TINY, "--recipe", "imagenet", "--epochs", "1", "--output", str(tmp_path)]
    run = train(argv)
    assert json.loads((tmp_path / "test_vim2-colours" / "metrics.json").read_text())["args"]["aa"].startswith("rand-m9")
    assert run["history"][0]["train_loss"] > 0


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "3a"])
def test_policies_from_class_folders_in_memory(data, tmp_path, policy):
    argv = ["--data-dir", str(data), "--in-memory", *TINY, "--in-chans", "1", "--aa", policy]
    run = train([*argv, "--epochs", "1", "--output", str(tmp_path)])
    assert run["history"][0]["train_loss"] > 0


def test_accuracy_from_memory_is_that_from_files(data, pack, trained, tmp_path):
    options = dict(checkpoint=str(trained / "best.pth"), img_size=[32, 48], batch_size=4, device="cpu")
    files, held, packed = (
        validate(data_dir=str(source), workers=0, in_memory=in_memory, output=str(tmp_path), **options)
        for source, in_memory in ((data, False), (data, True), (pack, False))
    )
    for row, row_held, row_packed in zip(files, held, packed, strict=True):
        for name in ("img_size", "loss", "top1", "top5", "images"):
            assert row[name] == row_held[name] == row_packed[name]


def test_shards_in_a_folder(data, tmp_path, trained):
    """Joined shards hold what the folders hold; classes of a part of the data are matched by name."""
    folder = tmp_path / "packs"
    for number, split in enumerate(("train", "val")):
        pack_folders(data, folder / f"train-{number}.npz", splits=(split,), with_split=False)
    val = pack_folders(data, folder / "check.npz", splits=("val",), with_split=False)
    argv = ["--data-dir", str(folder), "--train-split", "train-*.npz", "--val-split", "check.npz", *TINY]
    run = train([*argv, "--epochs", "1", "--output", str(tmp_path)])
    assert "unreadable" in run["history"][0]
    rows = [
        validate(data_dir=str(source), split=split, checkpoint=str(trained / "best.pth"), output=str(tmp_path))[0]
        for source, split in ((folder, "check.npz"), (val, "validation"))
    ]
    assert rows[0]["images"] == 15 and rows[0]["loss"] == rows[1]["loss"]


def test_a_pack_without_splits(data, tmp_path):
    """A fifth of each class is set aside, the same for training and for validation afterwards."""
    flat = pack_folders(data, tmp_path / "flat.npz", splits=("train",), with_split=False)
    run = train(["--data-dir", str(flat), *TINY, "--epochs", "1", "--output", str(tmp_path)])
    scores = validate(data_dir=str(flat), checkpoint=f"{run['folder']}/best.pth", output=str(tmp_path), device="cpu")
    assert scores[0]["images"] == 6
    assert scores[0]["loss"] == pytest.approx(run["history"][0]["val_loss"], rel=1e-5)
    options = dict(data_dir=str(flat), checkpoint=f"{run['folder']}/best.pth", output=str(tmp_path), device="cpu")
    assert validate(split="train", **options)[0]["images"] == 30


def test_unreadable_images_of_a_pack_are_named_and_counted(data, tmp_path, capsys):
    whole = np.load(pack_folders(data, tmp_path / "whole.npz"))
    arrays = {name: whole[name].copy() for name in whole.files}
    for i in (7, 40):  # one to train on, one to validate on
        arrays["data"][arrays["offsets"][i] : arrays["offsets"][i] + 8] = 0
    broken = tmp_path / "broken.npz"
    np.savez(broken, **arrays)
    run = train(["--data-dir", str(broken), *TINY, "--epochs", "1", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert f"cannot be read: image 7 of {broken}" in out and f"cannot be read: image 40 of {broken}" in out
    assert run["history"][0]["unreadable"] == 2 and "35 images to train on in memory" in out
    rows = validate(data_dir=str(broken), checkpoint=f"{run['folder']}/best.pth", output=str(tmp_path))
    assert (rows[0]["images"], rows[0]["unreadable"]) == (14, 1)


def test_two_processes_train_from_memory(data, tmp_path):
    argv = ["--data-dir", data, "--in-memory", *TINY, "-b", "4", "--epochs", "1", "--output", tmp_path]
    two = start_two("vim2.classify.cli", ["vim2.classify"], "train", *argv, "--experiment", "two")
    out, err = two.communicate()
    assert two.returncode == 0, err
    assert out.count("images to train on in memory") == 1
    history = json.loads((tmp_path / "two" / "metrics.json").read_text())["history"]
    alone = validate(data_dir=str(data), checkpoint=str(tmp_path / "two" / "best.pth"), output=str(tmp_path), workers=0)
    assert history[0]["val_loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)


def test_what_cannot_be_trained_on(fails, data, pack, tmp_path):
    common = [*TINY, "--output", tmp_path]
    assert "--aa random" in fails("train", "--data-dir", pack, *common, "--aa", "random")
    assert "--aa augmix-m3" in fails("train", "--data-dir", pack, *common, "--aa", "augmix-m3")
    assert "for one split only" in fails("train", "--data-dir", pack.parent, "--train-split", pack.name, *common)
    names = ["--train-split", "a.npz", "--val-split", "b.npz"]
    assert "pack itself" in fails("train", "--data-dir", pack, *names, *common)
    image = (data / "val" / "red" / "0.png").read_bytes()
    make_pack(tmp_path / "a.npz", [image] * 2, [0, 1], ["red", "blue"])
    make_pack(tmp_path / "b.npz", [image] * 2, [0, 1], ["blue", "red"])
    make_pack(tmp_path / "c.npz", [image] * 2, [0, 1], ["red", "cyan"])
    assert "another order" in fails("train", "--data-dir", tmp_path, *names, *common)
    assert "only in c.npz: cyan" in fails(
        "train", "--data-dir", tmp_path, "--train-split", "a.npz", "--val-split", "c.npz", *common
    )
    assert "same classes" in fails(
        "train", "--data-dir", tmp_path, "--train-split", "?.npz", "--val-split", "a.npz", *common
    )


def test_cuda_graphs_on_the_cpu_change_nothing(data, tmp_path, capsys):
    argv = ["--data-dir", str(data), "--in-memory", *TINY, "--epochs", "1", "--output", str(tmp_path), "--experiment"]
    plain = train([*argv, "plain"])
    assert "--cuda-graph" not in capsys.readouterr().out
    graphed = train([*argv, "graphed", "--cuda-graph"])
    assert capsys.readouterr().out.count("--cuda-graph") == 1
    assert learnt(graphed) == learnt(plain)


@pytest.mark.parametrize("option", ["--torchcompile", "--grad-checkpointing"])
def test_what_cannot_be_recorded(fails, data, tmp_path, option):
    assert option in fails("train", "--data-dir", data, *TINY, "--output", tmp_path, "--cuda-graph", option)


@needs_gpu
@pytest.mark.parametrize("options", [[], ["--grad-accum-steps", "2", "--clip-grad", "1"], ["--freeze", "2"]])
def test_recorded_training_learns_the_same(pack, tmp_path, options):
    argv = ["--data-dir", str(pack), *TINY, "--device", "cuda", "--epochs", "3", "--model-ema", "--warmup-epochs", "0"]
    argv += ["--lr", "1e-3", "--amp", *options, "--output", str(tmp_path), "--experiment"]
    plain, graphed = train([*argv, "plain"]), train([*argv, "graphed", "--cuda-graph"])
    for row, row_graphed in zip(plain["history"], graphed["history"], strict=True):
        for name in ("train_loss", "val_loss", "ema_val_loss"):
            assert row_graphed[name] == pytest.approx(row[name], rel=0.02)


def test_many_processes_cannot_be_recorded(fails, data, tmp_path, monkeypatch):
    from vim2.classify import training

    monkeypatch.setattr(training, "start_processes", lambda *_: Processes(torch.device("cpu"), 0, 2))
    with pytest.raises(UserError, match="--cuda-graph works in one process"):
        train(["--data-dir", str(data), *TINY, "--cuda-graph", "--output", str(tmp_path)])
