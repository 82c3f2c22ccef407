"""Checkpoints: those of MMEngine through PyTorch's safe loader, and weights into a backbone."""

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..checkpoints import check_weights, find_state_dict, read_checkpoint
from ..command.errors import UserError, first_line

__all__ = ["allow_checkpoints", "load_backbone_weights"]

_STATISTICS = ("min", "max", "current", "mean")


def allow_checkpoints() -> None:
    """Let `torch.load` read MMEngine's checkpoints with weights_only=True, PyTorch's default since 2.6.

    Beside tensors they hold `HistoryBuffer`s of the logged values, which are NumPy arrays. Exactly these types are
    added to what the safe loader constructs; nothing else in a file is run, and no load is made unsafe.
    """
    makers = np.zeros(0).__reduce__()[0], np.float64().__reduce__()[0]  # what pickles make arrays and scalars by
    modules = ("numpy._core.multiarray", "numpy.core.multiarray")  # where NumPy 2 and NumPy 1 say they are
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")),
            *((maker, f"{module}.{maker.__name__}") for module in modules for maker in makers),
            (_history_buffer_method, "builtins.getattr"),
        ]
    )


def _history_buffer_method(owner: type, name: str):
    """What a checkpoint may ask `getattr` for: the statistics that a HistoryBuffer refers to. The real one in its place
    would give the file a hold on every attribute of everything that it can name."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return getattr(owner, name)
    raise ValueError(f"A checkpoint may not refer to {name!r} of {owner!r}.")


def load_backbone_weights(backbone: nn.Module, source: str, prefix: str | None = None) -> None:
    """Load the weights of a ViM2 into a backbone.

    Args:
        backbone: A `vim2.mm.ViM2`. Where its in_chans is not the 3 of the weights, the stem's are adapted as timm does.
        source: Path, or an address that MMEngine's CheckpointLoader knows (http, https, ...).
        prefix: What the names of the backbone's weights begin with in the file; None takes "backbone." where names do.

    Raises:
        UserError: No such file or nothing at the address, a damaged file, one without weights, weights of another
            architecture, or such as no training writes, with NaN, say.
    """
    try:
        given = find_state_dict(_read(source), source)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{error} (init_cfg of the backbone)") from None
    if prefix is None:
        prefix = "backbone." if any(name.startswith("backbone.") for name in given) else ""
    prefix = f"{prefix.rstrip('.')}." if prefix else ""
    given = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    wanted = backbone.state_dict()
    last = len(backbone.feature_info) - 1
    for name in ("weight", "bias"):
        if f"norm.{name}" in given:  # a classifier's final norm
            given.setdefault(f"norm{last}.{name}", given.pop(f"norm.{name}"))
    if any(name.startswith("layers.") for name in given):
        raise UserError(f"{source} holds weights of a VMamba; convert them first: vim2 convert IN OUT.")

    def spare(name: str) -> bool:  # a whole classifier's weights that this backbone has no use for
        stage = name.split(".")[1] if name.startswith("stages.") else ""
        return name.startswith(("head.", "norm")) or (stage.isdigit() and len(backbone.stages) <= int(stage) <= last)

    stem = "patch_embed.proj.weight"
    channels = given[stem].shape[1:2] if stem in given else ()
    if channels == (3,) and backbone.in_chans != 3:
        given[stem] = adapt_input_conv(backbone.in_chans, given[stem].float())
    missing = sorted(name for name in wanted.keys() - given.keys() if not name.startswith("norm"))
    unexpected = sorted(name for name in given.keys() - wanted.keys() if not spare(name))
    reshaped = sorted(name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape)
    if missing or unexpected or reshaped:
        problems = [
            f"{len(names)} weights are {what}, such as {names[0]}{_shapes(names[0], given, wanted)}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            if names
        ]
        remedy = "Set the backbone's arch to the one of the weights, or take others"
        if within := sorted(name.removesuffix(stem) for name in given if name.endswith(f".{stem}")):
            remedy = f"It holds a ViM2 whose weights' names begin with {within[0]!r}: set init_cfg.prefix to that"
        raise UserError(
            f"{source} (init_cfg of the backbone) does not fit a ViM2 backbone of arch {backbone.arch!r}: "
            f"{'; '.join(problems)}. {remedy}."
        )
    try:
        check_weights(given, wanted, source)
    except ValueError as error:
        raise UserError(f"{error} (init_cfg of the backbone)") from None
    new = sorted(wanted.keys() - given.keys())
    backbone.load_state_dict({name: given.get(name, wanted[name]) for name in wanted})
    print_log(f"Loaded {len(wanted) - len(new)} weights from {source}; new are {', '.join(new) or 'none'}.", "current")


def _read(source: str):
    allow_checkpoints()  # once more: the forks of MMEngine take these types back after each load of theirs
    if "://" not in source:
        return read_checkpoint(source)
    try:
        return CheckpointLoader.load_checkpoint(source, map_location="cpu")
    except Exception as error:  # every scheme has its own ways to fail
        reason = first_line(error)
        raise ValueError(
            f"Nothing can be loaded from {source}; check the address. (The loader says: {reason})"
        ) from None


def _shapes(name: str, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    if name not in given or name not in wanted:
        return ""
    return f" {tuple(given[name].shape)} for {tuple(wanted[name].shape)}"
