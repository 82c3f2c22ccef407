"""ViM2 as a backbone of MMEngine's libraries."""

import inspect
from collections.abc import Mapping, Sequence

import timm
from mmengine.model import BaseModule
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import vim2

from ..mixers import LayerNorm
from ..vim2 import check_image
from .loading import load_backbone_weights

__all__ = ["ViM2"]

ARCHS = tuple(name.removeprefix("vim2_") for name in timm.list_models("vim2_*", module="vim2"))
OPTIONS = tuple(
    name
    for name in inspect.signature(vim2.ViM2).parameters
    if name not in ("num_classes", "global_pool", "drop_rate", "device", "dtype")  # the classifier's, and the engine's
)


@MODELS.register_module()
class ViM2(BaseModule):
    """The stages of a ViM2, each one's map followed by a LayerNorm, as Swin's and VMamba's backbones put them out.

    Args:
        arch: The end of a model's name, such as "tiny" or "nano_token_d1" of `vim2_nano_token_d1`, or a dict of widths,
            which must hold depths and dims and may hold any option below.
        out_indices: Stages to put out, 0 to 3, in rising order.
        frozen_stages: -1 trains everything; 0 freezes the stem; n also the first n stages and their output norms.
            What is frozen also runs without stochastic depth.
        drop_path_rate: Stochastic depth of the last mixer; rates rise linearly from 0 at the first.
        with_cp: Recompute blocks in the backward pass, for less memory.
        norm_eval: Keep batch norms in evaluation mode, as for other backbones. ViM2's own norms are LayerNorms, which
            have no such mode; it serves subclasses that bring others.
        init_cfg: `dict(type="Pretrained", checkpoint=PATH_OR_URL)` loads weights of a ViM2: of `vim2 train`,
            `vim2 convert`, timm, or of a whole detector or segmenter, whose backbone is taken. The final norm
            of a classifier becomes the last stage's output norm. Other kinds are MMEngine's; in a list, as there, the
            checkpoint comes last.
        options: Further constructor arguments of `vim2.ViM2`: in_chans, patch_size, depths, dims, token_mixers,
            channel_mixer, d_state, token_expand, channel_expand, channel_patch, mlp_ratio.

    Attributes:
        out_channels: Of the maps that it puts out.

    Raises:
        ValueError: An unknown arch or option, out_indices or frozen_stages out of range, an init_cfg of no kind that
            there is; what `vim2.ViM2` raises.
    """

    def __init__(
        self,
        arch: str | Mapping = "tiny",
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        norm_eval: bool = False,
        init_cfg: dict | list | None = None,
        **options,
    ):
        super().__init__(init_cfg)
        _check_init_cfg(init_cfg)
        model = _create_model(arch, drop_path_rate, options)
        num_stages = len(model.stages)
        if isinstance(out_indices, int) or not out_indices or list(out_indices) != sorted(set(out_indices)):
            raise ValueError(f"out_indices must be a sequence of stages in rising order, got {out_indices!r}.")
        if not all(isinstance(i, int) and 0 <= i < num_stages for i in out_indices):
            raise ValueError(f"out_indices must lie within 0 to {num_stages - 1}, got {tuple(out_indices)}.")
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(f"frozen_stages must lie within -1 to {num_stages}, got {frozen_stages}.")
        self.arch = arch
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.in_chans = model.in_chans
        self.feature_info = model.feature_info
        self.out_channels = tuple(model.feature_info[i]["num_chs"] for i in self.out_indices)
        self.patch_embed = model.patch_embed
        self.stages = nn.ModuleList(model.stages[: self.out_indices[-1] + 1])  # stages behind the last are not needed
        for i, channels in zip(self.out_indices, self.out_channels):
            self.add_module(f"norm{i}", LayerNorm(channels))
        for stage in self.stages:
            stage.grad_checkpointing = with_cp
        self._freeze_stages()

    def init_weights(self) -> None:
        """Load the checkpoint of init_cfg, if it names one; without, the constructor has already initialised.

        Raises:
            UserError: No such file, a damaged one, or weights of another architecture.
        """
        given, cfgs = self.init_cfg, _init_cfgs(self.init_cfg)
        self.init_cfg = [cfg for cfg in cfgs if cfg.get("type") != "Pretrained"]
        super().init_weights()
        self.init_cfg = given
        for cfg in cfgs:
            if cfg.get("type") == "Pretrained":
                load_backbone_weights(self, cfg["checkpoint"], cfg.get("prefix"))

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Which layer a parameter belongs to, for layer-wise learning rates; MMPreTrain's interface.

        Layer 0 is the stem, and every block is one layer, the last one with the output norms.

        Args:
            param_name: Name of a parameter of the whole model.
            prefix: That of the backbone in it, such as "backbone.".

        Returns:
            The parameter's layer, and the number of layers, of which the last is everything behind the backbone.
        """
        layers = group_parameters(self, vim2.ViM2.group_matcher(self), reverse=True)
        num_layers = max(layers.values()) + 2
        return layers.get(param_name.removeprefix(prefix), num_layers - 1), num_layers

    def no_weight_decay(self) -> set[str]:
        """The parameters of the scans, which like norms, biases and averaging weights are not decayed."""
        return vim2.ViM2.no_weight_decay(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(batch, in_chans, H, W) -> (batch, dims[i], ceil(H / 4 / 2^i), ceil(W / 4 / 2^i)) for i in out_indices.

        Raises:
            ValueError: Not images of in_chans channels and at least 32 pixels a side, or none.
        """
        check_image(x, self.in_chans)
        x = self.patch_embed(x)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs.append(getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2).contiguous())
        return tuple(outs)

    def train(self, mode: bool = True) -> "ViM2":
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        frozen = [self.patch_embed] if self.frozen_stages >= 0 else []
        for i in range(min(self.frozen_stages, len(self.stages))):
            frozen += [self.stages[i]] + ([getattr(self, f"norm{i}")] if i in self.out_indices else [])
        for module in frozen:
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad = False


def _init_cfgs(init_cfg: dict | list | None) -> list[Mapping]:
    return [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg or ())


def _check_init_cfg(init_cfg: dict | list | None) -> None:
    """Raise a ValueError for what MMEngine would only stumble over when the training starts."""
    for cfg in _init_cfgs(init_cfg):
        kind = cfg.get("type") if isinstance(cfg, Mapping) else None
        if kind is None or WEIGHT_INITIALIZERS.get(kind) is None:
            problem = "has no type" if kind is None else f"has the type {kind!r}, which there is not"
            remedy = "it is dict(type='Pretrained', checkpoint=...), or another of MMEngine's"
            raise ValueError(f"init_cfg {problem}: {remedy}.")
        if kind == "Pretrained" and not cfg.get("checkpoint"):
            raise ValueError("init_cfg has no checkpoint: name a file of weights, or its address.")


def _create_model(arch: str | Mapping, drop_path_rate: float, options: dict) -> vim2.ViM2:
    widths = {} if isinstance(arch, str) else dict(arch)
    if unknown := sorted({*options, *widths} - {*OPTIONS}):
        raise ValueError(f"ViM2 has no option {unknown[0]!r}; there are {', '.join(OPTIONS)}.")
    options = {**widths, **options, "drop_path_rate": drop_path_rate, "num_classes": 0}
    if isinstance(arch, str):
        name = arch.removeprefix("vim2_")
        if name not in ARCHS:
            raise ValueError(f"There is no ViM2 of arch {arch!r}; arch is one of {', '.join(ARCHS)}, or a dict.")
        return timm.create_model(f"vim2_{name}", **options)
    if missing := {"depths", "dims"} - options.keys():
        raise ValueError(f"As a dict, arch must hold depths and dims; {' and '.join(sorted(missing))} is missing.")
    return vim2.ViM2(**options)
