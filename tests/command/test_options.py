from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch

from vim2.command.errors import UserError
from vim2.command.options import (
    REQUIRED,
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
    length,
    make_parser,
    option,
    resolve,
    resume_options,
    unset,
)


@dataclass(frozen=True, kw_only=True)
class LengthOptions(Options, group="length"):
    epochs: Positive = option(10, "epochs, at most", short="-n", metavar="N")
    freeze: Count = option(0, "stages; 0: none")
    lr: PositiveFloat | None = option(None, "default: scaled")
    decay: NotNegative = option(0.1, "of weights")


@dataclass(frozen=True, kw_only=True)
class OtherOptions(Options, group="others, by default none"):
    names: list[str] | None = option(None, "some names")
    levels: list[Share] = option([], "levels", nargs="*")
    scale: Annotated[list[PositiveFloat], length(2), ascending] = option([0.5, 1.0], "of crops")
    flip: Probability = option(0.5, "100 % is always")
    drop: Rate = option(0.0, "rate")
    kind: str = option("plain", "which", choices=("plain", "fancy"))
    sizes: list[int] = option([1], "numbers", choices=(1, 2))
    extra: dict[str, Any] = option({}, "more", metavar="K=V")
    compile: str | None = option(None, "backend", const="inductor")
    amp: bool = option(False, "or not", negatable=True)
    quick: bool = option(False, "skip what can be skipped")
    smooth: Rate = option(0.1, "rate", before=0.0)


@dataclass(frozen=True, kw_only=True)
class SampleOptions(LengthOptions, OtherOptions, DeviceOptions, RunOptions):
    """A command to try."""

    program = "sample.py try"
    data: str = option(REQUIRED, "a file", metavar="DATA", positional=True)
    resume: bool = option(False, "go on")

    @property
    def default_name(self) -> str:
        return Path(self.data).stem


@dataclass(frozen=True, kw_only=True)
class LaterOptions(Options):
    """Of a later command."""

    program = "sample.py later"
    scale: list[float] | None = unset(OtherOptions, "scale")


def given(**options):
    return resolve(SampleOptions, given={"data": "a.csv", **options})[0]


def typed(*argv):
    return resolve(SampleOptions, ["a.csv", *argv])[0]


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["-n", "3"], {"epochs": 3}),
        (["--epochs", "3"], {"epochs": np.int64(3)}),
        (["--lr", "1e-3"], {"lr": 1e-3}),
        (["--lr", "1"], {"lr": 1}),
        (["--decay", "0"], {"decay": 0}),
        (["--names", "x"], {"names": "x"}),
        (["--names", "x", "y"], {"names": ("x", "y")}),
        (["--levels"], {"levels": []}),
        (["--levels", ".1", ".9"], {"levels": np.array([0.1, 0.9])}),
        (["--scale", "1", "1"], {"scale": (1, 1.0)}),
        (["--kind", "fancy"], {"kind": "fancy"}),
        (["--sizes", "2", "1"], {"sizes": [2, 1]}),
        (["--extra", "depths=1,2", "norm=layer", "x=a b"], {"extra": dict(depths=(1, 2), norm="layer", x="a b")}),
        (["--compile"], {"compile": True}),
        (["--compile", "eager"], {"compile": "eager"}),
        ([], {"compile": False}),
        (["--amp", "--quick"], {"amp": True, "quick": True}),
        (["--no-amp"], {"amp": False}),
        (["--output", "runs/a"], {"output": Path("runs/a")}),
        (["--device", "cuda:1"], {"device": torch.device("cuda:1")}),
    ],
    ids=str,
)
def test_a_command_line_and_options_by_name_mean_the_same(argv, options):
    a, b = typed(*argv), given(**options)
    assert a == b
    assert [type(v) for v in a.to_dict().values()] == [type(v) for v in b.to_dict().values()]
    assert resolve(SampleOptions, given=a.to_dict())[0] == a


@pytest.mark.parametrize(
    ("argv", "options", "words"),
    [
        (["--epochs", "0"], {"epochs": 0}, "must be 1 or more, got 0"),
        (["--freeze", "-1"], {"freeze": -1}, "must be 0 or more, got -1"),
        (["--epochs", "many"], {"epochs": "many"}, "must be a whole number"),
        (["--epochs", "1.5"], {"epochs": 1.5}, "must be a whole number, got 1.5"),
        (["--epochs", "9" * 19], {"epochs": 10**19 - 1}, "must be a whole number of 18 digits or fewer, got 999"),
        (["--lr", "0"], {"lr": 0.0}, "must be positive, got 0"),
        (["--lr", "nan"], {"lr": float("nan")}, "must be a finite number, got nan"),
        (["--decay", "inf"], {"decay": float("inf")}, "must be a finite number, got inf"),
        (["--decay", "-1"], {"decay": -1}, "must be 0 or more, got -1"),
        (["--flip", "7"], {"flip": 7}, "must lie in [0, 1], got 7"),
        (["--drop", "1"], {"drop": 1}, "must lie in [0, 1), got 1"),
        (["--levels", ".1", "1"], {"levels": [0.1, 1]}, "must lie in (0, 1), got"),
        (["--scale", "2", "1"], {"scale": [2, 1]}, "must be in ascending order, got"),
        (["--kind", "odd"], {"kind": "odd"}, "must be one of plain, fancy, got"),
        (["--sizes", "1", "3"], {"sizes": [1, 3]}, "must be one of 1, 2, got"),
        (["--extra", "depth"], {"extra": "depth"}, "must be"),
    ],
    ids=str,
)
def test_what_cannot_be_a_value_is_one_line_either_way(argv, options, words):
    flag, name = argv[0], next(iter(options))
    with pytest.raises(UserError) as error:
        typed(*argv)
    assert str(error.value).startswith(f"{flag} {words}") and str(error.value).endswith("(see sample.py try --help)")
    with pytest.raises(UserError) as error:
        given(**options)
    assert str(error.value).startswith(f"{name} {words}")


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": "4"},
        {"epochs": True},
        {"epochs": None},
        {"lr": "1e-3"},
        {"lr": True},
        {"names": []},
        {"names": [1]},
        {"scale": [1.0]},
        {"kind": 3},
        {"extra": {1: 2}},
        {"compile": 3},
        {"amp": 1},
        {"quick": None},
        {"data": b"a.csv"},
    ],
    ids=str,
)
def test_values_of_another_type_are_refused_by_name(options):
    with pytest.raises(UserError, match=rf"^{next(iter(options))} must be "):
        given(**options)


def test_unknown_and_missing_options_and_both_ways_at_once():
    for error in (
        r"unknown option --epoch; did you mean --epochs\? \(see [^(]*$",
        r"the following arguments are required[^(]*\(see [^(]*$",
    ):
        with pytest.raises(UserError, match=error):
            resolve(SampleOptions, ["--epoch", "3"] if "unknown" in error else [])
    with pytest.raises(UserError, match=r"^flowers belongs to no option: names with spaces want quotation marks"):
        resolve(SampleOptions, ["a.csv", "flowers"])
    with pytest.raises(UserError, match=r"unknown option epoch; did you mean epochs\?"):
        given(epoch=3)
    with pytest.raises(UserError, match="try needs data: a file"):
        resolve(SampleOptions)
    for alone in ("sales.csv", np.zeros(3)):
        with pytest.raises(UserError, match=rf"as in try\(data=...\), not a {type(alone).__name__} alone"):
            resolve(SampleOptions, alone)
    with pytest.raises(UserError, match="not both"):
        resolve(SampleOptions, ["a.csv"], {"epochs": 3})
    assert resolve(SampleOptions, ["a.csv", "--epochs", "10"])[1] == {"data", "epochs"}  # though it is the default
    assert resolve(LaterOptions, [])[0].scale is None


def test_the_help_has_groups_in_order_metavars_and_defaults():
    text = " ".join(make_parser(SampleOptions).format_help().split())
    places = [text.index(words) for words in ("A command to try.", "length:", "others, by default none:", "device:")]
    assert places == sorted(places)
    for words in (
        "-n N, --epochs N epochs, at most (default: 10)",
        "--lr LR default: scaled --",
        "--scale SCALE SCALE of crops (default: 0.5 1)",
        "--flip FLIP 100 % is always (default: 0.5)",
        "--kind {plain,fancy} which (default: plain)",
        "--amp, --no-amp or not --",
        "--compile [COMPILE]",
        "DATA a file",
    ):
        assert words in text, words


def resumed(saved, path, **options):
    now, explicit = resolve(SampleOptions, given={"data": "a.csv", **options})
    return resume_options(now, explicit, saved, path, {"data", "epochs", "output", "experiment"}, "start another")


def test_a_run_goes_on_with_the_options_it_was_started_with():
    saved = {**given(epochs=5, lr=1e-3, extra={"depths": (1, 2)}, output="runs", experiment="x").to_dict(), "gone": 3}
    del saved["flip"]  # an option that came later
    options = resumed(saved, Path("runs/x/last.pth"), data="b.csv", extra={"depths": [1, 2]}, lr=0.001)
    assert (options.epochs, options.lr, options.data, options.flip) == (5, 1e-3, "b.csv", 0.5)
    assert resumed(saved, Path("runs/x/last.pth"), epochs=9).epochs == 9
    with pytest.raises(UserError, match=r"a run with --lr 0.001, not 1.0: leave --lr out .* or start another\."):
        resumed(saved, Path("runs/x/last.pth"), lr=1.0)
    with pytest.raises(UserError, match=r"a run without --lr, not with 1.0: leave --lr out"):
        resumed({**saved, "lr": None}, Path("runs/x/last.pth"), lr=1.0)
    with pytest.raises(UserError, match=r"runs/x/last.pth .* decay must be 0 or more, got -1"):
        resumed({**saved, "decay": -1}, Path("runs/x/last.pth"))


def test_a_run_from_before_an_option_goes_on_as_it_was_begun():
    saved = given(output="runs", experiment="x").to_dict()
    assert given().smooth == saved.pop("smooth") == 0.1
    assert resumed(saved, Path("runs/x/last.pth")).smooth == 0.0
    assert resumed({**saved, "smooth": 0.3}, Path("runs/x/last.pth")).smooth == 0.3
    with pytest.raises(UserError, match=r"a run with --smooth 0.0, not 0.1: leave --smooth out"):
        resumed(saved, Path("runs/x/last.pth"), smooth=0.1)


def test_a_run_stays_in_its_folder_unless_another_was_given(tmp_path, monkeypatch):
    saved = given(output="runs", experiment="x").to_dict()
    assert resumed(saved, Path("moved/a/last.pth")).folder == Path("moved/a")
    assert resumed(saved, Path("moved/a/last.pth"), output="moved").folder == Path("moved/a")
    assert resumed(saved, Path("moved/a/last.pth"), output="new", experiment="b").folder == Path("new/b")
    monkeypatch.chdir(tmp_path)
    assert resumed(saved, Path("last.pth")).folder == tmp_path
