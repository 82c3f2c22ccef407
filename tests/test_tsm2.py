import pytest
import torch
from devices import DEVICE, needs_triton
from torch import nn

import vim2
from vim2.ops import backend, selective_scan_fn
from vim2.tsm2 import TSM2, TimeMixer, TSM2Config, VariateMixer, cut_patches, instance_normalise

SMALL = dict(lookback=32, horizon=6, patch=8, stride=4, d_model=8, d_state=3, dropout=0.0)


def make(**changes) -> TSM2:
    """A small TSM2 in float64 with every parameter away from its initial value."""
    torch.manual_seed(0)
    model = TSM2(TSM2Config(**{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def history(batch: int = 2, variates: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 32, variates, generator=generator, dtype=torch.float64) * 3 + 7


def scan(s6, lane: int, x: torch.Tensor) -> torch.Tensor:
    """Mamba's inner part for one direction, (batch, L, E) -> (batch, L, E)."""
    dt, B, C = (x @ s6.x_proj_weight[lane].T).split((s6.dt_rank, s6.d_state, s6.d_state), dim=-1)
    delta = (dt @ s6.dt_proj_weight[lane].T).transpose(1, 2)
    A, D, bias = -s6.A_log[lane].exp(), s6.D[lane], s6.dt_proj_bias[lane]
    B, C = B.transpose(1, 2), C.transpose(1, 2)
    return selective_scan_fn(x.transpose(1, 2), delta, A, B, C, D, None, bias, True).transpose(1, 2)


def causal_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(batch, L, E) with weight (E, w), step by step."""
    taps, y = weight.shape[1], torch.zeros_like(x)
    for t in range(x.shape[1]):
        for k in range(taps):
            if t - k >= 0:
                y[:, t] += x[:, t - k] * weight[:, taps - 1 - k]
    return nn.functional.silu(y + bias)


def test_time_mixer_is_a_gated_causal_scan_of_every_variate():
    torch.manual_seed(0)
    mixer = TimeMixer(8, d_state=3).double()
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    expected = torch.empty_like(x)
    for m in range(3):  # variate by variate
        value, gate = mixer.in_proj(x[:, m]).chunk(2, dim=-1)
        y = scan(mixer.s6, 0, causal_conv(value, mixer.conv.weight.squeeze(1), mixer.conv.bias))
        expected[:, m] = mixer.out_proj(y * nn.functional.silu(gate))
    torch.testing.assert_close(mixer(x), expected)


def test_variate_mixer_is_a_gated_scan_along_the_variates_both_ways():
    torch.manual_seed(0)
    mixer = VariateMixer(8, d_state=3).double()
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    expected = torch.empty_like(x)
    weight, bias = mixer.conv.weight.view(16, 2, -1), mixer.conv.bias.view(16, 2)
    for t in range(3):  # patch by patch
        value, gate = mixer.in_proj(x[:, :, t]).chunk(2, dim=-1)
        forward = scan(mixer.s6, 0, causal_conv(value, weight[:, 0], bias[:, 0]))
        backward = scan(mixer.s6, 1, causal_conv(value.flip(1), weight[:, 1], bias[:, 1])).flip(1)
        expected[:, :, t] = mixer.out_proj((forward + backward) * nn.functional.silu(gate))
    torch.testing.assert_close(mixer(x), expected)


@pytest.mark.parametrize("norm", ["layer", "2d"])
def test_no_patch_sees_a_later_one(norm):
    """Of the grid that the mixers make, whatever depends on a later patch would change with it."""
    model = make(depth=2, norm=norm, instance_norm="none")
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64)
    before = model._mix(x)
    changed = x.clone()
    changed[:, :, 6:] += 1
    after = model._mix(changed)
    torch.testing.assert_close(after[:, :, :6], before[:, :, :6], rtol=0, atol=0)
    assert (after[:, :, 6:] - before[:, :, 6:]).abs().amin() > 0


def test_every_variate_sees_every_other():
    model = make()
    x = history().requires_grad_()
    for m in range(5):
        (grad,) = torch.autograd.grad(model(x)[:, :, m].sum(), x)
        assert (grad.abs().amax(dim=(0, 1)) > 0).all()


def test_without_a_variate_mixer_variates_are_apart():
    model = make(variate_mixer="none")
    x = history().requires_grad_()
    (grad,) = torch.autograd.grad(model(x)[:, :, 2].sum(), x)
    assert grad.abs().amax(dim=(0, 1)).nonzero().flatten().tolist() == [2]


def test_averaging_starts_as_a_residual_stream_and_is_unconstrained():
    model = TSM2(TSM2Config(**SMALL, depth=2))
    assert len(model.layers) == 4
    for layer in model.layers:
        assert (layer.average.weight == 1).all()
    x = torch.randn(2, 3, 9, 8)
    stream = x
    for layer in model.layers:
        stream = stream + layer.mixer(layer.norm(stream))
    torch.testing.assert_close(model._mix(x), stream, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"norm": "2d"}, {"time_mixer": "linear"}, {"variate_mixer": "mlp"}], ids=str)
def test_shapes_and_gradients(options):
    model = TSM2(TSM2Config(**SMALL, quantiles=(0.1, 0.5, 0.9), **options))
    y = model(history().float())
    assert y.shape == (2, 6, 5, 3) and y.dtype == torch.float32
    nn.init.normal_(model.head.weight)
    model(history().float()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().amax() > 0 for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_quantiles_cannot_cross(training):
    model = TSM2(TSM2Config(**SMALL, quantiles=(0.1, 0.3, 0.5, 0.9))).train(training)
    nn.init.normal_(model.head.weight)
    assert (model(history().float()).diff(dim=-1) >= 0).all()


def test_windows_of_one_patch_or_one_variate():
    assert make(patch=32, stride=32)(history(1, 1)).shape == (1, 6, 1)
    assert make(lookback=32, patch=1, stride=1)(history(1, 2)).shape == (1, 6, 2)


def test_auxiliary_features_reach_the_forecast_and_may_be_shared():
    model = make(static_features=2, future_features=3)
    x, static, future = history(), torch.randn(5, 2).double(), torch.randn(2, 6, 3).double()
    y = model(x, static, future)
    assert y.shape == (2, 6, 5)
    each = future.unsqueeze(2).expand(-1, -1, 5, -1)
    torch.testing.assert_close(model(x, static.expand(2, -1, -1), each), y)
    assert (model(x, static + 1, future) - y).abs().amin() > 0
    assert (model(x, static, future + torch.randn_like(future)) - y).abs().amin() > 0


def test_future_features_of_lookback_and_horizon():
    model = make(future_features=1, future_length=38)
    assert model(history(), future=torch.randn(2, 38, 5, 1).double()).shape == (2, 6, 5)


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_instance_normalisation_is_reversed(kind):
    """Level and scale of a window pass through to its forecast."""
    model, x = make(instance_norm=kind), history()
    torch.testing.assert_close(model(x * 5 - 100), model(x) * 5 - 100, rtol=1e-4, atol=1e-3)
    normal, center, scale = instance_normalise(x, kind)
    torch.testing.assert_close(normal * scale + center, x)


def test_constant_windows_give_finite_forecasts():
    x = torch.full((2, 32, 5), 3.0, dtype=torch.float64, requires_grad=True)
    y = make()(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_patches_cover_the_window_and_repeat_its_end():
    cut = cut_patches(torch.arange(10.0), 4, 2)
    assert cut.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9], [8, 9, 9, 9]]
    assert TSM2(TSM2Config()).tokens == 64  # patch 16 and stride 8 on 512 steps


def test_autocast_stays_near_float32():
    model, x = make(depth=2).float(), history().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, model(x), rtol=0.05, atol=0.3)


def test_paper_preset():
    config = TSM2Config.paper(horizon=192)
    assert (config.norm, config.instance_norm, config.horizon) == ("2d", "none", 192)
    assert vim2.TSM2Config(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 64}, "patch must not be longer"),
        ({"stride": 9}, "stride must not exceed"),
        ({"d_model": 0}, "d_model must be at least 1"),
        ({"norm": "batch"}, "norm must be one of layer, 2d"),
        ({"instance_norm": "max"}, "instance_norm must be one of"),
        ({"variate_mixer": "attention"}, "variate_mixer must be one of"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"quantiles": (0.5, 0.1)}, "ascending"),
        ({"quantiles": (0.0,)}, "between 0 and 1"),
        ({"static_features": -1}, "not be negative"),
        ({"expand": 0.01}, "expand must leave"),
        ({"expand": 1e30}, "expand must leave .* below 2\\^31, got 1e\\+30"),
    ],
    ids=str,
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        TSM2Config(**{**SMALL, **changes})


def test_bad_inputs():
    model = make()
    with pytest.raises(ValueError, match=r"x must be \(batch, 32, variates\)"):
        model(torch.zeros(2, 31, 5))
    with pytest.raises(ValueError, match="takes no static"):
        model(history(), static=torch.zeros(5, 2))
    model = make(static_features=2, future_features=3)
    with pytest.raises(ValueError, match="static is missing"):
        model(history(), future=torch.zeros(2, 6, 3))
    with pytest.raises(ValueError, match="future is missing"):
        model(history(), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="static must be"):
        model(history(), torch.zeros(4, 2), torch.zeros(2, 6, 3))
    with pytest.raises(ValueError, match="future must be"):
        model(history(), torch.zeros(5, 2), torch.zeros(2, 7, 3))


@needs_triton
@pytest.mark.parametrize("variates", [1, 5])
def test_gpu_kernels_compute_the_same(variates, monkeypatch, poison):
    """Forecast and gradients, in Triton's interpreter where there is no GPU: hence a short lookback."""
    model, x = make(depth=2, lookback=16).float().to(DEVICE), history(2, variates)[:, :16].float().to(DEVICE)
    results = []
    for name in ("torch", "triton"):
        monkeypatch.setattr(backend, "DEFAULT_BACKEND", name)
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, fused in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4 * (1 + plain.abs().max().item()))
