import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")
pytest.importorskip("matplotlib", reason="pictures need matplotlib")

from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pandas as pd
from PIL import Image

from vim2.forecast.plots import plot_errors, plot_forecast, plot_weights


def scores(variates):
    errors = np.random.default_rng(0).lognormal(size=variates)
    steps = np.linspace(0.1, 1, 12).tolist()
    return {
        name: {"mse_by_variate": (errors * factor).tolist(), "mse_by_step": steps}
        for name, factor in (("committee", 1.0), ("ridge", 1.5), ("last value", 2.0))
    }


@pytest.mark.parametrize("variates", [1, 30, 207])
def test_errors_of_many_variates_stay_legible(tmp_path, variates, monkeypatch):
    figures, write = [], matplotlib.figure.Figure.savefig

    def kept(figure, *args, **options):
        figures.append(figure)
        return write(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", kept)
    given = scores(variates)
    plot_errors([f"sensor {i}" for i in range(variates)], given, tmp_path / "errors.png")
    width, height = Image.open(tmp_path / "errors.png").size
    assert height <= width
    bars = figures[0].axes[0]
    names = [label.get_text() for label in bars.get_yticklabels()]
    errors = given["committee"]["mse_by_variate"]
    drawn = [int(name.removeprefix("sensor ")) for name in names]
    assert len(drawn) == len(set(drawn)) == min(variates, 30)
    np.testing.assert_allclose([bar.get_width() for bar in bars.containers[0]], [errors[i] for i in drawn])
    if variates == 207:
        values = [errors[i] for i in drawn]
        assert values == sorted(values) and values[0] == min(errors) and values[-1] == max(errors)
        assert "30 of 207" in bars.get_xlabel()
    else:
        assert drawn == list(range(variates))


@pytest.mark.parametrize("scored", [True, False])
def test_forecasts_of_many_variates_are_drawn_from_the_best_to_the_worst(tmp_path, scored, monkeypatch):
    figures, write = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda f, *a, **o: (figures.append(f), write(f, *a, **o)))
    forecaster = SimpleNamespace(
        columns=[f"v{i}" for i in range(15)], model=SimpleNamespace(config=SimpleNamespace(quantiles=()))
    )
    values = np.arange(15.0) + np.zeros((5, 15))
    errors = np.random.default_rng(0).permutation(15) / 10
    times = pd.date_range("2011-03-01", periods=10, freq="D")
    given = [errors.tolist()] if scored else []
    plot_forecast(forecaster, times, values, values, values, tmp_path / "a.png", *given)
    drawn = [int(axes.get_title().removeprefix("v")) for axes in figures[0].axes]
    assert [axes.lines[0].get_ydata()[0] for axes in figures[0].axes] == drawn
    if scored:
        assert errors[drawn].tolist() == [
            0.0,
            0.2,
            0.4,
            0.6,
            0.8,
            1.0,
            1.2,
            1.4,
        ]  # with best, median and worst or nearly
        assert "from the best forecast to the worst" in figures[0].get_supxlabel()
    else:
        assert drawn == list(range(8)) and "the first 8 of 15" in figures[0].get_supxlabel()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("step", ["15min", "h", "D", "W", "MS", "QS"])
@pytest.mark.parametrize("rows", [5, 60, 192])
def test_dates_find_their_ticks(tmp_path, step, rows):
    forecaster = SimpleNamespace(columns=["a"], model=SimpleNamespace(config=SimpleNamespace(quantiles=())))
    times, values = pd.date_range("2011-03-01", periods=rows, freq=step), np.ones((rows, 1))
    plot_forecast(forecaster, times, values[2:], values[:2], values[:2], tmp_path / "a.png")


def test_a_committees_weights_are_drawn_as_they_are(tmp_path, monkeypatch):
    figures, write = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda f, *a, **o: (figures.append(f), write(f, *a, **o)))
    plot_weights(["ridge about the mean", "TSM2 1", "TSM2 2"], [0.5, 0.3, 0.2], tmp_path / "weights.png")
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.3, 0.2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ridge about the mean", "TSM2 1", "TSM2 2"]
    assert [text.get_text() for text in axes.texts] == ["0.50", "0.30", "0.20"]
    assert Image.open(tmp_path / "weights.png").size[0] > 500
