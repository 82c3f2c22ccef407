import csv
import itertools
import json
import shutil
import signal
from types import SimpleNamespace

import pytest
import timm
import torch
from classify_helpers import TINY, make_folders, tool
from PIL import Image
from timm.data import auto_augment
from two_processes import start_two

from vim2.classify import train, training
from vim2.classify.cli import main
from vim2.classify.data import open_train_and_val
from vim2.classify.options import TrainOptions, apply_recipe
from vim2.classify.training import Run, plain_containers
from vim2.command.options import resolve
from vim2.command.processes import Processes

LEARNT = ("train_loss", "val_loss", "top1", "top5", "lr")


def read_rows(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def learnt(folder):
    return [{k: row[k] for k in row if k.removeprefix("ema_") in LEARNT} for row in read_rows(folder)]


def test_a_run_learns_and_leaves_its_files(trained):
    rows = read_rows(trained)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[1]["top1"]) > 60  # chance is 33
    metrics = json.loads((trained / "metrics.json").read_text())
    assert [str(row["train_loss"]) for row in metrics["history"]] == [row["train_loss"] for row in rows]
    assert metrics["args"]["model"] == "test_vim2" and metrics["best"]["ema_top1"] is not None
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(trained.glob(".*"))  # nothing half-written


@pytest.mark.parametrize("bar", [False, True])
def test_a_long_epoch_says_how_it_goes_on_where_no_bar_does(bar, data, tmp_path, capsys, monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count(0, 3).__next__)  # it is looked at twice a step
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(training, "has_bar", lambda processes: bar)
    options = dict(model="test_vim2", data_dir=str(data), img_size=32, device="cpu", workers=0, output=str(tmp_path))
    (row,) = train(**options, epochs=1, batch_size=8, log_interval=1)["history"]
    said = [line for line in capsys.readouterr().out.splitlines() if ", step " in line]
    if bar:
        assert not said
        return
    first, second = said  # every 12 s, of 16 images each
    assert first.startswith("epoch   1/1, step 2/4 · loss ") and first.endswith(" · 1 images/s")
    assert second == f"epoch   1/1, step 4/4 · loss {row['train_loss']:.4f} · 1 images/s"


def test_an_epoch_of_few_long_steps_says_how_it_goes_on(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=itertools.count(0, 11).__next__))
    options = dict(model="test_vim2", data_dir=str(data), img_size=32, device="cpu", workers=0, output=str(tmp_path))
    train(**options, epochs=1, batch_size=8)  # of 4 steps, fewer than from look to look
    said = [line for line in capsys.readouterr().out.splitlines() if ", step " in line]
    assert [line.split(" · ")[0] for line in said] == [f"epoch   1/1, step {step}/4" for step in (1, 2, 3, 4)]


def test_beside_a_bar_the_loss_is_not_looked_at_at_every_step(data, tmp_path, monkeypatch):
    """A GPU has to be waited for each time."""
    looks = []
    mean_loss = training.Run.mean_loss
    monkeypatch.setattr(training.Run, "mean_loss", lambda *args: looks.append(args) or mean_loss(*args))
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=itertools.count(0, 11).__next__))
    monkeypatch.setattr(training, "has_bar", lambda processes: True)
    options = dict(model="test_vim2", data_dir=str(data), img_size=32, device="cpu", workers=0, output=str(tmp_path))
    train(**options, epochs=1, batch_size=8)
    assert len(looks) == 1  # at the epoch's end


def test_timm_reads_the_checkpoint(trained):
    checkpoint = torch.load(trained / "best.pth", weights_only=True)
    assert checkpoint["class_names"] == ["blue", "green", "red"] and checkpoint["arch"] == "test_vim2"
    model = timm.create_model("test_vim2", num_classes=3, checkpoint_path=str(trained / "best.pth"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict_ema"][name])
    differs = [not torch.equal(v, checkpoint["state_dict"][k]) for k, v in checkpoint["state_dict_ema"].items()]
    assert any(differs)


def test_a_killed_run_goes_on_exactly(data, tmp_path):
    """With everything random on, in worker processes, killed in the middle of epoch 2."""
    common = ["train", "--data-dir", data, *TINY, "-j", "1", "--epochs", "3", "--mixup", "0.8", "--cutmix", "1.0"]
    common += ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.5", "--drop-path", "0.2", "--drop", "0.1"]
    common += ["--model-ema", "--model-ema-decay", "0.9", "--grad-accum-steps", "3", "--clip-grad", "1"]
    common += ["--output", tmp_path]
    whole = tool(*common, "--experiment", "whole")
    cut = tool(*common, "--experiment", "cut", "--resume")
    while "epoch   1/3" not in (line := cut.stdout.readline()):
        assert line, cut.stderr.read()
    cut.send_signal(signal.SIGKILL)
    cut.communicate()
    assert whole.wait() == 0, whole.stderr.read()
    assert len(read_rows(tmp_path / "cut")) == 1
    # the checkpoint alone is enough: a run may also be cut off before its metrics are written
    (tmp_path / "cut" / "metrics.csv").unlink()
    again = tool("train", "--resume", tmp_path / "cut" / "last.pth", "--epochs", "3")
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "Going on after epoch 1 of 3" in out
    assert learnt(tmp_path / "cut") == learnt(tmp_path / "whole")
    assert len(learnt(tmp_path / "whole")) == 3
    last = [torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("cut", "whole")]
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(last[0][key][name], value) for name, value in last[1][key].items())


def test_a_finished_run_resumed_stays_as_it_is(trained, data, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.csv").read_text()
    assert main(["train", "--resume", str(tmp_path / "run" / "last.pth")]) == 0
    run = train(data_dir=data, output=tmp_path, experiment="run", resume=True)  # as --resume without a file
    assert len(run["history"]) == 2 and run["args"]["model"] == "test_vim2"
    run = train(data_dir=data, output=tmp_path, experiment="run", resume=True, epochs=1)  # which it had already
    assert len(run["history"]) == run["args"]["epochs"] == 2
    said = capsys.readouterr().out
    assert said.count("Nothing is left to train: the run has had 2 epochs. More --epochs go on with it.") == 3
    assert "Going on" not in said
    assert (tmp_path / "run" / "metrics.csv").read_text() == before


def test_two_processes_train_as_one_and_count_every_image_once(data, tmp_path):
    """7 + 7 + 7 validation images do not divide by two; the first process reports what one alone measures."""
    uneven = make_folders(tmp_path / "uneven", train=8, val=7)
    options = ["--data-dir", uneven, *TINY, "-b", "4", "--epochs", "1", "--output", tmp_path, "--experiment", "two"]
    two = tool("train", *options, "--grad-accum-steps", "2", torchrun=2)
    _, err = two.communicate()
    assert two.returncode == 0, err
    row = read_rows(tmp_path / "two")[0]
    argv = ["validate", "--data-dir", uneven, "--checkpoint", tmp_path / "two" / "best.pth", "-j", "0", "-b", "4"]
    pair = start_two("vim2.classify.cli", ["vim2.classify"], *argv, "--output", tmp_path / "pair")
    assert main([*map(str, argv), "--output", str(tmp_path / "alone")]) == 0
    assert pair.wait() == 0, pair.stderr.read()
    alone, pair = (json.loads((tmp_path / n / "validation.json").read_text())[0] for n in ("alone", "pair"))
    assert alone["images"] == pair["images"] == 21
    for scores, loss in ((alone, "loss"), (pair, "loss"), (row, "val_loss")):
        assert float(scores[loss]) == pytest.approx(alone["loss"], rel=1e-5)
        assert float(scores["top1"]) == pytest.approx(alone["top1"])


def test_fine_tuning_makes_a_new_head_and_leaves_what_is_frozen(trained, tmp_path):
    colours = {"dark": (20, 20, 20), "light": (230, 230, 230)}
    shades = make_folders(tmp_path / "shades", train=8, val=3, colours=colours)
    common = dict(data_dir=shades, model="test_vim2", img_size=32, workers=0, batch_size=8, epochs=1, device="cpu")
    common.update(initial_checkpoint=trained / "best.pth", output=tmp_path, lr=1e-2, warmup_epochs=0, drop_path=0.3)
    start = torch.load(trained / "best.pth", weights_only=True)["state_dict_ema"]

    def changed(freeze):
        run = train(**common, freeze=freeze, experiment=f"freeze{freeze}")
        tuned = torch.load(f"{run['folder']}/last.pth", weights_only=True)
        assert tuned["state_dict"]["head.fc.weight"].shape[0] == tuned["num_classes"] == 2
        return {k for k, v in tuned["state_dict"].items() if "head" not in k and not torch.equal(v, start[k])}

    assert changed(5) == set()
    two = changed(2)
    assert two and not any(k.startswith(("patch_embed", "stages.0.", "stages.1.")) for k in two)
    assert any(k.startswith("stages.2.") for k in two) and any(k.startswith("norm") for k in two)
    assert any(k.startswith("patch_embed") for k in changed(0))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(epochs=5), ["Warm-up takes the whole run, 5 epochs"]),
        (dict(epochs=6), []),
        # 12 updates: 0.9 ** 12 is 0.28, 0.8 ** 12 is 0.07
        (dict(epochs=6, model_ema=True, model_ema_decay=0.9), ["After 12 updates, 28 % of the moving average"]),
        (dict(epochs=6, model_ema=True, model_ema_decay=0.8), []),
        (dict(epochs=6, model_ema=True, model_ema_warmup=True), []),
    ],
)
def test_what_is_meant_for_longer_runs_is_told(given, words, data):
    options = dict(data_dir=data, model="test_vim2", img_size=32, device="cpu", workers=0, batch_size=16, **given)
    run = Run(resolve(TrainOptions, given=options)[0], Processes(torch.device("cpu")))
    advice = list(run.short_run_advice())
    assert len(advice) == len(words) and all(line.startswith(start) for line, start in zip(advice, words)), advice


def test_frozen_stages_do_not_drop_paths_and_get_no_gradients(data, capsys):
    options = dict(data_dir=data, model="test_vim2", img_size=32, device="cpu", workers=0, freeze=2, drop_path=0.5)
    run = Run(resolve(TrainOptions, given=options)[0], Processes(torch.device("cpu")))
    assert "--freeze 2 keeps random weights" in capsys.readouterr().out
    needed = []
    for stage in run.model.stages:
        stage.register_forward_hook(lambda module, inputs, output: needed.append(output.requires_grad))
    run.train_epoch(0)
    modes = {n: m.training for n, m in run.model.named_modules() if type(m).__name__ == "DropPath"}
    assert modes and all(on == (n.split(".")[1] in "23") for n, on in modes.items())
    assert needed[:4] == [False, False, True, True]  # the backward pass ends where the frozen part begins


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_on_the_cpu(data, tmp_path, dtype):
    argv = ["--data-dir", str(data), *TINY, "--epochs", "1", "--amp", "--amp-dtype", dtype, "--output", str(tmp_path)]
    run = train([*argv, "--grad-checkpointing", "--no-aug", "--lr", "3e-3", "--warmup-epochs", "0"])
    assert 0 < run["history"][0]["train_loss"] < 3
    last = torch.load(f"{run['folder']}/last.pth", weights_only=True)
    assert last["state_dict"]["head.fc.weight"].dtype == torch.float32
    assert (last["scaler"] is not None) == (dtype == "float16")


def test_compiled_training_saves_plain_names(data, tmp_path):
    argv = ["--data-dir", str(data), *TINY, "--epochs", "1", "--torchcompile", "eager", "--output", str(tmp_path)]
    # batches of one size, so that nothing is compiled for a second one
    run = train([*argv, "-b", "5", "--model-kwargs", "depths=1,1,1,1", "token_mixers=1"])
    names = torch.load(f"{run['folder']}/best.pth", weights_only=True)["state_dict"]
    assert names.keys() == timm.create_model("test_vim2", depths=(1, 1, 1, 1), token_mixers=1).state_dict().keys()


def test_webp_and_a_folder_without_splits(tmp_path):
    """A fifth of each class is set aside, the same for training and for validation afterwards."""
    source = make_folders(tmp_path / "source", train=10, val=0, suffix=".webp")
    (source / "train").rename(tmp_path / "flat")
    run = train(["--data-dir", str(tmp_path / "flat"), *TINY, "--epochs", "1", "--output", str(tmp_path)])
    checkpoint = f"{run['folder']}/best.pth"
    output = tmp_path / "out"
    argv = ["validate", "--data-dir", str(tmp_path / "flat"), "--checkpoint", checkpoint, "-j", "0"]
    assert main([*argv, "--output", str(output)]) == 0
    scores = json.loads((output / "validation.json").read_text())[0]
    assert scores["images"] == 6
    assert scores["loss"] == pytest.approx(run["history"][0]["val_loss"], rel=1e-5)


def test_an_empty_split_to_validate_on_sets_images_to_train_on_aside(data):
    train_images, val_images, names, held_out = open_train_and_val("", data, val_split="", holdout=0.25)
    assert (len(train_images), len(val_images), held_out) == (27, 9, True) and names == ["blue", "green", "red"]
    files = [{images.filename(i) for i in images.indices} for images in (train_images, val_images)]
    assert not files[0] & files[1] and all("/train/" in name for name in files[0] | files[1])
    assert sorted(val_images.targets()) == [0] * 3 + [1] * 3 + [2] * 3


def test_grey_images_one_channel(data, tmp_path):
    run = train(["--data-dir", str(data), *TINY, "--epochs", "1", "--in-chans", "1", "--output", str(tmp_path)])
    weights = torch.load(f"{run['folder']}/best.pth", weights_only=True)["state_dict"]
    assert weights["patch_embed.proj.weight"].shape[1] == 1
    assert main(["predict", str(data / "val" / "red"), "--checkpoint", f"{run['folder']}/best.pth", "--max-pictures",
                 "0", "--output", str(tmp_path)]) == 0  # fmt: skip


def resolved(*argv, world_size=1):
    options, explicit = resolve(TrainOptions, argv)
    return apply_recipe(options, explicit, world_size)


def test_the_recipe_is_the_papers_and_options_override_it():
    options = resolved("--recipe", "imagenet", "--model", "vim2_small", world_size=8)
    assert options.epochs == 300 and options.warmup_epochs == 20 and options.batch_size == 128
    assert options.weight_decay == 0.05 and options.clip_grad == 5.0 and options.drop_path == 0.3
    assert options.mixup == 0.8 and options.cutmix == 1.0 and options.model_ema
    options = resolved(
        "--recipe", "imagenet", "--epochs", "100", "--no-model-ema", "--mixup", "0", "--drop-path", "0.1"
    )
    assert (options.epochs, options.model_ema, options.mixup, options.drop_path) == (100, False, 0, 0.1)
    assert options.cutmix == 1.0 and options.batch_size == 1024


@pytest.mark.parametrize("name", timm.list_models("vim2_*", module="vim2"))
def test_the_recipes_stochastic_depth_is_that_of_a_models_size(name):
    rate = {"nano": None, "tiny": 0.2, "small": 0.3, "base": 0.6}[name.split("_")[1]]
    assert resolved("--recipe", "imagenet", "--model", name).drop_path == rate


def test_the_recipes_strongest_augmentation():
    """The last level of RandAugment's posterising keeps no bit, where newer Pillows take no 0."""
    image = Image.new("RGB", (8, 8), (255, 130, 4))
    black = auto_augment.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)(image)
    assert black.getcolors() == [(64, (0, 0, 0))]
    bright = auto_augment.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=9)(image)
    assert bright.getcolors() == [(64, (128, 128, 0))]


def test_the_recipes_rates_scale_with_the_batch(data):
    """1e-3 from 1e-6 to 1e-5 for 1024 images an update, half of each for 512."""
    argv = ["--recipe", "imagenet", "--data-dir", str(data), *TINY, "--lr-base-size", "16", "--epochs", "40"]
    run = Run(resolved(*argv), Processes(torch.device("cpu")))
    assert run.lr == pytest.approx(1e-3 * 8 / 16)
    total = run.updates_per_epoch * 40
    rates = []
    for update in (0, run.updates_per_epoch * 20, total):
        run.scheduler.step_update(update)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.5e-6) and rates[2] == pytest.approx(0.5e-5)
    assert rates[1] == pytest.approx((0.5e-3 + 0.5e-5) / 2, rel=1e-3)


def test_layer_decay_and_weight_decay_reach_the_right_parameters(data):
    options, _ = resolve(TrainOptions, ["--data-dir", str(data), *TINY, "--layer-decay", "0.5"])
    run = Run(options, Processes(torch.device("cpu")))
    names = {id(p): n for n, p in run.model.named_parameters()}
    group = {names[id(p)]: g for g in run.optimizer.param_groups for p in g["params"]}
    assert group["head.fc.weight"]["lr_scale"] == 1 > group["patch_embed.proj.weight"]["lr_scale"] > 0
    assert all(group[n]["weight_decay"] == 0 for n in group if n.endswith(("A_log", "s6.D", "bias", "norm.weight")))
    assert group["head.fc.weight"]["weight_decay"] == 0.05


def test_containers_become_plain(tmp_path):
    import numpy as np

    value = plain_containers({"a": (1, [2.5, None]), "path": tmp_path, "n": np.float64(0.5)})
    torch.save(value, tmp_path / "x.pth")
    assert torch.load(tmp_path / "x.pth", weights_only=True) == {"a": (1, [2.5, None]), "path": str(tmp_path), "n": 0.5}


@pytest.mark.parametrize("opt", ["novograd", "lookahead_adamw"])
def test_optimisers_that_keep_something_else_go_on_exactly(opt, data, tmp_path):
    """A number for a whole parameter; slow weights beside the state of another optimiser."""
    options = dict(data_dir=data, model="test_vim2", img_size=32, workers=0, batch_size=8, device="cpu", no_aug=True)
    options.update(opt=opt, sched="constant", warmup_epochs=0, output=tmp_path)
    whole = train(**options, epochs=2, experiment="whole")["history"]
    train(**options, epochs=1, experiment="cut")
    again = train(**options, epochs=2, experiment="cut", resume=True)["history"]
    assert [row["val_loss"] for row in again] == [row["val_loss"] for row in whole]
