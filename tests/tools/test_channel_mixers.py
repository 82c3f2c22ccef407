"""tools/comparisons/channel_mixers.py: each form computes what it says, and learns all that it has."""

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay

from comparisons import channel_mixers
from vim2.mixers import S6
from vim2.ops import BIDIRECTIONAL, FORWARD

FORMS = [
    *(dict(channel_scan=name) for name in channel_mixers.SCANS),
    *(dict(averages=name) for name in channel_mixers.AVERAGES),
    *(dict(token_directions=n) for n in (1, 2)),
    dict(dt_rank=4, d_conv=6, step_sizes=(0.1, 1.0)),
    dict(d_conv=1, channel_patch=8),
]


def make(name: str = "vim2_nano_form", **kwargs):
    return timm.create_model(name, depths=(1, 1), dims=(16, 32), channel_expand=2, d_state=1, num_classes=10, **kwargs)


def perturbed(module):
    """With random numbers added to all parameters, so that what starts at 0 or 1 counts, too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def test_without_arguments_it_is_the_default():
    for patch in (16, 32):
        ours, default = make(channel_patch=patch), make("vim2_nano", channel_patch=patch)
        default.load_state_dict(ours.state_dict())
        image = torch.randn(2, 3, 32, 32)
        assert torch.equal(ours(image), default(image))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_all_that_a_form_has_is_learned(form):
    model = perturbed(make(**form))
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    for name, parameter in model.named_parameters():
        if form.get("averages") in ("frozen", "chained") and name.endswith("average.weight"):
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_averages():
    model, frozen, decayed = (make(averages=name) for name in ("chained", "frozen", "decayed"))
    average = model.stages[1].average
    features = [torch.randn(1, 2, 2, 32) for _ in range(4)]
    assert torch.equal(average(features), features[-1])
    assert torch.allclose(frozen.stages[1].average(features), sum(features))
    assert torch.allclose(decayed.stages[1].average(features), sum(features))
    (decay,) = [g for g in param_groups_weight_decay(decayed) if g["weight_decay"]]
    assert any(p is decayed.stages[1].average.weights for p in decay["params"])


def test_directions_and_widths():
    model = make(token_directions=2, d_conv=6, dt_rank=4, step_sizes=(0.5, 1.0))
    token, _, channel = (layer.mixer for layer in model.stages[0].blocks[0].layers)
    assert token.s6.orders == BIDIRECTIONAL and channel.conv.kernel_size == (6,)
    assert channel.s6.dt_proj_weight.shape == (2, 16, 4)
    sizes = torch.nn.functional.softplus(channel.s6.dt_proj_bias)
    assert sizes.min() > 0.49 and sizes.max() < 1.01


STEPS, PATCH = 4, 3


def scan_of(name: str):
    """A form's scan and S6 with the same parameters, as far as it has them, and an input."""
    torch.manual_seed(0)
    s6 = perturbed(S6(PATCH, BIDIRECTIONAL, 2, 1, separate_inputs=True))
    form = perturbed(channel_mixers.SCANS[name](STEPS, PATCH, BIDIRECTIONAL, 2, 1, separate_inputs=True))
    shared = {k: v for k, v in s6.state_dict().items() if form.state_dict().get(k, v[0]).shape == v.shape}
    form.load_state_dict(shared, strict=False)
    return form, s6, torch.randn(5, STEPS, 2, PATCH)


def same(a, b):
    return torch.allclose(a, b, atol=1e-5)


def test_no_scan():
    form, s6, u = scan_of("none")
    assert same(form(u, merge=False), u * s6.D) and same(form(u), (u * s6.D).sum(-2))


def test_one_direction():
    form, s6, u = scan_of("forward")
    assert form.orders == FORWARD
    form.load_state_dict({name: value[:1] for name, value in s6.state_dict().items()})
    assert same(form(u, merge=False), s6(u, merge=False)[..., :1, :])


def test_an_embedding_is_added():
    form, s6, u = scan_of("embedded")
    assert same(form(u), s6(u + form.embedding))


def test_offsets():
    """As those of a wider input, of which further channels say which step it is."""
    form, s6, u = scan_of("offset")
    wide = S6(PATCH + STEPS, BIDIRECTIONAL, 2, 1, separate_inputs=True)
    places = torch.eye(STEPS)[None, :, None].expand(5, STEPS, 2, STEPS)
    with torch.no_grad():
        for name, value in s6.named_parameters():
            getattr(wide, name)[:, :PATCH].copy_(value) if name != "x_proj_weight" else None
        wide.x_proj_weight.copy_(torch.cat((s6.x_proj_weight, form.offset.permute(1, 2, 0)), dim=-1))
    assert same(form(u), wide(torch.cat((u, places), dim=-1))[..., :PATCH])
    assert not same(form(u), s6(u))


def test_reading_all_steps():
    """With weights that are 0 but where a step reads itself, it is the form with offsets alone."""
    offset, s6, u = scan_of("offset")
    form, _, _ = scan_of("reading")
    assert not same(form(u), offset(u))
    blocks = torch.zeros(2, STEPS, s6.x_proj_weight.shape[1], STEPS, PATCH)
    for step in range(STEPS):
        blocks[:, step, :, step] = s6.x_proj_weight.detach()
    weights = {**offset.state_dict(), "x_proj_weight": blocks.flatten(3).flatten(1, 2)}
    form.load_state_dict(weights)
    assert same(form(u), offset(u))


@pytest.mark.parametrize("wrong", [dict(averages="fre"), dict(channel_scan="some"), dict(token_directions=3)], ids=str)
def test_unknown_forms_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be one of"):
        make(**wrong)
