import json
import subprocess
import sys

import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import numpy as np
import pandas as pd
from forecast_helpers import TOOLS, environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random walks in the shape of ETTh1's file."""
    folder = tmp_path_factory.mktemp("benchmark")
    walks = np.random.default_rng(0).normal(size=(14500, 2)).cumsum(0)
    dates = pd.date_range("2016-07-01", periods=14500, freq="h")
    pd.DataFrame({"date": dates, "HUFL": walks[:, 0], "OT": walks[:, 1]}).to_csv(folder / "ETTh1.csv", index=False)
    return folder


def results_tool(*argv) -> str:
    command = [sys.executable, str(TOOLS / "forecast_results.py"), *map(str, argv)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=300).stdout


def test_search_then_run_then_table_cell_by_cell(folder, tmp_path):
    common = ["--data-dir", folder, "--output", tmp_path, "--names", "ETTh1", "--horizons", "96", "--device", "cpu"]
    small = ["--set", "epochs=1", "epoch_steps=2", "patch=64", "stride=64", "d_state=2"]
    out = results_tool("search", *common, *small, "--candidates", "mae", "plain-sam")
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["val_mse"])["label"]
    assert "All cells are done." in out and f"ETTh1: {best} {{" in out
    assert {row["label"] for row in rows} == {"mae", "plain-sam"}
    assert not any("mse" in row for row in rows)  # the search sees no test rows
    out = results_tool("run", *common, *small, "--chosen", "--seeds", "0")
    assert "1 cells to run, 2 done before" in out and "| ETTh1 | 96 | " in out
    last = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert last["changes"]["patch"] == 64 and last["mse"] > 0 and last["ridge_mse"] > 0
    assert "0 cells to run, 3 done before" in results_tool("run", *common, *small, "--chosen", "--seeds", "0")
    assert "| ETTh1 | 96 | " in results_tool("table", "--output", tmp_path)
    with pytest.raises(subprocess.CalledProcessError) as error:  # other settings are not taken for another seed
        results_tool("run", *common, "--set", "epochs=2", "--seeds", "0")
    assert "choose another --output" in error.value.stderr


def test_all_searches_runs_what_it_chose_and_compares_until_the_time_is_over(folder, tmp_path):
    argv = [
        "all",
        "--data-dir",
        folder,
        "--output",
        tmp_path,
        "--names",
        "ETTh1",
        "--horizons",
        "96",
        "--device",
        "cpu",
    ]
    argv += ["--candidates", "mae", "eager", "--seeds", "0", "1", "--compare", "calendar"]
    argv += ["--set", "epochs=1", "epoch_steps=2", "patch=64", "stride=64", "d_state=2", "d_model=4"]
    with pytest.raises(subprocess.CalledProcessError) as error:
        results_tool(*argv, "--minutes", "0")
    assert "2 cells are left" in error.value.stdout
    out = results_tool(*argv, "--jobs", "2")
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows[2:4]] == ["TSM2", "TSM2"] and len(rows) == 8
    searched = {row["label"]: row for row in rows[:2]}
    best = min(searched.values(), key=lambda row: row["val_mse"])
    assert rows[2]["changes"] == rows[3]["changes"] == best["changes"]
    assert {row["label"] for row in rows[4:]} == {"history alone", "with calendar features"}
    assert "All cells are done." in out and "| ETTh1 | 96 | " in out and " ± " in out
