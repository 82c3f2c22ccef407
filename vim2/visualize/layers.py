"""The layers of a ViM2, by the names that a user gives, and how each weighs those before it."""

from collections.abc import Sequence
from dataclasses import dataclass

from timm.layers import Mlp
from torch import Tensor, nn

from ..command.errors import UserError, did_you_mean
from ..command.images import first_names
from ..mixers import S6, MixerLayer, SelectiveChannelMixer, SelectiveTokenMixer
from ..vim2 import ViM2

__all__ = [
    "LEGIBLE",
    "StageWeights",
    "averaging_weights",
    "check_token",
    "choose_layer",
    "legible_layer",
    "map_sizes",
    "mixers_of",
    "stage_of",
]

LEGIBLE = 8  # tokens a side of a map on which a layer's attention shows something

KINDS = {SelectiveTokenMixer: "a token mixer", SelectiveChannelMixer: "an S6 channel mixer", Mlp: "an MLP"}
OPTIONS = {SelectiveTokenMixer: "--layer", SelectiveChannelMixer: "--channel-layer"}


def mixers_of(model: ViM2, kind: type[nn.Module]) -> dict[str, nn.Module]:
    """The mixers of a class, by the names of their layers (such as stages.0.blocks.0.layers.1), from first to last; but
    for those with a scan of a user's own, of which nothing is known."""
    return {
        name: layer.mixer
        for name, layer in model.named_modules()
        if isinstance(layer, MixerLayer)
        and isinstance(layer.mixer, kind)
        and type(getattr(layer.mixer, "s6", None)) in (S6, type(None))
    }


def choose_layer(model: ViM2, name: str, kind: type[nn.Module]) -> nn.Module:
    """The mixer of a layer.

    Args:
        model: Has the layer.
        name: The layer's name, as `mixers_of` gives it.
        kind: SelectiveTokenMixer or SelectiveChannelMixer.

    Raises:
        UserError: There is no such layer, or its mixer is of another class.
    """
    known = mixers_of(model, kind)
    if name in known:
        return known[name]
    wanted = KINDS[kind].partition(" ")[2]
    others = f"the {wanted}s are {first_names(list(known), 12)}" if known else f"the model has no {wanted}s"
    everything = mixers_of(model, nn.Module)
    if name not in everything:
        raise UserError(f"There is no {OPTIONS[kind]} {name}{did_you_mean(name, known)}; {others}.")
    found = type(everything[name])
    advice = f", for {OPTIONS[found]}" if found in OPTIONS else ""
    raise UserError(f"{OPTIONS[kind]} {name} is {KINDS[found]}{advice}, not {KINDS[kind]}; {others}.")


def legible_layer(model: ViM2, sizes: Sequence[tuple[int, int]]) -> str:
    """The last layer with a token mixer whose map has `LEGIBLE` tokens a side or more; of small images, of whose maps
    none has, the first stage's last.

    Args:
        model: Has the layer.
        sizes: The sizes of the stages' maps, see `map_sizes`.
    """
    names = list(mixers_of(model, SelectiveTokenMixer))
    large = [name for name in names if min(sizes[stage_of(name)]) >= LEGIBLE]
    return (large or [name for name in names if stage_of(name) == 0])[-1]


def stage_of(name: str) -> int:
    """The stage of a layer's name, from 0 on."""
    return int(name.split(".")[1])


def map_sizes(model: ViM2, height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of every stage's map, in tokens, for images of this many pixels."""
    size = model.patch_embed.dynamic_feat_size((height, width))
    sizes = [size]
    for _ in range(len(model.stages) - 1):
        size = tuple(-(-side // 2) for side in size)
        sizes.append(size)
    return sizes


def check_token(token: tuple[int, int], size: tuple[int, int], name: str) -> None:
    """Raise a UserError unless a layer's map of this height and width has a token at this row and column."""
    if any(at >= side for at, side in zip(token, size)):
        raise UserError(
            f"--token {token[0]} {token[1]} lies outside the map of {name}, which has rows 0 to {size[0] - 1} and "
            f"columns 0 to {size[1] - 1}: choose another token, a layer of an earlier stage, or a larger --img-size."
        )


@dataclass(frozen=True)
class StageWeights:
    """The learned averaging weights of a stage (arXiv 2403.19888, section 3.3).

    Attributes:
        features: Names of the features that are read: the stage's input, and what each mixer puts out.
        readers: Names of what reads them: each mixer, and the stage's output.
        rows: For each reader its weights, (number of features before it,), in the order of `features`.
    """

    features: list[str]
    readers: list[str]
    rows: list[Tensor]


def averaging_weights(model: ViM2) -> list[StageWeights]:
    """The averaging weights of every stage, float32 on the CPU."""
    stages = []
    for stage in model.stages:
        layers = [layer for block in stage.blocks for layer in block.layers]
        counts = {"token": 0, "channel": 0}
        names = []
        for layer in layers:
            kind = "token" if isinstance(layer.mixer, SelectiveTokenMixer) else "channel"
            counts[kind] += 1
            names.append(f"{kind} {counts[kind]}")
        rows = [
            module.weight.detach().float().cpu() for module in (*(layer.average for layer in layers), stage.average)
        ]
        stages.append(StageWeights(["input", *names], [*names, "output"], rows))
    return stages
