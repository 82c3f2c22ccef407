#!/usr/bin/env python
"""How near training from memory comes to training on random data that are there already.

    memory_training.py --data-dir packs --train-split "train-*.npz" --val-split val.npz --model vim2_nano \\
        --img-size 64 -b 256 --mixup 0.8 --amp --cuda-graph

takes the options of `vim2 train`, and trains in turn on the images, drawn and augmented, and on one batch of noise,
with everything else alike: Mixup, loss, backward pass, optimiser. It prints the images a second of each pair of epochs,
and the share of the noise's speed that the images have. Nothing is saved; the first pair, which compiles, does not
count.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.command import run_tool

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from vim2.classify.options import TrainOptions
from vim2.classify.training import Run
from vim2.command.options import resolve
from vim2.command.processes import start_processes

PAIRS = 3  # pairs of epochs that count


class Noise:
    """One random batch, as often as an epoch has batches.

    Args:
        steps: Batches an epoch.
        images: Shape of a batch, (B, C, H, W).
        classes: Classes to draw targets from.
        device: The batch's.
    """

    def __init__(self, steps: int, images: tuple[int, ...], classes: int, device: torch.device):
        self.steps = steps
        self.images = torch.randn(images, device=device)
        self.targets = torch.randint(classes, images[:1], device=device)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.steps):
            yield self.images.clone(), self.targets  # cloned, for Mixup changes a batch in place


def main(argv: list[str] | None = None) -> int:
    options, _ = resolve(TrainOptions, sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder:  # nothing is written
        options = replace(options, in_memory=True, output=folder)
        run = Run(options, start_processes(options.device, "memory_training.py"))
    if options.cuda_graph and run.processes.device.type == "cuda":
        run.record()
    shape = (run.batch_size, *run.data_config["input_size"])
    loaders = {
        "memory": run.loader,
        "noise": Noise(len(run.loader), shape, run.num_classes, run.processes.device),
    }
    shares = []
    for epoch in range(PAIRS + 1):
        speeds = {}
        for name, run.loader in loaders.items():
            speeds[name] = run.train_epoch(epoch)["images_per_second"]
        if epoch:
            shares.append(speeds["memory"] / speeds["noise"])
            words = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
            print(f"images/s: {words}; share {shares[-1]:.3f}", flush=True)
    print(f"median share {statistics.median(shares):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
