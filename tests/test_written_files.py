"""Files are replaced in one step: a write that fails, or is killed, leaves the old content and nothing else."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from vim2.files import NotWritten, remove_leftovers, try_lock, write_atomically


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.csv"
    write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotWritten, match=r"Could not write .*file.csv \(No space left on device\).*unchanged"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_interrupt_leaves_no_temporary(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file.csv", b"new")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits there")
def test_file_size_limit(tmp_path):
    import resource

    path = tmp_path / "file.csv"
    write_atomically(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(NotWritten, match="Could not write"):
            write_atomically(path, b"0" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    def temporary(name):
        return tmp_path / f".{name}.{uuid.uuid4().hex}"

    left, other, folder, link = (temporary(name) for name in ("file.csv", "other.csv", "file.csv", "file.csv"))
    files = [tmp_path / ".file.csv.bak", tmp_path / f"file.csv.{uuid.uuid4().hex}", other]
    for path in (left, *files):
        path.touch()
    folder.mkdir()
    link.symlink_to(other)
    with open(temporary("file.csv"), "wb") as written:  # by another process
        assert try_lock(written.fileno())
        write_atomically(tmp_path / "file.csv", b"")
        kept = {*files, folder, link, Path(written.name), tmp_path / "file.csv"}
        assert set(tmp_path.iterdir()) == kept
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == kept - {other, Path(written.name)}


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
def test_a_killed_writer_leaves_nothing_for_long(tmp_path):
    code = (
        "import os, sys, signal; from vim2.files import write_atomically\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(sys.argv[1], b'0' * 1000)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "file.csv"], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    write_atomically(tmp_path / "file.csv", b"")
    assert list(tmp_path.iterdir()) == [tmp_path / "file.csv"]


def test_parent_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotWritten, match="Could not write"):
        write_atomically(tmp_path / "file" / "table.csv", b"")


def test_text_is_utf_8_and_a_name_that_is_not_is_escaped(tmp_path):
    write_atomically(tmp_path / "file.csv", "Größe,\udce4")
    assert (tmp_path / "file.csv").read_bytes() == "Größe,\\udce4".encode()
