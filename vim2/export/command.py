"""The command `vim2 export`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from timm.models._features import FeatureGetterNet

from ..classify.models import create_model, load_checkpoint_model
from ..command.errors import UserError
from ..command.options import Parser
from ..vim2 import ViM2
from .comparison import SIZES, compare_onnx
from .onnx import DEFAULT_OPSET, MIN_OPSET, export_onnx

__all__ = ["export"]


def export(argv: Sequence[str]) -> None:
    """Write a model as a file for runtimes other than PyTorch, and say how large it is.

    Args:
        argv: The command line.

    Raises:
        UserError: Anything that the user can put right.
    """
    parser = Parser(prog="vim2 export", description="Write a model as a file for runtimes other than PyTorch.")
    add = parser.add_argument
    add("--model", metavar="NAME", help="a ViM2; default: the checkpoint's")
    add("--checkpoint", metavar="FILE", help="its weights; default: random ones")
    add("--format", required=True, choices=("onnx",), help="of the file")
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
    args = parser.parse_args(argv)
    if args.model is None and args.checkpoint is None:
        raise UserError("Say what to export: --model NAME, --checkpoint FILE, or both.")
    size = None
    if args.img_size is not None:
        if len(args.img_size) > 2:
            raise UserError(f"--img-size takes a height and a width, got {len(args.img_size)} numbers.")
        size = args.img_size[0], args.img_size[-1]

    torch.manual_seed(0)
    if args.checkpoint is None:
        model = create_model(args.model)
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
