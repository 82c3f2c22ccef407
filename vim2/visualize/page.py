"""The command `vim2 demo`: a page for a browser, on which to ask a ViM2 about images. Gradio makes the page."""

import dataclasses
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.data import create_transform

from ..classify.models import check_reads, input_config
from ..classify.options import CheckpointOptions, InputOptions, Pixels
from ..classify.validation import label_names
from ..command.errors import UserError, first_line
from ..command.figures import figure
from ..command.images import read_image, read_pixels
from ..command.options import Between, DeviceOptions, option, resolve
from ..command.processes import choose_device
from ..command.progress import say
from ..mixers import SelectiveTokenMixer
from .attention import scan_inputs, token_attention, tokens_seen
from .command import displayed, load_model, pixels_of
from .layers import choose_layer, legible_layer, map_sizes, mixers_of, stage_of
from .plots import MARK, plot_receptive_field, plot_token_attention
from .saliency import receptive_field

__all__ = ["DemoOptions", "Explorer", "Look", "demo", "make_page"]

TOP = 5  # classes that are shown
SHOWN = 400  # pixels of the height at which images are shown
HEADING = """# vim2
Drop an image. The model sees the crop in the middle: click anywhere in it to choose a token, whose receptive field and
attention are drawn below."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions(CheckpointOptions, InputOptions, DeviceOptions):
    """Show a page on which to drop images: their classes, and what a token that you click attends to.

    Without --checkpoint or --model, the model is vim2_nano_token_d1 with the weights that come with the package.
    """

    program = "vim2 demo"
    img_size: Pixels | None = option(None, "default: the checkpoint's", metavar="PIXELS")
    class_map: str | None = option(
        None, "text file with a class name a line; default: the checkpoint's", metavar="FILE"
    )
    host: str = option("127.0.0.1", "address to serve on; 0.0.0.0 lets other machines see the page")
    port: Annotated[int, Between(1, 65535)] | None = option(
        None, "port to serve on; default: the first free one from 7860 on"
    )


def demo(argv: Sequence[str] | None = None, /, **options) -> None:
    """Serve a page on which to ask a ViM2 about images, as `vim2 demo` does, until Ctrl-C.

    Args:
        argv: Command line; or else
        options: the same options by name: `demo(checkpoint="best.pth")`; without any, `vim2_nano_token_d1` with its
            weights.

    Raises:
        UserError: Anything that the user can put right.
        ModuleNotFoundError: Gradio is not installed: pip install "vim2[demo]".
    """
    o, _ = resolve(DemoOptions, argv, options)
    import gradio  # first of all, since without it there is nothing to do

    page = make_page(Explorer(o))
    try:
        _, address, _ = page.launch(
            server_name=o.host,
            server_port=o.port,
            share=False,
            ssr_mode=False,  # it would need Node.js
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            max_file_size="100mb",
            # fonts that are there: the default theme's would be asked of a server
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
    except OSError as error:
        wanted = f"{o.host}:{o.port or 7860}"
        raise UserError(
            f"The page cannot be served on {wanted} ({first_line(error)}): choose another --port or --host."
        ) from None
    say(f"Open {address} in a browser; Ctrl-C ends it.")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


class Look(NamedTuple):
    """What there is to see of an image.

    Attributes:
        classes: The most likely classes and their probabilities, 0 to 1, best first; empty without a classifier.
        seen: What the model sees, with the token that is looked at outlined.
        attention: What that token takes from all others through each scan of its layer.
        field: The token's effective receptive field, in this image, at the end of the layer's stage.
    """

    classes: dict[str, float]
    seen: Image.Image
    attention: Image.Image
    field: Image.Image


class Explorer:
    """A model that answers what a page asks.

    Args:
        options: Which model, and what of it.

    Attributes:
        layers: Names of the layers that have a token mixer.
        layer: The one to begin with.
        shown: Width and height of `Look.seen`, in pixels.

    Raises:
        UserError: A model that cannot be shown.
    """

    def __init__(self, options: DemoOptions):
        o = options
        if not (o.checkpoint or o.model):
            o = dataclasses.replace(o, model="vim2_nano_token_d1", pretrained=True)
        figure()  # without matplotlib, there is nothing to show
        device = choose_device(o.device)
        self.model, facts = load_model(o)
        self.config = input_config(self.model, o, o.img_size, facts.get("data_config"))
        self.names = label_names(facts, o.class_map, self.model.num_classes)
        self.model.to(device).eval().requires_grad_(False)
        check_reads(self.model, self.config["input_size"])
        self.transform = create_transform(**self.config, is_training=False)
        self.sizes = map_sizes(self.model, *self.config["input_size"][1:])
        self.layers = list(mixers_of(self.model, SelectiveTokenMixer))
        self.layer = legible_layer(self.model, self.sizes)
        height, width = self.config["input_size"][1:]
        scale = max(1, round(SHOWN / height))
        self.shown = width * scale, height * scale
        self._one_at_a_time = threading.Lock()  # hooks on the model would see another request's image

    def look(self, file: str | Path, layer: str | None = None, place: tuple[float, float] = (0.5, 0.5)) -> Look:
        """Look at an image.

        Args:
            file: The image.
            layer: Which layer's token mixer to look into; None for `self.layer`.
            place: Where the token lies: from 0 to 1, right and down, in what the model sees.

        Raises:
            UserError: No image that can be read, or no such layer.
        """
        layer = layer or self.layer
        mixer = choose_layer(self.model, layer, SelectiveTokenMixer)
        stage = stage_of(layer)
        size = self.sizes[stage]
        row, column = (min(int(at * side), side - 1) for at, side in zip(reversed(place), size))
        pixels = self.transform(read_pixels(file, "L" if self.config["input_size"][0] == 1 else "RGB"))
        image = pixels.to(next(self.model.parameters()).device)
        with self._one_at_a_time:
            with torch.no_grad(), scan_inputs({layer: mixer}) as inputs:
                logits = self.model(image.unsqueeze(0))
            field = receptive_field(self.model, [image], stage, (row, column))
        s6 = mixer.s6
        weights = token_attention(s6, inputs[layer][0], (row, column))
        seen = tokens_seen(s6.orders, size, (row, column))
        shown = displayed(pixels, self.config)
        box = pixels_of(self.model, stage, (row, column))
        whose = f"token ({row}, {column}) of stage {stage + 1} (outlined)"
        return Look(
            self._classes(logits),
            self._outlined(shown, box),
            _picture(lambda path: plot_token_attention(shown, weights, seen, s6.orders, (row, column), layer, path)),
            _picture(lambda path: plot_receptive_field(field, box, whose, path)),
        )

    def _classes(self, logits: torch.Tensor) -> dict[str, float]:
        if not self.names:
            return {}
        top = logits[0].float().softmax(-1).topk(min(TOP, len(self.names)))
        found: dict[str, float] = {}
        for probability, i in zip(top.values.tolist(), top.indices.tolist()):
            name = self.names[i]
            found[f"{name} ({i})" if name in found else name] = probability  # ImageNet has two cranes
        return found

    def _outlined(self, image: np.ndarray, box: tuple[int, int, int, int]) -> Image.Image:
        """An image, (H, W, 3) or (H, W) from 0 to 1, enlarged to be clicked in, with a frame around these pixels."""
        enlarged = Image.fromarray((image * 255).round().astype("uint8")).convert("RGB")
        enlarged = enlarged.resize(self.shown, Image.Resampling.BICUBIC)
        left, top, width, height = (value * self.shown[0] // image.shape[1] for value in box)
        ImageDraw.Draw(enlarged).rectangle((left, top, left + width - 1, top + height - 1), outline=MARK, width=2)
        return enlarged


def make_page(explorer: Explorer) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio

    def answer(place: tuple[float, float], upload: dict | None, layer: str) -> tuple:
        if upload is None:
            return None, None, None, None, place
        try:
            return *explorer.look(upload["path"], layer, place), place
        except UserError as error:
            raise gradio.Error(str(error)) from None

    def dropped(upload: dict | None, layer: str) -> tuple:
        return answer((0.5, 0.5), upload, layer)

    def clicked(upload: dict | None, layer: str, click: gradio.SelectData) -> tuple:
        return answer(tuple(at / side for at, side in zip(click.index, explorer.shown)), upload, layer)

    with gradio.Blocks(title="vim2", analytics_enabled=False) as page:
        gradio.Markdown(HEADING)
        with gradio.Row():
            photo = gradio.Image(label="image", sources=["upload", "clipboard"], height=SHOWN)
            seen = gradio.Image(label="what the model sees", format="png", interactive=False, height=SHOWN, buttons=[])
            with gradio.Column():
                classes = gradio.Label(label="classes", num_top_classes=TOP)
                layer = gradio.Dropdown(explorer.layers, value=explorer.layer, label="layer to look into")
        with gradio.Row():
            drawn = dict(format="png", interactive=False, show_label=False, buttons=[])  # they have titles of their own
            attention = gradio.Image(label="attention", scale=2, **drawn)
            field = gradio.Image(label="receptive field", **drawn)
        place = gradio.State((0.5, 0.5))
        # files come as they are: what is wrong with one, read_pixels says better
        how = dict(outputs=[classes, seen, attention, field, place], preprocess=False)
        photo.change(dropped, [photo, layer], **how)
        layer.change(answer, [place, photo, layer], **how)
        seen.select(clicked, [photo, layer], **how)
    return page


def _picture(draw: Callable[[Path], None]) -> Image.Image:
    """What a function draws into a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        draw(path)
        return read_image(path)
