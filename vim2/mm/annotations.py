"""A look at a data set's annotations before a model is trained or tested on them: do they fit the config?"""

import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from PIL import Image
from torch import nn

from ..command.errors import UserError, first_line

__all__ = ["check_annotations", "lies_in"]

_IMAGES = 1000  # so many are looked at, with their boxes and masks, which the data set holds in memory anyway
_FILES = 24  # label maps that are read


def check_annotations(dataset: Any, model: nn.Module, name: str) -> None:
    """Compare a data set's annotations with the config, in a second or so: a large set by a sample of evenly spaced
    images.

    Args:
        dataset: One of MMDetection's or MMSegmentation's, or one that wraps such.
        model: The model that is to learn from it.
        name: What messages call the data set: "train_dataloader".

    Raises:
        UserError: Classes that are not the file's categories, in their order; heads for another number of classes;
            masks that are missing, or all empty, where they are loaded; label maps that are missing, in colour, of
            another size than their images, or with values that are no class; in training, maps of one class alone.
    """
    model = model.module if is_model_wrapper(model) else model
    for part in _parts(dataset):
        classes = (getattr(part, "metainfo", None) or {}).get("classes")
        steps = getattr(getattr(part, "pipeline", None), "transforms", [])
        loaders = [step for step in steps if type(step).__name__.startswith("Load") and hasattr(step, "with_seg")]
        if isinstance(classes, str):  # ("cat") is no tuple
            raise UserError(f"{name}: metainfo.classes is the text {classes!r}: write a tuple, ({classes!r},).")
        if not classes or not loaders:
            continue
        # data sets that load themselves in another way number their classes in another way
        if part.load_data_list.__qualname__ == "CocoDataset.load_data_list":
            _check_categories(part, classes, name)
        # what reads the classes' names needs no place for each, nor what proposes objects of whatever class
        if not getattr(part, "return_classes", False) and not _is_rpn(model):
            _check_heads(model, classes, name)
        if loaders[0].with_bbox:
            _check_objects(part, classes, getattr(loaders[0], "with_mask", False), name)
        if loaders[0].with_seg and hasattr(model, "decode_head"):
            _check_maps(part, loaders[0], model, name)


def lies_in(dataset: Any, folder: Path) -> bool:
    """Whether images or label maps of a data set, or files that these are links to, of some looked at, lie in a folder
    itself."""
    files = [
        part.get_data_info(i).get(name)
        for part in _parts(dataset)
        for i in (_sample(len(part), _FILES) if hasattr(part, "get_data_info") else ())
        for name in ("img_path", "seg_map_path")
    ]
    paths = [Path(file) for file in files if isinstance(file, str)]
    folders = {path.parent for path in paths} | {path.resolve().parent for path in paths}
    return any(place.is_dir() and folder.is_dir() and place.samefile(folder) for place in folders)


def _parts(dataset: Any) -> Iterator[Any]:
    """The data sets that hold annotations, within those that repeat, join or mix them."""
    inner = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    if inner[0] is None:
        yield dataset
    for part in inner if inner[0] is not None else ():
        yield from _parts(part)


def _sample(number: int, most: int) -> Sequence[int]:
    return np.linspace(0, number - 1, min(number, most)).astype(int).tolist() if number else []


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def _check_categories(part: Any, classes: Sequence[str], name: str) -> None:
    """A COCO file's categories give the labels their numbers in the file's order, whatever the config's is."""
    path = Path(str(getattr(part, "ann_file", "")))
    categories = _read_categories(path) if path.suffix == ".json" and path.is_file() else []
    names = {category["id"]: category["name"] for category in categories}
    found = [names[i] for i in part.cat_ids if i in names]
    if not names or found == list(classes):
        return
    others = [other for other in names.values() if other not in classes]
    for missing in (label for label in classes if label not in names.values()):
        alike = [other for other in others if _plain(other) == _plain(missing)]
        if alike:
            raise UserError(
                f"{name}: the class {missing!r} of the config is the category {alike[0]!r} in {path}: spell both "
                "alike, or its objects would not be learned."
            )
        raise UserError(
            f"{name}: {path} has no category for the class {missing!r} of the config; its categories are "
            f"{_list(names.values())}."
        )
    raise UserError(
        f"{name}: the config's classes must be in the order of the categories in {path}, which is {_list(found)}; they "
        f"are {_list(classes)}."
    )


def _plain(label: str) -> str:
    return "".join(character for character in str(label).casefold() if character.isalnum())


def _list(labels: Any) -> str:
    labels = list(map(str, labels))
    return ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")


def _read_categories(path: Path) -> list[dict]:
    """Those of a COCO file, without the rest of it, which may be half a gigabyte."""
    key = b'"categories"'
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        start = text.find(key)
        while start >= 0:
            end = start + len(key)
            rest = text[end : end + (1 << 22)].decode(errors="replace").lstrip(" \t\r\n:")
            try:
                value = json.JSONDecoder().raw_decode(rest)[0]
            except json.JSONDecodeError:
                value = None
            if isinstance(value, list) and all(isinstance(v, dict) and {"id", "name"} <= v.keys() for v in value):
                return value
            start = text.find(key, end)
    return []


def _is_rpn(model: nn.Module) -> bool:
    """Whether a model is MMDetection's RPN without a detector behind it, whose head is called bbox_head."""
    return any(base.__name__ == "RPN" for base in type(model).__mro__)


def _check_heads(model: nn.Module, classes: Sequence[str], name: str) -> None:
    """A head for fewer classes fails at the first label too many, one for more in the evaluation."""
    for path, module in model.named_modules():
        head = [part for part in path.split(".") if not part.isdigit()][-1:]
        number = getattr(module, "num_classes", None)
        if head and head[0] in ("bbox_head", "mask_head", "decode_head") and isinstance(number, int):
            binary = getattr(module, "out_channels", None) == 1  # one map for two classes, by num_classes 1 or 2
            if number != len(classes) and not binary and not getattr(module, "class_agnostic", False):
                raise UserError(
                    f"{name}: model.{path}.num_classes is {number}, and the data have {len(classes)} classes "
                    f"({_list(classes)}): set them alike."
                )


# ---------------------------------------------------------------------------------------------------------------------
# Objects and their masks


def _check_objects(part: Any, classes: Sequence[str], with_masks: bool, name: str) -> None:
    indices = _sample(len(part), _IMAGES)
    filled, labels = [], set()
    for index in indices:
        info = part.get_data_info(index)
        for instance in info.get("instances", []):
            labels.add(instance.get("bbox_label"))
            if with_masks and "mask" not in instance:
                raise UserError(
                    f"{name}: an object in {info.get('img_path', f'image {index}')} has a box and no mask "
                    "(segmentation), and the config loads masks: add it, take out the object, or take a config without "
                    "masks."
                )
            if with_masks:
                filled.append(_is_filled(instance["mask"]))
    if filled and not any(filled):
        raise UserError(
            f"{name}: the masks (segmentation) of all {len(filled)} objects in the {len(indices)} images looked at are "
            "empty, and the config loads masks: mend them, or take a config without masks."
        )
    absent = [label for i, label in enumerate(classes) if i not in labels]
    if absent and len(indices) == len(part):  # else they may be in the other images
        print_log(f"{name}: of {len(absent)} classes there is no object: {_list(absent)}.", "current", level=30)


def _is_filled(mask: Any) -> bool:
    if isinstance(mask, list):  # polygons of x1, y1, x2, y2, ...
        return any(len(polygon) % 2 == 0 and len(polygon) >= 6 and _area(polygon) > 0 for polygon in mask)
    if isinstance(mask, dict) and isinstance(mask.get("counts"), list):  # runs of background and object, in turn
        return sum(mask["counts"][1::2]) > 0
    if isinstance(mask, dict) and isinstance(mask.get("counts"), str | bytes):
        from pycocotools import mask as coco

        return bool(coco.area(mask) > 0)
    return False


def _area(polygon: list[float]) -> float:
    x, y = np.asarray(polygon, dtype=float).reshape(-1, 2).T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Label maps


def _check_maps(part: Any, loader: Any, model: nn.Module, name: str) -> None:
    head = model.decode_head[-1] if isinstance(model.decode_head, nn.ModuleList) else model.decode_head
    classes, ignored = max(head.num_classes, 2), getattr(head, "ignore_index", 255)
    indices = _sample(len(part), _FILES)
    seen = set()
    for index in indices:
        info = part.get_data_info(index)
        path = info.get("seg_map_path")
        try:
            labels = loader(info).get("gt_seg_map")
        except Exception as error:  # every decoder has its own ways to fail
            raise UserError(f"{name}: the label map {path} cannot be read: {first_line(error)}.") from error
        if labels is None:
            return
        if labels.ndim != 2:
            raise UserError(
                f"{name}: the label map {path} is in colour: label maps must have one channel, whose values are the "
                "numbers of the classes."
            )
        values = set(np.unique(labels).tolist())
        wrong = sorted(value for value in values if value >= classes and value != ignored) + _beyond_8_bits(path)
        if wrong:
            raise UserError(
                f"{name}: the label map {path} holds {wrong[0]}, and the model has the classes 0 to {classes - 1}; "
                f"what belongs to no class must be {ignored}."
            )
        _check_size(info.get("img_path"), path, labels.shape[::-1], name)
        seen |= values
    found = seen - {ignored}
    if name.startswith("train") and indices and len(found) < 2 and (ignored in seen or len(indices) == len(part)):
        alone = f"the class {found.pop()} alone" if found else "no class"
        beside = f", and {ignored}" if ignored in seen else ""
        raise UserError(
            f"{name}: the {len(indices)} label maps looked at hold {alone}{beside}: the model has the classes 0 to "
            f"{classes - 1}, and {ignored} is what belongs to none."
        )


def _beyond_8_bits(path: str) -> list[int]:
    """Values of a label map that MMSegmentation would cut to 8 bits, and take for others."""
    try:
        with Image.open(path) as image:
            wide = image.mode in ("F", "I") or image.mode.startswith("I;")
            return [int(value) for value in image.getextrema() if not 0 <= value <= 255] if wide else []
    except (OSError, SyntaxError, ValueError):  # a format that other decoders read
        return []


def _check_size(image_path: str | None, path: str, size: tuple[int, int], name: str) -> None:
    if image_path is None or not Path(image_path).is_file():
        return
    try:
        with Image.open(image_path) as image:
            other = image.size
    except (OSError, SyntaxError, ValueError):  # a format that other decoders read, perhaps
        return
    if sorted(other) != sorted(size):  # a photo may be stored turned, its map upright
        raise UserError(
            f"{name}: the label map {path} has {size[0]} x {size[1]} pixels, and its image {image_path} "
            f"{other[0]} x {other[1]}: they must be of one size."
        )
