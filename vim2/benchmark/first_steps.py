"""The first steps of a model on a machine that has compiled nothing of it yet."""

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch

from ..command.own_models import import_models
from ..command.processes import ctrl_c_put_off, die_of_ctrl_c
from .measuring import seconds
from .models import create_model, model_steps, random_image

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")  # where Triton and torch.compile keep what they have compiled


def measure_first_steps(name: str, args: argparse.Namespace) -> Iterator[dict]:
    """Seconds of one model's first step and of its second, in each mode after the other, at every image and batch size.

    Each size has a process of its own and empty caches. The seconds hold all that PyTorch's libraries prepare on their
    first use, but neither imports nor what a process does first of all on a GPU.
    """
    for size, batch in args.shapes:
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process,
        ):
            with ctrl_c_put_off():
                row = process.submit(_time_first_steps, name, size, batch, args, folder)
            yield row.result()


def _time_first_steps(name: str, size: int, batch: int, args: argparse.Namespace, folder: str) -> dict:
    die_of_ctrl_c()
    os.environ.update({cache: os.path.join(folder, cache) for cache in CACHES})
    import_models(args.imports)
    steps = model_steps(create_model(name, size, args.device), args)
    image = random_image(size, batch, args)

    def step(mode: str) -> None:
        steps[mode](image)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)

    row = {"model": name, "size": size, "batch": batch}
    for mode in args.modes:
        first, second = (seconds(lambda mode=mode: step(mode)) for _ in range(2))
        row[mode] = {"first_s": first, "second_s": second}
    return row
