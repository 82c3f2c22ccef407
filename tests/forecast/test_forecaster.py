import importlib
import json

import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import numpy as np
import pandas as pd
import torch
from forecast_helpers import TINY, ahead, make_frame, write_csv
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from vim2.forecast import Forecaster, UserError, evaluate, fit, predict
from vim2.forecast.cli import main
from vim2.forecast.table import read_table


def future_csv(path, frame=None):
    return write_csv(path, ahead(frame))


def test_evaluate_counts_the_test_windows_and_draws(trained, data, tmp_path, capsys):
    result = evaluate(data=str(data), checkpoint=str(trained), output=str(tmp_path), device="cpu")
    assert result["windows"] == 80 - 12 + 1 and result["part"] == "test"
    alone = {"TSM2 members alone", "linear members alone"}
    assert set(result["scores"]) == {"committee", *alone, "ridge", "last value", "seasonal naive"}
    out = capsys.readouterr().out
    for name, row in result["scores"].items():
        assert f"{name:<20} MSE {row['mse']:.4f}  MAE {row['mae']:.4f}" in out
    assert 0 <= result["quantiles"]["coverage"] <= 1
    assert sum(result["weights"].values()) == pytest.approx(1)
    assert result["config"]["horizon"] == 12 and result["chosen"]["seed"] == 0
    assert (
        json.loads((tmp_path / "evaluation.json").read_text())["scores"]["committee"] == result["scores"]["committee"]
    )
    for name in ("forecast.png", "errors.png", "weights.png"):
        assert Image.open(tmp_path / name).size[0] > 500


def test_evaluation_is_the_mean_over_all_windows_by_hand(trained, data):
    """With the file read by pandas, the scale from its training rows and one window at a time."""
    result = evaluate(data=str(data), checkpoint=str(trained), output=str(trained / "e"), device="cpu", batch_size=7)
    forecaster = Forecaster.from_pretrained(trained, refitted=False)
    frame = pd.read_csv(data)
    values = frame[["north", "south", "level"]].to_numpy()
    mean, std = values[:280].mean(0), values[:280].std(0)
    table = forecaster.read(data)
    future = torch.tensor(forecaster.future_features(table.future, table.future_times), dtype=torch.float32)
    scaled = torch.tensor((values - mean) / std, dtype=torch.float32)
    errors = []
    with torch.no_grad():
        for start in range(320 - 48, 400 - 60 + 1):
            now = start + 48
            y = forecaster.model(scaled[None, start:now], future=future[None, now : now + 12])[0, ..., 1]
            errors.append((y - scaled[now : now + 12]).square().mean().item())
    assert len(errors) == result["windows"]
    assert result["scores"]["committee"]["mse"] == pytest.approx(np.mean(errors), rel=1e-4)


def test_predict_goes_beyond_the_end(trained, tmp_path):
    path = future_csv(tmp_path / "a.csv")
    result = predict(data=str(path), checkpoint=str(trained), output=str(tmp_path / "f"), device="cpu")
    frame = pd.read_csv(result["csv"], parse_dates=["date"])
    assert len(frame) == 12 and frame["date"].iloc[0] == pd.Timestamp("2024-01-01") + pd.Timedelta(hours=400)
    assert (frame["date"].diff().dropna() == pd.Timedelta("1h")).all()
    assert list(frame)[1:4] == ["north_q0.1", "north_q0.5", "north_q0.9"] and frame.notna().all().all()
    np.testing.assert_allclose(frame["level_q0.5"], result["values"][:, 2, 1])
    assert abs(frame["level_q0.5"] - make_frame()["level"].iloc[-1]).max() < 50  # in the units of the file
    assert Image.open(tmp_path / "f" / "forecast.png").size[0] > 500


def test_a_shorter_forecast_is_the_beginning_of_a_longer_one(trained, tmp_path):
    path = future_csv(tmp_path / "a.csv")
    options = dict(data=str(path), checkpoint=str(trained), output=str(tmp_path), device="cpu")
    whole, short = predict(**options), predict(**options, horizon=5)
    assert len(pd.read_csv(short["csv"])) == 5
    np.testing.assert_array_equal(short["values"], whole["values"][:5])
    forecaster = Forecaster.from_pretrained(trained)
    pd.testing.assert_frame_equal(forecaster.predict(path, horizon=5), forecaster.predict(path)[:5], check_freq=False)
    with pytest.raises(UserError, match="trained for 12 steps and forecasts 1 to 12, not 13"):
        predict(**options, horizon=13)
    with pytest.raises(UserError, match=r"forecasts 1 to 12, not 2\.5"):
        forecaster.predict(path, horizon=2.5)


def test_known_future_columns_change_the_forecast_and_must_be_there(trained, data, tmp_path):
    with pytest.raises(UserError, match="needs promotion for 12 further rows, and the file has 0"):
        predict(data=str(data), checkpoint=str(trained), output=str(tmp_path))
    paths = [future_csv(tmp_path / f"{i}.csv", make_frame(412).assign(promotion=float(i))) for i in range(2)]
    none, all_days = (predict(data=str(p), checkpoint=str(trained), output=str(tmp_path))["values"] for p in paths)
    assert not np.allclose(none, all_days)


def test_columns_are_taken_in_the_order_of_training(trained, data, tmp_path):
    frame = make_frame()[["promotion", "level", "date", "south", "north"]]
    other = write_csv(tmp_path / "a.csv", frame)
    a, b = (evaluate(data=str(p), checkpoint=str(trained), output=str(tmp_path))["scores"] for p in (data, other))
    assert a["committee"]["mse"] == b["committee"]["mse"]


def test_evaluate_tells_where_the_rows_of_training_are_others(trained, data, tmp_path, capsys):
    """Rows that came before them have moved the rows to test on into those that the members know."""
    options = dict(checkpoint=str(trained), output=str(tmp_path), device="cpu")
    told, hours = "are not those of training", pd.Timedelta(hours=400)
    more = make_frame(100, seed=1)
    longer = pd.concat([make_frame(), more.assign(date=more["date"] + hours)], ignore_index=True)
    for known in (data, make_frame(), longer):
        evaluate(data=known, **options)
    assert told not in capsys.readouterr().out
    before = pd.concat([more, make_frame().assign(date=make_frame()["date"] + hours / 4)], ignore_index=True)
    evaluate(data=before, **options)
    assert f"The first 280 rows of DataFrame {told}" in capsys.readouterr().out


def test_data_frames_as_their_file(trained, data, tmp_path):
    frame = make_frame()
    forecaster = Forecaster.from_pretrained(trained)
    for given in (frame, frame.set_index("date")):
        np.testing.assert_allclose(forecaster.read(given).values, forecaster.read(data).values, rtol=1e-12)
        a, b = (evaluate(data=d, checkpoint=str(trained), output=str(tmp_path))["scores"] for d in (data, given))
        assert a["committee"]["mse"] == pytest.approx(b["committee"]["mse"], rel=1e-6)
    ahead = pd.read_csv(path := future_csv(tmp_path / "a.csv"), parse_dates=["date"])
    a, b = (predict(data=d, checkpoint=str(trained), output=str(tmp_path)) for d in (path, ahead))
    assert (a["times"] == b["times"]).all()
    np.testing.assert_allclose(a["values"], b["values"], rtol=1e-5)
    with pytest.raises(UserError, match=r"^Rows of DataFrame are 15min apart"):
        forecaster.read(make_frame(step="15min"))


def test_every_quantile_has_its_column(data, tmp_path):
    levels = [0.1, 0.5, 0.50000001, 0.9]
    options = dict(horizon=3, lookback=12, patch=4, stride=2, d_model=4, d_state=2, epochs=1, epoch_steps=1)
    run = fit(data=str(data), output=str(tmp_path), device="cpu", quantiles=levels, **options)
    result = predict(data=str(data), checkpoint=run["folder"], output=str(tmp_path))
    frame = pd.read_csv(result["csv"], index_col=0)
    assert list(frame)[:4] == [f"north_q{level}" for level in levels] and frame.shape == (3, 4 * 4)
    np.testing.assert_allclose(frame["north_q0.50000001"], result["values"][:, 0, 2])


def test_save_and_load_without_pickle(trained, data, tmp_path):
    forecaster = Forecaster.from_pretrained(trained)
    forecaster.save_pretrained(tmp_path / "copy")
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["config.json", "model.safetensors"]
    again = Forecaster.from_pretrained(tmp_path / "copy")
    assert again.to_dict() == forecaster.to_dict() and again.columns == ["north", "south", "level"]
    saved = load_file(tmp_path / "copy" / "model.safetensors")
    for name, value in forecaster.model.state_dict().items():
        assert torch.equal(saved[name], value) and torch.equal(again.model.state_dict()[name], value)


def test_from_the_hub(trained, data, monkeypatch):
    """The network is replaced by a folder."""

    def download(repository, revision, allow_patterns):
        if (repository, revision) != ("someone/mine", "v1"):
            raise LocalEntryNotFoundError("Got: ConnectError.\nPlease check.")
        assert allow_patterns == ["config.json", "model.safetensors"]
        return str(trained / "best")

    monkeypatch.setattr("vim2.forecast.forecaster.snapshot_download", download)
    name = "hf-hub:someone/mine@v1"
    assert Forecaster.from_pretrained(name).to_dict() == Forecaster.from_pretrained(trained / "best").to_dict()
    with pytest.raises(UserError, match="give --output"):
        evaluate(data=str(data), checkpoint=name, device="cpu")
    with pytest.raises(UserError, match=r"nobody/mine cannot be downloaded .Got: ConnectError.: check"):
        Forecaster.from_pretrained("hf-hub:nobody/mine")


def test_a_device_that_is_not_there(trained):
    for device in ("cuda:99", torch.device("cuda", 99)):
        with pytest.raises(UserError, match=r"There is no cuda:99|no CUDA GPU"):
            Forecaster.from_pretrained(trained, device)


def test_damaged_folders(trained, tmp_path):
    with pytest.raises(UserError, match=r"no config.json"):
        Forecaster.from_pretrained(tmp_path)
    forecaster = Forecaster.from_pretrained(trained)
    config, weights = tmp_path / "f" / "config.json", tmp_path / "f" / "model.safetensors"

    def fresh():
        forecaster.save_pretrained(tmp_path / "f")
        return json.loads(config.read_text())

    fresh()
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="truncated or no safetensors"):
        Forecaster.from_pretrained(tmp_path / "f")
    saved = fresh()
    config.write_text(json.dumps({**saved, "model": {**saved["model"], "depth": 2}}))
    with pytest.raises(UserError, match="does not fit config"):
        Forecaster.from_pretrained(tmp_path / "f")
    config.write_text(json.dumps({**saved, "model": {**saved["model"], "dropuot": 2}}))
    with pytest.raises(UserError, match="unknown option dropuot; did you mean dropout"):
        Forecaster.from_pretrained(tmp_path / "f")
    for text in ("{", json.dumps({**saved, "calendar": True}), json.dumps({**saved, "calendar": ["month"]})):
        config.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            Forecaster.from_pretrained(tmp_path / "f")


NAN = float("nan")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"columns": ["north", "south"]}, "2 columns with 3 means"),
        ({"columns": ["north", "south", "south"]}, "twice"),
        ({"columns": ["north", "south", "promotion"]}, "twice"),
        ({"columns": [1, 2, 3]}, "columns must be text"),
        ({"columns": []}, "columns must be one value or more"),
        ({"mean": [1.0, 2.0]}, "2 means"),
        ({"mean": [1.0, 2.0, NAN]}, "mean must be a finite number"),
        ({"mean": [1.0, 2.0, 10**400]}, "mean must be a finite number"),
        ({"mean": None}, "mean must be"),
        ({"std": [1.0, 1.0, 0.0]}, "std must be positive"),
        ({"std": [1.0, 1.0, -1.0]}, "std must be positive"),
        ({"std": [1.0, 1.0, "1"]}, "std must be a finite number"),
        ({"std": [1.0, 1.0]}, "2 deviations"),
        ({"future_columns": []}, "0 columns with 1 means"),
        ({"future_std": [0.0]}, "future_std must be positive"),
        ({"calendar": ["day", "week"]}, "future features"),
        ({"calendar": ["day", "day"]}, "twice"),
        ({"step": 1}, "step must be text"),
        ({"step": "banana"}, "banana"),
        ({"season": 0}, "season must be 1 or more"),
        ({"season": 2.5}, "season must be a whole number"),
        ({"split": [280, -40, 80]}, "split must be 0 or more"),
        ({"split": [280, 40]}, "split must be 3 values"),
        ({"split": [20, 40, 80]}, "too few"),
        ({"reading": None}, "reading must be"),
        ({"reading": {"missing": "guess"}}, "missing must be one of"),
        ({"reading": {"na_values": [NAN]}}, "na_values must be a finite number"),
        ({"reading": {"path": "other.csv"}}, "unknown option path"),
        ({"metrics": []}, "metrics must be"),
        ({"penalties": {"mean": [1.0, 1.0], "last": [1.0]}}, "2 and 1 penalties of ridges, for 3 and 1"),
        ({"penalties": {"mean": [1.0, 1.0, 0.0], "last": [1.0]}}, "mean must be positive"),
        ({"model_type": "lstm"}, "model_type must be one of"),
        ({"model": {"norm": "batch"}}, "norm must be one of"),
        ({"model": {"norm": None}}, "norm must be text"),
        ({"model": {"quantiles": [0.9, 0.5, 0.1]}}, "ascending"),
        ({"model": {"quantiles": [0.1, NAN, 0.9]}}, "quantiles must be numbers"),
        ({"model": {"quantiles": "0.5"}}, "quantiles must be numbers"),
        ({"model": {"depth": 1.0}}, "depth must be a whole number"),
        ({"model": {"depth": True}}, "depth must be a whole number"),
        ({"model": {"expand": NAN}}, "expand must be a finite number"),
        ({"model": {"dropout": "0"}}, "dropout must be a finite number"),
        ({"members": 0}, "members must be 1 or more"),
        ({"members": 3}, "does not fit config.json"),
        ({"members": 10**9}, "does not fit config.json"),
        ({"model": {"static_features": 2}}, "static columns cannot make 2 features"),
        ({"static_columns": ["region"]}, "static columns cannot make 0 features"),
        ({"model": {"future_length": 30}}, "future features of 30 steps"),
        ({"penalties": {"mean": [1.0] * 4, "last": 1.0}}, "4 and 1 penalties of ridges, for 3 and 1"),
        ({"model": {"depth": 10**9}}, "does not fit config.json"),
        ({"model": {"d_model": 10**9}}, "does not fit config.json"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_true(trained, tmp_path, changed, words):
    Forecaster.from_pretrained(trained).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    if isinstance(changed.get("model"), dict):
        changed = {"model": {**saved["model"], **changed["model"]}}
    (tmp_path / "config.json").write_text(json.dumps({**saved, **changed}))
    with pytest.raises(UserError) as error:
        Forecaster.from_pretrained(tmp_path)
    assert words in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["mean", "std", "split", "reading", "season", "model", "calendar"])
def test_a_config_that_lacks_something(trained, tmp_path, name):
    Forecaster.from_pretrained(trained).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in saved.items() if k != name}))
    with pytest.raises(UserError, match=f"damaged, .*{name}"):
        Forecaster.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["null", "[1]", "[" * 100_000, "\0", '{"season": ' + "1" * 5000 + "}"])
def test_a_config_that_is_none(trained, tmp_path, text):
    Forecaster.from_pretrained(trained).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is damaged, or of something else, or of an earlier version"):
        Forecaster.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w * torch.nan, "NaN or infinite"),
        (lambda w: w.int(), "int32"),
        (lambda w: w > 0, "bool"),
        (lambda w: w[:-1], "size mismatch"),
    ],
    ids=["nan", "integer", "bool", "shape"],
)
def test_weights_that_no_training_writes(trained, tmp_path, change, words):
    forecaster = Forecaster.from_pretrained(trained)
    forecaster.save_pretrained(tmp_path)
    weights, name = {k: v.clone() for k, v in forecaster.model.state_dict().items()}, "networks.0.head.bias"
    save_file({**weights, name: change(weights[name]).contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"model.safetensors .*{words}"):
        Forecaster.from_pretrained(tmp_path)


def test_a_forecast_that_is_not_finite(trained):
    forecaster = Forecaster.from_pretrained(trained)
    with torch.no_grad():
        forecaster.model.networks[0].head.bias.fill_(torch.inf)
    with pytest.raises(UserError, match="forecast is NaN or infinite"):
        forecaster.predict(ahead())


@pytest.mark.parametrize("column, factor", [("north", 1e20), ("north", 1e100), ("promotion", 1e100)])
def test_values_too_far_from_those_of_training(trained, tmp_path, column, factor):
    frame = ahead().assign(**{column: lambda f: f[column] * factor})
    for command in (predict, evaluate):
        with pytest.raises(UserError, match=f"Column {column} holds .*, too far from the rows of training"):
            command(data=frame, checkpoint=str(trained), output=str(tmp_path), device="cpu")


def test_a_constant_that_ends_with_the_rows_to_train_on(tmp_path):
    """Its scale is 1."""
    frame = make_frame().assign(north=[1.0] * 300 + [1e30, 2e30] * 50)
    with pytest.raises(UserError, match="Column north holds 1e\\+30, too far from the rows of training"):
        fit(data=frame, horizon=12, lookback=48, output=str(tmp_path))


def test_time_that_pandas_cannot_continue(trained):
    frame = ahead()[:400].drop(columns="promotion")
    frame["date"] = pd.date_range(end="2262-04-11 23:00", periods=400, freq="h").astype("datetime64[ns]")
    run = Forecaster.from_pretrained(trained)
    with pytest.raises(UserError, match="no time stamps for 12 steps after 2262-04-11 23:00:00"):
        run.times_ahead(read_table(frame))


def test_files_that_do_not_fit_the_model(trained, tmp_path, fails, capsys):
    def evaluated(frame, *argv):
        data = write_csv(tmp_path / "a.csv", frame)
        return fails("evaluate", data, "--checkpoint", trained, "--output", tmp_path, *argv)

    assert "no column south" in evaluated(make_frame().drop(columns="south"))
    assert "15min apart, the model was trained on h" in evaluated(make_frame(step="15min"))
    assert "300 rows, the split 400" in evaluated(make_frame(300))
    assert "no window 70" in evaluated(make_frame(), "--window", 70)
    for rows in (1, 40):  # one has no step that could be another than the model's
        short = write_csv(tmp_path / "short.csv", make_frame(rows))
        with pytest.raises(UserError, match=rf"^{rows} rows are too few"):
            predict(data=str(short), checkpoint=str(trained), device="cpu")
    assert capsys.readouterr().out == ""  # nothing is told of a forecast that there is none of
    assert "--checkpoint" in fails("predict", short)


def test_a_forecast_is_not_written_over_the_file_that_it_continues(trained, tmp_path, fails):
    data = write_csv(tmp_path / "forecast.csv")
    before = data.read_bytes()
    assert "choose another output" in fails("predict", data, "--checkpoint", trained, "--output", tmp_path)
    assert data.read_bytes() == before


@pytest.mark.parametrize(("function", "work"), [(predict, "Forecaster.forecast"), (evaluate, "evaluation.score_all")])
def test_an_output_that_cannot_be_written_costs_no_work(function, work, trained, data, tmp_path, monkeypatch):
    module, _, name = work.partition(".")
    owner = Forecaster if module == "Forecaster" else importlib.import_module(f"vim2.forecast.{module}")
    monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("something was computed"))
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"Nothing can be written into .*out \(Not a directory\): choose another --output"
    ):
        function(data=str(data), checkpoint=str(trained), output=str(tmp_path / "file" / "out"), device="cpu")


@pytest.mark.parametrize("method", ["predict", "read"])
def test_an_option_of_reading_that_is_none(trained, data, method):
    forecaster = Forecaster.from_pretrained(trained)
    for name in ("foo", "targets", "na_value"):
        with pytest.raises(UserError, match=rf"^Forecaster\.{method} has no option {name}.* \(of time_column, "):
            getattr(forecaster, method)(data, **{name: [1]})


def test_months_and_irregular_rows_are_continued(tmp_path):
    options = dict(horizon=3, lookback=12, patch=4, stride=2, d_model=4, d_state=2, epochs=1, epoch_steps=1)
    for name, frame, kept, cycle, ends in (
        ("months", make_frame(120, step="MS"), {}, "year", ["2034-01-01", "2034-02-01", "2034-03-01"]),
        (
            "gap",
            make_frame(121, step="D").drop(index=60),
            {"times": "keep"},
            "week",
            ["2024-05-01", "2024-05-02", "2024-05-03"],
        ),
        (
            "fifteenth",
            make_frame(120, step="MS").assign(date=lambda f: f["date"] + pd.Timedelta(days=14)),
            {"times": "keep"},
            "year",
            ["2034-01-15", "2034-02-15", "2034-03-15"],
        ),
    ):
        data = write_csv(tmp_path / f"{name}.csv", frame)
        run = fit(data=str(data), output=str(tmp_path), device="cpu", calendar=True, **options, **kept)
        assert run["calendar"] == [cycle]
        times = predict(data=str(data), checkpoint=run["folder"], output=str(tmp_path / name))["times"]
        assert [str(t.date()) for t in times] == ends
    newest_first = write_csv(tmp_path / "back.csv", make_frame(121, step="D")[::-1])
    with pytest.raises(UserError, match="Sort the rows by time"):
        predict(data=str(newest_first), checkpoint=run["folder"], output=str(tmp_path))


def test_the_whole_way_by_command(tmp_path, data, capsys):
    run = ["--output", tmp_path / "runs", "--experiment", "r", "--epochs", "1", "--epoch-steps", "2"]
    assert main([str(a) for a in ("fit", data, *TINY, *run, "--targets", "north", "level")]) == 0
    assert main([str(a) for a in ("evaluate", data, "--checkpoint", tmp_path / "runs" / "r")]) == 0
    assert main([str(a) for a in ("predict", data, "--checkpoint", tmp_path / "runs" / "r", "--output", tmp_path)]) == 0
    assert list(pd.read_csv(tmp_path / "forecast.csv")) == ["date", "north", "level"]


def test_options_of_reading_are_checked_and_one_number_is_a_list(trained, tmp_path):
    forecaster, frame = Forecaster.from_pretrained(trained), pd.read_csv(future_csv(tmp_path / "a.csv"))
    expected = forecaster.predict(frame)
    assert forecaster.predict(frame, na_values=-12345).equals(expected)
    forecaster.reading = {**forecaster.reading, "na_values": -12345.0}  # as a config.json may have it
    assert forecaster.predict(frame).equals(expected)
    with pytest.raises(UserError, match="na_values must be a finite number, got 'none'"):
        forecaster.predict(frame, na_values="none")


@pytest.mark.parametrize("long", [False, True])
def test_a_forecaster_from_before_spaces_around_names_were_left_out_finds_its_columns(trained, tmp_path, long):
    forecaster, frame = Forecaster.from_pretrained(trained), pd.read_csv(future_csv(tmp_path / "a.csv"))
    expected = forecaster.predict(frame)
    forecaster.columns, forecaster.future_columns = ["north ", "south", " level"], ["promotion "]
    spaced = frame.rename(columns={"north": "north ", "level": " level", "promotion": "promotion "})
    if long:
        spaced = spaced.rename(columns={"date": "ds"}).melt(["ds", "promotion "], var_name="unique_id", value_name="y")
    forecast = forecaster.predict(spaced)
    if long:
        assert forecast["unique_id"].unique().tolist() == forecaster.columns
        values = forecast.set_index("unique_id")["TSM2_q0.5"]
        assert all((values[c] == expected[f"{c.strip()}_q0.5"].to_numpy()).all() for c in forecaster.columns)
    else:
        assert (forecast.to_numpy() == expected.to_numpy()).all() and "north _q0.1" in forecast
    spaced.to_csv(tmp_path / "b.csv", index=False)
    again = forecaster.predict(tmp_path / "b.csv")
    assert (again.select_dtypes(float).to_numpy() == forecast.select_dtypes(float).to_numpy()).all()
