"""Vanilla VMamba (v0) restated from its published definition (arXiv 2401.10166), to compare converted weights with.

Written for the eye and not for speed: it visits every token of every direction in turn. Modules bear the names that
VMamba's checkpoints use. Maps are (batch, H, W, C).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SS2D(nn.Module):
    """2-D selective scan: rows, columns, and both from their ends, each with S6 parameters of its own."""

    def __init__(self, dim: int, d_state: int = 16):
        super().__init__()
        inner, self.d_state, self.rank = 2 * dim, d_state, -(-dim // 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.empty(4, self.rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, inner))
        self.A_logs = nn.Parameter(torch.empty(4 * inner, d_state))
        self.Ds = nn.Parameter(torch.empty(4 * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        rows = [(i, j) for i in range(height) for j in range(width)]
        columns = [(i, j) for j in range(width) for i in range(height)]
        A, D = -torch.exp(self.A_logs).unflatten(0, (4, -1)), self.Ds.unflatten(0, (4, -1))
        y = torch.zeros_like(x)
        for k, path in enumerate((rows, columns, rows[::-1], columns[::-1])):
            h = torch.zeros_like(x[:, 0, 0, :, None]) * A[k]
            for i, j in path:
                u = x[:, i, j]
                dt, B, C = (u @ self.x_proj_weight[k].T).split([self.rank, self.d_state, self.d_state], dim=-1)
                dt = F.softplus(dt @ self.dt_projs_weight[k].T + self.dt_projs_bias[k])[..., None]
                h = torch.exp(dt * A[k]) * h + dt * B[:, None, :] * u[..., None]
                y[:, i, j] += (h * C[:, None, :]).sum(-1) + D[k] * u
        return self.out_proj(self.out_norm(y) * F.silu(z))


class VSSBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = SS2D(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.op(self.norm(x))


class PatchMerging(nn.Module):
    """Every 2 x 2 tokens side by side (down the first column first), normalised and halved in width."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
        return self.reduction(self.norm(x))


class VMamba(nn.Module):
    """(batch, 3, H, W) -> (batch, num_classes)."""

    def __init__(self, dim: int, depths: tuple[int, ...], num_classes: int = 1000):
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Conv2d(3, dim, 4, stride=4), nn.Identity(), nn.LayerNorm(dim))
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            layer = nn.Module()
            layer.blocks = nn.Sequential(*(VSSBlock(dim * 2**i) for _ in range(depth)))
            layer.downsample = PatchMerging(dim * 2**i) if i < len(depths) - 1 else nn.Identity()
            self.layers.append(layer)
        self.classifier = nn.Module()
        self.classifier.norm = nn.LayerNorm(dim * 2**i)
        self.classifier.head = nn.Linear(dim * 2**i, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed[2](self.patch_embed[0](x).permute(0, 2, 3, 1))
        for layer in self.layers:
            x = layer.downsample(layer.blocks(x))
        return self.classifier.head(self.classifier.norm(x).mean((1, 2)))


SIZES = {"tiny": (96, (2, 2, 9, 2)), "small": (96, (2, 2, 27, 2)), "base": (128, (2, 2, 27, 2))}


def vanilla_vmamba(size: str, seed: int = 0, num_classes: int = 1000) -> VMamba:
    """VMamba-T, -S or -B with every weight random and of a size that counts in the result."""
    with torch.device("meta"):
        model = VMamba(*SIZES[size], num_classes)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(generator=generator)
            if name.endswith("A_logs"):
                p.mul_(0.3).add_(torch.arange(1, p.shape[1] + 1).log())
            elif name.endswith("dt_projs_bias"):
                p.sub_(4)  # steps around 0.02
            elif p.dim() > 1:
                p.mul_(p[0].numel() ** -0.5)
            else:  # norms, biases and Ds
                p.mul_(0.3).add_(0 if name.endswith("bias") else 1)
    return model.eval()
