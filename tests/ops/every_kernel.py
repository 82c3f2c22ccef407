"""Runs every Triton kernel of vim2.ops, small and at odd sizes, for those who look at kernels from outside:

    compute-sanitizer --tool memcheck --kernel-name regex=^_.*_kernel python tests/ops/every_kernel.py

docs/contributing.md has all of it. test_every_kernel.py sees to it that no kernel is missing.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from vim2.ops import (
    BIDIRECTIONAL,
    CROSS_SCAN,
    depthwise_conv_silu,
    directional_conv_silu,
    layer_norm,
    norm_gate,
    patch_merging_norm,
    projected_scan,
    selective_scan,
    weighted_average,
    weighted_average_norm,
)
from vim2.ops.ahead import compile_ahead

KINDS = ("norms", "convolutions", "scans", "relay")


def forget_launches() -> None:
    """Make launches anew: those that are remembered were planned without what is patched now."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vim2.ops.") and ".triton." in name:
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@contextlib.contextmanager
def scan_form(form: str, groups: int = 1, rounds: int = 1) -> Iterator[None]:
    """Scans of whatever size in one form: "whole" sequences a program, "split" into chunks that run side by side, or
    "relay", by four warps that take turns, in slices of so many rounds with so many groups of steps in a segment."""
    from vim2.ops.scan.triton import forward_relay, schedule

    programs = 10**9 if form == "split" else 0
    plan = (groups, 16 * groups * rounds) if form == "relay" else None
    with (
        mock.patch.object(schedule, "programs_to_fill", lambda device: programs),
        mock.patch.object(schedule, "MAX_WHOLE", 0),
        mock.patch.object(forward_relay, "relay_plan", lambda *sizes: plan),
    ):
        forget_launches()
        yield
    forget_launches()


class Inputs:
    """Random tensors of a dtype, the same at every run."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        t = torch.randn(shape, generator=self.generator)
        return t.to(self.device, dtype or self.dtype).requires_grad_()

    def float(self, *shape: int) -> Tensor:
        return self(*shape, dtype=torch.float32)


def run_and_differentiate(function: Callable[..., Tensor], *inputs: Tensor, **options) -> None:
    y = function(*inputs, **options, backend="triton")
    torch.autograd.grad(y, [t for t in inputs if t.requires_grad], torch.ones_like(y))


def run_norms(new: Inputs) -> None:
    for width in (20, 96):
        parameters = new.float(width), new.float(width)
        run_and_differentiate(layer_norm, new(7, 5, width), *parameters)
        run_and_differentiate(norm_gate, new(14, width), new(14, width))
        for directions in (1, 4):
            y = new(2, 7, width // 4, directions, 4)
            run_and_differentiate(norm_gate, y, new(2, 7, width), *parameters)
        features = [new(2, 7, width) for _ in range(3)]
        weight = new.float(3)
        for function, more in ((weighted_average, ()), (weighted_average_norm, parameters)):
            y = function(features, weight, *more, backend="triton")
            torch.autograd.grad(y, (*features, weight, *more), torch.ones_like(y))
    run_and_differentiate(patch_merging_norm, new(2, 5, 3, 24), new.float(96), new.float(96))


def run_convolutions(new: Inputs) -> None:
    for shape in ((2, 5, 9, 20), (1, 1, 1, 8)):
        channels = shape[-1]
        run_and_differentiate(depthwise_conv_silu, new(*shape), new.float(channels, 1, 3, 3), new.float(channels))
    for shape, taps in (((37, 12, 16), 4), ((3, 1, 5), 3)):
        outputs = 2 * shape[-1]
        run_and_differentiate(directional_conv_silu, new(*shape), new.float(outputs, 1, taps), new.float(outputs))


def run_scan(new: Inputs, spatial: tuple[int, ...], orders: tuple[str, ...], features: int, n: int, batch: int) -> None:
    """By itself, and with its inputs projected."""
    k, rank = len(orders), 2
    walks = (batch, *spatial, k)
    A = (-torch.rand(k, features, n, generator=new.generator) * n).to(new.device).requires_grad_()
    tensors = (new(batch, *spatial, features), new(*walks, features), A, new(*walks, n), new(*walks, n))
    run_and_differentiate(selective_scan, *tensors, new.float(k, features), new.float(k, features), orders=orders)
    weights = new.float(k, rank + 2 * n, features), new.float(k, features, n)
    others = new.float(k, features), new.float(k, features), new.float(k, features, rank)
    with torch.autocast(new.device, torch.bfloat16, enabled=new.dtype == torch.bfloat16):
        u = new(*walks, features)
        run_and_differentiate(projected_scan, u, *weights, *others, orders=orders, separate_inputs=True)


def run_scans(new: Inputs) -> None:
    for form in ("whole", "split"):
        with scan_form(form):
            run_scan(new, (7, 13), CROSS_SCAN, 20, 5, 1)
            run_scan(new, (41,), BIDIRECTIONAL, 40, 16, 3)


def run_relay(new: Inputs) -> None:
    for groups, rounds in ((1, 1), (2, 2)):
        with scan_form("relay", groups, rounds):
            run_scan(new, (7, 13), CROSS_SCAN, 20, 11, 1)
            run_scan(new, (131,), BIDIRECTIONAL, 16, 16, 2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float32"], help="of activations; default %(default)s"
    )
    args = parser.parse_args(argv)
    runs = dict(zip(KINDS, (run_norms, run_convolutions, run_scans, run_relay)))
    calls = [(dtype, kind) for dtype in args.dtype for kind in args.kinds]

    def run(dtype: str, kind: str) -> None:
        runs[kind](Inputs(args.device, getattr(torch, dtype)))

    def run_all(x: Tensor) -> Tensor:
        for call in calls:
            run(*call)
        return x

    compile_ahead(run_all, [torch.zeros(1, device=args.device)])  # in threads, which would take minutes one by one
    for call in calls:
        run(*call)
        print(", ".join(reversed(call)), flush=True)
    if args.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
