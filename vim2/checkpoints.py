"""Reading, converting and atomically writing weights."""

import io
import os
import pickle
import re
import uuid
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import clean_state_dict, load_pretrained
from torch import Tensor, nn

__all__ = ["convert_vmamba", "load_weights", "read_checkpoint", "read_state_dict", "save_checkpoint"]


def read_checkpoint(path: str | os.PathLike) -> Any:
    """Read a .pth/.pt/.tar file, or a .safetensors file, onto the CPU. Only tensors and plain containers are unpickled.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A truncated file, no checkpoint at all, or a pickle that holds more than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not wanted:
            raise ValueError(f"{path} is not a checkpoint, or is damaged: {str(error).splitlines()[0]}") from None
        raise ValueError(
            f"{path} holds more than weights ({wanted[1]}), and loading that would run code from the file. "
            f'If you trust it, keep its weights alone: python -c "import torch; '
            f"c = torch.load('{path}', weights_only=False); torch.save({{'model': c['model']}}, 'weights.pth')\""
        ) from None
    except Exception as error:
        raise ValueError(f"{path} is truncated or not a checkpoint: {str(error).splitlines()[0]}") from None


def read_state_dict(path: str | os.PathLike, use_ema: bool = True) -> dict[str, Tensor]:
    """The weights of a checkpoint: its EMA if there is one, else its model, without DDP's and compile's prefixes.

    Raises:
        FileNotFoundError, ValueError: As `read_checkpoint`, or a file without weights.
    """
    checkpoint = read_checkpoint(path)
    keys = ("state_dict_ema", "model_ema") if use_ema else ()
    for key in (*keys, "state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, dict) or not all(isinstance(v, Tensor) for v in checkpoint.values()):
        raise ValueError(f"{path} holds no model weights: expected a state dict, or one under 'state_dict' or 'model'.")
    return clean_state_dict(checkpoint)


def load_weights(model: nn.Module, path: str | os.PathLike, use_ema: bool = True, new_head: bool = False) -> None:
    """Load a checkpoint into a ViM2 that timm has created.

    Args:
        model: Its in_chans may differ from the checkpoint's: the stem's weights are then adapted as timm does.
        path: Checkpoint.
        use_ema: Prefer the checkpoint's EMA weights.
        new_head: Leave the model's own classifier as it is where the checkpoint's has another number of classes.

    Raises:
        FileNotFoundError, ValueError: As `read_state_dict`; weights of another architecture; without new_head,
            another number of classes.
    """
    state_dict = read_state_dict(path, use_ema)
    cfg = dict(model.pretrained_cfg)
    classifier = state_dict.get(cfg["classifier"] + ".weight")
    classes = 0 if classifier is None else classifier.shape[0]
    if classes != model.num_classes and not new_head:
        raise ValueError(
            f"{path} has {classes} classes, the model {model.num_classes}: create the model with num_classes={classes}, "
            f"or ask for a new classifier to fine-tune."
        )
    wanted = model.state_dict()
    ignored = {cfg["classifier"] + ".weight", cfg["classifier"] + ".bias"} if classes != model.num_classes else set()
    stem = cfg["first_conv"] + ".weight"
    missing = sorted(wanted.keys() - state_dict.keys() - ignored)
    unexpected = sorted(state_dict.keys() - wanted.keys() - ignored)
    reshaped = [
        f"{k} {tuple(state_dict[k].shape)} for {tuple(wanted[k].shape)}"
        for k in sorted((wanted.keys() & state_dict.keys()) - ignored - {stem})
        if wanted[k].shape != state_dict[k].shape
    ]
    if missing or unexpected or reshaped:
        found = "; ".join(
            f"{len(names)} {what} (such as {names[0]})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            if names
        )
        raise ValueError(f"{path} holds weights of another architecture than {cfg['architecture']}: {found}.")
    cfg.update(state_dict=state_dict, num_classes=classes, input_size=(state_dict[stem].shape[1], 0, 0))
    load_pretrained(
        model, cfg, num_classes=model.num_classes, in_chans=model.in_chans, strict=not ignored, filter_fn=None
    )


def save_checkpoint(checkpoint: Any, path: str | os.PathLike) -> None:
    """Write a checkpoint so that `path` always holds a whole one: the old one until the new one is safely on disk.

    Raises:
        OSError: The disk is full or cannot be written; what was at `path` is untouched.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getbuffer())


def write_atomically(path: str | os.PathLike, data: bytes | str) -> None:
    """Replace a file's contents in one step.

    Raises:
        OSError: The disk is full or cannot be written; what was at `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"Could not write {path} ({error.strerror}); what was there before is unchanged"
        ) from None


_VMAMBA_NAMES = (  # vanilla VMamba's names, of its first release and its later ones, and ours
    (r"^patch_embed\.(?:0|proj)\.", "patch_embed.proj."),
    (r"^patch_embed\.(?:2|norm)\.", "patch_embed.norm."),
    (r"^(?:classifier\.)?norm\.", "norm."),
    (r"^(?:classifier\.)?head\.", "head.fc."),
    (r"\.(?:ln_1|norm)\.(weight|bias)$", r".norm.\1"),
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
        ValueError: Weights of anything but vanilla VMamba-T, -S or -B; a key unused or missing; another shape.
    """
    variants = {(96, 9): "vim2_tiny_vmamba", (96, 27): "vim2_small_vmamba", (128, 27): "vim2_base_vmamba"}
    stem = next((state_dict[k] for k in ("patch_embed.0.weight", "patch_embed.proj.weight") if k in state_dict), None)
    depth = len({k.split(".")[3] for k in state_dict if k.startswith("layers.2.blocks.")})
    variant = variants.get((stem.shape[0], depth)) if stem is not None else None
    if variant is None:
        raise ValueError(
            "These are not the weights of a vanilla VMamba-T, -S or -B: expected a patch embedding of 96 or 128 "
            f"channels and 9 or 27 blocks in stage 3, found {'none' if stem is None else stem.shape[0]} and {depth}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the channel mixers' inner weights: the same file whenever it is made
        head = next((v for k, v in state_dict.items() if k.endswith("head.weight")), None)
        model = timm.create_model(variant, num_classes=0 if head is None else head.shape[0])
    wanted = model.state_dict()
    converted = {}
    for key, value in state_dict.items():
        name = key
        for pattern, replacement in _VMAMBA_NAMES:
            name = re.sub(pattern, replacement, name)
        if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.(.*)", name):
            stage, block, rest = int(match[1]), int(match[2]), match[3]
            mixers = len(model.stages[stage].blocks[0].layers) - 1  # but for the channel mixer
            name = f"stages.{stage}.blocks.{block // mixers}.layers.{block % mixers}.{rest}"
        elif match := re.match(r"layers\.(\d+)\.downsample\.(.*)", name):
            name = f"stages.{int(match[1]) + 1}.downsample.{match[2]}"
        if name not in wanted:
            raise ValueError(
                f"{key} has no place in {variant}: only vanilla VMamba (v0, without MLP) can be converted."
            )
        if value.numel() != wanted[name].numel():
            raise ValueError(f"{key} is {tuple(value.shape)}, where {variant} needs {tuple(wanted[name].shape)}.")
        converted[name] = value.reshape(wanted[name].shape)
    for name, value in wanted.items():
        mixer = re.match(r"(stages\.\d+\.blocks\.\d+\.layers\.)(\d+)\.", name)
        is_channel_mixer = mixer and f"{mixer[1]}{int(mixer[2]) + 1}.norm.weight" not in wanted
        if is_channel_mixer and name.endswith("mixer.out_proj.weight"):
            converted[name] = torch.zeros_like(value)
        elif is_channel_mixer or name.endswith("average.weight"):
            converted[name] = value
    if missing := sorted(wanted.keys() - converted.keys()):
        raise ValueError(f"{len(missing)} weights of {variant} are missing from these, such as {missing[0]}.")
    return variant, converted
