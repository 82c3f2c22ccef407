"""What a checkpoint tells about its model: read from a file, so believed only where it can be true."""

import inspect
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
from timm.models import build_model_with_cfg
from torch import nn

from ..checkpoints import read_metadata
from ..command.errors import UserError
from ..command.options import (
    REQUIRED,
    Count,
    Options,
    Positive,
    PositiveFloat,
    Share,
    length,
    option,
    plain,
    resolve,
)
from ..command.places import is_place
from ..command.runs import read_saved
from .options import INTERPOLATIONS, CropShare

__all__ = [
    "check_model_kwargs",
    "check_types",
    "fine_tuned",
    "no_terms_told",
    "read_config",
    "read_described",
    "read_facts",
    "read_pretrained_cfg",
    "terms_of",
    "weights_file",
    "weights_name",
]

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # in folders of timm's, as on the Hugging Face Hub

TERMS = ("license", "description", "notes", "origin_url")  # of weights, in a pretrained_cfg

# What timm takes beside the arguments of a model's constructor: where to find and keep weights, how to wrap the model.
_TIMMS_OWN = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *("pruned", "features_only", "out_indices", "feature_cls"),
}
_COMMANDS_OWN = {"device", "dtype"}


@dataclass(frozen=True, kw_only=True)
class Facts(Options):
    program = "checkpoint"
    arch: str = option(REQUIRED, "timm's name of the model")
    model_kwargs: dict[str, Any] = option({}, "arguments of its constructor")
    num_classes: Positive | None = option(None, "its classes")
    in_chans: Positive | None = option(None, "channels of its images")
    # two may have one, as ImageNet's cranes
    class_names: list[str] | None = option(None, "of the classes, from the first on")
    data_config: dict[str, Any] | None = option(None, "timm's data config")
    held_out: bool = option(False, "whether training set images to validate on aside")
    args: dict[str, Any] = option({}, "options of training")
    terms: dict[str, Any] | None = option(None, "of the weights")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Options):
    program = "data_config"
    input_size: Annotated[list[Positive], length(3)] | None = option(None, "channels, height and width")
    interpolation: str | None = option(None, "of resizing", choices=INTERPOLATIONS)
    mean: list[float] | None = option(None, "of the pixels, a number a channel")
    std: list[PositiveFloat] | None = option(None, "of the pixels, a number a channel")
    crop_pct: CropShare | None = option(None, "size over the size to resize to")
    crop_mode: str | None = option(None, "of resizing", choices=("center", "squash", "border"))


def texts(values: Mapping[str, Any]) -> None:
    """Refuses values that are no text."""
    if not all(isinstance(value, str) for value in values.values()):
        raise ValueError("must be text by name")


@dataclass(frozen=True, kw_only=True)
class PretrainedCfg(DataConfig):
    """What the commands, or timm for them, read of a pretrained_cfg."""

    program = "pretrained_cfg"
    num_classes: Count | None = option(None, "classes of the weights")
    label_names: list[str] | None = option(None, "of the classes, from the first on")
    label_descriptions: Annotated[dict[str, Any], texts] | None = option(None, "of the classes, by their names")
    first_conv: list[str] = option([], "the stem's module, or several")
    classifier: list[str] = option([], "the head's module, or several")


@dataclass(frozen=True, kw_only=True)
class HoldOut(Options):
    program = "args"
    data_dir: str | None = option(None, "where the images were")
    holdout: Share = option(REQUIRED, "share of each class")


def read_facts(content: Any, path: str | Path) -> dict[str, Any]:
    """The facts in a checkpoint of `vim2.classify.train` or `vim2 convert`, those of `Facts`.

    Args:
        content: What the file holds.
        path: The file, for messages.

    Returns:
        Those that it holds, by name; none of a bare file of weights.

    Raises:
        UserError: One that cannot be true.
    """
    if not isinstance(content, dict) or "arch" not in content:
        return {}
    try:
        facts = _read(Facts, content)
        check_model_kwargs(facts.get("model_kwargs", {}), "its model_kwargs")
        names, classes = facts.get("class_names"), facts.get("num_classes")
        if names is not None and len(names) > (classes or len(names)):
            raise UserError(f"it names {len(names)} classes, more than its model has")
        if facts.get("data_config") is not None:
            facts["data_config"] = _read_config(DataConfig, facts["data_config"], facts.get("in_chans"))
        if "terms" in facts:
            facts["terms"] = terms_of(facts["terms"])
        elif (terms := _terms_by_args(facts["arch"], facts.get("args", {}))) is not None:
            facts["terms"] = terms
        if is_place(facts["arch"]):  # nothing is read or downloaded because a file says so
            raise UserError(f"There is no model {facts['arch']}")
        if facts.get("held_out"):
            facts["args"] = _read(HoldOut, facts.get("args", {}))
    except UserError as error:
        raise UserError(f"{path} is damaged, or no checkpoint of this program: {str(error).rstrip('.')}.") from None
    return facts


def read_pretrained_cfg(cfg: Mapping[str, Any], called: str) -> dict[str, Any]:
    """What the commands, or timm for them, read of a pretrained_cfg, which anybody may have written.

    Args:
        cfg: timm's, or a config.json's.
        called: What to call it in a message.

    Raises:
        UserError: A value that cannot be one; the message names its key, and says what it must be.
    """
    try:
        return _read_config(PretrainedCfg, {**cfg, "label_names": _list_names(cfg.get("label_names"))})
    except UserError as error:
        raise UserError(f"{called} cannot be used: {error}") from None


def _list_names(names: Any) -> Any:
    """timm's label_names, which may also be a dictionary by the classes' numbers, as a list; None where there are none,
    or not of all classes up to the last, since names stand for the first classes here."""
    if isinstance(names, Mapping) and all(re.fullmatch("[0-9]{1,9}", str(number)) for number in names):  # text in JSON
        by_number = {int(number): name for number, name in names.items()}
        names = [by_number.get(number) for number in range(len(by_number))]
        names = None if None in names else names
    return None if names in ([], ()) else names


def _read_config(cls: type[DataConfig], given: Mapping[str, Any], in_chans: int | None = None) -> dict[str, Any]:
    """As `_read`, with tuples, as timm has them; `in_chans` where there is no input_size."""
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in _read(cls, given).items()}
    channels = config["input_size"][0] if "input_size" in config else in_chans or 3
    for name in ("mean", "std"):
        # models of grey images may have ImageNet's, and one number is for all channels
        if name in config and len(config[name]) not in (1, 3, channels):
            raise UserError(f"{name} must be {channels} numbers, one a channel, got {list(config[name])}.")
    return config


def terms_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What a pretrained_cfg of timm's says of how weights came about and of what may be done with them: `license`,
    `description`, `notes` and `origin_url`, as far as they are there."""
    told = {name: plain(cfg.get(name)) for name in TERMS}
    return {
        name: value
        for name, value in told.items()
        if value and (isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)))
    }


def fine_tuned(terms: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The terms of weights that were trained further from those of these terms, which `name` names."""
    described = terms.get("description", "")
    if not described.startswith("Fine-tuned from "):
        described = f"Fine-tuned from {name}. {described}".rstrip()
    return {**terms, "description": described}


def no_terms_told(name: str, how: str = "Fine-tuned") -> dict[str, Any]:
    """The terms of weights that were made, by words for how, of those that `name` names, of which nothing is known."""
    return {"description": f"{how} from {name}, in which no terms are told."}


def weights_name(cfg: Mapping[str, Any]) -> str:
    """timm's name of the weights that a pretrained_cfg is of."""
    return ".".join(cfg[part] for part in ("architecture", "tag") if cfg.get(part))


def _terms_by_args(arch: str, args: Mapping[str, Any]) -> dict[str, Any] | None:
    """The terms of a run from before terms were kept, by its options; None where these do not tell how it began."""
    if isinstance(file := args.get("initial_checkpoint"), str):
        return no_terms_told(Path(file).name)  # which is not read because another file names it
    if args.get("pretrained") is True:
        cfg = _pretrained_cfg(arch)
        return fine_tuned(terms_of(cfg), weights_name(cfg)) if cfg else no_terms_told(arch)
    return {} if args.get("pretrained") is False else None


def _pretrained_cfg(name: str) -> dict[str, Any] | None:
    """timm's, of a registered model's name; None where it knows none."""
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such tag
        return None
    return cfg and cfg.to_dict()


def weights_file(path: str | os.PathLike) -> Path:
    """The file of weights that a path stands for: itself, or of a folder as `vim2 export --format timm` writes it, and
    as the Hugging Face Hub has it, the one in it."""
    inside = Path(path, WEIGHTS)
    return inside if inside.is_file() else Path(path)


def read_described(path: str | os.PathLike) -> tuple[Any, dict[str, Any]]:
    """The content of a file of weights, and what it, or timm's config.json beside it, tells about its model.

    Args:
        path: As `weights_file` takes it.

    Returns:
        What the file holds, and `read_facts` of it. Of a config.json, or of the metadata in a .safetensors file, the
        descriptions of the classes, by their names, are `class_descriptions`.

    Raises:
        UserError: As `read_saved` and `read_facts`; a damaged config.json.
    """
    path = weights_file(path)
    content, config = read_saved(path), path.with_name(CONFIG)
    told, cfg = {}, {}
    if path.name == WEIGHTS and config.is_file():
        told, cfg = read_config(config)
    if not told and path.suffix == ".safetensors":
        config = path
        told, cfg = _check_config(_parse_metadata(read_metadata(path)), path)
    if not told:
        facts = read_facts(content, path)
        return content, facts or _terms_of_own(path)
    args = told.get("model_args") if isinstance(told.get("model_args"), dict) else {}
    facts = dict(arch=told["architecture"], class_names=cfg.get("label_names"), data_config=cfg)
    # 0 is of weights without a classifier, which then take as many as there are
    facts |= dict(num_classes=told.get("num_classes") or None, in_chans=args.get("in_chans"))
    facts["model_kwargs"] = {name: value for name, value in args.items() if name not in facts}
    facts["terms"] = terms_of(_pretrained_cfg_in(told))
    facts = read_facts(facts, config)
    if "label_descriptions" in cfg:
        facts["class_descriptions"] = cfg["label_descriptions"]
    return content, facts


def _terms_of_own(path: Path) -> dict[str, Any]:
    """The `terms` of a file of weights that comes with the package, which a pretrained_cfg tells; nothing of others."""
    for name in timm.list_models("vim2_*", pretrained=True, module="vim2"):
        cfg = _pretrained_cfg(name) or {}
        if os.path.isfile(cfg.get("file") or "") and os.path.samefile(cfg["file"], path):
            return {"terms": terms_of(cfg)}
    return {}


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What timm's config.json holds, and what `read_pretrained_cfg` reads of it; nothing of another library's.

    Raises:
        UserError: As `read_pretrained_cfg`; a damaged file.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy or download it again.") from None
    return _check_config(told, path)


def _parse_metadata(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What `vim2 export` has written into the metadata of a .safetensors file, by the names of a config.json; None if
    another program has."""
    try:
        return {name: json.loads(text) for name, text in metadata.items() if name != "format"}
    except (RecursionError, ValueError):
        return None


def _check_config(told: Any, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `read_config`, of what a file holds."""
    if not isinstance(told, dict) or "architecture" not in told:
        return {}, {}
    outside = {name: told[name] for name in ("num_classes", "label_names", "label_descriptions") if name in told}
    return told, read_pretrained_cfg({**_pretrained_cfg_in(told), **outside}, f"The pretrained_cfg in {path}")


def _pretrained_cfg_in(told: dict[str, Any]) -> dict[str, Any]:
    """The pretrained_cfg in a config.json, which was the whole of it in timm's first ones."""
    cfg = told.get("pretrained_cfg", told)
    return cfg if isinstance(cfg, dict) else {}


def _read(cls: type[Options], given: Mapping[Any, Any]) -> dict[str, Any]:
    """Those of the given values that a class declares, checked and converted by it."""
    known = {name: value for name, value in given.items() if name in cls.__dataclass_fields__ and value is not None}
    options, _ = resolve(cls, given=known)
    return {name: getattr(options, name) for name in known}


def check_model_kwargs(given: Mapping[str, Any], called: str) -> None:
    """Refuse what is no argument of a model's constructor that a file could hold.

    timm would also take, by the same way, addresses and files to get weights from and folders to write them to.

    Args:
        given: Arguments by name.
        called: What to call them in a message.

    Raises:
        UserError: An argument of timm's own, or a value that is more than numbers, text and lists of them.
    """
    for name, value in given.items():
        if name in _TIMMS_OWN | _COMMANDS_OWN:
            raise UserError(f"{called} may hold arguments of the model's constructor only, and {name} is none.")
        if not _is_plain(value):
            raise UserError(f"{called} may hold finite numbers, text and lists of them only, and {name} is none.")
    if given.get("global_pool") == "":
        raise UserError(f"{called} leave pooling out (global_pool), without which there are no classes.")


def check_types(model: nn.Module, given: Mapping[str, Any], called: str) -> None:
    """Refuse arguments of another kind than the defaults of a model's constructor, for it may not have used them yet.

    Args:
        model: Made with them.
        given, called: As for `check_model_kwargs`.

    Raises:
        UserError: Text for a number, say. A list of numbers stands for a number, one a stage, and the reverse.
    """
    for name, parameter in inspect.signature(type(model)).parameters.items():
        wanted, got = _kind(parameter.default), _kind(given.get(name))
        if None not in (wanted, got) and wanted != got:
            raise UserError(f"{called} hold {got} for {name}, which takes {wanted}.")


def _kind(value: Any) -> str | None:
    if isinstance(value, list | tuple):
        kinds = {_kind(v) for v in value}
        return kinds.pop() if len(kinds) == 1 else None
    if isinstance(value, bool | str):
        return "text" if isinstance(value, str) else "True or False"
    return "a number" if isinstance(value, int | float) else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):  # such as the arguments of a norm
        return all(isinstance(name, str) and name not in _COMMANDS_OWN for name in value) and all(
            map(_is_plain, value.values())
        )
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
