"""Trainings that are cut off and resumed end with the weights that they would have had: exact positions and seeds.

What a step draws at random depends on the run's seed, the process and the step's number alone, and what a sample draws
on its place in the run too, whichever worker loads it. A checkpoint thus needs to hold no random states, and a resumed
run only passes over the indices of the batches that are done.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..command.errors import UserError
from ..command.processes import share
from ..command.runs import seed_everything

__all__ = ["LateValidation", "describe_data", "is_validation_due", "make_exact", "resume_data"]


class _Draw(NamedTuple):
    """A sample that is drawn for a batch: its index in the data set, and the numbers that seed what it draws."""

    index: int
    seeds: tuple[int, ...]


class _Dataset:
    """A data set, each of whose samples has a seed of its own and, in a loader's process, lies in shared memory, and
    whose errors name the file. All else is the data set's own, for hooks read and set its attributes."""

    def __init__(self, dataset: Any):
        self.__dict__["_wrapped"] = dataset

    def __reduce__(self):
        return _Dataset, (self._wrapped,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._wrapped, name, value)

    def __len__(self) -> int:
        return len(self._wrapped)

    def __iter__(self) -> Iterator:
        return iter(self._wrapped)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, _Draw):
            seed_everything(*index.seeds)
            index = index.index
        try:
            sample = self._wrapped[index]
            share(_tensors(sample), "use fewer num_workers of the dataloader, 0 for none, or a smaller batch_size")
            return sample
        except UserError:
            raise
        except Exception as error:  # every decoder and transform has its own ways to fail
            lines = str(error).strip().splitlines() or ["no reason given"]
            raise UserError(
                f"{_name(self._wrapped, index)} cannot be used: {type(error).__name__}: {lines[0].rstrip('.')}. Mend "
                "the file, or take it out of the data set.",
                one_process=True,
            ) from error


def _tensors(sample: Any) -> Iterator[Tensor]:
    """The tensors in a sample: its inputs, and what its labels hold."""
    if isinstance(sample, Tensor):
        yield sample
    elif isinstance(sample, Mapping | list | tuple | BaseDataElement):
        is_labels = isinstance(sample, BaseDataElement)
        values = sample.all_values() if is_labels else sample.values() if isinstance(sample, Mapping) else sample
        for value in values:
            yield from _tensors(value)


def _name(dataset: Any, index: int) -> str:
    try:
        return dataset.get_data_info(index)["img_path"]
    except (AttributeError, KeyError, TypeError):
        return f"sample {index}"


class _Batches:
    """The batches of a batch sampler, numbered through the run. All else is the sampler's own.

    Attributes:
        seeds: What the seeds of all samples begin with.
        number: The next batch's.
        done: How many of the next ones to pass over.
    """

    def __init__(self, batches: Any):
        self.batches = batches
        self.seeds = ()
        self.number = self.done = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[_Draw]]:
        for indices in self.batches:
            number, self.number = self.number, self.number + 1
            if self.done:
                self.done -= 1
            else:  # from 1, since a seed's last number 0 would count for nothing
                yield [_Draw(index, (*self.seeds, number, place)) for place, index in enumerate(indices, 1)]


class _Loader(DataLoader):
    """Starts its workers with the first batch that is asked for, when it is known where a resumed run goes on."""

    def __iter__(self) -> Iterator:
        yield from super().__iter__()


def make_exact(loader: DataLoader) -> DataLoader:
    """A loader with the same data set, batches and workers, whose batches depend on their numbers alone."""
    if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):  # which brings its own order
        return loader
    return _Loader(
        _Dataset(loader.dataset),
        batch_sampler=_Batches(loader.batch_sampler),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def describe_data(loader: DataLoader) -> dict[str, int | None]:
    """What a resumed run has to know: the sampler's seed, and the numbers of samples, batches and processes. Nothing of
    a loader that `make_exact` leaves as it is."""
    if not isinstance(loader.batch_sampler, _Batches):
        return {}
    seed = getattr(_sampler(loader), "seed", None)
    return dict(seed=seed, samples=len(loader.dataset), batches=len(loader), processes=get_world_size())


def resume_data(loop: EpochBasedTrainLoop | IterBasedTrainLoop, meta: dict[str, Any], path: str) -> None:
    """Let a loop, whose epoch and iteration are a checkpoint's, go on with the batch that comes next.

    Args:
        loop: Before its first batch.
        meta: The checkpoint's.
        path: The checkpoint's path, for messages.

    Raises:
        UserError: The data set has another number of images than the run.
    """
    now, before = describe_data(loop.dataloader), meta.get("data", {})
    if not now:
        return
    if before.get("samples", now["samples"]) != now["samples"]:
        raise UserError(
            f"{path} is of a training on {before['samples']} images, and train_dataloader now has {now['samples']}: "
            "put the data back, or start a new run from these weights, --cfg-options load_from=CHECKPOINT in place of "
            "--resume."
        )
    if before.get("seed") is not None:
        _sampler(loop.dataloader).seed = before["seed"]
    same = all(before.get(name, now[name]) == now[name] for name in ("batches", "processes"))
    done = loop.iter - loop.epoch * len(loop.dataloader)
    if isinstance(loop, EpochBasedTrainLoop):
        if same and 0 <= done <= len(loop.dataloader):
            loop.done = done
        else:
            same = False
    if not same:
        print_log(
            f"{path} was written with other batches or another number of processes: the run goes on, with other "
            "batches than it would have had.",
            "current",
            level=30,
        )


def is_validation_due(loop: EpochBasedTrainLoop | IterBasedTrainLoop, meta: dict[str, Any]) -> bool:
    """Whether a run was cut off between a checkpoint, whose `meta` this is, and the end of the validation after it."""
    if loop.runner.val_loop is None or meta.get("validated", True):  # MMEngine's own checkpoints do not say
        return False
    step, last = loop.iter, loop.max_iters
    if isinstance(loop, EpochBasedTrainLoop):
        if loop.iter != loop.epoch * len(loop.dataloader):
            return False
        step, last = loop.epoch, loop.max_epochs
    loop._decide_current_val_interval()
    return step >= loop.val_begin and (step % loop.val_interval == 0 or step == last)


class LateValidation(Hook):
    """Validates before a resumed run goes on: the best checkpoint, the schedule or an early end may depend on it."""

    priority = "LOWEST"  # when all other hooks are ready

    def before_train(self, runner: Runner) -> None:
        runner.val_loop.run()


def _sampler(loader: DataLoader) -> Any:
    """The sampler of indices, which loaders with a batch sampler keep there."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def _start(loop: EpochBasedTrainLoop | IterBasedTrainLoop, number: int, done: int) -> bool:
    """Say which batch comes next, and how many to pass over; False where the loader does not know."""
    if not isinstance(batches := loop.dataloader.batch_sampler, _Batches):
        return False
    batches.seeds = loop.runner.seed, get_rank()
    batches.number, batches.done = number, done
    return True


class _SeededSteps:
    def run_iter(self, *args) -> None:
        seed_everything(self.runner.seed, get_rank(), self.iter)
        super().run_iter(*args)


@LOOPS.register_module(name="EpochBasedTrainLoop", force=True)
class _EpochLoop(_SeededSteps, EpochBasedTrainLoop):
    """MMEngine's, which can go on within an epoch.

    Attributes:
        done: How many batches of the epoch to come the run had before it was cut off.
    """

    done = 0

    def run_epoch(self) -> None:
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        done, self.done = self.done, 0
        _start(self, self.iter - done, done)
        for i, batch in enumerate(self.dataloader, done):
            self.run_iter(i, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


@LOOPS.register_module(name="IterBasedTrainLoop", force=True)
class _IterationLoop(_SeededSteps, IterBasedTrainLoop):
    """MMEngine's, which loads no batch that a resumed run has had already."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dataloader_iterator = self._next_batches()

    def run(self) -> Any:
        try:
            return super().run()
        finally:
            self.dataloader_iterator.close()  # and with it the workers, which else prepare batches to no end

    def _next_batches(self) -> Iterator:
        # MMEngine's loop asks first for the batches that are done, and drops them
        if _start(self, 0, self.iter):
            yield from itertools.repeat(None, self.iter)
        for epoch in itertools.count():
            if epoch and hasattr(sampler := _sampler(self.dataloader), "set_epoch"):
                sampler.set_epoch(epoch)
            yield from self.dataloader
