import pytest
import torch
import torch.nn.functional as F
from comparison import assert_all_finite, assert_compiles, assert_same_bits, gradients, relative_error
from devices import DEVICE, both_backends, needs_triton
from timm.models.swin_transformer import PatchMerging
from torch import nn

from vim2.ops import layer_norm, patch_merging_norm

FUNCTIONS = pytest.mark.parametrize("function", [layer_norm, patch_merging_norm], ids=["rows", "patches"])


def make(function, shape=(2, 3, 5, 7), dtype=torch.float32, parameter_dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    width = shape[-1] * (1 if function is layer_norm else 4)
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64) + 0.3 for s in (shape, (width,), (width,))]
    dtypes = (dtype, parameter_dtype, parameter_dtype)
    return [t.to(DEVICE, d).requires_grad_() for t, d in zip(tensors, dtypes)]


def expected(function, inputs, eps=1e-5):
    """PyTorch's LayerNorm, of timm's patches, in float64, and copies of the inputs to differentiate by."""
    x, weight, bias = copies = [t.detach().double().requires_grad_() for t in inputs]
    if function is patch_merging_norm:
        merging = PatchMerging(x.shape[-1])
        merging.norm = merging.reduction = nn.Identity()
        x = merging(x)
    return F.layer_norm(x, weight.shape, weight, bias, eps), copies


def check(function, inputs, backend, bound, **kwargs):
    output = function(*inputs, **kwargs, backend=backend)
    wanted, copies = expected(function, inputs, **kwargs)
    assert output.shape == wanted.shape and output.is_contiguous()
    assert relative_error(output, wanted) < bound
    grads = gradients(output, inputs, torch.bfloat16), gradients(wanted, copies, torch.bfloat16)
    for a, e, t in zip(*grads, inputs, strict=True):
        assert a.dtype == t.dtype and a.shape == t.shape
        assert relative_error(a, e) < bound
    return output


@FUNCTIONS
@both_backends
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 3, 5, 7), (1, 4, 6, 48), (3, 1, 13, 96)])
def test_is_the_norm(function, shape, backend):
    check(function, make(function, shape), backend, 2e-6)
    check(function, make(function, shape), backend, 2e-6, eps=0.3)


@FUNCTIONS
def test_float64_is_exact(function):
    check(function, make(function, dtype=torch.float64, parameter_dtype=torch.float64), "torch", 1e-13)


@FUNCTIONS
@both_backends
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_half_precision_rounds_once(function, dtype, bound, backend):
    truncated = dtype == torch.bfloat16 and backend == "triton" and DEVICE == "cpu"  # by Triton's interpreter
    output = check(function, make(function, (2, 4, 5, 32), dtype, dtype), backend, 2 * bound if truncated else bound)
    assert output.dtype == dtype


@FUNCTIONS
@both_backends
def test_the_result_is_in_the_precision_of_what_is_normalised(function, backend):
    """And not in that of parameters which are kept in float32, as PyTorch's LayerNorm has it on CPUs."""
    assert check(function, make(function, dtype=torch.bfloat16), backend, 2**-7).dtype == torch.bfloat16


@FUNCTIONS
@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_result_is_ready_for_a_linear(function, dtype, backend):
    inputs = make(function, dtype=dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        output = check(function, inputs, backend, 2**-7)
    assert output.dtype == torch.bfloat16


@FUNCTIONS
@both_backends
def test_any_strides(function, backend):
    x, *parameters = make(function)
    x = x.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    check(function, [x, *parameters], backend, 2e-6)


@FUNCTIONS
@needs_triton
def test_more_rows_than_programs_hold_at_once(function, monkeypatch):
    from vim2.ops.norm.triton import tiles

    monkeypatch.setattr(tiles, "FORWARD_PROGRAMS", 2)
    monkeypatch.setattr(tiles, "_multiprocessors", lambda device: 1)
    check(function, make(function, (3, 7, 9, 33)), "triton", 2e-6)


@FUNCTIONS
@needs_triton
def test_every_output_is_written(function, poison):
    check(function, make(function), "triton", 2e-6)


@FUNCTIONS
@needs_triton
def test_two_runs_give_the_same_bits(function):
    assert_same_bits(lambda *inputs: function(*inputs, backend="triton"), make(function, (3, 7, 9, 33)))


@FUNCTIONS
@both_backends
def test_constant_and_huge_rows(function, backend):
    inputs = make(function)
    with torch.no_grad():
        inputs[0][0] = 3.0
        inputs[0][1] *= 1e17
    assert_all_finite(function(*inputs, backend=backend), inputs)


@FUNCTIONS
@both_backends
def test_no_rows(function, backend):
    inputs = make(function, (0, 4, 6, 3))
    output = function(*inputs, backend=backend)
    assert output.shape == ((0, 4, 6, 3) if function is layer_norm else (0, 2, 3, 12))
    for gradient in torch.autograd.grad(output.sum(), inputs):
        assert (gradient == 0).all()


@needs_triton
@pytest.mark.parametrize("patch", [1, 2])
def test_operator_is_registered_correctly(patch):
    inputs = make(layer_norm if patch == 1 else patch_merging_norm)
    torch.library.opcheck(torch.ops.vim2.layer_norm, (*inputs, 1e-5, torch.float32, patch, True))


@FUNCTIONS
@both_backends
def test_compiles_without_graph_breaks(function, backend):
    inputs = make(function)

    assert_compiles(lambda *inputs: function(*inputs, backend=backend), inputs)


def test_bad_input():
    with pytest.raises(ValueError, match=r"both be \(4,\).*norm_weight is \(3,\)"):
        layer_norm(torch.zeros(2, 4), torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="got a scalar"):
        layer_norm(torch.zeros(()), torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"\(batch, H, W, C\), got \(2, 4\)"):
        patch_merging_norm(torch.zeros(2, 4), torch.ones(16), torch.ones(16))
    with pytest.raises(ValueError, match=r"both be \(16,\)"):
        patch_merging_norm(torch.zeros(1, 2, 2, 4), torch.ones(4), torch.ones(4))
