"""Fingerprints of images: whether a run that goes on has those that it was started with, told without reading them."""

import hashlib
import os
from typing import Any

import numpy as np

from .data import Images
from .packs import PackReader

__all__ = ["fingerprint"]

SIZES = 1000  # files whose size is looked up: on a network's disk, a million would take minutes


def fingerprint(images: Images) -> dict[str, Any]:
    """What tells a list of images from others, wherever they lie.

    Returns:
        `images`, their number, and `digest`, text that depends on every image's class and, of class folders, on its
        name there and on the sizes of up to 1000 files, evenly spread; of packs, on its size. Of other data sets, it
        depends on the classes alone, where they are listed.
    """
    digest = hashlib.sha256()
    reader = getattr(images.dataset, "reader", None)
    if isinstance(reader, PackReader):
        for i in images.indices:
            (number, within), target = reader.samples[i]
            start, end = reader.packs[number].offsets[within : within + 2]
            digest.update(f"{end - start} {target}\n".encode())
    elif hasattr(reader, "samples"):
        sized = set(np.linspace(0, len(images) - 1, min(len(images), SIZES)).round().astype(int).tolist())
        for position, (i, target) in enumerate(zip(images.indices, images.targets())):
            path = images.filename(i)
            size = os.path.getsize(path) if position in sized and os.path.isfile(path) else ""
            name = images.dataset.filename(i, absolute=False)
            digest.update(f"{name} {size} {target}\n".encode("utf-8", "surrogateescape"))
    else:
        targets = getattr(images.dataset, "targets", None)
        for i in images.indices:
            digest.update(f"{i} {'' if targets is None else int(targets[i])}\n".encode())
    return {"images": len(images), "digest": digest.hexdigest()}
