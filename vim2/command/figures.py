"""What the pictures of all commands share. They need matplotlib; where it is missing, a command does without them."""

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import write_atomically
from .errors import UserError
from .processes import Processes
from .progress import say

__all__ = ["figure", "figures_if_possible", "from_zero", "save", "shorten", "whole_numbers"]


class _NoMatplotlib(UserError):
    pass


def figure(**kwargs):
    """A matplotlib figure without pyplot, so that no window system is asked for.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise _NoMatplotlib("Pictures need matplotlib: pip install matplotlib.") from None
    return Figure(layout="constrained", **kwargs)


@contextmanager
def figures_if_possible(names: str, processes: Processes | None = None, silent: bool = False) -> Iterator[None]:
    """Leaves the pictures called `names` out where matplotlib is not installed, and says so unless it is silent."""
    try:
        yield
    except _NoMatplotlib as error:
        if not silent:
            say(f"No {names}: {error}", processes)


def from_zero(axes) -> None:
    """Let the y axis begin at zero, with room above what is drawn.

    matplotlib's own margin is a share of what the values span: where they lie close together, far from zero, it's less
    than a marker's half, which the frame would then cut off.
    """
    top = axes.dataLim.y1
    axes.set_ylim(0, 1.05 * top if top > 0 else None)


def whole_numbers(axis, most: int | str = "auto") -> None:
    """Ticks at whole numbers alone, such as epochs, `most` of them at most; "auto" has as many as there is room for.

    Unless it's told that one tick will do, matplotlib writes fractions where fewer than two whole numbers are in sight.
    """
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def save(fig, path: str | os.PathLike) -> None:
    """Write a figure as a PNG, in one step, and say so where the font lacks characters: matplotlib warns of each."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fig.savefig(buffer, format="png", dpi=120)
    lacking = {}
    for warning in caught:
        if glyph := re.match(r"Glyph (\d+) .* missing from (?:current )?font", str(warning.message)):
            lacking[chr(int(glyph[1]))] = None
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    write_atomically(path, buffer.getvalue())
    if lacking:
        shown = "".join(filter(str.isprintable, lacking))[:8]
        number = f"{len(lacking)} character{'s' * (len(lacking) > 1)}"
        say(
            f"{Path(path).name} has boxes in place of {number}{f' ({shown})' * bool(shown)}, which "
            "matplotlib's font lacks: name one that has them as font.family in a matplotlibrc."
        )


def shorten(text: str, length: int = 24) -> str:
    """A text of at most `length` characters, to be drawn as it stands."""
    text = text if len(text) <= length else text[: length - 1] + "…"
    text = text.encode(errors="replace").decode()  # a file's name may not be UTF-8, which matplotlib refuses
    return text.replace("$", r"\$")  # a dollar would start a formula
