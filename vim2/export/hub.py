"""Folders of weights and a config, as timm, transformers and the Hugging Face Hub have them."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from torch import nn

from ..files import write_atomically

__all__ = ["export_timm"]

CONFIG = "config.json"
ORIGIN = ("tag", "description", "notes")  # of the weights that a model's name stands for, which others need not be


def export_timm(
    model: nn.Module,
    folder: str | os.PathLike,
    data_config: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as a folder, from which `timm.create_model("local-dir:FOLDER", pretrained=True)` makes it again.

    It holds model.safetensors and config.json. Uploaded as it is to the Hub, it is `hf-hub:USER/NAME`; transformers'
    TimmWrapper reads it, too.

    Args:
        model: Made by `timm.create_model`.
        folder: Where to write; it is made where there is none. Each file is replaced in one step.
        data_config: Size, mean, std, interpolation and crop of the images, as timm names them; the model's own if None.
        class_names: Names of the classes, from the first on.
        model_args: Arguments that the model was made with, for versions of timm that do not remember them.

    Raises:
        OSError: The files cannot be written.
    """
    before = model.pretrained_cfg
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as made:
        model.pretrained_cfg = {k: v for k, v in before.items() if k not in ORIGIN} | dict(data_config or {})
        if len(before.get("label_names") or ()) != model.num_classes:
            model.pretrained_cfg |= {"label_names": None, "label_descriptions": None}
        try:
            labels = {"label_names": list(class_names)} if class_names else {}
            save_for_hf(model, made, model_config=labels, model_args=dict(model_args or {}), safe_serialization=True)
        finally:
            model.pretrained_cfg = before
        config = json.loads(Path(made, CONFIG).read_text())
        # timm knows the number of classes without this, and TimmWrapper, which hands it over too, fails with it
        config.get("model_args", {}).pop("num_classes", None)
        folder.mkdir(parents=True, exist_ok=True)
        for path in Path(made).glob("*.safetensors"):
            write_atomically(folder / path.name, path.read_bytes())
        write_atomically(folder / CONFIG, json.dumps(config, indent=2).encode())
