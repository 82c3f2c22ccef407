import copy
import functools
import io
from contextlib import ExitStack, nullcontext

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE, needs_triton
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from vim2.mixers import (
    MambaMixerBlock,
    MixerLayer,
    PatchMerging,
    SelectiveChannelMixer,
    SelectiveTokenMixer,
    WeightedAverage,
)
from vim2.ops import backend, modules, replay, selective_scan_fn
from vim2.tsm2 import TimeMixer, VariateMixer
from vim2.vim2 import ViM2Stage


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its initial value, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return module.double().eval()


def s6_on_sequence(s6, lane: int, x: torch.Tensor) -> torch.Tensor:
    """Mamba's inner part for one direction, (batch, L, E) -> (batch, L, E), written with the library's 1-D scan."""
    dt, B, C = (x @ s6.x_proj_weight[lane].T).split((s6.dt_rank, s6.d_state, s6.d_state), dim=-1)
    y = selective_scan_fn(
        x.transpose(1, 2),
        (dt @ s6.dt_proj_weight[lane].T).transpose(1, 2),
        -s6.A_log[lane].exp(),
        B.transpose(1, 2),
        C.transpose(1, 2),
        s6.D[lane],
        delta_bias=s6.dt_proj_bias[lane],
        delta_softplus=True,
    )
    return y.transpose(1, 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (4, 7)], ids=str)
def test_token_mixer_is_a_gated_cross_scan(size):
    """Against the definition with explicit transposes and flips, as VMamba's SS2D makes them."""
    mixer = randomise(SelectiveTokenMixer(8, d_state=3))
    height, width = size
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    value, gate = mixer.in_proj(x).chunk(2, dim=-1)
    value = F.silu(mixer.conv(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    rows, columns = value.flatten(1, 2), value.transpose(1, 2).flatten(1, 2)
    y = s6_on_sequence(mixer.s6, 0, rows) + s6_on_sequence(mixer.s6, 2, rows.flip(1)).flip(1)
    y = y.unflatten(1, (height, width))
    z = s6_on_sequence(mixer.s6, 1, columns) + s6_on_sequence(mixer.s6, 3, columns.flip(1)).flip(1)
    y = y + z.unflatten(1, (width, height)).transpose(1, 2)
    expected = mixer.out_proj(mixer.out_norm(y) * F.silu(gate))
    torch.testing.assert_close(mixer(x), expected)


@pytest.mark.parametrize("channel_patch", [1, 4, 16])
def test_channel_mixer_is_a_bidirectional_scan_along_each_tokens_channels(channel_patch):
    mixer = randomise(SelectiveChannelMixer(8, d_state=3, channel_patch=channel_patch))
    x = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    expected = torch.empty_like(x)
    weight = mixer.conv.weight.view(channel_patch, 2, 1, -1)
    bias = mixer.conv.bias.view(channel_patch, 2)
    for index in [(b, h, w) for b in range(2) for h in range(2) for w in range(3)]:  # token by token
        value, gate = mixer.in_proj(x[index]).chunk(2)
        steps = value.view(1, -1, channel_patch)
        y = 0
        for lane in range(2):
            sequence = steps.flip(1) if lane else steps
            causal = F.pad(sequence.transpose(1, 2), (3, 0))
            u = F.silu(F.conv1d(causal, weight[:, lane], bias[:, lane], groups=channel_patch)).transpose(1, 2)
            u = s6_on_sequence(mixer.s6, lane, u)
            y = y + (u.flip(1) if lane else u)
        expected[index] = mixer.out_proj(y.reshape(-1) * F.silu(gate))
    torch.testing.assert_close(mixer(x), expected)


def test_channel_mixer_does_not_mix_tokens():
    mixer = randomise(SelectiveChannelMixer(8, channel_patch=4))
    x = torch.randn(1, 3, 3, 8, dtype=torch.float64)
    changed = x.clone()
    changed[0, 1, 2] += 1
    difference = (mixer(changed) - mixer(x)).abs().sum(-1)[0]
    assert difference[1, 2] > 0
    difference[1, 2] = 0
    assert difference.max() == 0


def test_every_mixer_sees_every_earlier_feature():
    """Equations 14 and 15: the input of each mixer is a weighted sum of y(0) and of all mixers' outputs before it."""
    block = randomise(MambaMixerBlock(8, num_features=3, token_mixers=2, channel_patch=4))
    features = [torch.randn(1, 2, 2, 8, dtype=torch.float64) for _ in range(3)]
    outputs = block(*features)
    assert len(outputs) == 3
    for i, (layer, output) in enumerate(zip(block.layers, outputs)):
        seen = [*features, *outputs[:i]]
        average = sum(w * y for w, y in zip(layer.average.weight, seen))
        torch.testing.assert_close(output, layer.mixer(layer.norm(average)))


def test_weighted_average_starts_as_a_sum():
    features = [torch.randn(2, 3) for _ in range(4)]
    torch.testing.assert_close(WeightedAverage(4)(features), sum(features))


def test_initialisation_follows_mamba():
    s6 = SelectiveTokenMixer(32, d_state=16).s6
    torch.testing.assert_close(s6.A_log.exp(), torch.arange(1.0, 17).expand(4, 64, 16))
    steps = F.softplus(s6.dt_proj_bias)
    assert 0.001 <= steps.min() < 0.01 and 0.05 < steps.max() <= 0.1001
    assert (s6.D == 1).all()


def test_channel_patch_must_divide_the_width():
    with pytest.raises(ValueError, match="channel_patch must divide the channel mixer's width 16, got 5"):
        SelectiveChannelMixer(8, channel_patch=5)


def test_unknown_channel_mixer():
    with pytest.raises(ValueError, match="channel_mixer must be one of s6, mlp, none, got 'conv'"):
        MambaMixerBlock(8, 1, channel_mixer="conv")


def layers_of_every_kind() -> nn.ModuleList:
    """On maps (batch, H, W, 8), grids (batch, variates, patches, 8) among them; the same ones at every call."""
    torch.manual_seed(0)
    mixers = [
        SelectiveTokenMixer(8, d_state=2),
        SelectiveChannelMixer(8, d_state=2, channel_patch=4),
        TimeMixer(8, d_state=2),
        VariateMixer(8, d_state=2),
    ]
    layers = [MixerLayer(8, mixer, 1) for mixer in mixers]
    return nn.ModuleList([*map(randomise, [*layers, PatchMerging(8)])])


HELD = ("conv", "out_norm", "average", "norm")  # modules whose parameters operators read


@pytest.mark.parametrize("index", range(5))
def test_modules_that_somebody_holds_on_to_are_called(index):
    layer = layers_of_every_kind()[index]
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    inputs = x if isinstance(layer, PatchMerging) else [x]
    expected = layer(inputs)
    held = {name: module for name, module in layer.named_modules() if name.split(".")[-1] in HELD}
    assert held
    for name, module in held.items():
        seen = []
        hook = module.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        torch.testing.assert_close(layer(inputs), expected, msg=name)
        hook.remove()
        assert seen, name
        assert layer(inputs).equal(expected)


def in_place_of(conv: nn.Module, **changes) -> nn.Module:
    settings = dict(kernel_size=conv.kernel_size[0], padding=conv.padding[0], groups=conv.groups) | changes
    return type(conv)(conv.in_channels, conv.out_channels, **settings, dtype=torch.float64)


OTHERS = {
    "a larger convolution": lambda mixer: dict(conv=in_place_of(mixer.conv, kernel_size=5, padding=2)),
    "a dilated one": lambda mixer: dict(conv=in_place_of(mixer.conv, dilation=2, padding=2)),
    "one without a bias": lambda mixer: dict(conv=in_place_of(mixer.conv, bias=False)),
    "one around a torus": lambda mixer: dict(conv=in_place_of(mixer.conv, padding_mode="circular")),
    "a norm without parameters": lambda mixer: dict(out_norm=nn.LayerNorm(16, elementwise_affine=False)),
    "one of a weight alone": lambda mixer: dict(out_norm=nn.LayerNorm(16, bias=False, dtype=torch.float64)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_modules_in_their_place_are_what_is_computed(other):
    layer = layers_of_every_kind()[0]
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    before = layer([x])
    ((name, module),) = OTHERS[other](layer.mixer).items()
    setattr(layer.mixer, name, module)
    after = layer([x])
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(layer([x]), after)
    assert seen and not torch.allclose(after, before)


@pytest.mark.parametrize("index", [1, 2, 3])
def test_convolutions_along_sequences_without_a_bias_are_called(index):
    layer = layers_of_every_kind()[index]
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.mixer.conv.bias.zero_()
    expected = layer([x])
    layer.mixer.conv.register_parameter("bias", None)
    torch.testing.assert_close(layer([x]), expected)


@pytest.mark.parametrize("index", range(4))
def test_pruned_and_adapted_weights_count(index):
    layer = layers_of_every_kind()[index]
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    reference = layers_of_every_kind()[index]
    with torch.no_grad():
        reference.mixer.conv.weight.zero_()
    prune.l1_unstructured(layer.mixer.conv, "weight", amount=1.0)
    torch.testing.assert_close(layer([x]), reference([x]))
    layer([x]).sum().backward()
    assert layer.mixer.conv.weight_orig.grad is not None

    class Adapted(nn.Module):  # as LoRA wraps a layer
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.weight, self.bias = base.weight, base.bias
            self.kernel_size, self.groups = base.kernel_size, base.groups

        def forward(self, x):
            return 0 * self.base(x)

    adapted = layers_of_every_kind()[index]
    adapted.mixer.conv = Adapted(adapted.mixer.conv)
    with torch.no_grad():
        reference.mixer.conv.bias.zero_()
    torch.testing.assert_close(adapted([x]), reference([x]))


@pytest.fixture
def calls(monkeypatch):
    """The layers whose mixing was called, on Triton, and not replayed."""
    calls = []
    mix = MixerLayer._mix

    def counted(self, *features):
        calls.append(self)
        return mix(self, *features)

    monkeypatch.setattr(backend, "DEFAULT_BACKEND", "triton")
    monkeypatch.setattr(MixerLayer, "_mix", counted)
    monkeypatch.setattr(replay, "PATIENCE", 1)  # noted the second time
    return calls


def two_features(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 1, 3, 8, generator=generator).to(DEVICE) for _ in range(2)]


@needs_triton
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", [SelectiveTokenMixer, SelectiveChannelMixer])
def test_layers_are_replayed_in_inference(kind, autocast, calls):
    options = {"channel_patch": 4} if kind is SelectiveChannelMixer else {}
    layer = randomise(MixerLayer(8, kind(8, d_state=2, expand=1.0, **options), 2)).float().to(DEVICE)
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        for seed in range(3):
            y = layer(two_features(seed))
        assert len(calls) == 2 and y.equal(layer._mix(*two_features(2)))
        layer.mixer.in_proj.weight.data.mul_(0.5)
        layer.norm.weight = nn.Parameter(layer.norm.weight * 2)
        z = layer(two_features(2))
        assert len(calls) == 3 and z.equal(layer._mix(*two_features(2))) and not z.equal(y)
        if kind is SelectiveTokenMixer:
            layer.mixer.conv.padding_mode = "circular"
            assert layer(two_features(2)).equal(layer._mix(*two_features(2))) and not layer(two_features(2)).equal(z)
            layer.mixer.conv.padding = [1, 1]  # as PyTorch takes it, too
            assert layer(two_features(2)).equal(layer._mix(*two_features(2)))


@needs_triton
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", [SelectiveTokenMixer, SelectiveChannelMixer])
def test_layers_are_replayed_in_training(kind, autocast, calls):
    """Outputs and every gradient have the bits of plain calls, and chance drops the same paths."""
    options = {"channel_patch": 4} if kind is SelectiveChannelMixer else {}
    layer = randomise(MixerLayer(8, kind(8, d_state=2, expand=1.0, **options), 2, drop_path=0.5)).float().to(DEVICE)
    mix = lambda features: layer._mix(*features)  # noqa: E731

    def step(forward, seed):
        features = [f.requires_grad_() for f in two_features(seed)]
        layer.zero_grad()
        torch.manual_seed(seed)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y = forward(features)
        y.float().square().sum().backward()
        return [y.detach(), *(t.grad for t in (*features, *layer.parameters()) if t.requires_grad)]

    for seed in range(3):
        calls.clear()
        actual = step(layer, seed)
        noted = len(calls)
        assert noted == (1, 1, 0)[seed]
        for a, b in zip(actual, step(mix, seed), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    if autocast:
        return
    layer.mixer.in_proj.weight.requires_grad_(False)  # frozen: noted for itself
    for seed in range(4, 7):
        calls.clear()
        actual = step(layer, seed)
        assert bool(calls) == (seed < 6) and layer.mixer.in_proj.weight.grad is None
        assert all(map(torch.equal, actual, step(mix, seed)))


class FewOperators(nn.Module):
    """Stands for a mixer in what follows, which is about whether it is replayed."""

    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.in_proj(x))


class Listed(nn.Module):
    """A layer of one feature."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer([x])


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


def hold(stage: ViM2Stage, how: str) -> list:
    """Has somebody hold on to a module of a stage. Returns what is appended to whenever it is called."""
    seen = []
    layers = stage.blocks[0].layers
    module = {"the block": stage.blocks[0], "the average": stage.average, "a mixer": layers[1].mixer}.get(
        how, layers[1]
    )
    if how != "nothing":
        module.register_forward_hook(lambda *_: seen.append(how))
    if how == "a wrapped layer":
        layers[1] = Wrapped(module)
    elif how == "a wrapped block":
        stage.blocks[0] = Wrapped(stage.blocks[0])
    elif how == "a checkpointed layer":
        layers[1] = checkpoint_wrapper(module)
    return seen


WAYS_TO_HOLD = (
    "a layer",
    "a mixer",
    "the block",
    "the average",
    "a wrapped layer",
    "a wrapped block",
    "a checkpointed layer",
)


@needs_triton
@pytest.mark.parametrize("how", ["nothing", *WAYS_TO_HOLD])
def test_features_that_are_handed_on_have_the_gradients_that_autograd_adds_up(how, calls, monkeypatch):
    """Replayed or not, with the same bits but for products that a GPU adds unrounded; and who holds on to a module sees
    it called."""
    monkeypatch.setitem(modules.SETTINGS, FewOperators, lambda module: None)
    options = dict(token_mixers=2, channel_mixer="none", d_state=1)
    stage = ViM2Stage(8, 8, 2, False, [[0.0] * 2] * 2, **options)
    for block in stage.blocks:
        for layer in block.layers:
            layer.mixer = FewOperators()
    stage = randomise(stage).float().to(DEVICE)
    seen = hold(stage, how)

    def plain(x):
        features = (x,)
        for block in stage.blocks:
            features += block(*features)
        return stage.average(features)

    def step(forward, seed):
        x = two_features(seed)[0].requires_grad_()
        stage.zero_grad()
        forward(2 * x).square().sum().backward()
        return [t.grad for t in (x, *stage.parameters())]

    for seed in range(4):
        before = len(seen)
        calls.clear()
        actual = step(stage, seed)
        called, before = len(seen) - before, len(seen)
        if how == "a checkpointed layer":
            assert calls.count(stage.blocks[0].layers[1]._checkpoint_wrapped_module) == 2
        expected = step(plain, seed)
        assert called == len(seen) - before == (how != "nothing")
        # of the largest, since the gradient of a single number may be a sum that cancels
        rounding = 1e-6 * max(float(b.abs().max()) for b in expected) if DEVICE == "cuda" else 0
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=rounding)


@needs_triton
def test_gradients_for_what_a_hooked_layer_is_given_are_those_of_all_uses(calls, monkeypatch):
    stage = randomise(ViM2Stage(8, 8, 1, False, [[0.0] * 2], token_mixers=2, channel_mixer="none", d_state=1))
    for layer in stage.blocks[0].layers:
        layer.mixer = FewOperators()
    stage = stage.float().to(DEVICE)
    given = []
    stage.blocks[0].layers[1].register_forward_pre_hook(lambda module, inputs: given.append(inputs[0][0]))
    x = two_features(0)[0].requires_grad_()
    loss = stage(x * 1).square().sum()
    (all_uses,) = torch.autograd.grad(loss, given, retain_graph=True)
    assert torch.equal(all_uses, torch.autograd.grad(loss, x)[0])


OBSERVERS = {"profiler": torch.profiler.profile, "FlopCounterMode": functools.partial(FlopCounterMode, display=False)}


def check_checkpoint(module: nn.Module, x: torch.Tensor, observed: str, observer: str) -> None:
    """A checkpoint compares what is saved in both of its forward passes, which go different ways where one of them is
    observed."""
    expected = torch.autograd.grad(module(x).square().sum(), x)[0]
    first, second = (OBSERVERS[observer]() if observed == each else nullcontext() for each in ("forward", "backward"))
    x = x.detach().requires_grad_()
    with first:
        y = checkpoint(module, x, use_reentrant=False).square().sum()
    with second:
        y.backward()
    torch.testing.assert_close(x.grad, expected)


@needs_triton
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("observed", ["forward", "backward"])
def test_a_checkpoint_of_which_one_pass_is_observed(observed, observer, monkeypatch):
    monkeypatch.setattr(backend, "DEFAULT_BACKEND", "triton")
    options = dict(token_mixers=1, d_state=1, token_expand=1.0, channel_expand=0.5, channel_patch=4)
    stage = randomise(ViM2Stage(8, 8, 1, False, [[0.0] * 2], **options)).float().to(DEVICE)
    check_checkpoint(stage, two_features(0)[0].requires_grad_(), observed, observer)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("observed", ["forward", "backward"])
def test_a_checkpoint_of_plain_operators_of_which_one_pass_is_observed(observed, observer):
    for layer in layers_of_every_kind():
        x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
        check_checkpoint(layer if isinstance(layer, PatchMerging) else Listed(layer), x, observed, observer)


SAVING = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
}


class Recorder(ModuleTracker):
    """Adds the modules that it is told of to a set."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def _fw_pre_hook(self, module, inputs):
        self.seen.add(module)


@pytest.mark.parametrize("saving", SAVING)
@pytest.mark.parametrize("index", range(5))
def test_hooks_of_all_modules_change_outputs_where_hooks_are_set_for_what_is_saved(index, saving):
    """Only a ModuleTracker's, which change nothing, are passed over there."""
    layer = layers_of_every_kind()[index]
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    inputs = x if isinstance(layer, PatchMerging) else [x]
    held = {module for name, module in layer.named_modules() if name.split(".")[-1] in HELD}
    seen = set()

    def double(module, inputs, output):
        seen.add(module)
        return 2 * output if module in held else None

    def run(*contexts):
        seen.clear()
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            stack.callback(register_module_forward_hook(double).remove)
            return layer(inputs)

    expected = run()
    assert held <= seen
    torch.testing.assert_close(run(SAVING[saving]()), expected)
    assert held <= seen
    torch.testing.assert_close(run(SAVING[saving](), Recorder(seen)), expected)
    assert held <= seen
    for context, told in ((nullcontext(), True), (SAVING[saving](), False)):
        seen.clear()
        with context, Recorder(seen):
            layer(inputs)
        assert layer in seen and (held <= seen if told else not held & seen)


def test_a_compiler_sees_hooks_of_all_modules():
    mixer = layers_of_every_kind()[0].mixer
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    expected, seen = mixer(x), set()
    hook = register_module_forward_hook(lambda module, inputs, output: seen.add(module))
    try:
        torch.testing.assert_close(mixer(x), expected)
        assert mixer.conv in seen and mixer.out_norm in seen
        with pytest.warns(UserWarning, match="global hooks"):  # PyTorch's, that they see the compiled module, too
            torch.testing.assert_close(torch.compile(mixer, backend="eager", fullgraph=True)(x), expected)
    finally:
        hook.remove()


@needs_triton
def test_layers_are_not_replayed_where_somebody_holds_on_or_looks(calls, monkeypatch):
    monkeypatch.setitem(modules.SETTINGS, FewOperators, lambda module: None)
    layer = randomise(MixerLayer(8, FewOperators(), 2, drop_path=0.5)).float().to(DEVICE)
    features = two_features(0)

    def is_replayed() -> bool:
        before = len(calls)
        layer(features)
        return len(calls) == before

    with torch.no_grad():
        layer(features)
        expected = layer(features)
        assert is_replayed()
        for module in (layer.average, layer.norm, layer.mixer, layer.mixer.in_proj, layer.drop_path):
            seen = []
            hook = module.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
            assert not is_replayed() and seen
            hook.remove()
            assert is_replayed()
        layer.drop_path.train()
        assert [is_replayed() for _ in range(3)] == [False, False, True]
        layer.drop_path.eval()
        with FlopCounterMode(display=False):
            assert not is_replayed()
        layer.norm.eps = 0.1  # no tensor: noted anew
        assert [is_replayed() for _ in range(3)] == [False, False, True] and not layer(features).equal(expected)
        layer.norm.eps = 1e-5
        assert is_replayed()
        weight = layer.norm.weight
        del layer.norm.weight
        layer.norm.weight = weight  # as pruning puts it back: behind the bias now
        assert [is_replayed() for _ in range(3)] == [False, False, True] and layer(features).equal(expected)
        layer.mixer.compile(backend="eager")
        assert not is_replayed()
        layer.mixer._compiled_call_impl = None
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            assert other(features).equal(expected)
        layer.mixer.in_proj.forward = lambda x: x  # as offloading wraps it
        assert not is_replayed()
        del layer.mixer.in_proj.forward
        layer.mixer.in_proj = nn.Sequential(layer.mixer.in_proj)
        assert not is_replayed()
    assert not is_replayed()
    layer(features).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.fixture
def mixed(calls, monkeypatch):
    """The stages and layers that were called and not replayed: the first by `_mix`, the others by `_mix_handing_on`."""
    mixed = []
    for kind, name in ((ViM2Stage, "_mix"), (MixerLayer, "_mix_handing_on")):
        function = getattr(kind, name)

        def counted(self, *inputs, function=function):
            mixed.append(self)
            return function(self, *inputs)

        monkeypatch.setattr(kind, name, counted)
    return mixed


def small_stage(drop_path: float = 0.5) -> ViM2Stage:
    options = dict(token_mixers=1, d_state=1, token_expand=1.0, channel_expand=0.5, channel_patch=4)
    return randomise(ViM2Stage(4, 8, 1, True, [[drop_path] * 2], **options)).float().to(DEVICE)


def maps(seed: int, grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 3, 4, generator=generator, device="cpu").to(DEVICE).requires_grad_(grad)


def train(stage: ViM2Stage, forward, seed: int, grad: bool = True, autocast: bool = False) -> list[torch.Tensor | None]:
    """The output and all gradients of a step, and a random number that is drawn behind it."""
    x = maps(seed, grad)
    stage.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y = forward(x)
    if y.requires_grad:
        y.float().square().sum().backward()
    return [y.detach(), x.grad, torch.rand(1, device=DEVICE), *(p.grad for p in stage.parameters())]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b))


FROZEN = {
    "nothing": lambda name: False,
    "weights here and there": lambda name: name.endswith(("in_proj.weight", "downsample.norm.bias", "s6.D")),
    "the blocks": lambda name: name.startswith("blocks"),
    "the average and patch merging": lambda name: not name.startswith("blocks"),
    "everything": lambda name: True,
}


@needs_triton
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("grad", [True, False], ids=["", "no gradient of the map"])
def test_stages_are_replayed_in_training(frozen, grad, mixed):
    """As one node, with the bits of layers that are called one by one, and with the same paths dropped."""
    stage = small_stage().train()
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    seen = []
    stage.register_forward_hook(lambda *_: seen.append(1))  # of its own, with which it is replayed all the same
    for seed in range(3):
        mixed.clear()
        actual = train(stage, stage, seed, grad)
        assert mixed.count(stage) == (seed < 2) and len(seen) == seed + 1 and (seed < 2 or not mixed)
        assert_same(actual, train(stage, stage._mix, seed, grad))
    if grad or frozen == "nothing":
        y = stage(maps(0, grad))
        assert type(y.grad_fn).__name__ == "_ReplayedBackward"
    stage.eval()  # nothing is dropped: noted anew
    mixed.clear()
    assert_same(train(stage, stage, 3, grad), train(stage, stage._mix, 3, grad))
    assert mixed.count(stage) == 2


@needs_triton
def test_stages_are_replayed_with_a_default_device(mixed):
    stage = small_stage().train()
    torch.set_default_device(DEVICE)
    try:
        for seed in range(3):
            mixed.clear()
            actual = train(stage, stage, seed)
            assert mixed.count(stage) == (seed < 2)
            assert_same(actual, train(stage, stage._mix, seed))
    finally:
        torch.set_default_device(None)


@needs_triton
def test_parameters_that_are_computed_have_their_gradients(mixed):
    """As where a hyper-network fills a frozen model's weights in place: with such a weight nothing is noted, but what
    was noted with a leaf is replayed."""
    stage = small_stage().train()
    norm = stage.blocks[0].layers[0].norm
    source = torch.ones(8, device=DEVICE, requires_grad=True)

    def gradient(forward, seed: int):
        norm.weight = nn.Parameter(torch.empty(8, device=DEVICE), requires_grad=False)
        norm.weight.copy_(source * 2)
        assert not norm.weight.is_leaf
        torch.manual_seed(seed)
        return torch.autograd.grad(forward(maps(seed)).square().sum(), source)

    for seed in range(5):
        mixed.clear()
        actual = gradient(stage, seed)
        assert mixed.count(stage) == (seed < 3)
        assert_same(actual, gradient(stage._mix, seed))
        if seed > 1:
            norm.weight = nn.Parameter(torch.ones(8, device=DEVICE))
            train(stage, stage, seed, grad=False)


@needs_triton
def test_stages_are_replayed_under_autocast_and_in_inference(mixed):
    stage = small_stage().train()
    for seed in range(3):
        mixed.clear()
        actual = train(stage, stage, seed, autocast=True)
        assert mixed.count(stage) == (seed < 2)
        assert_same(actual, train(stage, stage._mix, seed, autocast=True))
    stage.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for seed in range(3):
                mixed.clear()
                y = stage(maps(seed))
                assert mixed.count(stage) == (seed < 2) and y.equal(stage._mix(maps(seed)))
            mixed.clear()
            assert copy.deepcopy(stage)(maps(2)).equal(y) and len(mixed) == 1


@needs_triton
@pytest.mark.parametrize(
    "how", ["the block", "a layer", "a mixer", "grad_checkpointing", "a checkpoint", "a wrapped layer"]
)
def test_of_stages_that_are_called_the_layers_are_replayed(how, mixed, calls, monkeypatch):
    """All but those that somebody holds on to, or that a checkpoint calls."""
    stage = small_stage().train()
    layers = list(stage.blocks[0].layers)
    seen = hold(stage, how) if "checkpoint" not in how else []
    stage.grad_checkpointing = how == "grad_checkpointing"
    forward = functools.partial(checkpoint, stage, use_reentrant=False) if how == "a checkpoint" else stage
    held = {"a mixer": layers[1:], "a checkpoint": layers, "grad_checkpointing": layers}.get(how, [])
    for seed in range(3):
        mixed.clear()
        calls.clear()
        actual = train(stage, forward, seed)
        called = set(map(id, [*mixed, *calls]))
        assert id(stage) in called and bool(seen) == ("checkpoint" not in how)
        assert [id(layer) in called for layer in layers] == [seed < 2 or layer in held for layer in layers]
        with monkeypatch.context() as patch:
            patch.setattr(modules, "_is_replayable", lambda inputs: False)
            expected = train(stage, stage, seed)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
