"""tools/benchmarks/forecast_results.py: a run, a comparison and their table."""

from common.command import run_tool

import json
import shlex

import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import numpy as np
import pandas as pd

from benchmarks.forecast_results import main, read_option

SMALL = ["--set", "epochs=1", "epoch_steps=2", "patch=64", "stride=64", "d_state=2", "d_model=4", "members=2"]


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


def test_a_run_cell_by_cell_and_its_table(results_tool, tmp_path):
    code, out, _ = results_tool("run", *SMALL, "--seeds", "0", "1", "--minutes", "0")
    assert code == 1 and "2 cells are left" in out
    code, out, _ = results_tool("run", *SMALL, "--seeds", "0", "1", "--jobs", "2")
    assert code == 0 and "2 cells to run, 0 done before" in out and "All cells are done." in out
    rows = read(tmp_path)
    assert {row["seed"] for row in rows} == {0, 1} and all(row["changes"]["patch"] == 64 for row in rows)
    for row in rows:
        assert row["mse"] > 0 and row["ridge_mse"] > 0 and row["TSM2_members_alone_mse"] > row["mse"]
        assert sum(row["weights"].values()) == pytest.approx(1) and 0 <= row["tsm2_weight"] <= 1
    code, out, _ = results_tool("table")
    assert code == 0 and "| ETTh1 | 96 | " in out and " ± " in out
    assert "0 cells to run, 2 done before" in results_tool("run", *SMALL, "--seeds", "0")[1]
    (tmp_path / "results.jsonl").rename(tmp_path / "before.jsonl")  # members are mixed again, and not trained again
    assert "1 cells to run, 0 done before" in results_tool("run", *SMALL, "--seeds", "0")[1]
    (before,) = (row for row in rows if row["seed"] == 0)
    assert {**read(tmp_path)[0], "seconds": before["seconds"]} == before  # with the times of its epochs
    (tmp_path / "before.jsonl").rename(tmp_path / "results.jsonl")
    code, _, error = results_tool("run", "--set", "epochs=2", "--seeds", "0")
    assert code == 2 and "choose another output folder" in error  # other settings are not taken for another seed
    single = [{k: v for k, v in row.items() if "members_alone" not in k} for row in rows]  # of members=1
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
    code, out, _ = results_tool("table")
    assert code == 0 and "|  |  | " in out
    assert "0 cells to run, 2 done before" in results_tool("run", *SMALL, "--seeds", "0")[1]


@pytest.mark.parametrize("given", ["epochs", "=1", "norm=2d"])
def test_an_option_that_is_none_is_refused_before_anything_runs(given, results_tool):
    code, out, error = results_tool("run", "--set", given)
    assert code == 2 and f"--set {given} is not OPTION=JSON" in error and not out
    for advised in shlex.split(error.partition("such as ")[2].strip().rstrip(".")):
        assert advised == "or" or read_option(advised.rstrip(","))


def test_a_table_of_nothing(results_tool):
    code, _, error = results_tool("table")
    assert code == 2 and "There is no result in" in error


def test_comparisons_that_validate_only(results_tool, tmp_path):
    code, out, _ = results_tool("run", "--compare", "calendar", *SMALL, "--seeds", "0", "--no-test")
    rows = read(tmp_path)
    assert code == 0 and {row["label"] for row in rows} == {"history alone", "with calendar features"}
    assert not any("mse" in row for row in rows) and all(row["val_mse"] > 0 for row in rows)
    assert "test" not in out


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
    for command in ("table", "run"):
        code, _, error = results_tool(command)
        assert code == 2 and error.count("\n") == 1
        assert f"results.jsonl, line 2, has {word}: delete that line" in error
