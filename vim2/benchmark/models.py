"""Parameters, FLOPs, times and memory of timm's models."""

import argparse
import ast
import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..classify.sources import ModelSource, find_model
from ..command.errors import UserError, first_line
from ..command.own_models import place_in
from ..command.places import is_place
from .measuring import autocast, measure

CHANNELS = 3  # of images


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """A model's name, which `find_model` takes, and the arguments of its constructor, from NAME or
    NAME:key=value,key=value; values are Python literals, or else text.

    Raises:
        UserError: Text of another form, or brackets that do not close.
    """
    name, _, arguments = text.partition(":")
    if is_place(text):  # local-dir: and hf-hub: have a colon of their own, and a folder's name may have one
        place, *rest = re.split(r":(?=\s*[^\W\d]\w*\s*=)", arguments, maxsplit=1)
        name, arguments = f"{name}:{place}", "".join(rest)
    kwargs = {}
    pairs, depth = [""], 0
    for character in arguments:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            break
        if character == "," and depth == 0:
            pairs.append("")
        else:
            pairs[-1] += character
    if depth:
        raise UserError(f"Cannot read the model {text!r}: its brackets do not close.")
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if pair.strip() and not (equals and key.isidentifier()):
            raise UserError(f"Cannot read {pair.strip()!r} in the model {text!r}: arguments are key=value,key=value.")
        if equals:
            kwargs[key] = literal(value)
    return name, kwargs


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def find(text: str) -> tuple[ModelSource, dict[str, Any]]:
    """What `parse_model` reads, with what the name stands for.

    Raises:
        UserError: As `parse_model` and `find_model`.
    """
    name, kwargs = parse_model(text)
    return find_model(name), kwargs


def create_model(text: str, size: int, device: torch.device | str) -> nn.Module:
    """A timm model with random weights, as `find` finds it, for square images of `size` pixels and 3 channels.

    Raises:
        UserError: As `find`; it does not take these arguments, or they, or its config.json, say what images it is for.
        Exception: Of whatever kind a model raises that takes no images of this size; a RuntimeError of one that cannot
            be made on the meta device, where values cannot be read.
    """
    source, kwargs = find(text)
    if "img_size" in kwargs:
        raise UserError(f"{text} has an img_size, and images are as large as --img-size says: give it there.")
    given = {**source.model_kwargs, **kwargs}
    if given.get("in_chans", CHANNELS) != CHANNELS:
        raise UserError(
            f"{text} has an in_chans of {given['in_chans']}, and images have {CHANNELS} channels here: give it "
            f"in_chans={CHANNELS}."
        )
    with torch.device(device):
        try:  # models with fixed windows or positions want to know it
            return timm.create_model(source.name, **{**given, "img_size": size})
        except Exception as error:  # of whatever kind: of this argument, which most models do not take, or of others
            of_size = error
        try:
            model = timm.create_model(source.name, **given)
        except Exception as error:
            if isinstance(error, RuntimeError) and torch.device(device).type == "meta":
                raise
            told = f"{first_line(error)}{where(source.arch, error)}"
            raise UserError(f"{source.name} cannot be made with {given}: {told}") from None
    if not isinstance(of_size, TypeError):
        raise of_size
    return model


def where(arch: str, error: BaseException) -> str:
    """Where in a user's own files a model, by timm's name, has failed; "" elsewhere."""
    return place_in(timm.model_entrypoint(arch).__module__, error)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module, size: int) -> float:
    """FLOPs for one image, counted on the meta device: the module's docstring says what counts how."""
    image = torch.empty(1, CHANNELS, size, size, device="meta")
    with FlopCounter() as counter, torch.no_grad():
        model.eval()(image)
    return multiply_adds(counter)


@functools.cache
def model_size(name: str, size: int, device: str) -> tuple[int, float | None]:
    """Parameters of a model, and its FLOPs for one square image of `size` pixels, by a pass on the meta device, which
    tells at once whether it takes such images. Some models do not run there at all, as those that read a value: of them
    a pass on `device` tells that, and their FLOPs are None; why, a line on stderr says.

    Raises:
        UserError: It does not, or there is no such model.
    """
    try:
        model = create_model(name, size, "meta")
        return count_parameters(model), count_flops(model, size)
    except UserError:
        raise
    except Exception as error:  # of whatever kind a model, or a rule for counting, raises
        reason = f"{type(error).__name__}: {first_line(error)}"
    # not inside of that clause: an error of the second pass would be told as one that came of the first
    try:
        model = create_model(name, size, device).eval()
        with torch.inference_mode():
            model(torch.zeros(1, CHANNELS, size, size, device=device))
    except UserError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        told = f"{first_line(error)}{where(find(name)[0].arch, error)}"
        raise UserError(f"{name} does not run on images of {size} x {size} pixels: {told}") from None
    _say_not_counted(name, reason)
    return count_parameters(model), None


@functools.cache  # once, not at each image size
def _say_not_counted(name: str, reason: str) -> None:
    print(f"The FLOPs of {name} cannot be counted ({reason}).", file=sys.stderr, flush=True)


class FlopCounter(FlopCounterMode):
    """PyTorch's counter, but for its counts by module: these take hooks on every module, which make ViM2's mixers call
    each of theirs, as hooks ask for, in place of the operators that run in fact."""

    def __init__(self):
        super().__init__(display=False)
        self.mod_tracker = _NoModules()


class _NoModules:
    parents = ("Global",)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def multiply_adds(counter: FlopCounter) -> float:
    """FLOPs of what ran under `counter`, as the module's docstring counts them."""
    scan = sum(n for op, n in counter.get_flop_counts().get("Global", {}).items() if str(op).startswith("vim2."))
    return (counter.get_total_flops() - scan) / 2 + scan


def measure_model(name: str, size: int, batch: int, args: argparse.Namespace) -> dict:
    """All figures of one model at one image and batch size."""
    parameters, flops = model_size(name, size, args.device)
    row = {"model": name, "size": size, "batch": batch, "params_m": parameters / 1e6}
    row["gflops"] = None if flops is None else flops / 1e9
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
    parameters = list(model.parameters())

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
        for parameter in parameters:  # as optimisers do; model.zero_grad first looks for them in all modules
            parameter.grad = None

    return {"infer": infer, "train": train}


def random_image(size: int, batch: int, args: argparse.Namespace) -> Tensor:
    image = torch.randn(batch, CHANNELS, size, size, device=args.device)
    return image.to(memory_format=torch.channels_last) if args.channels_last else image
