"""From the command line of `vim2 mm train`, `test` and `predict` to a config that says what they need."""

import argparse
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import import_modules_from_strings

from ..command.errors import UserError, first_line
from .configs import NO_CONFIG, reference_of

__all__ = ["add_config_arguments", "add_launcher_arguments", "check_parts", "choose_work_dir", "load_config"]

_LIBRARIES = {"mmdet": "mmdet", "mmseg": "mmsegmentation", "mmpretrain": "mmpretrain"}


def add_config_arguments(parser: argparse.ArgumentParser, flag: bool = False) -> None:
    """CONFIG, or with `flag` --config, and --cfg-options, as all of OpenMMLab's tools have them."""
    name, options = ("--config", {"required": True}) if flag else ("config", {})
    text = "a config file, or LIBRARY::PATH for one that a package brings, such as "
    text += "vim2::mmdet/mask-rcnn_vim2-tiny_fpn_1x_coco.py"
    parser.add_argument(name, metavar="CONFIG", help=text, **options)
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Options,
        default={},
        metavar="KEY=VALUE",
        help='replaces settings of the config: model.backbone.with_cp=True, optim_wrapper.optimizer.betas="(0.9,0.95)"',
    )


class _Options(DictAction):
    """MMEngine's DictAction; what it cannot read is an error of the parser."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list[str], *args
    ) -> None:
        for value in values:
            try:
                super().__call__(parser, namespace, [value], *args)
            except (AssertionError, IndexError, ValueError):
                parser.error(f"--cfg-options takes KEY=VALUE, got {value}")
            except RecursionError:  # MMEngine's, of calls with several arguments
                parser.error(f"--cfg-options takes no dict(...), got {value}: write it into a config")


def add_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    """--work-dir, and the launcher's own arguments."""
    parser.add_argument("--work-dir", metavar="DIR", help="where to write; default work_dirs/<name of the config>")
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="what has started this process: pytorch stands for torchrun",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # old launchers


def load_config(path: str | os.PathLike, options: dict[str, Any] | None = None) -> Config:
    """Read a config and make sure that its library is there.

    Args:
        path: The file, or LIBRARY::PATH for one that this package or an installed library brings.
        options: What --cfg-options gives, {"model.backbone.arch": "small", ...}.

    Raises:
        UserError: No such file, one that cannot be read or has a base that is not there, one without a model, a library
            that is not installed, or a module among `custom_imports` of the options that cannot be imported.
    """
    path = str(path)
    library, colon, name = path.partition(":")
    if colon and name.startswith(("mmdet/", "mmseg/")) and library == "vim2":
        raise UserError(f"{path} has one colon: configs of this package are named with two, vim2::{name}.")
    if "::" not in path and not os.path.isfile(path):
        problem = f"{path} is a folder, and no config" if os.path.isdir(path) else f"There is no config {path}"
        remedy = f"give the path of a file, or name one that this package brings, {reference_of(path)}"
        raise UserError(f"{problem}: {remedy}.")
    config = _read_config(path)
    if "::" in path:
        object.__setattr__(config, "_filename", path)  # runs are named after it, and MMEngine sets a temporary file's
    _merge_options(config, options or {}, path)
    scope = config.get("default_scope", "mmengine")
    if scope != "mmengine" and importlib.util.find_spec(scope) is None:
        package = _LIBRARIES.get(scope, scope)
        raise UserError(f'{path} is for {scope}, which is not installed: pip install "vim2[mm]", or {package}.')
    if not isinstance(config.get("model"), dict):
        raise UserError(f"{path} has no model: a config for these tools describes a model, its data and its training.")
    return config


def _read_config(path: str) -> Config:
    """MMEngine's reading of a config, with errors that a user can act on."""
    if importlib.util.find_spec("mmseg") and not _is_distribution("mmsegmentation"):
        MODULE2PACKAGE["mmseg"] = "mmseg"  # forks of the library have its module under another distribution's name
    try:
        config = Config.fromstring(f"_base_ = {path!r}", ".py") if "::" in path else Config.fromfile(path)
    except FileNotFoundError as error:
        if error.filename is not None:  # another file that the config names, such as one of its bases
            raise UserError(f"{path} needs {error.filename}, which is not there: check its _base_.") from None
        text = first_line(error)
        if not text.startswith(NO_CONFIG):  # MMEngine's, of a base in another form, or another library's config
            text = f"{path} cannot be read: {text}: check its name, and its _base_"
        raise UserError(text if text.endswith("?") else f"{text}.") from None
    except ModuleNotFoundError as error:
        raise UserError(f'{first_line(error)}; pip install "vim2[mm]" brings all libraries.') from None
    except RecursionError:
        raise UserError(f"{path} is no config that MMEngine can read: it is among its own bases (_base_).") from None
    except Exception as error:  # a config is code, which can fail in every way
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} is no config that MMEngine can read: {reason}.") from None
    return config


def _merge_options(config: Config, options: dict[str, Any], path: str) -> None:
    """Replace settings of a config by those of --cfg-options."""
    try:
        config.merge_from_dict(options)
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--cfg-options does not fit {path}: {first_line(error)}.") from None
    if any(key.partition(".")[0] == "custom_imports" for key in options):  # MMEngine imports what a file names
        try:
            import_modules_from_strings(**config.custom_imports)
        except (ImportError, TypeError) as error:
            raise UserError(f"--cfg-options custom_imports: {first_line(error)}.") from None


def _is_distribution(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_parts(config: Config, path: str, split: str) -> None:
    """Raises UserError where a config, read from `path`, does not say all that a "train" or "test" needs."""
    needed = (f"{split}_dataloader", f"{split}_cfg", "optim_wrapper" if split == "train" else f"{split}_evaluator")
    if missing := [name for name in needed if config.get(name) is None]:
        raise UserError(f"{path} has no {missing[0]}: it needs {', '.join(needed)}.")


def choose_work_dir(config: Config, args: argparse.Namespace) -> Path:
    """The folder to write to: of the options, of the config, or named after that. The config has it from then on."""
    if args.work_dir:
        config.work_dir = args.work_dir
    elif not config.get("work_dir"):
        config.work_dir = str(Path("work_dirs", Path(args.config).stem))
    return Path(config.work_dir)
