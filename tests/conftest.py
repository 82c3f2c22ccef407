"""Where there is no CUDA device, Triton kernels run on the CPU in Triton's interpreter. It must be asked for before
anything imports Triton, as timm does: hence here, above all tests."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
