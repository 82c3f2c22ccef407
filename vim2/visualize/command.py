"""The command `vim2 visualize`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor, nn

from ..classify.models import check_reads, create_model, input_config, load_checkpoint_model
from ..classify.options import CheckpointOptions, InputOptions, Pixels
from ..classify.prediction import find_images
from ..classify.validation import label_names
from ..command.errors import UserError
from ..command.figures import figure
from ..command.images import read_pixels
from ..command.options import REQUIRED, Count, DeviceOptions, Positive, length, option, resolve
from ..command.outputs import explain_disk_errors, make_folder
from ..command.processes import Processes, choose_device
from ..command.progress import progress_bar, say
from ..mixers import SelectiveChannelMixer, SelectiveTokenMixer
from ..vim2 import ViM2
from .attention import channel_attention, scan_inputs, token_attention, tokens_seen
from .layers import (
    LEGIBLE,
    averaging_weights,
    check_token,
    choose_layer,
    legible_layer,
    map_sizes,
    mixers_of,
    stage_of,
)
from .plots import (
    plot_averaging_weights,
    plot_channel_mixing,
    plot_grad_cam,
    plot_receptive_field,
    plot_token_attention,
)
from .saliency import NoGradCam, grad_cam, load_grad_cam, receptive_field

__all__ = ["VisualizeOptions", "visualize"]


@dataclass(frozen=True, kw_only=True)
class VisualizeOptions(CheckpointOptions, InputOptions, DeviceOptions):
    """Draw what a ViM2 has learned, and what it does with images."""

    program = "vim2 visualize"
    images: list[str] = option(REQUIRED, "image, folder, or glob in quotation marks", metavar="IMAGE", positional=True)
    output: str = option("visualizations", "folder for the pictures", metavar="DIR")
    stage: Positive | None = option(
        None, "stage of the receptive field and of Grad-CAM, from 1 on; default: the last", metavar="N"
    )
    layer: str | None = option(
        None,
        "layer with the token mixer to look into, such as stages.1.blocks.0.layers.1; default: the last one whose map "
        f"has {LEGIBLE} x {LEGIBLE} tokens or more",
        metavar="NAME",
    )
    channel_layer: str | None = option(
        None, "layer with the S6 channel mixer; default: the last of the same stage", metavar="NAME"
    )
    token: Annotated[list[Count], length(2)] | None = option(
        None, "the token to look at, on the maps of both layers, from 0 on; default: the centre", metavar=("ROW", "COL")
    )
    img_size: Pixels | None = option(None, "default: the checkpoint's", metavar="PIXELS")
    class_map: str | None = option(
        None, "text file with a class name a line; default: the checkpoint's", metavar="FILE"
    )


def visualize(argv: Sequence[str] | None = None, /, **options) -> list[Path]:
    """Draw what a ViM2 has learned and what it does with images, as `vim2 visualize` does.

    Of the model: its averaging weights and its effective receptive field. Of each image: what a token attends to, how
    its channels are mixed, and Grad-CAM.

    Args:
        argv: Command line; or else
        options: the same options by name: `visualize(images=["cat.jpg"], checkpoint="best.pth")`.

    Returns:
        The pictures that were written.

    Raises:
        UserError: Anything that the user can put right. Nothing is written then, unless the disk or the GPU's
            memory is full.
    """
    o, _ = resolve(VisualizeOptions, argv, options)
    figure()  # without matplotlib, there is nothing to do
    device = choose_device(o.device)
    files = find_images(o.images)
    check_names(files)
    model, facts = load_model(o)
    config = input_config(model, o, o.img_size, facts.get("data_config"))
    names = label_names(facts, o.class_map, model.num_classes)
    model.to(device).eval()
    check_reads(model, config["input_size"])
    view = choose_view(model, o, config["input_size"][1:])
    transform = create_transform(**config, is_training=False)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    images = [transform(read_pixels(file, mode)) for file in files]
    if view.channels is None:
        say("No *_channel_mixing.png: the model has no S6 channel mixers.")
    if (reason := why_no_grad_cam(model, view)) is not None:
        say(f"No *_grad_cam.png: {reason}.")
    folder = Path(o.output)
    make_folder(folder)
    try:
        with explain_disk_errors():
            written = draw_model(model, (image.to(device) for image in images), len(images), view, folder)
            for file, image in progress_bar(list(zip(files, images)), "draw", Processes(device)):
                shown = displayed(image, config)
                written += draw_scans(model, image.to(device), shown, view, folder, file.stem)
                if reason is None:
                    path = folder / f"{file.stem}_grad_cam.png"
                    written += draw_grad_cam(model, image.to(device), shown, names, view.stage, path)
    except torch.OutOfMemoryError:
        raise UserError("The GPU's memory is full: use a smaller --img-size, or --device cpu.") from None
    say(f"{len(written)} pictures in {folder}")
    return written


def check_names(files: Sequence[Path]) -> None:
    """Raise a UserError if pictures of two images would have one name."""
    named: dict[str, Path] = {}
    for path in files:
        if (other := named.setdefault(path.stem, path)) != path:
            raise UserError(
                f"{other} and {path} would both be drawn into {path.stem}_*.png: draw them into two --output folders."
            )


def load_model(o: CheckpointOptions) -> tuple[ViM2, dict[str, Any]]:
    """A trained ViM2, or one with random weights, and what its checkpoint tells about itself."""
    if o.checkpoint or o.pretrained:
        model, facts = load_checkpoint_model(
            o.checkpoint, o.model, o.model_kwargs, o.pretrained, use_ema=not o.no_ema, imports=o.imports
        )
    elif o.model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, facts = create_model(o.model, o.model_kwargs, imports=o.imports), {}
    else:
        raise UserError("Say what to draw: --checkpoint FILE, or --model NAME for a model before its training.")
    if not isinstance(model, ViM2):
        command, name = o.program.split()[-1], o.model or facts.get("arch")
        raise UserError(f"{command} looks into ViM2s, and {name} is a {type(model).__name__}.")
    if not (o.checkpoint or o.pretrained):
        say(f"{o.model} has random weights: give a --checkpoint to see what training made of them.")
    return model, facts


@dataclass(frozen=True)
class Spot:
    """A token of a mixer's map.

    Attributes:
        layer: Name of the layer.
        mixer: Its mixer.
        size: Height and width of the map.
        token: Row and column.
    """

    layer: str
    mixer: nn.Module
    size: tuple[int, int]
    token: tuple[int, int]


@dataclass(frozen=True)
class View:
    """What is looked at.

    Attributes:
        stage: The stage of the receptive field and of Grad-CAM, from 0 on.
        size: Height and width of its map.
        tokens: In the token mixer.
        channels: In the channel mixer; None where the model has no S6 one.
    """

    stage: int
    size: tuple[int, int]
    tokens: Spot
    channels: Spot | None


def choose_view(model: ViM2, o: VisualizeOptions, image: tuple[int, int]) -> View:
    """What the options ask for, on images of this height and width.

    Raises:
        UserError: A stage, layer or token that the model does not have.
    """
    sizes = map_sizes(model, *image)
    if o.stage is not None and o.stage > len(sizes):
        raise UserError(f"There is no --stage {o.stage}: the model has 1 to {len(sizes)}.")
    stage = (o.stage or len(sizes)) - 1

    def spot(name: str, kind: type[nn.Module]) -> Spot:
        mixer = choose_layer(model, name, kind)
        size = sizes[stage_of(name)]
        token = (size[0] // 2, size[1] // 2) if o.token is None else (o.token[0], o.token[1])
        check_token(token, size, name)
        return Spot(name, mixer, size, token)

    tokens = spot(o.layer or legible_layer(model, sizes), SelectiveTokenMixer)
    names = list(mixers_of(model, SelectiveChannelMixer))
    name = o.channel_layer or next((n for n in reversed(names) if stage_of(n) == stage_of(tokens.layer)), None)
    channels = spot(name, SelectiveChannelMixer) if name else None
    return View(stage, sizes[stage], tokens, channels)


def displayed(image: Tensor, config: dict[str, Any]) -> np.ndarray:
    """A normalised image, (channels, H, W), as it looks: (H, W, 3), or (H, W) if grey, from 0 to 1."""
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def pixels_of(model: ViM2, stage: int, token: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height in pixels of the square that a token of a stage's map stands for."""
    side = model.feature_info[stage]["reduction"]
    return token[1] * side, token[0] * side, side, side


def draw_model(model: ViM2, images: Iterable[Tensor], count: int, view: View, folder: Path) -> list[Path]:
    """Draw what is of the model, or of all images together."""
    weights, field = folder / "averaging_weights.png", folder / "receptive_field.png"
    plot_averaging_weights(averaging_weights(model), weights)
    centre = pixels_of(model, view.stage, (view.size[0] // 2, view.size[1] // 2))
    values = receptive_field(model, images, view.stage)
    mean = f"mean of {count} image{'s' if count > 1 else ''}"
    plot_receptive_field(values, centre, f"stage {view.stage + 1}'s centre token (outlined)\n{mean}", field)
    return [weights, field]


def draw_scans(model: ViM2, image: Tensor, shown: np.ndarray, view: View, folder: Path, stem: str) -> list[Path]:
    """Draw what the scans make of a token in one image."""
    tokens, channels = view.tokens, view.channels
    mixers = {spot.layer: spot.mixer for spot in (tokens, channels) if spot is not None}
    with torch.no_grad(), scan_inputs(mixers) as inputs:
        model(image.unsqueeze(0))
    written = [folder / f"{stem}_token_attention.png"]
    s6 = tokens.mixer.s6
    weights = token_attention(s6, inputs[tokens.layer][0], tokens.token)
    seen = tokens_seen(s6.orders, tokens.size, tokens.token)
    plot_token_attention(shown, weights, seen, s6.orders, tokens.token, tokens.layer, written[0])
    if channels is not None:
        written.append(folder / f"{stem}_channel_mixing.png")
        row, column = channels.token
        weights = channel_attention(channels.mixer.s6, inputs[channels.layer][row * channels.size[1] + column])
        plot_channel_mixing(weights, channels.mixer.channel_patch, channels.token, channels.layer, written[1])
    return written


def draw_grad_cam(
    model: ViM2, image: Tensor, shown: np.ndarray, names: Sequence[str], stage: int, path: Path
) -> list[Path]:
    """Draw Grad-CAM of one image."""
    heat, index, probability = grad_cam(model, image, stage)
    plot_grad_cam(shown, heat, names[index], probability, stage + 1, path)
    return [path]


def why_no_grad_cam(model: ViM2, view: View) -> str | None:
    """What keeps Grad-CAM from being drawn, and what to do; None where nothing does."""
    if model.num_classes == 0:
        return "the model has no classifier"
    if view.size == (1, 1):
        return f"the map of stage {view.stage + 1} is a single token; choose an earlier --stage or a larger --img-size"
    try:
        load_grad_cam()
    except NoGradCam as error:
        return str(error).rstrip(".")
    return None
