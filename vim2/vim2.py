"""ViM2, the vision MambaMixer (arXiv 2403.19888, section 4): a hierarchical backbone of MambaMixer blocks.

Paper: MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection,
Behrouz, Santacatterina, Zabih, 2024. The authors released no code; docs/architecture.md maps each equation to this
package. Maps are channels-last, (batch, H, W, C), throughout.
"""

import json
import math
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, PatchEmbed, to_ntuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, named_apply, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .mixers import LayerNorm, MambaMixerBlock, PatchMerging, WeightedAverage, hands_on
from .ops.backend import autocast_dtype
from .ops.modules import SETTINGS, call_replayed, compile_kernels, is_plain

__all__ = ["ViM2"]  # register_model adds the models

POOLINGS = ("avg", "max", "avgmax", "catavgmax", "")  # of timm's classifiers; "" is no pooling
MIN_SIZE = 32  # pixels: below, the last stage would hold no token


# A leaf of torch.fx graphs, for it asks for devices and shapes, which a symbolic trace does not have.
torch.fx.wrap("project_patches")


def project_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution whose stride is its kernel's size p, from channels-first to channels-last.

    (batch, C, H, W) -> (batch, H / p, W / p, dim), rounded down, with a weight (dim, C, p, p).

    On GPUs it is `multiply_patches`, which takes a quarter of the time of cuDNN's convolution and the copies to another
    layout and back around it.
    """
    if x.device.type == "cuda":
        return multiply_patches(x, weight, bias)
    return F.conv2d(x, weight, bias, weight.shape[2:]).permute(0, 2, 3, 1)


def multiply_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`project_patches` as one matrix product of the patches, copied side by side."""
    height, width = weight.shape[2:]
    # whether p divides H and W is not asked: the answer would bar programs with dynamic sizes
    patches = x.unfold(2, height, height).unfold(3, width, width).permute(0, 2, 3, 1, 4, 5)
    if (dtype := autocast_dtype(x)) is not None:  # in one step with the copy
        patches = patches.to(dtype, memory_format=torch.contiguous_format)
    return F.linear(patches.flatten(3), weight.flatten(1), bias)


def _takes_patches(conv: nn.Conv2d) -> bool:
    """Whether a convolution reads each pixel once, all channels together, as `project_patches` does."""
    steps = conv.stride == conv.kernel_size and max(conv.dilation) == 1
    return steps and not any(conv.padding) and conv.groups == 1


class Stem(PatchEmbed):
    """timm's PatchEmbed, computed by `project_patches`: (batch, C, H, W) -> (batch, H / p, W / p, dim), normalised."""

    def forward(self, x: Tensor) -> Tensor:
        proj = self.proj
        if not is_plain(proj, nn.Conv2d) or not _takes_patches(proj):
            return super().forward(x)
        return self.norm(project_patches(x, proj.weight, proj.bias))


class ViM2Stage(nn.Module):
    """Patch merging (but in the first stage), MambaMixer blocks, and the weighted average that ends the stage.

    Weighted averaging reaches back to the stage's own input, y(0), and no further.

    Args:
        in_dim: Channels of the map that comes in.
        dim: Channels of the stage.
        depth: Number of blocks.
        downsample: Whether to merge 2 x 2 patches first.
        drop_path: Rates, a sequence a block.
        block_args: Further arguments of `MambaMixerBlock`.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        downsample: bool,
        drop_path: Sequence[Sequence[float]],
        device=None,
        dtype=None,
        **block_args,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample = PatchMerging(in_dim, dim, **dd) if downsample else nn.Identity()
        self.blocks = nn.ModuleList()
        num_features = 1
        for i in range(depth):
            self.blocks.append(MambaMixerBlock(dim, num_features, drop_path=drop_path[i], **block_args, **dd))
            num_features += len(drop_path[i])
        self.average = WeightedAverage(num_features, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, H, W, in_dim) -> (batch, H, W, dim), where downsampling halves H and W, rounding up."""
        if self.grad_checkpointing:
            return self._mix(x)
        return call_replayed(self, self._mix, (x,))

    def _mix(self, x: Tensor) -> Tensor:
        features = (self.downsample(x),)
        hand_on = not self.grad_checkpointing and hands_on(self.blocks, self.average, features[0])
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                features += checkpoint(block, *features)
            elif hand_on:
                features = block.extend(features)
            else:
                features += block(*features)
        return self.average(features)


SETTINGS[ViM2Stage] = lambda stage: None  # with grad_checkpointing, it is not replayed


class ViM2(nn.Module):
    """ViM2 backbone and classifier, with timm's interface.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: timm's pool type; "" leaves pooling out.
        patch_size: Stride of the stem, in pixels.
        depths: Blocks a stage.
        dims: Channels a stage.
        token_mixers: Token mixers a block; one number, or one a stage.
        channel_mixer: "s6", "mlp" (the paper's ViM2-MLP) or "none" (vanilla VMamba).
        d_state: State size N of all S6.
        token_expand: Inner width of token mixers over the stage's channels; one number, or one a stage.
        channel_expand: Inner width of S6 channel mixers over the stage's channels; one number, or one a stage.
        channel_patch: Channels a step of the channel scan.
        mlp_ratio: Hidden width of the MLP over the stage's channels, with channel_mixer="mlp".
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last mixer; rates rise linearly from 0 at the first.

    Raises:
        ValueError: An unknown channel_mixer, a channel_patch that does not divide a channel mixer's width, not as many
            dims, token_mixers, ... as depths, or numbers out of their range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        depths: Sequence[int] = (1, 1, 3, 1),
        dims: Sequence[int] = (96, 192, 384, 768),
        token_mixers: int | Sequence[int] = 2,
        channel_mixer: str = "s6",
        d_state: int = 16,
        token_expand: float | Sequence[float] = 2.0,
        channel_expand: float | Sequence[float] = (2.0, 2.0, 2.0, 1.0),
        channel_patch: int = 16,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_sizes(0, num_classes=num_classes)
        check_sizes(1, in_chans=in_chans, patch_size=patch_size, d_state=d_state, channel_patch=channel_patch)
        check_sizes(1, token_mixers=token_mixers)
        check_sizes(1, a_stage=True, depths=depths, dims=dims)
        check_ratios(token_expand=token_expand, channel_expand=channel_expand, mlp_ratio=mlp_ratio)
        check_pooling(global_pool)
        dims, token_mixers, token_expand, channel_expand = a_value_a_stage(
            len(depths), dims=dims, token_mixers=token_mixers, token_expand=token_expand, channel_expand=channel_expand
        )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.num_features = dims[-1]
        self.feature_info = []

        self.patch_embed = Stem(
            img_size=None,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=dims[0],
            norm_layer=LayerNorm,
            output_fmt="NHWC",
            strict_img_size=False,  # or timm would say, where it saves the model, that it takes one size only
            **dd,
        )

        mixers = [tokens + (channel_mixer != "none") for tokens in token_mixers]  # of a block, by stage
        rates = torch.linspace(0, drop_path_rate, sum(d * m for d, m in zip(depths, mixers)), device="cpu").tolist()
        stages = []
        for i, depth in enumerate(depths):
            stages.append(
                ViM2Stage(
                    in_dim=dims[max(i - 1, 0)],
                    dim=dims[i],
                    depth=depth,
                    downsample=i > 0,
                    drop_path=[[rates.pop(0) for _ in range(mixers[i])] for _ in range(depth)],
                    token_mixers=token_mixers[i],
                    channel_mixer=channel_mixer,
                    d_state=d_state,
                    token_expand=token_expand[i],
                    channel_expand=channel_expand[i],
                    channel_patch=channel_patch,
                    mlp_ratio=mlp_ratio,
                    **dd,
                )
            )
            self.feature_info += [dict(num_chs=dims[i], reduction=patch_size * 2**i, module=f"stages.{i}")]
        self.stages = nn.Sequential(*stages)

        self.norm = LayerNorm(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as VMamba does: linear layers truncated normal (std 0.02), everything else by its own rule.

        Args:
            needs_reset: Whether other modules have still to be reset, as after creation on the meta device.
        """

        def init(module: nn.Module, name: str = "") -> None:
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()

        named_apply(init, self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The parameters of the scans; vectors (norms, biases, averaging weights) are left out by timm itself."""
        return {name for name, _ in self.named_parameters() if name.endswith(("A_log", "s6.D", "dt_proj_bias"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        last_blocks = [(rf"^stages\.({i})\.average", (len(stage.blocks) - 1,)) for i, stage in enumerate(self.stages)]
        return dict(
            stem=r"^patch_embed",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                *last_blocks,
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; num_classes=0 removes it, global_pool="" also the pooling.

        Raises:
            ValueError: A num_classes that is no whole number from 0 on, a pooling that timm does not know.
        """
        check_sizes(0, num_classes=num_classes)
        if global_pool is not None:
            check_pooling(global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)
        if global_pool is not None:
            self.global_pool = global_pool

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps that the stages put out.

        Args:
            x: Image, (batch, in_chans, H, W).
            indices: The last n stages if a number, all if None, else these.
            norm: Apply the final norm to the last stage's map.
            stop_early: Stop at the last stage asked for.
            output_fmt: "NCHW" or "NHWC", of the intermediates.
            intermediates_only: Leave out the final features.

        Returns:
            The intermediates, or (final features (batch, H / 32, W / 32, C), intermediates).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}.")
        take_indices, max_index = self._take_indices(indices)
        last = len(self.stages) - 1
        intermediates = []
        x = self.forward_stem(x)
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                y = self.norm(x) if norm and i == last else x
                intermediates.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        if not stop_early or max_index == last:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last one asked for, and the norm and head on request."""
        take_indices, max_index = self._take_indices(indices)
        pruned = max_index < len(self.stages) - 1
        if prune_norm or pruned:
            self.norm = nn.Identity()  # the final norm fits the last stage only
        self.stages = self.stages[: max_index + 1]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")  # the head, too, fits the last stage only
        return take_indices

    def _take_indices(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        """The stages that are asked for, and the last of them."""
        if isinstance(indices, Sequence) and not indices:
            raise ValueError("Name at least one stage: the indices (out_indices of features_only) are empty.")
        return feature_take_indices(len(self.stages), indices)

    def forward_stem(self, x: Tensor) -> Tensor:
        """(batch, in_chans, H, W) -> (batch, H // 4, W // 4, dims[0]).

        Raises:
            ValueError: Not images of in_chans channels and at least 32 pixels a side, or none.
        """
        check_image(x, self.in_chans)
        compile_kernels(self, self.forward_features, x)
        return self.patch_embed(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, in_chans, H, W) -> (batch, H / 32, W / 32, num_features), normalised."""
        return self.norm(self.stages(self.forward_stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(batch, H, W, num_features) -> (batch, num_classes), or with pre_logits (batch, num_features)."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def check_rates(**rates: float) -> None:
    """Raise a ValueError unless all lie in [0, 1)."""
    for name, rate in rates.items():
        if not isinstance(rate, Real) or not 0 <= rate < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {rate!r}.")


def check_sizes(least: int, a_stage: bool = False, **sizes: int | Sequence[int]) -> None:
    """Raise a ValueError unless all, or all in them, are whole numbers from `least` on, with `a_stage` in sequences."""
    for name, size in sizes.items():
        is_sequence = isinstance(size, Sequence)
        values = size if is_sequence else [size]
        if not values or any(not isinstance(value, Integral) or value < least for value in values):
            raise ValueError(f"{name} must be {least} or more, in whole numbers, got {size!r}.")
        if a_stage and not is_sequence:
            raise ValueError(f"{name} must be a list with a number a stage, got {size!r}.")


def a_value_a_stage(stages: int, **arguments: Any) -> list[tuple]:
    """The arguments, in their order, each as a value for every stage; a ValueError for another number of values."""
    spread = {name: to_ntuple(stages)(value) for name, value in arguments.items()}
    for name, values in spread.items():
        if len(values) != stages:
            raise ValueError(f"{name} must have a value a stage, {stages} as depths has, got {tuple(values)}.")
    return list(spread.values())


def check_ratios(**ratios: float | Sequence[float]) -> None:
    """Raise a ValueError unless all, or all in them, are finite numbers above 0."""
    for name, ratio in ratios.items():
        values = ratio if isinstance(ratio, Sequence) else [ratio]
        if not values or any(not isinstance(value, Real) or not 0 < value < math.inf for value in values):
            raise ValueError(f"{name} must be above 0, in finite numbers, got {ratio!r}.")


def check_pooling(global_pool: str) -> None:
    """Raise a ValueError unless timm's classifiers know this pooling."""
    if global_pool not in POOLINGS:
        raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLINGS))}, got {global_pool!r}.")


def check_image(x: Tensor, in_chans: int) -> None:
    """Raise a ValueError unless x is (batch, in_chans, H, W) with an image or more, and H and W at least MIN_SIZE."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f"Expected images of shape (batch, {in_chans}, H, W), got {tuple(x.shape)}; "
            f"for another number of channels create the model with in_chans=..."
        )
    if x.shape[0] == 0:
        raise ValueError("The batch holds no image: leave empty batches out.")
    if x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
        raise ValueError(
            f"Images must be at least {MIN_SIZE} x {MIN_SIZE}, got {x.shape[2]} x {x.shape[3]}; resize them."
        )


torch.fx.wrap("check_image")


def _cfg(url: str = "", **kwargs) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, MIN_SIZE, MIN_SIZE),
        "pool_size": None,  # fastai would pool forward_features by itself, as maps of (batch, C, H, W)
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        **kwargs,
    }


WEIGHTS = Path(__file__).with_name("weights")  # that come with the package
# WordNet's id of each class of Tiny-ImageNet, in the order of the classifier, and the synonyms that it stands for
TINY_IMAGENET = json.loads((WEIGHTS / "tiny_in200.json").read_text(encoding="utf-8"))


def _tiny_in200(model: str) -> dict[str, Any]:
    """The config of a model's weights for Tiny-ImageNet, which come with the package."""
    return _cfg(
        file=str(WEIGHTS / f"{model}.tiny_in200.safetensors"),
        num_classes=len(TINY_IMAGENET),
        label_names=tuple(TINY_IMAGENET),
        label_descriptions=TINY_IMAGENET,
        input_size=(3, 128, 128),
        crop_pct=1.0,
        license="other",
        description="Trained on Tiny-ImageNet-200 at 128 x 128 pixels, for research only.",
        notes=("ImageNet's terms allow non-commercial research and education only.",),
        paper_ids="arXiv:2403.19888",
    )


default_cfgs = generate_default_cfgs(
    {
        "vim2_nano.tiny_in200": _tiny_in200("vim2_nano"),
        "vim2_tiny": _cfg(),
        "vim2_small": _cfg(),
        "vim2_base": _cfg(),
        "vim2_tiny_d1": _cfg(),
        "vim2_small_d1": _cfg(),
        "vim2_base_d1": _cfg(),
        "vim2_nano_token_d1.tiny_in200": _tiny_in200("vim2_nano_token_d1"),
        "vim2_tiny_token_d1": _cfg(),
        "vim2_tiny_vmamba": _cfg(),
        "vim2_small_vmamba": _cfg(),
        "vim2_base_vmamba": _cfg(),
        "test_vim2": _cfg(input_size=(3, 96, 96)),
    }
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The weights in a checkpoint of `vim2 train` or of timm's train.py, or of a bare state dict.

    Raises:
        ValueError: Names that the model lacks or does not have. timm overlooks these where it adapts the classifier.
    """
    weights = state_dict.get("state_dict", state_dict)
    if wrong := sorted(n for n in weights.keys() ^ model.state_dict().keys() if not n.startswith("head.fc.")):
        raise ValueError(
            f"The pretrained weights are of another architecture: {len(wrong)} names differ (such as {wrong[0]})."
        )
    # timm would round the stem's again where it sums them for grey images
    return {name: value.float() if value.dtype == torch.float16 else value for name, value in weights.items()}


def _create_vim2(variant: str, pretrained: bool, output_stride: int = 32, **kwargs) -> ViM2:
    """timm's builder. Decoders with dilation ask for another `output_stride`, which patch merging cannot give."""
    if output_stride != 32:
        raise ValueError(f"output_stride must be 32, got {output_stride}: ViM2 has no dilated form.")
    return build_model_with_cfg(
        ViM2,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True),
        **kwargs,
    )


@register_model
def vim2_nano(pretrained: bool = False, **kwargs) -> ViM2:
    """Ours, for CPUs and small data."""
    model_args = dict(depths=(1, 1, 2, 1), dims=(48, 96, 192, 320))
    return _create_vim2("vim2_nano", pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_tiny(pretrained: bool = False, **kwargs) -> ViM2:
    """The paper's ViM2-T."""
    model_args = dict(depths=(1, 1, 3, 1), dims=(96, 192, 384, 768))
    return _create_vim2("vim2_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_small(pretrained: bool = False, **kwargs) -> ViM2:
    """The paper's ViM2-S."""
    model_args = dict(depths=(1, 1, 9, 1), dims=(96, 192, 384, 768))
    return _create_vim2("vim2_small", pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_base(pretrained: bool = False, **kwargs) -> ViM2:
    """The paper's ViM2-B."""
    model_args = dict(depths=(1, 1, 9, 1), dims=(128, 256, 512, 1024))
    return _create_vim2("vim2_base", pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_tiny_d1(pretrained: bool = False, **kwargs) -> ViM2:
    """ViM2-T with one state a channel: as accurate where compared, and 1.7 times as fast (docs/channel_mixer.md)."""
    model_args = dict(depths=(1, 1, 3, 1), dims=(96, 192, 384, 768), d_state=1)
    return _create_vim2("vim2_tiny_d1", pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_small_d1(pretrained: bool = False, **kwargs) -> ViM2:
    """ViM2-S with one state a channel."""
    model_args = dict(depths=(1, 1, 9, 1), dims=(96, 192, 384, 768), d_state=1)
    return _create_vim2("vim2_small_d1", pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_base_d1(pretrained: bool = False, **kwargs) -> ViM2:
    """ViM2-B with one state a channel."""
    model_args = dict(depths=(1, 1, 9, 1), dims=(128, 256, 512, 1024), d_state=1)
    return _create_vim2("vim2_base_d1", pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_nano_token_d1(pretrained: bool = False, **kwargs) -> ViM2:
    """Token mixers alone, with one state a channel: better than `vim2_nano` in equal time (docs/channel_mixer.md)."""
    model_args = dict(depths=(1, 1, 2, 1), dims=(48, 96, 192, 320), d_state=1, channel_mixer="none")
    return _create_vim2("vim2_nano_token_d1", pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_tiny_token_d1(pretrained: bool = False, **kwargs) -> ViM2:
    """Token mixers alone, with one state a channel, of ViM2-T's depths and widths."""
    model_args = dict(depths=(1, 1, 3, 1), dims=(96, 192, 384, 768), d_state=1, channel_mixer="none")
    return _create_vim2("vim2_tiny_token_d1", pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_tiny_vmamba(pretrained: bool = False, **kwargs) -> ViM2:
    """ViM2-T with the token mixers of vanilla VMamba-T, for its weights (`vim2 convert`)."""
    model_args = dict(depths=(1, 1, 3, 1), dims=(96, 192, 384, 768), token_mixers=(2, 2, 3, 2))
    return _create_vim2("vim2_tiny_vmamba", pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_small_vmamba(pretrained: bool = False, **kwargs) -> ViM2:
    """ViM2-S with the token mixers of vanilla VMamba-S, for its weights (`vim2 convert`)."""
    model_args = dict(depths=(1, 1, 9, 1), dims=(96, 192, 384, 768), token_mixers=(2, 2, 3, 2))
    return _create_vim2("vim2_small_vmamba", pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_base_vmamba(pretrained: bool = False, **kwargs) -> ViM2:
    """ViM2-B with the token mixers of vanilla VMamba-B, for its weights (`vim2 convert`)."""
    model_args = dict(depths=(1, 1, 9, 1), dims=(128, 256, 512, 1024), token_mixers=(2, 2, 3, 2))
    return _create_vim2("vim2_base_vmamba", pretrained, **dict(model_args, **kwargs))


@register_model
def test_vim2(pretrained: bool = False, **kwargs) -> ViM2:
    """For tests."""
    model_args = dict(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), d_state=4, channel_patch=8)
    return _create_vim2("test_vim2", pretrained, **dict(model_args, **kwargs))
