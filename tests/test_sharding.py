"""Weights that are cut into a part for each process: of two with half of a batch each, loss and gradients are those of
one process with the whole batch."""

import timm
import torch
import torch.nn.functional as F
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import vim2  # noqa: F401 registers the models
from vim2.mixers import MambaMixerBlock

PROCESSES = 2


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vim2", depths=(2, 1), dims=(16, 24), channel_expand=(2.0, 1.0), num_classes=4)
    with torch.no_grad():
        for parameter in model.parameters():  # else some would have no gradient yet
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model


def shard(model: nn.Module, checkpointing: bool) -> nn.Module:
    """By FSDP2, block by block."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model.set_grad_checkpointing(checkpointing)
    for stage in model.stages:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_in_part(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2 * PROCESSES, 3, 36, 64, generator=generator), torch.arange(2 * PROCESSES)
    whole = make_model()
    expected_loss = F.cross_entropy(whole(x), y)
    expected_loss.backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    largest = max(grad.abs().max() for grad in expected.values())

    def compare(model, gradients_of):
        for _ in range(2):  # the second time, weights are gathered anew
            model.zero_grad()
            loss = F.cross_entropy(model(x.chunk(PROCESSES)[rank]), y.chunk(PROCESSES)[rank])
            loss.backward()
        loss = loss.detach()
        distributed.all_reduce(loss)
        torch.testing.assert_close(loss / PROCESSES, expected_loss.detach())
        gradients = gradients_of(model)
        assert gradients.keys() == expected.keys()
        for name, grad in gradients.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6 * float(largest), msg=name)

    for checkpointing in (False, True):
        compare(
            shard(make_model(), checkpointing),
            lambda model: {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()},
        )

    def of_flat_parameters(model):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {n.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for n, p in model.named_parameters()}

    wrapped = FullyShardedDataParallel(
        make_model(),
        auto_wrap_policy=ModuleWrapPolicy({MambaMixerBlock}),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    compare(wrapped, of_flat_parameters)
    distributed.destroy_process_group()


def test_two_processes_with_half_of_the_weights_each_train_as_one(tmp_path):
    multiprocessing.spawn(train_in_part, (str(tmp_path),), nprocs=PROCESSES)
