#!/usr/bin/env python
"""Differences and times of a file that vim2 export wrote earlier, beside its model in eager mode, as --compare prints,
for where other models are compiled meanwhile, or on another machine.

python tools/comparisons/exported_file.py vim2_nano.pt2 --model vim2_nano --device cuda --batch-size 1 32
python tools/comparisons/exported_file.py swin.onnx --model swin_tiny_patch4_window7_224 --img-size 224 --device cuda
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.command import run_tool

import argparse

import torch

from vim2.classify.models import create_model
from vim2.command.errors import UserError
from vim2.export.comparison import SIZES, compare, run_onnxruntime, run_pt2

RUNTIMES = {".onnx": run_onnxruntime, ".pt2": run_pt2}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="that vim2 export wrote without a checkpoint, for the device")
    add("--model", required=True, metavar="NAME", help="of which, with random weights")
    add("--img-size", type=int, metavar="PIXELS", help="of a file for one size; default: three sizes")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    add("--batch-size", type=int, nargs="+", default=[1], metavar="N", help="default 1")
    add("--repeats", type=int, default=9, metavar="N", help="timed runs, of which medians are printed; default 9")
    args = parser.parse_args(argv)
    if args.file.suffix not in RUNTIMES or not args.file.is_file():
        raise UserError(f"There is no file NAME.onnx or NAME.pt2 at {args.file}: write one with vim2 export.")
    torch.manual_seed(0)
    model = create_model(args.model).eval().to(args.device)
    name, run = RUNTIMES[args.file.suffix](args.file, args.device)
    sizes = [(args.img_size, args.img_size)] if args.img_size else SIZES
    printed = False
    for size in sizes:  # each row as soon as it is known
        for batch in args.batch_size:
            text = compare(model, name, run, [size], [batch], args.repeats)
            print(text.splitlines()[-1] if printed else text, flush=True)
            printed = True


if __name__ == "__main__":
    sys.exit(run_tool(main))
