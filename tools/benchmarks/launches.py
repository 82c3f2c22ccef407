"""What a model's kernels cost the host: launches of a step, its time by the clock, and the device's share of it."""

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch

from benchmarks.measuring import seconds
from benchmarks.models import create_model, model_steps, random_image


def measure_launches(args: argparse.Namespace) -> Iterator[dict]:
    """Launches and the device's ms in one step, and its median ms by the clock, of all models, shapes and modes.

    The steps take turns, so that a host that is slower for a while is so for all of them.
    """
    steps: list[tuple[dict, Callable[[], None]]] = []
    for name in args.models:
        for size, batch in args.shapes:
            model, image = create_model(name, size, args.device), random_image(size, batch, args)
            for mode in args.modes:
                run = model_steps(model, args)[mode]
                row = {"model": name, "size": size, "batch": batch, "mode": mode}
                steps.append((row, lambda run=run, image=image: _to_the_end(run, image, args)))
    for row, step in steps:
        for _ in range(args.warmup):
            step()
        row |= on_device(step, args.repeats)
    times = [[seconds(step) for _, step in steps] for _ in range(args.repeats)]
    for (row, _), of_step in zip(steps, zip(*times, strict=True), strict=True):
        yield row | {"ms": statistics.median(of_step) * 1e3}


def _to_the_end(run: Callable[[torch.Tensor], None], image: torch.Tensor, args: argparse.Namespace) -> None:
    run(image)
    torch.cuda.synchronize(args.device)


def on_device(step: Callable[[], None], repeats: int) -> dict[str, float]:
    """Kernels and copies of a step, and the device's ms in them, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(repeats):
            step()
    events = [event for event in profiler.events() if event.device_type != torch.autograd.DeviceType.CPU]
    events = [event for event in events if not event.is_user_annotation]
    spent = sum(event.time_range.elapsed_us() for event in events)
    return {"launches": round(len(events) / repeats), "device_ms": spent / 1e3 / repeats}
