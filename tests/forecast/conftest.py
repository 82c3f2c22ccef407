import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    from forecast_helpers import write_csv

    return write_csv(tmp_path_factory.mktemp("data") / "series.csv")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data):
    """The folder of a finished run with quantiles and known-future features, not to be changed."""
    from forecast_helpers import TINY

    from vim2.forecast.cli import main

    folder = tmp_path_factory.mktemp("runs")
    argv = ["fit", data, *TINY, "--output", folder, "--experiment", "run", "--epochs", "2", "--calendar"]
    assert main([*map(str, argv), "--future-columns", "promotion", "--quantiles", "0.1", "0.5", "0.9"]) == 0
    return folder / "run"


@pytest.fixture
def fails(failing):
    from vim2.forecast.cli import main

    return failing(main, "vim2")
