#!/usr/bin/env python
"""Parameters, FLOPs, latency, throughput and memory of models, and the time of the selective scan alone.

    python tools/benchmark.py --model vim2_tiny --compare timm:swin_tiny_patch4_window7_224 --batch-size 128 --amp bf16
    python tools/benchmark.py --img-size 224 384 512 768 1024 --batch-size 6 --infer --plot --output runs/benchmark
    python tools/benchmark.py --ops --amp bf16

Times are medians after a warm-up, by CUDA events on a GPU. Training is forward + backward + zero_grad, without an
optimiser. FLOPs follow vision papers: a multiply-add counts one, as published for Swin and VMamba, and the scan, which
has no such pairs, counts each of its 9 N + 2 operations a channel, token and direction; normalisations, activations
and averages count nothing.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vim2
from vim2.checkpoints import write_atomically
from vim2.ops import CROSS_SCAN, selective_scan

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as mamba_scan
except ImportError:
    mamba_scan = None

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
SCAN_SHAPES = ((192, 56), (384, 28), (768, 14), (1536, 7))  # E and the map's side, in the stages of vim2_tiny at 224
D_STATE = 16
GIB = 2**30
ABSENT = "-"


class UserError(Exception):
    """A mistake in what was asked for; printed as one line."""


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
    model = create_model(name, size, args.device)
    image = torch.randn(batch, 3, size, size, device=args.device)
    if args.channels_last:
        model, image = model.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
    if args.torchcompile:
        torch._dynamo.reset()  # else the limit on recompilations would end compiling after a few models
    run = torch.compile(model) if args.torchcompile else model

    def infer() -> None:
        with torch.inference_mode(), autocast(args):
            run(image)

    def train() -> None:
        with autocast(args):
            loss = run(image).float().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    for mode, step in (("infer", infer), ("train", train)):
        if mode in args.modes:
            model.train(mode == "train")
            row[mode] = measure(step, args)
            if "ms" in row[mode]:
                row[mode]["img_s"] = batch / row[mode]["ms"] * 1e3
                row[mode]["mpix_s"] = row[mode]["img_s"] * size**2 / 1e6
    return row


# ---------------------------------------------------------------------------------------------------------------------
# The scan alone


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


def mamba_inputs(batch: int, features: int, side: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The same work for mamba-ssm: the directions side by side as groups of channels, their copies already made."""
    inputs = {name: t.detach() for name, t in scan_inputs(batch, features, side, dtype, device).items()}
    lanes, length = len(CROSS_SCAN), side * side

    def channels_first(t: Tensor) -> Tensor:  # (batch, H, W, K, X) -> (batch, K, X, L)
        return t.flatten(1, 2).permute(0, 2, 3, 1).contiguous()

    inputs["u"] = channels_first(inputs["u"].unsqueeze(-2).expand(-1, -1, -1, lanes, -1)).view(batch, -1, length)
    inputs["delta"] = channels_first(inputs["delta"]).view(batch, -1, length)
    inputs["B"], inputs["C"] = channels_first(inputs["B"]), channels_first(inputs["C"])
    for name in ("A", "D", "delta_bias"):
        inputs[name] = inputs[name].flatten(0, 1)
    return {name: t.requires_grad_() for name, t in inputs.items()}


def measure_scan(name: str, features: int, side: int, batch: int, args: argparse.Namespace) -> dict:
    """Forward, and forward + backward, of one implementation at one shape."""
    make, scan, options = {
        "vim2": (scan_inputs, selective_scan, dict(orders=CROSS_SCAN)),
        "mamba_ssm": (mamba_inputs, mamba_scan, dict(delta_softplus=True)),
    }[name]
    inputs = make(batch, features, side, AMP[args.amp] or torch.float32, args.device)
    with torch.no_grad():
        grad = torch.ones_like(scan(**inputs, **options))

    def infer() -> None:
        with torch.no_grad():
            scan(**inputs, **options)

    def train() -> None:
        torch.autograd.grad(scan(**inputs, **options), list(inputs.values()), grad)

    row = {"scan": name, "features": features, "length": side * side, "batch": batch}
    return row | {
        mode: measure(step, args) for mode, step in (("infer", infer), ("train", train)) if mode in args.modes
    }


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
    settings = f"amp {args.amp}, {'torch.compile' if args.torchcompile else 'eager'}"
    settings += ", channels_last" if args.channels_last else ""
    if backend := os.environ.get("VIM2_SCAN_BACKEND"):
        settings += f", VIM2_SCAN_BACKEND={backend}"
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware,
        "versions": f"Python {platform.python_version()}, {versions}",
        "settings": f"{settings}; medians of {args.repeats} after {args.warmup}" if args.modes else "counts only",
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
    add("--ops", action="store_true", help="the selective scan alone at vim2_tiny's stage shapes, 4 directions, N = 16")
    add("--batch-size", type=positive, nargs="+", metavar="N", help="one or several; default 128 on a GPU, else 1")
    add("--img-size", type=positive, nargs="+", default=[224], metavar="PIXELS", help="one or several; default 224")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU if there is one")
    add("--amp", choices=tuple(AMP), default="off", help="autocast's type (with --ops, the activations'); default off")
    add("--channels-last", action="store_true", help="models and images in torch.channels_last")
    add("--torchcompile", action="store_true", help="compile the models")
    add("--infer", action="store_true", help="measure inference only")
    add("--train", action="store_true", help="measure training only")
    add("--count", action="store_true", help="parameters and FLOPs only, no times")
    add("--warmup", type=positive, metavar="N", help="untimed steps; default 10 on a GPU, else 2")
    add("--repeats", type=positive, metavar="N", help="timed steps; default 30 on a GPU, else 5")
    add("--output", type=Path, metavar="DIR", help="also write benchmark.md and benchmark.json there")
    add("--plot", action="store_true", help="also write benchmark.png, throughput over resolution; wants --output")
    args = parser.parse_args(argv)

    args.device_type = args.device.partition(":")[0]
    if args.device_type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {args.device!r}.")
    if args.device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; use --device cpu.")
    if args.count and (args.ops or args.infer or args.train or args.plot):
        raise UserError("--count measures no times: leave out --ops, --infer, --train and --plot.")
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
    args.repeats = args.repeats or (30 if on_gpu else 5)
    args.modes = {mode for mode in ("infer", "train") if getattr(args, mode)} or {"infer", "train"}
    args.modes = set() if args.count else args.modes
    args.models = (args.model or ([] if args.ops else ["vim2_tiny"])) + args.compare
    args.models = [name.removeprefix("timm:") for name in args.models]
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def measure_all(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Rows as they are measured, each with the name of its table."""
    for name in args.models:
        for size in args.img_size:
            for batch in args.batch_size:
                yield "models", measure_model(name, size, batch, args)
    if args.ops:
        for name in ("vim2", "mamba_ssm") if mamba_scan and args.device_type == "cuda" else ("vim2",):
            for features, side in SCAN_SHAPES:
                for batch in args.batch_size:
                    yield "scans", measure_scan(name, features, side, batch, args)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        results = {"machine": machine(args), "models": [], "scans": []}
        for kind, row in measure_all(args):
            results[kind].append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)  # long runs show where they are
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = results["machine"]
    where = f"{about['hardware']}, {about['date']}"
    parts = [f"{where}. {about['versions']}. {about['settings']}."]
    parts += [model_table(results["models"])] if results["models"] else []
    parts += [scan_table(results["scans"])] if results["scans"] else []
    report = "\n\n".join(parts) + "\n"
    print(report, end="")
    if args.output:
        write_atomically(args.output / "benchmark.md", report)
        write_atomically(args.output / "benchmark.json", json.dumps(results, indent=2) + "\n")
        if args.plot:
            plot(results["models"], args.output / "benchmark.png", where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
