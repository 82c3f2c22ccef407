"""Masks that are decoded where a crop keeps them: the samples of MMDetection's own LoadAnnotations."""

import copy
import multiprocessing
import pickle
import shutil
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch.multiprocessing  # noqa: F401  (how tensors go to other processes)
from pycocotools import mask as coco

import vim2.mm  # noqa: F401  (before mmdet, which needs mmcv's operators)

# isort: split
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, RandomCrop, RandomFlip, Resize
from mmdet.structures.mask import BitmapMasks

from vim2.mm.lazy_masks import LazyBitmapMasks, LoadAnnotationsLazily

HEIGHT, WIDTH = 60, 90


def make_results(objects: int) -> dict:
    """A sample before its annotations are loaded: polygons, runs and encoded runs in turn, one of them invalid."""
    rng = np.random.default_rng(objects)
    instances = []
    for i in range(objects):
        x, y = (int(v) for v in rng.integers(0, (WIDTH - 12, HEIGHT - 10)))
        mask = [[x, y, x + 12, y, x + 12, y + 10, x, y + 7]]
        if i % 3:
            mask = coco.merge(coco.frPyObjects(mask, HEIGHT, WIDTH))
            mask["counts"] = mask["counts"].decode()
        if i % 3 == 2:
            flat = np.concatenate([[0], coco.decode(mask).T.ravel(), [2]])
            mask["counts"] = np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist()
        if i == 3:
            mask = [[x, y, x + 1, y]]
        instances.append(dict(bbox=[x, y, x + 12, y + 10], bbox_label=i % 2, mask=mask, ignore_flag=0))
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    shape = dict(ori_shape=(HEIGHT, WIDTH), img_shape=(HEIGHT, WIDTH), img_id=0, img_path="image.png")
    return dict(img=image, instances=instances, **shape)


def run(loader: type, results: dict, seed: int, crop: dict | None) -> dict:
    np.random.seed(seed)
    results = loader(with_bbox=True, with_mask=True).transform(copy.deepcopy(results))
    steps = [RandomCrop(allow_negative_crop=True, **crop)] if crop else []
    flip = RandomFlip(prob=[0.3, 0.3, 0.3], direction=["horizontal", "vertical", "diagonal"])
    for step in [*steps, Resize(scale=(64, 64), keep_ratio=True), flip, PackDetInputs()]:
        results = step.transform(results)
    return results


@pytest.mark.parametrize("objects", [0, 12])
@pytest.mark.parametrize("crop", [None, dict(crop_size=(32, 40)), dict(crop_size=(200, 200), recompute_bbox=True)])
def test_samples_are_those_of_mmdetection(objects, crop):
    for seed in range(6):
        loaders = LoadAnnotationsLazily, LoadAnnotations
        lazy, eager = (run(loader, make_results(objects), seed, crop) for loader in loaders)
        assert (lazy["inputs"] == eager["inputs"]).all()
        lazy, eager = lazy["data_samples"], eager["data_samples"]
        assert lazy.metainfo == eager.metainfo
        for part in ("gt_instances", "ignored_instances"):
            ours, theirs = lazy.get(part), eager.get(part)
            assert (ours.bboxes.tensor == theirs.bboxes.tensor).all() and (ours.labels == theirs.labels).all()
            assert type(ours.masks) is BitmapMasks
            assert ours.masks.masks.dtype == theirs.masks.masks.dtype
            np.testing.assert_array_equal(ours.masks.masks, theirs.masks.masks)


def load(loader: type, decoded: list | None = None):
    transform = loader(with_bbox=True, with_mask=True)
    if decoded is not None:
        original = transform._poly2mask
        transform._poly2mask = lambda *args: decoded.append(args) or original(*args)
    return transform.transform(make_results(12))["gt_masks"]


def test_only_what_a_crop_keeps_is_decoded():
    decoded, theirs = [], load(LoadAnnotations)
    masks = load(LoadAnnotationsLazily, decoded)
    chosen = masks[np.array([1, 7])]
    assert isinstance(masks, LazyBitmapMasks) and len(chosen) == 2 and not decoded
    box = np.array([10, 5, 300, 300])  # beyond the image, as theirs may be
    np.testing.assert_array_equal(chosen.crop(box).masks, theirs[np.array([1, 7])].crop(box).masks)
    assert len(decoded) == 2


def test_masks_serve_where_nothing_crops_them():
    """They travel from the process that loads, and what is changed after decoding stays so."""
    masks, theirs = pickle.loads(pickle.dumps(load(LoadAnnotationsLazily))), load(LoadAnnotations)
    np.testing.assert_array_equal(masks.to_ndarray(), theirs.masks)
    np.testing.assert_array_equal(masks.areas, theirs.areas)
    masks.masks = 1 - masks.masks
    np.testing.assert_array_equal(masks[2].masks, 1 - theirs[2].masks)
    np.testing.assert_array_equal(masks.crop(np.array([0, 0, 9, 9])).masks, 1 - theirs.masks[:, :9, :9])


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 5, 7)])
def test_masks_go_to_another_process_without_their_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 2, shape, dtype=np.uint8)
    sent = BitmapMasks(pixels, *shape[1:]).flip()  # a view of them, of negative strides
    masks = pickle.loads(ForkingPickler.dumps(sent))
    assert type(masks) is BitmapMasks and (masks.height, masks.width) == shape[1:]
    assert masks.masks.dtype == np.uint8 and (masks.masks == pixels[:, :, ::-1]).all()
    large = BitmapMasks(np.zeros((4, 300, 500), dtype=np.uint8), 300, 500)
    assert len(ForkingPickler.dumps(large)) < 2000 < 4 * 300 * 500 < len(pickle.dumps(large))


def test_masks_leave_half_of_the_shared_memory_to_images(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 2, (4, 100, 100), dtype=np.uint8)
    for free, goes in (52_000, False), (100_000, True):
        usage = type(shutil.disk_usage("/"))(100_000, 100_000 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        sent = ForkingPickler.dumps(BitmapMasks(pixels, 100, 100))
        assert (len(sent) < 2000) == goes and (pickle.loads(sent).masks == pixels).all()


def add(masks: list[BitmapMasks], sums) -> None:
    for each in masks:
        sums.put(int(each.masks.sum()))


def test_masks_are_given_to_a_process_that_is_started():
    """As those of a data set that keeps some, where its loader's workers are spawned."""
    context = multiprocessing.get_context("spawn")
    masks = [BitmapMasks(np.full((2, 5, 7), i, dtype=np.uint8), 5, 7) for i in range(3)]
    sums = context.SimpleQueue()
    process = context.Process(target=add, args=(masks, sums))
    process.start()
    process.join()
    assert process.exitcode == 0 and [sums.get() for _ in masks] == [0, 70, 140]
