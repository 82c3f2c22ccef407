import os
import re
from pathlib import Path

import pytest

from vim2.command.errors import UserError
from vim2.command.outputs import explain_disk_errors, keep_source, make_folder, make_folder_of
from vim2.command.runs import own_folder


def test_a_folder_or_file_that_cannot_be_written(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    inside = re.escape(str(tmp_path / "file" / "b"))
    with pytest.raises(
        UserError, match=rf"Nothing can be written into {inside} \(Not a dir.*: choose another --output"
    ):
        make_folder(tmp_path / "file" / "b")
    with pytest.raises(UserError, match=r"^No space left\. Make room\.$"), explain_disk_errors(". Make room"):
        raise OSError(28, "No space left")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder here in which nobody may write")
def test_a_folder_in_which_nothing_can_be_written():
    with pytest.raises(UserError, match=r"Nothing can be written into /proc/self \(.*\): choose another DIR"):
        make_folder(Path("/proc/self"), "DIR")
    with (
        pytest.raises(UserError, match="Nothing can be written into /proc/self"),
        own_folder(Path("/proc/self"), None),
    ):
        pass


def test_a_file_is_written_beside_the_one_that_is_read(tmp_path):
    (tmp_path / "source").touch()
    (tmp_path / "same").symlink_to("source")
    keep_source(tmp_path / "source", tmp_path / "new")
    keep_source(None, tmp_path / "source")
    with pytest.raises(UserError, match="would be written over"):
        keep_source(tmp_path / "source", tmp_path / "same")


def test_a_folder_is_no_file_to_write(tmp_path):
    make_folder_of(tmp_path / "new" / "file")
    assert (tmp_path / "new").is_dir()
    with pytest.raises(UserError, match="is a folder: choose another --output"):
        make_folder_of(tmp_path / "new")
