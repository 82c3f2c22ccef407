"""The command `vim2 export`."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.models._features import FeatureGetterNet
from torch import nn

from ..checkpoints import save_checkpoint, save_half_precision
from ..classify import validate
from ..classify.facts import no_terms_told, weights_file
from ..classify.models import check_reads, create_model, input_config, load_checkpoint_model
from ..classify.options import InputOptions
from ..classify.sources import find_model
from ..classify.validation import label_names
from ..command.errors import UserError
from ..command.options import Parser
from ..command.outputs import keep_source, make_folder, make_folder_of
from ..command.places import local_folder
from ..command.progress import say, say_if_slow
from ..files import NotWritten
from ..vim2 import ViM2
from .comparison import ONNX_RUNTIMES, SIZES, compare, run_onnxruntime, run_pt2
from .examples import first_convolution
from .forecaster import ForecasterModule
from .hub import export_timm
from .onnx import DEFAULT_OPSET, MIN_OPSET, SCANS, export_onnx
from .pt2 import MIN_DYNAMIC, export_pt2

if TYPE_CHECKING:
    from ..forecast import Forecaster

__all__ = ["export"]

PROGRAMS = ("onnx", "pt2")  # the formats that run without this package
FORMATS_OF = {  # of options that not all formats have
    "features_only": PROGRAMS,
    "img_size": PROGRAMS,
    "compare": PROGRAMS,
    "batch_size": PROGRAMS,
    "device": PROGRAMS,
    "opset": ("onnx",),
    "scan": ("onnx",),
    "data_dir": ("safetensors",),
    "split": ("safetensors",),
}
MAX_LOSS = 0.1  # points of top-1 accuracy that half precision may cost


def export(argv: Sequence[str]) -> None:
    """Write a model for runtimes other than PyTorch, or to share.

    Args:
        argv: The command line.

    Raises:
        UserError: Anything that the user can put right.
    """
    args = _make_parser().parse_args(argv)
    _check_arguments(args)
    torch.manual_seed(0)
    model, facts = _load(args)
    _prepare_output(args.output, is_folder=args.format == "timm")
    try:
        if args.format in PROGRAMS:
            _export_program(model, facts, args)
        elif args.format == "timm":
            _export_timm(model, facts, args)
        else:
            _export_weights(model, facts, args)
    except NotWritten as error:
        raise UserError(f"{error.strerror}: choose another --output.") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"Nothing can be written to {args.output} ({reason}): choose another --output.") from None


def _make_parser() -> Parser:
    parser = Parser(prog="vim2 export", description="Write a model for runtimes other than PyTorch, or to share.")
    add = parser.add_argument
    named = "a ViM2, another model of timm's, local-dir:FOLDER or hf-hub:USER/NAME; default: the checkpoint's"
    add("--model", metavar="NAME", help=named)
    registering = "Python files, or modules, that register models of your own with timm"
    add("--imports", nargs="+", default=[], metavar="FILE", help=registering)
    add("--checkpoint", metavar="FILE", help="its weights; default: random ones")
    forecaster = "in place of a model, the forecaster of a run of vim2 forecast fit, or hf-hub:OWNER/NAME"
    add("--forecaster", metavar="DIR", help=forecaster)
    add("--pretrained", action="store_true", help="the model's pretrained weights instead of a checkpoint")
    formats = "onnx: a file; pt2: a compiled package for PyTorch in Python and C++ (AOTInductor); timm: a folder for "
    formats += "timm, transformers and the Hugging Face Hub; safetensors: weights in half precision"
    add("--format", required=True, choices=("onnx", "pt2", "timm", "safetensors"), help=formats)
    add("--output", required=True, type=Path, metavar="PATH", help="where to write")

    add = parser.add_argument_group("onnx, pt2").add_argument
    add("--features-only", action="store_true", help="the stages' maps in place of the classifier's logits")
    sizes = "height and width, or one number for both, for runtimes that take no dynamic ones, and for timm's other "
    sizes += f"models; default: any, with pt2 from {MIN_DYNAMIC} on"
    add("--img-size", type=int, nargs="+", metavar="PIXELS", help=sizes)
    runtimes = "run the file beside PyTorch's eager mode: differences and times; of ONNX in one of "
    runtimes += f"{', '.join(ONNX_RUNTIMES)}, by default the first"
    add("--compare", nargs="?", const=True, choices=tuple(ONNX_RUNTIMES), metavar="RUNTIME", help=runtimes)
    batches = "images, or a forecaster's windows, at once in a comparison; default 1"
    add("--batch-size", type=int, nargs="+", metavar="N", help=batches)
    device = "on which a package will run, and a comparison does; default cpu"
    add("--device", choices=("cpu", "cuda"), help=device)

    add = parser.add_argument_group("onnx").add_argument
    add("--opset", type=int, help=f"of ONNX's operators, {MIN_OPSET} or later; default {DEFAULT_OPSET}")
    scan = "form of the scans: steps, one after the other, for CPUs, or chunks, side by side, for GPUs; default steps"
    add("--scan", choices=SCANS, help=scan)

    add = parser.add_argument_group("safetensors").add_argument
    add("--data-dir", metavar="DIR", help="check that on these images they are as good as before")
    add("--split", metavar="NAME", help="split, folder, or packs of it; default validation")
    return parser


def _check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together, and where the checkpoint would be written over."""
    if args.forecaster is not None:
        for name in ("model", "imports", "checkpoint", "pretrained", "features_only", "img_size"):
            if getattr(args, name):
                raise UserError(f"{_flag(name)} is for image models, not for --forecaster: leave it out.")
    elif args.model is None and args.checkpoint is None:
        raise UserError("Say what to export: --model NAME, --checkpoint FILE or both, or --forecaster DIR.")
    for name, formats in FORMATS_OF.items():
        if getattr(args, name) and args.format not in formats:
            raise UserError(f"{_flag(name)} is for --format {' or '.join(formats)}: leave it out.")
    if args.split and args.data_dir is None:
        raise UserError("--split is of the images to check with: add --data-dir, or leave it out.")
    if args.format == "pt2" and isinstance(args.compare, str):
        raise UserError(f"A .pt2 package runs in PyTorch, not in {args.compare}: give --compare alone.")
    if args.format == "onnx" and args.device and not args.compare:
        raise UserError("One ONNX file is for all devices, and --device is where --compare runs it: leave it out.")
    if args.batch_size and not args.compare:
        raise UserError("--batch-size is for a comparison, and an exported file takes any: add --compare.")
    if min(args.batch_size or [1]) < 1:
        raise UserError(f"--batch-size takes whole numbers from 1 on, got {min(args.batch_size)}.")
    for read in (args.checkpoint, local_folder(args.model or "")):
        if read is not None:
            keep_source(weights_file(read), weights_file(args.output))
    if args.format == "safetensors" and args.output.suffix != ".safetensors" and not args.output.is_dir():
        raise UserError(f"Such files are read by the name NAME.safetensors, got {args.output.name}: rename it.")
    if args.forecaster is not None and args.format not in PROGRAMS:
        raise UserError(f"A forecaster is its folder already, and exported as onnx or pt2, not as {args.format}.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _load(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model to export, and what its checkpoint tells about it."""
    if args.forecaster is not None:
        return ForecasterModule(_forecaster(args.forecaster)), {}
    if args.checkpoint is None and not args.pretrained:
        source = find_model(args.model, args.imports)
        return create_model(source), source.facts()
    model, facts = load_checkpoint_model(args.checkpoint, args.model, pretrained=args.pretrained, imports=args.imports)
    if args.checkpoint is not None:  # else what is trained from the export would be free of any terms
        facts.setdefault("terms", no_terms_told(Path(args.checkpoint).resolve().name, "Exported"))
    return model, facts


def _prepare_output(output: Path, is_folder: bool) -> None:
    """Raises UserError where nothing can be written to `output`, a file or a folder, before there is anything to."""
    if is_folder and output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: choose another --output, for a folder.")
    make = make_folder if is_folder else make_folder_of
    make(output)


def _forecaster(folder: str) -> "Forecaster":
    """Raises UserError as `Forecaster.from_pretrained`, or where pandas is not installed."""
    try:
        from ..forecast import Forecaster
    except ImportError as error:
        raise UserError(error) from None
    return Forecaster.from_pretrained(folder)


def _metadata(model: nn.Module, facts: dict[str, Any], size: tuple[int, int] | None) -> dict[str, str]:
    """What a program of images cannot tell by itself to those who run it without this package, in JSON: what images it
    was trained on, and the terms of its weights, in timm's words, and the names of its classes."""
    if isinstance(model, ForecasterModule):
        return {}
    config = _images(model, facts)
    if config and size:
        config["input_size"] = (config["input_size"][0], *size)
    if facts.get("class_names"):
        config["labels"] = label_names(facts, None, model.num_classes)
    return _as_json({**config, **facts.get("terms", {})})


def _images(model: nn.Module, facts: dict[str, Any]) -> dict[str, Any]:
    """timm's data config; nothing of images of other channels than grey and colour, whose mean is not known."""
    try:
        return input_config(model, InputOptions(), None, facts.get("data_config"))
    except UserError:
        return {}


def _model_args(facts: dict[str, Any]) -> dict[str, Any]:
    """Arguments that the model was made with, as a config.json has them."""
    channels = {"in_chans": facts["in_chans"]} if facts.get("in_chans") else {}
    return {**facts.get("model_kwargs", {}), **channels}


def _as_json(values: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in values.items()}


def _export_program(model: nn.Module, facts: dict[str, Any], args: argparse.Namespace) -> None:
    size, device = None, args.device or "cpu"
    if args.img_size is not None:
        if len(args.img_size) > 2:
            raise UserError(f"--img-size takes a height and a width, got {len(args.img_size)} numbers.")
        size = args.img_size[0], args.img_size[-1]
    if not isinstance(model, ViM2 | ForecasterModule):
        name = type(model).__name__
        if args.features_only:
            raise UserError(f"--features-only is for ViM2 models, not for {name}: leave it out.")
        if size is None:
            raise UserError(f"Only ViM2 models are exported for any size, {name} for one: give --img-size PIXELS.")
        check_reads(model, (first_convolution(model).shape[1], *size), called=name)
    metadata = _metadata(model, facts, size)
    if args.features_only:
        metadata.pop("labels", None)
        model = FeatureGetterNet(model, out_indices=tuple(range(len(model.stages))))
    if args.format == "onnx":
        opset = DEFAULT_OPSET if args.opset is None else args.opset
        export_onnx(model, args.output, size, opset, args.scan or SCANS[0], metadata)
        kind, run = f"ONNX, opset {opset}", ONNX_RUNTIMES.get(args.compare, run_onnxruntime)
    else:
        with say_if_slow("Compiling one C++ program of all layers, which takes minutes."):
            export_pt2(model, args.output, size, device, metadata)
        kind, run = f"AOTInductor's package for {device}", run_pt2
    say(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, {kind}")
    if args.compare:
        name, exported = run(args.output, device)
        sizes = [size] if size or isinstance(model, ForecasterModule) else SIZES
        say(compare(model.eval().to(device), name, exported, sizes, args.batch_size or [1]))


def _export_timm(model: nn.Module, facts: dict[str, Any], args: argparse.Namespace) -> None:
    if not hasattr(model, "num_features"):
        name = type(model).__name__
        raise UserError(f"{name} has no num_features, which timm's config tells: keep that number in the model.")
    config, terms = facts.get("data_config"), facts.get("terms")
    export_timm(model, args.output, config, facts.get("class_names"), _model_args(facts), terms)
    after = f"what registers it ({', '.join(args.imports)})" if args.imports else "import vim2"
    say(f"{args.output}: timm.create_model({f'local-dir:{args.output}'!r}, pretrained=True), after {after}")


def _export_weights(model: nn.Module, facts: dict[str, Any], args: argparse.Namespace) -> None:
    """Write a checkpoint's weights, the moving average if it has one, in half precision. The file's metadata tell, in
    JSON, what a config.json of timm's would.

    Raises:
        UserError: No checkpoint; half precision cannot hold the weights, or costs more than MAX_LOSS points of
            accuracy. Nothing is written then.
    """
    if args.checkpoint is None:
        raise UserError("--format safetensors turns a checkpoint into half precision: give --checkpoint FILE.")
    if args.data_dir is not None:
        _check_rounding(model, facts, args)
    told = {"architecture": facts["arch"], "model_args": _model_args(facts), "num_classes": model.num_classes}
    classes = {"label_names": facts.get("class_names"), "label_descriptions": facts.get("class_descriptions")}
    told |= {name: value for name, value in classes.items() if value}
    try:
        metadata = _as_json({**_images(model, facts), **facts["terms"], **told})
        save_half_precision(model.state_dict(), args.output, metadata)
    except ValueError as error:
        raise UserError(error) from None
    say(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, half precision")


def _check_rounding(model: nn.Module, facts: dict[str, Any], args: argparse.Namespace) -> None:
    """Compare the accuracy of a checkpoint's weights before and after they are rounded.

    Raises:
        UserError: They lose more than MAX_LOSS points of top-1 accuracy; anything that validation refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        rounded = {name: v.half().float() if v.is_floating_point() else v for name, v in model.state_dict().items()}
        after = Path(folder) / "rounded.pth"
        save_checkpoint({**facts, "state_dict": rounded}, after)
        common = dict(model=args.model, data_dir=args.data_dir, split=args.split or "validation", output=folder)
        was, now = (validate(checkpoint=path, **common)[0]["top1"] for path in (args.checkpoint, after))
    say(f"top-1: {was:.2f} % before, {now:.2f} % in half precision")
    if was - now > MAX_LOSS:
        raise UserError(
            f"Half precision costs {was - now:.2f} points of top-1 accuracy, more than {MAX_LOSS}: keep the checkpoint."
        )
