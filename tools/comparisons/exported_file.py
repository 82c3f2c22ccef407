#!/usr/bin/env python
"""Differences and times of a file that vim2 export wrote earlier, beside its model in eager mode, as --compare prints,
for where other models are compiled meanwhile, or on another machine.

python tools/comparisons/exported_file.py vim2_nano.pt2 --model vim2_nano --device cuda --batch-size 1 32
python tools/comparisons/exported_file.py swin.onnx --model swin_tiny_patch4_window7_224 --img-size 224 --device cuda

What it is about to do is told on stderr, with the seconds since its imports.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.command import run_tool

import argparse
import time
from unittest import mock

import torch

from vim2.benchmark.measuring import positive
from vim2.classify.models import create_model
from vim2.command.errors import UserError
from vim2.command.processes import choose_device
from vim2.export.comparison import SIZES, compare, run_onnxruntime, run_pt2
from vim2.export.examples import examples

RUNTIMES = {".onnx": run_onnxruntime, ".pt2": run_pt2}
_START = time.monotonic()


def tell(stage: str) -> None:
    print(f"{time.monotonic() - _START:.1f} s: {stage}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="that vim2 export wrote without a checkpoint, for the device")
    add("--model", required=True, metavar="NAME", help="of which, with random weights")
    add("--img-size", type=positive, metavar="PIXELS", help="of a file for one size; default: three sizes")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    add("--batch-size", type=positive, nargs="+", default=[1], metavar="N", help="default 1")
    add("--repeats", type=positive, default=9, metavar="N", help="timed runs, of which medians are printed; default 9")
    args = parser.parse_args(argv)
    if args.file.suffix not in RUNTIMES or not args.file.is_file():
        raise UserError(f"There is no file NAME.onnx or NAME.pt2 at {args.file}: write one with vim2 export.")
    choose_device(args.device)
    tell(f"making {args.model}")
    torch.manual_seed(0)
    model = create_model(args.model).eval().to(args.device)
    tell(f"loading {args.file}")
    # Only to warn of a file of another processor, PyTorch would compile up to eleven programs, and import itself in a
    # process for each (in PyTorch 2.11 each time): on some machines a minute before the first row.
    with mock.patch("torch._inductor.codecache.get_device_information", return_value={}):
        name, run = RUNTIMES[args.file.suffix](args.file, args.device)
    sizes = [(args.img_size, args.img_size)] if args.img_size else SIZES
    printed = False
    for size in sizes:  # each row as soon as it is known
        for batch in args.batch_size:
            inputs = [t.new_zeros(batch, *t.shape[1:]) for t, _ in examples(model, size).values()]
            for called, first in (("eager mode", model), (name.partition(" ")[0], run)):
                tell(f"{size[0]} x {size[1]}, batch {batch}: first run in {called}")
                with torch.no_grad():
                    first(*inputs)
            tell(f"{size[0]} x {size[1]}, batch {batch}: comparing")
            text = compare(model, name, run, [size], [batch], args.repeats)
            print(text.splitlines()[-1] if printed else text, flush=True)
            printed = True


if __name__ == "__main__":
    sys.exit(run_tool(main))
