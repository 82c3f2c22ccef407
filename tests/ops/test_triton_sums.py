"""Sums of parts, each written where it belongs."""

import pytest
import torch
from devices import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("parts", "directions", "rows", "width", "vectors"), [(3, 2, 5, 20, 2), (2, 3, 4, 400, 1), (700, 1, 2, 70, 1)]
)
def test_sums_are_written_to_their_tensors(parts, directions, rows, width, vectors, transposed):
    from vim2.ops.triton_sums import sum_parts

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(parts, directions, rows + vectors, width, generator=generator).to(DEVICE)
    matrix = torch.full((directions, width, rows) if transposed else (directions, rows, width), torch.nan).to(DEVICE)
    others = [torch.full((directions, width), torch.nan, dtype=torch.bfloat16, device=DEVICE) for _ in range(vectors)]
    sum_parts(x, matrix, *others, transposed=transposed)
    expected = x.double().sum(0)
    torch.testing.assert_close((matrix.mT if transposed else matrix).double(), expected[:, :rows], rtol=1e-5, atol=1e-4)
    for i, other in enumerate(others):
        torch.testing.assert_close(other.double(), expected[:, rows + i], rtol=1e-2, atol=1e-2)
    again = torch.empty_like(matrix)
    sum_parts(x, again, *others, transposed=transposed)
    assert torch.equal(again, matrix)


def test_sums_of_several_launches_in_one_have_the_same_bits():
    from vim2.ops.triton_sums import copy_of, sum_parts, sum_parts_of, together

    generator = torch.Generator().manual_seed(0)
    shapes = (300, 1, 3, 20), (5, 2, 2, 40)
    parts = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    weight = torch.randn(70, generator=generator).to(DEVICE, torch.bfloat16)
    expected = [torch.empty(1, 20, 2), torch.empty(1, 20), torch.empty(2, 2, 40)]
    expected = [t.to(DEVICE) for t in expected]
    sum_parts(parts[0], *expected[:2], transposed=True)
    sum_parts(parts[1], expected[2])
    targets = [torch.full_like(t, torch.nan) for t in (*expected, weight.float())]
    device = weight.device
    launches = (
        sum_parts_of(300, 1, 2, 20, 1, True, device),
        copy_of(70, device),
        sum_parts_of(5, 2, 2, 40, 0, False, device),
    )
    launch = together(launches, device)
    launch((parts[0], weight, parts[1]), (*targets[:2], targets[3], targets[2]))
    for target, other in zip(targets, (*expected, weight.float()), strict=True):
        assert torch.equal(target, other)


def test_copies_of_many_tensors_of_all_dtypes_in_one_launch():
    from vim2.ops.triton_sums import copy_of, together

    dtypes = torch.float32, torch.bfloat16, torch.float16
    pairs = [(source, target) for source in dtypes for target in dtypes] * 2
    numbers = [torch.tensor([-0.0, 0.0, *range(i, i + 8)], device=DEVICE) for i in range(len(pairs))]
    sources = [each.to(source) for each, (source, _) in zip(numbers, pairs)]
    targets = [torch.full((10,), torch.nan, dtype=target, device=DEVICE) for _, target in pairs]
    together([copy_of(10, sources[0].device) for _ in pairs], sources[0].device)(tuple(sources), tuple(targets))
    for target, each in zip(targets, numbers, strict=True):
        assert torch.equal(target.float(), each) and torch.equal(target.signbit(), each.signbit())
