"""A run of OpenMMLab's has its folder to itself."""

import sys

import pytest
from mm_helpers import call

from vim2.command.errors import UserError
from vim2.command.runs import own_folder
from vim2.mm.commands import train


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_work_dir_that_cannot_be_written_is_one_line(configs, tmp_path, inside):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Nothing can be written into .*file.* choose another --work-dir"):
        call(train, configs["mmseg"], "--work-dir", tmp_path / "file" / inside)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_two_runs_in_one_folder(configs, tmp_path):
    argv = [configs["mmseg"], "--work-dir", tmp_path, "--cfg-options", "train_cfg.val_interval=10"]
    with own_folder(tmp_path, None), pytest.raises(UserError, match="Another run is writing to"):
        call(train, *argv)
    assert not list(tmp_path.glob("*.pth"))
    call(train, *argv)
    assert list(tmp_path.glob("*.pth")) and not (tmp_path / ".lock").exists()
