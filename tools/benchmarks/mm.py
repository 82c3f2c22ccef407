#!/usr/bin/env python
"""Parameters, FLOPs, speed and memory of whole detectors and segmenters, from configs.

    python tools/benchmarks/mm.py --count mmdet_configs/mask-rcnn_vim2-tiny_fpn_1x_coco.py
    python tools/benchmarks/mm.py mmdet_configs/mask-rcnn_vim2-tiny_fpn_1x_coco.py \\
        mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py --batch-size 4 --amp bf16
    python tools/benchmarks/mm.py --profile --train mmdet_configs/mask-rcnn_vim2-tiny_fpn_1x_coco.py --amp bf16

Images are 800 x 1280 for detectors and 512 x 2048 for segmenters, unless --shape says otherwise, and random, with ten
random objects. FLOPs count as in `vim2 benchmark`; a detector's are those for 1000 proposals, of which 100 get masks.
Inference is one call of the model on a batch, non-maximum suppression and the resizing of maps included; training is
forward + backward + zero_grad, without an optimiser. A profile is one of `vim2 benchmark`, of the whole model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.command import run_tool

import argparse
import copy
import json
from collections.abc import Callable, Iterator

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

import vim2.mm  # noqa: F401  (registers ViM2, and gives mmcv its operators)
from vim2.benchmark.measuring import AMP, autocast, machine, measure, positive
from vim2.benchmark.models import FlopCounter, multiply_adds
from vim2.benchmark.profiles import device_rates, profile_step
from vim2.benchmark.reporting import figure, profile_table
from vim2.command.errors import UserError
from vim2.command.outputs import make_folder
from vim2.command.tables import table
from vim2.files import write_atomically
from vim2.mm.config_loading import load_config
from vim2.mm.runner import check_device

SHAPES = {"mmdet": (800, 1280), "mmseg": (512, 2048)}
OBJECTS = 10  # an image
PROPOSALS = 1000


def measure_config(path: str, args: argparse.Namespace) -> dict:
    """All figures of one config's model."""
    config, shape = read(path, args)
    model = build(config)
    parts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    row = {
        "config": Path(path).stem,
        "shape": named(shape),
        "batch": args.batch_size,
        "params_m": sum(parts.values()),
        "parts_m": {name: count for name, count in parts.items() if count},
        "gflops": count_flops(copy.deepcopy(model).to("meta").eval(), shape) / 1e9,
    }
    if not args.modes:
        return row
    for mode, step in model_steps(model.to(args.device), config, shape, args).items():
        model.train(mode == "train")
        row[mode] = measure(step, args)
        if "ms" in row[mode]:
            row[mode]["img_s"] = args.batch_size / row[mode]["ms"] * 1e3
    return row


def profile_config(path: str, rates: dict[str, float], args: argparse.Namespace) -> Iterator[dict]:
    """Where the time of a step goes, in each mode, for one config's model, as `vim2 benchmark --profile` has it."""
    config, shape = read(path, args)
    model = build(config).to(args.device)
    for mode, step in model_steps(model, config, shape, args).items():
        model.train(mode == "train")
        about = {"model": Path(path).stem, "shape": named(shape), "batch": args.batch_size, "mode": mode}
        yield about | profile_step(step, rates, args, f"{path}, {mode}")


def read(path: str, args: argparse.Namespace) -> tuple[Config, tuple[int, int]]:
    """A config, and the shape of its images."""
    config = load_config(path)
    if config.get("default_scope") not in SHAPES:
        raise UserError(f"{path} is neither MMDetection's nor MMSegmentation's.")
    return config, tuple(args.shape or SHAPES[config.default_scope])


def build(config: Config) -> nn.Module:
    init_default_scope(config.default_scope)
    return revert_sync_batchnorm(MODELS.build(config.model))


def named(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def model_steps(
    model: nn.Module, config: Config, shape: tuple[int, int], args: argparse.Namespace
) -> dict[str, Callable[[], None]]:
    """The steps that were asked for, by the names of their modes, in which the caller puts the model."""
    make = detector_batch if config.default_scope == "mmdet" else segmenter_batch
    batch = make(args.batch_size, shape, classes(config), args.device)

    def infer() -> None:
        with torch.no_grad(), autocast(args):
            model(**model.data_preprocessor(batch, False), mode="predict")

    def train() -> None:
        with autocast(args):
            losses = model(**model.data_preprocessor(batch, True), mode="loss")
        loss, _ = model.parse_losses(losses)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return {mode: step for mode, step in (("infer", infer), ("train", train)) if mode in args.modes}


def count_flops(model: nn.Module, shape: tuple[int, int]) -> float:
    """FLOPs for one image, counted on the meta device."""
    image = torch.empty(1, 3, *shape, device="meta")
    with FlopCounter() as counter, torch.no_grad():
        if hasattr(model, "roi_head"):
            features = model.extract_feat(image)
            model.rpn_head(features)
            count_regions(model.roi_head, features)
        else:
            model(image, mode="tensor")
    return multiply_adds(counter)


def count_regions(head: nn.Module, features: tuple[Tensor, ...]) -> None:
    """Run a RoI head's layers on as many regions as they see; choosing and pooling regions counts nothing."""

    def regions(extractor: nn.Module, number: int) -> Tensor:
        size = extractor.roi_layers[0].output_size
        return features[0].new_zeros(number, extractor.out_channels, *size)

    def stages(part: str) -> list[nn.Module]:
        module = getattr(head, part)
        return list(module) if isinstance(module, nn.ModuleList) else [module]

    for extractor, bbox_head in zip(stages("bbox_roi_extractor"), stages("bbox_head")):
        bbox_head(regions(extractor, PROPOSALS))
    if head.with_mask:
        extractors = stages("bbox_roi_extractor") if head.share_roi_extractor else stages("mask_roi_extractor")
        for extractor, mask_head in zip(extractors, stages("mask_head")):
            mask_head(regions(extractor, PROPOSALS // 10))


def classes(config: Config) -> int:
    if config.default_scope == "mmseg":
        return config.model.decode_head.num_classes
    head = config.model.get("roi_head", config.model).bbox_head
    return (head[0] if isinstance(head, list) else head).num_classes


def detector_batch(size: int, shape: tuple[int, int], num_classes: int, device: str) -> dict:
    """Random images with boxes and masks."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(size):
        corner = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([shape[1], shape[0]]) * 0.6
        boxes = torch.cat((corner, corner + 40 + 100 * torch.rand(OBJECTS, 2, generator=generator)), 1)
        masks = torch.zeros(OBJECTS, *shape, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
            mask[y1:y2, x1:x2] = 1
        sample = DetDataSample(metainfo=dict(img_id=i, img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=boxes.to(device),
            labels=torch.randint(num_classes, (OBJECTS,), generator=generator).to(device),
            masks=BitmapMasks(masks.numpy(), *shape),
        )
        sample.ignored_instances = InstanceData(bboxes=boxes[:0].to(device))
        samples.append(sample)
    return {"inputs": random_images(size, shape, generator), "data_samples": samples}


def segmenter_batch(size: int, shape: tuple[int, int], num_classes: int, device: str) -> dict:
    """Random images with random maps."""
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(size):
        sample = SegDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=shape))
        sample.gt_sem_seg = PixelData(data=torch.randint(num_classes, (1, *shape), generator=generator).to(device))
        samples.append(sample)
    return {"inputs": random_images(size, shape, generator), "data_samples": samples}


def random_images(size: int, shape: tuple[int, int], generator: torch.Generator) -> list[Tensor]:
    return list(torch.randint(256, (size, 3, *shape), generator=generator, dtype=torch.uint8))


def report(rows: list[dict]) -> str:
    header = ["config", "image", "batch", "params M", "GFLOPs", "infer img/s", "infer GiB", "train img/s", "train GiB"]
    cells = [("infer", "img_s", 1), ("infer", "gib", 2), ("train", "img_s", 1), ("train", "gib", 2)]
    lines = []
    for row in rows:
        line = [row["config"], row["shape"], str(row["batch"]), f"{row['params_m']:.2f}", f"{row['gflops']:.1f}"]
        lines.append(line + [figure(row, *cell) for cell in cells])
    return table(header, lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Parameters, FLOPs, speed and memory of detectors and segmenters.")
    add = parser.add_argument
    add("configs", nargs="+", metavar="CONFIG", help="a file, or one of an installed library: mmdet::swin/....py")
    add("--shape", type=positive, nargs=2, metavar=("H", "W"), help="of the images, in pixels")
    add("--batch-size", type=positive, default=2, metavar="N", help="default 2, the least on which UPerNet trains")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--amp", choices=AMP, default="off", help="autocast dtype; default off")
    add("--infer", action="store_true", help="inference only; default both")
    add("--train", action="store_true", help="training only; default both")
    add("--count", action="store_true", help="parameters and FLOPs only, no times")
    add("--profile", action="store_true", help="where the time goes, by operator, in place of the table")
    add("--warmup", type=positive, default=3, metavar="N", help="untimed steps; default 3")
    add("--repeats", type=positive, default=10, metavar="N", help="timed steps; default 10")
    add("--output", type=Path, metavar="DIR", help="also write mm_benchmark.md and mm_benchmark.json there")
    args = parser.parse_args(argv)
    if args.profile and args.count:
        raise UserError("--count measures no times: leave out --profile.")
    check_device(args.device)
    if args.output:
        make_folder(args.output)
    args.device_type = args.device.partition(":")[0]
    args.torchcompile = args.channels_last = False  # what `vim2 benchmark` asks for
    args.modes = {mode for mode in ("infer", "train") if getattr(args, mode)} or {"infer", "train"}
    args.modes = set() if args.count else args.modes
    about = machine(args)
    results: dict = {"machine": about, "profiles" if args.profile else "models": []}
    rates = device_rates(args) if args.profile and args.device_type == "cuda" else {}
    for path in args.configs:
        for row in profile_config(path, rates, args) if args.profile else [measure_config(path, args)]:
            results["profiles" if args.profile else "models"].append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    tables = "\n\n".join(map(profile_table, results["profiles"])) if args.profile else report(results["models"])
    text = f"{about['hardware']}, {about['date']}. {about['versions']}. {about['settings']}.\n\n{tables}\n"
    print(text, end="")
    if args.output:
        write_atomically(args.output / "mm_benchmark.md", text)
        write_atomically(args.output / "mm_benchmark.json", json.dumps(results, indent=2))


if __name__ == "__main__":
    sys.exit(run_tool(main))
