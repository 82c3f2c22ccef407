import random

import numpy as np
import pytest
import torch

from vim2.command.errors import UserError
from vim2.command.runs import explain_disk_errors, find_last, make_folder, read_last, seed_everything


def test_a_run_is_only_gone_on_with_when_asked_for(tmp_path, capsys):
    assert find_last(tmp_path, resume=False) is None
    assert find_last(tmp_path, resume=True) is None
    assert "starting from the beginning" in capsys.readouterr().out
    torch.save({}, tmp_path / "last.pth")
    with pytest.raises(UserError, match="holds a run already: add --resume"):  # rather than write over it
        find_last(tmp_path, resume=False)
    assert find_last(tmp_path, resume=True) == tmp_path / "last.pth"


def test_only_a_whole_last_pth_is_gone_on_with(tmp_path):
    path = tmp_path / "last.pth"
    torch.save({"options": {}, "optimizer": {}, "more": torch.ones(2)}, path)
    assert read_last(path, {"options", "optimizer"}).keys() == {"options", "optimizer", "more"}
    with pytest.raises(UserError, match=r"is not a last.pth .* Or else"):
        read_last(path, {"options", "args"}, "Or else.")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="truncated"):
        read_last(path, {"options"})


def test_a_folder_or_file_that_cannot_be_written(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --output"):
        make_folder(tmp_path / "file" / "b")
    with pytest.raises(UserError, match=r"^No space left\. Make room\.$"), explain_disk_errors(". Make room"):
        raise OSError(28, "No space left")


def test_seeds_fix_every_generator_and_differ_with_each_number():
    def draw(*numbers):
        seed_everything(*numbers)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw(3, 1) == draw(3, 1)
    assert len({draw(*numbers) for numbers in ((3, 1), (3, 2), (1, 3), (3, 1, 1))}) == 4
