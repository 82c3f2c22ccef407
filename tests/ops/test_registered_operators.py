"""A graph that was traced at one image size holds that size's numbers: operators refuse tensors that do not fit them,
whatever the backend, and read no memory that is not theirs."""

import pytest
import torch
from devices import DEVICE, needs_triton

from vim2.ops.backend import HAS_NUMBA
from vim2.ops.scan.chunks import kept_every

needs_numba = pytest.mark.skipif(DEVICE == "cuda" or not HAS_NUMBA, reason="wants Numba, on a CPU")
BACKENDS = ["torch", pytest.param("numba", marks=needs_numba), pytest.param("triton", marks=needs_triton)]


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device=DEVICE)


def scan_arguments(backend: str, height: int, width: int, length: int, backward: bool) -> tuple:
    """Of a scan in two directions, of 3 channels with 2 states, over `length` positions."""
    operands = [ones(1, length, 3), ones(1, length, 2, 3), -ones(2, 3, 2)]
    operands += [ones(1, length, 2, 2), ones(1, length, 2, 2), ones(2, 3), ones(2, 3), ones(0)]
    if not backward:
        return *operands, True, [0, 2], height, width, True, False, height * width, backend
    chunks = -(-height * width // kept_every(backend, height * width, True))
    starts, grads = torch.zeros(1, 2, chunks - 1, 2, 3, device=DEVICE), [ones(1, length, 2, n) for n in (2, 2, 3)]
    return ones(1, length, 3), ones(0), starts, *operands, True, [0, 2], height, width, backend, *grads


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("backward", [False, True])
def test_scan_of_another_size_than_it_was_traced_at(backward, backend):
    operator = torch.ops.vim2.selective_scan_backward if backward else torch.ops.vim2.selective_scan
    operator(*scan_arguments(backend, 4, 5, 20, backward))
    for height, width, length in ((4, 5, 16), (4, 5, 30), (5, 5, 20), (-4, -5, 20)):
        with pytest.raises(ValueError, match=r"do not fit together.*height .*traced at one image size"):
            operator(*scan_arguments(backend, height, width, length, backward))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.ones(1, 20, 3, dtype=torch.int32), "Tensors must be float16"),
        (2, torch.ones(2, 3, 2, dtype=torch.complex64), "Tensors must be float16"),
        (2, torch.ones(2, 3, 2, device="meta"), "Tensors must be on one device"),
        (1, torch.ones(20), "do not fit together"),
        (9, [0, -1], "Orders must be indices"),
        (9, [0, 99], "Orders must be indices"),
        (15, "auto", "backend must be one of"),
        (15, "foo", "backend must be one of"),
    ],
    ids=["int", "complex", "meta", "one axis", "order -1", "order 99", "auto", "foo"],
)
def test_a_scan_called_by_hand_with_what_only_the_function_checks(backend, place, value, message):
    arguments = list(scan_arguments(backend, 4, 5, 20, backward=False))
    arguments[place] = value.to(DEVICE) if torch.is_tensor(value) and not value.is_meta else value
    with pytest.raises(ValueError, match=message):
        torch.ops.vim2.selective_scan(*arguments)


NORM = (ones(4), ones(4))
OPTIONS = (1e-5, torch.float32)
PROJECTED = (ones(2 * 8, 3), ones(2, 3, 2), ones(2, 3), ones(2, 3), ones(2, 3, 1))  # all but the input, 20 x 3
PROJECTED_OPTIONS = ([0, 2], [4, 5], "torch")
CASES = {
    "norm_gate": ((ones(2, 4), ones(2, 5), *NORM, *OPTIONS, False), (ones(2, 5), ones(2, 5), *NORM)),
    "layer_norm": ((ones(1, 2, 2, 4), *NORM, *OPTIONS, 2, True), (ones(2, 5), *NORM, *OPTIONS, 1, True)),
    "weighted_average": (([ones(2, 4), ones(1, 4)], ones(2), *NORM), ([ones(2, 4)], ones(2), *NORM)),
    "causal_conv_silu": ((ones(1, 2, 4), ones(3, 1, 2), ones(3)), (ones(1, 2, 4), ones(4, 1, 2), ones(3))),
    "depthwise_conv_silu": ((ones(1, 2, 2, 4), ones(3, 1, 3, 3), ones(3)), (ones(2, 2, 4), ones(4, 1, 3, 3), ones(4))),
    "directional_conv_silu": ((ones(1, 2, 4), ones(6, 1, 2), ones(6)), (ones(1, 2, 4), ones(8, 1, 2), ones(4))),
    "scan_parameters": ((ones(2, 5, 3), ones(2, 4, 2), False, torch.float32), (ones(1, 3, 3), ones(1, 3, 2), False)),
    "scan_parameters_backward": (
        (ones(2 * 7, 3), ones(2, 3, 2), ones(2, 3, 2), 5, False, torch.float32),
        (ones(2 * 8, 3), ones(2, 3, 2), ones(2, 3, 2), 5, True, torch.float32),
    ),
    "projected_scan": ((ones(1, 16, 3), *PROJECTED), (ones(1, 20, 2, 3), *PROJECTED), (ones(1, 20, 4), *PROJECTED)),
    "norm_gate_backward": ((ones(2, 4), ones(3, 4), ones(3, 4), *NORM, ones(2, 3)),),
    "projected_scan_backward": ((ones(1, 20, 4), ones(1, 2, 0, 2, 3), ones(1, 20, 3), *PROJECTED),),
    "layer_norm_backward": ((ones(2, 4), ones(2, 4), ones(4), ones(2, 1), 1), (ones(1, 4), ones(2, 4), ones(4))),
    "weighted_average_backward": ((ones(2, 4), [ones(3, 4)], ones(1), ones(4), ones(2, 2)),),
    "causal_conv_silu_backward": ((ones(1, 3, 4), ones(1, 2, 4), ones(4, 1, 2), ones(4)),),
    "depthwise_conv_silu_backward": ((ones(1, 3, 2, 4), ones(1, 2, 2, 4), ones(4, 1, 3, 3), ones(4)),),
    "directional_conv_silu_backward": ((ones(1, 2, 4), ones(1, 2, 4), ones(8, 1, 2), ones(8)),),
}
for direction in ("", "_backward"):
    for name in ("causal_conv_silu", "directional_conv_silu"):  # by Numba, the same
        CASES[f"{name}_numba{direction}"] = CASES[f"{name}{direction}"]
DEFAULTS = {"norm_gate": (*OPTIONS, False), "weighted_average": (*OPTIONS, True)}
DEFAULTS |= {"projected_scan": (None, True, *PROJECTED_OPTIONS), "projected_scan_backward": (None, *PROJECTED_OPTIONS)}
DEFAULTS |= {"scan_parameters": (torch.float32,), "layer_norm_backward": (ones(2, 2), 1)}


def test_every_operator_is_here():
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    ours = {name.partition(".")[0] for namespace, name in names if namespace == "vim2"}
    ours -= {name for name in ours if name.removesuffix("_backward").endswith("_torch")}  # PyTorch checks its own
    ours.discard("exported_scan")  # of vim2.export, if a test before has exported for AOTInductor
    assert ours == CASES.keys() | {"selective_scan", "selective_scan_backward"}


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_tensors_that_do_not_fit_together(name):
    for arguments in CASES[name]:
        schema = getattr(torch.ops.vim2, name).default._schema
        missing = len(schema.arguments) - len(arguments)
        arguments = (*arguments, *DEFAULTS.get(name, ())[-missing:]) if missing else arguments
        with pytest.raises(ValueError, match=f"vim2::{name}: tensors of .* do not fit together"):
            getattr(torch.ops.vim2, name)(*arguments)
