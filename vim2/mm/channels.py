"""Do a config's neck and heads take the maps that its backbone gives?"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..command.errors import UserError
from .backbone import ViM2

__all__ = ["check_channels"]

_HEADS = ("decode_head", "auxiliary_head", "panoptic_head")  # which take a backbone's maps where there is no neck


def check_channels(config: Mapping[str, Any], model: nn.Module) -> None:
    """Compare what a model's neck and heads take with what its backbone gives, which a convolution would complain about
    at the first image, without a name.

    Args:
        config: The model's, of which what does not tell its `in_channels` is left out.
        model: Built of it; nothing is compared unless its backbone is a ViM2.

    Raises:
        UserError: They take maps of other channels, or more maps.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, ViM2):
        return
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
