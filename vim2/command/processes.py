"""Devices, and the processes that work together: one by default, several under torchrun."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import get_worker_info

from ..ops import backend
from .errors import UserError, first_line

__all__ = [
    "Processes",
    "choose_device",
    "ctrl_c_ignored",
    "ctrl_c_put_off",
    "die_of_ctrl_c",
    "free_memory",
    "require_backend",
    "share",
    "start_processes",
    "to_device",
]


@dataclass(frozen=True)
class Processes:
    """This process and its peers.

    Attributes:
        device: Where this process computes.
        rank: Its number; 0 writes files and speaks.
        world_size: How many there are.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, on this process's device."""
        value = value.to(self.device, copy=True)
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def maximum(self, value: Tensor) -> Tensor:
        """The element-wise maximum over all processes, on the CPU."""
        value = value.to(self.device, copy=True)
        if self.world_size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value.cpu()

    def finish(self) -> None:
        """Wait for all processes and part."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()


def choose_device(name: str | None = None) -> torch.device:
    """A device by name, such as "cuda", "cuda:1" or "cpu"; a GPU if there is one when None.

    Raises:
        UserError: An unknown device, or one that is not there or cannot be used, or not by VIM2_SCAN_BACKEND.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"Unknown device {name}: use --device cuda, cuda:0, or --device cpu.") from None
    if device.type == "cuda":  # nothing is tried out there, which would take memory of a GPU that another process uses
        if not torch.cuda.is_available():
            raise UserError("PyTorch finds no CUDA GPU here: leave --device out, or use --device cpu.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"There is no {device}: this machine has {torch.cuda.device_count()} GPUs, from cuda:0.")
        require_backend(device.type)
        return device
    try:
        torch.zeros(1, dtype=torch.float64, device=device).item()  # totals are float64
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = first_line(error).partition(". ")[0]  # behind which PyTorch may list all that it has
        raise UserError(f"The device {name} cannot be used ({reason}): try --device cpu.") from None
    require_backend(device.type)
    return device


def require_backend(device: str, name: str | None = None) -> None:
    """Raises UserError where a backend of the scan, by default the one that VIM2_SCAN_BACKEND names, cannot run here on
    a type of device."""
    try:
        backend.check_backend(name, device)
    except (RuntimeError, ValueError) as error:
        asked, way_out = f"The backend {name}", "choose another"
        if name is None:
            asked, way_out = f"VIM2_SCAN_BACKEND={backend.DEFAULT_BACKEND}", "unset it"
        raise UserError(f"{asked} cannot be used on {device} ({first_line(error)}): {way_out}.") from None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, for which a GPU's host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device, if it tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def start_processes(device: str | None, command: str) -> Processes:
    """Join the other processes if torchrun started several, and choose a device.

    Args:
        device: As `choose_device` takes it; with several processes on GPUs, each has its own.
        command: What to start in which way, for messages, such as "vim2 train".

    Raises:
        UserError: No such device, or a launch that cannot work.
    """
    device = choose_device(device)
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size == 1:
        if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
            raise UserError(
                "srun started several copies of this command, which would all do the same: start one a node, "
                f"srun --ntasks-per-node=1 torchrun --no-python --nproc-per-node=GPUS {command} ..."
            )
        return Processes(device)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but {missing[0]} is not set: start several processes with "
            f"torchrun --no-python --nproc-per-node={world_size} {command} ..., or unset WORLD_SIZE for one."
        )
    if device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started more processes than there are GPUs ({torch.cuda.device_count()}): "
                f"use --nproc-per-node={torch.cuda.device_count()}."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"The processes could not connect: {first_line(error)}", one_process=True) from None
    return Processes(device, dist.get_rank(), world_size)


@contextmanager
def ctrl_c_put_off() -> Iterator[None]:
    """Processes that are started meanwhile do not learn of Ctrl-C, which a terminal sends to them as well, unless they
    ask for it by `die_of_ctrl_c`: the one that started them says that it was stopped, and stops them."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    resource_tracker.ensure_running()  # else `multiprocessing` starts it in the midst of this, and then ends it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def ctrl_c_ignored() -> Iterator[None]:
    """For putting away what was stopped: a further Ctrl-C would leave processes running, which Python then waits for.

    Only the main thread is ever told of Ctrl-C, or can ignore it; in another nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def die_of_ctrl_c() -> None:
    """From now on, or at once if it came while it was put off, Ctrl-C ends this process without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def share(tensors: Iterable[Tensor], remedy: str) -> None:
    """Move what a process of a loader hands on into shared memory, here and not on its way: where that is full, PyTorch
    would lose it, and the one that waits for it would wait forever. In any other process nothing is done.

    Args:
        tensors: CPU tensors, which stay the same objects.
        remedy: What to do where they find no room, beside making room, such as "use fewer --workers".

    Raises:
        UserError: Shared memory is full.
    """
    if get_worker_info() is None:
        return
    for tensor in tensors:
        try:
            tensor.share_memory_()
        except RuntimeError as error:
            raise UserError(
                f"{tensor.nbytes / 1e6:.1f} MB of a batch do not fit into shared memory any more "
                f"({first_line(error)}): {remedy}, or make /dev/shm larger (Docker: --shm-size=8g).",
                one_process=True,
            ) from None
