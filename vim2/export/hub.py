"""Folders of weights and a config, as timm, transformers and the Hugging Face Hub have them."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from torch import nn

from ..classify.facts import CONFIG, TERMS, terms_of
from ..files import write_atomically
from .examples import unwrapped

__all__ = ["export_timm"]

CARD = "README.md"


def export_timm(
    model: nn.Module,
    folder: str | os.PathLike,
    data_config: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    model_args: Mapping[str, Any] | None = None,
    terms: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as a folder, from which `timm.create_model("local-dir:FOLDER", pretrained=True)` makes it again.

    It holds model.safetensors, config.json and README.md, the beginning of a model card. Uploaded as it is to the Hub,
    it is `hf-hub:USER/NAME`; transformers' TimmWrapper reads it, too.

    Args:
        model: Made by `timm.create_model`; what torch.compile or data parallelism has put around it is left out.
        folder: Where to write; it is made where there is none. Each file is replaced in one step, but for a README.md,
            which stays as it is.
        data_config: Size, mean, std, interpolation and crop of the images, as timm names them; the model's own if None.
        class_names: Names of the classes, from the first on.
        model_args: Arguments that the model was made with, for versions of timm that do not remember them.
        terms: What is to be said of the weights: the `license`, `description`, `notes` and `origin_url` of a
            pretrained_cfg. Of a model made with pretrained=True, trained further or not, it is `model.pretrained_cfg`;
            without terms nothing is said, since what that says need not be true of other weights.

    Raises:
        UserError: Its layers were quantized by PyTorch.
        OSError: The files cannot be written.
    """
    model = unwrapped(model)
    before, terms = model.pretrained_cfg, terms_of(terms or {})
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as made:
        own = {k: v for k, v in before.items() if k not in (*TERMS, "tag")}
        model.pretrained_cfg = own | dict(data_config or {}) | terms
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
        if not (folder / CARD).exists():
            write_atomically(folder / CARD, _card(folder.resolve().name, config["architecture"], terms))


def _card(name: str, architecture: str, terms: Mapping[str, Any]) -> str:
    """A model card: what the Hub reads of it, and what its reader has to know of the weights."""
    told = {"library_name": "timm", "pipeline_tag": "image-classification", "license": terms.get("license")}
    head = [f"{key}: {json.dumps(value)}" for key, value in told.items() if value]
    link = f"The weights that it began with: {terms['origin_url']}" if "origin_url" in terms else ""
    parts = [f"# {name}", f"Architecture: `{architecture}`.", terms.get("description"), *terms.get("notes", ()), link]
    return "\n".join(["---", *head, "---", ""]) + "".join(f"\n{part}\n" for part in parts if part)
