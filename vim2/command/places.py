"""Places that timm's names of models, and ours of forecasters, may stand for: folders, and repositories on the Hugging
Face Hub."""

import os
from pathlib import Path

__all__ = ["is_on_hub", "is_place", "local_folder", "short_name"]

FOLDER = "local-dir:"
HUB = ("hf-hub:", "hf_hub:")  # the second is timm's older one


def is_on_hub(name: str | os.PathLike) -> bool:
    """Whether it names a repository on the Hugging Face Hub."""
    return str(name).startswith(HUB)


def local_folder(name: str) -> str | None:
    """The folder that a model's name stands for; None if it stands for something else."""
    return name.removeprefix(FOLDER) if name.startswith(FOLDER) else None


def is_place(name: str) -> bool:
    """Whether a model's name stands for a place, and is not one that timm has registered."""
    return name.startswith((FOLDER, *HUB))


def short_name(name: str) -> str:
    """A model's name without what kind of place it stands for and, of a folder, where that lies."""
    folder = local_folder(name)
    return name.partition(":")[2] if is_on_hub(name) else name if folder is None else Path(folder).resolve().name
