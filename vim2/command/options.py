"""Options of the commands: declared once, as the fields of a dataclass, and read from a command line, from Python and
from checkpoints alike.

    @dataclass(frozen=True, kw_only=True)
    class LengthOptions(Options, group="length"):
        epochs: Positive = option(10, "epochs at most", metavar="N")
        lr: PositiveFloat | None = option(None, "learning rate; default: scaled with the batch")

A field's annotation says what its values may be: bool, int, float (always finite), str, list or dict, `| None`, and in
`Annotated` functions that raise a ValueError for a value that is none, such as `Between`. A command's options are a
subclass of as many such classes as its help has groups.
"""

import argparse
import ast
import dataclasses
import inspect
import math
import numbers
import os
import re
import types
from argparse import SUPPRESS, BooleanOptionalAction
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from .errors import UserError, did_you_mean

__all__ = [
    "REQUIRED",
    "Between",
    "Count",
    "DeviceOptions",
    "NotNegative",
    "Options",
    "Parser",
    "Positive",
    "PositiveFloat",
    "Probability",
    "Rate",
    "RunOptions",
    "Share",
    "as_saved",
    "ascending",
    "fill_in",
    "length",
    "make_parser",
    "option",
    "plain",
    "resolve",
    "resume_options",
    "unset",
]

REQUIRED = dataclasses.MISSING


@dataclass(frozen=True)
class Between:
    """Refuses numbers outside an interval.

    Args:
        low, high: Its ends.
        ends: Which of them belong to it, as mathematicians write it: "[]", "[)", "(]" or "()".
        words: What to say of others; by default, the interval.
    """

    low: float = -math.inf
    high: float = math.inf
    ends: str = "[]"
    words: str = ""

    def __call__(self, value: float) -> None:
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        if not (above and below):
            raise ValueError(self.words or f"must lie in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}")


def ascending(values: Sequence[float]) -> None:
    """Refuses lists in which a number is smaller than the one before."""
    if list(values) != sorted(values):
        raise ValueError("must be in ascending order")


def length(number: int):
    """Refuses lists of another length."""

    def check(values: Sequence) -> None:
        if len(values) != number:
            raise ValueError(f"must be {number} values")

    check.length = number
    return check


Positive = Annotated[int, Between(1, words="must be 1 or more")]
Count = Annotated[int, Between(0, words="must be 0 or more")]
PositiveFloat = Annotated[float, Between(0, ends="(]", words="must be positive")]
NotNegative = Annotated[float, Between(0, words="must be 0 or more")]
Probability = Annotated[float, Between(0, 1)]
Rate = Annotated[float, Between(0, 1, "[)")]  # the rate of dropping something, or of a decay
Share = Annotated[float, Between(0, 1, "()")]


class Options:
    """Options of a command, or a group of them: a frozen dataclass of `option`s.

    The docstring of a command's options begins its help.

    Attributes:
        group: Title of the options that a class declares itself.
        program: Program and command, where a class is the options of one.
        needless: Names that users of other libraries look for, and what makes up for them, a clause.
    """

    group: ClassVar[str | None] = None
    program: ClassVar[str] = ""
    needless: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, group: str | None = None):
        cls.group = group

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, which `resolve` takes."""
        return dataclasses.asdict(self)


OptionsT = TypeVar("OptionsT", bound=Options)


def option(
    default: Any,
    help: str,
    *,
    short: str | None = None,
    metavar: str | tuple[str, ...] | None = None,
    choices: Collection | None = None,
    nargs: str | None = None,
    const: Any = None,
    positional: bool = False,
    negatable: bool = False,
    before: Any = REQUIRED,
) -> Any:
    """Declares an option as a field of an `Options`.

    Args:
        default: Its value where none is given, or REQUIRED.
        help: What it is; the default is added unless it says one itself.
        short: Its short form, such as "-b".
        metavar: What stands for its value in the help.
        choices: The values that it, or each in its list, may have.
        nargs: argparse's, of a list: "+" unless its length is fixed.
        const: Its value where it is given without one; the same as True from Python.
        positional: It is given without its name.
        negatable: It is a bool that has a --no- form.
        before: The value that says what was done before there was the option, where its default is another: that of
            runs which were saved without it.
    """
    metadata = {
        "help": help,
        "short": short,
        "metavar": metavar,
        "choices": choices,
        "nargs": nargs,
        "const": const,
        "positional": positional,
        "negatable": negatable,
        "before": before,
    }
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def unset(group: type[Options], name: str) -> Any:
    """The option of another group once more, without a default."""
    return dataclasses.field(default=None, metadata=group.__dataclass_fields__[name].metadata)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options, group="device"):
    device: str | None = option(None, "cuda, cuda:1, cpu, ...; default: a GPU if there is one")


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options, group="run"):
    output: str = option("runs", "parent folder, in which a run writes to a folder of its own", metavar="DIR")
    experiment: str | None = option(
        None, "name of the run's own folder in --output; default: after model and data", metavar="NAME"
    )

    @property
    def default_name(self) -> str:
        """Name of the run's folder where none is given."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output) / (self.experiment or self.default_name)


RunOptionsT = TypeVar("RunOptionsT", bound=RunOptions)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and name the option that was probably meant."""

    needless: Mapping[str, str] = {}  # as `Options` has them

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments:"):
            given = message.split(": ", 1)[1].split()[0].partition("=")[0]
            known = self._option_string_actions
            if given.startswith("-"):
                message = f"unknown option {given}" + _instead(given, known, self.needless)
            else:
                message = f"{given} belongs to no option: names with spaces want quotation marks"
                message += ", and a folder of images stands behind --data-dir" if "--data-dir" in known else ""
        raise UserError(f"{message} (see {self.prog} --help)")


def make_parser(cls: type[Options]) -> Parser:
    """The parser of a command's options. It only splits the line: `resolve` reads the values, which stay text here."""
    parser = Parser(prog=cls.program, description=cls.__doc__, argument_default=SUPPRESS, allow_abbrev=False)
    parser.needless = cls.needless
    title = {
        name: base.group
        for base in reversed(cls.__mro__)
        if issubclass(base, Options)
        for name in inspect.get_annotations(base)
    }
    # groups in the order in which a class names its bases, which is not that of its fields; its own options first
    order = list(dict.fromkeys(base.group for base in cls.__mro__ if issubclass(base, Options)))
    groups = {name: parser.add_argument_group(name) if name else parser for name in order}
    hints = get_type_hints(cls, include_extras=True)
    for field in sorted(dataclasses.fields(cls), key=lambda field: order.index(title[field.name])):
        _add_argument(groups[title[field.name]], field, hints[field.name])
    return parser


def _add_argument(parser, field: dataclasses.Field, hint: Any) -> None:
    about = field.metadata
    names = [field.name] if about["positional"] else [n for n in (about["short"], _flag(field.name)) if n]
    default = _default(field)
    text = about["help"]
    if "default:" not in text and default not in (REQUIRED, None, False, "", [], {}):
        shown = " ".join(f"{v:g}" for v in default) if isinstance(default, list) else default
        text += f" (default: {shown})"
    how: dict[str, Any] = {"help": text.replace("%", "%%")}
    kind, checks = _unwrap(hint)
    if kind is bool:
        how["action"] = BooleanOptionalAction if about["negatable"] else "store_true"
        parser.add_argument(*names, **how)
        return
    if about["choices"] and not about["metavar"]:
        how["metavar"] = "{" + ",".join(map(str, about["choices"])) + "}"
    elif about["metavar"]:
        how["metavar"] = about["metavar"]
    if get_origin(kind) is list:
        fixed = next((c.length for c in checks if hasattr(c, "length")), None)
        how["nargs"] = fixed or about["nargs"] or "+"
    elif get_origin(kind) is dict:
        how["nargs"] = "*"
    elif about["const"] is not None:
        how.update(nargs="?", const=about["const"])
    if default is REQUIRED and not about["positional"]:
        how["required"] = True
    parser.add_argument(*names, **how)


def resolve(
    cls: type[OptionsT], argv: Sequence[str] | None = None, given: Mapping[str, Any] | None = None
) -> tuple[OptionsT, set[str]]:
    """All options of a command, and the names of those that were given.

    Args:
        cls: The command's options.
        argv: Command line; or else
        given: options by name, of the same types and ranges.

    Raises:
        UserError: An unknown or missing option, or a value that cannot be one.
    """
    if argv is not None:
        if isinstance(argv, str) or not isinstance(argv, Sequence):
            name, kind = cls.program.split()[-1], type(argv).__name__
            first, *_ = *_required(cls), *cls.__dataclass_fields__
            raise UserError(f"{name} takes options by name, as in {name}({first}=...), not a {kind} alone.")
        if given:
            raise UserError(f"Give {cls.program} a command line or options by name, not both.")
        parser = make_parser(cls)
        texts = vars(parser.parse_args(argv))
        try:
            values = _read(cls, texts, _flag, from_text=True)
        except ValueError as error:
            parser.error(str(error))
        return cls(**values), set(values)
    given = given or {}
    fields = cls.__dataclass_fields__
    for name in given:
        if name not in fields:
            raise UserError(f"unknown option {name}{_instead(name, fields, cls.needless)}")
    for name in _required(cls):
        if name not in given:
            raise UserError(f"{cls.program.split()[-1]} needs {name}: {fields[name].metadata['help']}.")
    try:
        return cls(**_read(cls, given, str)), set(given)
    except ValueError as error:
        raise UserError(f"{error}.") from None


def _instead(given: str, known: Iterable[str], needless: Mapping[str, str]) -> str:
    """What to do without an option, or the one that was probably meant; "" where neither is known."""
    clause = needless.get(given.lstrip("-").replace("-", "_"))
    return f": {clause}, so leave it out" if clause else did_you_mean(given, known)


def fill_in(options: OptionsT, values: Mapping[str, Any], explicit: Set[str]) -> OptionsT:
    """Options with these values for those that were not given."""
    return dataclasses.replace(options, **{name: v for name, v in values.items() if name not in explicit})


def as_saved(cls: type[Options], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Values of options, by name, that an earlier version may have saved: options that are no more are left out, and
    those that came since stand for what was done before them, if they say what that is."""
    fields = cls.__dataclass_fields__
    came = {name: field.metadata["before"] for name, field in fields.items()}
    return {
        **{name: value for name, value in came.items() if value is not REQUIRED},
        **{name: value for name, value in saved.items() if name in fields},
    }


def resume_options(
    options: RunOptionsT, explicit: set[str], saved: Mapping[str, Any], path: Path, may_change: Set[str], otherwise: str
) -> RunOptionsT:
    """The options of a run that goes on: those it was started with, and of those given now the ones it may change.

    Args:
        options: Given now, resolved.
        explicit: Names of those that were given.
        saved: By name, of the run, taken `as_saved`; what came since and does not say what was before has its default.
        path: The run's last.pth. The run stays in its folder unless another was given.
        may_change: Names of those that do not make it another run.
        otherwise: What to do for another run, to end "leave it out to go on with that run, or ..."

    Raises:
        UserError: An option that would make it another run; a file with a value that cannot be one.
    """
    try:
        values = _read(type(options), as_saved(type(options), saved), str)
    except ValueError as error:
        raise UserError(f"{path} is of a run that cannot go on: {error}.") from None
    for name in sorted(explicit - may_change):
        if name in values and plain(getattr(options, name)) != plain(values[name]):
            flag, given = _flag(name), getattr(options, name)
            one = f"without {flag}, not with" if values[name] is None else f"with {flag} {values[name]}, not"
            raise UserError(
                f"{path} is of a run {one} {given}: leave {flag} out to go on with that run, or {otherwise}."
            )
    resumed = fill_in(options, values, explicit)
    if options.folder == path.parent or not explicit & {"output", "experiment"}:
        folder = path.parent if path.parent.name else path.parent.absolute()
        resumed = dataclasses.replace(resumed, output=str(folder.parent), experiment=folder.name)
    return resumed


def plain(value: Any) -> Any:
    """A value as it is after a checkpoint: lists, not tuples."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _required(cls: type[Options]) -> list[str]:
    return [name for name, field in cls.__dataclass_fields__.items() if _default(field) is REQUIRED]


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is REQUIRED else field.default_factory()


def _unwrap(hint: Any) -> tuple[Any, tuple]:
    """The type that an annotation is about, and its checks."""
    checks: tuple = ()
    while get_origin(hint) in (Annotated, Union, types.UnionType):
        first, *rest = get_args(hint)
        checks += tuple(rest) if get_origin(hint) is Annotated else ()
        hint = first
    return hint, checks


def _read(cls: type[Options], given: Mapping[str, Any], label, from_text: bool = False) -> dict[str, Any]:
    """Values of options by name, each of its type.

    Args:
        cls: The options.
        given: Values, as they are or, on a command line, as text.
        label: From a name to what a message calls it.
        from_text: Whether they are text.

    Raises:
        ValueError: One that cannot be a value.
    """
    hints, values = get_type_hints(cls, include_extras=True), {}
    for name, value in given.items():
        about = cls.__dataclass_fields__[name].metadata
        if isinstance(value, bool) and about["const"] is not None:  # the flag alone, or no flag
            value = about["const"] if value else None
        try:
            values[name] = _convert(value, hints[name], from_text)
            if values[name] == [] and about["nargs"] != "*" and _default(cls.__dataclass_fields__[name]) != []:
                raise ValueError("must be one value or more")
            if about["choices"] and values[name] is not None:
                each = values[name] if isinstance(values[name], list) else [values[name]]
                if any(v not in about["choices"] for v in each):
                    raise ValueError(f"must be one of {', '.join(map(str, about['choices']))}")
        except ValueError as error:
            called = name if about["positional"] else label(name)
            shown = " ".join(value) if from_text and isinstance(value, list) else value if from_text else repr(value)
            raise ValueError(f"{called} {error}, got {shown}") from None
    return values


def _convert(value: Any, hint: Any, from_text: bool) -> Any:
    """A value as an annotation wants it, or a ValueError that says what it must be."""
    if get_origin(hint) in (Union, types.UnionType):
        return None if value is None else _convert(value, get_args(hint)[0], from_text)
    if get_origin(hint) is Annotated:
        hint, *checks = get_args(hint)
        value = _convert(value, hint, from_text)
        for check in checks:
            check(value)
        return value
    if get_origin(hint) is list:
        several = isinstance(value, Iterable) and not isinstance(value, str | bytes | os.PathLike | Mapping)
        return [_convert(v, get_args(hint)[0], from_text) for v in (value if several else [value])]
    if get_origin(hint) is dict:
        return dict(map(_name_and_value, value)) if from_text else _mapping(value)
    return _READERS[hint](value, from_text)


def _name_and_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError("must be NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError("must be a dictionary with names as keys")
    return dict(value)


def _read_bool(value: Any, from_text: bool) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be True or False")
    return value


def _read_int(value: Any, from_text: bool) -> int:
    if from_text:
        whole = re.fullmatch(r"[-+]?\d+", value)
    else:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole:
        raise ValueError("must be a whole number")
    if len(str(value).lstrip("+-")) > 18:  # which 64 bits hold
        raise ValueError("must be a whole number of 18 digits or fewer")
    return int(value)


def _read_float(value: Any, from_text: bool) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    is_number = from_text or (isinstance(value, numbers.Real) and not isinstance(value, bool))
    if not (is_number and math.isfinite(number)):
        raise ValueError("must be a finite number")
    return number


def _read_str(value: Any, from_text: bool) -> str:
    if not isinstance(value, str | os.PathLike | torch.device):
        raise ValueError("must be text")
    return str(value)


_READERS = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str}
