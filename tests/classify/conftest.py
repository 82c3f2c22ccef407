import pytest
from classify_helpers import TINY, make_folders

from vim2.classify.cli import main


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data):
    """The folder of a finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    argv = ["train", "--data-dir", str(data), *TINY, "--output", str(folder), "--experiment", "run"]
    assert main([*argv, "--epochs", "2", "--lr", "3e-3", "--warmup-epochs", "0", "--no-aug", "--model-ema"]) == 0
    return folder / "run"


@pytest.fixture
def fails(failing):
    return failing(main, "vim2")
