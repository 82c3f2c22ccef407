"""Replays do again what was noted, with other values; what cannot be noted goes on as it was."""

import gc

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE, needs_triton

from vim2.ops import norm_gate
from vim2.ops import replay as module
from vim2.ops.replay import MAX_REPLAYS, replay

pytestmark = needs_triton


class Owner:
    """Of the replays of a function whose calls are counted."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *tensors, settings=None):
        def function(*tensors):
            self.calls += 1
            return self.function(*tensors)

        with torch.no_grad():
            return replay(self, settings, function, tensors)


def gated(x, weight, bias):
    """A linear layer whose halves gate each other: a product, views, allocations and a kernel."""
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return norm_gate(value.unflatten(-1, (4, 1, -1)), gate, backend="triton").flatten(1)


def gated_inputs(seed, rows=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, 5, 8), (32, 8), (32,)
    return [torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("way", [torch.no_grad, torch.inference_mode])
def test_replays_give_the_same_bits_for_other_values(way, autocast):
    owner = Owner(gated)
    with way(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        for seed in range(4):
            inputs = gated_inputs(seed)
            inputs[1] = torch.nn.Parameter(inputs[1])
            assert torch.equal(owner(*inputs), gated(*inputs))
    assert owner.calls == 2  # as it is, and noted


def test_what_is_written_to_a_weight_is_read():
    owner = Owner(gated)
    x, weight, bias = gated_inputs(0)
    weight = torch.nn.Parameter(weight)
    for _ in range(3):
        before = owner(x, weight, bias)
    weight.data.mul_(2)  # which no counter of changes tells
    assert torch.equal(owner(x, weight, bias), gated(x, weight, bias)) and owner.calls == 2
    weight.data = gated_inputs(1)[1]
    after = owner(x, weight, bias)
    assert torch.equal(after, gated(x, weight, bias)) and owner.calls == 2
    assert not torch.equal(before, after)


def test_tensors_that_lie_otherwise_are_noted_for_themselves():
    owner = Owner(gated)
    x, weight, bias = gated_inputs(0)
    slow = weight.t().contiguous().t()
    shifted = torch.cat((bias[:1], bias))[1:]
    others = [(x, weight, bias), (x[:2], weight, bias), (x, slow, bias), (x, weight, shifted)]
    others.append([t.bfloat16() for t in (x, weight, bias)])
    for _ in range(3):
        for tensors in others:
            assert torch.equal(owner(*tensors), gated(*tensors))
    assert owner.calls == 2 * len(others)


def test_settings_are_told_apart():
    for owner in (Owner(gated), Owner(gated)):
        for settings in (1, 2, 1, 2, 1):
            owner(*gated_inputs(0), settings=settings)
        assert owner.calls == 4


def test_views_of_what_is_given_move_with_it():
    owner = Owner(lambda x, y: torch.mm(x[1:, :2], y[:, 1:]))
    storage = torch.arange(64.0, device=DEVICE)
    x, y = torch.randn(2, 3, 4, device=DEVICE)[0], torch.ones(2, 4, device=DEVICE)
    for start in (0, 16, 32):
        x = storage[start : start + 12].view(3, 4)
        assert torch.equal(owner(x, y), torch.mm(x[1:, :2], y[:, 1:]))
    assert owner.calls == 2


def test_a_part_of_what_is_given_may_be_returned():
    owner = Owner(lambda x: x[1:])
    for seed in range(3):
        x = gated_inputs(seed)[0]
        assert torch.equal(owner(x), x[1:]) and owner(x).data_ptr() == x[1:].data_ptr()


ELSEWHERE = torch.ones(3, device=DEVICE)
NOT_REPLAYABLE = {
    "changes what it is given": lambda x, y: x.add_(y),
    "reads a value": lambda x, y: x * y.sum().item(),
    "takes another way for other values": lambda x, y: x if bool((y > 0).all()) else y,
    "reads what it was not given": lambda x, y: x + ELSEWHERE,
    "makes several tensors at once": lambda x, y: torch.sort(x + y).values,
    "makes a tensor of a number's": lambda x, y: x + torch.tensor(2.0, device=x.device) * y,
    "views another dtype": lambda x, y: (x + y).view(torch.int32) + 1,
}


@pytest.mark.parametrize("name", NOT_REPLAYABLE)
def test_what_cannot_be_noted_is_done_as_ever(name):
    function = NOT_REPLAYABLE[name]
    owner = Owner(function)
    for i in range(4):
        x, y = torch.arange(3.0, device=DEVICE) + i, torch.tensor([1.0, -1.0, 2.0], device=DEVICE) * (i - 1)
        expected = function(x.clone(), y.clone())
        assert torch.equal(owner(x, y), expected)
    assert owner.calls == 4


def test_tensors_that_share_memory_are_not_told_apart():
    owner = Owner(lambda x, y: x + y[:1])
    for i in range(4):
        x = torch.arange(6.0, device=DEVICE) + i
        assert torch.equal(owner(x[:3], x[3:]), x[:3] + x[3])
    assert owner.calls == 4


def test_what_is_not_needed_any_more_is_freed(monkeypatch):
    """As in a plain call: else peaks of memory would be higher."""
    alive = []

    def function(x):
        for _ in range(5):
            x = torch.mm(x, x)
        return x

    owner = Owner(function)
    x = torch.eye(4, device=DEVICE)
    owner(x), owner(x)
    multiply = torch.mm

    def counted(*tensors):
        alive.append(sum(type(t) is torch.Tensor and t.shape == (4, 4) for t in gc.get_objects()))
        return multiply(*tensors)

    (known,) = (ways for each, ways in module._replays.items() if each is owner)
    (replayed,) = known.values()
    scope = replayed.__globals__
    name = next(name for name, value in scope.items() if value is multiply)
    monkeypatch.setitem(scope, name, counted)
    owner(x)
    assert len(alive) == 5 and alive[-1] <= alive[1]


def test_replays_go_with_their_owner_and_are_bounded():
    before = len(module._replays)
    owner = Owner(lambda x: x * 2)
    for rows in range(1, 2 * MAX_REPLAYS + 2):
        owner(torch.ones(rows, device=DEVICE))
        assert len(module._replays) == before + 1 and len(module._replays[owner]) <= MAX_REPLAYS
    del owner
    assert len(module._replays) == before


def cast_by_parts(x, weight):
    return torch.einsum("ij,kj->ik", x, weight)


def partly_not_cast(x, weight):
    with torch.autocast(DEVICE, enabled=False):
        return torch.mm(x, weight)


@pytest.mark.parametrize("way", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", [cast_by_parts, partly_not_cast])
def test_casts_are_those_of_a_plain_call(function, way):
    owner = Owner(function)
    with way(), torch.autocast(DEVICE, torch.bfloat16):
        for seed in range(4):
            x, weight = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
            expected = function(x, weight)
            actual = owner(x, weight)
            assert actual.dtype == expected.dtype and torch.equal(actual, expected)


def test_what_is_noted_may_replay_others():
    inner = Owner(gated)
    outer = Owner(lambda x, weight, bias: inner(x, weight, bias) * 2)
    for seed in range(5):
        inputs = gated_inputs(seed)
        assert torch.equal(outer(*inputs), gated(*inputs) * 2)
    assert outer.calls == 2


def test_errors_are_those_of_a_plain_call():
    owner = Owner(torch.mm)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            owner(torch.ones(2, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE))
