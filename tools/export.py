#!/usr/bin/env python
"""Write a model as a file for runtimes other than PyTorch, or its weights as a file to pass on.

python tools/export.py --model vim2_tiny --checkpoint runs/mine/best.pth --format onnx --output vim2_tiny.onnx
python tools/export.py --model vim2_nano --pretrained --format onnx --features-only --output backbone.onnx
python tools/export.py --checkpoint runs/mine/best.pth --format safetensors --output mine.safetensors --data-dir flowers
"""

from common.command import run_tool

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from timm.models._features import FeatureGetterNet

from benchmarks.runtimes import SIZES, compare_onnx
from vim2.checkpoints import save_checkpoint, save_half_precision
from vim2.classify import validate
from vim2.classify.models import create_model, load_checkpoint_model
from vim2.command.errors import UserError
from vim2.export import export_onnx
from vim2.export.onnx import DEFAULT_OPSET, MIN_OPSET
from vim2.vim2 import ViM2

MAX_LOSS = 0.1  # points of top-1 accuracy that half precision may cost


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="NAME", help="a ViM2; default: the checkpoint's")
    add("--checkpoint", metavar="FILE", help="its weights; default: random ones")
    add("--pretrained", action="store_true", help="the model's pretrained weights instead of a checkpoint")
    add("--format", required=True, choices=("onnx", "safetensors"), help="of the file; safetensors: half precision")
    add("--features-only", action="store_true", help="the stages' maps in place of the classifier's logits")
    sizes = "height and width, or one number for both, for runtimes that take no dynamic ones; default: any"
    add("--img-size", type=int, nargs="+", metavar="PIXELS", help=sizes)
    add(
        "--opset",
        type=int,
        default=DEFAULT_OPSET,
        help=f"of ONNX's operators, {MIN_OPSET} or later; default {DEFAULT_OPSET}",
    )
    add("--output", required=True, type=Path, metavar="FILE", help="where to write")
    add("--compare", action="store_true", help="run the file in onnxruntime beside PyTorch: differences and times")
    add("--data-dir", metavar="DIR", help="of safetensors: check that on these images they are as good as before")
    add("--split", default="validation", metavar="NAME", help="split, folder, or packs of it; default %(default)s")
    args = parser.parse_args(argv)
    if args.model is None and args.checkpoint is None:
        raise UserError("Say what to export: --model NAME, --checkpoint FILE, or both.")
    if args.format == "safetensors":
        export_weights(args)
        return
    size = None
    if args.img_size is not None:
        if len(args.img_size) > 2:
            raise UserError(f"--img-size takes a height and a width, got {len(args.img_size)} numbers.")
        size = args.img_size[0], args.img_size[-1]

    torch.manual_seed(0)
    if args.checkpoint is None:
        model = create_model(args.model, pretrained=args.pretrained)
    else:
        model, _ = load_checkpoint_model(args.checkpoint, args.model)
    if not isinstance(model, ViM2):
        raise UserError(f"Only ViM2 models are exported here, not {type(model).__name__}: use torch.onnx.export.")
    channels = model.in_chans
    if args.features_only:
        model = FeatureGetterNet(model, out_indices=tuple(range(len(model.stages))))
    try:
        export_onnx(model, args.output, img_size=size, opset=args.opset)
    except OSError as error:
        raise UserError(error) from None
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, ONNX, opset {args.opset}")
    if args.compare:
        print(compare_onnx(model.eval(), args.output, [size] if size else SIZES, channels))


def export_weights(args: argparse.Namespace) -> None:
    """Write a checkpoint's weights, the moving average if it has one, in half precision.

    Raises:
        UserError: No checkpoint, or one that cannot be read; half precision cannot hold the weights, or costs more than
            MAX_LOSS points of accuracy. Nothing is written then.
    """
    if args.checkpoint is None:
        raise UserError("--format safetensors turns a checkpoint into half precision: give --checkpoint FILE.")
    model, facts = load_checkpoint_model(args.checkpoint, args.model)
    try:
        if args.data_dir is not None:
            check_rounding(args, model, facts)
        save_half_precision(model.state_dict(), args.output)
    except (OSError, ValueError) as error:
        raise UserError(error) from None
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, half precision")


def check_rounding(args: argparse.Namespace, model: torch.nn.Module, facts: dict) -> None:
    """Compare the accuracy of a checkpoint's weights before and after they are rounded.

    Raises:
        UserError: They lose more than MAX_LOSS points of top-1 accuracy; anything that validation refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        rounded = {name: v.half().float() if v.is_floating_point() else v for name, v in model.state_dict().items()}
        after = Path(folder) / "rounded.pth"
        save_checkpoint({**facts, "arch": args.model or facts["arch"], "state_dict": rounded}, after)
        common = dict(model=args.model, data_dir=args.data_dir, split=args.split, output=folder)
        was, now = (validate(checkpoint=path, **common)[0]["top1"] for path in (args.checkpoint, after))
    print(f"top-1: {was:.2f} % before, {now:.2f} % in half precision")
    if was - now > MAX_LOSS:
        raise UserError(
            f"Half precision costs {was - now:.2f} points of top-1 accuracy, more than {MAX_LOSS}: keep the checkpoint."
        )


if __name__ == "__main__":
    sys.exit(run_tool(main))
