"""Checkpoints of MMEngine through PyTorch's safe loader."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from mm_helpers import ROOT
from mmengine.logging import HistoryBuffer

import vim2.mm  # noqa: F401
from vim2.checkpoints import read_checkpoint


class Evil:
    def __reduce__(self):
        return print, ("code of the file ran",)


class Reaches:
    """Asks `getattr` for more than a statistic."""

    def __init__(self, owner, name):
        self.arguments = owner, name

    def __reduce__(self):
        return getattr, self.arguments


def history():
    buffer = HistoryBuffer([1.0, 2.0, 3.0], [1, 1, 2])
    buffer._statistics_methods = dict(buffer._statistics_methods)  # as checkpoints of older versions hold them
    return buffer


def test_history_buffers_and_numbers_of_numpy(tmp_path):
    numbers = [np.float64(0.5), np.float32(0.25), np.int64(3), np.bool_(True)]
    torch.save({"message_hub": {"loss": history()}, "numbers": numbers, "array": np.arange(3)}, tmp_path / "c.pth")
    loaded = torch.load(tmp_path / "c.pth")
    assert loaded["message_hub"]["loss"].statistics("mean") == history().mean()
    assert loaded["message_hub"]["loss"].data[1].tolist() == [1, 1, 2]
    assert loaded["numbers"] == numbers and loaded["array"].tolist() == [0, 1, 2]


def test_names_of_numpy_1(tmp_path):
    torch.save({"array": np.arange(3.0)}, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "c.pth").read_bytes()
    assert b"cnumpy._core.multiarray" in raw
    (tmp_path / "old.pth").write_bytes(raw.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    assert torch.load(tmp_path / "old.pth")["array"].tolist() == [0, 1, 2]


def test_other_code_still_does_not_run(tmp_path, capsys):
    torch.save({"state_dict": {}, "evil": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError, match="print"):
        torch.load(tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="holds more than weights"):
        read_checkpoint(tmp_path / "evil.pth")
    assert "code of the file ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "owner, name", [(HistoryBuffer, "__init__"), (np.ndarray, "tofile"), (HistoryBuffer, "update")]
)
def test_getattr_gives_statistics_alone(tmp_path, owner, name):
    torch.save({"reaches": Reaches(owner, name)}, tmp_path / "c.pth")
    with pytest.raises(Exception, match=f"may not refer to '{name}'"):
        torch.load(tmp_path / "c.pth")


def test_loads_stay_safe_by_default():
    """Importing vim2.mm changes neither torch.load nor its default."""
    code = (
        "import torch; before = torch.load; import vim2.mm; assert torch.load is before; "
        "import os; assert not [v for v in os.environ if v.startswith('TORCH_FORCE')]"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)
