"""The MambaMixer block (arXiv 2403.19888, section 3): token mixer, channel mixer, weighted averaging.

Maps are channels-last, (batch, H, W, C). Where the paper is silent, docs/architecture.md says what was chosen and why.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import swin_transformer
from torch import Tensor, nn

from .ops import (
    BIDIRECTIONAL,
    CROSS_SCAN,
    directional_conv_silu,
    layer_norm,
    norm_gate,
    patch_merging_norm,
    projected_scan,
    weighted_average,
    weighted_average_norm,
)
from .ops.conv.depthwise import depthwise_conv_silu_of_half
from .ops.conv.directional import directional_conv_silu_of_half
from .ops.modules import SETTINGS, call_replayed, is_itself, is_plain, is_plain_conv
from .ops.norm.weighted_average import weighted_average_norm_handing_on
from .ops.observers import is_observed

__all__ = ["S6", "MambaMixerBlock", "MixerLayer", "SelectiveChannelMixer", "SelectiveTokenMixer", "WeightedAverage"]

# Leaves of torch.fx graphs: their argument checks look at shapes, which a symbolic trace does not have.
torch.fx.wrap("depthwise_conv_silu_of_half")
torch.fx.wrap("directional_conv_silu")
torch.fx.wrap("directional_conv_silu_of_half")
torch.fx.wrap("layer_norm")
torch.fx.wrap("norm_gate")
torch.fx.wrap("patch_merging_norm")
torch.fx.wrap("projected_scan")
torch.fx.wrap("weighted_average")
torch.fx.wrap("weighted_average_norm")

CHANNEL_MIXERS = ("s6", "mlp", "none")


def inner_width(dim: int, ratio: float) -> int:
    """The width inside a mixer, rounded down. Raises a ValueError where it is below 1 or more than 32 bits hold."""
    if not 1 <= ratio * dim < 2**31:
        raise ValueError(
            f"A mixer's inner width, {dim} channels times its ratio, must be at least 1 and below 2^31; got ratio "
            f"{ratio}."
        )
    return int(ratio * dim)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels, with weight and bias, whose result is in autocast's dtype, see `vim2.ops.layer_norm`."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__(normalized_shape, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class PatchMerging(swin_transformer.PatchMerging):
    """Swin's: a Linear of the LayerNorm of 2 x 2 patches. See `vim2.ops.patch_merging_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, H, W, dim) -> (batch, H / 2, W / 2, out_dim), halves rounded up."""
        norm = self.norm
        if not is_plain(norm, nn.LayerNorm):
            return super().forward(x)
        return self.reduction(patch_merging_norm(x, norm.weight, norm.bias, norm.eps))


class S6(nn.Module):
    """Selective state-space model over several directions, each with parameters of its own; their outputs are summed.

    B, C and delta are linear in the input (delta through a low rank). A = -exp(A_log) starts at -1 ... -d_state and
    delta between 0.001 and 0.1, as in Mamba (arXiv 2312.00752).

    Args:
        features: Width E of the input.
        orders: The K directions, see `vim2.ops.selective_scan`.
        d_state: State size N.
        dt_rank: Rank R of delta's projection.
        separate_inputs: Whether every direction has an input of its own.

    Raises:
        ValueError: d_state below 1.
    """

    def __init__(
        self,
        features: int,
        orders: Sequence[str],
        d_state: int = 16,
        dt_rank: int = 1,
        separate_inputs: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if d_state < 1:
            raise ValueError(f"d_state must be at least 1, got {d_state}.")
        dd = {"device": device, "dtype": dtype}
        directions = len(orders)
        self.orders = tuple(orders)
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.separate_inputs = separate_inputs
        self.x_proj_weight = nn.Parameter(torch.empty(directions, dt_rank + 2 * d_state, features, **dd))
        self.dt_proj_weight = nn.Parameter(torch.empty(directions, features, dt_rank, **dd))
        self.dt_proj_bias = nn.Parameter(torch.empty(directions, features, **dd))
        self.A_log = nn.Parameter(torch.empty(directions, features, d_state, **dd))
        self.D = nn.Parameter(torch.empty(directions, features, **dd))
        self.reset_parameters()

    def reset_parameters(self, dt_min: float = 0.001, dt_max: float = 0.1) -> None:
        bound = self.x_proj_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        nn.init.uniform_(self.dt_proj_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            dt = torch.empty_like(self.dt_proj_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
            self.dt_proj_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            states = torch.arange(1, self.d_state + 1, device=self.A_log.device)
            self.A_log.copy_(states.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(self, u: Tensor, merge: bool = True) -> Tensor:
        """(batch, *spatial, E), or (batch, *spatial, K, E) with separate inputs, -> (batch, *spatial, E), or without
        merge the K outputs before they are summed, (batch, *spatial, K, E)."""
        parameters = (self.x_proj_weight, self.A_log, self.D, self.dt_proj_bias, self.dt_proj_weight)
        return projected_scan(u, *parameters, self.orders, self.separate_inputs, merge)


class SelectiveTokenMixer(nn.Module):
    """Mixes tokens: a gated S6 over the map's rows and columns, both ways (section 3.1; the cross-scan of VMamba).

    y = Linear(LayerNorm(S6(SiLU(Conv(Linear(x))))) * SiLU(Linear(x))), with a depth-wise 3x3 convolution.

    Args:
        dim: Channels of the map.
        d_state: State size N of the S6.
        expand: Inner width over dim.
    """

    def __init__(self, dim: int, d_state: int = 16, expand: float = 2.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = inner_width(dim, expand)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, **dd)
        self.s6 = S6(inner, CROSS_SCAN, d_state=d_state, dt_rank=math.ceil(dim / 16), **dd)
        self.out_norm = nn.LayerNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, H, W, dim) -> (batch, H, W, dim)."""
        conv, norm = self.conv, self.out_norm
        projected = self.in_proj(x)
        if is_plain_conv(conv, nn.Conv2d, padding=1) and conv.kernel_size == (3, 3):
            value, gate = depthwise_conv_silu_of_half(projected, conv.weight, conv.bias)
        else:
            value, gate = projected.chunk(2, dim=-1)
            value = F.silu(conv(value.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        if is_plain(norm, nn.LayerNorm):
            y = self.s6(value, merge=False).unsqueeze(-3)
            return self.out_proj(norm_gate(y, gate, norm.weight, norm.bias, norm.eps))
        return self.out_proj(norm_gate(norm(self.s6(value)), gate))


class SelectiveChannelMixer(nn.Module):
    """Mixes channels: every token is a sequence of its own channels, scanned forward and backward by a gated S6
    (section 3.2).

    The value branch is cut into steps of `channel_patch` consecutive channels. Each direction has a depth-wise
    convolution that is causal along it, and an S6; weights are shared by all tokens and steps.

    Args:
        dim: Channels of the map.
        d_state: State size N of the S6.
        expand: Inner width over dim.
        channel_patch: Channels a step, P; 1 is the paper's flattening.
        d_conv: Width of the convolution, in steps.

    Raises:
        ValueError: If channel_patch does not divide the inner width, or that is below 1.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        expand: float = 2.0,
        channel_patch: int = 16,
        d_conv: int = 4,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = inner_width(dim, expand)
        if channel_patch < 1 or inner % channel_patch:
            raise ValueError(f"channel_patch must divide the channel mixer's width {inner}, got {channel_patch}.")
        self.channel_patch = channel_patch
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = nn.Conv1d(channel_patch, 2 * channel_patch, d_conv, groups=channel_patch, **dd)
        self.s6 = S6(
            channel_patch,
            BIDIRECTIONAL,
            d_state=d_state,
            dt_rank=math.ceil(channel_patch / 16),
            separate_inputs=True,
            **dd,
        )
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, H, W, dim) -> (batch, H, W, dim)."""
        projected, conv = self.in_proj(x), self.conv
        if is_plain_conv(conv, nn.Conv1d):
            steps, gate = directional_conv_silu_of_half(projected, conv.weight, conv.bias)
        else:
            value, gate = projected.chunk(2, dim=-1)
            steps = convolve_both_ways(value.unflatten(-1, (-1, self.channel_patch)).flatten(0, 2), conv)
        y = self.s6(steps, merge=False)
        return self.out_proj(norm_gate(y.unflatten(0, gate.shape[:-1]), gate))


def convolve_both_ways(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """`vim2.ops.directional_conv_silu` with the parameters of a module: (n, steps, P) -> (n, steps, 2, P)."""
    if is_plain_conv(conv, nn.Conv1d):
        return directional_conv_silu(x, conv.weight, conv.bias)
    x = x.transpose(1, 2)
    padding = (conv.kernel_size[0] - 1, 0)
    # every second of its outputs is of the direction that sees the sequence from its end
    forward = conv(F.pad(x, padding))[:, 0::2]
    backward = conv(F.pad(x.flip(-1), padding))[:, 1::2].flip(-1)
    return F.silu(torch.stack((forward, backward), dim=2)).permute(0, 3, 2, 1)


class WeightedAverage(nn.Module):
    """A learnable weighted sum of earlier features (section 3.3); at initialisation, their plain sum.

    Args:
        num_features: How many features are averaged.
    """

    def __init__(self, num_features: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return weighted_average(features, self.weight)


def average_and_normalise(features: Sequence[Tensor], average: WeightedAverage, norm: nn.Module) -> Tensor:
    """A norm of a weighted average, by `vim2.ops.weighted_average_norm` where both modules are plain."""
    if is_plain(average, WeightedAverage) and is_plain(norm, nn.LayerNorm):
        return weighted_average_norm(features, average.weight, norm.weight, norm.bias, norm.eps)
    return norm(average(features).contiguous())


class MixerLayer(nn.Module):
    """One mixer on the normalised weighted average of everything before it."""

    def __init__(self, dim: int, mixer: nn.Module, num_features: int, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.average = WeightedAverage(num_features, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return call_replayed(self, self._mix, features)

    def extend(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """The features with this layer's output behind them, in training where `hands_on` allows it.

        The features that are returned are to be used from here on, in place of those that were given. The gradients of
        their later uses then come to this layer, whose kernel adds its own to them, where autograd would add up the
        gradients of all uses one by one.
        """
        new, *features = call_replayed(self, self._mix_handing_on, features, handed_on=len(features))
        return (*features, new)

    def _mix(self, *features: Tensor) -> Tensor:
        return self.drop_path(self.mixer(average_and_normalise(features, self.average, self.norm)))

    def _mix_handing_on(self, *features: Tensor) -> Sequence[Tensor]:
        """The output, and behind it the features that are handed on."""
        average, norm = self.average, self.norm
        if is_plain(average, WeightedAverage) and is_plain(norm, nn.LayerNorm):
            parameters = (average.weight, norm.weight, norm.bias)
            x, *features = weighted_average_norm_handing_on(features, *parameters, norm.eps)
        else:
            x = average_and_normalise(features, average, norm)
        return (self.drop_path(self.mixer(x)), *features)


class MambaMixerBlock(nn.Module):
    """Token mixers followed by a channel mixer, joined by weighted averaging alone (section 3.3, equations 14 and 15).

    The block takes all features of its stage so far, y(0) first, and returns those that its own mixers add. With every
    weight at 1, as initialised, the features' sum is the stream of a pre-norm residual network.

    Args:
        dim: Channels of the maps.
        num_features: How many features come before this block.
        token_mixers: Number of token mixers.
        channel_mixer: "s6", "mlp" (ViM2-MLP) or "none".
        d_state: State size N of all S6.
        token_expand: Inner width of the token mixers over dim.
        channel_expand: Inner width of the channel mixer over dim.
        channel_patch: Channels a step of the channel scan.
        mlp_ratio: Hidden width of the MLP over dim, where it is the channel mixer.
        drop_path: Rate of each mixer, token mixers first.

    Raises:
        ValueError: If channel_mixer is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_features: int,
        token_mixers: int = 2,
        channel_mixer: str = "s6",
        d_state: int = 16,
        token_expand: float = 2.0,
        channel_expand: float = 2.0,
        channel_patch: int = 16,
        mlp_ratio: float = 4.0,
        drop_path: Sequence[float] = (0.0, 0.0, 0.0),
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        mixers = [SelectiveTokenMixer(dim, d_state, token_expand, **dd) for _ in range(token_mixers)]
        if channel_mixer == "s6":
            mixers.append(SelectiveChannelMixer(dim, d_state, channel_expand, channel_patch, **dd))
        elif channel_mixer == "mlp":
            mixers.append(Mlp(dim, inner_width(dim, mlp_ratio), **dd))
        elif channel_mixer != "none":
            raise ValueError(f"channel_mixer must be one of {', '.join(CHANNEL_MIXERS)}, got {channel_mixer!r}.")
        self.layers = nn.ModuleList(
            MixerLayer(dim, mixer, num_features + i, rate, **dd)
            for i, (mixer, rate) in enumerate(zip(mixers, drop_path, strict=True))
        )

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        """All earlier features, each (batch, H, W, dim), -> the new ones, one a mixer."""
        given = len(features)
        for layer in self.layers:
            features = (*features, layer(features))
        return features[given:]

    def extend(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """The features with the outputs of all layers behind them, as `MixerLayer.extend` has it."""
        for layer in self.layers:
            features = layer.extend(features)
        return features


SETTINGS.update(
    {
        MambaMixerBlock: lambda module: None,
        MixerLayer: lambda module: None,
        WeightedAverage: lambda module: None,
        PatchMerging: lambda module: None,
        SelectiveTokenMixer: lambda module: None,
        SelectiveChannelMixer: lambda module: module.channel_patch,
        S6: lambda module: (tuple(module.orders), module.separate_inputs),
    }
)


def hands_on(blocks: Iterable[nn.Module], average: nn.Module, x: Tensor) -> bool:
    """Whether a stage may call its blocks' `extend`, so that features are handed on from layer to layer.

    It may where x, the first of the features, wants a gradient, nobody wants to see operators called, and nobody holds
    on to a module that is given features: to one who compares, those that are handed on are other tensors than those
    that came in, and their gradients those of some uses only.
    """
    if not (torch.is_grad_enabled() and x.__class__ is Tensor and x.requires_grad) or is_observed():
        return False
    return is_itself(average, WeightedAverage) and all(
        is_itself(block, MambaMixerBlock) and all(is_itself(layer, MixerLayer) for layer in block.layers)
        for block in blocks
    )
