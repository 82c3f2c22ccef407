"""tools/benchmarks/forecast_results.py: a search, a run of what it chose, a comparison and their table."""

from common.command import run_tool

import json

import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import numpy as np
import pandas as pd

from benchmarks.forecast_results import main

SMALL = ["--set", "epochs=1", "epoch_steps=2", "patch=64", "stride=64", "d_state=2", "d_model=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random walks in the shape of ETTh1's file."""
    folder = tmp_path_factory.mktemp("benchmark")
    walks = np.random.default_rng(0).normal(size=(14500, 2)).cumsum(0)
    dates = pd.date_range("2016-07-01", periods=14500, freq="h")
    pd.DataFrame({"date": dates, "HUFL": walks[:, 0], "OT": walks[:, 1]}).to_csv(folder / "ETTh1.csv", index=False)
    return folder


@pytest.fixture
def results_tool(folder, tmp_path, capsys, monkeypatch):
    """Runs a command; returns its exit code and what it wrote to stdout and stderr."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # in the processes that run cells

    def run(command, *options):
        argv = [command, "--data-dir", folder, "--output", tmp_path, "--names", "ETTh1", "--horizons", "96"]
        code = run_tool(main, [str(a) for a in [*argv, "--device", "cpu", *options]])
        return code, *capsys.readouterr()

    return run


def read(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_search_then_run_then_table_cell_by_cell(results_tool, tmp_path):
    code, out, _ = results_tool("search", *SMALL, "--candidates", "mae", "plain-sam")
    rows = read(tmp_path)
    best = min(rows, key=lambda row: row["val_mse"])["label"]
    assert code == 0 and "All cells are done." in out and f"ETTh1: {best} {{" in out
    assert {row["label"] for row in rows} == {"mae", "plain-sam"}
    assert not any("mse" in row for row in rows)  # the search sees no test rows
    code, out, _ = results_tool("run", *SMALL, "--chosen", "--seeds", "0")
    assert code == 0 and "1 cells to run, 2 done before" in out and "| ETTh1 | 96 | " in out
    last = read(tmp_path)[-1]
    assert last["changes"]["patch"] == 64 and last["mse"] > 0 and last["ridge_mse"] > 0
    assert "0 cells to run, 3 done before" in results_tool("run", *SMALL, "--chosen", "--seeds", "0")[1]
    assert "| ETTh1 | 96 | " in results_tool("table")[1]
    code, _, error = results_tool("run", "--set", "epochs=2", "--seeds", "0")
    assert code == 2 and "choose another output folder" in error  # other settings are not taken for another seed


def test_all_searches_runs_what_it_chose_and_compares_until_the_time_is_over(results_tool, tmp_path):
    argv = ["all", "--candidates", "mae", "eager", "--seeds", "0", "1", "--compare", "calendar", *SMALL]
    code, out, _ = results_tool(*argv, "--minutes", "0")
    assert code == 1 and "2 cells are left" in out
    code, out, _ = results_tool(*argv, "--jobs", "2")
    rows = read(tmp_path)
    assert [row["label"] for row in rows[2:4]] == ["TSM2", "TSM2"] and len(rows) == 8
    searched = {row["label"]: row for row in rows[:2]}
    best = min(searched.values(), key=lambda row: row["val_mse"])
    assert rows[2]["changes"] == rows[3]["changes"] == best["changes"]
    assert {row["label"] for row in rows[4:]} == {"history alone", "with calendar features"}
    assert code == 0 and "All cells are done." in out and "| ETTh1 | 96 | " in out and " ± " in out


def test_what_is_missing_is_one_line(capsys, tmp_path):
    assert run_tool(main, ["run", "--data-dir", str(tmp_path)]) == 2
    assert "there is no ETTh1.csv, .xz or .gz in" in capsys.readouterr().err
    assert run_tool(main, ["ridge"]) == 2
    error = capsys.readouterr().err
    assert "`ridge` wants --data-dir" in error and error.count("\n") == 1


ROW = dict(name="ETTh1", horizon=96, label="TSM2", seed=0, epoch=1, val_mse=1.0, ridge_val_mse=1.0)


@pytest.mark.parametrize(
    "row, word",
    [
        ({}, "no text as its name"),
        ({**ROW, "label": None}, "no text as its label"),
        ({**ROW, "horizon": [96]}, "no number as its horizon"),
        ({**ROW, "ridge_val_mse": float("nan")}, "no number as its ridge_val_mse"),
        ({**ROW, "mse": 1.0}, "no number as its mae"),
    ],
)
def test_a_line_that_no_cell_can_have_written_is_named(row, word, results_tool, tmp_path):
    (tmp_path / "results.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(row)}\n")
    for command in ("table", "search"):
        code, _, error = results_tool(command)
        assert code == 2 and error.count("\n") == 1
        assert f"results.jsonl, line 2, has {word}: delete that line" in error
