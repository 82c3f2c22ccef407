import json
import signal
import subprocess
import sys
import time

import pytest
from devices import needs_gpu

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import numpy as np
import pandas as pd
import torch
from forecast_helpers import TINY, TOOLS, environment, make_frame, write_csv
from safetensors.torch import load_file

import vim2.forecast.training
from vim2.checkpoints import read_checkpoint, save_checkpoint
from vim2.command.options import resolve
from vim2.forecast import Forecaster, UserError, fit
from vim2.forecast.committee import Networks
from vim2.forecast.options import FitOptions
from vim2.forecast.trainer import Trainer
from vim2.forecast.training import Run

OPTIONS = dict(horizon=12, lookback=48, d_model=4, d_state=2, members=2, epoch_steps=4, device="cpu", lr=2e-3)


def start(data, output, **options):
    return fit(data=str(data), output=str(output), **{**OPTIONS, **options})


def test_nothing_is_scored_for_a_folder_that_cannot_be_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr("vim2.forecast.training.score_all", lambda *_: pytest.fail("it was scored"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Nothing can be written into .*: choose another --output"):
        start(data, tmp_path / "file", epochs=1)


def make_run(saved=None, **options):
    return Run(resolve(FitOptions, given=options)[0], saved)


def weights(folder):
    return read_checkpoint(folder / "last.pth")["state_dict"]


def test_a_run_tells_all_that_is_needed_to_repeat_it(trained, data):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["rows"] == {"train": 280, "val": 40, "test": 80}
    assert metrics["windows"] == {"train": 280 - 60 + 1, "val": 40 - 12 + 1}
    assert metrics["seed"] == 0 and metrics["versions"]["torch"] == torch.__version__.split("+")[0]
    assert metrics["options"]["lr"] == 2e-3 and metrics["options"]["data"] == str(data)
    assert len(metrics["history"]) == 2 and metrics["best"] in metrics["history"]
    assert set(metrics["baselines"]) == {"ridge", "last value", "seasonal naive"}


def test_training_learns_what_the_naive_forecasts_cannot_know(tmp_path):
    """Two series whose noise is the other's, some steps ago: only a look across the variates helps."""
    noise = np.random.default_rng(0).normal(size=1000)
    frame = pd.DataFrame({"date": pd.date_range("2024", periods=990, freq="h"), "a": noise[10:], "b": noise[:-10]})
    data = write_csv(tmp_path / "a.csv", frame)
    options = dict(horizon=4, lookback=16, patch=4, stride=4, d_model=16, d_state=4, dropout=0.0, head_dropout=0.0)
    options |= dict(batch_size=16, epoch_steps=43, lr=5e-3, ema=0.9, instance_norm="none", loss="mse")
    run = start(data, tmp_path, **options, epochs=6, variate_mixer="s6", experiment="r")
    assert run["committee"]["val_mse"] < 0.7 * run["baselines"]["ridge"]["val_mse"]
    assert sum(row["weight"] for name, row in run["committee"]["members"].items() if "TSM2" in name) > 0.5
    alone = start(data, tmp_path, **options, epochs=2, variate_mixer="none", experiment="alone")
    assert alone["committee"]["val_mse"] > 0.9 * run["baselines"]["ridge"]["val_mse"]


def test_same_seed_same_run_and_another_seed_another(tmp_path, data):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        start(data, tmp_path, epochs=1, seed=seed, experiment=name)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["0.head.weight"], c["0.head.weight"])
    assert not torch.equal(a["0.head.weight"], a["1.head.weight"])


@pytest.mark.parametrize(
    "options", [{}, {"members": 1, "epoch_steps": 40}, {"norm": "2d", "quantiles": [0.1, 0.9]}], ids=str
)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path, data, options, monkeypatch, capsys):
    whole = start(data, tmp_path, epochs=3, patience=9, experiment="whole", **options)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    for line, row in zip(told, whole["history"], strict=True):  # with what the epoch is chosen by
        assert ("CRPS" if "quantiles" in options else "validation MSE") + f" {row['val_loss']:.4f}" in line
    epochs, train = [], Trainer.epoch

    def stop(trainer, epoch, called=""):
        if (epoch == 1 or called) and (epoch, called) not in epochs:
            epochs.append((epoch, called))
            raise KeyboardInterrupt
        return train(trainer, epoch, called)

    monkeypatch.setattr(Trainer, "epoch", stop)
    for resume in (False, True):  # cut off in its second epoch, then while it is fitted again to all rows
        with pytest.raises(KeyboardInterrupt):
            start(data, tmp_path, epochs=3, patience=9, experiment="cut", resume=resume, **options)
    cut = start(data, tmp_path, epochs=3, patience=9, experiment="cut", resume=True, **options)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert whole["committee"] == cut["committee"]
    for part in ("best", "refitted"):
        a, b = (load_file(tmp_path / name / part / "model.safetensors") for name in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    for mine, theirs in zip(whole["history"], cut["history"], strict=True):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}


def test_a_killed_process_goes_on(tmp_path, data):
    argv = [sys.executable, TOOLS / "forecast.py", "fit", data, *TINY, "--output", tmp_path, "--experiment", "run"]
    argv = [*map(str, argv), "--epochs", "400", "--patience", "400"]
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    last = tmp_path / "run" / "last.pth"
    until = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert last.exists(), errors.decode()
    done = len(read_checkpoint(last)["history"])
    assert done >= 1
    with pytest.raises(UserError, match=r"run with --epochs 400, not 3"):
        start(data, tmp_path, experiment="run", resume=True, epochs=3)
    Forecaster.from_pretrained(tmp_path / "run")


def test_resuming_needs_the_same_data(tmp_path, data):
    start(data, tmp_path, epochs=2, epoch_steps=1, experiment="r")
    other = write_csv(tmp_path / "other.csv", make_frame(seed=1))
    with pytest.raises(UserError, match="is not the data"):
        start(other, tmp_path, experiment="r", resume=True, epochs=2, epoch_steps=1)
    with pytest.raises(UserError, match="holds a run already"):
        start(data, tmp_path, experiment="r")
    whole = (tmp_path / "r" / "last.pth").read_bytes()
    (tmp_path / "r" / "last.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        start(data, tmp_path, experiment="r", resume=True)


def test_a_run_goes_on_with_the_season_that_its_best_epoch_was_saved_with(tmp_path):
    """Earlier versions told no season of ten-day steps, 1."""
    data = write_csv(tmp_path / "a.csv", make_frame(step="10D"))
    run = tmp_path / "r"
    start(data, tmp_path, epochs=1, epoch_steps=1, experiment="r")
    last, config = read_checkpoint(run / "last.pth"), json.loads((run / "best" / "config.json").read_text())
    assert last["forecaster"]["season"] == config["season"] == 36
    last["forecaster"]["season"] = config["season"] = 1
    save_checkpoint(last, run / "last.pth")
    (run / "best" / "config.json").write_text(json.dumps(config))
    start(data, tmp_path, epochs=1, epoch_steps=1, experiment="r", resume=True)
    assert Forecaster.from_pretrained(run, refitted=False).season == 1


def test_a_run_goes_on_though_its_step_had_another_name(tmp_path):
    """Quarters that begin with January are QS-OCT to pandas 2, and QS-JAN to pandas 3; those of February are others."""
    data, run = write_csv(tmp_path / "a.csv", make_frame(step="QS")), tmp_path / "r"
    options = dict(epochs=1, epoch_steps=1, experiment="r")
    start(data, tmp_path, **options)
    for name in ("QS-JAN", "QS-OCT", "QS-FEB", "no step"):
        last = read_checkpoint(run / "last.pth")
        last["forecaster"]["step"] = name
        save_checkpoint(last, run / "last.pth")
        if name in ("QS-JAN", "QS-OCT"):
            start(data, tmp_path, resume=True, **options)
        else:
            with pytest.raises(UserError, match="is not the data"):
                start(data, tmp_path, resume=True, **options)


def test_values_of_the_same_scale_are_other_data(tmp_path, data):
    start(data, tmp_path, epochs=1, epoch_steps=1, experiment="r")
    frame = make_frame()
    frame.loc[290, "north"] += 0.01  # a row to validate on
    other = write_csv(tmp_path / "other.csv", frame)
    with pytest.raises(UserError, match="is not the data"):
        start(other, tmp_path, experiment="r", resume=True, epochs=1, epoch_steps=1)
    moved = write_csv(tmp_path / "moved.csv")
    assert start(moved, tmp_path, experiment="r", resume=True, epochs=1, epoch_steps=1)["history"]


def cut_off(monkeypatch, *args, **options):
    """As `start`, stopped in its second epoch."""
    train = Trainer.epoch

    def stop(trainer, epoch, called=""):
        if epoch == 1:
            raise KeyboardInterrupt
        return train(trainer, epoch, called)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "epoch", stop)
        start(*args, **options)


def change_last(folder, **changes):
    saved = read_checkpoint(folder / "last.pth")
    saved.update(changes)
    torch.save({name: value for name, value in saved.items() if value is not ...}, folder / "last.pth")


def test_a_run_from_before_frequencies_were_masked_goes_on_without(tmp_path, data, monkeypatch):
    options = dict(epochs=2, epoch_steps=2)
    start(data, tmp_path, experiment="plain", frequency_mask=0.0, **options)
    cut_off(monkeypatch, data, tmp_path, experiment="cut", frequency_mask=0.0, **options)
    saved = read_checkpoint(tmp_path / "cut" / "last.pth")["options"]
    del saved["frequency_mask"]
    change_last(tmp_path / "cut", options=saved)
    with pytest.raises(UserError, match=r"run with --frequency-mask 0.0, not 0.2"):
        start(data, tmp_path, experiment="cut", resume=True, frequency_mask=0.2, **options)
    start(data, tmp_path, experiment="cut", resume=True, **options)
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)
    # and a forecaster that says nothing of it is fitted again without
    path = tmp_path / "plain" / "best" / "config.json"
    config = json.loads(path.read_text())
    del config["training"]["frequency_mask"]
    path.write_text(json.dumps(config))
    assert Forecaster.from_pretrained(path.parent).training["frequency_mask"] == 0.0


def test_a_run_from_before_spaces_around_names_were_left_out_goes_on(tmp_path, data, monkeypatch):
    frame = pd.read_csv(data)
    frame.rename(columns={"north": " north", "level": "level "}).to_csv(tmp_path / "spaced.csv", index=False)
    frame.to_csv(tmp_path / "a.csv", index=False)
    common = dict(epochs=2, epoch_steps=1, targets=["north", "south"], future_columns=["level"])
    whole = start(tmp_path / "a.csv", tmp_path, experiment="whole", **common)
    cut_off(monkeypatch, tmp_path / "a.csv", tmp_path, experiment="r", **common)
    last, spaced = read_checkpoint(tmp_path / "r" / "last.pth"), dict(future_columns=["level "])
    changes = dict(options={**last["options"], **spaced, "targets": [" north", "south"]})
    changes |= dict(forecaster={**last["forecaster"], **spaced, "columns": [" north", "south"]})
    change_last(tmp_path / "r", **changes)
    for targets in ([" north", "south"], ["north", "south"]):
        again = start(tmp_path / "spaced.csv", tmp_path, experiment="r", resume=True, **{**common, "targets": targets})
        assert again["options"]["targets"] == ["north", "south"]
    assert [row["val_mse"] for row in again["history"]] == [row["val_mse"] for row in whole["history"]]
    assert Forecaster.from_pretrained(tmp_path / "r").columns == ["north", "south"]


def test_a_finished_run_says_so(tmp_path, data, capsys):
    options = dict(epochs=4, epoch_steps=1, patience=1, lr=1e-9, experiment="r")  # which brings no progress
    before = start(data, tmp_path, **options)
    assert len(before["history"]) < 4
    capsys.readouterr()
    again = start(data, tmp_path, resume=True, **options)
    assert again["history"] == before["history"] and again["committee"] == before["committee"]
    epochs, said = len(before["history"]), capsys.readouterr().out
    assert f"Nothing is left to train after epoch {epochs} of 4, without progress for --patience: the members" in said
    options = dict(epochs=1, epoch_steps=1, experiment="s")
    start(data, tmp_path, **options)
    capsys.readouterr()
    start(data, tmp_path, resume=True, **options)
    said = capsys.readouterr().out
    assert "Nothing is left to train after epoch 1 of 1: the members are" in said and "Going on" not in said


def test_a_last_pth_from_before_tables_had_fingerprints_goes_on(tmp_path, data):
    options = dict(epochs=2, epoch_steps=1, experiment="r")
    start(data, tmp_path, **options)
    change_last(tmp_path / "r", table=..., history=read_checkpoint(tmp_path / "r" / "last.pth")["history"][:1])
    assert len(start(data, tmp_path, resume=True, **options)["history"]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"history": ...}, "not a last.pth"),
        ({"history": [1]}, "its history is damaged"),
        ({"history": [{"epoch": 1}]}, "its history is damaged"),
        ({"optimizer": {}}, "optimiser's state is damaged"),
        ({"optimizer": {"state": {}, "param_groups": [1]}}, "optimiser's state is damaged"),
        ({"state_dict": {1: torch.ones(1)}}, "lacks weights"),
        ({"state_dict": {"0.head.bias": torch.full((12,), torch.nan)}}, "NaN or infinite"),
        ({"ema": {}}, "does not fit"),
        ({"state_dict": {}}, "does not fit"),
        ({"options": {"horizon": "12"}}, "horizon must be a whole number"),
    ],
    ids=str,
)
def test_a_last_pth_with_an_odd_inside(tmp_path, data, changes, words):
    options = dict(epochs=1, epoch_steps=1, experiment="r")
    start(data, tmp_path, **options)
    change_last(tmp_path / "r", **changes)
    with pytest.raises(UserError, match=words):
        start(data, tmp_path, resume=True, **options)


def test_two_runs_in_one_folder(tmp_path, data):
    argv = [sys.executable, TOOLS / "forecast.py", "fit", data, *TINY, "--output", tmp_path, "--experiment", "run"]
    argv = [*map(str, argv), "--epochs", "400", "--patience", "400"]
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run" / "last.pth").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(UserError, match="Another run is writing to"):
            start(data, tmp_path, experiment="run", resume=True, epochs=400, patience=400)
    finally:
        process.kill()
        process.communicate()


def test_it_stops_without_progress_and_keeps_the_best_epoch(tmp_path, data):
    run = start(data, tmp_path, lr=0.5, epochs=30, patience=2, experiment="r")
    assert len(run["history"]) == run["best"]["epoch"] + 2 < 30
    kept = Forecaster.from_pretrained(tmp_path / "r").metrics
    assert kept == {**run["best"], "committee": run["committee"], "seed": 0}


def test_the_test_rows_are_never_looked_at(tmp_path, data):
    frame = make_frame()
    frame.loc[320:, ["north", "south", "level"]] = 5.0
    other = write_csv(tmp_path / "other.csv", frame)
    start(data, tmp_path, epochs=1, experiment="a")
    start(other, tmp_path, epochs=1, experiment="b")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_conformal_correction_is_of_validation_alone(tmp_path, data):
    frame = make_frame()
    frame.loc[320:, ["north", "south", "level"]] = 5.0
    other = write_csv(tmp_path / "other.csv", frame)
    options = dict(epochs=1, epoch_steps=1, quantiles=[0.1, 0.9])
    runs = [start(path, tmp_path, experiment=path.stem, **options) for path in (data, other)]
    a, b = (Forecaster.from_pretrained(run["folder"]).conformal for run in runs)
    assert a is not None and torch.equal(a, b)
    assert 0 <= runs[0]["committee"]["val_coverage"] <= 1


@pytest.mark.parametrize("options", [{}, {"quantiles": [0.1, 0.5, 0.9]}], ids=str)
def test_each_epoch_forecasts_each_validation_window_once_and_so_does_mixing(tmp_path, data, options, monkeypatch):
    seen, forward = [], Networks.forward

    def counted(networks, x, *args, **given):
        if not networks.training:
            seen.append(len(x))
        return forward(networks, x, *args, **given)

    monkeypatch.setattr(Networks, "forward", counted)
    run = start(data, tmp_path, epochs=3, epoch_steps=1, patience=9, experiment="r", **options)
    assert sum(seen) == (3 + 1) * run["windows"]["val"]


def test_too_few_windows_to_learn_from_are_refused_and_few_are_warned_of(tmp_path, capsys):
    frame = make_frame(70)[["date", "north"]]
    with pytest.raises(UserError, match=r"^3 rows make 1 windows of 1 \+ 1 steps to train on, too few"):
        fit(data=frame[:3], output=str(tmp_path), device="cpu")
    with pytest.raises(UserError, match=r"^49 rows of training .* too few for a horizon of 80: shorten it"):
        fit(data=frame, horizon=80, output=str(tmp_path), device="cpu")  # no word of a lookback, which nobody gave
    options = dict(horizon=2, lookback=8, epochs=1, epoch_steps=1, members=1, device="cpu", refit=False)
    for split, warned in (([46, 8, 16], True), ([46, 24, 0], False)):
        run = fit(data=frame, split=split, experiment=str(split), output=str(tmp_path), **options)
        few = f"{run['windows']['train']} windows to train on and {run['windows']['val']} to validate on are few"
        assert (few in capsys.readouterr().out) == warned


def test_windows_are_normalised_about_what_ridge_prefers(tmp_path, capsys):
    noise = np.random.default_rng(0).normal(size=400)
    dates = pd.date_range("2024", periods=400, freq="h")
    for name, series in (("mean", noise), ("last", noise.cumsum())):
        data = write_csv(tmp_path / f"{name}.csv", pd.DataFrame({"date": dates, "a": series}))
        options = dict(epochs=1, epoch_steps=1, lr=1e-9)
        run = start(data, tmp_path, experiment=name, **options)
        assert f"Instance normalisation is about the {name}" in capsys.readouterr().out
        assert run["options"]["instance_norm"] == "auto"
        assert Forecaster.from_pretrained(run["folder"]).model.config.instance_norm == name
        again = start(data, tmp_path, experiment=name, resume=True, **options)
        assert again["best"] == run["best"]
        other = start(data, tmp_path, experiment=f"{name} itself", instance_norm=name, **options)
        assert other["best"]["val_mse"] == run["best"]["val_mse"]


def test_that_a_member_is_cautious_does_not_change_what_windows_are_normalised_about(tmp_path, monkeypatch):
    monkeypatch.setattr("vim2.forecast.training.cautious", lambda path, val: path[-1])  # the last value
    t = np.arange(400)
    waves = 3 * np.sin(2 * np.pi * t / 24) + 0.5 * np.random.default_rng(0).normal(size=400).cumsum()
    frame = pd.DataFrame({"date": pd.date_range("2024", periods=400, freq="h"), "a": waves})
    run = start(write_csv(tmp_path / "a.csv", frame), tmp_path, epochs=1, epoch_steps=1)
    members = run["committee"]["members"]
    assert members["ridge about the last value"]["val_mse"] > members["ridges about the mean"]["val_mse"]
    assert Forecaster.from_pretrained(run["folder"]).model.config.instance_norm == "last"


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_other_losses_train_and_epochs_are_chosen_by_the_squared_error(tmp_path, data, loss):
    run = start(data, tmp_path, epochs=2, loss=loss, experiment="r")
    other = start(data, tmp_path, epochs=2, experiment="other")
    assert run["history"][0]["train_loss"] != other["history"][0]["train_loss"]
    assert run["best"]["val_loss"] == run["best"]["val_mse"]


def test_masked_frequencies_change_the_training_and_none_do_not(tmp_path, data, monkeypatch):
    masked = start(data, tmp_path, epochs=1, experiment="masked")
    plain = start(data, tmp_path, epochs=1, frequency_mask=0.0, experiment="plain")
    assert masked["options"]["frequency_mask"] == 0.2
    assert masked["history"][0]["train_loss"] != plain["history"][0]["train_loss"]
    monkeypatch.setattr("vim2.forecast.trainer.mask_frequencies", lambda x, y, rate: (x, y))
    untouched = start(data, tmp_path, epochs=1, experiment="untouched")
    assert untouched["history"][0]["train_loss"] == plain["history"][0]["train_loss"]


@needs_gpu
def test_cuda_graphs_train_the_same(tmp_path, data):
    options = dict(device="cuda", epochs=2, dropout=0.0, head_dropout=0.0, norm="2d")
    plain, graph = (start(data, tmp_path, cuda_graph=g, experiment=str(g), **options) for g in (False, True))
    for a, b in zip(plain["history"], graph["history"]):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)


def test_a_loss_that_is_not_finite_is_told_and_nothing_is_lost(tmp_path, data, monkeypatch):
    start(data, tmp_path, epochs=2, epoch_steps=1, patience=9, experiment="r")
    before = (tmp_path / "r" / "last.pth").read_bytes()
    saved = read_checkpoint(tmp_path / "r" / "last.pth")
    run = make_run(saved, **{**saved["options"], "epochs": 3})
    monkeypatch.setattr(Trainer, "loss", lambda self, *a: torch.full((), torch.nan, requires_grad=True))
    with pytest.raises(UserError, match=r"NaN or infinite in epoch 3. Epoch 2 is kept"):
        run.fit()
    assert (tmp_path / "r" / "last.pth").read_bytes() == before


def test_a_full_disk_is_told_and_the_run_goes_on_later(tmp_path, data, monkeypatch):
    def full(*_):
        raise OSError(28, "Could not write last.pth (No space left on device); what was there before is unchanged")

    with monkeypatch.context() as patch:
        patch.setattr(vim2.forecast.training, "save_checkpoint", full)
        with pytest.raises(UserError, match=r"No space left .* --resume"):
            start(data, tmp_path, epochs=1, epoch_steps=1, experiment="r")
    assert start(data, tmp_path, epochs=1, epoch_steps=1, experiment="r", resume=True)["best"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--horizon", "0"], ["--horizon", "1 or more"]),
        (["--lookback", "300"], ["280 rows of training", "lookback of 300"]),
        (["--patch", "64"], ["patch must not be longer than the lookback 48"]),
        (["--quantiles", "0.9", "0.1"], ["ascending"]),
        (["--dropout", "1"], ["dropout must lie in [0, 1)"]),
        (["--targets", "east"], ["no column east"]),
        (["--split", "0.9", "0.1", "0.1"], ["sum to 1"]),
        (["--split", "400", "0", "0"], ["0 rows of validation"]),
        (["--lr", "0"], ["--lr must be positive"]),
        (["--lr", "nan"], ["--lr must be a finite number"]),
        (["--clip-grad", "-1"], ["--clip-grad must be 0 or more"]),
        (["--warmup-epochs", "inf"], ["--warmup-epochs must be a finite number"]),
        (["--weight-decay", "-1"], ["--weight-decay must be 0 or more"]),
        (["--ema", "1"], ["--ema must lie in [0, 1)"]),
        (["--members", "0"], ["--members must be 1 or more"]),
        (["--expand", "0"], ["--expand must be positive"]),
        (["--expand", "1e30"], ["expand must leave the mixers a width"]),
        (["--quantiles", "0.5", "1"], ["--quantiles must lie in (0, 1)"]),
        (["--split", "0.7", "-0.1", "0.4"], ["--split must be 0 or more"]),
        (["--keep-values", "nan"], ["--keep-values must be a finite number"]),
        (["--recipe", "ETTh3"], ["ETTh1"]),
    ],
    ids=str,
)
def test_bad_options_are_one_line(tmp_path, data, fails, argv, words):
    error = fails("fit", data, *TINY, "--output", tmp_path, *argv)
    for word in words:
        assert word in error


def test_bad_files_are_one_line(tmp_path, fails):
    assert "no file" in fails("fit", tmp_path / "none.csv")
    assert "the following arguments are required" in fails("fit")


def test_a_data_frame_trains_and_resumes_as_its_file_does(tmp_path, data):
    frame = make_frame()
    options = dict(epochs=2, epoch_steps=2, patience=9)
    a = start(data, tmp_path, experiment="file", **options)
    b = fit(data=frame, output=str(tmp_path), experiment="frame", **{**OPTIONS, **options})
    assert b["options"]["data"] == "DataFrame" and a["best"]["val_mse"] == pytest.approx(b["best"]["val_mse"], rel=1e-6)
    assert json.loads((tmp_path / "frame" / "metrics.json").read_text())["options"]["data"] == "DataFrame"
    again = dict(output=str(tmp_path), experiment="frame", resume=True)
    indexed = fit(data=frame.set_index("date"), **again)
    assert indexed["best"] == b["best"] and indexed["options"]["epochs"] == 2
    with pytest.raises(UserError, match=r"^DataFrame is not the data"):
        fit(data=make_frame(seed=1), **again)
    assert fit(data=frame, output=str(tmp_path), **{**OPTIONS, **options})["folder"].endswith("tsm2-DataFrame-12")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((9, 2)), "numpy.ndarray."),
        ([1, 2], "list."),
        (make_frame()["north"], "pandas.Series: give its .to_frame()."),
    ],
)
def test_data_of_another_type_is_one_line(given, words):
    with pytest.raises(UserError) as error:
        fit(data=given)
    assert str(error.value) == f"data must be a file's path or a pandas DataFrame, got {words}"


def test_an_order_of_dates_is_kept_for_files_that_do_not_tell_it(tmp_path):
    frame = make_frame(400, start="2024-02-01")
    written = frame.assign(date=frame["date"].dt.strftime("%d/%m/%Y %H:%M"))
    run = start(write_csv(tmp_path / "a.csv", written), tmp_path, epochs=1, epoch_steps=1, lookback=18)
    day = write_csv(tmp_path / "day.csv", written.iloc[48:72])
    forecaster = Forecaster.from_pretrained(run["folder"])
    assert forecaster.read(day).times[0] == pd.Timestamp("2024-02-03")
    with pytest.raises(UserError, match="--dates day-first or --dates month-first"):
        forecaster.read(day, dates="detect")


@pytest.mark.parametrize("options", [{"patience": 0}, {"batch_size": 0}, {"horizon": 12.0}, {"split": [1, 2]}], ids=str)
def test_options_by_name_have_the_same_ranges(tmp_path, data, options):
    with pytest.raises(UserError, match=rf"^{next(iter(options))} must be "):
        start(data, tmp_path, **options)


def test_a_day_of_rows_has_no_calendar(tmp_path, fails):
    data = write_csv(tmp_path / "a.csv", make_frame(130, step="15min"))
    argv = ["fit", data, *TINY, "--calendar", "--output", tmp_path / "runs"]
    assert "no cycle of the calendar (day, week, year) twice: leave out --calendar" in fails(*argv)


def test_constant_columns_and_unused_rows_are_told(tmp_path, capsys):
    data = write_csv(tmp_path / "a.csv", make_frame().assign(flat=3.0))
    start(data, tmp_path, split=[280.0, 40.0, 60.0], epochs=1, epoch_steps=2)
    out = capsys.readouterr().out
    assert "not scaled: flat." in out and "The last 20 rows are not used" in out


def test_recipes_know_their_splits(tmp_path, data):
    with pytest.raises(UserError, match="asks for 14400 rows"):
        fit(data=str(data), recipe="ETTh1", output=str(tmp_path))
