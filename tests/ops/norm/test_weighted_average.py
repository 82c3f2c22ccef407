import pytest
import torch
from comparison import assert_all_finite, assert_compiles, assert_same_bits, gradients
from devices import DEVICE, both_backends, needs_triton
from torch.utils.checkpoint import checkpoint

from vim2.ops import weighted_average, weighted_average_norm
from vim2.ops.norm.weighted_average import weighted_average_norm_handing_on


def make(n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(n)]
    weight = torch.randn(n, generator=generator, dtype=torch.float64)
    return [f.requires_grad_() for f in features], weight.requires_grad_()


@pytest.mark.parametrize("n", [1, 2, 7])
def test_is_the_weighted_sum(n):
    features, weight = make(n)
    expected = torch.einsum("n,nbhwc->bhwc", weight, torch.stack(features))
    actual = weighted_average(features, weight)
    torch.testing.assert_close(actual, expected)
    inputs = [*features, weight]
    for a, e in zip(
        torch.autograd.grad(actual.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)
    ):
        torch.testing.assert_close(a, e)


def test_half_precision_features_are_summed_in_the_weights_dtype():
    """Under autocast mixers put out bfloat16 while weights are float32: the stream must not round at every sum."""
    features, weight = make(5, torch.bfloat16)
    total = weighted_average(features, weight.float())
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, sum(f.float() * w for f, w in zip(features, weight.float())))
    assert weighted_average(features, weight.bfloat16()).dtype == torch.bfloat16


def test_as_many_weights_as_features():
    features, weight = make(3)
    with pytest.raises(ValueError, match="2 features do not fit 3 weights"):
        weighted_average(features[:2], weight)


def test_features_of_one_shape():
    with pytest.raises(ValueError, match=r"of one shape, got \(2, 3\), \(2, 1\)"):
        weighted_average([torch.zeros(2, 3), torch.zeros(2, 1)], torch.ones(2))


class TestNorm:
    """weighted_average_norm, and weighted_average where `norm` is false, against the definition in float64."""

    def make(self, n, width=24, norm=True, rows=(2, 3, 5), dtypes=(torch.float32,), parameter_dtype=torch.float32):
        """n features, whose dtypes are `dtypes`, the last one repeated, and the parameters."""
        generator = torch.Generator().manual_seed(0)

        def randn(*shape, dtype):
            t = torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.3
            return t.to(DEVICE, dtype).requires_grad_()

        features = [randn(*rows, width, dtype=dtypes[min(i, len(dtypes) - 1)]) for i in range(n)]
        return [*features, *(randn(k, dtype=parameter_dtype) for k in ([n, width, width] if norm else [n]))]

    def run(self, inputs, n, backend, **kwargs):
        function = weighted_average if len(inputs) == n + 1 else weighted_average_norm
        return function(inputs[:n], *inputs[n:], **kwargs, backend=backend)

    def expected(self, inputs, n, eps=1e-5):
        *features, weight = (copies := [t.detach().double().requires_grad_() for t in inputs])[: n + 1]
        y = torch.einsum("n,n...->...", weight, torch.stack(features))
        if len(copies) > n + 1:
            centred = y - y.mean(-1, keepdim=True)
            y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * copies[-2] + copies[-1]
        return y, copies

    def errors(self, actual, expected, inputs, n):
        """Relative errors. Gradients of weights are sums that nearly cancel, and are measured against their parts."""
        grads = gradients(actual, inputs, torch.bfloat16), gradients(*expected, torch.bfloat16)
        for a, t in zip(grads[0], inputs, strict=True):
            assert a.dtype == t.dtype and a.shape == t.shape
        scales = [e.norm() for e in grads[1]]
        scales[n] = sum((e * f.double()).norm() for e, f in zip(grads[1][:n], inputs[:n]))
        pairs = [(actual, expected[0], expected[0].norm()), *zip(*grads, scales)]
        return [((a.double() - e).norm() / scale).item() for a, e, scale in pairs]

    def check(self, inputs, n, backend, bound, **kwargs):
        actual = self.run(inputs, n, backend, **kwargs)
        errors = self.errors(actual, self.expected(inputs, n, **kwargs), inputs, n)
        assert max(errors) < bound, errors
        return actual

    @both_backends
    @pytest.mark.parametrize("norm", [True, False])
    @pytest.mark.parametrize("n", [1, 2, 4, 5, 9, 28])
    def test_any_number_of_features(self, n, norm, backend):
        self.check(self.make(n, norm=norm, rows=(2, 3)), n, backend, 2e-6)

    @both_backends
    @pytest.mark.parametrize("norm", [True, False])
    @pytest.mark.parametrize("width", [5, 33, 96, 300])
    def test_any_width(self, width, norm, backend):
        self.check(self.make(3, width, norm), 3, backend, 2e-6)

    def test_float64_is_exact(self):
        inputs = self.make(3, dtypes=(torch.float64,), parameter_dtype=torch.float64)
        self.check(inputs, 3, "torch", 1e-14)

    @both_backends
    def test_eps(self, backend):
        self.check(self.make(3), 3, backend, 2e-6, eps=0.5)

    @both_backends
    @pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
    def test_half_precision_rounds_once(self, dtype, bound, backend):
        inputs = self.make(5, 48, dtypes=(dtype,), parameter_dtype=dtype)
        truncated = dtype == torch.bfloat16 and backend == "triton" and DEVICE == "cpu"  # by Triton's interpreter
        output = self.check(inputs, 5, backend, 2 * bound if truncated else bound)
        assert output.dtype == dtype

    @both_backends
    @pytest.mark.parametrize("norm", [True, False])
    def test_mixed_dtypes(self, norm, backend):
        """As under autocast in the first stage: a float32 stream and mixers in bfloat16."""
        inputs = self.make(5, norm=norm, dtypes=(torch.float32, torch.bfloat16))
        output = self.check(inputs, 5, backend, 2**-7)
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.double(), self.expected(inputs, 5)[0], rtol=1e-5, atol=1e-5)

    @both_backends
    def test_under_autocast_the_result_is_ready_for_a_linear(self, backend):
        inputs = self.make(3, dtypes=(torch.float32, torch.bfloat16))
        with torch.autocast(DEVICE, torch.bfloat16):
            output = self.check(inputs, 3, backend, 2**-7)
            assert output.dtype == torch.bfloat16
            assert self.run(inputs[:4], 3, backend).dtype == torch.float32  # the stream, without a norm

    @needs_triton
    @pytest.mark.parametrize("n", [3, 18])
    def test_more_rows_than_programs_hold_at_once(self, n, monkeypatch):
        from vim2.ops.norm.triton import tiles

        monkeypatch.setattr(tiles, "FORWARD_PROGRAMS", 2)
        monkeypatch.setattr(tiles, "_multiprocessors", lambda device: 1)
        for norm in (True, False):
            self.check(self.make(n, 300, norm, rows=(31,)), n, "triton", 2e-6)

    @both_backends
    def test_features_of_any_strides(self, backend):
        inputs = self.make(3)
        inputs[1] = inputs[1].detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
        self.check([*inputs[:1], inputs[1], *inputs[2:]], 3, backend, 2e-6)

    @both_backends
    def test_one_feature_given_twice(self, backend):
        x, _, *parameters = self.make(2)
        output = weighted_average_norm([x, x], *parameters, backend=backend)
        wanted, copies = self.expected([x, x, *parameters], 2)
        (actual,) = gradients(output, [x], torch.bfloat16)
        first, second, *_ = gradients(wanted, copies, torch.bfloat16)
        torch.testing.assert_close(actual.double(), first + second, rtol=1e-4, atol=1e-5)

    @both_backends
    def test_extreme_values(self, backend):
        inputs = self.make(3)
        with torch.no_grad():
            for feature in inputs[:3]:
                feature[0, 0] = 3.0  # constant rows
                feature[0, 1] = 0.0
                feature[0, 2] *= 1e17
                feature[1, 0] += 1e4
        output = self.run(inputs, 3, backend)
        wanted, _ = self.expected(inputs, 3)
        torch.testing.assert_close(output.double(), wanted, rtol=1e-2, atol=1e-2)  # sums near 1e4 have lost digits
        assert_all_finite(output, inputs)

    @needs_triton
    @pytest.mark.parametrize("n", [3, 18])
    @pytest.mark.parametrize("norm", [True, False])
    def test_every_output_is_written(self, norm, n, poison):
        inputs = self.make(n, 33, norm, rows=(7,))
        assert_all_finite(self.run(inputs, n, "triton"), inputs)

    @needs_triton
    def test_two_runs_give_the_same_bits(self):
        assert_same_bits(lambda *inputs: self.run(inputs, 3, "triton"), self.make(3, 130, rows=(50,)))

    @both_backends
    def test_no_rows(self, backend):
        inputs = self.make(3, rows=(0, 4))
        output = self.run(inputs, 3, backend)
        assert output.shape == (0, 4, 24)
        for gradient in torch.autograd.grad(output.sum(), inputs):
            assert (gradient == 0).all()

    @needs_triton
    @pytest.mark.parametrize("norm", [True, False])
    def test_operator_is_registered_correctly(self, norm):
        *features, weight = self.make(2, 12, False, rows=(2, 3))
        parameters = [torch.ones(12, device=DEVICE, requires_grad=True) for _ in range(2)] if norm else [None, None]
        arguments = (features, weight, *parameters, 1e-5, torch.float32, True)
        torch.library.opcheck(torch.ops.vim2.weighted_average, arguments)

    @both_backends
    def test_compiles_without_graph_breaks(self, backend):
        assert_compiles(lambda *inputs: self.run(inputs, 3, backend), self.make(3, 12, rows=(2, 3)))

    @both_backends
    def test_checkpointing_changes_nothing(self, backend):
        inputs = self.make(3, 12, rows=(2, 3))
        plain = gradients(self.run(inputs, 3, backend), inputs)
        output = checkpoint(lambda *inputs: self.run(inputs, 3, backend), *inputs, use_reentrant=False)
        for a, b in zip(gradients(output, inputs), plain):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(weight=torch.ones(3)), "2 features do not fit 3 weights"),
            (dict(features=[], weight=torch.ones(0)), "0 features do not fit 0 weights"),
            (dict(features=[torch.zeros(2, 4), torch.zeros(4)]), "of one shape"),
            (dict(features=[torch.zeros(()), torch.zeros(())]), "got scalars"),
            (dict(norm_weight=torch.ones(5)), r"both be \(4,\).*norm_weight is \(5,\)"),
            (dict(norm_bias=torch.ones(1)), r"norm_bias is \(1,\)"),
        ],
    )
    def test_bad_input(self, change, message):
        arguments = dict(
            features=[torch.zeros(2, 4)] * 2, weight=torch.ones(2), norm_weight=torch.ones(4), norm_bias=torch.ones(4)
        )
        with pytest.raises(ValueError, match=message):
            weighted_average_norm(**{**arguments, **change})


@both_backends
@pytest.mark.parametrize(("n", "dtype"), [(3, torch.float32), (2, torch.bfloat16), (18, torch.float32)])
def test_gradients_of_features_that_are_handed_on_are_those_that_autograd_adds_up(n, dtype, backend):
    """Bit by bit, but for products that a GPU adds unrounded; a feature may be used no more."""
    features, weight = make(n, dtype)
    features = [f.detach().to(DEVICE).requires_grad_() for f in features]
    parameters = [t.detach().to(DEVICE, torch.float32).requires_grad_() for t in (weight, torch.ones(4), torch.ones(4))]

    def gradients_of(passes, unused):
        given, total = features, 0
        for scale in (1, 3):
            if passes:
                y, *given = weighted_average_norm_handing_on(given, *parameters, backend=backend)
            else:
                y = weighted_average_norm(given, *parameters, backend=backend)
            total = total + scale * y.float().square().sum()
        if unused < n:
            total = total + weighted_average(given[unused:], parameters[0][unused:], backend).sum()
        return torch.autograd.grad(total, [*features, *parameters])

    # the interpreter rounds bfloat16 otherwise
    exact = backend == "torch" or (DEVICE == "cpu" and dtype == torch.float32)
    tolerance = 0.0 if exact else 1e-6 if dtype == torch.float32 else 0.02
    for unused in (0, 1, n):
        for actual, expected in zip(gradients_of(True, unused), gradients_of(False, unused), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * float(expected.abs().max()))
