"""Models of a user's own: the files and modules that register them with timm."""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError, first_line

__all__ = ["import_models", "module_home", "place", "place_in"]


def import_models(names: Sequence[str]) -> None:
    """Import what registers models of a user's own with timm, once in a process.

    Args:
        names: Files, `FILE.py`, which find modules beside them as if they were run, or a package's `__init__.py`; or
            modules that Python finds.

    Raises:
        UserError: There is no such file or module, it fails, or another module has the file's name.
    """
    for name in names:
        module = add_to_path(name) if name.endswith(".py") else name
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:  # it is a user's own
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if module.startswith(".") or (missing and f"{name}.".startswith(f"{missing}.")):
                raise UserError(
                    f"There is no module {name} for --imports: give a file, FILE.py, or what is installed or in "
                    "PYTHONPATH."
                ) from None
            reason = f"{type(error).__name__}: {first_line(error)}{place(error, [name])}"
            raise UserError(f"Cannot import {name}: {reason}.") from error


def add_to_path(name: str) -> str:
    """Let Python find a file, or the package whose `__init__.py` it is; returns the module's name.

    Raises:
        UserError: There is no such file, or its name is another module's, or none that can be imported.
    """
    file = Path(name)
    if not file.is_file():
        raise UserError(f"There is no file {name} for --imports.")
    home = module_home(name)
    if "." in home.name:
        raise UserError(f"Cannot import {name}: {home.name} is no name of a module, for its dot; rename it.")
    if str(home.parent) not in sys.path:
        sys.path.append(str(home.parent))
    try:
        spec = importlib.util.find_spec(home.name)
        found = spec and spec.origin
    except ValueError:  # the name is `__main__`
        found = None
    if not (found and os.path.exists(found) and file.samefile(found)):
        other = found if found and os.path.isabs(found) else "a module of Python"
        raise UserError(f"Cannot import {name}: {other} has its name; rename the file.")
    return home.name


def module_home(name: str) -> Path:
    """Where the module of a file lies, without its ending; of an `__init__.py`, its package's folder."""
    file = Path(name)
    folder = file.parent.resolve()
    return folder if file.name == "__init__.py" else folder / file.stem


def place(error: BaseException, imports: Sequence[str]) -> str:
    """Where in a user's own files, or what these import from their folders, an error was raised; "" if elsewhere, or if
    there are none."""
    if not imports:
        return ""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without who has caught it
    frames = [frame for frame in frames if os.path.isabs(frame.filename)]
    folders = tuple(os.path.join(Path(name).parent.resolve(), "") for name in imports if name.endswith(".py"))
    if folders:
        frames = [frame for frame in frames if frame.filename.startswith(folders)]
    else:
        frames = [frame for frame in frames if frame.filename != importlib.__file__]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def place_in(module: str, error: BaseException) -> str:
    """As `place`, in the folder of a module that is loaded; "" if it is of PyTorch, timm or this package, or has no
    file."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return place(error, [file]) if file and module.partition(".")[0] not in ("timm", "torch", "vim2") else ""
