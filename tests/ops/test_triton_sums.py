"""Sums of parts, each written where it belongs."""

import pytest
import torch
from devices import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("parts", "directions", "rows", "width", "vectors"), [(3, 2, 5, 20, 2), (700, 1, 2, 70, 1)])
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
