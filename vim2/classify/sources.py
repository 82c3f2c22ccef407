"""What a model's name stands for: timm's own name of it, or a folder or repository of timm's with a config.json."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

import vim2  # noqa: F401  registers the models

from ..command.errors import UserError, did_you_mean, first_line
from ..command.own_models import import_models
from ..command.places import is_place, local_folder
from .facts import CONFIG, check_model_kwargs, read_config, read_pretrained_cfg

__all__ = ["ModelSource", "find_model"]

OPTIONS_OWN = ("num_classes", "in_chans")  # arguments of a constructor that options, and facts, have by themselves


@dataclass(frozen=True)
class ModelSource:
    """What a model's name stands for.

    Attributes:
        name: As given: timm's, `local-dir:FOLDER` or `hf-hub:USER/NAME`.
        arch: timm's name of the model, as it is registered.
        model_kwargs: Arguments of its constructor, where a config.json tells them; `num_classes` and `in_chans`, too.
    """

    name: str
    arch: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    def facts(self, model_kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a checkpoint tells of a model that was made by this, with further arguments: `arch`, `model_kwargs` and,
        where they are told, `num_classes` and `in_chans`."""
        known = {**self.model_kwargs, **(model_kwargs or {})}
        apart = {name: known.pop(name) for name in OPTIONS_OWN if name in known}
        return {"arch": self.arch, "model_kwargs": known, **apart}


def find_model(name: str | ModelSource, imports: Sequence[str] = ()) -> ModelSource:
    """Find out what a model's name stands for.

    Args:
        name: timm's, `local-dir:FOLDER` or `hf-hub:USER/NAME`, the latter with `@REVISION` or without; or what was
            found before, of which only whether timm knows the model is looked at.
        imports: See `import_models`.

    Raises:
        UserError: Unknown model; a folder or repository that cannot be had, has no config.json of timm's, or one that
            cannot be true; what `import_models` raises.
    """
    import_models(imports)
    found = name if isinstance(name, ModelSource) else None
    name = name.arch if found else name
    if found is None and is_place(name):
        return _read_source(name)
    if not timm.is_model(name):
        ours = ", ".join(timm.list_models("vim2*"))
        hint = did_you_mean(name, timm.list_models())
        if "/" in name or os.path.isdir(name):
            hint = f"; a folder is local-dir:{name}, a repository of the Hugging Face Hub hf-hub:USER/NAME"
        raise UserError(f"There is no model {name}{hint} (this package's own: {ours}; yours come with --imports)")
    return found or ModelSource(name, name)


def _read_source(name: str) -> ModelSource:
    folder, place = local_folder(name), name.partition(":")[2]
    if not place:
        raise UserError(f"{name} names nothing: give local-dir:FOLDER or hf-hub:USER/NAME.")
    if folder is not None and not Path(folder, CONFIG).is_file():
        what = f"has no {CONFIG} of timm's" if os.path.isdir(folder) else "is no folder"
        raise UserError(
            f"{folder} {what}, for the model {name}: name one that `vim2 export --format timm` has written; a run's "
            "file of weights goes to --checkpoint or --initial-checkpoint, of commands that have these."
        )
    if folder is not None:
        read_config(Path(folder, CONFIG))  # what timm would stumble over
    try:
        cfg, arch, args = (load_model_config_from_hf if folder is None else load_model_config_from_path)(place)
        if not (isinstance(cfg, Mapping) and isinstance(arch, str) and isinstance(args, Mapping)):
            raise TypeError("it is another library's")
    except Exception as error:  # of the network, of huggingface_hub or for its lack, of JSON and of what stands there
        reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        if folder is None:
            remedy = "check the name, and the way to the Hugging Face Hub"
            raise UserError(f"The model {name} cannot be had ({reason}): {remedy}.") from None
        raise UserError(f"{Path(folder, CONFIG)} cannot be read ({reason}): export or download it again.") from None
    if is_place(arch) or not timm.is_model(arch):
        raise UserError(f"{name} is of a model {arch}, which timm does not know; yours come with --imports.")
    read_pretrained_cfg(cfg, f"The pretrained_cfg of {name}")
    own = {k: v for k, v in args.items() if k not in OPTIONS_OWN}
    check_model_kwargs(own, f"the model_args of {name}")
    return ModelSource(name, arch, dict(args))
