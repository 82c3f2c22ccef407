import numpy as np
import pytest
from classify_helpers import encoded, make_pack

from vim2.classify import UserError
from vim2.classify.packs import open_packs, read_pack

FILES = [encoded(np.full((4, 4, 3), 40 * i, dtype=np.uint8)) for i in range(4)]
LABELS, NAMES = [0, 1, 1, 0], ["cat", "dog"]


def test_a_pack_is_read_as_it_was_written(tmp_path):
    path = make_pack(
        tmp_path / "a.npz", FILES, LABELS, NAMES, split=[0, 0, 1, 1], changed={"classes": np.array(["a", "b"])}
    )
    train, val = open_packs(path, "train", 0), open_packs(path, "validation", 1)
    assert [(file.read(), target) for file, target in train] == [(FILES[0], 0), (FILES[1], 1)]
    assert [(file.read(), target) for file, target in val] == [(FILES[2], 1), (FILES[3], 0)]
    assert train.class_to_idx == {"cat": 0, "dog": 1}
    assert val.filename(1) == f"image 3 of {path}"
    for key in ("names", "classes"):
        assert read_pack(make_pack(tmp_path / f"{key}.npz", FILES, LABELS, NAMES, key=key)).names == NAMES


def test_shards_are_joined_in_natural_order(tmp_path):
    for number in (10, 2):
        make_pack(tmp_path / f"train-{number}.npz", [FILES[number // 10]], [number // 10], NAMES)
    make_pack(tmp_path / "other.npz", FILES, LABELS, NAMES)
    reader = open_packs(tmp_path, "train-*.npz", None)
    assert [(file.read(), target) for file, target in reader] == [(FILES[0], 0), (FILES[1], 1)]
    assert reader.filename(1) == f"image 0 of {tmp_path / 'train-10.npz'}"


def test_classes_are_renumbered_by_name(tmp_path):
    path = make_pack(tmp_path / "a.npz", FILES, LABELS, NAMES)
    reader = open_packs(path, "train", 0, {"dog": 5, "horse": 6})
    assert [(file.read(), target) for file, target in reader] == [(FILES[1], 5), (FILES[2], 5)]
    (tmp_path / "map.txt").write_text("dog\ncat\n")
    assert [target for _, target in open_packs(path, "train", 0, str(tmp_path / "map.txt"))] == [1, 0, 0, 1]
    with pytest.raises(UserError, match="of the classes that are asked for"):
        open_packs(path, "train", 0, {"horse": 0})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"labels": None}, "no array labels"),
        ({"wnids": None}, "none of the arrays wnids, names and classes"),
        ({"data": np.zeros(9)}, "data is not a row of bytes"),
        ({"labels": np.zeros(4)}, "labels is not a row of integers"),
        ({"labels": np.array([0, 1, 2, 0])}, "none of its 2 classes"),
        ({"labels": np.array([0, -1, 1, 0])}, "none of its 2 classes"),
        ({"labels": np.array([0, 1, 1])}, "3 labels need 4 offsets"),
        ({"offsets": np.array([0, 9, 5, 12, 20])}, "offsets do not rise"),
        ({"offsets": np.array([0, 9, 15, 20, 10**6])}, "offsets reach to byte 1000000"),
        ({"offsets": np.array(3)}, "offsets is not a row of integers"),
        ({"split": np.array([0, 1])}, "4 labels and the split of 2"),
        ({"split": np.array([0, 1, 2, 1])}, "other values than 0 and 1"),
        ({"wnids": np.array(["cat", "cat"])}, "names a class twice"),
        ({"wnids": np.array([1, 2])}, "wnids is not a row of text"),
        ({"labels": np.array([None, 1, 1, 0])}, "cannot be read as a pack"),  # would need pickle
    ],
)
def test_inconsistent_packs(tmp_path, changed, words):
    path = make_pack(tmp_path / "bad.npz", FILES, LABELS, NAMES, changed=changed)
    with pytest.raises(UserError, match=words) as error:
        read_pack(path)
    assert str(path) in str(error.value)


def test_damaged_packs(tmp_path):
    whole = make_pack(tmp_path / "whole.npz", FILES, LABELS, NAMES).read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    damaged = {
        "empty": b"",
        "text": b"no pack",
        "short": whole[: len(whole) // 2],
        "flipped": bytes(b ^ 255 if 100 <= i < 200 else b for i, b in enumerate(whole)),
        "array": (tmp_path / "array.npy").read_bytes(),
    }
    for name, content in damaged.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as a pack") as error:
            read_pack(tmp_path / f"{name}.npz")
        assert "pickle" not in str(error.value) and "object" not in str(error.value)  # NumPy's words


def test_packs_that_are_not_there_or_do_not_go_together(tmp_path):
    make_pack(tmp_path / "train-0.npz", FILES, LABELS, NAMES)
    make_pack(tmp_path / "train-1.npz", FILES, LABELS, ["dog", "cat"])
    make_pack(tmp_path / "both.npz", FILES, LABELS, NAMES, split=[0, 0, 0, 0])
    for root, split, number, words in (
        (tmp_path / "none.npz", "train", 0, "There is no pack"),
        (tmp_path, "val-*.npz", None, "There is no .*val-"),
        (tmp_path, "train-*.npz", None, "same classes in the same order"),
        (tmp_path, "both.npz", None, "give it as --data-dir"),
        (tmp_path / "both.npz", "test", None, "none is test"),
        (tmp_path / "both.npz", "validation", 1, "no images in .*both.npz for validation"),
    ):
        with pytest.raises(UserError, match=words):
            open_packs(root, split, number)
