#!/usr/bin/env python
"""Parameters, FLOPs, latency, throughput and memory of models, the time of the selective scan alone, and where it goes.

    python tools/benchmark.py --model vim2_tiny --compare timm:swin_tiny_patch4_window7_224 --batch-size 128 --amp bf16
    python tools/benchmark.py --img-size 224 384 512 768 1024 --same-pixels --infer --plot --output runs/benchmark
    python tools/benchmark.py --ops triton mamba_ssm --amp bf16
    python tools/benchmark.py --profile --train --amp bf16
    python tools/benchmark.py --compilations --amp bf16

Times are medians after a warm-up, by CUDA events on a GPU. Training is forward + backward + zero_grad, without an
optimiser. FLOPs follow vision papers: a multiply-add counts one, as published for Swin and VMamba, and the scan, which
has no such pairs, counts each of its 9 N + 2 operations a channel, token and direction; normalisations, activations
and averages count nothing.

A profile has the time of the device in every kind of operator, and on a GPU the floor under it: the time that this card
takes to move the operators' inputs and outputs once (at the rate of a copy, measured in the same run), to multiply (at
the rate of a large product, likewise), or to compute the scans' exponentials (16 a clock and multiprocessor).
"""

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import vim2
from vim2.checkpoints import write_atomically
from vim2.command.errors import UserError
from vim2.ops import CROSS_SCAN, selective_scan
from vim2.ops.backend import BACKENDS, HAS_MAMBA_SSM, HAS_NUMBA, HAS_TRITON, resolve_backend

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
SCAN_SHAPES = ((192, 56), (384, 28), (768, 14), (1536, 7))  # E and the map's side, in the stages of vim2_tiny at 224
D_STATE = 16
MAMBA_KERNELS = "mamba_ssm, kernels alone"
TEN_SIZES = tuple(range(224, 544, 32))
GIB = 2**30
ABSENT = "-"


# ---------------------------------------------------------------------------------------------------------------------
# Models


def create_model(name: str, size: int, device: torch.device | str) -> nn.Module:
    """A timm model for square images of `size` pixels."""
    if not timm.is_model(name):
        raise UserError(
            f"there is no model {name!r}; timm.list_models() names all, {vim2_names()} are of this package."
        )
    with torch.device(device):
        try:
            return timm.create_model(name, img_size=size)  # models with fixed windows or positions want to know it
        except TypeError:
            return timm.create_model(name)


def vim2_names() -> str:
    return ", ".join(timm.list_models("vim2*"))


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module, size: int) -> float:
    """FLOPs for one image, counted on the meta device: the module's docstring says what counts how."""
    image = torch.empty(1, model.pretrained_cfg["input_size"][0], size, size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return multiply_adds(counter)


def multiply_adds(counter: FlopCounterMode) -> float:
    """FLOPs of what ran under `counter`, as the module's docstring counts them."""
    scan = sum(n for op, n in counter.get_flop_counts().get("Global", {}).items() if str(op).startswith("vim2."))
    return (counter.get_total_flops() - scan) / 2 + scan


def measure_model(name: str, size: int, batch: int, args: argparse.Namespace) -> dict:
    """All figures of one model at one image and batch size."""
    shape = create_model(name, size, "meta")
    row = {
        "model": name,
        "size": size,
        "batch": batch,
        "params_m": count_parameters(shape) / 1e6,
        "gflops": count_flops(shape, size) / 1e9,
    }
    if not args.modes:
        return row
    steps = model_steps(create_model(name, size, args.device), args)
    image = random_image(size, batch, args)
    for mode in args.modes:
        row[mode] = measure(lambda step=steps[mode]: step(image), args)
        if "ms" in row[mode]:
            row[mode]["img_s"] = batch / row[mode]["ms"] * 1e3
            row[mode]["mpix_s"] = row[mode]["img_s"] * size**2 / 1e6
    return row


def model_steps(model: nn.Module, args: argparse.Namespace) -> dict[str, Callable[[Tensor], None]]:
    """Inference and training on a batch of images, by the names of the modes."""
    model = model.to(memory_format=torch.channels_last) if args.channels_last else model
    if args.torchcompile:
        torch._dynamo.reset()  # else the limit on recompilations would end compiling after a few models
    run = torch.compile(model, mode=args.torchcompile_mode) if args.torchcompile else model

    def infer(image: Tensor) -> None:
        if model.training:
            model.eval()
        with torch.inference_mode(), autocast(args):
            run(image)

    def train(image: Tensor) -> None:
        if not model.training:
            model.train()
        with autocast(args):
            loss = run(image).float().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return {"infer": infer, "train": train}


def random_image(size: int, batch: int, args: argparse.Namespace) -> Tensor:
    image = torch.randn(batch, 3, size, size, device=args.device)
    return image.to(memory_format=torch.channels_last) if args.channels_last else image


# ---------------------------------------------------------------------------------------------------------------------
# Where a step's time goes


@dataclass
class Work:
    """What an operator moves and computes in one step."""

    calls: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    exponentials: float = 0.0


class CountWork(TorchDispatchMode):
    """Sums up the work of every operator that is called while the mode is on, also in backward passes.

    Bytes are those of inputs and outputs, once a call: what an operator moves if it keeps everything else on the chip.
    """

    WRITE_ONLY = ("copy_", "fill_", "zero_")

    def __init__(self):
        super().__init__()
        self.operators: dict[str, Work] = defaultdict(Work)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # inference mode brings operators whole that consist of others
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        is_view = {storage(t) for t in outputs} <= {storage(t) for t in inputs} and not func._schema.is_mutable
        if is_view or "empty" in name:  # memory that nothing is written to
            return out
        work = self.operators[func._schema.name]
        work.calls += 1
        read = {(t.data_ptr(), t.shape): stored_bytes(t) for t in inputs[name in self.WRITE_ONLY :]}
        work.bytes += sum(read.values()) + sum(map(stored_bytes, outputs))
        if name == "convolution_backward":  # of which the registry's count is wrong where there are groups
            grad, _, weight = args[:3]
            work.flops += 4 * grad.numel() * weight[0].numel()
        elif func.namespace == "aten" and func._overloadpacket in flop_registry:
            work.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args)}
        if func.namespace == "vim2" and "A" in named:  # a scan: one for every state of every step
            work.exponentials += named["A"].numel() * named["u"].shape[:2].numel()
        return out


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def stored_bytes(t: Tensor) -> int:
    """Without what `expand` repeats."""
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride()) if stride)


def device_rates(args: argparse.Namespace) -> dict[str, float]:
    """Bytes, FLOPs (two a multiply-add) and exponentials a second of the GPU; the first two measured."""

    def rate(work: float, step: Callable[[], None]) -> float:
        return work / (measure(step, args)["ms"] / 1e3)

    source = torch.empty(GIB, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    factor = torch.randn(8192, 8192, device=args.device, dtype=AMP[args.amp] or torch.float32)
    rates = {
        "bytes": rate(2 * GIB, lambda: target.copy_(source)),
        "flops": rate(2 * 8192**3, lambda: factor @ factor),
    }
    if HAS_TRITON:
        from triton.runtime import driver

        index = torch.device(args.device).index or 0
        properties = driver.active.utils.get_device_properties(index)
        rates["exponentials"] = 16 * properties["multiprocessor_count"] * properties["sm_clock_rate"] * 1e3
    return rates


def operator_family(name: str) -> str:
    """The row of the profile in which an operator stands, from its qualified name."""
    namespace, _, name = name.partition("::")
    if namespace != "aten":
        return name
    if "conv" in name:
        return "convolutions"
    if "norm" in name:
        return "normalisations"
    if "attention" in name or "softmax" in name:
        return "attention"
    if name in ("mm", "addmm", "bmm", "baddbmm", "linear"):
        return "products"
    if name in ("sum", "mean"):
        return "sums"
    if name in ("_to_copy", "cat", "clone", "constant_pad_nd", "copy_", "index", "roll", "stack"):
        return "copies"
    if name.endswith("_backward") and ("slice" in name or "select" in name):
        return "copies"
    return "element-wise"


def operator_times(step: Callable[[], None], operators: set[str], args: argparse.Namespace) -> dict[str, float]:
    """The device's ms in each of these operators in one step (the CPU's, on a CPU), by the profiler; "" is the rest."""
    cuda = args.device_type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(args.repeats):
            step()
        if cuda:
            torch.cuda.synchronize(args.device)
    times: dict[str, float] = defaultdict(float)
    on_device = 0.0
    for event in profiler.events():
        if event.device_type != DeviceType.CPU:
            on_device += 0.0 if event.is_user_annotation else event.time_range.elapsed_us()
            continue
        spent = sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total
        found = ""
        while event is not None:  # the outermost operator that was counted: what it calls itself is part of it
            found = event.name if event.name in operators else found
            event = event.cpu_parent
        times[found] += spent
    if cuda:
        times[""] = max(0.0, on_device - sum(ms for name, ms in times.items() if name))
    return {name: us / 1e3 / args.repeats for name, us in times.items()}


def profile_model(name: str, size: int, batch: int, mode: str, rates: dict[str, float], args) -> dict:
    """A step's time by families of operators, the longest first, each with its calls and what it moves and computes."""
    step = model_steps(create_model(name, size, args.device), args)[mode]
    image = random_image(size, batch, args)
    whole = measure(lambda: step(image), args)
    if "ms" not in whole:
        raise UserError(f"{name} at {size} pixels and batch {batch}: {whole['error']}.")
    with CountWork() as counted:
        step(image)
    times = operator_times(lambda: step(image), set(counted.operators), args)
    families: dict[str, dict] = {}
    for operator, work in counted.operators.items():
        empty = {"members": {}, "calls": 0, "ms": 0.0, "gb": 0.0, "gflop": 0.0, "gexp": 0.0}
        row = families.setdefault(operator_family(operator), empty)
        row["members"][operator.partition("::")[2]] = times.get(operator, 0.0)
        row["calls"] += work.calls
        row["ms"] += times.get(operator, 0.0)
        row["gb"] += work.bytes / 1e9
        row["gflop"] += work.flops / 1e9
        row["gexp"] += work.exponentials / 1e9
        if rates:
            floors = [getattr(work, kind) / rate * 1e3 for kind, rate in rates.items()]
            row["floor_ms"] = row.get("floor_ms", 0.0) + max(floors)
    rows = [{"operators": family} | row for family, row in families.items()]
    rows.append({"operators": "others", "ms": times.get("", 0.0)})
    rows.sort(key=lambda row: -row["ms"])
    return {"model": name, "size": size, "batch": batch, "mode": mode, "step_ms": whole["ms"], "profile": rows}


# ---------------------------------------------------------------------------------------------------------------------
# Compilations


@contextlib.contextmanager
def counting_compilations() -> Iterator[Counter]:
    """Counts, on leaving, Triton's kernels by name that were compiled for new types or arguments, whether or not a
    cache on the disk had them, and torch.compile's graphs."""
    counts: Counter = Counter()
    with contextlib.ExitStack() as stack:
        if HAS_TRITON:
            from triton import knobs

            def count(*, fn, **_) -> None:  # returning None lets Triton go on
                counts[f"kernel {fn.name}"] += 1

            stack.enter_context(knobs.runtime.scope())
            knobs.runtime.jit_cache_hook = count
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


# ---------------------------------------------------------------------------------------------------------------------
# The scan alone


def scan_backends(device_type: str) -> list[str]:
    """What --ops measures by default: all that run here, but for PyTorch's form on a GPU, which takes minutes."""
    if device_type == "cuda":
        return ["triton"] * HAS_TRITON + ["mamba_ssm"] * HAS_MAMBA_SSM or ["torch"]
    return ["numba"] * HAS_NUMBA + ["torch"]


def scan_inputs(batch: int, features: int, side: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random inputs of `selective_scan` over a side x side map; the parameters in float32, as in a model."""
    generator = torch.Generator(device).manual_seed(0)
    lanes = len(CROSS_SCAN)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    map_shape = (batch, side, side)
    inputs = {
        "u": random(*map_shape, features).to(dtype),
        "delta": random(*map_shape, lanes, features).to(dtype),
        "A": -torch.arange(1.0, D_STATE + 1, device=device).expand(lanes, features, -1).contiguous(),
        "B": random(*map_shape, lanes, D_STATE).to(dtype),
        "C": random(*map_shape, lanes, D_STATE).to(dtype),
        "D": random(lanes, features),
        "delta_bias": random(lanes, features) - 4,  # steps around 0.02, as a model has
    }
    return {name: t.requires_grad_() for name, t in inputs.items()}


def mamba_kernels(inputs: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
    """mamba-ssm's kernels alone at the same work: directions as groups of channels, their copies already made."""
    import selective_scan_cuda

    from vim2.ops.mamba_ssm_scan import kernel_arguments

    side = inputs["u"].shape[1]
    inputs = {name: t.detach() for name, t in inputs.items()}
    maps = {name: inputs[name].flatten(1, 2) for name in ("u", "delta", "B", "C")}
    arguments = kernel_arguments(**inputs | maps, orders=CROSS_SCAN, height=side, width=side)

    def infer() -> None:
        selective_scan_cuda.fwd(*arguments, True)

    def train() -> None:
        out, states = selective_scan_cuda.fwd(*arguments, True)
        selective_scan_cuda.bwd(*arguments, out, states, None, None, True, False)

    return {"infer": infer, "train": train}


def scan_steps(name: str, inputs: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
    """Forward, and forward + backward, of one backend."""
    if name == MAMBA_KERNELS:
        return mamba_kernels(inputs)

    def infer() -> None:
        with torch.no_grad():
            selective_scan(**inputs, orders=CROSS_SCAN, backend=name)

    grad = torch.ones_like(inputs["u"])

    def train() -> None:
        y = selective_scan(**inputs, orders=CROSS_SCAN, backend=name)
        torch.autograd.grad(y, list(inputs.values()), grad)

    return {"infer": infer, "train": train}


def measure_scan(name: str, features: int, side: int, batch: int, args: argparse.Namespace) -> dict:
    steps = scan_steps(name, scan_inputs(batch, features, side, AMP[args.amp] or torch.float32, args.device))
    row = {"scan": name, "features": features, "length": side * side, "batch": batch}
    return row | {mode: measure(steps[mode], args) for mode in args.modes}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


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


def machine(args: argparse.Namespace) -> dict[str, str]:
    """What the figures were measured on, with what."""
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
    if args.modes and not args.compilations:
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


# ---------------------------------------------------------------------------------------------------------------------
# Reporting


def table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table, without the columns that hold nothing."""
    columns = [column for column in zip(header, *rows) if any(cell != ABSENT for cell in column[1:])]
    header, *rows = zip(*columns)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(row: dict, mode: str, key: str, digits: int) -> str:
    """One cell: a number, or on its absence the reason."""
    if mode not in row:
        return ABSENT
    return f"{row[mode][key]:.{digits}f}" if key in row[mode] else row[mode].get("error", ABSENT)


def model_table(rows: list[dict]) -> str:
    header = ["model", "size", "batch", "params M", "GFLOPs"]
    header += ["infer ms", "infer img/s", "infer Mpix/s", "infer GiB", "train ms", "train img/s", "train GiB"]
    cells = [("infer", "ms", 2), ("infer", "img_s", 1), ("infer", "mpix_s", 2), ("infer", "gib", 2)]
    cells += [("train", "ms", 2), ("train", "img_s", 1), ("train", "gib", 2)]
    lines = []
    for row in rows:
        line = [row["model"], str(row["size"]), str(row["batch"]), f"{row['params_m']:.2f}", f"{row['gflops']:.2f}"]
        lines.append(line + [figure(row, *cell) for cell in cells])
    return table(header, lines)


def scan_table(rows: list[dict]) -> str:
    header = ["scan", "E", "L", "batch", "forward ms", "forward GiB", "forward + backward ms", "forward + backward GiB"]
    cells = [("infer", "ms", 3), ("infer", "gib", 2), ("train", "ms", 3), ("train", "gib", 2)]
    lines = []
    for row in rows:
        line = [row["scan"], str(row["features"]), str(row["length"]), str(row["batch"])]
        lines.append(line + [figure(row, *cell) for cell in cells])
    return table(header, lines)


def profile_table(result: dict) -> str:
    """The longest first; the floor beside its operator, and how many times longer the operator took."""
    rows = result["profile"]
    total = sum(row["ms"] for row in rows)
    floor = sum(row.get("floor_ms", 0.0) for row in rows)
    lines = []
    for row in [*rows, {"operators": "all", "ms": total, "floor_ms": floor}]:
        members = sorted(row.get("members", {}).items(), key=lambda item: -item[1])
        named = ", ".join(f"{name} {ms:.2f}" for name, ms in members[:3]) if len(members) > 1 else ""
        name = f"{row['operators']} ({named})" if named else row["operators"]
        line = [name, str(row.get("calls", ABSENT)), f"{row['ms']:.3f}", f"{row['ms'] / total:.1%}"]
        line += [f"{row[key]:.2f}" if row.get(key) else ABSENT for key in ("gb", "gflop", "gexp")]
        has_floor = row.get("floor_ms") and row["ms"]
        line += [f"{row['floor_ms']:.3f}", f"{row['ms'] / row['floor_ms']:.1f}"] if has_floor else [ABSENT, ABSENT]
        lines.append(line)
    header = ["operators", "calls", "ms", "share", "GB", "GFLOP", "G exponentials", "floor, ms", "time / floor"]
    title = f"{result['model']}, {result['size']} x {result['size']}, batch {result['batch']}, {result['mode']}: "
    title += f"{result['step_ms']:.2f} ms a step; by operators, {total:.2f} ms:"
    return f"{title}\n\n{table(header, lines)}"


def compilation_table(rows: list[dict]) -> str:
    header = ["model", "size", "batch"]
    header += [f"{mode}, {what}" for mode in ("infer", "train") for what in ("Triton kernels", "torch.compile graphs")]
    lines = []
    for row in rows:
        line = [row["model"], str(row["size"]), str(row["batch"])]
        for mode in ("infer", "train"):
            counts = row.get(mode)
            kernels = sum(n for name, n in counts.items() if name != "graphs") if counts else 0
            line += [str(kernels), str(counts["graphs"])] if counts else [ABSENT, ABSENT]
        lines.append(line)
    return table(header, lines)


def plot(rows: list[dict], path: Path, where: str) -> None:
    """Throughput in Mpix/s over the image's side, one panel for inference and one for training."""
    from matplotlib.figure import Figure

    modes = [mode for mode in ("infer", "train") if any("mpix_s" in row.get(mode, {}) for row in rows)]
    image = Figure(figsize=(5 * max(1, len(modes)), 4), layout="constrained")
    for axes, mode in zip(image.subplots(1, max(1, len(modes)), squeeze=False)[0], modes):
        for name in dict.fromkeys(row["model"] for row in rows):
            points = [(r["size"], r[mode]["mpix_s"]) for r in rows if r["model"] == name and "mpix_s" in r[mode]]
            axes.plot(*zip(*sorted(points)), marker="o", label=name)
        axes.set(title={"infer": "inference", "train": "training"}[mode], xlabel="side, pixels", ylabel="Mpix/s")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    image.suptitle(where, fontsize="small")
    image.savefig(path, dpi=150)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", metavar="NAME", help="models to measure; default vim2_tiny, or none with --ops")
    add("--compare", nargs="+", default=[], metavar="timm:NAME", help="others to measure in the same run")
    scans = "only the selective scan, at vim2_tiny's stages, 4 directions, N = 16; default: what is fast here"
    add("--ops", nargs="*", choices=BACKENDS[1:], metavar="BACKEND", help=scans)
    add("--profile", action="store_true", help="only where the models' time goes")
    add("--compilations", action="store_true", help="only what is compiled at every size, by default of ten sizes")
    add("--batch-size", type=positive, nargs="+", metavar="N", help="one or several; default 128 on a GPU, else 1")
    add("--img-size", type=positive, nargs="+", metavar="PIXELS", help="one or several; default 224")
    add("--same-pixels", action="store_true", help="batch sizes are the first image size's; others get as many pixels")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU if there is one")
    add("--amp", choices=tuple(AMP), default="off", help="autocast's type (with --ops, the activations'); default off")
    add("--channels-last", action="store_true", help="models and images in torch.channels_last")
    add("--torchcompile", action="store_true", help="compile the models")
    modes = "torch.compile's mode; TORCHINDUCTOR_FREEZING=1 in the environment also freezes the weights in inference"
    add("--torchcompile-mode", choices=tuple(list_mode_options()), default="default", help=modes)
    add("--infer", action="store_true", help="measure inference only")
    add("--train", action="store_true", help="measure training only")
    add("--count", action="store_true", help="parameters and FLOPs only, no times")
    add("--warmup", type=positive, metavar="N", help="untimed steps; default 10 on a GPU, else 2")
    add("--repeats", type=positive, metavar="N", help="timed steps; default 30 on a GPU, else and for profiles 5")
    add("--output", type=Path, metavar="DIR", help="also write benchmark.md and benchmark.json there")
    add("--plot", action="store_true", help="also write benchmark.png, throughput over resolution; wants --output")
    args = parser.parse_args(argv)

    args.device_type = args.device.partition(":")[0]
    if args.device_type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {args.device!r}.")
    if args.device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; use --device cpu.")
    ops = args.ops is not None
    others = ops or args.profile or args.compilations
    if args.count and (others or args.infer or args.train or args.plot):
        raise UserError("--count measures no times: leave out every option that does.")
    if args.profile + args.compilations + ops > 1:
        raise UserError("--ops, --profile and --compilations are measured apart: give one of them.")
    if args.profile and args.torchcompile:
        raise UserError("--profile shows the operators of eager models: leave out --torchcompile.")
    if args.torchcompile_mode != "default" and not args.torchcompile:
        raise UserError("--torchcompile-mode wants --torchcompile.")
    if args.compilations and args.device_type == "cpu" and not args.torchcompile:
        raise UserError("--compilations on a CPU counts torch.compile's graphs alone: give --torchcompile, too.")
    if args.plot and others:
        raise UserError("--plot draws the models' throughput: leave out --ops, --profile and --compilations.")
    if args.plot and not args.output:
        raise UserError("--plot wants --output, the folder to write to.")
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UserError("--plot wants matplotlib: pip install matplotlib") from None
    on_gpu = args.device_type == "cuda"
    args.batch_size = args.batch_size or [128 if on_gpu else 1]
    args.warmup = args.warmup or (10 if on_gpu else 2)
    args.repeats = args.repeats or (30 if on_gpu and not args.profile else 5)
    modes = [mode for mode in ("infer", "train") if getattr(args, mode)] or ["infer", "train"]
    args.modes = [] if args.count else modes
    args.img_size = args.img_size or (list(TEN_SIZES) if args.compilations else [224])
    args.shapes = [
        (size, max(1, batch * args.img_size[0] ** 2 // size**2) if args.same_pixels else batch)
        for size in args.img_size
        for batch in args.batch_size
    ]
    args.models = (args.model or ([] if ops else ["vim2_tiny"])) + args.compare
    args.models = [name.removeprefix("timm:") for name in args.models]
    if ops:
        args.ops = args.ops or scan_backends(args.device_type)
        try:
            for name in args.ops:
                resolve_backend(name, torch.empty(0, device=args.device), scan=True)
        except RuntimeError as error:
            raise UserError(str(error)) from None
        args.ops += [MAMBA_KERNELS] * ("mamba_ssm" in args.ops)
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def measure_all(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Rows as they are measured, each with the name of its table."""
    rates = device_rates(args) if args.profile and args.device_type == "cuda" else {}
    for name in args.models:
        if args.compilations:
            yield from (("compilations", row) for row in count_compilations(name, args))
            continue
        for size, batch in args.shapes:
            if not args.profile:
                yield "models", measure_model(name, size, batch, args)
            for mode in args.modes * args.profile:
                yield "profiles", profile_model(name, size, batch, mode, rates, args)
    for name in args.ops or ():
        for features, side in SCAN_SHAPES:
            for batch in args.batch_size:
                yield "scans", measure_scan(name, features, side, batch, args)


def report(results: dict) -> str:
    about = results["machine"]
    parts = [f"{about['hardware']}, {about['date']}. {about['versions']}. {about['settings']}."]
    for kind, to_table in (("models", model_table), ("scans", scan_table), ("compilations", compilation_table)):
        parts += [to_table(results[kind])] if kind in results else []
    parts += [profile_table(result) for result in results.get("profiles", ())]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        results: dict = {"machine": machine(args)}
        for kind, row in measure_all(args):
            results.setdefault(kind, []).append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)  # long runs show where they are
            if args.output:  # and leave what they have
                write_atomically(args.output / "benchmark.md", report(results))
                write_atomically(args.output / "benchmark.json", json.dumps(results, indent=2) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(results), end="")
    if args.plot:
        about = results["machine"]
        plot(results["models"], args.output / "benchmark.png", f"{about['hardware']}, {about['date']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
