"""The options of train, validate and predict: timm's names where timm has one, and the paper's recipe.

A value comes from, first to last: its default, the recipe, the run that is resumed, the command line.
"""

import argparse
import difflib
import os
from argparse import SUPPRESS, BooleanOptionalAction
from pathlib import Path
from typing import Any

from timm.utils import ParseKwargs

from ..errors import UserError

__all__ = ["RECIPES", "Parser", "predict_parser", "resolve", "train_parser", "validate_parser"]

# The paper (section 5.1) trains as Swin does (arXiv 2103.14030, appendix A2.1). VMamba's EMA.
RECIPES = {
    "imagenet": dict(
        epochs=300,
        warmup_epochs=20.0,
        opt="adamw",
        opt_betas=[0.9, 0.999],
        lr_base=1e-3,
        lr_base_size=1024,
        lr_base_scale="linear",
        weight_decay=0.05,
        sched="cosine",
        clip_grad=5.0,
        aa="rand-m9-mstd0.5-inc1",
        color_jitter=0.4,
        reprob=0.25,
        remode="pixel",
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
        train_interpolation="bicubic",
        model_ema=True,
        model_ema_decay=0.9999,
        img_size=224,
    )
}
RECIPE_BATCH = {"imagenet": 1024}  # images an update, over all processes and accumulated steps
RECIPE_DROP_PATH = {"tiny": 0.2, "small": 0.3, "base": 0.6}  # VMamba's

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")

# What a resumed run may change: where and how fast it runs, what it prints, and for how long it trains.
MAY_CHANGE = {
    "data_dir",
    "dataset_download",
    "device",
    "epochs",
    "experiment",
    "log_interval",
    "output",
    "resume",
    "val_interval",
    "validation_batch_size",
    "workers",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and name the option that was probably meant."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments:"):
            given = message.split(": ", 1)[1].split()[0]
            message = f"unknown option {given}" + did_you_mean(given, self._option_string_actions)
        raise UserError(f"{message} (see {self.prog} --help)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where there is none or the help already tells it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "%(default)" in text or "default:" in text or action.default in (None, SUPPRESS, False, "", {}, []):
            return text
        return text + " (default: %(default)s)"


def did_you_mean(given: str, known) -> str:
    """A suggestion to append to a message, or nothing."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", metavar="DIR", help="folder of the data")
    group.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="timm's name of a data set, such as torch/cifar10 or hfds/<user>/<name>; default: a folder for each class",
    )
    group.add_argument("--dataset-download", action="store_true", help="download torch/ data sets")
    group.add_argument("--class-map", metavar="FILE", help="text file with a class name a line, in the order to use")
    workers = min(4, cpus())  # PyTorch warns of more than there are CPUs
    group.add_argument("-j", "--workers", type=count, default=workers, metavar="N", help="processes that read images")


def add_input_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input; by default, the model's or the checkpoint's")
    group.add_argument("--crop-pct", type=float, metavar="SHARE", help="size over the size to resize to, at validation")
    group.add_argument("--mean", type=float, nargs="+", help="mean of the pixels, of 1")
    group.add_argument("--std", type=float, nargs="+", help="standard deviation of the pixels, of 1")
    group.add_argument("--interpolation", choices=INTERPOLATIONS, help="of resizing")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("device")
    group.add_argument("--device", help="cuda, cuda:1, cpu, ...; default: a GPU if there is one")
    group.add_argument("--amp", action=BooleanOptionalAction, default=False, help="mixed precision")
    group.add_argument("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="its lower precision")
    group.add_argument(
        "--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile the model (inductor by default)"
    )


def train_parser(prog: str = "classify.py train") -> Parser:
    """Options of `vim2.classify.train`."""
    parser = Parser(prog=prog, description="Train or fine-tune on images; `torchrun` it to use several GPUs.")
    add_data_options(parser)
    group = parser.add_argument_group("splits")
    group.add_argument("--train-split", default="train", metavar="NAME", help="split, or folder, to train on")
    group.add_argument("--val-split", default="validation", metavar="NAME", help="split, or folder, to validate on")
    group.add_argument(
        "--holdout", type=share, default=0.2, help="share of each class to validate on where the folder has no splits"
    )

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="vim2_tiny", help="name of a timm model")
    group.add_argument(
        "--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V", help="arguments of the model"
    )
    group.add_argument("--num-classes", type=positive, metavar="N", help="default: as many as the data have")
    group.add_argument("--in-chans", type=int, choices=(1, 3), default=3, help="1 reads images as grey")
    group.add_argument("--img-size", type=int, metavar="PIXELS", help="height and width; default: the model's")
    group.add_argument("--pretrained", action="store_true", help="start from timm's pretrained weights")
    group.add_argument(
        "--initial-checkpoint", metavar="FILE", help="start from these weights, with a new head if needed"
    )
    group.add_argument(
        "--freeze",
        type=count,
        default=0,
        metavar="N",
        help="do not train the stem and the first N stages; 5 trains nothing but the classifier",
    )
    group.add_argument("--drop", type=share_or_zero, default=0.0, metavar="RATE", help="dropout before the classifier")
    group.add_argument("--drop-path", type=share_or_zero, metavar="RATE", help="stochastic depth; default: the model's")
    group.add_argument("--grad-checkpointing", action="store_true", help="recompute blocks backward, to save memory")
    add_input_options(parser)

    group = parser.add_argument_group("length and learning rate")
    group.add_argument("--recipe", choices=tuple(RECIPES), help="the paper's recipe; options given here override it")
    group.add_argument("--epochs", type=positive, default=100, metavar="N", help="epochs, warm-up included")
    group.add_argument("-b", "--batch-size", type=positive, default=128, metavar="N", help="images a step and process")
    group.add_argument("-vb", "--validation-batch-size", type=positive, metavar="N", help="default: --batch-size")
    group.add_argument("--grad-accum-steps", type=positive, default=1, metavar="N", help="steps an update")
    group.add_argument("--lr", type=float, help="learning rate; default: --lr-base, scaled")
    group.add_argument(
        "--lr-base", type=float, default=1e-3, metavar="LR", help="rate for --lr-base-size images an update"
    )
    group.add_argument("--lr-base-size", type=positive, default=1024, metavar="N", help="images an update of --lr-base")
    group.add_argument(
        "--lr-base-scale", choices=("linear", "sqrt"), default="sqrt", help="how it grows with the batch"
    )
    group.add_argument("--sched", choices=("cosine", "poly", "step", "constant"), default="cosine", help="schedule")
    group.add_argument("--warmup-epochs", type=float, default=5.0, metavar="N", help="epochs of linear warm-up")
    group.add_argument("--warmup-lr", type=float, metavar="LR", help="rate it starts from; default: a thousandth")
    group.add_argument("--min-lr", type=float, metavar="LR", help="rate to end with; default: a hundredth")
    group.add_argument("--decay-epochs", type=float, default=30.0, metavar="N", help="of --sched step")
    group.add_argument("--decay-rate", type=float, default=0.1, help="of --sched step; the power of --sched poly")

    group = parser.add_argument_group("optimiser")
    group.add_argument("--opt", default="adamw", help="name of a timm optimiser")
    group.add_argument("--opt-eps", type=float, metavar="EPS", help="default: the optimiser's")
    group.add_argument("--opt-betas", type=float, nargs="+", metavar="BETA", help="default: the optimiser's")
    group.add_argument("--momentum", type=float, default=0.9, help="of optimisers that have one")
    group.add_argument("--weight-decay", type=float, default=0.05, help="of matrices; vectors have none")
    group.add_argument(
        "--layer-decay", type=float, metavar="RATE", help="factor on the rate for each layer from the end"
    )
    group.add_argument("--clip-grad", type=float, metavar="NORM", help="clip gradients to this norm")
    group.add_argument("--clip-mode", choices=("norm", "value", "agc"), default="norm", help="what --clip-grad limits")

    group = parser.add_argument_group("augmentation")
    group.add_argument("--no-aug", action="store_true", help="none of the following up to --reprob")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of random crops")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="width over height of random crops")
    group.add_argument("--hflip", type=float, default=0.5, metavar="P", help="probability of mirroring")
    group.add_argument("--vflip", type=float, default=0.0, metavar="P", help="probability of turning upside down")
    group.add_argument(
        "--color-jitter", type=float, default=0.4, metavar="F", help="of brightness, contrast, saturation"
    )
    group.add_argument("--aa", metavar="POLICY", help="AutoAugment or RandAugment, such as rand-m9-mstd0.5-inc1")
    group.add_argument(
        "--train-interpolation", choices=("random", *INTERPOLATIONS), default="random", help="of random crops"
    )
    group.add_argument("--reprob", type=share_or_zero, default=0.0, metavar="P", help="probability of random erasing")
    group.add_argument("--remode", choices=("const", "rand", "pixel"), default="pixel", help="what erasing leaves")
    group.add_argument("--recount", type=positive, default=1, metavar="N", help="rectangles to erase")
    group.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="mixup, if above 0")
    group.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA", help="CutMix, if above 0")
    group.add_argument("--cutmix-minmax", type=float, nargs=2, metavar="SHARE", help="CutMix with sides in this range")
    group.add_argument("--mixup-prob", type=share_or_zero, default=1.0, metavar="P", help="probability of either")
    group.add_argument(
        "--mixup-switch-prob", type=share_or_zero, default=0.5, metavar="P", help="of CutMix, of the two"
    )
    group.add_argument("--mixup-mode", choices=("batch", "pair", "elem"), default="batch", help="what shares a draw")
    group.add_argument(
        "--mixup-off-epoch", type=count, default=0, metavar="N", help="neither from this epoch on; 0: never"
    )

    group = parser.add_argument_group("loss")
    group.add_argument("--smoothing", type=share_or_zero, default=0.1, metavar="E", help="label smoothing")
    group.add_argument("--bce-loss", action="store_true", help="binary cross-entropy")
    group.add_argument("--bce-target-thresh", type=float, metavar="P", help="with --bce-loss: targets above are 1")

    group = parser.add_argument_group("moving average of the weights")
    group.add_argument("--model-ema", action=BooleanOptionalAction, default=False, help="keep it, and validate it")
    group.add_argument("--model-ema-decay", type=float, default=0.9998, metavar="RATE", help="decay an update")
    group.add_argument("--model-ema-warmup", action="store_true", help="let the decay rise to that, for short runs")
    add_device_options(parser)

    group = parser.add_argument_group("run")
    group.add_argument("--output", default="runs", metavar="DIR", help="folder of all runs")
    group.add_argument("--experiment", metavar="NAME", help="folder of this run; default: <model>-<data>")
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="go on with a run that was cut off, from its last.pth, exactly as if it had not been; without FILE, with "
        "this run's, or from the start if there is none yet",
    )
    group.add_argument("--seed", type=count, default=42, metavar="N", help="of everything random")
    group.add_argument("--deterministic", action="store_true", help="equal runs on GPUs too, at some cost in speed")
    group.add_argument(
        "--val-interval", type=positive, default=1, metavar="N", help="epochs from validation to validation"
    )
    group.add_argument("--log-interval", type=positive, default=50, metavar="N", help="steps between looks at the loss")
    return parser


def validate_parser(prog: str = "classify.py validate") -> Parser:
    """Options of `vim2.classify.validate`."""
    parser = Parser(prog=prog, description="Top-1 and top-5 accuracy of a checkpoint, at one or many image sizes.")
    add_data_options(parser)
    parser.add_argument("--split", default="validation", metavar="NAME", help="split, or folder")
    add_checkpoint_options(parser)
    parser.add_argument("--img-size", type=int, nargs="+", metavar="PIXELS", help="default: the checkpoint's")
    parser.add_argument(
        "-b", "--batch-size", type=positive, default=128, metavar="N", help="images a step, fewer at larger sizes"
    )
    add_input_options(parser)
    add_device_options(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for validation.md, .json and, of several sizes, .png; default: the checkpoint's",
    )
    return parser


def predict_parser(prog: str = "classify.py predict") -> Parser:
    """Options of `vim2.classify.predict`."""
    parser = Parser(prog=prog, description="The classes that a checkpoint sees in images.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image, folder, or glob in quotation marks")
    add_checkpoint_options(parser)
    parser.add_argument(
        "--class-map", metavar="FILE", help="text file with a class name a line; default: the checkpoint's"
    )
    parser.add_argument("--topk", type=positive, default=5, metavar="N", help="classes to name for each image")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="default: the checkpoint's")
    parser.add_argument("-b", "--batch-size", type=positive, default=32, metavar="N", help="images a step")
    add_input_options(parser)
    add_device_options(parser)
    parser.add_argument(
        "--max-pictures", type=count, default=36, metavar="N", help="images in predictions.png; 0: make none"
    )
    parser.add_argument(
        "--output", default="predictions", metavar="DIR", help="folder for predictions.json and predictions.png"
    )
    return parser


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", metavar="FILE", help="best.pth or last.pth of a run, or another file of weights")
    group.add_argument("--model", help="name of a timm model; default: the checkpoint's")
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        action=ParseKwargs,
        metavar="K=V",
        help="arguments of it; default: the checkpoint's",
    )
    group.add_argument("--pretrained", action="store_true", help="timm's pretrained weights instead of a checkpoint")
    group.add_argument("--no-ema", action="store_true", help="the weights themselves, not their moving average")


def resolve(parser: Parser, given: dict[str, Any] | list[str]) -> tuple[dict[str, Any], set[str]]:
    """All options, and the names of those that were given.

    Args:
        parser: `train_parser()`, `validate_parser()` or `predict_parser()`.
        given: Command line, or options by name with underscores.

    Raises:
        UserError: An unknown option or a value that cannot be one.
    """
    defaults = {a.dest: a.default for a in parser._actions if a.dest != "help"}
    if isinstance(given, dict):
        for name in given.keys() - defaults.keys():
            raise UserError(f"unknown option {name}{did_you_mean(name, defaults)}")
        for action in parser._actions:
            value = given.get(action.dest)
            if action.choices and value is not None and value not in action.choices:
                raise UserError(f"{action.dest} must be one of {', '.join(map(str, action.choices))}, got {value!r}")
        return {**defaults, **{k: str(v) if isinstance(v, Path) else v for k, v in given.items()}}, set(given)
    options = vars(parser.parse_args(given))
    for action in parser._actions:
        action.default = SUPPRESS
    parser._defaults.clear()
    explicit = vars(parser.parse_args(given))
    return options, set(explicit)


def resume_options(options: dict[str, Any], explicit: set[str], saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """The options of a run that goes on: those it was started with, and of those given now the ones it may change.

    Raises:
        UserError: An option that would make it another run.
    """
    for name in sorted(explicit - MAY_CHANGE):
        if name in saved and plain(options[name]) != plain(saved[name]):
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{path} is of a run with {flag} {saved[name]}, not {options[name]}: leave {flag} out to go on with "
                "that run, or start a new one with --initial-checkpoint and another --experiment."
            )
    known = {
        name: saved[name] for name in options.keys() & saved.keys() if name not in explicit or name not in MAY_CHANGE
    }
    return {**options, **known}


def plain(value: Any) -> Any:
    """A value as it is after a checkpoint: lists, not tuples, and paths as text."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def apply_recipe(options: dict[str, Any], explicit: set[str], world_size: int) -> dict[str, Any]:
    """Options with the recipe's values for those that were not given."""
    recipe = options["recipe"]
    if recipe is None:
        return options
    values = dict(RECIPES[recipe])
    for size, rate in RECIPE_DROP_PATH.items():
        if options["model"].split(".")[0].endswith((size, f"{size}_vmamba")):
            values["drop_path"] = rate
    values["batch_size"] = max(RECIPE_BATCH[recipe] // (world_size * options["grad_accum_steps"]), 1)
    return {**options, **{k: v for k, v in values.items() if k not in explicit}}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def share_or_zero(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value
