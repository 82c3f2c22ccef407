"""The models of tools/arena.py: how an entry names one, and how all are made to see small images alike.

Models for 224² images put 32 pixels into one position of their last map, or 16, as ViT does. At 64² two by two
positions would be left of the image, so every model's stem is given half its stride, by one rule:

1. where the constructor takes `patch_size` and half of it halves the whole model's stride, that;
2. else the first strided convolution gets half its stride, and if its kernel is no larger than that, half the kernel.
   (In ConvNeXt, half the `patch_size` leaves the stride as it is: timm then adds a downsampling to the first stage.)

Whatever the rule gives is measured, and refused if it isn't half of the ordinary stride. Models with fixed windows or
positions are told the image's size, and windows become the nearest to the ordinary that divide the maps.
"""

import hashlib
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.models import register_model
from torch import nn

from vim2.benchmark.models import parse_model
from vim2.classify.models import check_reads
from vim2.classify.sources import find_model
from vim2.command.errors import UserError, first_line
from vim2.command.places import FOLDER, is_place, local_folder, short_name

__all__ = ["Entry", "adapt", "anywhere", "create", "dynamic", "half_stem", "last_map", "parse_entry", "takes"]

PROBE = 256  # pixels: strides are measured at a size that all of them divide


@dataclass(frozen=True)
class Entry:
    """A model of the arena.

    Attributes:
        label: Its name in tables and pictures.
        model: timm's name, `local-dir:FOLDER` or `hf-hub:USER/NAME`.
        kwargs: Arguments of its constructor.
    """

    label: str
    model: str
    kwargs: dict[str, Any]

    def having(self, **kwargs) -> "Entry":
        """This entry with further arguments."""
        return replace(self, kwargs={**self.kwargs, **kwargs})


def parse_entry(text: str) -> Entry:
    """NAME or LABEL=NAME:key=value,key=value as an entry; values are Python literals, or else text. Without a LABEL,
    that is the name, of a folder without where it lies.

    Raises:
        UserError: Text of another form, or a label that cannot be a folder's name.
    """
    label, separator, rest = text.partition("=") if "=" in text.partition(":")[0] else ("", "", text)
    name, kwargs = parse_model(rest)
    if not separator:
        label = short_name(name).replace("/", "-") if is_place(name) and not kwargs else text
    if not name or not re.fullmatch(r"\w[\w.+ -]*", label):
        raise UserError(
            f"Cannot read the model {text!r}: give NAME or LABEL=NAME:key=value,key=value, where a label is made of "
            "letters, digits, spaces, and . + - _ after the first."
        )
    return Entry(label, name, kwargs)


def anywhere(text: str) -> str:
    """The text of an entry with a folder's absolute path, which means the same in every working directory."""
    name = parse_entry(text).model
    folder = local_folder(name)
    return text.replace(name, FOLDER + os.path.abspath(folder), 1) if folder else text


def create(entry: Entry, **kwargs) -> nn.Module:
    """The entry's model, on the meta device: shapes without values.

    Raises:
        UserError: As `find_model`; an argument that it does not take.
    """
    colour = {"in_chans": 3} if "in_chans" in find_model(entry.model).model_kwargs else {}
    try:
        return on_meta(entry.model, **{**colour, **entry.kwargs}, **kwargs)
    except Exception as error:  # every family has its own ways to refuse an argument
        raise UserError(
            f"{entry.label}: {entry.model} cannot be made with {entry.kwargs}: {first_line(error)}"
        ) from None


def on_meta(name: str, **kwargs) -> nn.Module:
    try:
        with torch.device("meta"):
            return timm.create_model(name, **kwargs)
    except RuntimeError:  # a constructor that reads values, such as rates of stochastic depth, which there are none of
        return timm.create_model(name, **kwargs).to("meta")


def takes(entry: Entry, **more) -> bool:
    """Whether the entry's model can be made with these further arguments."""
    try:
        on_meta(entry.model, **entry.kwargs, **more)
    except Exception:
        return False
    return True


def last_map(model: nn.Module, size: int) -> int:
    """The side of the last map, in positions, of a model on the meta device that is given an image of `size` pixels."""
    image = torch.empty(1, 3, size, size, device="meta")
    with torch.no_grad():
        return model.eval().forward_intermediates(image, indices=1, intermediates_only=True)[-1].shape[-1]


def adapt(entry: Entry, size: int, halve: bool = True) -> Entry:
    """The entry as it is trained at an image size, by the rule above.

    An argument that the entry gives itself stays, so that one with a `patch_size` keeps that stem.

    Args:
        entry: As it was parsed.
        size: Height and width of the images, in pixels.
        halve: Whether to halve the stem's stride.

    Returns:
        The entry with its model's name, which may be one of `half_stem`, and all arguments but those of training.

    Raises:
        UserError: As `create`; a stem that cannot be halved; a model that cannot read images of this size.
    """
    create(entry)
    adapted = with_half_stem(entry) if halve and "patch_size" not in entry.kwargs else entry
    if "img_size" not in entry.kwargs and takes(adapted, img_size=size):
        if "window_size" not in entry.kwargs:
            adapted = with_dividing_window(adapted, size)
        adapted = adapted.having(img_size=size)
    model = create(adapted)
    called = f"{entry.label}: {entry.model}"
    check_reads(model, (3, size, size), called=called, classes=getattr(model, "num_classes", None))
    return adapted


def with_half_stem(entry: Entry) -> Entry:
    """The entry with half the stride, by the first of the rules that does it."""
    probe = {"img_size": PROBE} if takes(entry, img_size=PROBE) else {}
    model = create(entry, **probe)
    try:
        wanted = 2 * last_map(model, PROBE)
    except Exception as error:  # a user's own need not have what it takes
        raise UserError(
            f"{entry.label}: the stride of {entry.model} cannot be measured ({first_line(error)}): give it timm's "
            "forward_intermediates, or train all with --stem-stride keep."
        ) from None
    stem = first_strided(create(entry))
    candidates = (
        [entry.having(patch_size=stem.stride[0] // 2), replace(entry, model=half_stem(entry.model))] if stem else []
    )
    for candidate in candidates:
        try:
            if last_map(create(candidate, **probe), PROBE) == wanted:
                return candidate
        except Exception:  # families refuse arguments and maps in ways of their own
            continue
    raise UserError(
        f"{entry.label}: the stem of {entry.model} cannot be given half its stride; leave {entry.model} out, or train "
        "all with --stem-stride keep."
    )


def first_strided(model: nn.Module) -> nn.Conv2d | None:
    return next((m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1), None)


def half_stem(name: str) -> str:
    """Register a model whose first strided convolution has half the stride with timm; returns its name.

    Such models are known where this was called. They get names of their own, since their weights would fit the
    ordinary model without a word, and give other results there.
    """
    derived = name.replace(".", "_")
    if is_place(name):
        derived = re.sub(r"\W", "_", short_name(name)) + "_" + hashlib.sha256(name.encode()).hexdigest()[:8]
    derived += "_half_stem"
    if timm.is_model(derived):
        return derived

    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
        conv = first_strided(model)
        stride = conv.stride
        conv.stride = tuple(max(s // 2, 1) for s in stride)
        if conv.kernel_size == stride:  # patches: those of half the side, with initial weights of the same deviation
            conv.kernel_size = conv.stride
            height, width = conv.stride
            conv.weight = nn.Parameter(conv.weight.detach()[..., :height, :width].clone())
        return model

    entrypoint.__name__ = derived
    register_model(entrypoint)
    return derived


def with_dividing_window(entry: Entry, size: int) -> Entry:
    """For models with windows: the nearest to the ordinary that divides all maps larger than itself."""
    model = create(entry, img_size=PROBE)  # in small maps, windows shrink to the map
    ordinary = next((m.window_size for m in model.modules() if hasattr(m, "window_size")), None)
    ordinary = ordinary[0] if isinstance(ordinary, tuple) else ordinary
    if not isinstance(ordinary, int) or not hasattr(model, "feature_info"):
        return entry
    sides = [size // info["reduction"] for info in model.feature_info]
    windows = [w for w in range(2, max(sides) + 1) if all(side % w == 0 for side in sides if side > w)]
    if not windows:
        return entry
    window = min(windows, key=lambda w: (abs(w - ordinary), -w))
    return entry.having(window_size=window) if takes(entry, img_size=size, window_size=window) else entry


def dynamic(entry: Entry) -> Entry:
    """An adapted entry so that it reads images of other sizes, where its model has an argument for that.

    Families, and releases of timm, have different ones, and some take one without a word and do not heed it.
    """
    for argument in (dict(dynamic_img_size=True), dict(strict_img_size=False)):
        if takes(entry, **argument) and reads(candidate := entry.having(**argument), PROBE, 3 * PROBE // 2):
            return candidate
    return entry


def reads(entry: Entry, *sizes: int) -> bool:
    """Whether the entry's model reads images of all these sizes."""
    model = create(entry).eval()
    try:
        with torch.no_grad():
            for size in sizes:
                model(torch.empty(1, 3, size, size, device="meta"))
    except Exception:  # families refuse images in ways of their own
        return False
    return True
