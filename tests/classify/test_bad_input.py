"""What goes wrong is told in one line that names the remedy, and nothing is lost."""

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from classify_helpers import COLOURS, TINY, make_folders, make_image, pack_folders, tool

from vim2.classify import UserError, memory, train
from vim2.classify.cli import main


class Payload:
    pass


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--epochs", "0"], "--epochs must be 1 or more"),
        (["train"], "--data-dir"),
        (["train", "--data-dir", "nowhere"], "no nowhere"),
        (["validate"], "--checkpoint"),
        (["predict", "nothing*.jpg", "--checkpoint", "x.pth"], "nothing*.jpg"),
        (["train", "--dataset", "wds/x", "--data-dir", "x"], "streamed"),
        (["train", "--dataset", "torch/nothing", "--data-dir", "x"], "torch/nothing"),
    ],
)
def test_commands_and_options(fails, argv, words):
    assert words in fails(*argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "vim2_nan"], "did you mean vim2_nano?"),
        (["--model-kwargs", "depth=3"], "depth"),
        (["--opt", "adamm"], "did you mean adam"),
        (["--opt", "adahessian"], "adahessian needs gradients of gradients"),
        (["--opt", "lookahead_adamm"], "There is no optimiser lookahead_adamm"),
        (["--opt-betas", "0.9"], " --opt-betas 0.9: tuple index out of range"),
        (["--opt", "lion", "--opt-betas", "0.9", "0.99", "0.999"], "lion cannot be used with --lr"),
        (["--opt", "bnbadamw"], "bnbadamw cannot be used with"),
        (["--lr", "1e300"], "adamw cannot be used with --lr 1e+300"),
        (["--crop-pct", "1e-9"], "--crop-pct must lie in [0.1, 2]"),
        (["--aa", "random"], "--aa random"),
        (["--interpolation", "cubic"], "bicubic"),
        (["--train-interpolation", "cubic"], "bicubic"),
        (["--torchcompile", "inductr"], "did you mean inductor?"),
        (["--img-size", "31"], "at least 32"),
        (["--img-size", "32", "--model-kwargs", "patch_size=64"], "change --img-size, to 64 for one."),
        (["--model-kwargs", "depths"], "NAME=VALUE"),
        (["--num-classes", "2"], "3 classes"),
        (["--freeze", "6"], "0 to 5"),
        (["--pretrained"], "vim2 convert IN OUT"),
        (["--mean", "0.5", "0.5"], "--mean needs 1 or 3"),
        (["--class-map", "none.txt"], "none.txt"),
        (["--initial-checkpoint", "none.pth"], "none.pth"),
    ],
)
def test_training_options(fails, data, tmp_path, argv, words):
    assert words in fails("train", "--data-dir", data, *TINY, "--output", tmp_path, *argv)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("option", [{"opt": "adamm"}, {"aa": "random"}, {"torchcompile": "inductr"}], ids=str)
def test_options_are_checked_before_images_are_decoded(data, tmp_path, option, monkeypatch):
    monkeypatch.setattr(memory, "hold", None)
    with pytest.raises(UserError, match=next(iter(option.values()))):
        train(data_dir=data, model="test_vim2", device="cpu", in_memory=True, output=tmp_path, **option)


def test_a_folder_that_cannot_be_made(fails, data, tmp_path):
    (tmp_path / "file").touch()
    assert "choose another --output" in fails("train", "--data-dir", data, *TINY, "--output", tmp_path / "file")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", "0"], "positive"),
        (["--lr", "nan"], "finite"),
        (["--lr-base", "-1"], "positive"),
        (["--clip-grad", "-1"], "positive"),
        (["--weight-decay", "-1"], "0 or more"),
        (["--warmup-epochs", "nan"], "finite"),
        (["--warmup-epochs", "-1"], "0 or more"),
        (["--min-lr", "-1"], "0 or more"),
        (["--decay-epochs", "0"], "positive"),
        (["--layer-decay", "0"], "in (0, 1]"),
        (["--momentum", "1"], "in [0, 1)"),
        (["--opt-betas", "0.9", "1"], "in [0, 1)"),
        (["--hflip", "7"], "in [0, 1]"),
        (["--reprob", "-0.1"], "in [0, 1]"),
        (["--mixup", "-1"], "0 or more"),
        (["--scale", "2", "1"], "in (0, 1]"),
        (["--scale", "1", "0.5"], "ascending"),
        (["--ratio", "1.5", "0.5"], "ascending"),
        (["--cutmix-minmax", "0.8", "0.2"], "ascending"),
        (["--crop-pct", "0"], "in [0.1, 2]"),
        (["--std", "0"], "positive"),
        (["--mean", "inf"], "finite"),
        (["--smoothing", "1"], "in [0, 1)"),
        (["--drop-path", "1"], "in [0, 1)"),
        (["--model-ema-decay", "2"], "in [0, 1)"),
        (["--holdout", "1"], "in (0, 1)"),
    ],
    ids=str,
)
def test_numbers_out_of_range(fails, argv, words):
    assert f"{argv[0]} must" in (error := fails("train", *argv)) and words in error


@pytest.mark.parametrize("options", [{"epochs": 0}, {"batch_size": "4"}, {"lr": 0}, {"hflip": 7}], ids=str)
def test_options_by_name_have_the_same_ranges(options):
    name, value = next(iter(options.items()))
    with pytest.raises(UserError, match=rf"^{name} must .*, got {value!r}\.$"):
        train(**options)


def test_folders(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no images" in fails("train", "--data-dir", tmp_path / "empty", *TINY)
    make_image(tmp_path / "one" / "train" / "red" / "0.png", COLOURS["red"], 0)
    make_image(tmp_path / "one" / "val" / "red" / "0.png", COLOURS["red"], 0)
    assert "one class, red" in fails("train", "--data-dir", tmp_path / "one", *TINY)
    make_image(tmp_path / "bare" / "0.png", COLOURS["red"], 0)
    assert "a folder for each" in fails("train", "--data-dir", tmp_path / "bare", *TINY)
    half = make_folders(tmp_path / "half", train=2, val=0)
    assert "--val-split" in fails("train", "--data-dir", half, *TINY)


def tar_of(folder, tmp_path):
    return Path(shutil.make_archive(str(tmp_path / "data"), "tar", folder))


def test_a_split_that_is_not_there(fails, data, trained, tmp_path):
    """Not taken for all images, which data without splits would be."""
    pack = pack_folders(data, tmp_path / "all.npz", with_split=False)
    tar = tar_of(data, tmp_path)
    for root, there in (
        (data / "train", f"There is no nix in {data / 'train'}: name a split"),
        (data, f"There is no nix in {data}: name a split"),
        (tar, f"There is no nix in {tar}: name a split"),
        (pack, f"{pack} has no splits, and none is nix"),
    ):
        argv = ["--data-dir", root, "--output", tmp_path]
        assert there in fails("validate", *argv, "--checkpoint", trained / "best.pth", "--split", "nix")
        assert there in fails("train", *argv, *TINY, "--train-split", "nix", "--val-split", "")


def test_a_split_without_a_name(fails, data, trained, tmp_path):
    """Which as a folder's is the data's own, whose splits would be taken for classes."""
    for root in (data, tar_of(data / "train", tmp_path)):
        argv = ["--data-dir", root, "--output", tmp_path]
        said = "The name of a split is empty"
        assert said in fails("validate", *argv, "--checkpoint", trained / "best.pth", "--split", "")
        assert said in fails("train", *argv, *TINY, "--train-split", "")
        assert said in fails("train", *argv, *TINY, "--train-split", "", "--val-split", "")


def test_splits_of_different_classes(fails, tmp_path):
    root = make_folders(tmp_path, train=2, val=1)
    (root / "val" / "red").rename(root / "val" / "rot")
    error = fails("train", "--data-dir", root, *TINY)
    assert "only in train: red" in error and "only in validation: rot" in error and "--class-map" in error


def test_unreadable_images_are_named_and_counted(data, trained, tmp_path, capsys, fails):
    root = shutil.copytree(data, tmp_path / "data")
    whole = (root / "train" / "red" / "3.png").read_bytes()
    (root / "train" / "red" / "3.png").write_bytes(whole[: len(whole) // 2])
    (root / "val" / "blue" / "1.png").write_text("no image")
    run = train(["--data-dir", str(root), *TINY, "-b", "6", "-j", "1", "--epochs", "1", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert f"cannot be read: {root / 'train' / 'red' / '3.png'}" in out
    assert f"cannot be read: {root / 'val' / 'blue' / '1.png'}" in out
    assert run["history"][0]["unreadable"] == 2 and "2 unreadable images skipped" in out
    argv = ["validate", "--data-dir", root, "--checkpoint", trained / "best.pth", "-j", "0", "--output", tmp_path / "o"]
    assert main(list(map(str, argv))) == 0
    row = json.loads((tmp_path / "o" / "validation.json").read_text())[0]
    assert (row["images"], row["unreadable"]) == (14, 1)
    argv = ["predict", root / "val", "--checkpoint", trained / "best.pth", "--output", tmp_path / "p"]
    assert main(list(map(str, argv))) == 0
    out = capsys.readouterr().out
    assert f"Skipped: {root / 'val' / 'blue' / '1.png'} is no image that can be read" in out and "has 14 of 15" in out
    files = [Path(p["file"]) for p in json.loads((tmp_path / "p" / "predictions.json").read_text())]
    assert len(files) == 14 and root / "val" / "blue" / "1.png" not in files
    alone = root / "val" / "blue" / "1.png"
    assert str(alone) in fails("predict", alone, "--checkpoint", trained / "best.pth", "--output", tmp_path / "q")
    assert not list(tmp_path.glob("q/*"))


def test_nothing_but_unreadable_images(tmp_path):
    root = make_folders(tmp_path / "data", train=3, val=1)
    for path in root.rglob("*.png"):
        path.write_text("no image")
    run = tool("train", "--data-dir", root, *TINY, "-j", "1", "--output", tmp_path)
    error = run.communicate()[1]
    assert run.returncode == 2 and error.count("\n") == 1 and "cannot be read: check the data" in error, error


def test_checkpoints(fails, data, trained, tmp_path):
    content = (trained / "best.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(content[: len(content) // 2])
    other = timm.create_model("test_vim2", dims=(8, 16, 24, 32))
    torch.save({"state_dict": other.state_dict()}, tmp_path / "other.pth")
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "resnet.pth")
    torch.save({"state_dict": {}, "payload": Payload()}, tmp_path / "pickle.pth")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    words = {
        "short.pth": "truncated",
        "other.pth": "another architecture",
        "resnet.pth": "another architecture",
        "pickle.pth": "more than weights",
        "nothing.pth": "no model weights",
        "missing.pth": "no checkpoint",
    }
    for name, word in words.items():
        path = tmp_path / name
        common = ["--data-dir", data, "--output", tmp_path / "out"]
        assert word in fails("train", *common, *TINY, "--initial-checkpoint", path)
        assert word in fails("validate", *common, "--checkpoint", path, "--model", "test_vim2")
        assert word in fails("predict", data / "val", "--checkpoint", path, "--model", "test_vim2")
    assert "another architecture" in fails(
        "validate", "--data-dir", data, "--checkpoint", trained / "best.pth", "--model", "vim2_nano"
    )
    torch.save(torch.load(trained / "best.pth", weights_only=True)["state_dict"], tmp_path / "bare.pth")
    assert "--model" in fails("predict", data / "val", "--checkpoint", tmp_path / "bare.pth")


def test_a_checkpoint_of_other_classes(fails, trained, tmp_path):
    colours = {"red": COLOURS["red"], "cyan": (30, 200, 200), "blue": COLOURS["blue"]}
    other = make_folders(tmp_path / "other", train=2, val=1, colours=colours)
    error = fails("validate", "--data-dir", other, "--checkpoint", trained / "best.pth")
    assert "cyan" in error and "--class-map" in error
    shutil.copytree(trained, tmp_path / "run")
    last = tmp_path / "run" / "last.pth"
    assert "other" in fails("train", "--resume", last, "--data-dir", other, "--epochs", "9")
    (tmp_path / "two.txt").write_text("a\nb\n")
    picture = other / "val" / "red" / "0.png"
    assert "names 2 classes, the model has 3" in fails(
        "predict", picture, "--checkpoint", trained / "best.pth", "--class-map", tmp_path / "two.txt"
    )


def test_resuming_another_run(fails, data, trained, tmp_path):
    last = trained / "last.pth"
    before = last.read_bytes()
    assert "--model test_vim2, not vim2_nano" in fails("train", "--resume", last, "--model", "vim2_nano")
    assert "--lr 0.003, not 1.0" in fails("train", "--resume", last, "--lr", "1")
    assert "not a last.pth" in fails("train", "--resume", trained / "best.pth")
    common = ["train", "--data-dir", data, *TINY, "--output", trained.parent, "--experiment", "run"]
    assert "add --resume" in fails(*common)  # rather than write over it
    assert last.read_bytes() == before


def test_a_loss_that_explodes_keeps_the_last_good_checkpoint(fails, data, tmp_path):
    options = ["train", "--data-dir", data, *TINY, "--epochs", "4", "--warmup-epochs", "0", "--output", tmp_path]
    options += ["--sched", "step", "--decay-epochs", "1", "--decay-rate", "1e30", "--experiment", "run"]
    error = fails(*options)
    assert "NaN or infinite in epoch 2" in error and "of epoch 1, is kept" in error and "--lr" in error
    last = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert last["epoch"] == 1 and all(v.isfinite().all() for v in last["state_dict"].values())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_keeps_the_old_checkpoint(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    limit = (len(before["best.pth"]) // 2, resource.RLIM_INFINITY)
    argv = ["train", "--resume", folder / "last.pth", "--epochs", 3]
    full = tool(*argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    error = full.communicate()[1]
    assert full.returncode == 2 and error.count("\n") == 1 and "pth" in error and "--resume" in error, error
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        **before,
        **{n: (folder / n).read_bytes() for n in ("metrics.csv", "metrics.json", "curves.png")},
    }
    assert main(list(map(str, argv))) == 0
    assert torch.load(folder / "last.pth", weights_only=True)["epoch"] == 3
