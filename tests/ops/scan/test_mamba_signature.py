"""selective_scan_fn against mamba-ssm's published semantics, written out for one sequence of one channel."""

import pytest
import torch
import torch.nn.functional as F

from vim2.ops import selective_scan_fn


class TestMambaSignature:
    batch, channels, length, n = 2, 6, 70, 3

    def make(self, groups=None, constant=False):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        b, d, length, n = self.batch, self.channels, self.length, self.n
        shape = (d, n) if constant else (b, n, length) if groups is None else (b, groups, n, length)
        A = (-torch.rand(d, n, generator=generator, dtype=torch.float64) - 0.1).requires_grad_()
        return dict(
            u=randn(b, d, length), delta=randn(b, d, length), A=A, B=randn(*shape), C=randn(*shape),
            D=randn(d), z=randn(b, d, length), delta_bias=randn(d),
        )  # fmt: skip

    def expected(self, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        delta = delta if delta_bias is None else delta + delta_bias[:, None]
        delta = F.softplus(delta) if delta_softplus else delta

        def per_channel(t):  # -> (batch, D, N, L)
            if t.dim() == 2:
                return t[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
            t = t.unsqueeze(1) if t.dim() == 3 else t
            return t.repeat_interleave(u.shape[1] // t.shape[1], dim=1)

        B, C = per_channel(B), per_channel(C)
        h, ys = 0, []
        for t in range(u.shape[2]):
            h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
            ys.append((h * C[..., t]).sum(-1))
        y = torch.stack(ys, -1)
        y = y if D is None else y + D[:, None] * u
        return (y if z is None else y * F.silu(z)), h

    @pytest.mark.parametrize("softplus", [False, True])
    @pytest.mark.parametrize(
        "kind", [dict(), dict(groups=1), dict(groups=2), dict(groups=6), dict(constant=True)], ids=str
    )
    @pytest.mark.parametrize("c_kind", [None, dict(), dict(groups=3), dict(constant=True)], ids=str)
    def test_matches(self, kind, c_kind, softplus):
        arguments = self.make(**kind)
        if c_kind is not None:  # B and C need not be of one kind
            arguments["C"] = self.make(**c_kind)["C"]
        if not softplus:  # steps must be positive for the scan to be stable
            arguments["delta"] = arguments["delta"].detach().abs().requires_grad_()
            arguments["delta_bias"] = arguments["delta_bias"].detach().abs().requires_grad_()
        actual = selective_scan_fn(**arguments, delta_softplus=softplus, return_last_state=True, backend="torch")
        expected = self.expected(**arguments, delta_softplus=softplus)
        for a, e in zip(actual, expected):
            torch.testing.assert_close(a, e)
        inputs = list(arguments.values())
        for a, e in zip(
            torch.autograd.grad([t.square().sum() for t in actual], inputs),
            torch.autograd.grad([t.square().sum() for t in expected], inputs),
        ):
            torch.testing.assert_close(a, e)

    def test_a_gate_of_another_dtype_leaves_the_outputs_alone(self):
        arguments = {k: t.detach().bfloat16() for k, t in self.make().items()}
        arguments["z"] = arguments["z"].float()
        assert selective_scan_fn(**arguments, backend="torch").dtype == torch.bfloat16

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_is_rounded_once_behind_the_gate(self, dtype):
        arguments = {k: t.detach().to(dtype) for k, t in self.make().items()}
        wide = {k: t.float() for k, t in arguments.items()}
        y = selective_scan_fn(**arguments, delta_softplus=True, backend="torch")
        assert torch.equal(y, selective_scan_fn(**wide, delta_softplus=True, backend="torch").to(dtype))

    @pytest.mark.parametrize("kinds", [(dict(), dict(constant=True)), (dict(groups=2), dict(groups=3))], ids=str)
    def test_gradients_of_what_channels_share_are_added_before_they_are_rounded(self, kinds):
        arguments = {k: t.detach().bfloat16() for k, t in self.make().items() if k != "z"}
        arguments["B"], arguments["C"] = (self.make(**kind)["B"].detach().bfloat16() for kind in kinds)
        half, wide = (
            {k: t.to(dtype, copy=True).requires_grad_() for k, t in arguments.items()}
            for dtype in (torch.bfloat16, torch.float32)
        )
        for given in (half, wide):
            selective_scan_fn(**given, delta_softplus=True, backend="torch").sum().backward()
        for name in ("B", "C"):
            assert torch.equal(half[name].grad, wide[name].grad.bfloat16()), name

    def test_optional_arguments(self):
        arguments = {k: v for k, v in self.make().items() if k in ("u", "A", "B", "C")}
        arguments["delta"] = torch.rand(self.batch, self.channels, self.length, dtype=torch.float64)
        torch.testing.assert_close(selective_scan_fn(**arguments, backend="torch"), self.expected(**arguments)[0])

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(A=torch.ones(6, 3, dtype=torch.complex64)), "complex"),
            (dict(A=torch.ones(5, 3)), "A must be"),
            (dict(B=torch.ones(2, 4, 3, 70)), "does not divide"),
            (dict(B=torch.ones(2, 3, 71)), "B must be"),
            (dict(C=torch.ones(2, 2, 4, 70)), "C must be"),
            (dict(delta=torch.ones(2, 6, 71)), "u and delta"),
            (dict(z=torch.ones(2, 6, 71)), "z must be"),
            (dict(D=torch.ones(7)), "D and delta_bias"),
            (dict(A=torch.ones(6, 0)), "a state or more"),
            (dict(u=torch.ones(2, 6, 70, dtype=torch.int64)), "got torch.int64"),
            (dict(B=torch.ones(6, 3, dtype=torch.int64)), "got torch.int64"),
        ],
    )
    def test_bad_input(self, change, message):
        with pytest.raises(ValueError, match=message):
            selective_scan_fn(**{**self.make(), **change})
