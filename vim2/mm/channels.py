"""Does a config's backbone take the images, and do its neck and heads take the maps that it gives?"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..command.errors import UserError
from .backbone import ViM2

__all__ = ["check_channels"]

_HEADS = ("decode_head", "auxiliary_head", "panoptic_head")  # which take a backbone's maps where there is no neck


def check_channels(config: Mapping[str, Any], model: nn.Module) -> None:
    """Compare what a model's neck and heads take with what its backbone gives, and that with the images, which would be
    complained about at the first of them, without a name.

    Args:
        config: The model's, of which what does not tell its `in_channels` is left out.
        model: Built of it; nothing is compared unless its backbone is a ViM2.

    Raises:
        UserError: They take maps of other channels, or more maps; the data_preprocessor is for images of other channels
            than the backbone.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, ViM2):
        return
    _check_images(getattr(model, "data_preprocessor", None), backbone)
    gives = backbone.out_channels
    for name in ("neck",) if config.get("neck") else _HEADS:
        parts = config.get(name) or ()
        for part in [parts] if isinstance(parts, Mapping) else list(parts)[: 1 if name == "neck" else None]:
            wants = part.get("in_channels")
            wants = tuple(wants) if isinstance(wants, Sequence) else wants
            if wants is None or _fits(wants, part.get("in_index"), gives, name == "neck"):
                continue
            index = f" (in_index {part['in_index']})" if part.get("in_index") is not None else ""
            raise UserError(
                f"model.{name}.in_channels is {wants}{index}, and model.backbone gives maps of {gives} channels: set "
                "them alike, or other out_indices of the backbone."
            )


def _check_images(preprocessor: Any, backbone: ViM2) -> None:
    """Colours are turned round and normalised before the backbone, of three channels in all configs that others are
    made from."""
    if backbone.in_chans == 3:
        return
    values = getattr(preprocessor, "mean", None)
    if values is not None and len(values) == 3:
        problem, remedy = "has a mean of 3 values", "give mean and std one value for all, such as [128.0] and [60.0]"
    elif getattr(preprocessor, "_channel_conversion", False):
        problem, remedy = "changes the order of three colours", "set bgr_to_rgb=False and rgb_to_bgr=False"
    else:
        return
    raise UserError(f"model.data_preprocessor {problem}, and model.backbone.in_chans is {backbone.in_chans}: {remedy}.")


def _fits(wants: int | tuple[int, ...], index: Any, gives: tuple[int, ...], is_neck: bool) -> bool:
    """Whether maps of `gives` channels, of which `index` names some, have those that are wanted."""
    if is_neck:  # YOLOv3's reads the last map first
        return wants in (gives, gives[::-1]) if isinstance(wants, tuple) else wants in gives
    if isinstance(wants, tuple) and index is None:
        return wants == gives
    indices = list(index) if isinstance(index, Sequence) else [-1 if index is None else index]
    if any(not -len(gives) <= i < len(gives) for i in indices):
        return False
    chosen = tuple(gives[i] for i in indices)
    return chosen == wants if isinstance(wants, tuple) else chosen == (wants,)
