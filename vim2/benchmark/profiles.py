"""Where a step's time goes: kinds of operators, each with its work and its floor, which command.py explains."""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..command.errors import UserError
from ..ops.backend import HAS_TRITON
from .launches import on_device
from .measuring import AMP, GIB, measure
from .models import create_model, model_steps, random_image


@dataclass
class Work:
    """What an operator moves and computes in one step."""

    calls: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    exponentials: float = 0.0


class CountWork(TorchDispatchMode):
    """Sums up the work of every operator that is called while the mode is on, also in backward passes.

    Bytes are those of inputs and outputs, once a call: what an operator moves if it keeps everything else on the chip.
    """

    WRITE_ONLY = ("copy_", "fill_", "zero_")

    def __init__(self):
        super().__init__()
        self.operators: dict[str, Work] = defaultdict(Work)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # inference mode brings operators whole that consist of others
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        is_view = {storage(t) for t in outputs} <= {storage(t) for t in inputs} and not func._schema.is_mutable
        if is_view or "empty" in name:  # memory that nothing is written to
            return out
        work = self.operators[func._schema.name]
        work.calls += 1
        read = {(t.data_ptr(), t.shape): stored_bytes(t) for t in inputs[name in self.WRITE_ONLY :]}
        work.bytes += sum(read.values()) + sum(map(stored_bytes, outputs))
        if name == "convolution_backward":  # the registry's count of it is wrong where there are groups
            grad, _, weight = args[:3]
            work.flops += 4 * grad.numel() * weight[0].numel()
        elif func.namespace == "aten":
            # `addmm_` multiplies as `addmm` does, of which alone the registry knows
            packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
            if packet in flop_registry:
                work.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args)}
        if func.namespace == "vim2" and {"u", "A"} <= named.keys():  # a scan: one for every state of every step
            work.exponentials += named["A"].numel() * named["u"].shape[:2].numel()
        return out


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def stored_bytes(t: Tensor) -> int:
    """Without what `expand` repeats."""
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride()) if stride)


def device_rates(args: argparse.Namespace) -> dict[str, float]:
    """Bytes, FLOPs (two a multiply-add) and exponentials a second of the GPU; the first two measured."""

    def rate(work: float, step: Callable[[], None]) -> float:
        return work / (measure(step, args)["ms"] / 1e3)

    source = torch.empty(GIB, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    factor = torch.randn(8192, 8192, device=args.device, dtype=AMP[args.amp] or torch.float32)
    rates = {
        "bytes": rate(2 * GIB, lambda: target.copy_(source)),
        "flops": rate(2 * 8192**3, lambda: factor @ factor),
    }
    if HAS_TRITON:
        from triton.runtime import driver

        index = torch.device(args.device).index or 0
        properties = driver.active.utils.get_device_properties(index)
        rates["exponentials"] = 16 * properties["multiprocessor_count"] * properties["sm_clock_rate"] * 1e3
    return rates


def operator_family(name: str) -> str:
    """The row of the profile in which an operator stands, from its qualified name."""
    namespace, _, name = name.partition("::")
    if namespace != "aten":
        return name
    if "conv" in name:
        return "convolutions"
    if "norm" in name:
        return "normalisations"
    if "attention" in name or "softmax" in name:
        return "attention"
    if name.removesuffix("_") in ("mm", "addmm", "bmm", "baddbmm", "linear"):
        return "products"
    if name in ("sum", "mean"):
        return "sums"
    if name in ("_to_copy", "cat", "clone", "constant_pad_nd", "copy_", "index", "roll", "stack"):
        return "copies"
    if name.endswith("_backward") and ("slice" in name or "select" in name):
        return "copies"
    return "element-wise"


def operator_times(step: Callable[[], None], operators: set[str], args: argparse.Namespace) -> dict[str, float]:
    """The device's ms in each of these operators in one step (the CPU's, on a CPU), by the profiler; "" is the rest."""
    cuda = args.device_type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(args.repeats):
            step()
        if cuda:
            torch.cuda.synchronize(args.device)
    times: dict[str, float] = defaultdict(float)
    on_device = 0.0
    for event in profiler.events():
        if event.device_type != DeviceType.CPU:
            on_device += 0.0 if event.is_user_annotation else event.time_range.elapsed_us()
            continue
        spent = sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total
        found = ""
        while event is not None:  # the outermost operator that was counted: what it calls itself is part of it
            found = event.name if event.name in operators else found
            event = event.cpu_parent
        times[found] += spent
    if cuda:
        times[""] = max(0.0, on_device - sum(ms for name, ms in times.items() if name))
    return {name: us / 1e3 / args.repeats for name, us in times.items()}


def profile_model(name: str, size: int, batch: int, mode: str, rates: dict[str, float], args) -> dict:
    """As `profile_step`, of a model's step."""
    step = model_steps(create_model(name, size, args.device), args)[mode]
    image = random_image(size, batch, args)
    row = {"model": name, "shape": f"{size} x {size}", "batch": batch, "mode": mode}
    return row | profile_step(lambda: step(image), rates, args, f"{name} at {size} pixels and batch {batch}")


def profile_step(step: Callable[[], None], rates: dict[str, float], args: argparse.Namespace, name: str) -> dict:
    """A step's time by families of operators, the longest first, each with its calls and what it moves and computes;
    its median time by the clock and, on a GPU, how many kernels and copies it launches.

    Raises:
        UserError: It runs out of memory.
    """
    whole = measure(step, args)
    if "ms" not in whole:
        raise UserError(f"{name}: {whole['error']}.")
    launches = {"launches": on_device(step, args)["launches"]} if args.device_type == "cuda" else {}
    with CountWork() as counted:
        step()
    times = operator_times(step, set(counted.operators), args)
    families: dict[str, dict] = {}
    for operator, work in counted.operators.items():
        empty = {"members": {}, "calls": 0, "ms": 0.0, "gb": 0.0, "gflop": 0.0, "gexp": 0.0}
        row = families.setdefault(operator_family(operator), empty)
        row["members"][operator.partition("::")[2]] = times.get(operator, 0.0)
        row["calls"] += work.calls
        row["ms"] += times.get(operator, 0.0)
        row["gb"] += work.bytes / 1e9
        row["gflop"] += work.flops / 1e9
        row["gexp"] += work.exponentials / 1e9
        if rates:
            floors = [getattr(work, kind) / rate * 1e3 for kind, rate in rates.items()]
            row["floor_ms"] = row.get("floor_ms", 0.0) + max(floors)
    rows = [{"operators": family} | row for family, row in families.items()]
    rows.append({"operators": "others", "ms": times.get("", 0.0)})
    rows.sort(key=lambda row: -row["ms"])
    return {"step_ms": whole["ms"], **launches, "profile": rows}
