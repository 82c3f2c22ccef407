"""Reading, checking, loading, converting and saving weights."""

import io
import os
import pickle
import re
import shlex
import zipfile
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor, nn

from .files import write_atomically

__all__ = [
    "check_weights",
    "convert_vmamba",
    "explain_load_error",
    "find_state_dict",
    "load_weights",
    "read_checkpoint",
    "read_metadata",
    "read_state_dict",
    "save_checkpoint",
    "save_half_precision",
    "verify_archive",
    "weights_of",
]


_EMA_KEYS = ("state_dict_ema", "model_ema")  # in checkpoints of timm's train.py, and of Swin's and VMamba's
_WEIGHT_KEYS = (*_EMA_KEYS, "state_dict", "model")


def read_checkpoint(path: str | os.PathLike) -> Any:
    """Read a .pth/.pt/.tar file, or a .safetensors file, onto the CPU. Only tensors and plain containers are unpickled.

    Raises:
        FileNotFoundError: No such file, or a folder.
        ValueError: A truncated or changed file, no checkpoint at all, or a pickle that holds more than weights.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: name a file of weights in it, such as best.pth.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        verify_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise ValueError(f"{path} may not be read; check its permissions.") from None
    except Exception as error:  # zip, pickle and safetensors each have their own ways to fail on a damaged file
        if not (wanted := _refused_global(error)):
            raise ValueError(
                f"{path} is damaged, truncated or not a checkpoint ({explain_load_error(error)}); copy or download it "
                "again."
            ) from None
        raise ValueError(
            f"{path} holds more than weights ({wanted}), and loading that would run code from the file. "
            f'If you trust it, keep its weights alone: python -c "import sys, torch; '
            # a whole model has weights, too, alone or in a dictionary
            "of = lambda c: c.state_dict() if isinstance(c, torch.nn.Module) else c; "
            "c = of(torch.load(sys.argv[1], 'cpu', weights_only=False)); "
            f"torch.save({{k: of(c[k]) for k in c if k in {_WEIGHT_KEYS}}} or c, 'weights.pth')\" "
            f"{shlex.quote(str(path))}"
        ) from None


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """What is told beside the weights in a .safetensors file that `read_checkpoint` can read."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _refused_global(error: Exception) -> str | None:
    """What a pickle wanted that `torch.load` did not let it have; None where it failed for something else."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return found and found[1]


class _DamagedArchive(ValueError):
    """What `verify_archive` says."""


def explain_load_error(error: Exception) -> str:
    """Why a checkpoint could not be read, to stand within a message. PyTorch's own errors speak of how to load files
    unsafely, or of a byte by its number."""
    if isinstance(error, _DamagedArchive):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or str(error).split("\n")[0].rstrip(".")
    if wanted := _refused_global(error):
        return f"it holds more than weights: {wanted}"
    return "what is in it cannot be read"


def verify_archive(path: str | os.PathLike) -> None:
    """Tell a file that `torch.save` has written from others, by its start, and compare its content with the checksums
    in it, which `torch.load` does not do.

    PyTorch's format from before 1.6, which is a pickle and no zip archive, has no checksums, and PyTorch can be told to
    write none.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is another kind of file, or not as it was written.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        if start[:1] == b"\x80":  # a pickle's
            return
        if start != b"PK\3\4":
            raise _DamagedArchive("it begins as no file of torch.save does" if start else "it is empty")
        try:
            with zipfile.ZipFile(file) as archive:
                names = {name.partition("/")[2] for name in archive.namelist()}
                if "data.pkl" not in names:
                    raise _DamagedArchive("it is a zip archive, but not one that torch.save has written")
                if "constants.pkl" in names:
                    raise _DamagedArchive("it holds a TorchScript module")
                has_checksums = any(part.CRC for part in archive.infolist())
                damaged = archive.testzip() if has_checksums else None
        except _DamagedArchive:
            raise
        except Exception as error:  # zipfile and zlib have many
            reason = f"{error}".split("\n")[0].rstrip(".") or type(error).__name__
            raise _DamagedArchive(f"its zip archive is damaged: {reason}") from None
        if damaged is not None:
            raise _DamagedArchive(f"{damaged} does not have its checksum")


def read_state_dict(path: str | os.PathLike, use_ema: bool = True) -> dict[str, Tensor]:
    """The weights of a checkpoint: its EMA if there is one, else its model, without DDP's and compile's prefixes.

    Raises:
        FileNotFoundError, ValueError: As `read_checkpoint`, or a file without weights.
    """
    return find_state_dict(read_checkpoint(path), path, use_ema)


def find_state_dict(checkpoint: Any, path: str | os.PathLike, use_ema: bool = True) -> dict[str, Tensor]:
    """As `read_state_dict`, from a checkpoint that has been read; `path` is for the message of its ValueError."""
    for key in _WEIGHT_KEYS if use_ema else _WEIGHT_KEYS[len(_EMA_KEYS) :]:
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    if (
        not isinstance(checkpoint, dict)
        or not checkpoint
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in checkpoint.items())
    ):
        raise ValueError(f"{path} holds no model weights: expected a state dict, or one under 'state_dict' or 'model'.")
    return clean_state_dict(checkpoint)


def check_weights(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Refuse weights that PyTorch would load without a word, but no training can have written.

    Args:
        given: Weights by name, from a file.
        wanted: The model's, on any device. Only those of the same names are compared.
        path: The file, for the message.

    Raises:
        ValueError: A weight with a NaN or infinite value, one that is not dense, or one of another kind of numbers
            than the model's: integer, bool or complex for floating, or the reverse.
    """
    for name, value in given.items():
        if name in wanted and (fault := _fault(value, wanted[name])):
            raise ValueError(f"{path} holds no weights of a trained model: {name} {fault}. Use another checkpoint.")


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # no model has weights of lower precision


def _fault(value: Tensor, wanted: Tensor) -> str:
    """What keeps a weight from being the model's, but for its shape; "" if nothing does."""
    if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.is_meta:
        return "is not a dense tensor"
    floating = value.dtype in _FLOATS
    if _kind(value) != _kind(wanted) or value.is_floating_point() != floating:
        return f"is of {value.dtype}, where the model has {wanted.dtype}"
    return "holds NaN or infinite values" if floating and not value.isfinite().all() else ""


def _kind(t: Tensor) -> str:
    if t.is_floating_point() or t.is_complex():
        return "floating" if t.is_floating_point() else "complex"
    return "bool" if t.dtype is torch.bool else "integer"


def load_weights(model: nn.Module, path: str | os.PathLike, use_ema: bool = True, new_head: bool = False) -> None:
    """Load a checkpoint into a model that timm has created.

    Args:
        model: Its pretrained_cfg names its stem and classifier, or several of each, or none. Where its in_chans differs
            from the 3 of a checkpoint, the stem's weights are adapted as timm does.
        path: Checkpoint.
        use_ema: Prefer the checkpoint's EMA weights.
        new_head: Leave the model's own classifier as it is where the checkpoint's has another number of classes.

    Raises:
        FileNotFoundError, ValueError: As `read_state_dict` and `check_weights`; weights of another architecture, or
            for images of another number of channels than 3 or the model's; without new_head, another number of classes.
    """
    state_dict = read_state_dict(path, use_ema)
    cfg = dict(model.pretrained_cfg)
    heads, stems = weights_of(cfg.get("classifier")), weights_of(cfg.get("first_conv"))
    classes = 0 if heads else model.num_classes
    for head in heads & state_dict.keys():
        if state_dict[head].dim() == 0:
            raise ValueError(f"{path} is damaged: its classifier, {head}, is a single number.")
        classes = state_dict[head].shape[0]
    ignored = set()
    if classes != model.num_classes:
        ignored = heads | {head.removesuffix("weight") + "bias" for head in heads}
    state_dict = {name: value for name, value in state_dict.items() if name not in ignored}
    wanted = {name: value for name, value in model.state_dict().items() if name not in ignored}
    if misfit := _describe_misfit(state_dict, wanted, stems):
        raise ValueError(f"{path} holds weights of another architecture than {cfg['architecture']}: {misfit}.")
    check_weights(state_dict, wanted, path)
    if classes != model.num_classes and not new_head:
        raise ValueError(
            f"{path} has {classes} classes, the model {model.num_classes}: create the model with "
            f"num_classes={classes}, or ask for a new classifier to fine-tune."
        )
    for stem in stems & state_dict.keys():
        state_dict[stem] = _adapt_stem(state_dict[stem], wanted[stem].shape[1], path)
    model.load_state_dict(state_dict, strict=not ignored)


def _describe_misfit(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], stems: Set[str]) -> str:
    """In which names and shapes weights differ from a model's, but for the stems' channels; "" if in none."""
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    reshaped = [
        f"{name} {tuple(given[name].shape)} for {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & given.keys())
        if _but_for_channels(given[name], name in stems) != _but_for_channels(wanted[name], name in stems)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return "; ".join(f"{len(names)} {what} (such as {names[0]})" for what, names in kinds if names)


def _adapt_stem(weight: Tensor, channels: int, path: str | os.PathLike) -> Tensor:
    """A stem's weight for images of so many channels, as timm adapts it.

    Raises:
        ValueError: It is for images of neither this number of channels nor 3, for which alone timm has a rule.
    """
    if weight.shape[1] == channels:
        return weight
    if weight.shape[1] != 3:
        raise ValueError(
            f"{path} is for images of {weight.shape[1]} channels, the model for {channels}: "
            f"create the model with in_chans={weight.shape[1]}, in `vim2 train` by --in-chans."
        )
    return adapt_input_conv(channels, weight.float())


def weights_of(modules: str | Sequence[str] | None) -> set[str]:
    """Names of the weights of one module, of several, or of none, as timm's configs name them."""
    names = (modules,) if isinstance(modules, str) else modules or ()
    return {f"{name}.weight" for name in names}


def _but_for_channels(weight: Tensor, is_stem: bool) -> tuple[int, ...]:
    """A weight's shape, of the stem's (out, in, height, width) without the image's channels."""
    shape = tuple(weight.shape)
    return shape[:1] + shape[2:] if is_stem else shape


def save_checkpoint(checkpoint: Any, path: str | os.PathLike) -> None:
    """Write a checkpoint so that `path` always holds a whole one: the old one until the new one is safely on disk.

    Raises:
        OSError: The disk is full or cannot be written; what was at `path` is untouched.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getbuffer())


def save_half_precision(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write weights as a .safetensors file in half precision, half as large; loading casts them to the model's dtype.

    Args:
        state_dict: Weights by name; floating ones of any precision become float16, others stay.
        path: The file, which is replaced in one step.
        metadata: What else the file tells, which `read_metadata` reads.

    Raises:
        ValueError: A weight with a NaN, or with a value that is infinite or becomes so in half precision.
        OSError: The file cannot be written; what was at `path` is untouched.
    """
    halves = {}
    for name, value in state_dict.items():
        half = value.half() if value.is_floating_point() else value
        if half.is_floating_point() and not half.isfinite().all():
            raise ValueError(f"{name} holds values that half precision cannot: NaN, or beyond 65504.")
        halves[name] = half.clone(memory_format=torch.contiguous_format)  # tensors that share memory are refused
    write_atomically(path, serialize(halves, metadata={"format": "pt", **(metadata or {})}))


_VMAMBA_NAMES = (  # vanilla VMamba's names, of its first release and its later ones, and ours
    (r"^patch_embed\.(?:0|proj)\.", "patch_embed.proj."),
    (r"^patch_embed\.(?:2|norm)\.", "patch_embed.norm."),
    (r"^(?:classifier\.)?norm\.", "norm."),
    (r"^(?:classifier\.)?head\.", "head.fc."),
    (r"\.(?:ln_1|norm)\.(weight|bias)$", r".norm.\1"),
    (r"\.downsample\.1\.", ".downsample.norm."),
    (r"\.downsample\.2\.", ".downsample.reduction."),
    (r"\.(?:self_attention|op)\.", ".mixer."),
    (r"\.mixer\.conv2d\.", ".mixer.conv."),
    (r"\.mixer\.x_proj_weight$", ".mixer.s6.x_proj_weight"),
    (r"\.mixer\.dt_projs_(weight|bias)$", r".mixer.s6.dt_proj_\1"),
    (r"\.mixer\.A_logs$", ".mixer.s6.A_log"),
    (r"\.mixer\.Ds$", ".mixer.s6.D"),
)


def convert_vmamba(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Vanilla VMamba's weights (v0: SS2D with d_state 16, ratio 2, gate, no MLP) as those of a ViM2.

    The ViM2 then computes what the VMamba did: its channel mixers start with a zero output projection, and every
    averaging weight is 1.

    Returns:
        The model's name, vim2_{tiny,small,base}_vmamba, and its complete state dict.

    Raises:
        ValueError: Weights of anything but vanilla VMamba-T, -S or -B; a key unused or missing; another shape; what
            `check_weights` refuses.
    """
    variant = _vmamba_variant(state_dict)
    model = _create_empty(variant, state_dict)
    wanted = model.state_dict()
    converted = {}
    for key, value in state_dict.items():
        name = _convert_name(key)
        if name not in wanted or name in converted:
            raise ValueError(
                f"{key} has no place in {variant}: only vanilla VMamba (v0, without MLP) can be converted."
            )
        # VMamba keeps A_logs and Ds with directions and channels on one axis
        merged = name.endswith(("s6.A_log", "s6.D"))
        shape = wanted[name].flatten(0, 1).shape if merged else wanted[name].shape
        if value.shape != shape:
            raise ValueError(f"{key} is {tuple(value.shape)}, where {variant} needs {tuple(shape)}.")
        if fault := _fault(value, wanted[name]):
            raise ValueError(f"{key} {fault}: these are no weights of a trained model.")
        converted[name] = value.reshape(wanted[name].shape)
    for name, value in wanted.items():
        if name.endswith("average.weight"):
            converted[name] = torch.ones(value.shape)
        elif not value.is_meta:  # the channel mixers'
            is_output = name.endswith("mixer.out_proj.weight")
            converted[name] = torch.zeros_like(value) if is_output else value
    if missing := sorted(wanted.keys() - converted.keys()):
        raise ValueError(f"{len(missing)} weights of {variant} are missing from these, such as {missing[0]}.")
    return variant, converted


def _vmamba_variant(state_dict: Mapping[str, Tensor]) -> str:
    """The model that a vanilla VMamba's weights are for, told by its widths and depths."""
    variants = {(96, 9): "vim2_tiny_vmamba", (96, 27): "vim2_small_vmamba", (128, 27): "vim2_base_vmamba"}
    stem = next((state_dict[k] for k in ("patch_embed.0.weight", "patch_embed.proj.weight") if k in state_dict), None)
    depth = len({k.split(".")[3] for k in state_dict if k.startswith("layers.2.blocks.")})
    channels = stem.shape[0] if stem is not None and stem.dim() else None
    if (channels, depth) not in variants:
        raise ValueError(
            "These are not the weights of a vanilla VMamba-T, -S or -B: expected a patch embedding of 96 or 128 "
            f"channels and 9 or 27 blocks in stage 3, found {channels or 'none'} and {depth}."
        )
    return variants[channels, depth]


def _create_empty(variant: str, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The model for a VMamba's weights, without data (on the meta device) but for its channel mixers, which VMamba does
    not have and which are as initialised."""
    head = next((v for k, v in state_dict.items() if k.endswith("head.weight")), None)
    with torch.device("meta"):
        # a head without classes, of a damaged file, has no place in the model without one
        model = timm.create_model(variant, num_classes=0 if head is None or head.dim() == 0 else head.shape[0])
    for block in (block for stage in model.stages for block in stage.blocks):
        block.layers[-1].to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same file whenever it is made
        model.init_weights()
    return model


def _convert_name(key: str) -> str:
    """ViM2's name of one of VMamba's weights."""
    for pattern, replacement in _VMAMBA_NAMES:
        key = re.sub(pattern, replacement, key)
    if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.(.*)", key):
        stage, block, rest = int(match[1]), int(match[2]), match[3]
        mixers = 3 if stage == 2 else 2  # token mixers a block
        return f"stages.{stage}.blocks.{block // mixers}.layers.{block % mixers}.{rest}"
    if match := re.match(r"layers\.(\d+)\.downsample\.(.*)", key):
        return f"stages.{int(match[1]) + 1}.downsample.{match[2]}"
    return key
