"""Datasets and loaders: timm's, with what timm leaves to luck put right.

Unreadable images are named and counted instead of silently replaced, validation sees every image exactly once however
many processes there are, and a folder of images that nobody has split yet is split the same way every time.
"""

import math
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_loader
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..command.errors import UserError
from ..command.images import UnreadableImage, first_names, read_image, to_8_bits, upright
from ..command.processes import Processes, share
from ..command.progress import say
from .folders import SPLITS, ClassFolderReader, find_split, is_tar, open_class_folders, read_class_map
from .packs import PackReader, is_pack, open_packs
from .policies import read_policy

__all__ = ["Images", "eval_loader", "open_split", "open_train_and_val", "say_left_out", "train_loader"]

MAX_UNREADABLE = 100  # neighbours tried in place of an unreadable training image
# what data sets that decode by themselves raise for an image that cannot be read
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class Images(Dataset):
    """The images of one of timm's or torchvision's datasets, or some of them.

    In training an unreadable image is replaced by the next readable one; in validation it gets the target -1, to be
    left out. Both note it in `unreadable`, which the loader's workers share with the process that reads it.

    Args:
        dataset: What `timm.data.create_dataset` returned, without a transform.
        mode: Pillow mode to convert to, "RGB" or "L".
        indices: The images to use; all if None.
    """

    def __init__(self, dataset: Dataset, mode: str = "RGB", indices: Sequence[int] | None = None):
        self.dataset = dataset
        self.mode = mode
        self.indices = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
        self.training = False
        self.transform = None  # create_loader sets it
        self.unreadable = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()
        self.reported = torch.zeros_like(self.unreadable)

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, indices: Sequence[int]) -> "Images":
        """These of the images, by their position here."""
        return Images(self.dataset, self.mode, self.indices[indices])

    def filename(self, index: int) -> str:
        """What to call image `index` of the dataset in a message."""
        try:
            return str(self.dataset.filename(index, absolute=True))
        except (AttributeError, NotImplementedError):
            return f"image {index}"

    @property
    def is_packed(self) -> bool:
        """Whether the images come from packs, which are always held in memory."""
        return isinstance(getattr(self.dataset, "reader", None), PackReader)

    def targets(self) -> list[int]:
        """The classes of the images of a class folder or pack."""
        return [self.dataset.reader.samples[i][1] for i in self.indices]

    def load(self, index: int) -> tuple[Image.Image, int] | None:
        """Image `index` of the dataset and its class, or None if it cannot be read.

        Raises:
            UserError: Its pixels are of a kind that says nothing of their range.
        """
        try:
            if hasattr(self.dataset, "reader"):
                file, target = self.dataset.reader[index][:2]
                with file:
                    image = read_image(file)
            else:
                image, target = self.dataset[index]
                image.load()
                upright(image)
        except (UnreadableImage, *UNREADABLE):
            self.unreadable[index] = 1
            return None
        try:
            return to_8_bits(image, self.mode), int(target)
        except ValueError as error:
            raise UserError(f"{self.filename(index)} {error}", one_process=True) from None

    def __getitem__(self, position: int) -> tuple[Any, int]:
        sample = self.load(self.indices[position])
        if sample is None and self.training:
            for step in range(1, min(MAX_UNREADABLE, len(self))):
                sample = self.load(self.indices[(position + step) % len(self)])
                if sample is not None:
                    break
            else:
                name = self.filename(self.indices[position])
                raise UserError(f"{name} and those after it cannot be read: check the data.", one_process=True)
        image, target = sample or (Image.new(self.mode, (64, 64)), -1)
        return self.transform(image), target

    def report_unreadable(self, processes: Processes) -> tuple[int, list[str]]:
        """How many images proved unreadable so far, in all processes, and the names of those not reported before."""
        flags = processes.maximum(self.unreadable)
        new = (flags > self.reported).nonzero().flatten().tolist()
        self.reported = flags
        return int(flags.sum()), [self.filename(i) for i in new]


def open_split(
    name: str,
    root: str | os.PathLike | None,
    split: str,
    class_map: str | dict[str, int] | None = None,
    mode: str = "RGB",
    download: bool = False,
) -> Images:
    """One split of a dataset.

    Args:
        name: timm's name of a dataset; "" for class folders, a tar of them, or packs.
        root: Its folder. For class folders: the folder that holds `split`, or else, for a split to train or to validate
            on, the class folders themselves. A pack with both splits, or the folder of packs.
        split: Name of the split. Of a folder of packs: a pack's name, or a glob for several.
        class_map: Class names and their indices, or a file with a class name a line.
        mode: Pillow mode of the images.
        download: Let torchvision download it.

    Raises:
        UserError: No such data or split, no images, or a data set that can only be streamed.
    """
    if name.startswith(("tfds/", "wds/", "hfids/")):
        raise UserError(
            f"{name} can only be streamed, and then neither exact resuming nor counting every image once in validation "
            "is possible: use class folders, torch/... or hfds/... instead."
        )
    if name.lower() in ("torch/folder", "torch/image_folder") or (name and "/" not in name):
        raise UserError(f"There is no --dataset {name}: leave it out for class folders, or name torch/... or hfds/...")
    _check_split(name, split)
    if class_map is not None:
        class_map = read_class_map(class_map)
    if not name and (is_pack(root) or is_pack(split)):
        number = next((number for number, group in enumerate(SPLITS) if split in group), None)
        return Images(ImageDataset(root, reader=open_packs(root, split, number, class_map)), mode)
    if not name:
        if not root:
            raise UserError("Say where the images are: --data-dir FOLDER, with a folder of images for each class.")
        if not Path(root).exists():
            raise UserError(f"There is no {root}: give --data-dir the folder, tar or pack that holds your images.")
        found = find_split(root, split)
        if found is None and not any(split in group for group in SPLITS):  # those are what is asked for by default
            raise UserError(
                f"There is no {split} in {root}: name a split that is there, or leave the option out if there are none."
            )
        reader = open_class_folders(found or root, class_map)
        return Images(ImageDataset(root, reader=reader), mode)
    try:
        dataset = create_dataset(
            name,
            root=None if root is None else str(root),
            split=split,
            search_split=False,
            class_map=class_map,
            download=download,
            input_img_mode=mode,
        )
    except Exception as error:
        raise UserError(f"Cannot open the data set {name}: {str(error) or type(error).__name__}") from None
    if isinstance(dataset, IterableDataset):
        raise UserError(f"{name} can only be streamed: use class folders, torch/... or hfds/... instead.")
    if len(dataset) == 0:
        raise UserError(f"The data set {name} has no images in its split {split}.")
    return Images(dataset, mode)


def _check_split(name: str, split: str) -> None:
    if not name and not split:  # as a folder's name it would stand for the data's own
        raise UserError("The name of a split is empty: name one, such as train, or leave the option out.")


def class_names(images: Images) -> list[str] | None:
    """The data set's class names by index, or None if it has none."""
    source = getattr(images.dataset, "reader", images.dataset)
    class_to_idx = getattr(source, "class_to_idx", None)
    if not class_to_idx:
        return None
    names = {index: name for name, index in class_to_idx.items()}
    return [names.get(i, str(i)) for i in range(max(names) + 1)]


def say_left_out(processes: Processes, *opened: Images) -> None:
    """Say what was left out of class folders, a line for each folder or archive that was read."""
    readers = dict.fromkeys(getattr(images.dataset, "reader", None) for images in opened)
    for reader in readers:
        if isinstance(reader, ClassFolderReader) and reader.left_out:
            say(reader.left_out, processes)


def hold_out(images: Images, share: float) -> tuple[Images, Images]:
    """Split class folders into a part to train on and one to validate on, the same for the same files.

    Args:
        images: All images.
        share: Share of each class to validate on; at least one image, and at least one stays.

    Raises:
        UserError: A class with a single image.
    """
    try:
        targets = np.array(images.targets())
    except AttributeError:
        raise UserError("Only of class folders and packs can a part be set aside: name a --val-split.") from None
    random = np.random.default_rng(0)
    validation = np.zeros(len(images), dtype=bool)
    for target in np.unique(targets):
        members = np.flatnonzero(targets == target)
        if len(members) < 2:
            raise UserError(
                f"{images.filename(images.indices[members[0]])} is the only image of its class, and cannot be both "
                "trained and validated on: add images to that class."
            )
        number = min(max(round(share * len(members)), 1), len(members) - 1)
        validation[random.choice(members, number, replace=False)] = True
    return images.subset(np.flatnonzero(~validation)), images.subset(np.flatnonzero(validation))


def open_train_and_val(
    name: str,
    root: str | os.PathLike | None,
    train_split: str = "train",
    val_split: str = "validation",
    holdout: float = 0.2,
    class_map: str | None = None,
    mode: str = "RGB",
    download: bool = False,
) -> tuple[Images, Images, list[str] | None, bool]:
    """Both splits of a dataset, as `open_split`.

    Class folders without splits are split by `hold_out`. So are, with an empty `val_split`, those to train on.

    Returns:
        Images to train on, images to validate on, class names, and whether the split is ours.

    Raises:
        UserError: As `open_split` and `hold_out`; one split alone; fewer than two classes; splits of other classes.
    """
    options = dict(class_map=class_map, mode=mode, download=download)
    _check_split(name, train_split)
    unsplit = _is_unsplit(name, root, train_split, val_split)
    train = open_split(name, root, train_split, **options)
    names = class_names(train)
    if names is not None and len(names) < 2:
        raise UserError(
            f"The images to train on are all of one class, {names[0]}: put them into a folder for each of two classes "
            "or more."
        )
    if not val_split or (unsplit and not (train.is_packed and train.dataset.reader.has_splits)):
        return *hold_out(train, holdout), names, True
    val = open_split(name, root, val_split, **options)
    if names is not None and class_map is None and names != (class_names(val) or names):
        only = [sorted(set(a) - set(b)) for a, b in ((names, class_names(val)), (class_names(val), names))]
        which = "; ".join(f"only in {s}: {first_names(o)}" for s, o in zip((train_split, val_split), only) if o)
        which = which or "they come in another order"
        raise UserError(
            f"The classes to train and to validate on differ ({which}): make the folders' names agree, "
            "or list the classes to use in a file and give it as --class-map."
        )
    return train, val, names, False


def _is_unsplit(name: str, root: str | os.PathLike | None, train_split: str, val_split: str) -> bool:
    """Whether the data of `open_train_and_val` come without a split of their own, or with one that is not to be used.

    Raises:
        UserError: Splits of which one is there and the other is not, or is of another kind; names of splits that are
            not there.
    """
    if not name and val_split and is_pack(train_split) != is_pack(val_split):
        raise UserError(
            f"--train-split {train_split} --val-split {val_split} name a pack for one split only: name one for each, "
            "or give --data-dir a pack to have a part of it set aside."
        )
    may_have_splits = not name and bool(root) and (is_tar(root) or Path(root).is_dir())
    if not may_have_splits or not val_split or is_pack(train_split):
        return not name and bool(root) and not is_pack(train_split)
    found = {split: find_split(root, split) for split in (train_split, val_split)}
    unsplit = not any(found.values())
    if unsplit and (train_split, val_split) != ("train", "validation"):
        raise UserError(f"{root} has neither a folder {train_split} nor {val_split}: check --train-split, --val-split.")
    if not unsplit and not all(found.values()):
        here, missing = (train_split, val_split) if found[train_split] else (val_split, train_split)
        where, unpacked = str(found[here]), ", unpacked," if is_tar(root) else ""
        raise UserError(
            f"{root} has a folder {posixpath.basename(where)}, but none for {missing}: add it beside, name it with "
            f"--train-split or --val-split, or give --data-dir {where}{unpacked} to have a part of it set aside."
        )
    return unsplit


def _collate(samples: list[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    """timm's batch of images and classes, which a loader's process shares.

    Raises:
        UserError: Shared memory is full.
    """
    images, targets = fast_collate(samples)
    share([images, targets], "use fewer --workers, 0 for none, or a smaller --batch-size")
    return images, targets


def common_options(
    images: Images, data_config: dict[str, Any], batch_size: int, workers: int, device: torch.device
) -> dict[str, Any]:
    return dict(
        dataset=images,
        batch_size=batch_size,
        input_size=data_config["input_size"],
        mean=data_config["mean"],
        std=data_config["std"],
        num_workers=min(workers, math.ceil(len(images) / batch_size)),  # each reads whole batches: others would idle
        collate_fn=_collate,
        device=device,
        pin_memory=device.type == "cuda",
        # workers live for one epoch, so that their random state is that of the epoch's start
        persistent_workers=False,
    )


def train_loader(
    images: Images,
    data_config: dict[str, Any],
    batch_size: int,
    workers: int,
    processes: Processes,
    no_aug: bool = False,
    auto_augment: str | None = None,
    interpolation: str = "random",
    **augmentation,
):
    """timm's training loader: (batch, C, H, W) images, normalised, on the device, and their (batch,) classes.

    Args:
        images: The images to train on.
        data_config: From `timm.data.resolve_data_config`.
        batch_size: Images a step and process; a last, smaller batch is dropped.
        workers: Processes that read.
        processes: The processes that train.
        no_aug: Resize and crop in the middle, and nothing else.
        auto_augment: A policy, as timm spells it.
        interpolation: How crops and the policy interpolate, as timm spells it.
        augmentation: Further arguments of `timm.data.create_loader`.

    Raises:
        UserError: A policy that does not work.
    """
    if auto_augment and not no_aug:
        read_policy(auto_augment, False, interpolation)  # else a process that reads would find what is wrong
    images.training = True
    return create_loader(
        **common_options(images, data_config, batch_size, workers, processes.device),
        is_training=True,
        distributed=processes.world_size > 1,
        no_aug=no_aug,
        auto_augment=auto_augment,
        interpolation=interpolation,
        **augmentation,
    )


def eval_loader(images: Images, data_config: dict[str, Any], batch_size: int, workers: int, processes: Processes):
    """timm's loader for validation, over this process's share of the images: no image is in two, none is left out."""
    share = images.subset(np.arange(processes.rank, len(images), processes.world_size))
    share.unreadable = images.unreadable  # reported through the whole
    return create_loader(
        **common_options(share, data_config, batch_size, workers, processes.device),
        is_training=False,
        interpolation=data_config["interpolation"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
    )


def count_classes(images: Images) -> int | None:
    """Number of classes of a data set without class names, from its targets; None if it tells neither."""
    targets = getattr(images.dataset, "targets", None)
    return None if targets is None else int(max(targets)) + 1
