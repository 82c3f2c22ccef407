"""The relay of warps (forward_relay.py) hands states on without loss: sums of whole numbers, which are exact in any
order, and in which what went wrong once stays wrong to the sequence's end, since no state decays."""

import pytest
import torch
from devices import DEVICE, needs_gpu
from every_kernel import scan_form

from vim2.ops import BIDIRECTIONAL, CROSS_SCAN, FORWARD, selective_scan
from vim2.ops.scan.orders import scan_positions

pytest.importorskip("triton")
from vim2.ops.scan.triton import forward_relay


def whole_numbers(batch, spatial, orders, features, n, dtype):
    generator = torch.Generator().manual_seed(0)
    k = len(orders)

    def random(low, *shape, dtype=dtype):
        return torch.randint(low, 2, shape, generator=generator).to(DEVICE, dtype)

    walks = (batch, *spatial, k)
    return dict(
        u=random(-1, batch, *spatial, features),
        delta=random(0, *walks, features),
        A=torch.zeros(k, features, n, device=DEVICE),  # every decay is 1
        B=random(-1, *walks, n),
        C=random(-1, *walks, n),
        D=random(-1, k, features, dtype=torch.float32),
        delta_bias=torch.zeros(k, features, device=DEVICE),
    )


def exact_scan(u, delta, A, B, C, D, delta_bias, orders, spatial):
    """By running sums in float64. Directions are rounded to u's dtype before they are added, as kernels round them."""
    dtype = u.dtype
    height, width = spatial if len(spatial) == 2 else (1, *spatial)
    u, delta, B, C = (t.flatten(1, len(spatial)).double() for t in (u, delta, B, C))
    total = 0
    for k, order in enumerate(orders):
        positions = scan_positions(order, height, width, u.device)
        steps = (delta[:, positions, k] * u[:, positions]).unsqueeze(-1) * B[:, positions, k].unsqueeze(-2)
        y = (steps.cumsum(1) * C[:, positions, k].unsqueeze(-2)).sum(-1) + D[k] * u[:, positions]
        walked = torch.empty_like(y)
        walked[:, positions] = y
        total = total + walked.to(dtype).float()
    return total.to(dtype).unflatten(1, spatial)


def scan(inputs, orders):
    return selective_scan(**inputs, delta_softplus=False, orders=orders, backend="triton")


def test_sums_are_exact():
    spatial, orders = (5, 13), ("columns", "backward")
    inputs = whole_numbers(1, spatial, orders, 9, 9, torch.float32)
    with scan_form("relay", groups=1, rounds=2):
        assert torch.equal(scan(inputs, orders), exact_scan(**inputs, orders=orders, spatial=spatial))


# batch, map, directions, channels, states; groups and rounds of the plan
STRESS = [
    ((6, (56, 56), CROSS_SCAN, 192, 16), None, None),  # by the plan for this GPU: with long segments on an H200,
    ((12, (32, 48), CROSS_SCAN, 192, 16), None, None),  # and with short ones
    ((1, (4099,), FORWARD, 9, 9), 1, 1),  # slices of one round: from program to program
    ((3, (2051,), BIDIRECTIONAL, 40, 16), 2, 1),
    ((2, (37, 29), CROSS_SCAN, 33, 13), 1, 7),
    ((40, (513,), BIDIRECTIONAL, 16, 16), 2, 1000),  # one slice: from warp to warp alone
]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sizes", "groups", "rounds"), STRESS, ids=str)
def test_thousands_of_runs_beside_other_work(sizes, groups, rounds, dtype, monkeypatch):
    """Warps that wait for one another come in ever other orders when something else takes their multiprocessors."""
    inputs = whole_numbers(*sizes, dtype)
    expected = exact_scan(**inputs, orders=sizes[2], spatial=sizes[1])
    other, beside = torch.cuda.Stream(), torch.randn(1024, 1024, device=DEVICE)
    used = []
    form = forward_relay.scan_forward_relay
    monkeypatch.setattr(forward_relay, "scan_forward_relay", lambda *args, **kw: used.append(1) or form(*args, **kw))
    if groups is None:
        if not forward_relay.relay_plan(
            sizes[0], expected[0, ..., 0].numel(), len(sizes[2]), *sizes[3:], 8 * _multiprocessors()
        ):
            pytest.skip("this GPU scans these in another form")
        wrong = _wrong_runs(inputs, sizes[2], expected, other, beside)
    else:
        with scan_form("relay", groups, rounds):
            wrong = _wrong_runs(inputs, sizes[2], expected, other, beside)
    assert used and wrong == 0


def _multiprocessors():
    return torch.cuda.get_device_properties(0).multi_processor_count


def _wrong_runs(inputs, orders, expected, other, beside, runs=2000):
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    other.wait_stream(torch.cuda.current_stream())
    for run in range(runs):
        if run % 3:
            with torch.cuda.stream(other):
                beside @ beside if run % 2 else beside.clone()
        wrong += (scan(inputs, orders) != expected).any()
    torch.cuda.synchronize()
    return wrong.item()
