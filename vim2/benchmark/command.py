"""Parameters, FLOPs, latency, throughput and memory of models, the time of the selective scan alone, and where it goes.

    vim2 benchmark --model vim2_tiny --compare timm:swin_tiny_patch4_window7_224 --batch-size 128 --amp bf16
    vim2 benchmark --img-size 224 384 512 768 1024 --same-pixels --infer --plot --output runs/benchmark
    vim2 benchmark --ops triton mamba_ssm --amp bf16
    vim2 benchmark --profile --train --amp bf16
    vim2 benchmark --compilations --amp bf16
    vim2 benchmark --launches --model vim2_nano vim2_tiny --batch-size 1 8 128 --amp bf16
    vim2 benchmark --first-step --model vim2_tiny_d1 --amp bf16

Times are medians after a warm-up, by CUDA events on a GPU. Training is forward + backward + zero_grad, without an
optimiser. FLOPs follow vision papers: a multiply-add counts one, as published for Swin and VMamba, and the scan, which
has no such pairs, counts each of its 9 N + 2 operations a channel, token and direction; normalisations, activations
and averages count nothing. They are counted on tensors without values, which some models cannot take: a dash stands for
theirs.

A profile has the time of the device in every kind of operator, and on a GPU the floor under it: the time that this card
takes to move the operators' inputs and outputs once (at the rate of a copy, measured in the same run), to multiply (at
the rate of a large product, likewise), or to compute the scans' exponentials (16 a clock and multiprocessor). Operators
are called one by one for it: stages are not replayed, and gradients that they hand on in training are added up by
kernels of their own. One of training also has what operators keep for the backward pass, besides parameters and images:
memory that several keep stands with the first of them.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch._inductor import list_mode_options

from ..command.errors import UserError
from ..command.options import Parser
from ..command.outputs import make_folder
from ..command.own_models import import_models
from ..command.places import is_place
from ..command.processes import require_backend
from ..command.progress import say
from ..files import write_atomically
from ..ops.backend import BACKENDS
from .compilations import count_compilations
from .first_steps import measure_first_steps
from .kept import measure_kept
from .launches import measure_launches
from .measuring import AMP, machine, positive
from .models import measure_model, model_size
from .profiles import device_rates, profile_model
from .reporting import plot, report
from .scans import MAMBA_KERNELS, SCAN_SHAPES, measure_scan, scan_backends

TEN_SIZES = tuple(range(224, 544, 32))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked, and with what follows from them.

    Besides argparse's: `device_type`; `shapes`, pairs of an image size and a batch size; `modes`, those of "infer" and
    "train" that are measured; `models`, the names of all; `ops`, the backends of the scan that are.

    Raises:
        UserError: Options that do not go together, or a device, backend or package that is not there.
    """
    args = _make_parser().parse_args(argv)
    args.device_type = _device_type(args.device)
    _check_together(args)
    on_gpu, scans_alone = args.device_type == "cuda", args.ops is not None
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
    args.models = (args.model or ([] if scans_alone else ["vim2_tiny"])) + args.compare
    args.models = [name.removeprefix("timm:") for name in args.models]
    args.ops = (args.ops or scan_backends(args.device_type)) if scans_alone else []
    scanning = args.modes and (args.imports or any("vim2" in name or is_place(name) for name in args.models))
    for name in [*args.ops, *[None] * bool(scanning)]:
        require_backend(args.device_type, name)
    args.ops += [MAMBA_KERNELS] * ("mamba_ssm" in args.ops)
    return args


def _make_parser() -> Parser:
    parser = Parser(prog="vim2 benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    models = (
        "models to measure, such as vim2_tiny:d_state=4,dims=(64,128,256,512), local-dir:FOLDER or hf-hub:USER/NAME; "
        "default vim2_tiny, or none with --ops"
    )
    add("--model", nargs="+", metavar="NAME[:K=V,...]", help=models)
    add("--compare", nargs="+", default=[], metavar="timm:NAME", help="others to measure in the same run")
    own = "Python files, or modules, that register models of your own with timm"
    add("--imports", nargs="+", default=[], metavar="FILE", help=own)
    scans = "only the selective scan, at vim2_tiny's stages, 4 directions, N = 16; default: what is fast here"
    add("--ops", nargs="*", choices=BACKENDS[1:], metavar="BACKEND", help=scans)
    add("--profile", action="store_true", help="only where the models' time goes, and memory in training")
    add("--compilations", action="store_true", help="only what is compiled at every size, by default of ten sizes")
    add("--launches", action="store_true", help="only what launching kernels costs the host (on a GPU)")
    add("--first-step", action="store_true", help="only how long the first steps take where nothing is compiled yet")
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
    return parser


def _device_type(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no {name}, of {torch.cuda.device_count()} GPUs; use another, or --device cpu.")
    return device.type


def _check_together(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    ops = args.ops is not None
    others = ops or args.profile or args.compilations or args.launches or args.first_step
    if args.count and (others or args.infer or args.train or args.plot):
        raise UserError("--count measures no times: leave out every option that does.")
    if args.profile + args.compilations + args.launches + args.first_step + ops > 1:
        raise UserError(
            "--ops, --profile, --compilations, --launches and --first-step are measured apart: give one of them."
        )
    if args.launches and args.device_type == "cpu":
        raise UserError("--launches counts what a GPU is given to do, and there is none here.")
    if args.profile and args.torchcompile:
        raise UserError("--profile shows the operators of eager models: leave out --torchcompile.")
    if args.torchcompile_mode != "default" and not args.torchcompile:
        raise UserError("--torchcompile-mode wants --torchcompile.")
    if args.compilations and args.device_type == "cpu" and not args.torchcompile:
        raise UserError("--compilations on a CPU counts torch.compile's graphs alone: give --torchcompile, too.")
    if args.plot and others:
        raise UserError(
            "--plot draws throughput: leave out --ops, --profile, --compilations, --launches and --first-step."
        )
    if args.plot and not args.output:
        raise UserError("--plot wants --output, the folder to write to.")
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UserError("--plot wants matplotlib: pip install matplotlib") from None


def measure_all(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Rows as they are measured, each with the name of its table."""
    rates = device_rates(args) if args.profile and args.device_type == "cuda" else {}
    if args.launches:
        yield from (("launches", row) for row in measure_launches(args))
        return
    for name in args.models:
        if args.compilations:
            yield from (("compilations", row) for row in count_compilations(name, args))
            continue
        if args.first_step:
            yield from (("first_steps", row) for row in measure_first_steps(name, args))
            continue
        for size, batch in args.shapes:
            if not args.profile:
                yield "models", measure_model(name, size, batch, args)
            for mode in args.modes * args.profile:
                row = profile_model(name, size, batch, mode, rates, args)
                if mode == "train":
                    row["kept"] = measure_kept(name, size, batch, args)
                yield "profiles", row
    for name in args.ops:
        for features, side in SCAN_SHAPES:
            for batch in args.batch_size:
                yield "scans", measure_scan(name, features, side, batch, args)


def benchmark(argv: list[str]) -> None:
    """Measure, and print and write tables.

    Args:
        argv: The command line.

    Raises:
        UserError: Anything that the user can put right.
    """
    args = parse(argv)
    import_models(args.imports)
    if args.output:
        make_folder(args.output)
    for name in args.models:
        for size in args.img_size:
            model_size(name, size, args.device)  # what it refuses is said before anything is measured
    results: dict = {"machine": machine(args, medians=not (args.compilations or args.first_step))}
    for kind, row in measure_all(args):
        results.setdefault(kind, []).append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)  # long runs show where they are
        if args.output:  # and leave what they have
            write_atomically(args.output / "benchmark.md", report(results))
            write_atomically(args.output / "benchmark.json", json.dumps(results, indent=2) + "\n")
    say(report(results).rstrip("\n"))
    if args.plot:
        about = results["machine"]
        plot(results["models"], args.output / "benchmark.png", f"{about['hardware']}, {about['date']}")
