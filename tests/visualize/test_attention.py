"""The implicit attention of a scan is what the scan computes."""

import pytest
import timm
import torch

from vim2.mixers import S6, SelectiveChannelMixer, SelectiveTokenMixer
from vim2.ops import BIDIRECTIONAL, CROSS_SCAN
from vim2.visualize.attention import channel_attention, scan_attention, scan_inputs, token_attention, tokens_seen
from vim2.visualize.layers import mixers_of


def make_scan(features, orders, **kwargs):
    """A scan that decays and selects much more than a fresh one, as after training."""
    torch.manual_seed(0)
    s6 = S6(features, orders, **kwargs).double()
    with torch.no_grad():
        s6.dt_proj_bias.uniform_(-3, 1)
        s6.A_log.add_(0.3 * torch.randn_like(s6.A_log))
        s6.D.normal_()
    return s6


@pytest.mark.parametrize("size", [(5, 4), (1, 7), (1, 1)])
def test_the_matrix_times_the_input_is_the_output_of_each_direction(size):
    s6 = make_scan(6, CROSS_SCAN, d_state=4, dt_rank=2)
    u = torch.randn(*size, 6, dtype=torch.float64)
    length = size[0] * size[1]
    matrices = scan_attention(s6, u, torch.arange(length))
    assert matrices.shape == (4, length, length, 6) and matrices.dtype == torch.float64
    flat = u.view(length, 6)
    outputs = torch.einsum("ktse,se->tke", matrices, flat) + s6.D * flat.unsqueeze(1)
    expected = s6(u.unsqueeze(0), merge=False)[0].view(length, 4, 6)
    torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-12)


def test_the_matrix_of_a_sequence_with_inputs_of_its_own_for_each_direction():
    s6 = make_scan(3, BIDIRECTIONAL, d_state=4, separate_inputs=True)
    u = torch.randn(9, 2, 3, dtype=torch.float64)
    matrices = channel_attention(s6, u)
    assert matrices.shape == (2, 9, 9, 3)
    outputs = torch.einsum("ktse,ske->tke", matrices, u) + s6.D * u
    torch.testing.assert_close(outputs, s6(u.unsqueeze(0), merge=False)[0], rtol=1e-9, atol=1e-12)
    forward, backward = matrices.abs().sum(-1)
    assert torch.equal(forward, forward.tril()) and torch.equal(backward, backward.triu())


def test_long_walks_neither_overflow_nor_see_ahead():
    s6 = make_scan(2, CROSS_SCAN, d_state=16)
    with torch.no_grad():
        s6.dt_proj_bias.fill_(20.0)
    u = torch.randn(20, 30, 2, dtype=torch.float64)
    weights = token_attention(s6, u, (3, 7))
    assert weights.shape == (4, 20, 30, 2) and weights.isfinite().all()
    seen = tokens_seen(CROSS_SCAN, (20, 30), (3, 7))
    assert seen.sum((1, 2)).tolist() == [3 * 30 + 8, 7 * 20 + 4, 17 * 30 - 7, 23 * 20 - 3]
    assert not weights[~seen].any()


def test_inputs_of_a_models_scans():
    """By hand from a mixer's own parts, at a token off the diagonal of a map that is not square."""
    model = timm.create_model("test_vim2").eval()
    tokens, channels = (mixers_of(model, kind) for kind in (SelectiveTokenMixer, SelectiveChannelMixer))
    assert list(tokens)[:2] == ["stages.0.blocks.0.layers.0", "stages.0.blocks.0.layers.1"]
    assert next(iter(channels)) == "stages.0.blocks.0.layers.2"
    name, mixer = next(iter(channels.items()))
    received = []
    hook = mixer.register_forward_hook(lambda _, inputs, output: received.append((inputs[0], output)))
    with torch.no_grad(), scan_inputs(tokens | channels) as inputs:
        model(torch.randn(1, 3, 48, 64))
    hook.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert inputs.keys() == tokens.keys() | channels.keys()
    assert inputs["stages.1.blocks.0.layers.0"].shape == (1, 6, 8, 48)
    ((x, output),) = received
    row, column = 2, 5
    u = inputs[name][row * 16 + column].double()
    y = torch.einsum("ktse,ske->tke", channel_attention(mixer.s6, u), u) + mixer.s6.D * u
    gate = torch.nn.functional.silu(mixer.in_proj(x[0, row, column]).chunk(2)[1])
    by_hand = mixer.out_proj((y.sum(1).flatten() * gate).float())
    torch.testing.assert_close(by_hand, output[0, row, column], rtol=1e-3, atol=1e-6)


def test_a_scan_of_a_users_own_is_not_looked_into():
    """Its matrices may be others than those of its parameters."""

    class Own(S6):
        pass

    model = timm.create_model("test_vim2")
    first, *others = mixers_of(model, SelectiveChannelMixer).items()
    first[1].s6 = Own(8, BIDIRECTIONAL, separate_inputs=True)
    assert list(mixers_of(model, SelectiveChannelMixer).items()) == others
