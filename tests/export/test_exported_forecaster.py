"""A whole forecaster as a program gives the forecasts that `Forecaster.predict` does, in the units of its table."""

import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import numpy as np
import pandas as pd
import torch

from vim2 import TSM2Config
from vim2.export import ForecasterModule, export_onnx, export_program
from vim2.export.cli import main
from vim2.forecast.committee import Committee
from vim2.forecast.data import Scaler
from vim2.forecast.forecaster import Forecaster

LOOKBACK, HORIZON = 24, 5


def forecaster(quantiles=(), calendar=(), static=()):
    """Of three columns of different scales, with weights that are not those of a start."""
    torch.manual_seed(0)
    mixers = dict(time_mixer="linear", variate_mixer="none") if calendar else {}  # then the future's scans alone
    changes = dict(
        d_state=2, quantiles=quantiles, future_features=2 * len(calendar), static_features=len(static), **mixers
    )
    config = TSM2Config(LOOKBACK, HORIZON, 4, 2, 8, **changes)
    model = Committee(config, 2, variates=3).eval()
    if static:
        model.networks.static.normal_()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.05)
    for member in model.linear:
        member.weight.normal_(std=0.1)
    scaler = Scaler(np.array([1e4, 2.0, -3.0]), np.array([1.0, 20.0, 0.1]))
    conformal = torch.rand(HORIZON, 3, len(quantiles)) if quantiles else None
    known = dict(calendar=list(calendar), static_columns=list(static))
    return Forecaster(model, ["a", "b", "c"], scaler, step="h", conformal=conformal, **known)


def windows(forecaster, count):
    """Tables, the forecasts of each, and the inputs of a program."""
    generator, cases = np.random.default_rng(0), []
    for _ in range(count):
        values = forecaster.scaler.inverse(generator.normal(size=(LOOKBACK, 3)))
        times = pd.date_range("2024-01-01", periods=LOOKBACK, freq="h", name="date")
        table = forecaster.read(pd.DataFrame(values, times, forecaster.columns))
        x = [torch.tensor(table.values[-LOOKBACK:])]
        if forecaster.calendar:
            x.append(torch.tensor(forecaster.future_features(None, forecaster.times_ahead(table)), dtype=torch.float32))
        cases.append((forecaster.forecast(table)[1], *x))
    expected, *inputs = zip(*cases)
    return np.stack(expected), [torch.stack(x) for x in inputs]


def assert_same(result, expected, forecaster):
    deviation = forecaster.scaler.std.reshape(3, *[1] * (expected.ndim - 3))
    assert result.dtype == np.float64 and np.abs((result - expected) / deviation).max() < 1e-5


@torch.no_grad()
def test_programs_forecast_as_it_does(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    made = forecaster(quantiles=(0.1, 0.5, 0.9), calendar=("day",), static=("size", "height"))
    expected, inputs = windows(made, 3)
    module = ForecasterModule(made)
    torch.export.save(export_program(module), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    assert_same(program(*inputs).numpy(), expected, made)
    export_onnx(module, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    named = {"x": inputs[0].numpy(), "future": inputs[1].numpy()}
    assert [i.name for i in session.get_inputs()] == list(named)
    assert_same(session.run(["forecast"], named)[0], expected, made)


@torch.no_grad()
def test_command(monkeypatch, tmp_path, capsys):
    """Of a point forecaster, whose folder is all that is given. The compiler is replaced, which takes minutes."""

    def compile_and_package(program, package_path, **_):
        torch.export.save(program, package_path)
        return package_path

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", compile_and_package)
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: torch.export.load(path).module())
    made = forecaster()
    made.save_pretrained(tmp_path / "best")
    output = tmp_path / "forecaster.pt2"
    command = ["export", "--forecaster", str(tmp_path), "--format", "pt2", "--output", str(output)]
    assert main([*command, "--compare", "--batch-size", "1", "3"]) == 0
    *printed, first, second = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{output}: ") for line in printed)
    for row, batch in ((first, 1), (second, 3)):
        size, count, difference, largest, *_ = row.strip("| ").split(" | ")
        assert (size, count) == (f"{LOOKBACK} x 3", str(batch))
        assert float(difference) < 1e-5 * float(largest) and float(largest) > 5000  # in the units of its columns
    expected, inputs = windows(made, 2)
    assert_same(torch.export.load(output).module()(*inputs).numpy(), expected, made)
    assert main(["export", "--forecaster", str(tmp_path / "none"), "--format", "pt2", "--output", str(output)]) == 2
    assert "There is no config.json" in capsys.readouterr().err
    assert main(["export", "--forecaster", str(tmp_path), "--format", "timm", "--output", str(output)]) == 2
    assert "as onnx or pt2" in capsys.readouterr().err
