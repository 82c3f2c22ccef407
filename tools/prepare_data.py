#!/usr/bin/env python
"""Bring small data sets into the layout that the configs in mmdet_configs/ and mmseg_configs/ expect.

    python tools/prepare_data.py nuclei DOWNLOADS     # nuclei664.tar, nuclei664.instances.json.xz -> data/nuclei
    python tools/prepare_data.py coco549 DOWNLOADS    # coco549.tar -> data/coco549, boxes, masks and semantic maps
    python tools/prepare_data.py camvid DOWNLOADS     # camvid701.tar -> data/camvid
    python tools/prepare_data.py imagenette1000.npz DOWNLOADS  # imagenette128.npz -> data/imagenette1000.npz, a part

DOWNLOADS is the folder that holds the files. A folder in data/ is there whole or not at all.
"""

from common.command import run_tool

import argparse
import json
import lzma
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from vim2.classify.packs import read_pack
from vim2.command.errors import UserError
from vim2.command.images import read_image

IGNORED = 255  # the label of pixels that count neither in training nor in evaluation
CAMVID_VOID = 11

# COCO's category ids in the order of their labels: the 80 things, then the 53 kinds of stuff of its panoptic task
COCO_THINGS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
COCO_STUFF = [92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151]
COCO_STUFF += [154, 155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, *range(184, 201)]


def nuclei(source: Path, target: Path) -> str:
    """2018 Data Science Bowl: every fifth image, by id, is for validation."""
    unpack(source / "nuclei664.tar", target)
    path = existing(source / "nuclei664.instances.json.xz")
    try:
        with lzma.open(path) as file:
            instances = json.load(file)
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); copy or download it again.") from None
    counts = []
    for split in ("train", "val"):
        images = [image for image in instances["images"] if (image["id"] % 5 == 0) == (split == "val")]
        ids = {image["id"] for image in images}
        annotations = [a for a in instances["annotations"] if a["image_id"] in ids]
        path = target / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=instances["categories"])))
        counts.append(f"{len(images)} images with {len(annotations)} nuclei for {split}")
    return ", ".join(counts)


def coco549(source: Path, target: Path) -> str:
    """Part of COCO 2017, and semantic maps of some of its images, whose category ids become labels."""
    unpack(source / "coco549.tar", target)
    labels = label_table({category: label for label, category in enumerate(COCO_THINGS + COCO_STUFF)})
    counts = []
    for split in ("train", "val"):
        with open(target / "annotations" / f"instances_{split}2017.json") as file:
            counts.append(f"{len(json.load(file)['images'])} images for {split}")
        maps = sorted((target / "semantic130" / f"{split}2017").glob("*.png"))
        for path in maps:
            relabel(path, target / "semantic" / f"{split}2017" / path.name, labels)
        (target / "semantic" / f"{split}.txt").write_text("".join(f"{path.stem}\n" for path in maps))
        counts.append(f"{len(maps)} with semantic maps")
    shutil.rmtree(target / "semantic130")
    return ", ".join(counts)


def camvid(source: Path, target: Path) -> str:
    """CamVid with 11 classes; void pixels are ignored."""
    unpack(source / "camvid701.tar", target)
    labels = label_table({label: label for label in range(CAMVID_VOID)})
    counts = []
    for split in ("train", "val", "test"):
        maps = sorted((target / f"{split}annot").glob("*.png"))
        for path in maps:
            relabel(path, path, labels)
        counts.append(f"{len(maps)} images for {split}")
    return ", ".join(counts)


def imagenette1000(source: Path, target: Path) -> str:
    """The first 100 images of each class of a pack to learn from, and the first 50 of those to validate on."""
    pack = read_pack(source / "imagenette128.npz")
    if pack.split is None:
        raise UserError(f"{pack.path} has no split: it is another pack than imagenette128.npz.")
    kinds = [(split, count, label) for split, count in ((0, 100), (1, 50)) for label in range(len(pack.names))]
    chosen = [np.flatnonzero((pack.split == split) & (pack.labels == label))[:count] for split, count, label in kinds]
    indices = np.sort(np.concatenate(chosen))
    images = [pack.data[pack.offsets[i] : pack.offsets[i + 1]] for i in indices]
    offsets = np.cumsum([0, *map(len, images)])
    arrays = dict(labels=pack.labels[indices], split=pack.split[indices], names=np.array(pack.names))
    with open(target, "wb") as file:
        np.savez(file, data=np.concatenate(images), offsets=offsets, **arrays)
    learn, validate = np.bincount(arrays["split"], minlength=2)
    return f"{learn} images for train, {validate} for val"


def existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is missing.")
    return path


def unpack(archive: Path, target: Path) -> None:
    """Extract an archive, of which nothing may end up outside the target."""
    try:
        with tarfile.open(existing(archive)) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(target, filter="data")
            else:  # a Python before 3.10.12 or 3.11.4
                for member in tar:
                    check_member(member)
                    tar.extract(member, target, set_attrs=False)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}); copy or download it again.") from None


def check_member(member: tarfile.TarInfo) -> None:
    """Raises a TarError for what the data sets do not have: paths that lead out of the archive, links and devices."""
    path = PurePath(member.name)
    if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
        raise tarfile.TarError(f"{member.name!r} is no file or folder within it")


def label_table(labels: dict[int, int]) -> np.ndarray:
    """(256,) uint8: the label of every value in a map, IGNORED where there is none."""
    table = np.full(256, IGNORED, np.uint8)
    table[list(labels)] = list(labels.values())
    return table


def relabel(source: Path, target: Path, table: np.ndarray) -> None:
    """Replace the labels in a map by those of a table. Labels beyond the table, as 16 bits may hold, are IGNORED.

    Raises:
        UserError: A file that cannot be read, or a picture in colours.
    """
    values = np.asarray(read_image(source))
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise UserError(f"{source} is no map of labels, which has one whole number a pixel: download the data again.")
    known = (values >= 0) & (values < len(table))
    labels = np.where(known, table[np.where(known, values, 0).astype(np.uint8)], np.uint8(IGNORED))
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(target)


DATA_SETS: dict[str, Callable[[Path, Path], str]] = {
    "nuclei": nuclei,
    "coco549": coco549,
    "camvid": camvid,
    "imagenette1000.npz": imagenette1000,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Bring small data sets into the layout that the configs expect.")
    parser.add_argument("name", choices=DATA_SETS)
    parser.add_argument("source", type=Path, metavar="DOWNLOADS", help="the folder with the data set's files")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default data/<name>")
    args = parser.parse_args(argv)
    output = args.output or Path("data", args.name)
    if output.exists():
        raise UserError(f"{output} is already there; remove it to make it anew.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{args.name}.", dir=output.parent) as folder:
            counts = DATA_SETS[args.name](args.source, Path(folder) / args.name)
            (Path(folder) / args.name).rename(output)
    except UserError:
        raise
    except OSError as error:
        raise UserError(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:  # of annotations
        raise UserError(
            f"{args.source} holds other files than {args.name}'s, or damaged ones ({error!r}); download them again."
        ) from error
    print(f"{output}: {counts}.")


if __name__ == "__main__":
    sys.exit(run_tool(main))
