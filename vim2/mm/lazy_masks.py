"""Masks of COCO annotations that are decoded once it is known which of them are needed, and handed on in shared memory.

An image may have hundreds of objects of which a crop keeps few, and decoding them all is then much of the work of
loading it. Decoded, those of a batch are tens of MB, and the process that trains would wait while it reads them from
those that load. Needs `mmdet`, which `vim2.mm` alone does not, hence a config imports this module itself:

    custom_imports = dict(imports=["vim2.mm", "vim2.mm.lazy_masks"], allow_failed_imports=False)
"""

import pickle
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.registry import TRANSFORMS
from mmdet.structures.mask import BitmapMasks

__all__ = ["LazyBitmapMasks", "LoadAnnotationsLazily"]


class LazyBitmapMasks(BitmapMasks):
    """MMDetection's `BitmapMasks` that have not been decoded yet.

    Choosing some of them decodes none, and `crop` decodes them one at a time; it returns plain `BitmapMasks`. Whatever
    else `BitmapMasks` can do decodes all of them first.

    Args:
        annotations: One for each object: polygons or runs, as `decode` takes them.
        height: The masks' height, in pixels.
        width: Their width, in pixels.
        decode: Makes of an annotation, the height and the width a mask: (height, width), uint8.
    """

    def __init__(self, annotations: Sequence[Any], height: int, width: int, decode: Callable[..., np.ndarray]) -> None:
        # not BitmapMasks.__init__, which sets `masks`
        self.annotations, self.height, self.width, self.decode = annotations, height, width, decode

    @cached_property
    def masks(self) -> np.ndarray:
        """All of them, decoded: (objects, height, width), uint8."""
        decoded = [self.decode(annotation, self.height, self.width) for annotation in self.annotations]
        return BitmapMasks(decoded, self.height, self.width).masks

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int | slice | np.ndarray) -> BitmapMasks:
        if "masks" in vars(self):  # decoded, and maybe changed since
            return super().__getitem__(index)
        chosen = np.arange(len(self))[index].reshape(-1)
        return LazyBitmapMasks([self.annotations[i] for i in chosen], self.height, self.width, self.decode)

    def crop(self, bbox: np.ndarray) -> BitmapMasks:
        """The masks within a box of x1, y1, x2, y2 in pixels, shape (4,), as `BitmapMasks.crop` cuts them out."""
        if "masks" in vars(self) or not len(self):
            return super().crop(bbox)
        return BitmapMasks.cat([BitmapMasks.crop(self[i : i + 1], bbox) for i in range(len(self))])


def _by_tensor(masks: BitmapMasks) -> tuple[Callable, tuple]:
    """How `BitmapMasks` go to another process: PyTorch puts tensors into shared memory, where pickle would send the
    pixels of arrays through a pipe, as is done where that cannot be."""
    # For a process that is only being started, nobody would keep the tensor alive until it reads it.
    if get_spawning_popen() is not None or not _has_room(masks.masks.nbytes):
        return masks.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    return _of_tensor, (torch.from_numpy(np.ascontiguousarray(masks.masks)), masks.height, masks.width)


def _has_room(size: int) -> bool:
    """Whether half of the shared memory stays free when so many bytes go there. A container may have no more than 64
    MB, and a loader that has no room for an image waits forever."""
    try:
        memory = shutil.disk_usage("/dev/shm")
    except OSError:  # as where it is no folder
        return True
    return memory.free - size >= memory.total / 2


def _of_tensor(masks: torch.Tensor, height: int, width: int) -> BitmapMasks:
    return BitmapMasks(masks.numpy(), height, width)


ForkingPickler.register(BitmapMasks, _by_tensor)  # between processes alone; files and copies are as ever


@TRANSFORMS.register_module()
class LoadAnnotationsLazily(LoadAnnotations):
    """MMDetection's `LoadAnnotations`, whose masks are decoded only where they are needed: a `RandomCrop` after it
    decodes those that it keeps, and samples are the same.

    It takes what `LoadAnnotations` takes and fills `results` as that does, but that `gt_masks` are `LazyBitmapMasks`.
    With `poly2mask=False` there is nothing to decode, and they are its `PolygonMasks`. An annotation that pycocotools
    cannot decode raises its error where the mask is first needed, and not here.
    """

    def _load_masks(self, results: dict) -> None:
        if not self.poly2mask:
            super()._load_masks(results)
            return
        annotations = self._process_masks(results)
        results["gt_masks"] = LazyBitmapMasks(annotations, *results["ori_shape"], self._poly2mask)
