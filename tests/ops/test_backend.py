import importlib.util

import pytest

from vim2.ops import backend


@pytest.mark.parametrize(("value", "default"), [(None, "auto"), ("", "auto"), ("torch", "torch")])
def test_the_environment_names_the_default(value, default, monkeypatch):
    monkeypatch.delenv("VIM2_SCAN_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("VIM2_SCAN_BACKEND", value)
    spec = importlib.util.spec_from_file_location("backend_anew", backend.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert default == anew.DEFAULT_BACKEND
