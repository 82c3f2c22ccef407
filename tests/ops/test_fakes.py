"""What torch.compile and torch.export rely on: operators return what their fakes say, to the strides, which
torch.library.opcheck does not look at and Inductor does."""

import pytest
import torch
from devices import DEVICE, needs_triton
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vim2.mixers import MixerLayer, PatchMerging, SelectiveChannelMixer, SelectiveTokenMixer
from vim2.ops.backend import HAS_NUMBA

BACKENDS = [
    pytest.param("triton", marks=needs_triton),
    pytest.param(
        "numba", marks=pytest.mark.skipif(torch.cuda.is_available() or not HAS_NUMBA, reason="wants Numba, on a CPU")
    ),
    "torch",
]


def layout(t: torch.Tensor) -> tuple:
    strides = [stride for size, stride in zip(t.shape, t.stride()) if size > 1]
    return t.shape, strides, t.dtype, t.device


class CompareWithFakes(TorchDispatchMode):
    """Runs every operator of this package on fakes of its arguments, too."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "vim2":
            self.seen.add(func._schema.name.partition("::")[2])
            with FakeTensorMode() as mode:
                fake_args = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs or {}))
                fake = func(*fake_args[0], **fake_args[1])
            for real, said in zip(tree_leaves(result), tree_leaves(fake), strict=True):
                assert layout(real) == layout(said), func
        return result


@pytest.mark.parametrize("channel_patch", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_lie_in_memory_as_their_fakes_say(monkeypatch, backend, channel_patch):
    monkeypatch.setattr("vim2.ops.backend.DEFAULT_BACKEND", backend)
    torch.manual_seed(0)
    mixers = SelectiveTokenMixer(8, d_state=2), SelectiveChannelMixer(8, d_state=2, channel_patch=channel_patch)
    layers = torch.nn.Sequential(*(MixerLayer(8, mixer, 1) for mixer in mixers)).to(DEVICE)
    merging = PatchMerging(8, 16).to(DEVICE)
    x = torch.randn(2, 3, 5, 8, device=DEVICE, requires_grad=True)
    with CompareWithFakes() as compared:
        merging(layers[1]([layers[0]([x])])).sum().backward()
    expected = {"selective_scan"}
    if backend == "triton":
        expected |= {"weighted_average", "layer_norm", "norm_gate", "depthwise_conv_silu", "directional_conv_silu"}
    assert compared.seen >= expected | {f"{name}_backward" for name in expected}
