"""Tiny images, configs and processes for these tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
SIDE = 64  # pixels

# what a tiny model, few proposals and no worker processes take
BACKBONE = 'dict(type="ViM2", arch=dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), d_state=2, channel_patch=8))'
DETECTOR = """
_base_ = {base!r}
model = dict(
    backbone=dict(_delete_=True, **{backbone}),
    neck=dict(in_channels=[8, 8, 16, 16], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8),
        bbox_head=dict(in_channels=8, fc_out_channels=16, num_classes=2),
        mask_roi_extractor=dict(out_channels=8),
        mask_head=dict(num_convs=1, in_channels=8, conv_out_channels=8, num_classes=2),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=20), rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=10)),
)
metainfo = dict(classes=("box", "disc"), palette=[(220, 20, 60), (20, 220, 60)])
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
]
train_pipeline = [*pipeline, dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")]
test_pipeline = [
    *pipeline,
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
common = dict(data_root={data!r}, metainfo=metainfo, ann_file="instances.json", data_prefix=dict(img="images/"))
loader = dict(num_workers={workers}, persistent_workers=False)
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline, **common), **loader)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **common), **loader)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={data!r} + "/instances.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
randomness = dict(seed=0)
"""
SEGMENTER = """
_base_ = {base!r}
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(_delete_=True, **{backbone}),
    decode_head=dict(in_channels=[8, 8, 16, 16], channels=8, num_classes=2),
    auxiliary_head=dict(in_channels=16, channels=8, num_classes=2),
)
metainfo = dict(classes=("ground", "disc"), palette=[[20, 20, 220], [20, 220, 60]])
train_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
common = dict(data_root={data!r}, metainfo=metainfo, img_suffix=".png", seg_map_suffix=".png")
prefix = dict(img_path="images", seg_map_path="maps")
loader = dict(num_workers={workers}, persistent_workers=False)
train_dataloader = dict(
    batch_size=2, dataset=dict(pipeline=train_pipeline, data_prefix=dict(_delete_=True, **prefix), **common), **loader
)
val_dataloader = dict(dataset=dict(data_prefix=dict(_delete_=True, **prefix), **common), **loader)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
randomness = dict(seed=0)
"""


def make_data(root: Path, number: int = 4) -> Path:
    """Images of a box and a disc; instances.json as COCO has it, and maps/ with the disc as class 1."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    (root / "images").mkdir(parents=True)
    (root / "maps").mkdir()
    images, annotations = [], []
    for i in range(number):
        x, y = (int(v) for v in rng.integers(4, 24, 2))
        box = (rows >= y) & (rows < y + 16) & (columns >= x) & (columns < x + 24)
        disc = (rows - 48) ** 2 + (columns - 44) ** 2 < 12**2
        pixels = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        pixels[box] += np.uint8([150, 0, 0])
        pixels[disc] += np.uint8([0, 150, 0])
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        Image.fromarray(disc.astype(np.uint8)).save(root / "maps" / f"{i}.png")
        images.append(dict(id=i, file_name=f"{i}.png", width=SIDE, height=SIDE))
        annotations.append(annotation(2 * i, i, 1, [x, y, 24, 16]))
        annotations.append(annotation(2 * i + 1, i, 2, [32, 36, 24, 24]))
    write_instances(root, images, annotations)
    return root


def annotation(i: int, image: int, category: int, box: list[float]) -> dict:
    x, y, w, h = box
    outline = [x, y, x + w, y, x + w, y + h, x, y + h]
    return dict(id=i, image_id=image, category_id=category, bbox=box, area=w * h, iscrowd=0, segmentation=[outline])


def write_instances(root: Path, images: list[dict], annotations: list[dict]) -> None:
    categories = [dict(id=1, name="box"), dict(id=2, name="disc")]
    (root / "instances.json").write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )


def write_config(path: Path, kind: str, data: Path, workers: int = 0, extra: str = "") -> Path:
    """A tiny detector or segmenter ("mmdet", "mmseg") that inherits from a config of this repository."""
    text, base = {
        "mmdet": (DETECTOR, "mmdet_configs/mask-rcnn_vim2-nano_fpn_24e_nuclei.py"),
        "mmseg": (SEGMENTER, "mmseg_configs/vim2-nano_upernet_1xb8-4k_camvid-352x480.py"),
    }[kind]
    values = dict(base=str(ROOT / base), backbone=BACKBONE, data=str(data), workers=workers)
    path.write_text(text.format(**values) + extra)
    return path


def run(*argv, **kwargs) -> subprocess.CompletedProcess:
    """Run a tool in a process of its own."""
    start = [] if str(argv[0]).endswith(".sh") else [sys.executable]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
        **kwargs.pop("env", {}),
    }
    return subprocess.run([*start, *map(str, argv)], env=env, capture_output=True, text=True, timeout=400, **kwargs)


def metrics(work_dir: Path) -> dict:
    """The last line of metrics that a run has logged."""
    logs = sorted(work_dir.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for line in logs[-1].read_text().splitlines()] if logs else []
    return next(line for line in reversed(lines) if "loss" not in line)


def call(main, *argv) -> None:
    """Run a tool's main in this process, as if it were a new one to MMEngine."""
    from mmengine.utils import ManagerMixin

    managers = [ManagerMixin]
    for manager in managers:
        manager._instance_dict.clear()
        managers += manager.__subclasses__()
    main([str(argument) for argument in argv])
