import functools
import importlib.util

import pytest
from mm_helpers import make_data, write_config

MISSING = [name for name in ("mmengine", "mmdet", "mmseg") if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_terminal_summary(terminalreporter):
    if MISSING:
        terminalreporter.write_line(f"tests/mm is left out: no {', '.join(MISSING)} here; the extra mm brings them.")


@pytest.fixture(scope="session", autouse=True)
def quick_configs():
    """Spares what MMEngine does anew for every config, and what takes longer than to train a tiny model: it reads the
    metafiles of a whole library, and lays the config out for readers, five times a run."""
    from mmengine.config import config, utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "load", functools.cache(utils.load))
        patch.setattr(config, "FormatCode", lambda text, **style: (text, True))
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def configs(tmp_path_factory, data):
    """A tiny config for each library."""
    folder = tmp_path_factory.mktemp("configs")
    return {kind: write_config(folder / f"tiny_{kind}.py", kind, data) for kind in ("mmdet", "mmseg")}
