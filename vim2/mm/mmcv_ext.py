"""What mmcv's Python code calls in its compiled module `mmcv._ext`, through torchvision's operators.

`vim2.mm.operators` puts this module in its place where mmcv has none (mmcv-lite); names and arguments are mmcv's.
Every function works on CPU and CUDA tensors, and computes half precision in float32: torchvision has no bfloat16
kernel for the gradient of RoIAlign, nor half-precision ones for CPUs. What torchvision does not have raises a
RuntimeError that says which package does.
"""

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

_ops = torch.ops.torchvision


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise RuntimeError(
            f"mmcv-lite has no compiled operator {name}, and torchvision none to stand in for it. Install mmcv with "
            "its operators in place of mmcv-lite; docs/openmmlab.md in vim2's repository says how to build it."
        )

    return missing


def get_compiler_version() -> str:
    return "none: torchvision's operators, by vim2.mm"


def get_compiling_cuda_version() -> str:
    return "none: torchvision's operators, by vim2.mm"


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float64 if any is, else in float32."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.to(dtype) for t in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Non-maximum suppression


def nms(bboxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (N, 4) that stay, by falling score. A box is x2 - x1 + offset wide."""
    bboxes, scores = _wide(bboxes, scores)
    if offset:
        bboxes = torch.cat((bboxes[:, :2], bboxes[:, 2:] + offset), 1)
    return _ops.nms(bboxes, scores, iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv 1704.04503): indices in the order in which boxes are taken, each with its lowered score in `dets`
    (N, 5). Methods: 0 drops overlapping boxes, 1 lowers their scores linearly, 2 by a Gaussian of the overlap."""
    boxes, scores = _wide(boxes, scores)
    scores = scores.clone()
    left = torch.arange(len(boxes))
    taken = []
    while len(left):
        best = scores[left].argmax()
        box, index = boxes[left[best]], left[best]
        dets[len(taken), :4], dets[len(taken), 4] = box, scores[index]
        taken.append(index)
        left = torch.cat((left[:best], left[best + 1 :]))
        others = boxes[left]
        sides = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2]) + offset).clamp(min=0)
        inter = sides.prod(1)
        overlap = inter / (_areas(box, offset) + _areas(others, offset) - inter)
        if method == 2:
            weight = (-(overlap**2) / sigma).exp()
        else:
            weight = torch.where(overlap >= iou_threshold, 1 - overlap if method == 1 else 0.0, 1.0)
        scores[left] = scores[left] * weight
        left = left[scores[left] >= min_score]
    return torch.stack(taken) if taken else left


def _areas(boxes: Tensor, offset: int) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0] + offset) * (boxes[..., 3] - boxes[..., 1] + offset)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """For each box (N, 5; with score) that stays: its index, and those of the boxes that it suppresses."""
    dets = dets.float()
    left = dets[:, 4].argsort(descending=True, stable=True)
    matched = []
    while len(left):
        overlap = torchvision.ops.box_iou(dets[left[:1], :4], dets[left, :4])[0]
        suppressed = overlap >= iou_threshold
        suppressed[0] = True
        matched.append(left[suppressed].tolist())
        left = left[~suppressed]
    return matched


# ---------------------------------------------------------------------------------------------------------------------
# Regions of interest; `rois` is (K, 5): image index, x1, y1, x2, y2


def _only_average(pool_mode: int) -> None:
    if pool_mode != 1:
        __getattr__("roi_align with pool_mode='max'")()


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (arXiv 1703.06870) by averages, into `output` (K, C, aligned_height, aligned_width)."""
    _only_average(pool_mode)
    size = (aligned_height, aligned_width)
    output.copy_(_ops.roi_align(*_wide(input, rois), spatial_scale, *size, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    _only_average(pool_mode)
    size = (aligned_height, aligned_width)
    grad_input.copy_(
        _ops._roi_align_backward(
            *_wide(grad_output, rois), spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
        )
    )


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    values, indices = _ops.roi_pool(*_wide(input, rois), spatial_scale, pooled_height, pooled_width)
    output.copy_(values)
    argmax.copy_(indices)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    grad_output, rois = _wide(grad_output, rois)
    size = (pooled_height, pooled_width)
    grad_input.copy_(
        _ops._roi_pool_backward(grad_output.contiguous(), rois, argmax, spatial_scale, *size, *grad_input.shape)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Focal loss


def _focal(input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    positive = F.one_hot(target, input.shape[1] + 1)[:, :-1].to(input.dtype)  # the last class is the background
    loss = torchvision.ops.sigmoid_focal_loss(input, positive, alpha, gamma)
    # a class's weight counts where the class is the target: mmcv's kernel takes weight[target] for the whole row
    return loss * torch.cat((weight, weight.new_ones(1)))[target, None] if weight.numel() else loss


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (arXiv 1708.02002) of logits (N, C), with targets (N,) of which C is the background."""
    output.copy_(_focal(*_wide(input), target, *_wide(weight), gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    with torch.enable_grad():
        (logits,) = _wide(input.detach())
        logits = logits.clone().requires_grad_()
        loss = _focal(logits, target, *_wide(weight), gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Deformable convolution and attention


def _geometry(stride, pad, dilation, groups: int, deformable_groups: int, use_mask: bool) -> tuple:
    return *stride, *pad, *dilation, groups, deformable_groups, use_mask


def _deform(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry
) -> Tensor:
    input, weight, offset = _wide(input, weight, offset)
    mask = input.new_zeros(len(input), 1) if mask is None else mask.to(input.dtype)
    bias = input.new_zeros(len(weight)) if bias is None else bias.to(input.dtype)
    return _ops.deform_conv2d(input, weight, offset, mask, bias, *geometry)


def _first(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Offsets or masks (batch, C, H, W) as mmcv's kernels read them for an output of another size (h, w): the first
    C * h * w numbers of each image as (C, h, w). DyHead's published weights were trained so, with offsets of the finer
    level.

    Raises:
        RuntimeError: H * W < h * w. (mmcv would read what lies behind.)
    """
    if values.shape[2:] == size:
        return values
    channels, number = values.shape[1], size[0] * size[1]
    if values.shape[2] * values.shape[3] < number:
        raise RuntimeError(
            f"Offsets and masks of a deformable convolution must have a place for each of the output's {tuple(size)}; "
            f"they are {tuple(values.shape[2:])}."
        )
    return values.flatten(1)[:, : channels * number].unflatten(1, (channels, *size))


def _deform_backward(
    grad: Tensor, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, geometry: tuple
) -> tuple[Tensor, ...]:
    """Gradients of input, weight, offset, mask and bias."""
    grad, input, weight, offset = _wide(grad, input, weight, offset)
    mask = input.new_zeros(len(input), 1) if mask is None else mask.to(input.dtype)
    return _ops._deform_conv2d_backward(
        grad.contiguous(), input, weight, offset, mask, input.new_zeros(len(weight)), *geometry
    )


def deform_conv_forward(
    input, weight, offset, output, columns, ones, kW, kH, dW, dH, padW, padH, dilationW, dilationH, group,
    deformable_group, im2col_step,
) -> None:  # fmt: skip
    """Deformable convolution (arXiv 1703.06211), version 1."""
    geometry = _geometry((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group, False)
    output.copy_(_deform(input, weight, offset, None, None, geometry))


def deform_conv_backward_input(
    input, offset, grad_output, grad_input, grad_offset, weight, columns, kW, kH, dW, dH, padW, padH, dilationW,
    dilationH, group, deformable_group, im2col_step,
) -> None:  # fmt: skip
    geometry = _geometry((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group, False)
    grads = _deform_backward(grad_output, input, weight, offset, None, geometry)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(
    input, offset, grad_output, grad_weight, columns, ones, kW, kH, dW, dH, padW, padH, dilationW, dilationH, group,
    deformable_group, scale, im2col_step,
) -> None:  # fmt: skip
    geometry = _geometry((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group, False)
    grads = _deform_backward(grad_output, input, torch.zeros_like(grad_weight), offset, None, geometry)
    grad_weight.add_(grads[1], alpha=scale)


def modulated_deform_conv_forward(
    input, weight, bias, ones, offset, mask, output, columns, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w,
    dilation_h, dilation_w, group, deformable_group, with_bias,
) -> None:  # fmt: skip
    """Deformable convolution, version 2 (arXiv 1811.11168). Offsets, masks may be larger than the output: `_first`."""
    geometry = _geometry((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group, True)
    offset, mask = _first(offset, output.shape[2:]), _first(mask, output.shape[2:])
    output.copy_(_deform(input, weight, offset, mask, bias if with_bias else None, geometry))


def modulated_deform_conv_backward(
    input, weight, bias, ones, offset, mask, columns, grad_input, grad_weight, grad_bias, grad_offset, grad_mask,
    grad_output, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group,
    with_bias,
) -> None:  # fmt: skip
    geometry = _geometry((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group, True)
    size = grad_output.shape[2:]
    grads = _deform_backward(grad_output, input, weight, _first(offset, size), _first(mask, size), geometry)
    targets = [grad_input, grad_weight, grad_offset, grad_mask] + ([grad_bias] if with_bias else [])
    for target, grad in zip(targets, grads):
        if target.shape != grad.shape:  # only the first numbers of offsets and masks were used
            target.zero_()
            target = target.view(len(target), -1)[:, : grad[0].numel()]
        target.copy_(grad.reshape(target.shape))


def _attend(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """mmcv's own form in PyTorch, which it uses on CPUs."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, im2col_step: int
) -> Tensor:
    """Multi-scale deformable attention (arXiv 2010.04159)."""
    return _attend(*_wide(value), shapes, *_wide(locations, weights)).to(value.dtype)


def ms_deform_attn_backward(
    value, shapes, starts, locations, weights, grad_output, grad_value, grad_locations, grad_weights, im2col_step
) -> None:
    with torch.enable_grad():
        inputs = [t.detach().clone().requires_grad_() for t in _wide(value, locations, weights)]
        output = _attend(inputs[0], shapes, *inputs[1:])
    grads = torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
    for target, grad in zip((grad_value, grad_locations, grad_weights), grads):
        target.copy_(grad)
