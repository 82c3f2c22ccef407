"""Class folders and tar archives of them: which images are read, and what is said of the others."""

import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from classify_helpers import COLOURS, TINY, encoded, make_image
from PIL import Image

from vim2.classify import UserError, predict, train, validate
from vim2.classify.cli import main
from vim2.classify.data import open_split, open_train_and_val
from vim2.classify.prediction import find_images

LAYOUTS = {
    "classes at the top": "{name}/{i}.png",
    "written from inside": "./{name}/{i}.png",
    "a folder around": "flowers/{name}/{i}.png",
    "splits": "{split}/{name}/{i}.png",
    "splits in a folder": "./flowers/{split}/{name}/{i}.png",
}


def make_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(content, tarfile.TarInfo):
                info.size = len(content)
            tar.addfile(info, None if info is content else io.BytesIO(content))
    return path


def tar_of(data, path, layout, mode="w"):
    """The tests' images as a tar, of a layout with splits or without (then those to train on)."""
    files = {}
    for split in ("train", "val"):
        if split == "train" or "{split}" in layout:
            for file in sorted((data / split).rglob("*.png")):
                files[layout.format(split=split, name=file.parent.name, i=file.stem)] = file.read_bytes()
    return make_tar(path, files, mode)


def pixels(images):
    return [(np.asarray(image).tobytes(), target) for image, target in map(images.load, images.indices)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tar_holds_the_images_of_its_folders(layout, data, tmp_path):
    path = tar_of(data, tmp_path / "flowers.tar", LAYOUTS[layout])
    opened = open_train_and_val("", path)
    expected = open_train_and_val("", data if "splits" in layout else data / "train")
    for ours, files in zip(opened[:2], expected[:2]):
        assert pixels(ours) == pixels(files) and len(ours) > 0
    assert opened[2:] == expected[2:] == (["blue", "green", "red"], "splits" not in layout)
    assert opened[0].filename(0).startswith(f"{path}/") and opened[0].filename(0).endswith("blue/0.png")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz"])
def test_compressed_tars(name, data, tmp_path):
    suffix = {"z2": "bz2", "xz": "xz"}.get(name[-2:], "gz")
    path = tar_of(data, tmp_path / name, LAYOUTS["splits"], f"w:{suffix}")
    for ours, files in zip(open_train_and_val("", path)[:2], open_train_and_val("", data)[:2]):
        assert pixels(ours) == pixels(files)


def test_a_tar_for_each_split(data, tmp_path):
    for split in ("train", "val"):
        files = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in (data / split).rglob("*.png")}
        make_tar(tmp_path / f"{split}.tar", files)
    opened = open_train_and_val("", tmp_path, "train.tar", "val.tar")
    for ours, files in zip(opened[:2], open_train_and_val("", data)[:2]):
        assert pixels(ours) == pixels(files)


@pytest.mark.parametrize("name", ["flowers.tar", "flowers.tar.gz"])
@pytest.mark.parametrize("how", [["-j", "2"], ["--in-memory"]], ids=["files", "memory"])
def test_training_and_validating_from_a_tar(name, how, data, tmp_path):
    path = tar_of(data, tmp_path / name, LAYOUTS["a folder around"], "w:gz" if name.endswith("gz") else "w")
    run = train(["--data-dir", str(path), *TINY, *how, "--epochs", "1", "--output", str(tmp_path / "runs")])
    files = train(["--data-dir", str(data / "train"), *TINY, *how, "--epochs", "1", "--output", str(tmp_path / "f")])
    assert [row["train_loss"] for row in run["history"]] == [row["train_loss"] for row in files["history"]]
    # 12 images of each class, of which a fifth was set aside
    again = validate(data_dir=path, checkpoint=f"{run['folder']}/best.pth", workers=0, in_memory="--in-memory" in how)
    assert again[0]["images"] == 6 and again[0]["loss"] == pytest.approx(run["history"][0]["val_loss"], rel=1e-5)


def test_readers_of_tars_go_to_other_processes(data, tmp_path):
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz")):
        images = open_split("", tar_of(data, tmp_path / name, LAYOUTS["splits"], mode), "val")
        reader = pickle.loads(pickle.dumps(images.dataset.reader))
        assert reader[0][0].read() == (data / "val" / "blue" / "0.png").read_bytes()


def test_only_ordinary_images_of_a_tar_are_read(tmp_path, capsys):
    image = encoded(np.zeros((4, 4, 3), dtype=np.uint8))
    pipe, link = tarfile.TarInfo("a/pipe.png"), tarfile.TarInfo("a/link.png")
    pipe.type, link.type, link.linkname = tarfile.FIFOTYPE, tarfile.SYMTYPE, "/etc/passwd"
    files = dict.fromkeys(("a/1.png", "a/2.png", "b/1.png", "b/2.png", "a/deep/1.png", "top.png"), image)
    files |= dict.fromkeys((".git/1.png", ".git/2.png", "a/._1.png", "../a/9.png", "a/note.txt", "a/2.gif"), image)
    folders = {name: tarfile.TarInfo(name) for name in ("a", "empty", "empty/in", "text")}
    for folder in folders.values():
        folder.type = tarfile.DIRTYPE
    files["text/note.txt"] = b"no image"
    path = make_tar(tmp_path / "odd.tar", {**folders, **files, "pipe": pipe, "link": link})
    images = open_split("", path, "train")
    assert [images.filename(i) for i in range(len(images))] == [f"{path}/{n}.png" for n in ("a/1", "a/2", "b/1", "b/2")]
    assert images.dataset.reader.left_out == (
        f"Left out of {path}: 1 beside the class folders (top.png); 1 deeper than the class folders (a/deep/1.png); "
        "3 hidden (.git, a/._1.png, ..); 2 neither file nor folder (a/pipe.png, a/link.png); "
        "1 named as other images than .bmp, .jpeg, .jpg, .png, .tif, .tiff, .webp (a/2.gif); "
        "2 without an image (empty/in, text)."
    )


def test_what_lies_beside_a_tars_only_folder_is_left_out(tmp_path):
    image = encoded(np.zeros((4, 4, 3), dtype=np.uint8))
    files = dict.fromkeys(("._top", "top/a/1.png", "top/a/._1.png", "top/b/1.png"), image)
    images = open_split("", make_tar(tmp_path / "mac.tar", files), "train")
    assert images.dataset.reader.left_out == f"Left out of {tmp_path}/mac.tar/top: 2 hidden (../._top, a/._1.png)."


def test_tars_that_cannot_be_read_are_one_line(data, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = tar_of(data, tmp_path / "whole.tar", LAYOUTS["splits"]).read_bytes()
    squeezed = tar_of(data, tmp_path / "whole.tar.gz", LAYOUTS["splits"], "w:gz").read_bytes()
    contents = {
        "text.tar": b"no tar" * 1000,
        "empty.tar": b"",
        "cut.tar": whole[: len(whole) // 2],
        "cut.tar.gz": squeezed[: len(squeezed) // 2],
        "no-end.tar": (end := whole.rstrip(b"\0")) + bytes(-len(end) % 512),
        "damaged.tar": whole[:10240] + bytes(b ^ 255 for b in whole[10240:20480]) + whole[20480:],
        "flipped.tgz": squeezed[:5000] + bytes(b ^ 255 for b in squeezed[5000:6000]) + squeezed[6000:],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert f"{name} is no tar archive, or damaged" in fails("train", "--data-dir", tmp_path / name, *TINY)
    assert "no images" in fails("train", "--data-dir", make_tar(tmp_path / "none.tar", {"a.txt": b"a"}), *TINY)
    half = make_tar(tmp_path / "half.tar", {"train/a/1.png": b"", "train/b/1.png": b"", "x/a/1.png": b""})
    error = fails("train", "--data-dir", half, *TINY)
    assert "none for validation" in error and "half.tar/train, unpacked," in error
    (tmp_path / "flowers.zip").write_bytes(b"PK")
    assert "flowers.zip is no folder, tar archive" in fails("train", "--data-dir", tmp_path / "flowers.zip", *TINY)
    monkeypatch.setattr("vim2.classify.folders.free_memory", lambda device: 1000)
    assert "unpack it" in fails(
        "train", "--data-dir", tar_of(data, tmp_path / "b.tgz", "{name}/{i}.png", "w:gz"), *TINY
    )


@pytest.mark.timeout(60)
def test_classes_are_the_first_level_of_folders(data, tmp_path, capsys):
    root = shutil.copytree(data, tmp_path / "data")
    (root / "train" / "loop").symlink_to(root / "train")
    (root / "train" / "up").symlink_to("..")
    (root / "train" / "red" / "all").symlink_to(root)
    os.mkfifo(root / "train" / "red" / "pipe.png")
    for name in ("red/old/0.png", ".ipynb_checkpoints/0-checkpoint.png", "red/._0.png", "loose.png"):
        make_image(root / "train" / name, COLOURS["green"], 0)
    outside = (root / "train" / "blue").rename(tmp_path / "blue")
    (root / "train" / "blue").symlink_to(outside)  # a class may lie elsewhere
    argv = ["--data-dir", str(root), *TINY, "--epochs", "1", "--output", str(tmp_path)]
    run, plain = train(argv), train(["--data-dir", str(data), *argv[2:], "--output", str(tmp_path / "plain")])
    assert [row["train_loss"] for row in run["history"]] == [row["train_loss"] for row in plain["history"]]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Left out")]
    assert lines == [
        f"Left out of {root / 'train'}: 1 beside the class folders (loose.png); 1 deeper than the class folders "
        "(red/old/0.png); 2 hidden (.ipynb_checkpoints, red/._0.png); 1 neither file nor folder (red/pipe.png); "
        "3 linked back or to nothing (loop, up, red/all)."
    ]


def test_class_folders_one_level_too_deep(data, fails, tmp_path):
    shutil.copytree(data / "train", tmp_path / "flowers")
    error = fails("train", "--data-dir", tmp_path, *TINY)
    assert "deeper: give --data-dir the folder that holds the class folders" in error and "blue/0.png" in error


@pytest.mark.parametrize("name", ["torch/image_folder", "imagenet"])
def test_timms_other_names_for_class_folders(name, data, fails):
    """Under which both splits would be the same images, read by other rules."""
    assert "leave it out for class folders" in fails("train", "--dataset", name, "--data-dir", data, *TINY)


def test_class_maps(data, tmp_path):
    (tmp_path / "map").write_text("\ufeffred\n\nblue\n", encoding="utf-8")
    images = open_split("", data, "val", str(tmp_path / "map"))
    assert images.dataset.reader.class_to_idx == {"red": 0, "blue": 1}
    assert sorted(set(images.targets())) == [0, 1] and len(images) == 10
    for content, words in (("", "is empty"), ("a\nb\na\n", "names a twice")):
        (tmp_path / "map").write_text(content)
        with pytest.raises(UserError, match=words):
            open_split("", data, "val", str(tmp_path / "map"))


def test_prediction_leaves_out_what_training_does(tmp_path, capsys):
    for name in ("0.png", "in/1.png", ".hidden/2.png", "in/._1.png"):
        make_image(tmp_path / "mine" / name, COLOURS["red"], 0)
    for link in ("loop", "in/loop", "in/again"):
        (tmp_path / "mine" / link).symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / "mine" / "pipe.png")
    expected = [tmp_path / "mine" / name for name in ("0.png", "in/1.png")]
    assert find_images([str(tmp_path / "mine")]) == expected
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "2 hidden" in out and "1 neither" in out and "3 linked back" in out
    (tmp_path / "mine").rename(tmp_path / "mine [1]")
    in_brackets = [tmp_path / "mine [1]" / name for name in ("0.png", "in/1.png")]
    assert find_images([str(tmp_path / "mine [1]" / "**" / "*.png")]) == in_brackets
    (tmp_path / "mine [1]").rename(tmp_path / "mine")
    for pattern in ("mine/**/*.png", "mine/**", "**/*.png", "mi*"):
        assert find_images([str(tmp_path / pattern)]) == expected
    assert find_images([str(tmp_path / "mine" / "in" / "._1.png")])  # which is named
    with pytest.raises(UserError, match=r"no images in .*pipe"):
        find_images([str(tmp_path / "mine" / "pipe.png")])


def ramp(path, seed, dark):
    """16 bits, of which the upper half of the values is white and the lower half black to one who cuts at 255."""
    low, high = (600, 30000) if dark else (30000, 65535)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(low, high, (32, 32), dtype=np.uint16)
    Image.fromarray(values).save(path)
    return values


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    root = tmp_path_factory.mktemp("ramps")
    for split, number in (("train", 12), ("val", 6)):
        for i in range(number):
            for name in ("dark", "light"):
                ramp(root / split / name / f"{i}.png", 100 * i + (split == "val"), name == "dark")
    return root


class TestSixteenBits:
    @pytest.mark.parametrize("how", [["-j", "0"], ["--in-memory"]], ids=["files", "memory"])
    def test_are_learnt_from(self, ramps, how, tmp_path):
        argv = [
            "--data-dir",
            str(ramps),
            *TINY,
            *how,
            "--epochs",
            "3",
            "--lr",
            "3e-3",
            "--warmup-epochs",
            "0",
            "--no-aug",
        ]
        run = train([*argv, "--output", str(tmp_path)])
        assert run["best"]["top1"] == 100
        best = f"{run['folder']}/best.pth"
        scores = validate(data_dir=ramps, checkpoint=best, workers=0, output=tmp_path)
        assert scores[0]["top1"] == 100
        predictions = predict(images=[ramps / "val"], checkpoint=best, output=tmp_path)
        assert all(p["top"][0]["label"] == p["true_label"] for p in predictions)

    @pytest.mark.parametrize("how", [["-j", "0"], ["-j", "1"], ["--in-memory"]], ids=str)
    def test_floats_are_refused_by_name(self, data, trained, how, fails, tmp_path):
        root = shutil.copytree(data, tmp_path / "data")
        for split in ("train", "val"):
            (root / split / "red" / "0.png").unlink()
            Image.fromarray(np.ones((32, 32), dtype=np.float32)).save(root / split / "red" / "0.tif")
        common = ["--data-dir", root, "--output", tmp_path / "out"]
        best = trained / "best.pth"
        for error in (
            fails("train", *common, *TINY, *how, "-b", "36", "--epochs", "1"),
            fails("validate", *common, "--checkpoint", best, *how),
            fails("predict", root / "val", "--checkpoint", best, "--output", tmp_path / "out"),
        ):
            assert "red/0.tif has floating-point pixels" in error and "8 or 16 bits" in error


def test_an_image_with_another_way_to_be_damaged_is_counted(data, tmp_path, monkeypatch):
    """Of Pillow's readers, which raise more than OSError."""
    root = shutil.copytree(data, tmp_path / "data")
    bomb = encoded(Image.new("1", (20000, 20000)))
    (root / "val" / "red" / "1.png").write_bytes(bomb)
    (root / "val" / "red" / "2.tif").write_bytes(b"II*\0\x08\0\0\0\x01\0\0\x01\x03\0\x01\0\0\0\xff\xff")
    rows = []
    argv = ["--data-dir", str(root), *TINY, "--epochs", "1", "--output", str(tmp_path)]
    rows.append(train(argv)["history"][0])
    assert rows[0]["unreadable"] == 2
    assert main(["validate", "--data-dir", str(root), "--checkpoint", str(tmp_path / "test_vim2-data" / "best.pth"),
                 "-j", "0", "--output", str(tmp_path)]) == 0  # fmt: skip
    assert json.loads((tmp_path / "validation.json").read_text())[0]["unreadable"] == 2
