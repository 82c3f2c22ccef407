#!/usr/bin/env python
"""Compare torchvision's operators, as vim2.mm puts them in the place of mmcv's, with those of an mmcv that has its own.

Usage: python tools/comparisons/mmcv_operators.py SITE

SITE is a folder that holds such an mmcv; tools/comparisons/build_mmcv.sh makes one.

The same work runs twice, on the CPU: every operator with a form for it, and the losses, gradients and detections of a
Mask R-CNN with random weights.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.command import run_tool

import argparse
import os
import subprocess
import tempfile

import torch
from torch import Tensor

from vim2.command.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "mmdet_configs/mask-rcnn_vim2-nano_fpn_24e_nuclei.py"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_boxes(number: int, side: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner, size = (torch.rand(number, 2, generator=generator) * s for s in (side, side / 5))
    return torch.cat((corner, corner + size + 1), 1)


def with_gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, inputs, random(*output.shape, seed=9))]


def run_operators() -> dict[str, list[Tensor]]:
    from mmcv import ops

    boxes, scores = random_boxes(2000, 400), random(2000, seed=1).sigmoid()
    classes = torch.arange(2000) % 7
    results = {f"nms, offset {offset}": list(ops.nms(boxes, scores, 0.5, offset)) for offset in (0, 1)}
    for method in ("naive", "linear", "gaussian"):
        results[f"soft_nms, {method}"] = list(ops.soft_nms(boxes[:500], scores[:500], method=method))
    results["batched_nms"] = list(ops.batched_nms(boxes, scores, classes, dict(type="nms", iou_threshold=0.5)))
    matches = ops.nms_match(torch.cat((boxes[:300], scores[:300, None]), 1), 0.3)
    results["nms_match"] = [torch.cat(matches), torch.tensor([len(match) for match in matches])]
    rois = torch.cat((torch.arange(200)[:, None] % 2, random_boxes(200, 180)), 1).float()
    maps = random(2, 8, 50, 60, seed=2).requires_grad_()
    for aligned in (True, False):
        for samples in (0, 2):
            layer = ops.RoIAlign(7, 0.25, samples, aligned=aligned)
            results[f"RoIAlign, aligned {aligned}, samples {samples}"] = with_gradients(layer(maps, rois), maps)
    torch.manual_seed(0)
    image = random(2, 8, 20, 24, seed=3).requires_grad_()
    offset, mask = random(2, 36, 20, 24, seed=4).requires_grad_(), random(2, 18, 20, 24, seed=5).requires_grad_()
    conv = ops.DeformConv2d(8, 6, 3, padding=1, groups=2, deform_groups=2)
    results["DeformConv2d"] = with_gradients(conv(image, offset), image, offset, conv.weight)
    conv = ops.ModulatedDeformConv2d(8, 6, 3, padding=1, deform_groups=2)
    inputs = image, offset, mask, conv.weight, conv.bias
    results["ModulatedDeformConv2d"] = with_gradients(conv(*inputs[:3]), *inputs)
    return results


def run_detector() -> dict[str, list[Tensor]]:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.structures import InstanceData

    from vim2.mm.config_loading import load_config

    config = load_config(CONFIG)
    init_default_scope(config.default_scope)
    config.model.test_cfg.rcnn.score_thr = 0.0
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    side, samples = 160, []
    for i in range(2):
        sample = DetDataSample(
            metainfo=dict(img_id=i, img_shape=(side, side), ori_shape=(side, side), scale_factor=(1.0, 1.0))
        )
        boxes = random_boxes(8, 100, seed=i)
        masks = BitmapMasks(torch.ones(8, side, side, dtype=torch.uint8).numpy(), side, side)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.zeros(8, dtype=torch.long), masks=masks)
        samples.append(sample)
    images = list((random(2, 3, side, side, seed=6) * 60 + 120).clamp(0, 255).byte())
    batch = {"inputs": images, "data_samples": samples}
    torch.manual_seed(0)
    loss, values = model.train().parse_losses(model(**model.data_preprocessor(batch, True), mode="loss"))
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with torch.no_grad():
        found = [s.pred_instances for s in model.eval()(**model.data_preprocessor(batch), mode="predict")]
    return {
        "Mask R-CNN: losses": [torch.stack([values[name].detach() for name in sorted(values)])],
        "Mask R-CNN: gradients": gradients,
        "Mask R-CNN: detections": [value for f in found for value in (f.bboxes, f.scores, f.labels, f.masks)],
    }


def compute(path: str) -> None:
    """Run everything with the mmcv that this process has, and save it."""
    import vim2.mm  # noqa: F401
    from mmcv import ops  # isort: skip

    torch.save({"compiler": ops.get_compiler_version(), **run_operators(), **run_detector()}, path)


def compare(site: str) -> int:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for i, before in enumerate(([], [site])):
            path = os.pathsep.join([*before, str(ROOT), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
            output = f"{folder}/{i}.pt"
            command = [sys.executable, __file__, "--compute", output]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            found.append(torch.load(output))
    ours, theirs = found
    print(f"mmcv's operators compiled by: {ours.pop('compiler')} | {theirs.pop('compiler')}\n")
    print("| operator | tensors | of equal shape | largest difference, of the largest value |\n|---|---|---|---|")
    equal = True
    for name in ours:
        pairs = list(zip(ours[name], theirs[name], strict=True))
        shapes = sum(a.shape == b.shape for a, b in pairs)
        equal &= shapes == len(pairs)
        worst = max(
            ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
            for a, b in pairs
            if a.shape == b.shape and a.numel()
        )
        equal &= worst < 1e-4
        print(f"| {name} | {len(pairs)} | {shapes} | {worst:.1e} |")
    print(f"\n{'The same, up to rounding.' if equal else 'They differ.'}")
    return 0 if equal else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare torchvision's operators with mmcv's own.")
    parser.add_argument("site", metavar="SITE", nargs="?", help="a folder that holds an mmcv with compiled operators")
    parser.add_argument("--compute", metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compute:
        compute(args.compute)
        return 0
    if not args.site or not list(Path(args.site).glob("mmcv/_ext*")):
        raise UserError(f"{args.site} holds no mmcv with compiled operators.")
    return compare(args.site)


if __name__ == "__main__":
    sys.exit(run_tool(main))
