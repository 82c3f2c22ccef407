"""tools/quickstart.py: what a newcomer runs first, on less of its images."""

import shlex

import pytest

import quickstart


def test_it_names_photographs_and_learns_digits(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn, whose images these are, is not installed")
    monkeypatch.setattr(quickstart, "EXAMPLES", 1)
    monkeypatch.setattr(quickstart, "TEST_IMAGES", 40)
    monkeypatch.setenv("PYTHONPATH", "/my  own/vim2")
    output = tmp_path / "out"
    quickstart.main(["--output", str(output), "--epochs", "1"])
    said = capsys.readouterr().out
    assert "china.jpg: birdhouse" in said and "Of 40 test images" in said
    assert len(list((output / "digits" / "val").rglob("*.png"))) == 40
    assert (output / "shipped" / "best.pth").is_file() and (output / "digits_seen" / "predictions.json").is_file()
    (command,) = (line for line in said.splitlines() if " train --data-dir YOUR_FOLDER" in line)
    assert (
        shlex.split(command)[0] == "PYTHONPATH=/my  own/vim2" and "--model vim2_nano_token_d1 --pretrained" in command
    )
