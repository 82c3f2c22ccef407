"""What a model's kernels cost the host: launches of a step, its time by the clock, and the device's share of it."""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch.autograd import DeviceType

from ..ops.observers import ours
from .models import create_model, model_steps, random_image

PROFILED = 3  # steps: what they launch is the same every time, and a profile takes longer to read than to make


def measure_launches(args: argparse.Namespace) -> Iterator[dict]:
    """For every shape and mode, and every model in it: the launches of a step and the device's ms in them, its median
    ms by the clock, and the host's share of these until the step returns.

    At a shape, the models' steps take turns, so that a host that is slower for a while is so for all of them. Rows come
    as soon as they are known.
    """
    for size, shapes in itertools.groupby(args.shapes, lambda shape: shape[0]):
        steps = {name: model_steps(create_model(name, size, args.device), args) for name in args.models}
        for _, batch in shapes:
            image = random_image(size, batch, args)
            for mode in args.modes:
                rows = [{"model": name, "size": size, "batch": batch, "mode": mode} for name in args.models]
                runs = [lambda run=steps[name][mode], image=image: run(image) for name in args.models]
                yield from _in_turn(rows, runs, args)


def _in_turn(rows: list[dict], runs: list[Callable[[], None]], args: argparse.Namespace) -> list[dict]:
    """The rows, each with what its run takes, or why that is not known."""
    measured = []
    for row, run in zip(rows, runs, strict=True):
        try:
            for _ in range(args.warmup):
                run()
            torch.cuda.synchronize(args.device)
            row |= on_device(run, args)
            measured.append((row, run, []))
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        torch.cuda.empty_cache()  # for the other models
    for _ in range(args.repeats):
        for _, run, times in measured:
            times.append(_times(run, args))
    for row, _, times in measured:
        ms, host_ms = (statistics.median(each) * 1e3 for each in zip(*times, strict=True))
        row |= {"ms": ms, "host_us": host_ms * 1e3 / row["launches"]}
    return rows


def _times(run: Callable[[], None], args: argparse.Namespace) -> tuple[float, float]:
    """Seconds until a step is done, and until the host has returned from it."""
    start = time.perf_counter()
    run()
    returned = time.perf_counter()
    torch.cuda.synchronize(args.device)
    return time.perf_counter() - start, returned - start


def on_device(run: Callable[[], None], args: argparse.Namespace) -> dict[str, float]:
    """Kernels and copies of a step, and the device's ms in them, by the profiler; of stages that are replayed, as in a
    step that nobody profiles, those of their replays."""
    ours.profiler = True
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
            for _ in range(PROFILED):
                run()
            torch.cuda.synchronize(args.device)
    finally:
        ours.profiler = False
    events = [event for event in profiler.events() if event.device_type != DeviceType.CPU]
    events = [event for event in events if not event.is_user_annotation]
    spent = sum(event.time_range.elapsed_us() for event in events)
    return {"launches": round(len(events) / PROFILED), "device_ms": spent / 1e3 / PROFILED}
