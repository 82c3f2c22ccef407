"""Times and memory of a step, and what they were measured on."""

import argparse
import contextlib
import datetime
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch._inductor import config as inductor_config

import vim2

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
GIB = 2**30


def positive(text: str) -> int:
    """The type of arguments that count something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def autocast(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    return torch.autocast(args.device_type, AMP[args.amp]) if AMP[args.amp] else contextlib.nullcontext()


def measure(step: Callable[[], None], args: argparse.Namespace) -> dict[str, float | str]:
    """The median time of a step in ms and, on a GPU, the peak of allocated memory in GiB; or why there are none."""
    cuda = args.device_type == "cuda"
    try:
        for _ in range(args.warmup):
            step()
        if not cuda:
            return {"ms": statistics.median(seconds(step) for _ in range(args.repeats)) * 1e3}
        torch.cuda.synchronize(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(args.repeats + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize(args.device)
        times = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
        return {"ms": statistics.median(times), "gib": torch.cuda.max_memory_allocated(args.device) / GIB}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        if cuda:
            torch.cuda.empty_cache()


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def machine(args: argparse.Namespace, medians: bool = True) -> dict[str, str]:
    """What the figures were measured on, with what; and of how many steps times are medians, if they are."""
    versions = f"PyTorch {torch.__version__}, timm {timm.__version__}, vim2 {vim2.__version__}"
    with contextlib.suppress(ImportError):
        import triton

        versions += f", Triton {triton.__version__}"
    if args.device_type == "cuda":
        hardware = torch.cuda.get_device_name(args.device)
        versions += f", CUDA {torch.version.cuda}"
    else:
        hardware = f"{cpu_name()}, {torch.get_num_threads()} threads"
    settings = f"amp {args.amp}, " + (f"torch.compile ({args.torchcompile_mode})" if args.torchcompile else "eager")
    settings += ", weights frozen in inference" if args.torchcompile and inductor_config.freezing else ""
    settings += ", channels_last" if args.channels_last else ""
    if backend := os.environ.get("VIM2_SCAN_BACKEND"):
        settings += f", VIM2_SCAN_BACKEND={backend}"
    if args.modes and medians:
        settings += f"; medians of {args.repeats} after {args.warmup}"
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware,
        "versions": f"Python {platform.python_version()}, {versions}",
        "settings": settings if args.modes else "counts only",
    }


def cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()
