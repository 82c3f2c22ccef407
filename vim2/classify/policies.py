"""timm's policies (AutoAugment, RandAugment, 3-Augment) on the device: operations of its own for each image of a batch.

timm makes a policy, and what it means is read from what timm made. Which image gets which operation, and how strong, is
drawn on the CPU for a whole epoch. So a batch can be sorted by operation, and each operation changes all of its images
and no others, without waiting for the device. Pixels are bytes, as numbers from 0 to 255, and come out as Pillow's
arithmetic has them, or nearly so where an image is rotated, sheared or moved; bicubic interpolation is PyTorch's.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, auto_augment, create_transform
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, AugMixAugment, AutoAugment, RandAugment
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2.functional import equalize

from ..command.errors import UserError
from ..command.processes import to_device

__all__ = ["INTERPOLATIONS", "Operations", "Policy", "draw_interpolation", "read_policy"]

# What is done at once, by the method of `Policy` of that name. A batch is sorted in this order: first come the images
# that stay as they are.
KINDS = ("none", "equalize", "autocontrast", "table", "color", "contrast", "brightness", "sharpness", "affine", "blur")
NUMBERS = 7  # that an operation takes: a share of the image as it was, and up to 6 of its own

# Operations that look each byte up in a table, and the numbers of their tables: one for each argument from 0 on.
TABLES = {"Invert": range(1), "Posterize": range(1, 10), "Solarize": range(10, 267), "SolarizeAdd": range(267, 396)}
MOVING = ("Rotate", "Shear", "Translate")  # how operations begin that move pixels
INTERPOLATIONS = ("random", "nearest", "bilinear", "bicubic")  # by which pixels are moved, in Pillow and here
BORDER = 3e-7  # to the right of a border lies what lies on it, as in Pillow
LUMINANCE = (19595, 38470, 7471)  # Pillow's weights of red, green and blue, of 65536


def posterize(image: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    """timm's, with its blackest level: policies with "inc1" go down to 0 bits, which newer Pillows refuse."""
    return auto_augment.posterize(image, bits_to_keep, **kwargs) if bits_to_keep > 0 else image.point(lambda _: 0)


NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), posterize))


def signed(span: float) -> Callable[..., Tensor]:
    return lambda level, uniform, _: level * span * torch.where(uniform > 0.5, -1, 1)


def translation(hparam: str, default: float) -> Callable[..., Tensor]:
    return lambda level, uniform, hparams: signed(hparams.get(hparam, default))(level, uniform, hparams)


def factor(level: Tensor, *_) -> Tensor:
    return level * 1.8 + 0.1


def increasing_factor(level: Tensor, uniform: Tensor, hparams: dict[str, Any]) -> Tensor:
    return (1 + signed(0.9)(level, uniform, hparams)).clamp(min=0.1)


# timm's LEVEL_TO_ARG of many images at once: an operation's argument by its level (of 1, where timm's is of 10), a
# number that is uniform from 0 to 1, and timm's hparams.
ARGUMENTS: dict[str, Callable[[Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "Rotate": signed(30.0),
    "Posterize": lambda level, *_: (level * 4).trunc(),
    "PosterizeIncreasing": lambda level, *_: 4 - (level * 4).trunc(),
    "PosterizeOriginal": lambda level, *_: 4 + (level * 4).trunc(),
    "Solarize": lambda level, *_: (level * 256).trunc().clamp(max=256),
    "SolarizeIncreasing": lambda level, *_: 256 - (level * 256).trunc().clamp(max=256),
    "SolarizeAdd": lambda level, *_: (level * 110).trunc().clamp(max=128),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), factor),
    **{f"{name}Increasing": increasing_factor for name in ("Color", "Contrast", "Brightness", "Sharpness")},
    **dict.fromkeys(("ShearX", "ShearY"), signed(0.3)),
    **dict.fromkeys(("TranslateX", "TranslateY"), translation("translate_const", 250)),
    **dict.fromkeys(("TranslateXRel", "TranslateYRel"), translation("translate_pct", 0.45)),
    "Desaturate": lambda level, *_: (0.5 + 0.5 * level).clamp(0.5, 1),
    "GaussianBlur": lambda level, *_: (0.1 + 1.9 * level).clamp(0.1, 2),
    "GaussianBlurRand": lambda level, *_: level.clamp(0, 1),
}


def draw_interpolation(name: str) -> str:
    """The mode of grid_sample: bilinear or bicubic if it is "random", drawn on the CPU."""
    return ("bilinear", "bicubic")[torch.randint(2, ()).item()] if name == "random" else name


class Operations(NamedTuple):
    """The operations on a batch of B images, layer by layer.

    Attributes:
        order: (layers, B) int64: the images, sorted by kind of operation.
        back: (layers, B) int64: where each image lies then.
        numbers: (layers, B, 7) float32: what `describe` says of each operation, sorted.
        counts: For each layer, how many images each of `KINDS` has.
    """

    order: Tensor
    back: Tensor
    numbers: Tensor
    counts: list[list[int]]


def read_policy(
    name: str,
    in_memory: bool,
    interpolation: str = "random",
    size: tuple[int, int] = (224, 224),
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
) -> tuple[AutoAugment | RandAugment | AugMixAugment, bool]:
    """What timm makes of a policy's name.

    Args:
        name: As timm spells it, such as "rand-m9-mstd0.5-inc1", "original" or "3a".
        in_memory: Whether the policy is for images that are held in memory.
        interpolation: As timm spells it, of rotating, shearing and translating.
        size: Height and width of the images, in pixels.
        mean: The mean of each channel, or one for all, of values from 0 to 1.

    Returns:
        The policy, and whether timm jitters colours besides.

    Raises:
        UserError: Not a policy of timm's, or one that would fail on an image, or that does not work from memory.
    """
    try:
        steps = create_transform(
            size, is_training=True, auto_augment=name, mean=mean, interpolation=interpolation, use_prefetcher=True
        ).transforms
    except (AssertionError, ValueError) as error:  # timm's ways to refuse a policy
        reason = f" ({error})" if str(error) else ""
        raise UserError(
            f"Cannot make the augmentation --aa {name}{reason}: use a policy of timm's, such as rand-m9-mstd0.5-inc1, "
            "original or 3a."
        ) from None
    policy = next(step for step in steps if isinstance(step, (AutoAugment, RandAugment, AugMixAugment)))
    if in_memory and isinstance(policy, AugMixAugment):
        raise UserError(
            f"--aa {name} does not work on images in memory: use a policy such as rand-m9-mstd0.5-inc1 or original, or "
            "train from class folders without --in-memory."
        )
    chains = policy.policy if isinstance(policy, AutoAugment) else [policy.ops]
    if interpolation not in INTERPOLATIONS and any(op.name.startswith(MOVING) for op in chain.from_iterable(chains)):
        raise UserError(
            f"--aa {name} does not work with --train-interpolation {interpolation}: use one of "
            f"{', '.join(INTERPOLATIONS)}."
        )
    weighted = isinstance(policy, RandAugment) and policy.choice_weights is not None
    if weighted and policy.num_layers > len(policy.ops):
        raise UserError(
            f"--aa {name} draws {policy.num_layers} of {len(policy.ops)} operations, each at most once: give n up to "
            f"{len(policy.ops)}."
        )
    return policy, any(isinstance(step, transforms.ColorJitter) for step in steps)


class Policy:
    """A policy of timm's, for images on the device.

    Args:
        name: As timm spells it, such as "rand-m9-mstd0.5-inc1", "original" or "3a".
        size: Height and width of the images, in pixels.
        mean: Of each channel, or one for all, of 1: the colour of what comes in from outside of an image.
        channels: 1 or 3.
        device: The images'.
        interpolation: Of rotating, shearing and translating: "nearest", "bilinear", "bicubic", or "random", which draws
            one of the last two for each batch and layer.

    Attributes:
        jitters_color: Whether timm jitters colours besides.

    Raises:
        UserError: As `read_policy`.
    """

    def __init__(
        self,
        name: str,
        size: tuple[int, int],
        mean: Sequence[float],
        channels: int,
        device: torch.device,
        interpolation: str = "random",
    ):
        policy, self.jitters_color = read_policy(name, True, interpolation, size, mean)
        self.weights = None
        if isinstance(policy, RandAugment):
            chains, self.draws = [[op] for op in policy.ops], policy.num_layers
            if policy.choice_weights is not None:
                self.weights = torch.from_numpy(policy.choice_weights)
        else:
            chains, self.draws = policy.policy, 1
        ops = list(chain.from_iterable(chains))
        # (chains, operations of each): numbers of what an image gets one after the other
        self.chains = torch.arange(len(ops)).view(len(chains), -1)
        self.hparams = ops[0].hparams  # which all have in common
        self.names = sorted({op.name for op in ops})
        self.op_names = torch.tensor([self.names.index(op.name) for op in ops])
        self.probability, self.magnitude, self.deviation, self.bound = torch.tensor(
            [[op.prob, op.magnitude, op.magnitude_std, op.magnitude_max or 10] for op in ops], dtype=torch.float64
        ).T
        self.size, self.device, self.interpolation = size, device, interpolation
        self.fill = torch.tensor(ops[0].kwargs["fillcolor"], dtype=torch.float32, device=device)
        self.fill = self.fill.expand(channels)[:, None, None]
        self.luminance = torch.tensor(LUMINANCE, device=device)[:, None, None] / 65536
        self.white = torch.full((1, 1, 1, 1), 255, dtype=torch.float64, device=device)
        self.tables = make_tables().to(device)
        # where the pixels lie, from -1 to 1
        rows, self.columns = ((torch.arange(n, device=device) * 2 + 1) / n - 1 for n in size)
        self.rows = rows[:, None]

    def draw(self, batches: int, batch_size: int) -> list[Operations]:
        """The operations of an epoch, from PyTorch's random state, on the device."""
        n = batches * batch_size
        if self.weights is None:
            drawn = torch.randint(len(self.chains), (n, self.draws))
        else:
            in_turn = torch.multinomial(self.weights.expand(n, -1), len(self.chains))  # each once, in random order
            drawn = in_turn[:, : self.draws]
        ops = self.chains[drawn].flatten(1)
        chance = partial(torch.rand, ops.shape, dtype=torch.float64)
        happens = chance() < self.probability[ops]
        magnitude, deviation = self.magnitude[ops], self.deviation[ops]
        noise = torch.where(  # an infinite deviation is timm's word for a magnitude that is uniform from 0 on
            deviation.isinf(), magnitude * (chance() - 1), deviation * torch.randn(ops.shape, dtype=torch.float64)
        )
        level = (magnitude + noise).clamp(min=0).minimum(self.bound[ops]) / 10
        uniform = chance()
        kinds, numbers = torch.zeros(ops.shape, dtype=torch.int64), torch.zeros(*ops.shape, NUMBERS)
        for number, name in enumerate(self.names):
            which = happens & (self.op_names[ops] == number)
            kind, values = describe(name, level[which], uniform[which], self.hparams, self.size)
            kinds[which] = KINDS.index(kind)
            numbers[which] = values.float()
        kinds, numbers = (t.unflatten(0, (batches, batch_size)).transpose(1, 2) for t in (kinds, numbers))
        order = kinds.contiguous().argsort(dim=-1, stable=True)
        counts = (kinds[..., None] == torch.arange(len(KINDS))).sum(2).tolist()
        tensors = (order, order.argsort(-1), numbers.take_along_dim(order[..., None], 2))
        return list(map(Operations, *(to_device(t, self.device).unbind() for t in tensors), counts))

    def __call__(self, images: Tensor, operations: Operations) -> Tensor:
        """Images after their operations.

        Args:
            images: (B, C, H, W) float32, whole numbers from 0 to 255.
            operations: This batch's.

        Returns:
            Likewise.
        """
        for order, back, numbers, counts in zip(*operations):
            images = images.index_select(0, order)
            groups = zip(KINDS[1:], images.split(counts)[1:], numbers.split(counts)[1:])
            made = [getattr(self, kind)(group, values) for kind, group, values in groups if len(group)]
            if made:
                made = torch.cat(made)
                # Pillow's enhancements lie on the line from what was made to the image as it was, for instance from
                # grey to colours; all else has a share of 0. Fractions are cut off.
                share = numbers[counts[0] :, :1, None, None]
                images[counts[0] :].sub_(made).mul_(share).add_(made).clamp_(0, 255).floor_()
            images = images.index_select(0, back)
        return images

    def equalize(self, images: Tensor, _: Tensor) -> Tensor:
        return equalize(images.byte()).float()

    def autocontrast(self, images: Tensor, _: Tensor) -> Tensor:
        low, high = (t[..., None, None] for t in images.flatten(2).aminmax(dim=-1))
        scale = self.white / (high - low)  # in double precision, since that decides what Pillow cuts off
        stretched = (images * scale).sub_(low * scale).floor_().float()
        return torch.where(high > low, stretched, images)

    def table(self, images: Tensor, numbers: Tensor) -> Tensor:
        return self.tables.take((images + numbers[:, 1:2, None, None]).long())

    def gray(self, images: Tensor) -> Tensor:
        """(B, 1, H, W)."""
        return images if images.shape[1] == 1 else (images * self.luminance).sum(1, keepdim=True).add_(0.5).floor_()

    def color(self, images: Tensor, _: Tensor) -> Tensor:
        return self.gray(images).expand_as(images)

    def contrast(self, images: Tensor, _: Tensor) -> Tensor:
        gray = self.gray(images)
        total, pixels = gray.sum((1, 2, 3), keepdim=True, dtype=torch.int64), gray[0].numel()
        mean = (2 * total + pixels) // (2 * pixels)  # in whole numbers, so that a half is rounded up on every device
        return mean.float().expand_as(images)

    def brightness(self, images: Tensor, _: Tensor) -> Tensor:
        return torch.zeros_like(images)

    def sharpness(self, images: Tensor, _: Tensor) -> Tensor:
        inner = images[..., 1:-1, 1:-1]
        images = images.clone()  # Pillow leaves the outermost pixels as they are
        smooth = F.avg_pool2d(images, 3, 1, divisor_override=1).add_(inner, alpha=4).div_(13)
        images[..., 1:-1, 1:-1] = smooth.round_()
        return images

    def affine(self, images: Tensor, numbers: Tensor) -> Tensor:
        xx, xy, x, yx, yy, y = numbers[:, 1:, None, None].unbind(1)
        x = torch.addcmul(torch.addcmul(x, xx, self.columns), xy, self.rows)
        y = torch.addcmul(torch.addcmul(y, yy, self.rows), yx, self.columns)
        grid = torch.stack((x, y), -1)
        mode = draw_interpolation(self.interpolation)
        moved = F.grid_sample(images, grid, mode, padding_mode="border", align_corners=False)
        moved.add_(5e-3)  # a whole number may have come out a little smaller
        inside = grid.abs().amax(-1) < 1
        return torch.where(inside[:, None], moved, self.fill)

    def blur(self, images: Tensor, numbers: Tensor) -> Tensor:
        """As Pillow: three box filters along rows and three along columns, each rounded."""
        maps = images.double().flatten(0, 1)[None]  # in double precision, sums are exact
        rows = numbers[:, None, 1:6].expand(-1, images.shape[1], -1).reshape(-1, 1, 1, 5).double()
        for taps, padding in ((rows, (2, 2, 0, 0)), (rows.mT, (0, 0, 2, 2))):
            for _ in range(3):
                maps = F.pad(maps, padding, "replicate")
                maps = F.conv2d(maps, taps, groups=len(taps)).add_(0.5).floor_()
        return maps.view_as(images).float()


def make_tables() -> Tensor:
    """What timm's operations make of each byte: (tables, 256) float32, those of `TABLES` one after the other."""
    ramp = Image.frombytes("L", (256, 1), bytes(range(256)))
    made = [
        NAME_TO_OP[name](ramp, *([argument] if LEVEL_TO_ARG[name] else []))
        for name, numbers in TABLES.items()
        for argument in range(len(numbers))
    ]
    return torch.tensor([list(image.tobytes()) for image in made], dtype=torch.float32)


def describe(
    name: str, level: Tensor, uniform: Tensor, hparams: dict[str, Any], size: tuple[int, int]
) -> tuple[str, Tensor]:
    """What a method of `Policy` is to do for an operation of timm's.

    Args:
        name: timm's, of the operation.
        level: (n,) float64, of 1.
        uniform: (n,) float64, from 0 to 1.
        hparams: timm's, of the policy.
        size: Height and width of the images, in pixels.

    Returns:
        The method, of `KINDS`, and (n, 7) float64: the share of the image as it was, and what the method takes.
    """
    argument = ARGUMENTS[name](level, uniform, hparams) if name in ARGUMENTS else torch.zeros_like(level)
    numbers = torch.zeros(len(level), NUMBERS, dtype=torch.float64)
    share, values = numbers[:, 0], numbers[:, 1:]
    base = name.removesuffix("Increasing").removesuffix("Original")
    if base in ("AutoContrast", "Equalize"):
        return base.lower(), numbers
    if base in TABLES:
        values[:, 0] = 256 * (TABLES[base].start + argument.clamp(0, len(TABLES[base]) - 1))
        return "table", numbers
    if base in ("Color", "Contrast", "Brightness", "Sharpness"):
        share[:] = argument
        return base.lower(), numbers
    if base == "Desaturate":
        share[:] = 1 - argument
        return "color", numbers
    if base.startswith("GaussianBlur"):
        radius = argument if base == "GaussianBlur" else 0.1 + (2 * argument - 0.1) * uniform
        values[:, :5] = box(radius)
        return "blur", numbers
    values[:] = affine_map(base, argument, *size)
    return "affine", numbers


def affine_map(name: str, argument: Tensor, height: int, width: int) -> Tensor:
    """Where pixels come from, from -1 to 1: (n, 6): x's factors of x and y and its offset, and y's."""
    one, zero = torch.ones_like(argument), torch.zeros_like(argument)
    sine, cosine = argument.deg2rad().sin(), argument.deg2rad().cos()
    across, along = argument * height / width, argument * width / height
    maps = {
        "Rotate": (cosine, -sine * height / width, zero, sine * width / height, cosine, zero),
        "ShearX": (one, across, across, zero, one, zero),
        "ShearY": (one, zero, zero, along, one, along),
        "TranslateX": (one, zero, 2 * argument / width, zero, one, zero),
        "TranslateY": (one, zero, zero, zero, one, 2 * argument / height),
        "TranslateXRel": (one, zero, 2 * argument, zero, one, zero),
        "TranslateYRel": (one, zero, zero, zero, one, 2 * argument),
    }
    return torch.stack(maps[name], -1) + torch.tensor([0, 0, BORDER, 0, 0, BORDER])


def box(radius: Tensor) -> Tensor:
    """The filter, of 5 pixels, that three times in succession is Pillow's Gaussian of a radius of at most 2: (n, 5).

    Pillow's precision decides how its sums are rounded: radii are single, and weights are whole numbers of 2**24.
    """
    radius = radius.float()
    variance = radius * radius / 3
    whole = (((12 * variance.double() + 1).sqrt().float() - 1) / 2).floor()
    side = whole + (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    whole, side = whole[:, None], side[:, None]
    middle = (2**24 / (2 * side + 1)).floor()
    border = ((2**24 - (2 * whole + 1) * middle) / 2).floor()
    distance = torch.arange(-2, 3).abs()
    return torch.where(distance <= whole, middle, border) * (distance <= whole + 1) / 2**24
