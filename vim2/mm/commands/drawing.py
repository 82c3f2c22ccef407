"""`vim2 mm predict`: draw what a detector or a segmenter sees, boxes and masks, or a map, on images."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, VISUALIZERS, init_default_scope
from mmengine.runner import load_checkpoint
from mmengine.utils import track_iter_progress
from torch import nn

from ...command.errors import UserError
from ...command.images import SUFFIXES, ImageFolder, describe_left_out, read_pixels
from ...command.options import Parser
from ...command.outputs import explain_disk_errors, keep_source, make_folder
from ...command.progress import say
from ...files import write_atomically
from ..config_loading import add_config_arguments, load_config
from ..runner import check_device, checkpoint_errors

__all__ = ["predict"]


def find_images(paths: list[Path]) -> list[Path]:
    """The images that are named, and those in folders that are.

    Raises:
        UserError: An image that cannot be read, a folder without any, or two that would be drawn into one file.
    """
    images = []
    for path in paths:
        if path.is_dir():
            folder = ImageFolder(path)
            inside = [path / name for name in folder.images if "/" not in name]
            deeper = [name for name in folder.images if "/" in name]
            left_out = describe_left_out(path, {"in folders of it": deeper, **folder.left_out})
            if not inside:
                raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)}). {left_out}")
            if left_out:
                say(left_out)
            images += inside
        else:
            images.append(path)
    images = list(dict.fromkeys(images))
    named = {}
    for path in images:
        if (other := named.setdefault(path.stem, path)) != path:
            raise UserError(f"{other} and {path} would both be drawn into {path.stem}.png; draw them one at a time.")
    for path in images:
        load_rgb(path)
    return images


def load_model(config, path: str, device: str) -> nn.Module:
    """The config's model with a checkpoint's weights, and the names and colours of the classes it was trained on."""
    try:
        model = revert_sync_batchnorm(MODELS.build(config.model))
    except ValueError as error:
        raise UserError(str(error)) from None
    with checkpoint_errors(path):
        checkpoint = load_checkpoint(model, path, map_location="cpu", strict=True)
    dataset = config.test_dataloader.dataset
    model.dataset_meta = checkpoint.get("meta", {}).get("dataset_meta") or dict(dataset.get("metainfo", {}))
    return model.to(device).eval()


def predict(argv: Sequence[str]) -> None:
    """Draw what a detector or a segmenter sees.

    Args:
        argv: The command line.

    Raises:
        UserError: Anything that the user can put right.
    """
    parser = Parser(prog="vim2 mm predict", description="Draw what a detector or a segmenter sees.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="images, or folders of them")
    add_config_arguments(parser, flag=True)
    parser.add_argument("--checkpoint", required=True, metavar="CHECKPOINT", help="path or address")
    parser.add_argument("--out-dir", type=Path, default=Path("outputs"), metavar="DIR", help="default outputs")
    parser.add_argument("--score-thr", type=float, default=0.3, help="least score of a box that is drawn; default 0.3")
    parser.add_argument("--device", default=get_device(), help="cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    check_device(args.device)
    images = find_images(args.images)
    for path in images:
        keep_source(path, args.out_dir / f"{path.stem}.png")
    make_folder(args.out_dir, "--out-dir")
    config = load_config(args.config, args.cfg_options)
    init_default_scope(config.default_scope)
    model = load_model(config, args.checkpoint, args.device)
    pipeline = Compose([step for step in config.test_dataloader.dataset.pipeline if step["type"] != "LoadAnnotations"])
    visualizer = VISUALIZERS.build({**config.visualizer, "vis_backends": None, "name": "image_demo"})
    visualizer.dataset_meta = model.dataset_meta
    is_detector = config.default_scope == "mmdet"
    if is_detector and len(model.dataset_meta["classes"]) == 1:  # its name on every object would only hide objects
        visualizer.draw_texts = lambda *args, **kwargs: visualizer
    for i, path in enumerate(track_iter_progress(images)):
        try:
            data = pipeline(dict(img_path=str(path), img_id=i))
        except (AssertionError, OSError, cv2.error) as error:  # a format that OpenCV does not know
            raise UserError(
                f"{path} cannot be read by the config's pipeline: {error or type(error).__name__}"
            ) from error
        try:
            with torch.no_grad():
                sample = model.test_step(dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]]))[0].cpu()
        except ValueError as error:  # too small for the backbone, say
            raise UserError(f"{path} is no image for this model: {error}") from error
        options = dict(pred_score_thr=args.score_thr) if is_detector else dict(with_labels=False)
        image = load_rgb(path)
        visualizer.line_width = max(1, min(image.shape[:2]) // 250)  # of boxes
        with explain_disk_errors(": choose another --out-dir"), tempfile.TemporaryDirectory() as folder:
            drawn = Path(folder) / f"{path.stem}.png"
            visualizer.add_datasample(
                path.stem,
                image,
                data_sample=sample,
                draw_gt=False,
                out_file=str(drawn),
                **options,
            )
            write_atomically(args.out_dir / drawn.name, drawn.read_bytes())
        if is_detector:
            scores = sample.pred_instances.scores
            say(f"{path}: {int((scores >= args.score_thr).sum())} objects")
    say(f"\n{len(images)} pictures in {args.out_dir}")


def load_rgb(path: Path) -> np.ndarray:
    """(height, width, 3) uint8, upright, as OpenCV hands images to the model."""
    return np.asarray(read_pixels(path))
