"""Models for training, validation and prediction, from timm's registry and from checkpoints."""

import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from torch import Tensor, nn

from ..checkpoints import check_weights, find_state_dict, load_weights, weights_of
from ..command.errors import UserError, did_you_mean, first_line, in_short
from ..command.own_models import place, place_in
from ..command.places import is_place
from .facts import (
    check_model_kwargs,
    check_types,
    read_described,
    read_pretrained_cfg,
    terms_of,
    weights_file,
)
from .options import MIN_SIDE, InputOptions
from .sources import ModelSource, find_model

__all__ = [
    "autocast",
    "compile_model",
    "create_model",
    "freeze",
    "input_config",
    "load_checkpoint_model",
]

USUAL_HEADS = ("head.fc", "head", "fc", "classifier")  # modules of classifiers, as ViM2, VMamba and timm name them
USUAL_SIDES = (28, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)  # of images, pixels


def create_model(
    name: str | ModelSource,
    model_kwargs: Mapping[str, Any] | None = None,
    called: str = "--model-kwargs",
    imports: Sequence[str] = (),
    **own,
) -> nn.Module:
    """`timm.create_model`, with errors that a user can act on.

    Args:
        name: As `find_model` takes it, or what it has found.
        model_kwargs: Arguments of the model's constructor, from a user or a file.
        called: What messages call these arguments.
        imports: As for `import_models`.
        own: Arguments that the command sets itself.

    Raises:
        UserError: An argument that the model does not take, or that `check_model_kwargs` refuses; no pretrained
            weights, or none that can be fetched or read; a model that lacks what timm's have; as `find_model`.
    """
    source = find_model(name, imports)
    name = source.name
    model_kwargs = model_kwargs or {}
    check_model_kwargs(model_kwargs, called)
    if twice := sorted(model_kwargs.keys() & own.keys()):
        raise UserError(f"{called} hold {twice[0]}, which an option of this command sets: use that.")
    given = {k: v for k, v in {**model_kwargs, **own}.items() if v is not None}
    try:
        model = timm.create_model(name, **{**source.model_kwargs, **given})
    except _CREATION_ERRORS as error:
        lacks_weights = re.search("pretrained (weights|tag)", str(error))  # timm's words
        if isinstance(error, RuntimeError) and not (lacks_weights or model_kwargs or imports or is_place(name)):
            raise  # nothing that a user has given can be its reason
        problem = f"{name} cannot be made{_describe_kwargs(model_kwargs, called)}"
        explained = _explain_creation_error(error, name, problem, imports, bool(own.get("pretrained")))
        raise explained from (error if imports else None)  # in a model of the user's own, its trace may help
    _check_interface(model, name, own.get("num_classes", getattr(model, "num_classes", None)))
    check_types(model, model_kwargs, called)
    if own.get("pretrained") and is_place(name):  # which anybody may have written
        try:
            check_weights(model.state_dict(), model.state_dict(), name)
        except ValueError as error:
            raise UserError(error) from None
    return model


# what a model's constructor and timm's builder raise for arguments that do not fit, and for weights that are not there
_CREATION_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    UnpicklingError,
    ValueError,
)


def _describe_kwargs(model_kwargs: Mapping[str, Any], called: str) -> str:
    """ " with --model-kwargs (depths=(1, 1, 2, 1), ...)", or nothing without any."""
    if not model_kwargs:
        return ""
    listed = textwrap.shorten(", ".join(f"{k}={v!r}" for k, v in model_kwargs.items()), 200, placeholder=" ...")
    return f" with {'these ' if called.startswith('-') else ''}{called} ({listed})"


def _explain_creation_error(
    error: Exception, name: str, problem: str, imports: Sequence[str], pretrained: bool
) -> UserError:
    """What a user can do where `timm.create_model` has failed.

    Args:
        error: What it raised.
        name: timm's name of the model.
        problem: "NAME cannot be made", with the arguments.
        imports: The user's own files, in which the error may have come about.
        pretrained: Whether pretrained weights were asked for.
    """
    if isinstance(error, RuntimeError) and "pretrained weights" in str(error):
        return UserError(
            f"There are no pretrained weights of {name}: take a model that has some ({_own_weights()}), leave "
            "--pretrained out, or convert VMamba's with `vim2 convert IN OUT` and start from them with "
            "--initial-checkpoint."
        )
    if isinstance(error, RuntimeError) and "pretrained tag" in str(error):
        arch = name.partition(".")[0]
        known = ", ".join(timm.list_models(f"{arch}.*", pretrained=True)) or f"{arch} alone"
        return UserError(f"There are no weights {name}: take {known}.")
    if isinstance(error, OSError) and pretrained:  # huggingface_hub's, above all, where there is no network
        return UserError(
            f"The pretrained weights of {name} cannot be had ({first_line(error)}): fetch them where there is a "
            "network, or give a file of weights."
        )
    if isinstance(error, SafetensorError | UnpicklingError):
        return UserError(f"The weights of {name} are damaged ({first_line(error)}): export or download them again.")
    reason = first_line(error) if isinstance(error, OSError) else in_short(error)
    return UserError(f"{problem}: {reason}{place(error, imports)}")


def _check_interface(model: nn.Module, name: str, classes: int | None) -> None:
    """Raises UserError where a model, made for so many classes, lacks what timm's have and the commands read, or has
    something else in its place."""
    told = {
        f"num_classes{'' if classes is None else f' of {classes}'}": getattr(model, "num_classes", ()) == classes,
        "parameters": isinstance(model, nn.Module) and any(True for _ in model.parameters()),
        "pretrained_cfg": "input_size" in (getattr(model, "pretrained_cfg", None) or ()),
    }
    if not all(told.values()):
        lacking = " and no ".join(what for what, is_told in told.items() if not is_told)
        raise UserError(
            f"{name} has no {lacking}, as timm's models have: make it by timm.models.build_model_with_cfg, of a class "
            "that keeps its num_classes."
        )
    read_pretrained_cfg(model.pretrained_cfg, f"The pretrained_cfg of {name}")


def _own_weights() -> str:
    """The models whose weights come with the package."""
    return ", ".join(name.partition(".")[0] for name in timm.list_models("vim2_*", pretrained=True, module="vim2"))


def load(model: nn.Module, path: str | os.PathLike, new_head: bool = False, use_ema: bool = True) -> None:
    """`vim2.checkpoints.load_weights`, with its errors as UserError."""
    try:
        load_weights(model, weights_file(path), use_ema=use_ema, new_head=new_head)
    except (ValueError, OSError) as error:
        raise UserError(error) from None


def load_checkpoint_model(
    checkpoint: str | None,
    model: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    pretrained: bool = False,
    use_ema: bool = True,
    num_classes: int | None = None,
    imports: Sequence[str] = (),
) -> tuple[nn.Module, dict[str, Any]]:
    """A trained model, and what its checkpoint, or timm's pretrained_cfg, tells about it.

    Args:
        checkpoint: File of weights, or a folder of timm's with one. Those of `vim2.classify.train`, and the config.json
            of the latter, name their model, classes and input.
        model: As `find_model` takes it; the checkpoint's if None.
        model_kwargs: Arguments of the model; the checkpoint's if None.
        pretrained: Take the weights that come with the model, of timm or of this package, and no checkpoint.
        use_ema: Prefer the checkpoint's moving average.
        num_classes: Classes of the data, where the checkpoint does not tell.
        imports: See `import_models`.

    Returns:
        The model, and the facts, among them the `arch` and `model_kwargs` that it was made by.

    Raises:
        UserError: No weights, or weights of another model; what a checkpoint tells cannot be true.
    """
    if not checkpoint:
        if not (pretrained and model):
            raise UserError(
                "Say what to use: --checkpoint FILE, or --model NAME --pretrained for weights of timm or of this "
                f"package ({_own_weights()})."
            )
        source = find_model(model, imports)
        created = create_model(source, model_kwargs, imports=imports, pretrained=True)
        return created, {**source.facts(model_kwargs), **pretrained_facts(created)}
    content, facts = read_described(checkpoint)
    name = model or facts.get("arch")
    if name is None:
        raise UserError(f"{checkpoint} does not say which model it is of: add --model NAME.")
    source = find_model(name, imports)
    told = told_by_weights(content, checkpoint, source.arch)
    known = {
        "num_classes": facts.get("num_classes") or told.get("num_classes") or num_classes,
        "in_chans": facts.get("in_chans") or told.get("in_chans"),
        **(facts.get("model_kwargs", {}) if model_kwargs is None else model_kwargs),
    }
    called = f"the arguments in {checkpoint}" if model_kwargs is None else "--model-kwargs"
    created = create_model(source, {k: v for k, v in known.items() if v is not None}, called, imports)
    load(created, checkpoint, use_ema=use_ema)
    made = source.facts(facts.get("model_kwargs") if model_kwargs is None else model_kwargs)
    return created, {**made, **{name: facts[name] for name in facts.keys() - {"arch", "model_kwargs"}}}


def pretrained_facts(model: nn.Module) -> dict[str, Any]:
    """What timm's pretrained_cfg tells of the weights that a model was made with, as `read_described` has it.

    Args:
        model: Made with pretrained=True.

    Returns:
        The `terms` of the weights, and where the cfg names the model's classes, `class_names` and, by these,
        `class_descriptions`.
    """
    facts: dict[str, Any] = {"terms": terms_of(model.pretrained_cfg)}
    told = read_pretrained_cfg(model.pretrained_cfg, "The model's pretrained_cfg")
    names = told.get("label_names", ())
    if len(names) == model.num_classes:  # or it was made for other classes, which the classifier does not know yet
        facts |= {"class_names": list(names), "class_descriptions": told.get("label_descriptions", {})}
    return facts


def told_by_weights(content: Any, path: str | os.PathLike, name: str) -> dict[str, int]:
    """What the shapes of a bare file of weights tell of its model, of timm's `name`.

    Args:
        content: What the file holds.
        path: The file, for messages.
        name: The model's. Where timm has no pretrained_cfg of it, its head is looked for by usual names.

    Returns:
        `num_classes` and, where they are not the usual 3 or a multiple, `in_chans`, as far as they are to be seen.
    """
    try:
        weights = find_state_dict(content, path)
    except ValueError:  # which loading them will explain
        return {}
    cfg = timm.get_pretrained_cfg(name.partition(".")[0])  # whether there is such a tag is seen when it is made
    heads = [*weights_of(cfg and cfg.classifier), *(f"{head}.weight" for head in USUAL_HEADS)]
    classes = (weights[head].shape[0] for head in heads if head in weights and weights[head].dim() > 0)
    stems = weights_of(cfg and cfg.first_conv)
    channels = (weights[stem].shape[1] for stem in stems if stem in weights and weights[stem].dim() == 4)
    # a stem may see several pixels of 3 channels at once, as TResNet's
    told = {"num_classes": next(classes, None), "in_chans": next((n for n in channels if n % 3), None)}
    return {key: value for key, value in told.items() if value is not None}


def input_config(
    model: nn.Module,
    options: InputOptions,
    img_size: int | None,
    saved: dict[str, Any] | None = None,
    in_chans: int | None = None,
) -> dict[str, Any]:
    """timm's data config: size, normalisation, interpolation and crop of the model's input.

    Args:
        model: Its pretrained_cfg is the default.
        options: mean, std, interpolation and crop_pct, each of which goes before the default.
        img_size: Height and width, in pixels.
        saved: The checkpoint's, which goes before the model's.
        in_chans: Channels, where the model does not tell.

    Raises:
        UserError: A model of neither grey nor colour images; a mean or std of another number of channels.
    """
    in_chans = getattr(model, "in_chans", None) or in_chans or (saved or {}).get("input_size", (3,))[0]
    if in_chans not in (1, 3):
        raise UserError(f"Images have 1 or 3 channels, and the model takes {in_chans}: use another.")
    wanted = {k: getattr(options, k) for k in ("mean", "std", "interpolation", "crop_pct")}
    for name in ("mean", "std"):
        if wanted[name] is not None and len(wanted[name]) not in (1, in_chans):
            raise UserError(f"--{name} needs 1 or {in_chans} numbers, got {len(wanted[name])}.")
    default = read_pretrained_cfg({**model.pretrained_cfg, **(saved or {})}, "What is told of the model's input")
    size = (img_size, img_size) if img_size is not None else tuple(default["input_size"][1:])
    config = resolve_data_config({**wanted, "input_size": (in_chans, *size)}, pretrained_cfg=default)
    for name in ("mean", "std"):
        values = config[name]
        if len(values) not in (1, 3):
            raise UserError(f"The model has a {name} of {len(values)} channels, and images {in_chans}: give --{name}.")
        # of grey images, where the defaults are of RGB, and the reverse
        config[name] = (sum(values) / len(values),) if in_chans == 1 else tuple(values) * (3 // len(values))
    return config


def check_reads(
    model: nn.Module,
    input_size: Sequence[int],
    context: Callable = nullcontext,
    called: str = "The model",
    classes: int | None = None,
) -> None:
    """Make sure that a model takes images of a size, before anything is written or trained.

    Args:
        model: The model, on any device. It is put into eval mode.
        input_size: Channels, height and width.
        context: What `autocast` returns.
        called: What to call the model in the message.
        classes: How many scores it shall give an image; None where it may give whatever it does.

    Raises:
        UserError: It fails on them, or gives something else.
    """
    device = next(model.parameters()).device

    def scores_of(*size: int) -> Any:
        with torch.no_grad(), context():
            return model.eval()(torch.zeros(1, input_size[0], *size, device=device))

    try:
        scores = scores_of(*input_size[1:])
    except Exception as error:  # every family has its own ways to fail
        side = next((side for side in sides_near(model, input_size[-1]) if succeeds(scores_of, side, side)), None)
        size, reason = " x ".join(map(str, input_size[1:])), first_line(error)
        if side is None:
            where = place_in(type(model).__module__, error)
            remedy = "its forward" if where else "the model, its arguments or --img-size"
            reason = f"{type(error).__name__}: {reason}{where}"
            raise UserError(
                f"{called} fails on images of {size} pixels, and of any usual size ({reason}): change {remedy}."
            ) from error
        remedy = f"change --img-size, to {side} for one"
        if side < MIN_SIDE:  # which the option does not take
            remedy = f"leave --img-size out, and give its pretrained_cfg an input_size of {(input_size[0], side, side)}"
        raise UserError(f"{called} cannot read images of {size} pixels ({reason}): {remedy}.") from None
    if classes is not None:
        check_scores(scores, (1, classes), called)


def sides_near(model: nn.Module, side: int) -> list[int]:
    """Sides of images that a model may take, its own and usual ones, the nearest to this side first."""
    own = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (side,))[-1]
    return sorted({own, *USUAL_SIDES}, key=lambda other: (abs(other - side), other))


def succeeds(function: Callable, *args) -> bool:
    """Whether a call raises no error."""
    try:
        function(*args)
    except Exception:
        return False
    return True


def check_scores(scores: Any, shape: tuple[int, ...], called: str = "The model") -> None:
    """Raises UserError where a model, called so, has given something else than scores of a shape, (images, classes)."""
    found = tuple(scores.shape) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
    if found != shape:
        raise UserError(f"{called} gives {found} for images, not scores of their classes, {shape}: change its forward.")


def freeze(model: nn.Module, stages: int) -> list[nn.Module]:
    """Stop the training of the stem and the first stages of a ViM2; one more than it has also stops the final norm.

    Returns:
        What is frozen, to be kept in eval mode: without stochastic depth or dropout, it always computes the same.

    Raises:
        UserError: More stages than that, or a model without them.
    """
    if stages == 0:
        return []
    parts = [getattr(model, name, None) for name in ("patch_embed", "stages", "norm")]
    if any(part is None for part in parts):
        raise UserError(f"--freeze works for ViM2, not for {type(model).__name__}: leave it out.")
    stem, all_stages, norm = parts
    if stages > len(all_stages) + 1:
        raise UserError(f"--freeze takes 0 to {len(all_stages) + 1} for this model, got {stages}.")
    frozen = [stem, *all_stages[:stages], *([norm] if stages > len(all_stages) else [])]
    for module in frozen:
        module.requires_grad_(False)
        module.eval()
    return frozen


def train_mode(model: nn.Module, frozen: Sequence[nn.Module]) -> None:
    """Training mode, but for what is frozen."""
    model.train()
    for module in frozen:
        module.eval()


def check_backend(backend: str | None) -> None:
    """Raises UserError where torch.compile has no such backend."""
    known = torch.compiler.list_backends(exclude_tags=()) if backend else ()
    if backend and backend not in known:
        raise UserError(f"There is no --torchcompile {backend}{did_you_mean(backend, known)} (of {', '.join(known)}).")


def compile_model(model: nn.Module, backend: str | None) -> nn.Module:
    """The model compiled by one of torch.compile's backends, or itself without one.

    Raises:
        UserError: No such backend.
    """
    check_backend(backend)
    return torch.compile(model, backend=backend) if backend else model


def autocast(device: torch.device, amp: bool, amp_dtype: str):
    """A maker of contexts for mixed precision, or of ones that do nothing."""
    return partial(torch.autocast, device.type, getattr(torch, amp_dtype)) if amp else nullcontext
