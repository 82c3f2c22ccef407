"""ViM2 as a timm model: the contract that timm's own tests/test_models.py checks, and what the paper says of it."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
import torch._dynamo.testing
from devices import needs_gpu
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from timm.layers import DropPath
from timm.models import FeatureInfo
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from vim2 import ViM2
from vim2.mixers import S6, SelectiveChannelMixer, SelectiveTokenMixer
from vim2.vim2 import MIN_SIZE, multiply_patches


def images(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter away from its initial value, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def parameters(name, **kwargs):
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, **kwargs).parameters()) / 1e6


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomise(timm.create_model("test_vim2", num_classes=10)).eval()


@pytest.fixture
def small_model():
    """Two stages, one of them with two blocks: all kinds of layers, for what takes its time with each layer."""
    torch.manual_seed(0)
    sizes = dict(depths=(2, 1), dims=(16, 24), channel_expand=(2.0, 1.0))
    return randomise(timm.create_model("test_vim2", num_classes=10, **sizes)).eval()


def test_all_models_are_listed():
    assert timm.list_models(module="vim2") == [
        "test_vim2",
        "vim2_base",
        "vim2_base_d1",
        "vim2_base_vmamba",
        "vim2_nano",
        "vim2_nano_token_d1",
        "vim2_small",
        "vim2_small_d1",
        "vim2_small_vmamba",
        "vim2_tiny",
        "vim2_tiny_d1",
        "vim2_tiny_token_d1",
        "vim2_tiny_vmamba",
    ]


@pytest.mark.parametrize("name, expected", [("vim2_tiny", 24.0), ("vim2_small", 43.7), ("vim2_base", 75.6)])
def test_parameters_of_the_papers_table(name, expected):
    assert parameters(name) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_with_one_state_a_channel_it_is_the_same_network(size):
    with torch.device("meta"):
        model, paper = timm.create_model(f"vim2_{size}_d1"), timm.create_model(f"vim2_{size}")
        assert all(m.d_state == 1 for m in model.modules() if isinstance(m, S6))
        given = timm.create_model(f"vim2_{size}_d1", d_state=16)
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (paper, given)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("size", ["nano", "tiny"])
def test_token_models_lack_channel_mixers_alone(size):
    with torch.device("meta"):
        model = timm.create_model(f"vim2_{size}_token_d1")
        whole = timm.create_model(f"vim2_{size}", d_state=1, num_classes=1000)
    token, whole = (
        [[p.shape for p in m.parameters()] for m in net.modules() if isinstance(m, SelectiveTokenMixer)]
        for net in (model, whole)
    )
    assert token and token == whole
    assert not any(isinstance(m, SelectiveChannelMixer) for m in model.modules())
    assert all(m.d_state == 1 for m in model.modules() if isinstance(m, S6))


@pytest.mark.parametrize("depth, expected", [(3, 22.89), (9, 44.42)])
def test_without_channel_mixers_it_has_vmambas_parameters(depth, expected):
    name = "vim2_tiny" if depth == 3 else "vim2_small"
    count = parameters(name, token_mixers=(2, 2, 3, 2), channel_mixer="none")
    assert count == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("channel_mixer", ["s6", "mlp", "none"])
def test_at_initialisation_it_is_a_pre_norm_residual_network(channel_mixer):
    torch.manual_seed(0)
    model = timm.create_model("test_vim2", channel_mixer=channel_mixer).double().eval()
    x = images(2, 3, 64, 48, dtype=torch.float64)
    y = model.patch_embed(x)
    for stage in model.stages:
        y = stage.downsample(y)
        for block in stage.blocks:
            for layer in block.layers:
                y = y + layer.mixer(layer.norm(y))
    torch.testing.assert_close(model.forward_features(x), model.norm(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("patch", [(4, 4), (2, 3)])
def test_the_stem_is_a_convolution_where_patches_are_multiplied_too(patch):
    x = images(2, 3, 9, 14).requires_grad_()
    conv = nn.Conv2d(3, 5, patch, patch)
    inputs = (x, conv.weight, conv.bias)
    y, expected = multiply_patches(*inputs), conv(x).permute(0, 2, 3, 1)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad((t * images(*t.shape)).sum(), inputs) for t in (y, expected)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 16, 4, stride=2),
        nn.Conv2d(3, 16, 4, stride=4, padding=1),
        nn.Conv2d(3, 16, 3, padding="same"),
        nn.Conv2d(3, 16, 4, stride=4, dilation=2),
        nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 16, 2, stride=2)),
    ],
)
def test_a_stem_with_another_convolution_calls_it(conv):
    stem = timm.create_model("test_vim2").patch_embed
    stem.proj = conv
    x = images(2, 3, 32, 40)
    torch.testing.assert_close(stem(x), stem.norm(stem.proj(x).permute(0, 2, 3, 1)))


def test_autocast_leaves_patches_in_float64_as_it_does_convolutions():
    x, conv = images(2, 3, 8, 12, dtype=torch.float64), nn.Conv2d(3, 5, 4, 4).double()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(multiply_patches(x, conv.weight, conv.bias), conv(x).permute(0, 2, 3, 1))


def test_patches_are_multiplied_in_programs_with_images_of_any_size(monkeypatch):
    monkeypatch.setattr("vim2.vim2.project_patches", multiply_patches)
    stem = timm.create_model("test_vim2").patch_embed
    sizes = {axis: torch.export.Dim(name, min=MIN_SIZE, max=512) for axis, name in ((2, "height"), (3, "width"))}
    program = torch.export.export(stem, (images(2, 3, 64, 65),), dynamic_shapes=(sizes,)).module()
    for size in ((64, 96), (67, 70)):
        x = images(2, 3, *size)
        torch.testing.assert_close(program(x), stem(x))


@needs_gpu
def test_the_stem_on_a_gpu_takes_images_of_any_size():
    stem = timm.create_model("test_vim2").cuda().patch_embed
    for size in ((32, 36), (33, 35)):
        x = images(2, 3, *size).cuda()
        torch.testing.assert_close(stem(x), stem.norm(stem.proj(x).permute(0, 2, 3, 1)), rtol=1e-2, atol=1e-2)


def test_weighted_averaging_stays_within_a_stage(model):
    x = images(1, 3, 64, 64)
    y = model.patch_embed(x)
    for stage in model.stages:
        features = [stage.downsample(y)]
        for block in stage.blocks:
            features += block(*features)
        y = sum(w * f for w, f in zip(stage.average.weight, features))
    torch.testing.assert_close(model.forward_features(x), model.norm(y))


def test_constructor_covers_what_the_paper_varies():
    model = ViM2(
        depths=(1, 2, 1),
        dims=(8, 16, 32),
        token_mixers=(1, 2, 3),
        d_state=2,
        token_expand=1.5,
        channel_expand=(1.0, 2.0, 1.0),
        channel_patch=1,
        num_classes=5,
    )
    assert model(images(1, 3, 32, 32)).shape == (1, 5)
    assert [len(b.layers) for s in model.stages for b in s.blocks] == [2, 3, 3, 4]
    assert model.stages[1].blocks[0].layers[2].mixer.in_proj.out_features == 2 * 32
    assert model.stages[0].blocks[0].layers[0].mixer.in_proj.out_features == 2 * 12


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 97), (32, 200)], ids=str)
def test_any_size(model, size):
    assert model(images(2, 3, *size)).isfinite().all()


def test_batch_does_not_matter(model):
    x = images(3, 3, 64, 64)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 1, 64, 64), r"\(batch, 3, H, W\).*in_chans"),
        ((3, 64, 64), r"\(batch, 3, H, W\)"),
        ((1, 3, 31, 64), "at least 32 x 32, got 31 x 64"),
        ((1, 3, 64, 0), "at least 32 x 32, got 64 x 0"),
        ((0, 3, 64, 64), "The batch holds no image"),
    ],
)
def test_bad_images(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))


@pytest.mark.parametrize(
    "change",
    [
        dict(drop_path_rate=2),
        dict(drop_path_rate=float("nan")),
        dict(drop_rate=1.0),
        dict(patch_size=0),
        dict(depths=(0, 0, 0, 0)),
        dict(depths=()),
        dict(depths=3),
        dict(dims=(0, 1, 2, 3)),
        dict(dims=16),
        dict(drop_path_rate="0.1"),
        dict(num_classes="3"),
        dict(d_state="16"),
        dict(channel_patch=1.5),
        dict(token_expand="2"),
        dict(channel_expand=float("nan")),
        dict(global_pool="token"),
        dict(token_mixers=0),
        dict(num_classes=-1),
        dict(in_chans=0),
        dict(d_state=0),
        dict(token_expand=0.0),
        dict(channel_expand=-1.0),
        dict(channel_patch=0),
        dict(channel_mixer="mlp", mlp_ratio=0),
    ],
    ids=str,
)
def test_numbers_out_of_their_range(change):
    name = list(change)[-1].replace("_expand", "").replace("mlp_ratio", "ratio")
    with pytest.raises(ValueError, match=f"{name}.* must|ratio"):
        timm.create_model("test_vim2", **change)


@pytest.mark.parametrize("arguments", [(-1,), ("3",), (2.5,), (3, "token")], ids=str)
def test_a_classifier_that_cannot_be_leaves_the_old_one(arguments):
    model = timm.create_model("test_vim2", num_classes=5)
    with pytest.raises(ValueError, match=r"num_classes must|global_pool must"):
        model.reset_classifier(*arguments)
    assert model.num_classes == 5 and model(images(2, 3, 64, 64)).shape == (2, 5)


def test_bad_arguments():
    with pytest.raises(RuntimeError, match="vim2_huge"):
        timm.create_model("vim2_huge")
    with pytest.raises(ValueError, match="channel_mixer must be one of"):
        timm.create_model("test_vim2", channel_mixer="conv")
    for name, value in dict(dims=(8, 16), depths=(1, 1), token_mixers=(2, 2), channel_expand=(2, 2, 2)).items():
        with pytest.raises(ValueError, match=r"must have a value a stage"):
            timm.create_model("test_vim2", **{name: value})
    with pytest.raises(TypeError, match="num_heads"):
        timm.create_model("test_vim2", num_heads=4)


def test_every_parameter_gets_a_gradient():
    model = timm.create_model("test_vim2", num_classes=42).train()
    model(images(2, 3, 64, 64)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_default_cfg_names_the_right_layers(model):
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (3, 96, 96)
    state_dict = model.state_dict()
    assert cfg["first_conv"] + ".weight" in state_dict and cfg["classifier"] + ".weight" in state_dict
    assert model.forward_features(images(1, *cfg["input_size"])).shape == (1, 3, 3, model.num_features)
    assert cfg["pool_size"] is None  # else fastai would take these channels-last maps for (batch, C, H, W)


def test_head(model):
    x = images(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 2, 2, 48)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(pre_logits, features.mean((1, 2)))
    torch.testing.assert_close(model(x), model.get_classifier()(pre_logits))


def test_reset_classifier(model):
    x = images(2, 3, 64, 64)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model.num_classes == 0 and model(x).shape == (2, 48)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 2, 2, 48)
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3)
    assert timm.create_model("test_vim2", num_classes=0, global_pool="")(x).shape == (2, 2, 2, 48)


@pytest.mark.parametrize("feature_cls", [None, "getter", "dict"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (0,), (-1,)])
def test_features_only(feature_cls, out_indices):
    kwargs = {} if feature_cls is None else dict(feature_cls=feature_cls)
    torch.manual_seed(0)
    model = timm.create_model("test_vim2", features_only=True, out_indices=out_indices, **kwargs).eval()
    features = model(images(1, 3, 64, 96))
    features = list(features.values()) if feature_cls == "dict" else features
    assert model.feature_info.channels() == [(16, 24, 32, 48)[i] for i in out_indices]
    assert model.feature_info.reduction() == [(4, 8, 16, 32)[i] for i in out_indices]
    channels_last = feature_cls == "dict"  # by default, NCHW as timm's getter has it
    for feature, channels, reduction in zip(
        features, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        size = (64 // reduction, 96 // reduction)
        assert feature.shape == ((1, *size, channels) if channels_last else (1, channels, *size))


@pytest.mark.parametrize("indices", [(), []])
def test_no_stage_is_asked_for(model, indices):
    with pytest.raises(ValueError, match="Name at least one stage"):
        timm.create_model("test_vim2", features_only=True, out_indices=indices)
    with pytest.raises(ValueError, match="Name at least one stage"):
        model.forward_intermediates(torch.zeros(1, 3, 64, 64), indices=indices)


def test_forward_intermediates(model):
    x = images(1, 3, 64, 96)
    channels = FeatureInfo(model.feature_info, (0, 1, 2, 3)).channels()
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [m.shape for m in maps] == [(1, c, 16 // 2**i, 24 // 2**i) for i, c in enumerate(channels)]
    last_two = model.forward_intermediates(x, indices=2, output_fmt="NHWC", norm=True, intermediates_only=True)
    torch.testing.assert_close(last_two[0], maps[2].permute(0, 2, 3, 1))
    torch.testing.assert_close(last_two[1], final)
    early, maps = model.forward_intermediates(x, indices=[1], stop_early=True)
    torch.testing.assert_close(early.permute(0, 3, 1, 2), maps[0])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("indices", [1, [0, 2], [1]], ids=str)
def test_prune_intermediate_layers(model, indices):
    x = images(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    kept = model.prune_intermediate_layers(indices)
    assert len(model.stages) == max(kept) + 1
    for a, e in zip(model.forward_intermediates(x, indices=kept, intermediates_only=True), expected, strict=True):
        torch.testing.assert_close(a, e)
    assert model(x).shape[-1] == model.num_features


def test_grad_checkpointing_changes_nothing(model):
    x = images(2, 3, 64, 64)
    model.train()
    plain = torch.autograd.grad(model(x).square().mean(), model.parameters())
    model.set_grad_checkpointing()
    checkpointed = torch.autograd.grad(model(x).square().mean(), model.parameters())
    for a, b in zip(checkpointed, plain):
        torch.testing.assert_close(a, b)


def test_drop_path_rises_linearly():
    model = timm.create_model("test_vim2", drop_path_rate=0.28)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.02 * i for i in range(1, 15)])
    x = images(2, 3, 64, 64)
    assert not torch.equal(model.train()(x), model(x))
    torch.testing.assert_close(model.eval()(x), model(x))


def test_no_weight_decay(model):
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            decays = name.endswith(("proj.weight", "fc.weight", "conv.weight", "reduction.weight", "proj_weight"))
            assert (group["weight_decay"] > 0) == decays, name


def test_layer_decay_covers_every_parameter(model):
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    by_name = {n: scales[id(p)] for n, p in model.named_parameters()}
    # stem, 1 + 1 + 2 + 1 blocks, head
    assert by_name["patch_embed.proj.weight"] == pytest.approx(0.5**6)
    assert by_name["stages.0.average.weight"] == by_name["stages.0.blocks.0.layers.0.norm.weight"] == 0.5**5
    assert by_name["stages.2.blocks.0.layers.0.norm.weight"] == 0.5**3
    assert by_name["stages.2.average.weight"] == by_name["stages.2.blocks.1.layers.0.norm.weight"] == 0.5**2
    assert by_name["head.fc.weight"] == 1.0


def test_autocast_leaves_float64_as_it_is(model):
    """As it does PyTorch's own layers."""
    model.double()
    x = images(2, 3, 64, 64, dtype=torch.float64)
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_close_and_finite(model, dtype):
    x = images(2, 3, 64, 64)
    expected = model(x)
    model.train()
    with torch.autocast("cpu", dtype):
        output = model(x)
        loss = output.float().square().mean()
    assert ((output - expected).norm() / expected.norm()) < 0.02
    for gradient in torch.autograd.grad(loss, model.parameters()):
        assert gradient.isfinite().all()


def test_half_precision_model(model):
    x = images(2, 3, 64, 64)
    expected = model(x)
    output = model.bfloat16()(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert ((output - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("train", [False, True])
def test_half_precision_model_whose_norms_are_in_float32(model, train):
    """As some train: it computes in the model's precision then, as timm's do."""
    x = images(2, 3, 64, 64).bfloat16()
    model.bfloat16().train(train)
    expected = model(x)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    output = model(x)
    assert output.dtype == torch.bfloat16
    assert ((output - expected).norm() / expected.norm()) < 0.02
    output.sum().backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all()


def test_fx_tracing(model):
    x = images(2, 3, 64, 64)
    _, nodes = get_graph_node_names(model)
    traced = create_feature_extractor(model, [nodes[-1]]).eval()
    torch.testing.assert_close(traced(x)[nodes[-1]], model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images(1, 3, 96, 64)), model(images(1, 3, 96, 64)))


def test_compiles_without_graph_breaks(small_model):
    x = images(2, 3, 64, 64)
    compiled = torch.compile(small_model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), small_model(x))


@torch.no_grad()
def test_compiles_once_more_for_all_other_sizes():
    model = timm.create_model(
        "test_vim2", depths=(1, 1), dims=(8, 16), token_mixers=1, d_state=1, channel_expand=1.0
    ).eval()
    model(images(1, 3, 64, 64))  # Numba starts its threads
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for height, width in ((64, 64), (256, 320), (97, 131), (40, 200)):
        compiled(images(1, 3, height, width))
    assert counter.frame_count == 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_traces(model, grad):
    x = images(2, 3, 64, 64)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (x,))
        torch.testing.assert_close(traced(x), model(x))
    for height, width in ((96, 64), (128, 32), (32, 128)):  # of more pixels, and of as many
        with pytest.raises(RuntimeError, match="traced at one image size works at that size only"):
            traced(images(2, 3, height, width))
    if grad:
        parameters = [model.stages[0].blocks[0].layers[0].mixer.s6.x_proj_weight, model.patch_embed.proj.weight]
        for a, b in zip(*(torch.autograd.grad(f(x).square().sum(), parameters) for f in (traced, model))):
            torch.testing.assert_close(a, b)


def test_exports(small_model):
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(torch.export.export(small_model, (x,)).module()(x), small_model(x))


def test_exports_with_dynamic_sizes(small_model):
    batch, height, width = (torch.export.Dim(n, min=m, max=512) for n, m in (("b", 1), ("h", 36), ("w", 36)))
    exported = torch.export.export(
        small_model, (images(2, 3, 64, 96),), dynamic_shapes=({0: batch, 2: height, 3: width},)
    ).module()
    for shape in ((1, 3, 64, 64), (3, 3, 97, 131)):
        torch.testing.assert_close(exported(images(*shape)), small_model(images(*shape)))


@needs_gpu  # where sums could come in any order
@pytest.mark.parametrize("amp", [False, True])
def test_two_runs_on_a_gpu_give_the_same_bits(amp, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model = timm.create_model("vim2_nano", num_classes=10).cuda()
    x = images(4, 3, 96, 128).cuda()
    runs = []
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            y = model(x)
        runs.append([y, *torch.autograd.grad(y.float().square().mean(), list(model.parameters()))])
    for a, b in zip(*runs):
        assert torch.equal(a, b)


def test_meta_device_and_dtype():
    model = timm.create_model("test_vim2", device="meta")
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(images(1, 3, 64, 64)).isfinite().all()
    assert timm.create_model("test_vim2", dtype=torch.bfloat16).head.fc.weight.dtype == torch.bfloat16


def test_loading_adapts_channels_and_classes(model, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    overlay = dict(file=str(path), num_classes=10)
    same = timm.create_model("test_vim2", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10).eval()
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(same(x), model(x))
    other = timm.create_model(
        "test_vim2", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1
    ).eval()
    assert other(x[:, :1]).shape == (1, 4)
    torch.testing.assert_close(other.stages.state_dict(), model.stages.state_dict())
    torch.testing.assert_close(
        other.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True), rtol=1e-5, atol=1e-6
    )
    features = timm.create_model("test_vim2", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    torch.testing.assert_close(features.eval()(x)[-1], model.stages(model.patch_embed(x)).permute(0, 3, 1, 2))


SHIPPED = ["vim2_nano", "vim2_nano_token_d1"]


@pytest.mark.parametrize("name", SHIPPED)
class TestShippedWeights:
    def test_it_computes_what_the_file_holds(self, name):
        """In half precision; the model has them in float32."""
        model = timm.create_model(name, pretrained=True)
        cfg = model.pretrained_cfg
        assert cfg["tag"] == "tiny_in200" and model.num_classes == 200
        weights = load_file(cfg["file"])
        assert Path(cfg["file"]).stat().st_size < 12e6 and {w.dtype for w in weights.values()} == {torch.float16}
        state = model.state_dict()
        assert {v.dtype for v in state.values()} == {torch.float32} and state.keys() == weights.keys()
        assert all(torch.equal(value, weights[key].float()) for key, value in state.items())
        tagged = timm.create_model(f"{name}.tiny_in200", pretrained=True).state_dict()
        assert all(torch.equal(tagged[key], value) for key, value in state.items())

    def test_it_adapts(self, name):
        model = timm.create_model(name, pretrained=True)
        grey = timm.create_model(name, pretrained=True, num_classes=10, in_chans=1)
        assert grey.head.fc.out_features == 10
        torch.testing.assert_close(grey.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True))
        torch.testing.assert_close(grey.stages.state_dict(), model.stages.state_dict())
        features = timm.create_model(name, pretrained=True, features_only=True)
        x = images(1, 3, 64, 64)
        torch.testing.assert_close(features(x)[-1], model.forward_intermediates(x)[1][-1])

    def test_classes_are_named(self, name):
        cfg = timm.get_pretrained_cfg(name)
        names, words = cfg.label_names, cfg.label_descriptions
        assert len(names) == len(set(names)) == cfg.num_classes and list(words) == list(names) == sorted(names)
        assert words["n02099601"] == "golden retriever"
        imagenet = ImageNetInfo("imagenet-22k")
        assert all(imagenet.label_name_to_description(key) == words[key] for key in names)


def test_other_models_have_no_weights():
    assert timm.list_models("*vim2*", pretrained=True) == [f"{name}.tiny_in200" for name in SHIPPED]
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vim2_tiny"):
        timm.create_model("vim2_tiny", pretrained=True)


@pytest.mark.parametrize("adapted", [{}, dict(num_classes=4), dict(features_only=True)], ids=str)
def test_pretrained_weights_of_other_names_are_refused(model, adapted, tmp_path):
    """timm itself reads them without a word where it leaves the classifier out."""
    weights = model.state_dict()
    weights["stages.9.average.weight"] = weights.pop("stages.3.average.weight")
    torch.save(weights, tmp_path / "renamed.pth")
    overlay = dict(file=str(tmp_path / "renamed.pth"), num_classes=10)
    with pytest.raises(ValueError, match=r"another architecture: 2 names differ \(such as stages\.3\.average"):
        timm.create_model("test_vim2", pretrained=True, pretrained_cfg_overlay=overlay, **adapted)


def test_saved_for_the_hub_and_loaded_from_the_folder(model, tmp_path):
    timm.models.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    for size in ((64, 64), (96, 64)):
        x = images(1, 3, *size)
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_dilated_decoders_are_told_that_there_is_no_dilation():
    assert timm.create_model("test_vim2", features_only=True, output_stride=32).feature_info.reduction()[-1] == 32
    with pytest.raises(ValueError, match="output_stride must be 32, got 16"):
        timm.create_model("test_vim2", features_only=True, output_stride=16)


def test_pickles(model):
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))
