"""Which pixels a model's map, or a class, depends on: gradients down to the image, and Grad-CAM."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from ..command.errors import UserError
from ..vim2 import ViM2

__all__ = ["NoGradCam", "grad_cam", "load_grad_cam", "receptive_field"]


class NoGradCam(UserError):
    """The package that computes Grad-CAM is not installed, or cannot be loaded."""


def receptive_field(model: ViM2, images: Iterable[Tensor], stage: int, token: tuple[int, int] | None = None) -> Tensor:
    """The effective receptive field of a stage's token (Luo, Li, Urtasun, Zemel, 2016: Understanding the
    Effective Receptive Field in Deep Convolutional Neural Networks, arXiv 1701.04128).

    That is the magnitude of the gradient of the token's features, summed, over the pixels. The stage's map is taken
    before the final norm, of whose features the sum has no gradient.

    Args:
        model: The model, in eval mode.
        images: Each (channels, H, W), all of one size, on the model's device.
        stage: From 0 on.
        token: Its row and column on the stage's map; the centre where None.

    Returns:
        (H, W) on the CPU in the model's dtype: summed over channels, averaged over images.
    """
    fields = []
    for image in images:
        pixels = image.unsqueeze(0).requires_grad_()
        (features,) = model.forward_intermediates(
            pixels, indices=[stage], stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        row, column = token or (features.shape[1] // 2, features.shape[2] // 2)
        (gradient,) = torch.autograd.grad(features[0, row, column].sum(), pixels)
        fields.append(gradient[0].abs().sum(0).cpu())
    return torch.stack(fields).mean(0)


def load_grad_cam():
    """The package pytorch_grad_cam.

    Raises:
        NoGradCam: It is not installed, or one that it needs is not.
    """
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise NoGradCam(f'Grad-CAM needs the package grad-cam ({error}): pip install "vim2[visualize]".') from None
    return pytorch_grad_cam


def grad_cam(model: ViM2, image: Tensor, stage: int) -> tuple[np.ndarray, int, float]:
    """Grad-CAM (Selvaraju et al., 2017, arXiv 1610.02391) of the class that the model sees, by pytorch_grad_cam.

    Args:
        model: The model, in eval mode, with a classifier.
        image: (channels, H, W).
        stage: The stage whose map is weighed, from 0 on.

    Returns:
        (H, W) float32 from 0 to 1, the class's index, and its probability.

    Raises:
        NoGradCam: See `load_grad_cam`.
    """
    target: nn.Module = model.stages[stage]
    cam = load_grad_cam().GradCAM(model, [target], reshape_transform=lambda features: features.permute(0, 3, 1, 2))
    try:
        heat = cam(input_tensor=image.unsqueeze(0), targets=None)[0]
        probabilities = cam.outputs[0].detach().float().softmax(-1)
    finally:
        cam.activations_and_grads.release()
        model.zero_grad()  # the package leaves gradients of parameters behind
    index = int(probabilities.argmax())
    return heat, index, float(probabilities[index])
