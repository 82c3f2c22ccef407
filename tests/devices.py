"""Where tests run, and which they cannot. tests/conftest.py asks for Triton's interpreter before this is imported."""

import pytest
import torch

from vim2.ops.backend import HAS_TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
both_backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
