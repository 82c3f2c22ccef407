"""Preparing data, counting and timing whole models, drawing: what comes out, and what bad input gets."""

from common.command import run_tool

import contextlib
import io
import json
import lzma
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mm_helpers import ROOT
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from PIL import Image

import vim2.mm  # noqa: F401
from benchmarks.mm import main as measure
from tools.prepare_data import COCO_STUFF, COCO_THINGS
from tools.prepare_data import main as prepare
from vim2.classify.packs import read_pack
from vim2.command.errors import UserError
from vim2.mm.annotations import check_annotations
from vim2.mm.commands import predict as demo
from vim2.mm.commands import train
from vim2.mm.config_loading import load_config
from vim2.ops import backend

SHARED = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the checkout")


def png(values):
    buffer = io.BytesIO()
    Image.fromarray(np.uint8(values)).save(buffer, "PNG")
    return buffer.getvalue()


def make_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


class TestPreparing:
    def test_nuclei_are_split_by_every_fifth_id(self, tmp_path, capsys):
        make_tar(tmp_path / "nuclei664.tar", {f"images/{i}.webp": b"" for i in range(7)})
        images = [dict(id=i, file_name=f"{i}.webp", width=8, height=8) for i in range(7)]
        annotations = [dict(id=i, image_id=i % 7) for i in range(14)]
        instances = json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name="nucleus")]))
        (tmp_path / "nuclei664.instances.json.xz").write_bytes(lzma.compress(instances.encode()))
        assert run_tool(prepare, ["nuclei", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
        assert "5 images with 10 nuclei for train, 2 images with 4 nuclei for val" in capsys.readouterr().out
        val = json.loads((tmp_path / "out/annotations/instances_val.json").read_text())
        assert [image["id"] for image in val["images"]] == [0, 5]
        assert {a["image_id"] for a in val["annotations"]} == {0, 5} and val["categories"][0]["name"] == "nucleus"

    def test_void_of_camvid_is_ignored(self, tmp_path):
        files = {f"{split}annot/a.png": png([[0, 10, 11]]) for split in ("train", "val", "test")}
        make_tar(tmp_path / "camvid701.tar", files)
        assert run_tool(prepare, ["camvid", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
        assert np.asarray(Image.open(tmp_path / "out/valannot/a.png")).tolist() == [[0, 10, 255]]

    def test_categories_of_coco_become_labels(self, tmp_path):
        files = {
            "semantic130/train2017/1.png": png([[0, 1, 90, 92, 200]]),
            "semantic130/val2017/2.png": png([[13, 12]]),
        }
        files |= {f"annotations/instances_{s}2017.json": b'{"images": []}' for s in ("train", "val")}
        make_tar(tmp_path / "coco549.tar", files)
        assert run_tool(prepare, ["coco549", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
        assert np.asarray(Image.open(tmp_path / "out/semantic/train2017/1.png")).tolist() == [[255, 0, 79, 80, 132]]
        assert np.asarray(Image.open(tmp_path / "out/semantic/val2017/2.png")).tolist() == [[11, 255]]
        assert (tmp_path / "out/semantic/val.txt").read_text() == "2\n" and not (tmp_path / "out/semantic130").exists()

    def test_maps_of_16_bits_hold_the_same_labels(self, tmp_path):
        wide = io.BytesIO()
        Image.fromarray(np.uint16([[0, 10, 11, 256, 65535]])).save(wide, "PNG")
        make_tar(tmp_path / "camvid701.tar", {f"{split}annot/a.png": wide.getvalue() for split in ("train", "val")})
        assert run_tool(prepare, ["camvid", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
        assert np.asarray(Image.open(tmp_path / "out/valannot/a.png")).tolist() == [[0, 10, 255, 255, 255]]

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (png(np.zeros((2, 2, 3))), "is no map of labels"),
            (png(np.random.default_rng(0).integers(0, 9, (64, 64)))[:999], "no image that can be read"),
        ],
        ids=["colours", "cut off"],
    )
    def test_what_is_no_map_of_labels(self, content, words, tmp_path, capsys):
        make_tar(tmp_path / "camvid701.tar", {"valannot/a.png": content})
        assert run_tool(prepare, ["camvid", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert words in error and "valannot/a.png" in error and error.count("\n") == 1

    def test_ids_are_those_of_mmdetections_classes(self):
        from mmdet.datasets import CocoPanopticDataset

        config = load_config(ROOT / "mmseg_configs/vim2-tiny_upernet_1xb8-4k_coco549-512x512.py")
        classes = config.train_dataloader.dataset.metainfo.classes
        assert tuple(classes) == CocoPanopticDataset.METAINFO["classes"]
        assert len(COCO_THINGS) == 80 and len(COCO_THINGS + COCO_STUFF) == len(classes) == 133

    def test_part_of_imagenette(self, tmp_path, capsys):
        labels = np.arange(10).repeat(180)
        split = (np.arange(1800) % 3 == 0).astype(np.int64)  # 120 a class to learn from, 60 to validate on
        data = (np.arange(1800) % 251).astype(np.uint8)
        arrays = dict(data=data, offsets=np.arange(1801), labels=labels, names=np.array(list("abcdefghij")))
        argv = ["imagenette1000.npz", str(tmp_path), "--output", str(tmp_path / "out.npz")]
        np.savez(tmp_path / "imagenette128.npz", **arrays)
        assert run_tool(prepare, argv) == 2 and "has no split" in capsys.readouterr().err
        np.savez(tmp_path / "imagenette128.npz", **arrays, split=split)
        assert run_tool(prepare, argv) == 0 and "1000 images for train, 500 for val" in capsys.readouterr().out
        part = read_pack(tmp_path / "out.npz")
        assert np.bincount(part.labels[part.split == 0]).tolist() == [100] * 10
        assert np.bincount(part.labels[part.split == 1]).tolist() == [50] * 10
        first = np.flatnonzero((labels == 3) & (split == 1))[:50]
        assert part.data[part.offsets[:-1]][(part.labels == 3) & (part.split == 1)].tolist() == data[first].tolist()

    def test_damaged_missing_and_present(self, tmp_path, capsys):
        argv = ["camvid", str(tmp_path), "--output", str(tmp_path / "out")]
        assert run_tool(prepare, argv) == 2 and "camvid701.tar is missing" in capsys.readouterr().err
        (tmp_path / "camvid701.tar").write_bytes(b"no tar" * 1000)
        assert run_tool(prepare, argv) == 2 and "is damaged" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["camvid701.tar"]  # nothing half-made is left
        (tmp_path / "out").mkdir()
        assert run_tool(prepare, argv) == 2 and "already there" in capsys.readouterr().err

    @pytest.mark.parametrize("old_python", [False, True])
    @pytest.mark.parametrize(
        "member",
        [
            dict(name="/absolute/a.png"),
            dict(name="images/../../a.png"),
            dict(name="a.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            dict(name="a.png", type=tarfile.LNKTYPE, linkname="../a.png"),
            dict(name="a.png", type=tarfile.CHRTYPE),
        ],
        ids=["absolute", "above", "symbolic link", "hard link", "device"],
    )
    def test_nothing_leaves_the_folder(self, member, old_python, tmp_path, capsys, monkeypatch):
        if old_python:
            monkeypatch.delattr(tarfile, "data_filter", raising=False)
        elif not hasattr(tarfile, "data_filter"):
            pytest.skip("this Python's tarfile has no filters")
        downloads = tmp_path / "downloads"
        downloads.mkdir()
        with tarfile.open(downloads / "camvid701.tar", "w") as tar:
            info = tarfile.TarInfo(member["name"])
            for name, value in member.items():
                setattr(info, name, value)
            tar.addfile(info, io.BytesIO())
        argv = ["camvid", str(downloads), "--output", str(tmp_path / "data" / "out")]
        code, error = run_tool(prepare, argv), capsys.readouterr().err
        if member["name"].startswith("/") and not old_python:  # the filter makes it one of the folder's own
            assert code == 0 and (tmp_path / "data/out/absolute/a.png").is_file()
        else:
            assert code == 2 and "camvid701.tar is damaged" in error and error.count("\n") == 1
            assert not list((tmp_path / "data").iterdir())
        assert not (tmp_path / "a.png").exists() and not Path("/absolute").exists()

    def test_unpacking_on_an_old_python(self, tmp_path, monkeypatch):
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
        self.test_void_of_camvid_is_ignored(tmp_path)
        assert (tmp_path / "out/trainannot/a.png").stat().st_mode & 0o777 != 0o777

    def test_damaged_instances(self, tmp_path, capsys):
        make_tar(tmp_path / "nuclei664.tar", {"images/0.webp": b""})
        (tmp_path / "nuclei664.instances.json.xz").write_bytes(lzma.compress(b"{}" * 1000)[:40])
        assert run_tool(prepare, ["nuclei", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
        assert "instances.json.xz is damaged" in capsys.readouterr().err and not (tmp_path / "out").exists()

    @pytest.mark.parametrize("content", [b"{", b"[]", b"{}"])
    def test_annotations_of_another_kind(self, content, tmp_path, capsys):
        make_tar(tmp_path / "coco549.tar", {f"annotations/instances_{s}2017.json": content for s in ("train", "val")})
        assert run_tool(prepare, ["coco549", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "other files than coco549's" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()

    @needs_data
    @pytest.mark.parametrize(
        "name, folder, config, sizes",
        [
            ("nuclei", "detect", "mmdet_configs/mask-rcnn_vim2-nano_fpn_24e_nuclei.py", (531, 133)),
            ("coco549", "detect", "mmdet_configs/mask-rcnn_vim2-tiny_fpn_1x_coco549.py", (340, 206)),
            ("coco549", "detect", "mmseg_configs/vim2-tiny_upernet_1xb8-4k_coco549-512x512.py", (100, 100)),
            ("camvid", "segment", "mmseg_configs/vim2-nano_upernet_1xb8-4k_camvid-352x480.py", (367, 101)),
        ],
    )
    def test_real_data_fit_the_configs(self, name, folder, config, sizes, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert run_tool(prepare, [name, str(SHARED / folder)]) == 0
        config = load_config(ROOT / config)
        init_default_scope(config.default_scope)
        with torch.device("meta"):
            model = MODELS.build(config.model)
        for split, size in zip(("train", "val"), sizes):
            loader = config[f"{split}_dataloader"]
            loader.update(num_workers=0, persistent_workers=False)
            dataset = Runner.build_dataloader(loader, seed=0).dataset
            assert len(dataset) == size
            check_annotations(dataset, model, f"{split}_dataloader")
            sample = dataset[0]
            assert sample["inputs"].shape[0] == 3
            if config.default_scope == "mmdet":
                instances = sample["data_samples"].gt_instances
                assert len(instances.bboxes) == len(instances.masks) > 0
            else:
                labels = set(sample["data_samples"].gt_sem_seg.data.unique().tolist()) - {255}
                assert labels and max(labels) < len(dataset.metainfo["classes"])


@pytest.fixture(scope="module")
def counted():
    configs = [
        ROOT / "mmdet_configs/mask-rcnn_vim2-tiny_fpn_1x_coco.py",
        "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
        ROOT / "mmseg_configs/vim2-tiny_upernet_8xb2-160k_ade20k-512x512.py",
    ]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        measure(["--count", *map(str, configs)])
    return re.findall(r"^\| (\S+) \| [\dx ]+ \| \d \| ([\d.]+) \| ([\d.]+) \|", out.getvalue(), re.M)


class TestCounting:
    def test_swins_published_figures(self, counted):
        name, parameters, gflops = counted[1]
        assert "swin" in name
        assert float(parameters) == pytest.approx(48, abs=0.5) and float(gflops) == pytest.approx(267, abs=1)

    def test_readmes_hold_what_the_tool_prints(self, counted):
        for kind, (name, parameters, gflops) in (("mmdet", counted[0]), ("mmseg", counted[2])):
            row = next(
                line for line in (ROOT / f"{kind}_configs/README.md").read_text().splitlines() if f"[{name}]" in line
            )
            assert f" {parameters} " in row and f" {gflops} " in row

    def test_times_and_files(self, configs, tmp_path, capsys):
        argv = ["--shape", "64", "64", "--repeats", "1", "--warmup", "1", "--device", "cpu", "--output", tmp_path]
        measure([str(a) for a in (configs["mmdet"], configs["mmseg"], *argv)])
        rows = json.loads((tmp_path / "mm_benchmark.json").read_text())["models"]
        assert len(rows) == 2 and all(row[mode]["img_s"] > 0 for row in rows for mode in ("infer", "train"))
        assert capsys.readouterr().out.endswith((tmp_path / "mm_benchmark.md").read_text())  # after warnings, if any

    def test_profile(self, configs, tmp_path, capsys):
        argv = ["--shape", "64", "64", "--repeats", "1", "--warmup", "1", "--device", "cpu", "--output", tmp_path]
        measure([str(a) for a in (configs["mmdet"], "--profile", "--train", *argv)])
        (result,) = json.loads((tmp_path / "mm_benchmark.json").read_text())["profiles"]
        rows = {row["operators"]: row for row in result["profile"]}
        for operator in ("roi_align", "selective_scan", "selective_scan_backward"):  # of the head, and of the backbone
            assert rows[operator]["calls"] > 0 and rows[operator]["ms"] > 0
        out = capsys.readouterr().out
        assert out.endswith((tmp_path / "mm_benchmark.md").read_text())
        assert f"64 x 64, batch 2, train: {result['step_ms']:.2f} ms a step; by operators" in out
        with pytest.raises(UserError, match="leave out --profile"):
            measure([str(configs["mmdet"]), "--profile", "--count"])


def test_no_picture_overwrites_another(configs, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png([[0]]))
    with pytest.raises(UserError, match=r"would both be drawn into 0\.png"):
        demo([*(str(tmp_path / name) for name in "ab"), "--config", str(configs["mmdet"]), "--checkpoint", "none.pth"])


def test_no_picture_overwrites_its_image(fails_to_draw, tmp_path):
    image = tmp_path / "0.png"
    image.write_bytes(png([[0]]))
    assert "0.png is what is read, and would be written over" in fails_to_draw(tmp_path, "--out-dir", tmp_path)
    assert image.read_bytes() == png([[0]])


@pytest.mark.parametrize(
    "images, message",
    [(["none.jpg"], "none.jpg is no image"), (["empty"], "holds no images"), (["text.png"], "no image")],
)
def test_no_images_to_draw(images, message, configs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(UserError, match=message):
        demo([*images, "--config", str(configs["mmdet"]), "--checkpoint", "none.pth"])


@pytest.fixture
def fails_to_draw(configs, capsys):
    """Runs the demo, which must fail before it reads the checkpoint, and returns its one line."""

    def run(*argv):
        argv = [*argv, "--config", configs["mmdet"], "--checkpoint", "none.pth"]
        capsys.readouterr()
        assert run_tool(demo, [str(a) for a in argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run


@pytest.mark.timeout(60)
def test_images_that_cannot_be_drawn(fails_to_draw, tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.fromarray(np.ones((64, 64), np.float32)).save(tmp_path / "float.tif")
    os.mkfifo(tmp_path / "pipe.png")
    for name, words in (
        ("cut.jpg", "truncated"),
        ("bomb.png", "decompression bomb"),
        ("float.tif", "floating-point"),
        ("pipe.png", "no ordinary file"),
    ):
        error = fails_to_draw(tmp_path / name, "--out-dir", tmp_path / "out")
        assert name in error and words in error
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_written(fails_to_draw, data, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", "/proc/none"):
        error = fails_to_draw(data / "images" / "0.png", "--out-dir", folder)
        assert f"{folder} (" in error and "choose another --out-dir" in error


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_no_such_device(device, configs):
    with pytest.raises(UserError, match=f"--device {device} cannot be used here"):
        demo(["0.png", "--config", str(configs["mmdet"]), "--checkpoint", "none.pth", "--device", device])


def test_a_backend_that_cannot_run_here_is_one_line(configs, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "DEFAULT_BACKEND", "fast")
    drawing = ["0.png", "--config", str(configs["mmdet"]), "--checkpoint", "none.pth", "--device", "cpu"]
    for command, argv in ((demo, drawing), (train, [str(configs["mmdet"]), "--work-dir", str(tmp_path / "run")])):
        with pytest.raises(UserError, match="VIM2_SCAN_BACKEND=fast cannot be used on"):
            command(argv)
    assert not (tmp_path / "run").exists()
