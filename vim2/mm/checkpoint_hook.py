"""Checkpoints of a run on disk: written before others are removed, and found again."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..checkpoints import read_checkpoint
from ..command.errors import UserError
from ..files import write_atomically
from .loading import allow_checkpoints

__all__ = ["find_newest_checkpoint"]

_LAST = "last_checkpoint"  # MMEngine's name for the file that names the newest checkpoint


class _LateRemoval:
    """A file backend that removes only when it is told that what is to stay has been written."""

    def __init__(self, backend: Any):
        self._backend = backend
        self._outdated = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._outdated.append((self._backend.remove, path))

    def rmtree(self, path: str) -> None:
        self._outdated.append((self._backend.rmtree, path))

    def remove_outdated(self, kept: set[str | None]) -> None:
        outdated, self._outdated = self._outdated, []
        for remove, path in outdated:
            if path not in kept:
                remove(path)


@HOOKS.register_module(name="CheckpointHook", force=True)
class _CheckpointHook(CheckpointHook):
    """MMEngine's, which would remove the old checkpoint, or the best one, before it writes the new one.

    Attributes:
        validated: Whether the validation of a step has been before its checkpoint is written, which then has the best
            checkpoint's name.
    """

    validated = False

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self.file_backend = _LateRemoval(self.file_backend)
        resumed = self._path(runner.epoch if self.by_epoch else runner.iter)
        if self.file_backend.isfile(resumed):  # to be written anew if a late validation finds it the best
            self.last_ckpt = resumed

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = []
        if self.max_keep_ckpts > 0 and step not in list(self.keep_ckpt_ids)[-1:]:
            kept = [*self.keep_ckpt_ids, step]
            outdated = [self._path(old) for old in kept[: -self.max_keep_ckpts]]
            self.keep_ckpt_ids.append(step)  # which drops the first
            # with those that are removed once this one stands: a run that is killed in between does so when resumed
            runner.message_hub.update_info("keep_ckpt_ids", kept)
        self.last_ckpt = self._path(step)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            self.filename_tmpl.format(step),
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta={**meta, "validated": self.validated},
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            write_atomically(Path(runner.work_dir, _LAST), self.last_ckpt)
            for path in outdated:
                if self.file_backend.isfile(path):
                    self.file_backend.remove(path)
                elif self.file_backend.isdir(path):  # DeepSpeed's are folders
                    self.file_backend.rmtree(path)
            self._remove_outdated()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        wanted = [name for name in getattr(self, "key_indicators", ()) if name != "auto" and name not in metrics]
        if metrics and wanted:
            raise UserError(
                f"default_hooks.checkpoint.save_best is {wanted[0]}, and the validation gives {', '.join(metrics)}: "
                "set it to one of these, and go on with --resume."
            )
        self.validated = True
        super()._save_best_checkpoint(runner, metrics)
        self.validated = False
        self._remove_outdated()  # where there is no last checkpoint that was written anew

    def _path(self, step: int) -> str:
        return self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))

    def _remove_outdated(self) -> None:
        best = [getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()]
        self.file_backend.remove_outdated({self.last_ckpt, *best})


def find_newest_checkpoint(work_dir: str, out_dir: str | None = None) -> str | None:
    """The newest checkpoint of a run that can be read; None where it has none.

    Args:
        work_dir: The run's.
        out_dir: The CheckpointHook's, where the config sets it.

    Raises:
        UserError: There are checkpoints, but none can be read.
    """
    work_dir = Path(work_dir).resolve()
    pointer = work_dir / _LAST
    last = pointer.read_text().strip() if pointer.is_file() else ""
    if "://" in last:  # on a storage server
        return last
    folders = [work_dir] + ([Path(out_dir, work_dir.name).resolve()] if out_dir and "://" not in out_dir else [])
    damaged = []
    allow_checkpoints()
    for path in _candidates(folders, pointer, last):
        try:
            checkpoint = read_checkpoint(path)
        except (FileNotFoundError, ValueError):
            damaged.append(path)
            continue
        if isinstance(checkpoint, dict) and {"meta", "message_hub"} <= checkpoint.keys():
            if damaged:
                names = " and ".join(path.name for path in damaged)
                # the runner, which has the logger, is built only when it is known where to go on from
                print(f"{names} cannot be read: the run goes on from {path.name}.", file=sys.stderr)
            return str(path)
    if damaged:
        raise UserError(
            f"None of the {len(damaged)} checkpoints in {work_dir} can be read, such as {damaged[0].name}: copy them "
            "again, or start anew without --resume."
        )
    return None


def _candidates(folders: list[Path], pointer: Path, last: str) -> Iterator[Path]:
    """Checkpoints to go on from, the best first: those written after the pointer, whose run was cut off in between; the
    one it names; then the others, for those that cannot be read. The newest come first."""
    paths = {path for folder in folders for path in folder.glob("*.pth") if not path.name.startswith("best_")}
    ordered = sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    if last:
        written = pointer.stat().st_mtime_ns
        # by its name alone first: a work dir may have been moved or copied
        named = [path for path in ordered if path.name == Path(last).name]
        named += [Path(last).resolve()] if Path(last).is_file() else []
        newer = [path for path in ordered if path.stat().st_mtime_ns > written]
        ordered = list(dict.fromkeys([*newer, *named, *ordered]))
    yield from ordered
