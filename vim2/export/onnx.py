"""ONNX files of the models, with the scan translated to standard operators (`vim2.export.onnx_scan`)."""

import copy
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checkpoints import write_atomically
from ..command.errors import UserError
from ..command.processes import require_backend
from ..tsm2 import TSM2
from ..vim2 import MIN_SIZE

__all__ = ["DEFAULT_OPSET", "MIN_OPSET", "export_onnx", "onnx_translations"]

MIN_OPSET = 18  # the oldest for which PyTorch has translations of its own operators
DEFAULT_OPSET = 20

# Sizes of the example that is exported. All differ, and none is 0 or 1, which would be taken as fixed.
_EXAMPLE_BATCH, _EXAMPLE_HEIGHT, _EXAMPLE_WIDTH, _EXAMPLE_VARIATES = 2, 64, 96, 3


def onnx_translations() -> dict[Callable, Callable]:
    """What `torch.onnx.export(model, ..., dynamo=True, custom_translation_table=onnx_translations())` needs to know of
    this package's operators. The model must be on the CPU, where the scan is the only one of them that is called.

    Returns:
        From operators of `torch.ops.vim2` to functions of onnxscript, for opset 18 or later.

    Raises:
        UserError: onnx or onnxscript are not installed.
    """
    try:
        from .onnx_scan import selective_scan
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("onnx", "onnxscript", "onnx_ir"):
            raise
        raise UserError(
            'ONNX files are written by the packages onnx and onnxscript: pip install "vim2[export]".'
        ) from None
    return {torch.ops.vim2.selective_scan.default: selective_scan}


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    img_size: tuple[int, int] | None = None,
    opset: int = DEFAULT_OPSET,
) -> None:
    """Write a model as an ONNX file of standard operators alone, in the dtype of its parameters.

    A ViM2 has the input "images", (batch, in_chans, height, width), normalised as in training, and the output "logits",
    (batch, num_classes); with features_only the outputs "features_0", "features_1", ..., (batch, C, H, W). A TSM2 has
    "x", (batch, lookback, variates), "static" and "future" where its configuration has them, and "forecast". Batch,
    height, width and variates are dynamic.

    Args:
        model: A ViM2, one of timm's features_only, or a TSM2, on any device. A copy of it is exported in eval mode.
        path: Of the file, which is replaced in one step.
        img_size: Height and width for a runtime that takes no dynamic ones; batches stay dynamic.
        opset: Version of ONNX's operators, 18 or later.

    Raises:
        UserError: onnx or onnxscript are not installed; an opset that is too old, or too new for PyTorch; an img_size
            below 32 x 32, or one for a TSM2; a VIM2_SCAN_BACKEND that cannot be used on CPUs.
        OSError: The file cannot be written; what was at `path` is untouched.
    """
    translations = onnx_translations()
    newest = torch.onnx._constants.ONNX_MAX_OPSET
    if not MIN_OPSET <= opset <= newest:
        raise UserError(
            f"The opset must be {MIN_OPSET} to {newest} with this version of PyTorch, got {opset}: its scan and its "
            f"LayerNorm are no operators of another."
        )
    require_backend("cpu")
    model = copy.deepcopy(model).cpu().eval()
    if isinstance(model, TSM2):
        if img_size is not None:
            raise UserError("A TSM2 reads no images: leave the image size out.")
        inputs, outputs = _series(model), ["forecast"]
    else:
        inputs, outputs = _images(model, img_size), _output_names(model)
    examples, dynamic = zip(*inputs.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # two inputs may share an axis
        program = torch.onnx.export(
            model,
            examples,
            dynamo=True,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=dynamic,
            opset_version=opset,
            custom_translation_table=translations,
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with paths of the machine that exported
        node.doc_string = None
    write_atomically(path, program.model_proto.SerializeToString())


def _images(model: nn.Module, img_size: tuple[int, int] | None) -> dict[str, tuple[Tensor, dict[int, str]]]:
    """The example and its dynamic axes."""
    weight = next(p for name, p in model.named_parameters() if name.endswith("patch_embed.proj.weight"))
    axes = {0: "batch"}
    if img_size is None:
        img_size = _EXAMPLE_HEIGHT, _EXAMPLE_WIDTH
        axes |= {2: "height", 3: "width"}
    elif min(img_size) < MIN_SIZE:
        raise UserError(
            f"Images must be at least {MIN_SIZE} x {MIN_SIZE}, got {img_size[0]} x {img_size[1]}: export a larger size."
        )
    return {"images": (weight.new_zeros(_EXAMPLE_BATCH, weight.shape[1], *img_size), axes)}


def _output_names(model: nn.Module) -> list[str]:
    if hasattr(model, "feature_info") and not hasattr(model, "forward_head"):  # timm's features_only
        return [f"features_{i}" for i in range(len(model.feature_info))]
    return ["logits"]


def _series(model: TSM2) -> dict[str, tuple[Tensor, dict[int, str]]]:
    """The examples and their dynamic axes."""
    c, weight = model.config, model.embed.weight
    batch, variates = _EXAMPLE_BATCH, _EXAMPLE_VARIATES
    inputs = {"x": (weight.new_zeros(batch, c.lookback, variates), {0: "batch", 2: "variates"})}
    if c.static_features:
        static = weight.new_zeros(batch, variates, c.static_features)
        inputs["static"] = static, {0: "batch", 1: "variates"}
    if c.future_features:
        future = weight.new_zeros(batch, c.future_steps, variates, c.future_features)
        inputs["future"] = future, {0: "batch", 2: "variates"}
    return inputs
