"""TSM2, the forecasting MambaMixer (arXiv 2403.19888, section 5): patches of every variate, mixed along time and along
variates by selective scans, and projected to the horizon.

Paper: MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection,
Behrouz, Santacatterina, Zabih, 2024. The authors released no code and left patches, widths and losses open;
docs/forecasting.md says what was decided. Grids are (batch, variates, patches, features) throughout.
"""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from .mixers import S6, WeightedAverage, average_and_normalise, convolve_both_ways
from .ops import BIDIRECTIONAL, FORWARD, causal_conv_silu, norm_gate
from .ops.modules import is_plain_conv

__all__ = ["TSM2", "TSM2Config", "TimeMixer", "VariateMixer"]

TIME_MIXERS = ("s6", "linear")
VARIATE_MIXERS = ("s6", "mlp", "none")
NORMS = ("layer", "2d")
INSTANCE_NORMS = ("mean", "last", "none")


@dataclass(frozen=True)
class TSM2Config:
    """The sizes and options of a TSM2.

    Args:
        lookback: Time steps L that it sees.
        horizon: Time steps H that it forecasts.
        patch: Time steps a patch.
        stride: Time steps from one patch to the next.
        d_model: Features of a patch.
        depth: MambaMixer blocks, each a time mixer and a variate mixer.
        d_state: State size N of all S6.
        expand: Inner width of the mixers over d_model.
        d_conv: Width of the causal convolutions, in patches and in variates.
        time_mixer: "s6", or "linear": one linear map over the patches (the paper's ablation "Mamba + linear time").
        variate_mixer: "s6", "mlp" (the paper's ablation TSM2-MLP: an MLP over every patch's features) or "none".
        norm: What normalises the input of a mixer: "layer", each patch's features; "2d", each feature over batch,
            time and variates (the paper's 2-D normalisation, with running averages as BatchNorm has them, since those
            of the window itself would let a patch see later ones).
        instance_norm: Reversible instance normalisation (Kim et al., ICLR 2022) of each window and variate: subtract
            its "mean" or "last" value and divide by its deviation; "none" of it, as in the paper.
        dropout: Rate on the embedding and on every mixer's output.
        head_dropout: Rate before the projection to the horizon.
        quantiles: Levels in (0, 1), ascending; none forecasts a single value, the mean under the squared error.
        static_features: Features C_S of a variate that do not change with time.
        future_features: Features C_Z of a variate that are known for future_length time steps.
        future_length: Their time steps T_Z; 0 is the horizon.

    Raises:
        ValueError: A value of another type or out of its range, or an unknown choice.
    """

    lookback: int = 512
    horizon: int = 96
    patch: int = 16
    stride: int = 8
    d_model: int = 16
    depth: int = 1
    d_state: int = 16
    expand: float = 2.0
    d_conv: int = 4
    time_mixer: str = "s6"
    variate_mixer: str = "s6"
    norm: str = "layer"
    instance_norm: str = "mean"
    dropout: float = 0.1
    head_dropout: float = 0.0
    quantiles: tuple[float, ...] = ()
    static_features: int = 0
    future_features: int = 0
    future_length: int = 0

    def __post_init__(self):
        if isinstance(self.quantiles, Iterable) and not isinstance(self.quantiles, str):
            object.__setattr__(self, "quantiles", tuple(self.quantiles))  # JSON has lists
        self._check_types()
        for name in ("lookback", "horizon", "patch", "stride", "d_model", "depth", "d_state", "d_conv"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("static_features", "future_features", "future_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name, known in (
            ("time_mixer", TIME_MIXERS),
            ("variate_mixer", VARIATE_MIXERS),
            ("norm", NORMS),
            ("instance_norm", INSTANCE_NORMS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name in ("dropout", "head_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        if self.patch > self.lookback:
            raise ValueError(f"patch must not be longer than the lookback {self.lookback}, got {self.patch}.")
        if self.stride > self.patch:
            raise ValueError(
                f"stride must not exceed patch {self.patch}, or time steps are skipped; got {self.stride}."
            )
        if not 1 <= self.expand * self.d_model < 2**31:  # as inner_width has it
            raise ValueError(
                f"expand must leave the mixers a width, expand times d_model {self.d_model}, of 1 or more and below "
                f"2^31, got {self.expand}."
            )
        levels = self.quantiles
        if any(not 0 < q < 1 for q in levels) or list(levels) != sorted(set(levels)):
            raise ValueError(f"quantiles must be ascending numbers between 0 and 1, got {levels}.")

    def _check_types(self) -> None:
        """Raise a ValueError unless every value is of the type of its default."""
        for name, field in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if isinstance(field.default, tuple):
                kind, right = "numbers", isinstance(value, tuple) and all(map(_is_finite, value))
            elif isinstance(field.default, str):
                kind, right = "text", isinstance(value, str)
            elif isinstance(field.default, float):
                kind, right = "a finite number", _is_finite(value)
            else:
                kind, right = "a whole number", isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if not right:
                raise ValueError(f"{name} must be {kind}, got {value!r}.")

    @classmethod
    def paper(cls, **changes) -> "TSM2Config":
        """As near to the paper's text as it goes: 2-D normalisation and no instance normalisation."""
        return cls(**{"norm": "2d", "instance_norm": "none", "depth": 2, "d_model": 64, **changes})

    @property
    def future_steps(self) -> int:
        """Time steps T_Z of the future features."""
        return self.future_length or self.horizon

    def to_dict(self) -> dict:
        """Plain numbers, text and lists."""
        return {**dataclasses.asdict(self), "quantiles": list(self.quantiles)}


def _is_finite(value: object) -> bool:
    """Whether it is a number that float32 can hold."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) < 1e38


class TimeMixer(nn.Module):
    """Mixes patches of one variate: a gated S6 along time, forward only (section 3.1 with a causal 1-D convolution).

    y = Linear(S6(SiLU(Conv(Linear(x)))) * SiLU(Linear(x))). No output depends on later patches.

    Args:
        dim: Features of a patch.
        d_state: State size N of the S6.
        expand: Inner width over dim.
        d_conv: Width of the convolution, in patches.
    """

    def __init__(self, dim: int, d_state: int = 16, expand: float = 2.0, d_conv: int = 4, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = nn.Conv1d(inner, inner, d_conv, groups=inner, **dd)
        self.s6 = S6(inner, FORWARD, d_state=d_state, dt_rank=math.ceil(dim / 16), **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, variates, patches, dim) -> (batch, variates, patches, dim)."""
        value, gate = self.in_proj(x).flatten(0, 1).chunk(2, dim=-1)
        conv = self.conv
        if is_plain_conv(conv, nn.Conv1d):
            value = causal_conv_silu(value, conv.weight, conv.bias)
        else:
            steps = F.pad(value, (0, 0, conv.kernel_size[0] - 1, 0)).transpose(1, 2)
            value = F.silu(conv(steps)).transpose(1, 2).contiguous()
        return self.out_proj(norm_gate(self.s6(value), gate)).unflatten(0, x.shape[:2])


class LinearTimeMixer(nn.Module):
    """One linear map over the patches of a variate, for every feature alike: the paper's ablation without selection.

    Args:
        patches: Number of patches.
    """

    def __init__(self, patches: int, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Linear(patches, patches, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, variates, patches, dim) -> (batch, variates, patches, dim)."""
        return self.proj(x.transpose(2, 3)).transpose(2, 3)


class VariateMixer(nn.Module):
    """Mixes variates at one time: a gated S6 along the variates, forward and backward (section 3.2).

    Each direction has a causal convolution and an S6 of its own; the order of the variates matters.

    Args:
        dim: Features of a patch.
        d_state: State size N of the S6.
        expand: Inner width over dim.
        d_conv: Width of the convolutions, in variates.
    """

    def __init__(self, dim: int, d_state: int = 16, expand: float = 2.0, d_conv: int = 4, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = nn.Conv1d(inner, 2 * inner, d_conv, groups=inner, **dd)
        self.s6 = S6(inner, BIDIRECTIONAL, d_state=d_state, dt_rank=math.ceil(dim / 16), separate_inputs=True, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, variates, patches, dim) -> (batch, variates, patches, dim)."""
        x = x.transpose(1, 2)
        value, gate = self.in_proj(x).flatten(0, 1).chunk(2, dim=-1)
        y = self.s6(convolve_both_ways(value, self.conv), merge=False)
        return self.out_proj(norm_gate(y.unsqueeze(-3), gate)).unflatten(0, x.shape[:2]).transpose(1, 2)


class FeatureNorm(nn.BatchNorm1d):
    """2-D normalisation: each feature over batch, variates and time."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, variates, patches, dim) -> (batch, variates, patches, dim)."""
        return super().forward(x.flatten(0, 2)).view_as(x)


class SeriesMixerLayer(nn.Module):
    """One mixer on the normalised weighted average of everything before it."""

    def __init__(self, dim: int, mixer: nn.Module, num_features: int, norm: str, dropout: float, device, dtype):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.average = WeightedAverage(num_features, **dd)
        self.norm = nn.LayerNorm(dim, **dd) if norm == "layer" else FeatureNorm(dim, **dd)
        self.mixer = mixer
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.dropout(self.mixer(average_and_normalise(features, self.average, self.norm)))


class TSM2(nn.Module):
    """A MambaMixer that forecasts many variates at once.

    Any number of variates goes in, with the same weights; but the scan along variates learns their order, so a trained
    model is for the variates it was trained on, in that order.

    Args:
        config: Its sizes and options.
    """

    def __init__(self, config: TSM2Config, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.config = c = config
        patches = count_patches(c.lookback, c.patch, c.stride)
        self.embed = nn.Linear(c.patch, c.d_model, **dd)
        self.dropout = nn.Dropout(c.dropout)
        self.static_proj = self.future_embed = None
        self.tokens = patches
        mixer_args = dict(d_state=c.d_state, expand=c.expand, d_conv=c.d_conv, **dd)
        if c.static_features:
            self.static_proj = nn.Linear(c.static_features, patches * c.d_model, **dd)
            self.tokens += patches
        if c.future_features:
            steps = min(c.patch, c.future_steps)
            self.future_patch, self.future_stride = steps, min(c.stride, steps)
            future_patches = count_patches(c.future_steps, self.future_patch, self.future_stride)
            self.future_embed = nn.Linear(steps * c.future_features, c.d_model, **dd)
            self.future_mixer = SeriesMixerLayer(
                c.d_model, VariateMixer(c.d_model, **mixer_args), 1, c.norm, c.dropout, **dd
            )
            self.future_average = WeightedAverage(2, **dd)
            self.future_proj = nn.Linear(future_patches, patches, **dd)
            self.tokens += patches
        self.layers = nn.ModuleList()
        for _ in range(c.depth):
            mixers = [
                TimeMixer(c.d_model, **mixer_args) if c.time_mixer == "s6" else LinearTimeMixer(self.tokens, **dd)
            ]
            if c.variate_mixer == "s6":
                mixers.append(VariateMixer(c.d_model, **mixer_args))
            elif c.variate_mixer == "mlp":
                mixers.append(Mlp(c.d_model, int(2 * c.expand * c.d_model), **dd))
            for mixer in mixers:
                self.layers.append(SeriesMixerLayer(c.d_model, mixer, len(self.layers) + 1, c.norm, c.dropout, **dd))
        self.average = WeightedAverage(len(self.layers) + 1, **dd)
        self.head_dropout = nn.Dropout(c.head_dropout)
        self.head = nn.Linear(self.tokens * c.d_model, c.horizon * max(len(c.quantiles), 1), **dd)

    def forward(self, x: Tensor, static: Tensor | None = None, future: Tensor | None = None) -> Tensor:
        """Forecast.

        Args:
            x: History, (batch, L, M), of a floating dtype.
            static: (batch, M, C_S), or (M, C_S) for all windows alike.
            future: (batch, T_Z, M, C_Z), or (batch, T_Z, C_Z) where all variates share it.

        Returns:
            (batch, H, M), with quantiles (batch, H, M, Q), ascending along Q, in the parameters' dtype.

        Raises:
            ValueError: Shapes that do not fit the configuration, auxiliary features missing or not asked for.
        """
        self._check(x, static, future)
        c = self.config
        x, center, scale = instance_normalise(x.to(self.embed.weight.dtype), c.instance_norm)
        x = x.transpose(1, 2)
        features = self._mix(self._tokens(x, static, future))
        y = self.head(self.head_dropout(features.flatten(2))).unflatten(-1, (c.horizon, -1)).to(x.dtype)
        y = y.transpose(1, 2) * scale.unsqueeze(-1) + center.unsqueeze(-1)
        # Quantiles that cross are put in order, the monotone rearrangement of Chernozhukov et al. (Econometrica, 2010).
        # Exchanging forecasts a > b of levels s < t lowers the sum of their pinball losses by (t - s)(a - b), whatever
        # the truth, so this never costs anything.
        return y.sort(dim=-1, stable=True).values if c.quantiles else y.squeeze(-1)

    def _tokens(self, x: Tensor, static: Tensor | None, future: Tensor | None) -> Tensor:
        """The grid that the mixers see, y(0): static features, then the history's patches, then future features, as
        many tokens each (the paper's M x 3T), in the order of time."""
        c, (batch, variates, _) = self.config, x.shape
        tokens = [self.embed(cut_patches(x, c.patch, c.stride))]
        if self.static_proj is not None:
            static = static.to(x.dtype).expand(batch, variates, -1)
            tokens.insert(0, self.static_proj(static).unflatten(-1, (-1, c.d_model)))
        if self.future_embed is not None:
            if future.dim() == 3:
                future = future.unsqueeze(2).expand(-1, -1, variates, -1)
            steps = cut_patches(future.to(x.dtype).permute(0, 2, 3, 1), self.future_patch, self.future_stride)
            embedded = self.future_embed(steps.transpose(2, 3).flatten(3))
            mixed = self.future_average([embedded, self.future_mixer([embedded])])
            tokens.append(self.future_proj(mixed.transpose(2, 3)).transpose(2, 3))
        return self.dropout(torch.cat(tokens, dim=2))

    def _mix(self, tokens: Tensor) -> Tensor:
        features = [tokens]
        for layer in self.layers:
            features.append(layer(features))
        return self.average(features)

    def _check(self, x, static, future):
        c = self.config
        if x.dim() != 3 or x.shape[1] != c.lookback or x.numel() == 0:
            raise ValueError(f"x must be (batch, {c.lookback}, variates) and not empty, got {tuple(x.shape)}.")
        batch, _, variates = x.shape
        for name, given, width in (("static", static, c.static_features), ("future", future, c.future_features)):
            if (given is None) == (width > 0):
                raise ValueError(
                    f"The model was made with {name}_features = {width}: "
                    + (f"{name} is missing." if given is None else f"it takes no {name}.")
                )
        if static is not None and static.shape not in (
            (variates, c.static_features),
            (batch, variates, c.static_features),
        ):
            wanted = (batch, variates, c.static_features)
            raise ValueError(f"static must be {wanted} or {wanted[1:]}, got {tuple(static.shape)}.")
        if future is not None:
            wanted = (batch, c.future_steps, variates, c.future_features)
            shared = (batch, c.future_steps, c.future_features)
            if future.shape not in (wanted, shared):
                raise ValueError(f"future must be {wanted} or {shared}, got {tuple(future.shape)}.")


def count_patches(steps: int, patch: int, stride: int) -> int:
    """Patches of a series whose last value is repeated for one more stride (PatchTST's end padding)."""
    return (steps - patch) // stride + 2


def cut_patches(x: Tensor, patch: int, stride: int) -> Tensor:
    """(..., steps) -> (..., patches, patch), the end padded with its last value by one stride."""
    padded = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], stride)), dim=-1)
    return padded.unfold(-1, patch, stride)


def instance_normalise(x: Tensor, kind: str, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """Windows (batch, L, M) without their own level and scale, and these two, (batch, 1, M), to put them back."""
    if kind == "none":
        return x, torch.zeros_like(x[:, :1]), torch.ones_like(x[:, :1])
    variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
    center = mean if kind == "mean" else x[:, -1:]
    scale = (variance + eps).sqrt()
    return (x - center) / scale, center, scale
