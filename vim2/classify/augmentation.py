"""Augmentation on the device: each image of a batch by numbers of its own, in few kernels, without waiting for any.

The numbers of a whole epoch are drawn on the CPU, from PyTorch's random state, and copied to the device at once. Names
and meanings are those of timm's transforms. kornia's own modules for a crop, a flip, colours and erasing call some 500
operators for a batch, and wait for the device to learn which colours change; so only its generator of crops and its
functions of colours are used here.
"""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from ..command.errors import UserError
from ..command.processes import to_device
from .policies import INTERPOLATIONS, Operations, Policy, draw_interpolation

__all__ = ["Augmentation", "Normalize", "check_augmentation"]

ERASED_AREA = (0.02, 1 / 3)  # timm's, of the image
ERASED_ASPECT = (0.3, 1 / 0.3)
ATTEMPTS = 10  # to find a rectangle that fits into the image


def per_channel(values: Sequence[float], channels: int, device: torch.device) -> Tensor:
    """(1, C, 1, 1), from C values or one for all channels, times 255."""
    return torch.tensor([255 * v for v in values], device=device).expand(channels)[:, None, None]


class Normalize:
    """From bytes to what a model takes, in the same arithmetic as timm's loader.

    Args:
        mean: The mean of each channel, or one for all, of values from 0 to 1.
        std: Standard deviation, likewise.
        channels: C.
        device: The images'.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels: int, device: torch.device):
        self.mean = per_channel(mean, channels, device)
        self.std = per_channel(std, channels, device)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> (B, C, H, W) float32, normalised."""
        return images.float().sub_(self.mean).div_(self.std)


def check_augmentation(interpolation: str) -> None:
    """What can be said of an `Augmentation` before any image is decoded.

    Raises:
        UserError: kornia is not installed; an interpolation that there is not on a device.
    """
    if importlib.util.find_spec("kornia") is None:
        raise UserError('Augmenting images in memory needs kornia: pip install "vim2[classify]".')
    if interpolation not in INTERPOLATIONS:
        raise UserError(
            f"--train-interpolation {interpolation} does not work on images in memory: use one of "
            f"{', '.join(INTERPOLATIONS)}."
        )


class Augmentation:
    """Random resized crops, flips, a policy, colours and erasing, different for each image.

    Args:
        source: Height and width of the images that are held, in pixels.
        size: Height and width of those that are made.
        normalize: The model's normalisation.
        channels: 1 or 3.
        device: The images'.
        scale: Least and largest area of a crop, of the image's.
        ratio: Least and largest ratio of its width to its height.
        hflip: Probability of mirroring.
        vflip: Probability of turning upside down.
        color_jitter: Brightness, contrast and saturation are multiplied by factors up to this far from 1, in an order
            that is drawn for each batch.
        interpolation: "nearest", "bilinear", "bicubic", or "random", which draws one of the last two for each batch.
        policy: What comes after flips, and in place of `color_jitter` unless it is a policy that timm jitters besides.
        re_prob: Probability of random erasing, after normalising.
        re_mode: What it leaves: "const" (zeros), "rand" (a random colour for each rectangle), "pixel" (noise).
        re_count: Up to this many rectangles in an image.

    Raises:
        UserError: As `check_augmentation`.
    """

    def __init__(
        self,
        source: tuple[int, int],
        size: tuple[int, int],
        normalize: Normalize,
        channels: int,
        device: torch.device,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float = 0.4,
        interpolation: str = "random",
        policy: Policy | None = None,
        re_prob: float = 0.0,
        re_mode: str = "const",
        re_count: int = 1,
    ):
        check_augmentation(interpolation)
        from kornia import enhance
        from kornia.augmentation.random_generator import ResizedCropGenerator

        self.source, self.size, self.channels = source, size, channels
        self.mean, self.std = normalize.mean / 255, normalize.std / 255
        self.crops = ResizedCropGenerator(size, scale, ratio)
        self.flips = (hflip, vflip)
        self.policy = policy
        self.color_jitter = color_jitter if policy is None or policy.jitters_color else 0.0
        self.colours = (
            enhance.adjust_brightness_accumulative,
            enhance.adjust_contrast_with_mean_subtraction,
            enhance.adjust_saturation_with_gray_subtraction,
        )
        self.interpolation = interpolation
        self.re_prob, self.re_mode, self.re_count = re_prob, re_mode, re_count
        # where the pixels of the result lie, from -1 to 1 over the crop
        self.rows, self.columns = ((torch.arange(n, device=device) * 2 + 1) / n - 1 for n in size)
        self.row_numbers = torch.arange(size[0], device=device)
        self.column_numbers = torch.arange(size[1], device=device)

    def draw(self, n: int) -> Tensor:
        """The numbers for n images: (n, k) float32 on the CPU."""
        height, width = self.source
        corners = self.crops(torch.Size((n, self.channels, height, width)))["src"]  # (n, 4, 2): x, y, clockwise
        columns = []
        for axis, length, corner, flip in ((0, width, 1, self.flips[0]), (1, height, 3, self.flips[1])):
            start, end = corners[:, 0, axis], corners[:, corner, axis] + 1
            mirrored = 1 - 2 * (torch.rand(n) < flip).float()
            columns += [mirrored * (end - start) / length, (start + end) / length - 1]
        columns = [torch.stack(columns, 1)]
        if self.color_jitter > 0:
            low = max(1 - self.color_jitter, 0.0)
            columns.append(torch.empty(n, 3).uniform_(low, 1 + self.color_jitter))
        if self.re_prob > 0:
            columns.append(draw_rectangles(n, *self.size, self.re_prob, self.re_count).flatten(1))
        return torch.cat(columns, 1)

    def draw_epoch(self, batches: int, batch_size: int) -> Iterator[tuple[Tensor, Operations | None]]:
        """What `__call__` takes besides the images, batch by batch, on their device."""
        numbers = to_device(self.draw(batches * batch_size), self.rows.device).split(batch_size)
        operations = self.policy.draw(batches, batch_size) if self.policy else repeat(None)
        return zip(numbers, operations)

    def __call__(self, images: Tensor, numbers: Tensor, operations: Operations | None = None) -> Tensor:
        """Augment a batch.

        Args:
            images: (B, C, H, W) uint8.
            numbers: (B, k), of `draw`, on the images' device.
            operations: The policy's, if there is one.

        Returns:
            (B, C, height, width) float32, normalised.
        """
        mode = draw_interpolation(self.interpolation)
        x_scale, x_shift, y_scale, y_shift = numbers[:, :4, None].unbind(1)
        x = torch.addcmul(x_shift, x_scale, self.columns)
        y = torch.addcmul(y_shift, y_scale, self.rows)
        grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), -1)
        images = F.grid_sample(images / 255, grid, mode, padding_mode="border", align_corners=False)
        if mode == "bicubic":
            images.clamp_(0, 1)  # it overshoots at edges
        if operations is not None:
            images = self.policy(images.mul_(255).round_(), operations).div_(255)
        if self.color_jitter > 0:
            for i in torch.randperm(3).tolist():
                images = self.colours[i](images, numbers[:, 4 + i])
        images = images.sub_(self.mean).div_(self.std)
        return self.erase(images, numbers[:, -4 * self.re_count :]) if self.re_prob > 0 else images

    def erase(self, images: Tensor, rectangles: Tensor) -> Tensor:
        """Images with something else in their rectangles, (B, 4 * re_count): top, bottom, left, right of each."""
        batch, channels, _, _ = images.shape
        noise = torch.zeros((), device=images.device)
        if self.re_mode == "pixel":
            noise = torch.randn_like(images)
        for rectangle in rectangles.split(4, 1):
            top, bottom, left, right = rectangle[:, :, None].unbind(1)
            rows = (self.row_numbers >= top) & (self.row_numbers < bottom)
            columns = (self.column_numbers >= left) & (self.column_numbers < right)
            if self.re_mode == "rand":
                noise = torch.randn(batch, channels, 1, 1, device=images.device)
            images = torch.where((rows[:, :, None] & columns[:, None])[:, None], noise, images)
        return images


def draw_rectangles(n: int, height: int, width: int, probability: float, count: int) -> Tensor:
    """What timm's random erasing would erase in n images, each on its own.

    Returns:
        (n, count, 4): top, bottom, left and right of rectangles, without those two borders; all 0 where there is none.
    """
    number = torch.randint(1, count + 1, (n, 1, 1))
    area = torch.empty(n, count, ATTEMPTS).uniform_(*ERASED_AREA) * (height * width) / number
    aspect = torch.empty(n, count, ATTEMPTS).uniform_(*map(math.log, ERASED_ASPECT)).exp()
    heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (heights < height) & (widths < width)
    first = fits.int().argmax(-1, keepdim=True)
    heights, widths, fits = (t.gather(-1, first)[..., 0] for t in (heights, widths, fits))
    erased = (torch.rand(n, 1) < probability) & (torch.arange(count) < number[..., 0]) & fits
    top = (torch.rand(n, count) * (height - heights + 1)).floor()
    left = (torch.rand(n, count) * (width - widths + 1)).floor()
    return torch.stack((top, top + heights, left, left + widths), -1) * erased[..., None]
