"""The options of train, validate and predict: timm's names where timm has one, and the paper's recipe.

A value comes from, first to last: its default, the recipe, the run that is resumed, the command line.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..command.options import (
    REQUIRED,
    Between,
    Count,
    DeviceOptions,
    NotNegative,
    Options,
    Positive,
    PositiveFloat,
    Probability,
    Rate,
    RunOptions,
    Share,
    ascending,
    fill_in,
    length,
    option,
)
from ..command.places import short_name

__all__ = ["MAY_CHANGE", "RECIPES", "InputOptions", "PredictOptions", "TrainOptions", "ValidateOptions", "apply_recipe"]

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
RECIPE_DROP_PATH = {"vim2_tiny": 0.2, "vim2_small": 0.3, "vim2_base": 0.6}  # VMamba's, of all forms of a size

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")

# What a resumed run may change: where and how fast it runs, what it prints, and for how long it trains.
MAY_CHANGE = {
    "data_dir",
    "dataset_download",
    "device",
    "epochs",
    "experiment",
    "imports",
    "log_interval",
    "output",
    "resume",
    "val_interval",
    "validation_batch_size",
    "workers",
}

MIN_SIDE = 32  # of an image, in pixels
Pixels = Annotated[int, Between(MIN_SIDE, words=f"must be at least {MIN_SIDE} pixels")]
PositiveShare = Annotated[float, Between(0, 1, "(]")]
CropShare = Annotated[float, Between(0.1, 2)]  # above 1, as VOLO's, images get a margin


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options, group="data"):
    data_dir: str | None = option(None, "folder or tar archive of class folders, or packs (.npz)", metavar="DIR")
    dataset: str = option(
        "",
        "timm's name of a data set, such as torch/cifar10 or hfds/<user>/<name>; default: a folder for each class",
        metavar="NAME",
    )
    dataset_download: bool = option(False, "download torch/ data sets")
    class_map: str | None = option(None, "text file with a class name a line, in the order to use", metavar="FILE")
    # PyTorch warns of more workers than there are CPUs
    workers: Count = option(min(4, cpus()), "processes that read images", short="-j", metavar="N")
    in_memory: bool = option(False, "decode all images once, and hold and augment them on the device")


@dataclass(frozen=True, kw_only=True)
class SplitOptions(Options, group="splits"):
    train_split: str = option("train", "split, folder, or packs, to train on", metavar="NAME")
    val_split: str = option(
        "validation",
        "split, folder, or packs, to validate on; an empty one sets a part of the images to train on aside",
        metavar="NAME",
    )
    holdout: Share = option(0.2, "share of each class to validate on where no split is for that")


@dataclass(frozen=True, kw_only=True)
class ImportOptions(Options, group="model"):
    imports: list[str] = option(
        [], "Python files, or modules, that register models of your own with timm", metavar="FILE"
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ImportOptions, group="model"):
    model: str = option("vim2_tiny", "name of a timm model, local-dir:FOLDER or hf-hub:USER/NAME")
    model_kwargs: dict[str, Any] = option({}, "arguments of the model", metavar="K=V")
    num_classes: Positive | None = option(None, "default: as many as the data have", metavar="N")
    in_chans: int = option(3, "1 reads images as grey", choices=(1, 3))
    img_size: Pixels | None = option(None, "height and width; default: the model's", metavar="PIXELS")
    pretrained: bool = option(False, "start from the model's pretrained weights")
    initial_checkpoint: str | None = option(None, "start from these weights, with a new head if needed", metavar="FILE")
    freeze: Count = option(
        0, "do not train the stem and the first N stages; 5 trains nothing but the classifier", metavar="N"
    )
    drop: Rate = option(0.0, "dropout before the classifier", metavar="RATE")
    drop_path: Rate | None = option(None, "stochastic depth; default: the model's", metavar="RATE")
    grad_checkpointing: bool = option(False, "recompute blocks backward, to save memory")


@dataclass(frozen=True, kw_only=True)
class InputOptions(Options, group="input; by default, the model's or the checkpoint's"):
    crop_pct: CropShare | None = option(None, "size over the size to resize to, at validation", metavar="SHARE")
    mean: list[float] | None = option(None, "mean of the pixels, of 1")
    std: list[PositiveFloat] | None = option(None, "standard deviation of the pixels, of 1")
    interpolation: str | None = option(None, "of resizing", choices=INTERPOLATIONS)


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(Options, group="length and learning rate"):
    recipe: str | None = option(None, "the paper's recipe; options given here override it", choices=tuple(RECIPES))
    epochs: Positive = option(100, "epochs, warm-up included", metavar="N")
    batch_size: Positive = option(128, "images a step and process", short="-b", metavar="N")
    validation_batch_size: Positive | None = option(None, "default: --batch-size", short="-vb", metavar="N")
    grad_accum_steps: Positive = option(1, "steps an update", metavar="N")
    lr: PositiveFloat | None = option(None, "learning rate; default: --lr-base, scaled")
    lr_base: PositiveFloat = option(1e-3, "rate for --lr-base-size images an update", metavar="LR")
    lr_base_size: Positive = option(1024, "images an update of --lr-base", metavar="N")
    lr_base_scale: str = option("sqrt", "how it grows with the batch", choices=("linear", "sqrt"))
    sched: str = option("cosine", "schedule", choices=("cosine", "poly", "step", "constant"))
    warmup_epochs: NotNegative = option(5.0, "epochs of linear warm-up", metavar="N")
    warmup_lr: NotNegative | None = option(None, "rate it starts from; default: a thousandth", metavar="LR")
    min_lr: NotNegative | None = option(None, "rate to end with; default: a hundredth", metavar="LR")
    decay_epochs: PositiveFloat = option(30.0, "of --sched step", metavar="N")
    decay_rate: PositiveFloat = option(0.1, "of --sched step; the power of --sched poly")


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Options, group="optimiser"):
    opt: str = option("adamw", "name of a timm optimiser")
    opt_eps: NotNegative | None = option(None, "default: the optimiser's", metavar="EPS")
    opt_betas: list[Rate] | None = option(None, "default: the optimiser's", metavar="BETA")
    momentum: Rate = option(0.9, "of optimisers that have one")
    weight_decay: NotNegative = option(0.05, "of matrices; vectors have none")
    layer_decay: PositiveShare | None = option(None, "factor on the rate for each layer from the end", metavar="RATE")
    clip_grad: PositiveFloat | None = option(None, "clip gradients to this norm", metavar="NORM")
    clip_mode: str = option("norm", "what --clip-grad limits", choices=("norm", "value", "agc"))


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(Options, group="augmentation"):
    no_aug: bool = option(False, "none of the following up to --reprob")
    scale: Annotated[list[PositiveShare], length(2), ascending] = option([0.08, 1.0], "area of random crops")
    ratio: Annotated[list[PositiveFloat], length(2), ascending] = option(
        [3 / 4, 4 / 3], "width over height of random crops"
    )
    hflip: Probability = option(0.5, "probability of mirroring", metavar="P")
    vflip: Probability = option(0.0, "probability of turning upside down", metavar="P")
    color_jitter: NotNegative = option(0.4, "of brightness, contrast, saturation", metavar="F")
    aa: str | None = option(None, "AutoAugment or RandAugment, such as rand-m9-mstd0.5-inc1", metavar="POLICY")
    train_interpolation: str = option("random", "of random crops", choices=("random", *INTERPOLATIONS))
    reprob: Probability = option(0.0, "probability of random erasing", metavar="P")
    remode: str = option("pixel", "what erasing leaves", choices=("const", "rand", "pixel"))
    recount: Positive = option(1, "rectangles to erase", metavar="N")
    mixup: NotNegative = option(0.0, "mixup, if above 0", metavar="ALPHA")
    cutmix: NotNegative = option(0.0, "CutMix, if above 0", metavar="ALPHA")
    cutmix_minmax: Annotated[list[Probability], length(2), ascending] | None = option(
        None, "CutMix with sides in this range", metavar="SHARE"
    )
    mixup_prob: Probability = option(1.0, "probability of either", metavar="P")
    mixup_switch_prob: Probability = option(0.5, "of CutMix, of the two", metavar="P")
    mixup_mode: str = option("batch", "what shares a draw", choices=("batch", "pair", "elem"))
    mixup_off_epoch: Count = option(0, "neither from this epoch on; 0: never", metavar="N")


@dataclass(frozen=True, kw_only=True)
class LossOptions(Options, group="loss"):
    smoothing: Rate = option(0.1, "label smoothing", metavar="E")
    bce_loss: bool = option(False, "binary cross-entropy")
    bce_target_thresh: Probability | None = option(None, "with --bce-loss: targets above are 1", metavar="P")


@dataclass(frozen=True, kw_only=True)
class AverageOptions(Options, group="moving average of the weights"):
    model_ema: bool = option(False, "keep it, and validate it", negatable=True)
    model_ema_decay: Rate = option(0.9998, "decay an update", metavar="RATE")
    model_ema_warmup: bool = option(False, "let the decay rise to that, for short runs")


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(DeviceOptions, group="device"):
    amp: bool = option(False, "mixed precision", negatable=True)
    amp_dtype: str = option("bfloat16", "its lower precision", choices=("bfloat16", "float16"))
    torchcompile: str | None = option(
        None, "compile the model (inductor by default)", const="inductor", metavar="BACKEND"
    )


@dataclass(frozen=True, kw_only=True)
class TrainingComputeOptions(ComputeOptions, group="device"):
    cuda_graph: bool = option(False, "record the model's passes as CUDA graphs, for small models")


@dataclass(frozen=True, kw_only=True)
class TrainingRunOptions(RunOptions, group="run"):
    resume: str | None = option(
        None,
        "go on with a run that was cut off, from its last.pth, exactly as if it had not been; without FILE, with "
        "this run's, or from the start if there is none yet",
        const="auto",
        metavar="FILE",
    )
    seed: Count = option(42, "of everything random", metavar="N")
    deterministic: bool = option(False, "equal runs on GPUs too, at some cost in speed")
    val_interval: Positive = option(1, "epochs from validation to validation", metavar="N")
    log_interval: Positive = option(50, "steps between looks at the loss and the speed", metavar="N")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    DataOptions,
    SplitOptions,
    ModelOptions,
    InputOptions,
    ScheduleOptions,
    OptimizerOptions,
    AugmentationOptions,
    LossOptions,
    AverageOptions,
    TrainingComputeOptions,
    TrainingRunOptions,
):
    """Train or fine-tune on images; `torchrun` it to use several GPUs."""

    program = "vim2 train"

    @property
    def default_name(self) -> str:
        data = self.dataset or Path(self.data_dir or "").name.removesuffix(".npz")
        return "-".join(part.replace("/", "-") for part in (short_name(self.model), data) if part)


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(ImportOptions, group="model"):
    checkpoint: str | None = option(
        None, "best.pth or last.pth of a run, another file of weights, or timm's folder of them", metavar="FILE"
    )
    model: str | None = option(
        None, "name of a timm model, local-dir:FOLDER or hf-hub:USER/NAME; default: the checkpoint's"
    )
    model_kwargs: dict[str, Any] | None = option(None, "arguments of it; default: the checkpoint's", metavar="K=V")
    pretrained: bool = option(False, "the model's pretrained weights instead of a checkpoint")
    no_ema: bool = option(False, "the weights themselves, not their moving average")


@dataclass(frozen=True, kw_only=True)
class ValidateOptions(DataOptions, CheckpointOptions, InputOptions, ComputeOptions):
    """Top-1 and top-5 accuracy of a checkpoint, at one or many image sizes."""

    program = "vim2 validate"
    split: str = option("validation", "split, folder, or packs", metavar="NAME")
    img_size: list[Pixels] | None = option(None, "default: the checkpoint's", metavar="PIXELS")
    batch_size: Positive = option(128, "images a step, fewer at larger sizes", short="-b", metavar="N")
    output: str | None = option(
        None, "folder for validation.md, .json and, of several sizes, .png; default: the checkpoint's", metavar="DIR"
    )


@dataclass(frozen=True, kw_only=True)
class PredictOptions(CheckpointOptions, InputOptions, ComputeOptions):
    """The classes that a checkpoint sees in images."""

    program = "vim2 predict"
    images: list[str] = option(REQUIRED, "image, folder, or glob in quotation marks", metavar="IMAGE", positional=True)
    class_map: str | None = option(
        None, "text file with a class name a line; default: the checkpoint's", metavar="FILE"
    )
    topk: Positive = option(5, "classes to name for each image", metavar="N")
    img_size: Pixels | None = option(None, "default: the checkpoint's", metavar="PIXELS")
    batch_size: Positive = option(32, "images a step", short="-b", metavar="N")
    max_pictures: Count = option(36, "images in predictions.png; 0: make none", metavar="N")
    output: str = option("predictions", "folder for predictions.json and predictions.png", metavar="DIR")


def apply_recipe(options: TrainOptions, explicit: set[str], world_size: int, arch: str = "") -> TrainOptions:
    """Options with the recipe's values for those that were not given; `arch` is timm's name of the model, where that is
    not --model."""
    if options.recipe is None:
        return options
    values: dict[str, Any] = dict(RECIPES[options.recipe])
    for size, rate in RECIPE_DROP_PATH.items():
        if (arch or options.model).startswith(size):
            values["drop_path"] = rate
    values["batch_size"] = max(RECIPE_BATCH[options.recipe] // (world_size * options.grad_accum_steps), 1)
    return fill_in(options, values, explicit)
