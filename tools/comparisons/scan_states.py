#!/usr/bin/env python
"""What the states of a trained ViM2's scans are worth: its accuracy without those of its channel mixers, or of its
token mixers, and their share of what the scans put out.

python tools/comparisons/scan_states.py --model vim2_nano --pretrained --data-dir packs --split tinyimagenet-val.npz

A scan puts out C h + D u, of its state h and its input u. Without states it is D u, by which no step learns of another.
The share is the norm of C h over that of the whole, both summed over directions, on the images of one batch. Training
would make up for some of what is missing: this says what weights use, not what a model without scans would learn.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.command import run_tool

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vim2.benchmark.measuring import positive
from vim2.classify import memory
from vim2.classify.evaluation import evaluate
from vim2.classify.models import autocast, input_config, load_checkpoint_model
from vim2.classify.options import ValidateOptions
from vim2.classify.validation import open_images
from vim2.command.options import resolve
from vim2.command.processes import start_processes
from vim2.command.tables import table
from vim2.mixers import S6, SelectiveChannelMixer, SelectiveTokenMixer

MIXERS = {"channel mixers": SelectiveChannelMixer, "token mixers": SelectiveTokenMixer}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", required=True, metavar="DIR", help="as of classify.py validate")
    add("--split", default="validation", metavar="NAME", help="split, folder, or packs; default %(default)s")
    add("--checkpoint", metavar="FILE", help="best.pth or last.pth of a run, or another file of weights")
    add("--model", metavar="NAME", help="a ViM2; default: the checkpoint's")
    add("--pretrained", action="store_true", help="the model's pretrained weights instead of a checkpoint")
    add("--img-size", type=positive, metavar="PIXELS", help="default: the checkpoint's")
    add("--batch-size", type=positive, default=128, metavar="N", help="images a step; default %(default)s")
    add("--workers", type=int, default=2, metavar="N", help="processes that decode; default %(default)s")
    add("--device", help="default: a GPU if there is one")
    args = vars(parser.parse_args(argv))
    size, given = args.pop("img_size"), {name: value for name, value in args.items() if value is not None}
    o, _ = resolve(ValidateOptions, given=given if size is None else {**given, "img_size": [size]})
    processes = start_processes(o.device, "tools/comparisons/scan_states.py")
    model, facts = load_checkpoint_model(o.checkpoint, o.model, pretrained=o.pretrained)
    model.to(processes.device).eval()
    images = open_images(o, facts, model)
    config = input_config(model, o, size, facts.get("data_config"))
    loader = memory.eval_loader(images, config, o.batch_size, o.workers, processes)
    context = autocast(processes.device, False, "bfloat16")
    print(f"{o.model or facts['arch']}, {config['input_size'][1]} pixels, {len(images)} images\n", flush=True)
    shares = shares_of_states(model, next(iter(loader))[0])
    rows = []
    for name, kind in {"-": (), **MIXERS}.items():
        with without_states(model, kind):
            scores = evaluate(model, loader, processes, context, f"without states of {name}")
        rows.append([name, f"{scores['top1']:.2f}", f"{scores['top5']:.2f}", f"{scores['loss']:.3f}"])
    print(table(["without the states of", "top-1", "top-5", "loss"], rows), end="\n\n")
    print(table(["scan", "share of the states, %"], [[name, f"{100 * share:.0f}"] for name, share in shares.items()]))


def skipped(s6: S6, u: Tensor, merge: bool = True) -> Tensor:
    """D u, in the shape of the S6's output."""
    y = (u if s6.separate_inputs else u.unsqueeze(-2)) * s6.D
    return y.sum(-2) if merge else y


@contextmanager
def without_states(model: nn.Module, kind: type[nn.Module] | tuple) -> Iterator[None]:
    """Scans of these mixers put out D u."""

    def replace(s6, args, kwargs, y):
        return skipped(s6, *args, **kwargs).to(y.dtype)

    mixers = [module for module in model.modules() if isinstance(module, kind)]
    hooks = [mixer.s6.register_forward_hook(replace, with_kwargs=True) for mixer in mixers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def shares_of_states(model: nn.Module, images: Tensor) -> dict[str, float]:
    """By the name of each mixer: the norm of what its scan's states give, over that of all that its scan puts out."""
    shares, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, tuple(MIXERS.values())):

            def note(s6, args, kwargs, y, name=name):
                dims = () if kwargs.get("merge", True) else (-2,)
                states = y - skipped(s6, *args, **kwargs)
                states, y = (t.float().sum(dims) if dims else t.float() for t in (states, y))
                shares[name] = (states.norm() / y.norm()).item()

            hooks.append(module.s6.register_forward_hook(note, with_kwargs=True))
    model(images)
    for hook in hooks:
        hook.remove()
    return shares


if __name__ == "__main__":
    sys.exit(run_tool(main))
