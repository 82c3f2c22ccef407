"""Forms of ViM2 that the models have no options for, to be compared with the default (docs/channel_mixer.md).

    python tools/arena.py run OUTPUT --imports tools/comparisons/channel_mixers.py --data-dir DIR \\
        --models default=vim2_nano:d_state=1 rank4=vim2_nano_form:d_state=1,dt_rank=4

`vim2_nano_form` takes the arguments of `vim2_nano` and those of `ViM2Form`, and without these is the same model, but
for its weights and the size of its images, where none is given.
"""

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vim2.mixers import S6, SelectiveChannelMixer, SelectiveTokenMixer, WeightedAverage
from vim2.ops import BIDIRECTIONAL, CROSS_SCAN, FORWARD, selective_scan
from vim2.vim2 import ViM2
from vim2.vim2 import default_cfgs as known_cfgs

ORDERS = {1: FORWARD, 2: BIDIRECTIONAL, 4: CROSS_SCAN}  # by number of directions


class ForwardS6(S6):
    """One direction, of the two inputs that the channel mixer's convolution makes, the other of which is left out."""

    def __init__(self, steps: int, features: int, orders, *args, **kwargs):
        super().__init__(features, FORWARD, *args, **kwargs)

    def forward(self, u: Tensor, merge: bool = True) -> Tensor:
        """(n, steps, 2, P) -> (n, steps, P), or without merge (n, steps, 1, P)."""
        return super().forward(u[..., :1, :].contiguous(), merge)


class NoS6(nn.Module):
    """D u alone, without states."""

    def __init__(self, steps: int, features: int, orders, *args, **kwargs):
        super().__init__()
        self.D = nn.Parameter(torch.ones(len(orders), features))

    def forward(self, u: Tensor, merge: bool = True) -> Tensor:
        """(n, steps, K, P) -> (n, steps, P), or without merge (n, steps, K, P)."""
        y = u * self.D.to(u.dtype)
        return y.sum(-2) if merge else y


class EmbeddedS6(S6):
    """Adds to its input a learned embedding of each step, channel and direction, at first 0."""

    def __init__(self, steps: int, features: int, *args, **kwargs):
        super().__init__(features, *args, **kwargs)
        self.embedding = nn.Parameter(torch.zeros(steps, *self.D.shape))

    def forward(self, u: Tensor, merge: bool = True) -> Tensor:
        """(n, steps, K, P) -> (n, steps, P), or without merge (n, steps, K, P)."""
        return super().forward(u + self.embedding.to(u.dtype), merge)


class StepS6(S6):
    """Adds to B, C and delta's low-rank factor a learned offset of each step and direction, at first 0."""

    def __init__(self, steps: int, features: int, *args, **kwargs):
        super().__init__(features, *args, **kwargs)
        directions, rows, _ = self.x_proj_weight.shape
        self.offset = nn.Parameter(torch.zeros(steps, directions, rows))

    def project(self, u: Tensor) -> Tensor:
        """(n, steps, K, P) -> (n, steps, K, R + 2 N): delta's factor, B and C."""
        return torch.einsum("nlke,kce->nlkc", u, self.x_proj_weight)

    def forward(self, u: Tensor, merge: bool = True) -> Tensor:
        """(n, steps, K, P) -> (n, steps, P), or without merge (n, steps, 1, P)."""
        projected = self.project(u)
        projected = projected + self.offset.to(projected.dtype)
        delta, B, C = projected.split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        options = dict(orders=self.orders, delta_weight=self.dt_proj_weight)
        y = selective_scan(u, delta, -self.A_log.exp(), B, C, self.D, self.dt_proj_bias, **options)
        return y if merge else y.unsqueeze(-2)


class ReadingS6(StepS6):
    """As `StepS6`, and B, C and delta of a step, by weights of its own, read the channels of all steps."""

    def __init__(self, steps: int, features: int, *args, **kwargs):
        super().__init__(steps, features, *args, **kwargs)
        directions, rows, _ = self.x_proj_weight.shape
        bound = (steps * features) ** -0.5
        weight = self.x_proj_weight.new_empty(directions, steps * rows, steps * features).uniform_(-bound, bound)
        self.x_proj_weight = nn.Parameter(weight)

    def project(self, u: Tensor) -> Tensor:
        rows = torch.einsum("nke,kce->nkc", u.transpose(1, 2).flatten(2), self.x_proj_weight)
        return rows.unflatten(-1, (u.shape[1], -1)).transpose(1, 2)


class DecayedAverage(WeightedAverage):
    """With weights that the optimiser lets decay, since they are no vector to it."""

    def __init__(self, num_features: int, **kwargs):
        super().__init__(num_features, **kwargs)
        self.weights = nn.Parameter(self.weight.detach()[None])
        del self.weight

    @property
    def weight(self) -> Tensor:
        return self.weights[0]


AVERAGES = ("free", "decayed", "frozen", "chained")
SCANS = {"forward": ForwardS6, "none": NoS6, "embedded": EmbeddedS6, "offset": StepS6, "reading": ReadingS6}


class ViM2Form(ViM2):
    """ViM2 with other mixers or averages inside.

    Args:
        dt_rank: Rank of the channel scan's step sizes; default: channel_patch / 16, rounded up.
        d_conv: Width of the channel mixer's convolution; 1 leaves a factor and a bias for each channel of a step.
        step_sizes: The least and the largest of the channel scan, at the start.
        channel_scan: "s6", or another of `SCANS`.
        token_directions: 1, 2 (row by row, both ways) or 4.
        averages: "free", "decayed", "frozen" (at 1: a mixer reads the sum, as in a residual network) or "chained" (a
            mixer reads its predecessor's output alone).
    """

    def __init__(
        self,
        dt_rank: int | None = None,
        d_conv: int = 4,
        step_sizes: tuple[float, float] = (0.001, 0.1),
        channel_scan: str = "s6",
        token_directions: int = 4,
        averages: str = "free",
        **kwargs,
    ):
        known = {"channel_scan": ("s6", *SCANS), "token_directions": tuple(ORDERS), "averages": AVERAGES}
        for name, value in zip(known, (channel_scan, token_directions, averages)):
            if value not in known[name]:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known[name]))}, got {value!r}.")
        super().__init__(**kwargs)
        for module in list(self.modules()):
            if isinstance(module, SelectiveTokenMixer):
                s6 = module.s6
                module.s6 = S6(module.conv.in_channels, ORDERS[token_directions], s6.d_state, s6.dt_rank)
            elif isinstance(module, SelectiveChannelMixer):
                patch = module.channel_patch
                rank = module.s6.dt_rank if dt_rank is None else dt_rank
                own = (patch, BIDIRECTIONAL, module.s6.d_state, rank)
                module.conv = nn.Conv1d(patch, 2 * patch, d_conv, groups=patch)
                if channel_scan == "s6":
                    module.s6 = S6(*own, separate_inputs=True)
                else:
                    module.s6 = SCANS[channel_scan](module.out_proj.in_features // patch, *own, separate_inputs=True)
                if channel_scan != "none":
                    module.s6.reset_parameters(*step_sizes)
            elif isinstance(module, WeightedAverage):
                module.weight.requires_grad_(averages in ("free", "decayed"))
                if averages == "chained":
                    module.weight.data[:-1] = 0
        if averages == "decayed":
            for parent in [module for module in self.modules() if hasattr(module, "average")]:
                parent.average = DecayedAverage(len(parent.average.weight))


default_cfgs = generate_default_cfgs({"vim2_nano_form": known_cfgs["vim2_tiny"].default})


@register_model
def vim2_nano_form(pretrained: bool = False, **kwargs) -> ViM2Form:
    """`vim2_nano` in another form."""
    model_args = dict(depths=(1, 1, 2, 1), dims=(48, 96, 192, 320))
    return build_model_with_cfg(ViM2Form, "vim2_nano_form", pretrained, **dict(model_args, **kwargs))
