"""The configs that this package brings: `vim2::mmdet/NAME.py` and `vim2::mmseg/NAME.py`."""

from pathlib import Path

from mmengine.config import Config

from ..command.errors import did_you_mean

__all__ = ["config_path", "install", "reference_of"]

PREFIX = "vim2::"
NO_CONFIG = "the package has no config"  # what the error begins with
FOLDER = Path(__file__).parents[1] / ".mim" / "configs"  # where MMEngine and mim look for a package's configs


def config_path(reference: str) -> Path:
    """The file that a reference such as `vim2::mmdet/mask-rcnn_vim2-tiny_fpn_1x_coco.py` stands for.

    Raises:
        FileNotFoundError: There is none.
    """
    name = reference.removeprefix(PREFIX)
    if not (FOLDER / name).is_file():
        known = _names()
        close = did_you_mean(name, known) or f" (of {', '.join(known)})"
        raise FileNotFoundError(f"{NO_CONFIG} {name}{close}")
    return FOLDER / name


def reference_of(path: str) -> str:
    """The reference to the config of this package whose file is named as that of a path, else to any of them."""
    name = next((name for name in _names() if Path(name).name == Path(path).name), "mmdet/NAME.py")
    return f"{PREFIX}{name}"


def _names() -> list[str]:
    return [str(path.relative_to(FOLDER)) for path in sorted(FOLDER.glob("*/*.py"))]


def install() -> None:
    """Teach MMEngine the references. By itself it knows the packages of a list alone, does not find those that are
    installed to be edited, and looks in a registry of the package's own for what its configs name."""
    find = Config._get_cfg_path

    def get_cfg_path(path: str, filename: str) -> tuple[str, str | None]:
        return (str(config_path(path)), None) if path.startswith(PREFIX) else find(path, filename)

    Config._get_cfg_path = staticmethod(get_cfg_path)
