"""What of a model is exported, the inputs with which it is, and their dynamic axes."""

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from ..command.errors import UserError
from ..tsm2 import TSM2
from ..vim2 import MIN_SIZE
from .forecaster import ForecasterModule

__all__ = ["examples", "first_convolution", "unwrapped"]

# Sizes of the example that is exported. All differ, and none is 0 or 1, which would be taken as fixed.
_EXAMPLE_BATCH, _EXAMPLE_HEIGHT, _EXAMPLE_WIDTH, _EXAMPLE_VARIATES = 2, 64, 96, 3


def examples(model: nn.Module, img_size: tuple[int, int] | None = None) -> dict[str, tuple[Tensor, dict[int, str]]]:
    """The inputs of a ViM2, a TSM2 or a whole forecaster by name, each with its dynamic axes.

    Args:
        model: The model, on the CPU.
        img_size: Height and width that are not dynamic.

    Raises:
        UserError: An img_size below 32 x 32, or one for a TSM2 or a forecaster.
    """
    if not isinstance(model, TSM2 | ForecasterModule):
        return _images(model, img_size)
    if img_size is not None:
        raise UserError("A TSM2 reads no images: leave the image size out.")
    return _series(model) if isinstance(model, TSM2) else _tables(model)


def unwrapped(model: nn.Module) -> nn.Module:
    """A model without what torch.compile and data parallelism have put around it.

    Raises:
        UserError: Its layers were quantized by PyTorch, in a form that no file here has.
    """
    while isinstance(model, OptimizedModule | nn.DataParallel | DistributedDataParallel):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    if any("quantized" in type(module).__module__.split(".") for module in model.modules()):
        raise UserError(
            "The model's layers were quantized by torch.ao, which cannot be exported: export the model in floats, and "
            "quantize the file, see docs/export.md."
        )
    return model


def first_convolution(model: nn.Module) -> Tensor:
    """The weight of the convolution that reads the images, (features, channels, kernel height, kernel width).

    Raises:
        UserError: The model has none.
    """
    for weight in model.parameters():
        if weight.dim() == 4:
            return weight
    raise UserError(f"{type(model).__name__} has no convolution, which would tell the channels of its images.")


def _images(model: nn.Module, img_size: tuple[int, int] | None) -> dict[str, tuple[Tensor, dict[int, str]]]:
    """The example and its dynamic axes."""
    weight = first_convolution(model)
    axes = {0: "batch"}
    if img_size is None:
        img_size = _EXAMPLE_HEIGHT, _EXAMPLE_WIDTH
        axes |= {2: "height", 3: "width"}
    elif min(img_size) < MIN_SIZE:
        raise UserError(
            f"Images must be at least {MIN_SIZE} x {MIN_SIZE}, got {img_size[0]} x {img_size[1]}: export a larger size."
        )
    return {"images": (weight.new_zeros(_EXAMPLE_BATCH, weight.shape[1], *img_size), axes)}


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


def _tables(model: ForecasterModule) -> dict[str, tuple[Tensor, dict[int, str]]]:
    """The examples and their dynamic axes. Each variate has a scale of its own, so their number is settled."""
    c, variates = model.config, len(model.mean)
    inputs = {"x": (model.mean.new_zeros(_EXAMPLE_BATCH, c.lookback, variates), {0: "batch"})}
    if c.future_features:
        future = model.committee.weights.new_zeros(_EXAMPLE_BATCH, c.future_steps, c.future_features)
        inputs["future"] = future, {0: "batch"}
    return inputs
