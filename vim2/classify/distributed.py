"""The processes that work together: one by default, several under torchrun."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError

__all__ = ["Processes", "start_processes"]


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


def start_processes(device: str | None = None) -> Processes:
    """Join the other processes if torchrun started several, and choose a device.

    Args:
        device: "cuda", "cuda:1", "cpu", ...; a GPU if there is one when None.

    Raises:
        UserError: No such device, or a launch that cannot work.
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"Unknown device {device}: use cuda, cuda:0, cpu or another of PyTorch's.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no CUDA GPU here: leave --device out, or use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"There is no {device}: this machine has {torch.cuda.device_count()} GPUs, from cuda:0.")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            raise UserError(
                "srun started several copies of this command, which would all do the same: start one a node, "
                "srun --ntasks-per-node=1 torchrun --nproc-per-node=GPUS tools/classify.py ..."
            )
        return Processes(device)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but {missing[0]} is not set: start several processes with "
            f"torchrun --nproc-per-node={world_size} tools/classify.py ..., or unset WORLD_SIZE for one."
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
        raise UserError(f"The processes could not connect: {str(error).splitlines()[0]}", one_process=True) from None
    return Processes(device, dist.get_rank(), world_size)
