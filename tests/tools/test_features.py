"""tools/comparisons/features.py: what features are worth to k nearest neighbours and to a linear probe."""

import pytest
import torch

from comparisons.features import accuracy, linear_probe, main, nearest
from vim2.command.errors import UserError


def clusters(number, seed):
    """Features around one of four centres each, which are the same for all seeds."""
    centres = 3 * torch.eye(4, 8)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (number,), generator=generator)
    return centres[y] + torch.randn(number, 8, generator=generator) / 2, y


@pytest.mark.parametrize("classify", [lambda *a: nearest(*a, k=9), lambda *a: linear_probe(*a, decay=1e-3)])
def test_clusters_are_told_apart(classify):
    with torch.inference_mode():  # as features are extracted
        (x, y), (test_x, test_y) = clusters(200, 0), clusters(100, 1)
    assert accuracy(classify(x, y, test_x), test_y) > 97


def test_near_neighbours_outvote_far_ones():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert nearest(x, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.1]]), k=3).item() == 0


def test_weights_must_be_named(tmp_path):
    with pytest.raises(UserError, match="--pretrained"):
        main(["--data-dir", str(tmp_path), "--model", "test_vim2"])
