"""Images that are decoded once and held on the device as bytes.

Images to validate on are resized and cropped by timm's own transform, so that accuracies are those from files. Images
to train on are held as they are if all have one size, of at most twice the size that the model is trained at; others
are resized (their shorter side) and cropped in the middle to a square that is 8/7 of it. What training sees is cut out
of these on the device.
"""

import math
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from ..command.errors import UserError
from ..command.processes import Processes, free_memory, share, to_device
from ..command.progress import progress_bar, say
from .augmentation import Augmentation, Normalize, check_augmentation
from .data import Images
from .policies import Policy

__all__ = ["HeldImages", "eval_loader", "hold", "preload", "train_loader"]

BLOCK = 4 * 2**20  # bytes of images that are copied at once
MARGIN = 8 / 7  # images of many sizes are held so much larger than they are trained at, as 256 is than 224
LARGEST = 2  # images of one size are resized only if they are more than this many times the side to train at


@dataclass(frozen=True)
class HeldImages:
    """The readable images of a data set.

    Attributes:
        images: (n, C, H, W) uint8, on the device.
        targets: (n,) int64, on the device: their classes.
    """

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.images)


def preload() -> None:
    """Where a server starts the processes of loaders, as on Linux since Python 3.14, have it load once what each of
    them, in every epoch, would load anew, which takes seconds."""
    # asking for the method that goes without saying would fix it for the rest of the program
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if method == "forkserver":
        multiprocessing.set_forkserver_preload([__name__])


class _Decoded(Dataset):
    """Images as bytes, and their classes; None in place of those that cannot be read."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor, int] | None:
        sample = self.images.load(self.images.indices[position])
        return sample and (self.transform(sample[0]), sample[1])


def _stack(samples: list[tuple[Tensor, int] | None]) -> tuple[Tensor | np.ndarray | None, list[int]]:
    """The images that could be read, None if they differ in shape or there are none; and their classes.

    A tensor goes from a loader's process through /dev/shm, of which containers often have no more than 64 MiB. Where
    that is full it is an array instead, which goes through a pipe: not always, since a process that fills a pipe does
    not end where the one that reads from it is killed.
    """
    images, targets = [sample[0] for sample in samples if sample], [sample[1] for sample in samples if sample]
    if len({image.shape for image in images}) != 1:
        return None, targets
    stacked = torch.stack(images)
    try:
        share([stacked], "use fewer --workers")
    except UserError:
        return stacked.numpy(), targets
    return stacked, targets


def hold(
    images: Images,
    transform: Callable[[Image.Image], Tensor],
    shape: tuple[int, int, int],
    processes: Processes,
    workers: int,
    description: str = "decode",
) -> HeldImages | None:
    """Decode images and hold them on this process's device. Those that cannot be read are noted in `images`.

    Args:
        images: What to decode.
        transform: From a decoded image to (C, H, W) uint8.
        shape: C, H and W.
        processes: Each holds all images.
        workers: Processes that decode; 0: this one.
        description: What the progress bar says.

    Returns:
        The images; None if one of them came out in another shape.

    Raises:
        UserError: The device has too little memory; not one image can be read.
    """
    n, device = len(images), processes.device
    needed, free = n * math.prod(shape), free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"{n:,} images of {' x '.join(map(str, shape))} bytes need {needed / 1e9:.1f} GB, and {device} has "
            f"{free / 1e9:.1f} GB free: choose a smaller --img-size, or train from class folders without --in-memory.",
            one_process=True,
        )
    held = torch.empty((n, *shape), dtype=torch.uint8, device=device)
    targets: list[int] = []

    batch_size = max(BLOCK // math.prod(shape), 1)
    blocks = math.ceil(n / batch_size)
    loader = DataLoader(
        _Decoded(images, transform),
        batch_size,
        # processes, since threads wait for one another wherever Python itself is at work; not for a single block
        num_workers=min(workers, blocks) if blocks > 1 else 0,
        collate_fn=_stack,
        generator=torch.Generator(),  # else the loader would draw a seed from the state that training draws from
    )
    for decoded, classes in progress_bar(loader, description, processes, has_kernels=False):
        if classes:
            if decoded is None or decoded.shape[1:] != shape:
                return None
            held[len(targets) : len(targets) + len(classes)] = torch.as_tensor(decoded)
            targets += classes
    if not targets:
        raise UserError(
            f"Not one of the {n} images can be read, {images.filename(images.indices[0])} first: check the data."
        )
    return HeldImages(held[: len(targets)], torch.tensor(targets, dtype=torch.int64).to(device))


def hold_to_train(images: Images, side: int, processes: Processes, workers: int) -> HeldImages:
    """Hold images to cut random crops from; says how large they are held.

    Args:
        images: What to decode.
        side: Height and width to train at.
        processes: Each holds all images.
        workers: Processes that decode; 0: this one.
    """
    channels = len(images.mode)  # "RGB" or "L"
    first = next((sample for i in images.indices if (sample := images.load(i))), None)
    held = None
    if first is not None and min(first[0].size) <= LARGEST * side:
        width, height = first[0].size
        held = hold(images, pil_to_tensor, (channels, height, width), processes, workers)
    how = "as they are"
    if held is None:
        square = math.ceil(MARGIN * side)
        resize = transforms.Compose(
            [
                transforms.Resize(square, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(square),
                transforms.PILToTensor(),
            ]
        )
        held = hold(images, resize, (channels, square, square), processes, workers)
        how = f"resized and cropped, for crops of {side} x {side}"
    _, _, height, width = held.images.shape
    say(
        f"{len(held):,} images to train on in memory, {height} x {width} pixels {how}: "
        f"{held.images.nbytes / 1e9:.2f} GB on {processes.device}",
        processes,
    )
    return held


class TrainLoader:
    """Random batches of this process's share of the images in an epoch.

    Iterating draws the epoch's order and augmentation from PyTorch's random state.

    Args:
        held: The images.
        augment: Cuts and changes them, or None.
        normalize: What becomes of them without augmentation.
        batch_size: Images a batch and process; a last, smaller batch is dropped.
        processes: The processes that train.
    """

    def __init__(
        self,
        held: HeldImages,
        augment: Augmentation | None,
        normalize: Normalize,
        batch_size: int,
        processes: Processes,
    ):
        self.held, self.augment, self.normalize, self.batch_size = held, augment, normalize, batch_size
        self.device = processes.device
        if processes.world_size > 1:
            self.sampler = DistributedSampler(range(len(held)), processes.world_size, processes.rank)
        else:
            self.sampler = RandomSampler(range(len(held)))

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self) * self.batch_size
        order = to_device(torch.tensor(list(self.sampler)[:n]), self.device)
        drawn = self.augment.draw_epoch(len(self), self.batch_size) if self.augment else None
        for batch in order.split(self.batch_size):
            images = self.held.images.index_select(0, batch)
            images = self.augment(images, *next(drawn)) if self.augment else self.normalize(images)
            yield images, self.held.targets.index_select(0, batch)


class EvalLoader:
    """This process's share of the images, in order: no image is in two shares, none is left out.

    Args:
        held: The images.
        normalize: Turns them into what the model takes.
        batch_size: Images a batch; the last may be smaller.
        processes: The processes that share them.
    """

    def __init__(self, held: HeldImages, normalize: Normalize, batch_size: int, processes: Processes):
        self.images = held.images[processes.rank :: processes.world_size]
        self.targets = held.targets[processes.rank :: processes.world_size]
        self.normalize, self.batch_size = normalize, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in zip(self.images.split(self.batch_size), self.targets.split(self.batch_size)):
            yield self.normalize(images), targets


def train_loader(
    images: Images,
    data_config: dict[str, Any],
    batch_size: int,
    workers: int,
    processes: Processes,
    no_aug: bool = False,
    auto_augment: str | None = None,
    **augmentation,
) -> TrainLoader:
    """As `data.train_loader`, from memory: (batch, C, H, W) images, normalised, on the device, and their classes.

    Args:
        images: The images to train on, which are decoded here.
        data_config: From `timm.data.resolve_data_config`.
        batch_size: Images a step and process; a last, smaller batch is dropped.
        workers: Processes that decode.
        processes: The processes that train.
        no_aug: Resize and crop in the middle, by timm's transform, and nothing else.
        auto_augment: A policy of timm's, as `policies.Policy` takes it.
        augmentation: Further arguments of `Augmentation`.

    Raises:
        UserError: What does not work from memory, images that do not fit into it, too few readable images.
    """
    channels, *size = data_config["input_size"]
    normalize = Normalize(data_config["mean"], data_config["std"], channels, processes.device)
    if no_aug:
        transform = create_transform(
            tuple(data_config["input_size"]),
            is_training=True,
            no_aug=True,
            interpolation=augmentation["interpolation"],
            use_prefetcher=True,
        )
        held, augment = hold(images, transform, (channels, *size), processes, workers), None
    else:
        interpolation = augmentation.get("interpolation", "random")
        check_augmentation(interpolation)  # before minutes of decoding
        policy = None
        if auto_augment:
            policy = Policy(auto_augment, tuple(size), data_config["mean"], channels, processes.device, interpolation)
        held = hold_to_train(images, max(size), processes, workers)
        source = tuple(held.images.shape[2:])
        augment = Augmentation(
            source, tuple(size), normalize, channels, processes.device, policy=policy, **augmentation
        )
    if len(held) < batch_size * processes.world_size:
        raise UserError(f"Only {len(held)} images can be read, too few for batches of {batch_size}: check the data.")
    return TrainLoader(held, augment, normalize, batch_size, processes)


def eval_loader(
    images: Images, data_config: dict[str, Any], batch_size: int, workers: int, processes: Processes
) -> EvalLoader:
    """As `data.eval_loader`, from memory, with the same values; unreadable images are left out.

    Raises:
        UserError: Images that do not fit into memory; not one that can be read.
    """
    channels, *size = data_config["input_size"]
    transform = create_transform(
        tuple(data_config["input_size"]),
        is_training=False,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        use_prefetcher=True,
    )
    held = hold(images, transform, (channels, *size), processes, workers)
    normalize = Normalize(data_config["mean"], data_config["std"], channels, processes.device)
    return EvalLoader(held, normalize, batch_size, processes)
