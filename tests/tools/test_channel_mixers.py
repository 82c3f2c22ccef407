"""tools/comparisons/channel_mixers.py: each form is built, is another than the default, and learns all it has."""

import sys
from pathlib import Path

import pytest
import timm
import torch

from vim2.classify.models import import_models
from vim2.mixers import SelectiveChannelMixer, SelectiveTokenMixer

FILE = Path(__file__).parents[2] / "tools/comparisons/channel_mixers.py"
SMALL = dict(depths=(1, 1), dims=(16, 32), channel_expand=2, d_state=1, num_classes=10)
FORMS = [
    dict(dt_rank=4),
    dict(d_conv=1),
    dict(d_conv=6),
    dict(step_sizes=(0.1, 1.0)),
    dict(channel_scan="none"),
    dict(channel_scan="forward"),
    dict(channel_scan="embedded"),
    dict(channel_scan="offset"),
    dict(channel_scan="reading"),
    dict(token_directions=1),
    dict(token_directions=2),
    dict(averages="decayed"),
    dict(averages="frozen"),
    dict(averages="chained"),
]


@pytest.fixture(scope="module", autouse=True)
def registered():
    import_models([str(FILE)])


def make(name: str = "vim2_nano_form", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL, **kwargs)


def perturbed(model):
    """Every parameter moved by a random number, so that what starts at 0 or 1 counts, too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_without_arguments_it_is_the_default():
    ours, default = make(), make("vim2_nano")
    default.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(IMAGE), default.eval()(IMAGE))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forms(form):
    """A form is a model of its own, with gradients for whatever is not frozen and for nothing else."""
    model = perturbed(make(**form))
    y = model(IMAGE)
    y.square().mean().backward()
    frozen = form.get("averages") in ("frozen", "chained")
    for name, parameter in model.named_parameters():
        trains = not (frozen and name.endswith("average.weight"))
        assert parameter.requires_grad == trains and (parameter.grad is not None) == trains, name
        if trains:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    default = perturbed(make())
    same_names = model.state_dict().keys() == default.state_dict().keys()
    if same_names and all(t.shape == default.state_dict()[name].shape for name, t in model.state_dict().items()):
        assert frozen or "step_sizes" in form or "channel_scan" in form  # what no weight's name or shape tells


def channel_mixer(**form) -> SelectiveChannelMixer:
    return next(m for m in perturbed(make(**form)).modules() if isinstance(m, SelectiveChannelMixer))


def test_what_the_scan_knows_of_a_step():
    """Of two tokens that have the same channels in every step, the default's outputs differ by step only as the scan
    goes on; without a scan and a convolution they are alike, and embedded or with offsets they are not."""
    steps, patch = 4, 16
    u = torch.randn(3, 1, 2, patch).expand(3, steps, 2, patch)

    def scanned(**form):
        s6 = channel_mixer(**form).s6
        with torch.no_grad():
            return s6(u.contiguous(), merge=False)

    y = scanned(channel_scan="none")
    assert torch.equal(y[:, 0], y[:, 1])
    forward = scanned(channel_scan="forward")
    assert forward.shape == (3, 2, 1, 16)
