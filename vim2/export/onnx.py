"""ONNX files of the models, with the scan translated to standard operators (`vim2.export.onnx_scan`)."""

import copy
import os
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..command.errors import UserError
from ..command.processes import require_backend
from ..files import write_atomically
from ..tsm2 import TSM2
from .examples import examples, unwrapped
from .forecaster import ForecasterModule

__all__ = ["DEFAULT_OPSET", "MIN_OPSET", "SCANS", "export_onnx", "onnx_translations"]

MIN_OPSET = 18  # the oldest for which PyTorch has translations of its own operators
DEFAULT_OPSET = 20
SCANS = ("steps", "chunks")  # forms of a scan, see `vim2.export.onnx_scan`
_MAX_FOLDED = 1 << 24  # bytes of a constant that is computed


def onnx_translations(scan: str = "steps") -> dict[Callable, Callable]:
    """What `torch.onnx.export(model, ..., dynamo=True, custom_translation_table=onnx_translations())` needs to know of
    this package's operators. The model must be on the CPU, where the scan is the only one of them that is called.

    Args:
        scan: As for `export_onnx`.

    Returns:
        From operators of `torch.ops.vim2`, and the stable sort of a TSM2's quantiles, which PyTorch does not translate,
        to functions of onnxscript, for opset 18 or later.

    Raises:
        UserError: onnx or onnxscript are not installed; another form of the scan.
    """
    try:
        from .onnx_scan import selective_scan, sort
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("onnx", "onnxscript", "onnx_ir"):
            raise
        raise UserError(
            'ONNX files are written by the packages onnx and onnxscript: pip install "vim2[export]".'
        ) from None
    if scan not in SCANS:
        raise UserError(f"The scan is exported in the form {' or '.join(SCANS)}, got {scan}.")
    return {
        torch.ops.vim2.selective_scan.default: selective_scan(chunked=scan == "chunks"),
        torch.ops.aten.sort.stable: sort,
    }


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    img_size: tuple[int, int] | None = None,
    opset: int = DEFAULT_OPSET,
    scan: str = "steps",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model as an ONNX file of standard operators alone, in the dtype of its parameters.

    A ViM2 has the input "images", (batch, in_chans, height, width), normalised as in training, and the output "logits",
    (batch, num_classes); with features_only the outputs "features_0", "features_1", ..., (batch, C, H, W). A TSM2 has
    "x", (batch, lookback, variates), "static" and "future" where its configuration has them, and "forecast". Batch,
    height, width and variates are dynamic. A `ForecasterModule` has "x", (batch, lookback, M), float64, "future",
    (batch, horizon, C), float32, and "forecast", float64; the batch is dynamic.

    Args:
        model: A ViM2, one of timm's features_only, a TSM2, or a forecaster as `ForecasterModule`, on any device. A copy
            of it is exported in eval mode, without what torch.compile or data parallelism has put around it.
        path: The file, which is replaced in one step.
        img_size: Height and width for a runtime that takes no dynamic ones; batches stay dynamic.
        opset: Version of ONNX's operators, 18 or later.
        scan: The form of its scans: "steps", one after the other, for CPUs, or "chunks", side by side, for GPUs.
        metadata: Text by name to keep in the file, which onnxruntime tells as
            `session.get_modelmeta().custom_metadata_map`.

    Raises:
        UserError: onnx or onnxscript are not installed; an opset that is too old, or too new for PyTorch; an img_size
            below 32 x 32, or one for a TSM2 or forecaster; a model of bfloat16; layers that PyTorch has
            quantized; a VIM2_SCAN_BACKEND that cannot be used on CPUs.
        OSError: The file cannot be written; what was at `path` is untouched.
    """
    translations = onnx_translations(scan)
    newest = torch.onnx._constants.ONNX_MAX_OPSET
    if not MIN_OPSET <= opset <= newest:
        raise UserError(
            f"The opset must be {MIN_OPSET} to {newest} with this version of PyTorch, got {opset}: its scan and its "
            f"LayerNorm are no operators of another."
        )
    require_backend("cpu")
    model = copy.deepcopy(unwrapped(model)).cpu().eval()
    if any(p.dtype == torch.bfloat16 for p in model.parameters()):
        raise UserError("ONNX's Einsum takes no bfloat16: export the model as model.half() or model.float().")
    named = examples(model, img_size)
    inputs, dynamic = zip(*named.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # two inputs may share an axis
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            input_names=list(named),
            output_names=_output_names(model),
            dynamic_shapes=dynamic,
            opset_version=opset,
            custom_translation_table=translations,
            verbose=False,
        )
    _fold_constants(program.model)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with paths of the machine that exported
        node.doc_string = None
    program.model.metadata_props.update(metadata or {})
    write_atomically(path, program.model_proto.SerializeToString())


def _fold_constants(model) -> None:
    """Compute the decay rates of large scans, too, which PyTorch's exporter leaves to the runtime: in OpenVINO, a step
    of `Scan` reads nothing from around it but constants."""
    from onnxscript.optimizer import optimize_ir

    optimize_ir(model, onnx_shape_inference=False, input_size_limit=_MAX_FOLDED, output_size_limit=_MAX_FOLDED)


def _output_names(model: nn.Module) -> list[str]:
    if isinstance(model, TSM2 | ForecasterModule):
        return ["forecast"]
    if hasattr(model, "feature_info") and not hasattr(model, "forward_head"):  # timm's features_only
        return [f"features_{i}" for i in range(len(model.feature_info))]
    return ["logits"]
