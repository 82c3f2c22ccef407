"""What is compiled when images change their size: Triton's kernels and torch.compile's graphs."""

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator

import torch

from ..ops.backend import HAS_TRITON
from .models import create_model, model_steps, random_image


@contextlib.contextmanager
def counting_compilations() -> Iterator[Counter]:
    """Counts, on leaving, Triton's kernels by name that were compiled for new types or arguments, whether or not a
    cache on the disk had them, and torch.compile's graphs."""
    counts: Counter = Counter()
    with contextlib.ExitStack() as stack:
        if HAS_TRITON:
            from triton import knobs

            def count(*, fn, **_) -> None:
                counts[f"kernel {fn.name}"] += 1

            stack.enter_context(knobs.runtime.scope())
            # not the hook before compiling, which some releases call again for what is under way in a thread
            knobs.runtime.jit_post_compile_hook = count
        graphs = torch._dynamo.utils.counters["stats"]
        before = graphs["unique_graphs"]
        yield counts
        counts["graphs"] = graphs["unique_graphs"] - before


def count_compilations(name: str, args: argparse.Namespace) -> Iterator[dict]:
    """What one model compiles at every image and batch size, in the order in which they are given."""
    steps = model_steps(create_model(name, args.img_size[0], args.device), args)
    for size, batch in args.shapes:
        row = {"model": name, "size": size, "batch": batch}
        for mode in args.modes:
            with counting_compilations() as counts:
                steps[mode](random_image(size, batch, args))
            row[mode] = dict(counts)
        yield row
