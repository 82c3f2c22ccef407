"""tools/arena.py: how models are named and their stems halved, a whole comparison, its tables, pictures and errors."""

from common.command import run_tool

import io
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from benchmarks.arena import report
from benchmarks.arena.models import Entry, adapt, anywhere, create, dynamic, last_map, parse_entry
from tools import arena
from vim2.checkpoints import read_checkpoint
from vim2.classify import validate
from vim2.command.errors import UserError
from vim2.command.runs import own_folder
from vim2.export import export_timm


def test_entries():
    assert parse_entry("resnet18") == Entry("resnet18", "resnet18", {})
    assert parse_entry("test_resnet.r160_in1k").label == "test_resnet.r160_in1k"
    text = "P 4+=vim2_nano:channel_patch=4,dims=(48, 96),depths=[1,2],channel_mixer=mlp,mlp_ratio=1e-1,x=True"
    kwargs = dict(channel_patch=4, dims=(48, 96), depths=[1, 2], channel_mixer="mlp", mlp_ratio=0.1, x=True)
    assert parse_entry(text) == Entry("P 4+", "vim2_nano", kwargs)
    assert parse_entry("local-dir:some/where/mine/") == Entry("mine", "local-dir:some/where/mine/", {})
    assert parse_entry("hf-hub:someone/mine") == Entry("someone-mine", "hf-hub:someone/mine", {})
    assert parse_entry("a=local-dir:mine:x=1") == Entry("a", "local-dir:mine", {"x": 1})
    with pytest.raises(UserError, match="LABEL=NAME"):
        parse_entry("local-dir:mine:x=1")
    assert anywhere("a=local-dir:mine:x=1") == f"a=local-dir:{Path.cwd() / 'mine'}:x=1"
    assert anywhere("a=local-dir:") == "a=local-dir:"  # which names nothing, and not the working directory


STRIDES = {  # of the last map, in pixels, of the ordinary model
    "vim2_nano": 32,
    "none=vim2_nano:channel_mixer=none": 32,
    "convnext_tiny": 32,
    "swin_tiny_patch4_window7_224": 32,
    "mambaout_tiny": 32,
    "resnet18": 32,
    "efficientvit_b0": 32,
    "efficientvim_m1": 64,
    "deit_small_patch16_224": 16,
}


@pytest.mark.parametrize("text", STRIDES)
def test_every_stem_is_halved_and_reads_other_sizes(text):
    entry = adapt(parse_entry(text), 64)
    stride = STRIDES[text] // 2
    model = create(dynamic(entry), num_classes=10)
    for size in (64, 128, 192):
        assert last_map(model, size) == size // stride
        assert model(torch.empty(2, 3, size, size, device="meta")).shape == (2, 10)
    parameters = sum(p.numel() for p in model.parameters())
    ordinary = create(parse_entry(text), num_classes=10)
    # but for patches and positions, the model is the ordinary one
    assert parameters == pytest.approx(sum(p.numel() for p in ordinary.parameters()), rel=0.02)


def test_arguments_that_an_image_size_calls_for():
    swin = parse_entry("swin_tiny_patch4_window7_224")
    assert adapt(swin, 64).kwargs == dict(patch_size=2, img_size=64, window_size=8)  # maps of 32, 16, 8 and 4
    assert adapt(swin, 224, halve=False).kwargs == dict(img_size=224, window_size=7)
    assert adapt(swin, 96).kwargs["window_size"] == 6
    assert adapt(parse_entry("a=vim2_nano:patch_size=8"), 64).kwargs == dict(patch_size=8)  # it has a stem of its own
    assert adapt(parse_entry("resnet18"), 128, halve=False) == parse_entry("resnet18")


def test_an_argument_for_other_sizes_is_one_that_changes_what_is_read():
    """timm 1.0.29's Swin takes dynamic_img_size without a word, and does not heed it."""

    class Strict(nn.Module):
        def __init__(self, strict_img_size: bool):
            super().__init__()
            self.strict_img_size, self.head = strict_img_size, nn.Linear(3, 10)

        def forward(self, x):
            assert x.shape[-1] == 64 or not self.strict_img_size
            return self.head(x.mean((2, 3)))

    def strict_test_model(pretrained=False, strict_img_size=True, **ignored):
        return Strict(strict_img_size)

    def rigid_test_model(pretrained=False, **ignored):
        return Strict(True)

    for entrypoint in (strict_test_model, rigid_test_model):
        timm.models.register_model(entrypoint)
    assert dynamic(parse_entry("strict_test_model")).kwargs == dict(strict_img_size=False)
    assert dynamic(parse_entry("rigid_test_model")).kwargs == {}


def test_a_patch_convolution_of_half_the_stride_has_half_the_kernel():
    entry = adapt(parse_entry("test_convnext"), 64)
    half, whole = (timm.create_model(name) for name in (entry.model, "test_convnext"))
    assert half.stem[0].kernel_size == half.stem[0].stride == (2, 2)
    assert half.stem[0].weight.std().item() == pytest.approx(whole.stem[0].weight.std().item(), rel=0.2)
    assert half(torch.ones(1, 3, 64, 64)).isfinite().all()


COLOURS = {"blue": (50, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A pack of noisy images of one colour, 10 of each to train on and 4 to validate on."""
    random, files, labels, split = np.random.default_rng(0), [], [], []
    for label, colour in enumerate(COLOURS.values()):
        for i in range(14):
            pixels = (np.array(colour) + random.integers(-30, 30, (32, 32, 3))).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(file := io.BytesIO(), "png")
            files.append(np.frombuffer(file.getvalue(), "uint8"))
            labels.append(label)
            split.append(i >= 10)
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    offsets = np.cumsum([0, *map(len, files)])
    arrays = dict(labels=np.array(labels), split=np.array(split, dtype=int), names=np.array(list(COLOURS)))
    np.savez(path, data=np.concatenate(files), offsets=offsets, **arrays)
    return path


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "arena.jsonl").read_text().splitlines()]


def test_a_comparison_from_choosing_rates_to_other_sizes(data, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "arena"
    monkeypatch.chdir(data.parent)
    argv = [
        "run",
        folder,
        "--data-dir",
        data.name,
        "--models",
        "none=test_vim2:channel_mixer=none,token_mixers=1",
        "test_resnet",
    ]
    argv += ["--device", "cpu", "--img-size", 32, "-b", 12, "--epochs", 2, "--warmup-epochs", 0, "-j", 0]
    argv += ["--lrs", 1e-3, 1e12, "--search-epochs", 1, "--seeds", 0, 1, "--holdout", 0.2]
    argv = list(map(str, argv))
    assert arena.main([*argv, "--minutes", "0"]) == 1
    assert "4 runs are left" in capsys.readouterr().out
    assert arena.main(argv) == 0
    rows = lines(folder)
    search, train = ([row for row in rows if row["kind"] == kind] for kind in ("search", "train"))
    assert {(row["label"], row["lr"]) for row in search} == set(
        itertools.product(("none", "test_resnet"), (1e-3, 1e12))
    )
    assert any("NaN" in row.get("failed", "") for row in search)  # a rate at which training diverges is not chosen
    assert {(row["label"], row["lr"], row["seed"]) for row in train} == {
        (label, max((r for r in search if r["label"] == label), key=lambda r: r.get("top1", -1))["lr"], seed)
        for label in ("none", "test_resnet")
        for seed in (0, 1)
    }
    for row in train:
        run = json.loads(
            (folder / "runs" / row["label"] / f"epochs2-lr0.001-seed{row['seed']}/metrics.json").read_text()
        )
        assert row["top1"] == run["history"][-1]["top1"] and run["args"]["mixup_prob"] == 0.5
        assert row["params_m"] > 0 and row["gflops"] > 0 and row["images_per_second"] > 0
    # rates are chosen by a fifth of the 30 images to train on: 2 of each class; runs are judged by the other 12
    apart = json.loads((folder / "runs/none/epochs1-lr0.001-search/metrics.json").read_text())
    assert apart["args"]["val_split"] == "" and apart["history"][-1]["top1"] in [100 * n / 6 for n in range(7)]
    assert run["args"]["val_split"] == "validation"

    out = capsys.readouterr().out
    assert (folder / "arena.md").read_text() in out and "All runs are done." in out
    assert out.count(" ± ") == 4 and "| none | 1 | " in out and "after the last epoch" in out
    for name in ("accuracy_over_time.png", "accuracy_over_flops.png", "curves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert arena.main(argv) == 0 and lines(folder) == rows  # nothing is run twice

    monkeypatch.chdir(tmp_path)  # where the data were given relative to another folder
    assert arena.main(["scale", str(folder), "--sizes", "32", "64"]) == 0
    scaled = [row for row in lines(folder) if row["kind"] == "scale"]
    assert len(scaled) == 8 and "| label | 32 | 64 |" in (folder / "scaling.md").read_text()
    for row in scaled:
        (trained,) = [r for r in train if (r["label"], r["seed"]) == (row["label"], row["seed"])]
        assert row["img_size"] == 64 or row["top1"] == trained["top1"]
        assert row["gflops"] == pytest.approx(trained["gflops"] * (row["img_size"] / 32) ** 2, rel=0.1)
    assert (folder / "scaling.png").exists()

    assert arena.main(["time", str(folder)]) == 0
    times = {row["label"]: row["images_per_second"] for row in lines(folder) if row["kind"] == "time"}
    for row in json.loads((folder / "arena.json").read_text())["rows"]:
        assert row["images_per_second"] == times[row["label"]]
        assert row["minutes"] == pytest.approx(2 * 30 / times[row["label"]] / 60)

    # a ViM2 of the arena is an ordinary run; a model with another stem than timm's is not taken for timm's
    (row,) = validate(data_dir=data, checkpoint=folder / "runs/none/epochs2-lr0.001-seed0/last.pth", device="cpu")
    assert row["top1"] == next(r["top1"] for r in train if r["label"] == "none")
    other = folder / "runs/test_resnet/epochs2-lr0.001-seed0/last.pth"
    assert read_checkpoint(other)["arch"] == "test_resnet_half_stem"

    monkeypatch.chdir(data.parent)

    def fails(*more) -> str:
        capsys.readouterr()
        assert run_tool(arena.main, [*argv, *map(str, more)]) == 2
        return capsys.readouterr().err

    assert "weight-decay 0.05, not 0.1" in fails("--weight-decay", 0.1)
    assert "not none=test_vim2" in fails("--models", "none=test_vim2")


def test_models_of_a_users_own(data, tmp_path, capsys, monkeypatch):
    """From files that the command names, also where a run of it, or `scale`, starts in another folder."""
    own = tmp_path / "models_of_a_user.py"
    own.write_text(
        "from timm.models import register_model\n"
        "from vim2.vim2 import test_vim2 as test_model\n"
        "@register_model\n"
        "def a_users_own(pretrained=False, **kwargs):\n"
        "    return test_model(pretrained, **kwargs)\n"
    )
    folder = tmp_path / "arena"
    argv = ["run", folder, "--data-dir", data, "--device", "cpu", "--img-size", 32, "-b", 12, "--epochs", 1, "-j", 0]
    argv = [*map(str, argv), "--warmup-epochs", "0", "--models"]
    assert "There is no model a_users_own" in error_of([*argv, "a_users_own"], capsys)
    monkeypatch.chdir(tmp_path)
    assert arena.main([*argv, "a_users_own", "--imports", own.name]) == 0
    monkeypatch.chdir(data.parent)
    assert arena.main([*argv, "test_resnet"]) == 0  # the folder still knows where its other model came from
    assert arena.main(["scale", str(folder), "--sizes", "64"]) == 0
    found = {(row["kind"], row["label"]) for row in lines(folder)}
    assert found == {(kind, label) for kind in ("train", "scale") for label in ("a_users_own", "test_resnet")}

    (elsewhere := tmp_path / "elsewhere").mkdir()
    own = own.rename(elsewhere / own.name)
    monkeypatch.delitem(sys.modules, own.stem)
    assert f"There is no {tmp_path / own.name} any more: repeat arena.py run with --imports" in error_of(
        ["time", str(folder)], capsys
    )
    assert arena.main([*argv, "a_users_own", "--imports", str(own)]) == 0
    assert json.loads((folder / "settings.json").read_text())["options"]["imports"] == [str(own)]


def test_folders_of_timms(data, tmp_path, monkeypatch):
    """Their weights and arguments are taken, also where the stem is changed, and from another folder."""
    dims = dict(dims=[16, 24, 32, 40])
    made = {"vim": timm.create_model("test_vim2", **dims), "res": timm.create_model("test_resnet")}
    for name, model in made.items():
        export_timm(model, tmp_path / name, model_args=dims if name == "vim" else {})
    folder = tmp_path / "arena"
    argv = ["run", folder, "--data-dir", data, "--device", "cpu", "--img-size", 32, "-b", 12, "-j", 0, "--epochs", 1]
    argv += ["--lrs", 1e-9, "--warmup-epochs", 0, "--weight-decay", 0, "--pretrained", "--models"]
    argv += ["vim+=local-dir:vim:patch_size=4", "local-dir:res"]  # with a stem of its own, and half of one
    monkeypatch.chdir(tmp_path)
    assert arena.main(list(map(str, argv))) == 0
    monkeypatch.chdir(data.parent)
    assert arena.main(["scale", str(folder), "--sizes", "32", "64"]) == 0
    assert {(row["kind"], row["label"]) for row in lines(folder)} == {
        (kind, label) for kind in ("train", "scale") for label in ("vim+", "res")
    }
    for label, name, other in (("vim+", "vim", "patch_embed"), ("res", "res", "conv1")):
        trained = read_checkpoint(next((folder / "runs" / label).glob("*/last.pth")))["state_dict"]
        before = made[name].state_dict()
        kept = [k for k in before if before[k].is_floating_point() and before[k].shape == trained[k].shape]
        kept = [k for k in kept if other not in k and "running" not in k and "head" not in k and "fc" not in k]
        assert len(kept) > 10 and all(torch.allclose(before[k], trained[k], atol=1e-6) for k in kept)


def test_a_users_own_need_not_have_all_that_timms_models_have():
    class Plain(nn.Module):
        def __init__(self, drop_path_rate=0.0, **kwargs):
            super().__init__()
            self.num_classes = 10
            self.rates = [rate.item() for rate in torch.linspace(0, drop_path_rate, 3)]  # no meta tensor's
            self.layers = nn.Sequential(nn.Conv2d(3, 10, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())

        def forward(self, x):
            return self.layers(x)

    def plain_model(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        return Plain(**kwargs)

    timm.models.register_model(plain_model)
    assert adapt(parse_entry("plain_model"), 64, halve=False).kwargs == {"img_size": 64}
    with pytest.raises(UserError, match=r"the stride of plain_model cannot be measured .* --stem-stride keep"):
        adapt(parse_entry("plain_model"), 64)


def trained(label: str, seed: int, top1: float, **more) -> dict:
    history = [{"epoch": e, "top1": top1 * e / 2, "seconds": 30.0} for e in (1, 2)]
    row = dict(kind="train", label=label, epochs=2, lr=1e-3, seed=seed, top1=top1, top5=90.0, history=history)
    row |= dict(params_m=1.0, gflops=0.5, images_per_second=100.0, train_seconds=60.0, gib=None, sharing=1)
    return {**row, "hardware": "a card", "date": "today", "versions": "PyTorch", **more}


SETTINGS = {
    "options": dict(img_size=64, batch_size=256, holdout=0.05),
    "stem_stride": "half",
    "images": 6000,
    "num_classes": 10,
}


def test_means_deviations_and_what_is_not_finished(tmp_path):
    results = [trained("a", 0, 50.0), trained("a", 1, 52.0), trained("b", 0, 60.0, sharing=4)]
    results += [trained("c", 0, 99.0) | {"failed": "The loss became NaN"}, trained("a", 0, 70.0, epochs=4)]
    rows = report.collect(results, SETTINGS)
    assert [(row["label"], row["epochs"], row["top1"]) for row in rows] == [("a", 4, 70), ("b", 2, 60), ("a", 2, 51)]
    assert rows[2]["top1_sd"] == pytest.approx(math.sqrt(2)) and rows[1]["top1_sd"] is None
    assert rows[2]["curve"] == [(1, 25.5), (2, 51)]

    # one is finished; the other was cut off an epoch after it had been validated
    history = [{"epoch": 1, "top1": 33.0}, {"epoch": 2, "top1": None}]
    for seed in (0, 1):
        run = tmp_path / f"runs/a/epochs2-lr0.001-seed{seed + 1}"
        run.mkdir(parents=True)
        args = dict(epochs=2, lr=1e-3, seed=seed + 1)
        (run / "metrics.json").write_text(json.dumps(dict(args=args, history=history)))
    unfinished = report.unfinished_runs(tmp_path, results)
    assert [(u["seed"], u["epoch"], u["validated"], u["top1"]) for u in unfinished] == [(2, 2, 1, 33.0)]
    text = report.report(rows, unfinished, results, SETTINGS)
    assert "| a | 1.00 | 0.500 | 0.001 | 2 | 0, 1 | 51.00 ± 1.41 | 90.00 ± 0.00 | 100 | 1.0 |" in text
    assert "| a | 0.001 | 2 | 2 of 2 | 33.00 | 1 |" in text and "Failed: c, lr 0.001, seed 0" in text
    assert "Up to 4 runs shared a device" in text and "a card, today. PyTorch." in text
    alone = [dict(kind="time", label=label, images_per_second=200.0, gib=None) for label in "ab"]
    rows = report.collect(results + alone, SETTINGS)
    assert [(row["minutes"], row["images_per_second"]) for row in rows] == [(2, 200), (1, 200), (1, 200)]
    assert "those of a run alone" in report.report(rows, [], results, SETTINGS)
    report.plot_all(rows, unfinished, tmp_path)
    assert (tmp_path / "curves.png").exists()


def test_a_best_rate_at_the_end_of_the_range_is_named():
    def searched(label: str, *top1) -> list[dict]:
        outcomes = [dict(top1=value) if value else dict(failed="NaN") for value in top1]
        run = dict(kind="search", label=label, epochs=1, seed=0)
        return [{**run, "lr": lr, **outcome} for lr, outcome in zip((5e-4, 1e-3, 2e-3), outcomes)]

    results = searched("low", 9, 8, None) + searched("middle", 8, 9, 8) + searched("high", None, 8, 9)
    text = report.report([], [], results + searched("none", None, None, None), SETTINGS)
    assert "beyond which others may be better: low (0.0005), high (0.002)." in text
    assert "beyond which" not in report.report([], [], searched("middle", 8, 9, 8), SETTINGS)
    assert report.best_rate(searched("even", None, 9, 9)[::-1]) == 1e-3
    assert report.best_rate(searched("none", None, None, None)) is None


def test_other_sizes_come_in_the_order_of_the_main_table():
    def scaled(label: str, seed: int, size: int, top1: float) -> dict:
        run = dict(kind="scale", label=label, epochs=2, lr=1e-3, seed=seed, gflops=1.0)
        return {**run, "img_size": size, "top1": top1, "top5": 90.0}

    results = [trained("a", 0, 50.0), trained("b", 0, 60.0), trained("b", 1, 62.0)]
    results += [scaled("a", 0, 128, 40.0), scaled("a", 0, 96, 70.0)]
    results += [scaled("b", seed, size, 10.0 + seed) for seed in (0, 1) for size in (96, 128)]
    rows = report.scaling_rows(results, report.collect(results, SETTINGS))
    found = [(row["label"], row["img_size"], row["top1"], row["seeds"]) for row in rows]
    assert found == [("b", 96, 10.5, [0, 1]), ("b", 128, 10.5, [0, 1]), ("a", 96, 70.0, [0]), ("a", 128, 40.0, [0])]
    text = report.scaling_report(rows, results, SETTINGS)
    assert text.endswith("| b | 10.50 ± 0.71 | 10.50 ± 0.71 |\n| a | 70.00 | 40.00 |\n")


def test_labels_of_points_that_lie_together_do_not_cover_one_another():
    fig = report.figure(figsize=(9, 6), dpi=120)
    axes = fig.subplots()
    points = [(f"channel_patch {i}", 5 + i % 3 / 100, 40 + i / 20) for i in range(8)] + [("far", 20, 60)]
    axes.scatter(*zip(*(point[1:] for point in points)))
    axes.margins(0.2)
    report.label_points(fig, axes, points)
    fig.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 9
    assert not any(report.overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    inside = axes.get_window_extent()
    assert all(report.overlap(box, inside) == pytest.approx(box.width * box.height) for box in boxes)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models", "vim2_teeny"], "There is no model vim2_teeny; did you mean vim2_tiny?"),
        (["--models", "a=test_vim2:depth=3"], "a: test_vim2 cannot be made with {'depth': 3}"),
        (["--models", "a/b=test_vim2"], "Cannot read the model 'a/b=test_vim2'"),
        (["--models", "a=test_vim2:3"], "Cannot read '3' in the model 'test_vim2:3'"),
        (["--models", "hiera_tiny_224"], "the stem of hiera_tiny_224 cannot be given half its stride"),
        (["--models", "test_vim2", "test_vim2"], "Two of the --models have one label"),
        (["--models", "test_vim2", "--lr", "1"], "--lr is not for the arena: see --lrs"),
        (["--models", "test_vim2", "--gpus", "0"], "There is no GPU 0 to use on cpu"),
        (["--models", "test_vim2", "--in-chans", "1"], "leave --in-chans out"),
        (["--models", "test_vim2", "--data-dir", "nowhere"], "There is no nowhere"),
        (
            ["--models", "test_vim2", "--weight-dekay", "1"],
            "unknown option --weight-dekay; did you mean --weight-decay?",
        ),
    ],
)
def test_bad_input_is_one_line(argv, message, tmp_path, capsys):
    assert run_tool(arena.main, ["run", str(tmp_path / "out"), "--device", "cpu", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_images_without_a_split_of_their_own_cannot_choose_a_rate_too(data, tmp_path, capsys):
    with np.load(data) as pack:
        np.savez(tmp_path / "whole.npz", **{name: pack[name] for name in pack.files if name != "split"})
    argv = ["run", tmp_path / "out", "--device", "cpu", "--models", "test_vim2", "--data-dir", tmp_path / "whole.npz"]
    assert run_tool(arena.main, [*map(str, argv), "--lrs", "1e-3", "2e-3"]) == 2
    assert "give data with splits, or one rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    {
        "--aa augmix-m3-w3": "--aa augmix-m3-w3",
        "--aa rand-x3": "--aa rand-x3",
        "--freeze 1": "--freeze works for ViM2",
        "--initial-checkpoint none.pth": "none.pth",
        "--layer-decay 0.5 --lrs 1e-3 1e300": "adamw cannot be used with --lr 1e+300",
        "--mixup -1": "--mixup must",
        "--num-classes 2": "The data have 3 classes",
        "--opt adamm": "There is no optimiser adamm; did you mean adam",
        "--models test_vim2 --pretrained": "There are no pretrained weights of test_vim2",
        "--sched cosin": "cosine",
    }.items(),
)
def test_what_training_would_refuse_is_told_before_any_run(options, message, data, tmp_path, capsys):
    argv = [*run_argv(data, tmp_path / "out"), "--models", "test_resnet"]
    assert message in error_of([*argv, *options.split()], capsys)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_told_before_any_run(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    assert "needs kornia" in error_of(run_argv(data, tmp_path / "out"), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["time", "scale", "table"])
def test_commands_that_need_an_arena(command, tmp_path, capsys):
    assert run_tool(arena.main, [command, str(tmp_path)]) == 2
    assert "There is no arena in" in capsys.readouterr().err


def run_argv(data, folder) -> list[str]:
    argv = ["run", folder, "--data-dir", data, "--models", "test_vim2", "--device", "cpu", "--img-size", 32, "-j", 0]
    return list(map(str, [*argv, "--minutes", 0]))


def error_of(argv, capsys) -> str:
    capsys.readouterr()
    assert run_tool(arena.main, argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """An arena with a finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    arena.main(run_argv(data, folder))
    (folder / "arena.jsonl").write_text(json.dumps(trained("test_vim2", 0, 50.0)) + "\n")
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of one, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "arena"))


DAMAGED = [
    '{"kind": "tr',
    "[1]",
    "{}",
    '{"kind": ["train"]}',
    '{"kind": "train"}',
    json.dumps(trained("test_vim2", 1, 50.0) | {"top1": None}),
    json.dumps(trained("test_vim2", 1, math.nan)),
    json.dumps(trained("test_vim2", 1, 50.0) | {"lr": 10**400}),
    json.dumps(trained("test_vim2", 1, 50.0, date=1)),
    json.dumps(trained("test_vim2", 1, 50.0, gib="1")),
    json.dumps(trained("test_vim2", 1, 50.0, history=[1])),
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_result_is_named(line, folder, data, capsys):
    with open(folder / "arena.jsonl", "a") as file:
        file.write("\n" + line)
    argvs = [["table", str(folder)]]
    if line == DAMAGED[0]:  # all read them the same way
        argvs += run_argv(data, folder), ["time", str(folder)], ["scale", str(folder)]
    for argv in argvs:
        error = error_of(argv, capsys)
        assert "arena.jsonl, line 3, " in error and ": delete that line; what it told of is then run again." in error


def test_blank_lines_among_the_results_are_skipped(folder):
    with open(folder / "arena.jsonl", "a") as file:
        file.write("\n \n")
    assert arena.main(["table", str(folder)]) == 0


def test_arenas_of_one_recipe_are_put_together(folder, finished, tmp_path, capsys):
    def change(name: str, **changes) -> None:
        settings = json.loads((folder / "settings.json").read_text())
        settings[name] |= changes
        (folder / "settings.json").write_text(json.dumps(settings))

    other = shutil.copytree(finished, tmp_path / "other")
    scaled = dict(kind="scale", label="a", epochs=2, lr=1e-3, seed=1, img_size=96, top1=40.0, top5=80.0, gflops=1.0)
    rows = [trained("test_vim2", 1, 52.0), trained("a", 1, 60.0), scaled]
    (folder / "arena.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change("entries", a="a=test_resnet")
    cut_off = dict(args=dict(epochs=4, lr=1e-3, seed=0), history=[{"epoch": 3, "top1": 33.0}])
    (run := other / "runs/b/epochs4-lr0.001-seed0").mkdir(parents=True)
    (run / "metrics.json").write_text(json.dumps(cut_off))

    argv = ["table", str(tmp_path / "both"), "--of", str(folder), str(other)]
    before = (folder / "arena.md").read_text()
    assert arena.main([*argv, str(other)]) == 0  # one that is named twice counts once
    table, scaling = ((tmp_path / "both" / name).read_text() for name in ("arena.md", "scaling.md"))
    assert "| test_vim2 | 1.00 | 0.500 | 0.001 | 2 | 0, 1 | 51.00 ± 1.41 |" in table
    assert "| a | 1.00 | 0.500 | 0.001 | 2 | 1 | 60.00 |" in table
    assert table.count("| b | 0.001 | 0 | 3 of 4 | 33.00 | 3 |") == 1
    assert "| a | 40.00 |" in scaling and (tmp_path / "both/scaling.png").exists()
    assert (folder / "arena.md").read_text() == before  # they stay as they are

    (other / "arena.jsonl").write_text(json.dumps(trained("a", 1, 61.0)) + "\n")
    assert "hold different results of train a 2 0.001 1: leave one of them out" in error_of(argv, capsys)
    (other / "arena.jsonl").write_text("".join(json.dumps(trained("a", 1, top1)) + "\n" for top1 in (60.0, 60.0)))
    assert arena.main(argv) == 0  # a line that is there twice counts once, too
    assert "| a | 1.00 | 0.500 | 0.001 | 2 | 1 | 60.00 |" in (tmp_path / "both/arena.md").read_text()
    (other / "arena.jsonl").write_text("".join(json.dumps(trained("a", 1, top1)) + "\n" for top1 in (60.0, 61.0)))
    error = error_of(["table", str(other)], capsys)
    assert f"{other / 'arena.jsonl'} holds two results of train a 2 0.001 1: delete one of the lines." in error
    change("options", weight_decay=0.1)
    assert f"{other} holds runs with weight-decay 0.05, not 0.1: leave it out." in error_of(argv, capsys)


def test_arenas_that_each_search_for_rates_and_time_their_models(folder, finished, tmp_path, capsys):
    other = shutil.copytree(finished, tmp_path / "other")
    for path, seed, top1, speed in ((folder, 0, (50.0, 60.0), 100.0), (other, 1, (70.0, 61.0), 300.0)):
        run = dict(kind="search", label="test_vim2", epochs=1, seed=0)
        rows = [{**run, "lr": lr, "top1": value} for lr, value in zip((1e-3, 2e-3), top1)]
        rows.append(dict(kind="time", label="test_vim2", images_per_second=speed, gib=None))
        rows.append(trained("test_vim2", seed, 50.0, lr=(2e-3, 1e-3)[seed]))
        (path / "arena.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["table", str(tmp_path / "both"), "--of", str(folder), str(other)]
    assert arena.main(argv) == 0
    text = (tmp_path / "both/arena.md").read_text()
    assert "| test_vim2 | 1 | 50.00 | 60.00 |" in text and "| test_vim2 | 1 | 70.00 | 61.00 |" in text
    assert "others may be better: test_vim2 (0.002), test_vim2 (0.001)." in text
    assert text.count("| 50.00 | 90.00 | 200 |") == 2  # the median speed, of both rates
    (other / "arena.jsonl").write_text((folder / "arena.jsonl").read_text())
    assert arena.main(argv) == 0  # copied lines count once
    text = (tmp_path / "both/arena.md").read_text()
    assert text.count("| test_vim2 | 1 | 50.00 | 60.00 |") == 1 and "| 50.00 | 90.00 | 100 |" in text
    with open(other / "arena.jsonl", "a") as file:
        file.write(json.dumps(dict(kind="time", label="test_vim2", images_per_second=99.0, gib=None)))
    assert "holds two results of time test_vim2" in error_of(["table", str(other)], capsys)


@pytest.mark.parametrize("content", ["[]", "{}", '{"options": {}}', "{", b"\xff"])
def test_damaged_settings_do_not_let_other_ones_in(content, folder, data, capsys):
    (folder / "settings.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    argvs = [["time", str(folder)], ["table", str(folder)]]
    if content == "[]":  # all read them the same way
        argvs.append([*run_argv(data, folder), "-b", "12"])
    for argv in argvs:
        assert "settings.json is damaged: delete it, and give arena.py run the same models" in error_of(argv, capsys)


def test_settings_may_change_while_there_is_no_run(data, tmp_path, capsys):
    argv, path = run_argv(data, tmp_path), tmp_path / "settings.json"
    assert arena.main(argv) == 1 and arena.main([*argv, "-b", "12"]) == 1
    assert json.loads(path.read_text())["options"]["batch_size"] == 12
    run = tmp_path / "runs/test_vim2/epochs16-lr0.001-seed0"
    run.mkdir(parents=True)
    (run / "last.pth").touch()  # a run that was cut off, which other settings could not go on with
    assert "holds runs with batch-size 12, not 256" in error_of(argv, capsys)


def test_a_model_that_the_settings_lack(folder, capsys):
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "entries": {}}))
    assert "has no model test_vim2: name it in --models" in error_of(["time", str(folder)], capsys)


def test_a_file_is_no_folder(data, tmp_path, capsys):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/arena"):
        assert "choose another output folder" in error_of(run_argv(data, folder), capsys)
    for command in ("time", "scale", "table"):
        assert "Cannot read" in error_of([command, str(tmp_path / "file")], capsys)


def test_a_folder_that_another_command_writes_to_is_left_alone(folder, data, capsys):
    before = (folder / "settings.json").read_text()
    with own_folder(folder, None):
        for argv in ([*run_argv(data, folder), "--models", "test_resnet"], ["time", str(folder)]):
            assert f"Another run is writing to {folder}" in error_of(argv, capsys)
    assert (folder / "settings.json").read_text() == before
