"""Where tests run, and what they need to."""

import pytest
import torch

from vim2.ops.backend import HAS_TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
both_backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
