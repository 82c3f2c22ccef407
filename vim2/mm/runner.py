"""From a config to MMEngine's Runner, and its errors: what `vim2 mm train`, `test` and `predict` have in common."""

import argparse
import contextlib
import math
import os
import re
import shutil
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import init_dist
from mmengine.fileio import LocalBackend, register_backend
from mmengine.model import PretrainedInit, is_model_wrapper
from mmengine.registry import RUNNERS, WEIGHT_INITIALIZERS
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from mmengine.utils.dl_utils import set_multi_processing
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..checkpoints import check_weights, explain_load_error, verify_archive
from ..command.errors import UserError, first_line
from ..command.outputs import make_folder
from ..command.processes import require_backend
from ..files import remove_leftovers, write_atomically
from ..vim2 import check_image
from .annotations import check_annotations
from .channels import check_channels
from .checkpoint_hook import find_newest_checkpoint
from .resuming import LateValidation, describe_data, is_validation_due, make_exact, resume_data

__all__ = [
    "build_data",
    "build_runner",
    "check_device",
    "checkpoint_errors",
    "removed_unless_started",
    "run_errors",
]


@contextlib.contextmanager
def removed_unless_started(folder: Path) -> Iterator[None]:
    """Removes the work dir of a run that a UserError ends before it starts, if it was made for that run.

    A Runner makes it, with a folder for its log and a copy of the config, before it looks at anything. Where there are
    two folders in it, another run has come meanwhile, and everything stays.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except UserError:
        if new and folder.is_dir() and sum(path.is_dir() for path in folder.iterdir()) < 2:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody else's files are in it
                for parent in new[1:]:
                    parent.rmdir()
        raise


def build_runner(config: Config, args: argparse.Namespace) -> Runner:
    """The Runner of a config.

    Beyond `Runner.from_cfg`: checkpoints are written so that a crash leaves the one before whole, a run is resumed from
    the newest that can be read and goes on as if it had not been cut off, one that cannot be loaded is a UserError, and
    on CPUs several processes work, through gloo.

    Args:
        config: From `load_config`, with the folder that `choose_work_dir` sets.
        args: Arguments, those of `add_launcher_arguments` among them.

    Raises:
        UserError: The work dir cannot be written to; what the config asks for cannot be built, or not on a CPU, or does
            not fit its backbone; a number that is not finite; no checkpoint to resume from that can be read;
            VIM2_SCAN_BACKEND names a backend that cannot be used here.
    """
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    config.launcher = args.launcher
    for name in ("optim_wrapper", "param_scheduler"):
        _check_numbers(config.get(name), name)
    register_backend("local", _AtomicBackend, force=True, prefixes="")
    make_folder(Path(config.work_dir), "--work-dir")
    remove_leftovers(config.work_dir)
    if config.get("resume") and not config.get("load_from"):
        hook = (config.get("default_hooks") or {}).get("checkpoint") or {}
        config.load_from = find_newest_checkpoint(config.work_dir, hook.get("out_dir"))
    require_backend(get_device())
    if get_device() == "cpu":
        _prepare_for_cpu(config)
    try:
        runner = RUNNERS.build(config) if "runner_type" in config else _Runner.from_cfg(config)
        check_channels(config.model, runner.model.module if is_model_wrapper(runner.model) else runner.model)
        return runner
    except UserError:
        raise
    except (AssertionError, AttributeError, FileNotFoundError, ImportError, KeyError, TypeError, ValueError) as error:
        # MMEngine wraps the constructor's own message, which is what helps
        raise UserError(re.sub(r"^class `(\w+)` in \S+: ", r"\1: ", first_line(error))) from error


def _check_numbers(config: Any, name: str) -> None:
    """Raises UserError for a NaN or an infinity, with which optimisers train to no end."""
    if isinstance(config, float) and not math.isfinite(config):
        raise UserError(f"{name} is {config} in the config: it must be a finite number.")
    items = (
        config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list | tuple) else ()
    )
    for key, value in items:
        _check_numbers(value, f"{name}.{key}")


def build_data(runner: Runner, split: str) -> None:
    """Build what a runner's loop needs before it starts: the data sets, which are looked at, and the optimiser.

    Args:
        runner: From `build_runner`.
        split: "train", which takes the data for validation with it, or "test".

    Raises:
        UserError: Files are missing or cannot be read, no image is left, the annotations do not fit the config, or its
            optimiser cannot be built.
    """
    for part in ("train", "val") if split == "train" and runner.cfg.get("val_cfg") is not None else (split,):
        try:
            loop = getattr(runner, f"{part}_loop")
        except ValueError as error:
            if "need at least one array" in str(error):  # what MMEngine says of an empty list of images
                name = {"train": "training", "val": "validation", "test": "testing"}[part]
                raise UserError(
                    f"no image for {name} is left: none has annotations, or none is large enough."
                ) from error
            raise UserError(f"the data of {part}_dataloader cannot be read: {first_line(error)}.") from error
        except Exception as error:  # JSON, image lists and loaders each have their own ways to fail
            if re.match(r"\w*Loop\.__init__", str(error)):
                raise UserError(f"{part}_cfg cannot be used: {first_line(error)}.") from error
            raise UserError(f"the data of {part}_dataloader cannot be read: {first_line(error)}.") from error
        check_annotations(loop.dataloader.dataset, runner.model, f"{part}_dataloader")
    if split == "train":
        try:
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        except (AssertionError, AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            optimizer = runner.cfg.optim_wrapper.get("optimizer")
            optimizer = optimizer.get("type") if isinstance(optimizer, dict) else optimizer
            problem = f"the optim_wrapper with the optimizer {optimizer} cannot be built"
            if isinstance(error, NotImplementedError):  # of MMDetection's and MMSegmentation's layer decay, wordless
                raise UserError(
                    f"{problem}: its constructor, {runner.cfg.optim_wrapper.get('constructor')}, does not know the "
                    "model's backbone. A ViM2's layers are known to ViM2LayerDecayOptimWrapperConstructor, with "
                    "paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.8)."
                ) from error
            raise UserError(f"{problem}: {first_line(error)}.") from error


@contextlib.contextmanager
def run_errors() -> Iterator[None]:
    """Turns what a user can put right, of what goes wrong while a runner runs, into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU's memory is full: use a smaller train_dataloader.batch_size, or model.backbone.with_cp=True.",
            one_process=True,
        ) from None
    except IndexError as error:
        if not re.match(r"Target \S+ is out of bounds", str(error)):
            raise
        raise UserError(
            f"a label of the data is not among the model's classes: {first_line(error)}. Compare num_classes and the "
            "annotations.",
            one_process=True,
        ) from error
    except UserError:
        raise
    except KeyError as error:
        text, frame = str(error.args[0]), traceback.extract_tb(error.__traceback__)[-1]
        parts = Path(frame.filename).parts
        if "evaluation" in parts and {"mmdet", "mmseg"} & {*parts} and " " in text:  # a metric's own words
            text = f"the config's evaluator cannot be used: {text}"
        elif " registry" not in text:  # what MMEngine builds as it starts: schedulers, for one
            raise
        raise UserError(f"{text.splitlines()[0].partition('. Please')[0]}.") from error
    except ValueError as error:
        if traceback.extract_tb(error.__traceback__)[-1].name != check_image.__name__:
            raise
        raise UserError(
            f"model.backbone cannot take what the pipeline gives: {error}",
            one_process=True,
        ) from error
    except RuntimeError as error:
        if "Expected to have finished reduction" not in str(error):
            raise
        raise UserError(
            "some of the model's parameters get no gradient, for which several processes would wait: leave stages that "
            "no head uses out of model.backbone.out_indices, or set find_unused_parameters=True in the config."
        ) from error


def check_device(device: str) -> None:
    """Raises UserError where there is no such device ("cpu", "cuda:1", ...), or VIM2_SCAN_BACKEND cannot run on it."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # a PyTorch without CUDA asserts
        raise UserError(f"--device {device} cannot be used here: {first_line(error)}.") from None
    require_backend(torch.device(device).type)


@contextlib.contextmanager
def checkpoint_errors(path: str) -> Iterator[None]:
    """Turns what goes wrong in loading the checkpoint at `path`, all weights of it, into a UserError."""
    try:
        if os.path.isfile(path):
            verify_archive(path)
        yield
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint at {path}.") from None
    except OSError as error:  # URLError is one, too
        raise UserError(f"The checkpoint at {path} cannot be read: {first_line(error)}.") from None
    except UserError:
        raise
    except Exception as error:  # pickles and models each have their own ways to fail
        text = str(error)
        if "state dict" in text or "state_dict" in text:
            text = textwrap.shorten(text, 300, placeholder=" ...")  # it may list hundreds of names
            raise UserError(
                f"{path} is not of this config's model; give the config it was trained with. {text}"
            ) from None
        raise UserError(
            f"{path} is damaged (copy or download it again), no checkpoint, or holds more than PyTorch's safe loader "
            f"reads: {explain_load_error(error)}."
        ) from error


class _Runner(Runner):
    """MMEngine's, which goes on from weights of this model only, and starts (load_from) from those of one with the same
    backbone: it would leave what does not fit at random, with a warning. It goes on exactly (`resuming`)."""

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args, **kwargs) -> DataLoader:
        built = Runner.build_dataloader(dataloader, *args, **kwargs)
        return built if isinstance(dataloader, DataLoader) else make_exact(built)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        if isinstance(loop, dict) and "by_epoch" in loop:  # MMEngine would take its own classes, not the registry's
            loop = {**loop, "type": "EpochBasedTrainLoop" if loop["by_epoch"] else "IterBasedTrainLoop"}
            del loop["by_epoch"]
        return super().build_train_loop(loop)

    def resume(self, filename: str, *args, **kwargs) -> None:
        super().resume(filename, *args, **kwargs)
        resume_data(self.train_loop, self._resumed_meta, filename)
        if is_validation_due(self.train_loop, self._resumed_meta):
            self.register_hook(LateValidation())

    def save_checkpoint(self, out_dir: str, filename: str, *args, meta: dict | None = None, **kwargs) -> None:
        meta = {**(meta or {}), "data": describe_data(self.train_dataloader)}
        super().save_checkpoint(out_dir, filename, *args, meta=meta, **kwargs)

    def load_checkpoint(self, filename: str, map_location: Any = "cpu", strict: bool = False, **kwargs) -> dict:
        with checkpoint_errors(filename):
            checkpoint = super().load_checkpoint(filename, map_location, strict or self._resume, **kwargs)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        _check_weights(model, checkpoint.get("state_dict", checkpoint), filename)
        self._resumed_meta = checkpoint.get("meta", {})
        return checkpoint


@WEIGHT_INITIALIZERS.register_module(name="Pretrained", force=True)
class _PretrainedInit(PretrainedInit):
    """MMEngine's, of the init_cfg of whole models and of other backbones than ViM2."""

    def __call__(self, module: nn.Module) -> None:
        with checkpoint_errors(self.checkpoint):
            super().__call__(module)


def _check_weights(model: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Heads may be new, for other classes; a backbone that is in part at random is a mistake."""
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    try:
        check_weights(weights, model.state_dict(), path)
    except ValueError as error:
        raise UserError(str(error)) from None
    shapes = {name: value.shape for name, value in weights.items()}
    wanted = {name: value.shape for name, value in model.state_dict().items() if name.startswith("backbone.")}
    wrong = [name for name, shape in wanted.items() if shapes.get(name) != shape and "num_batches" not in name]
    if wrong:
        raise UserError(
            f"{path} does not fit the model's backbone: of its {len(wanted)} weights, {len(wrong)} are missing or of "
            f"another shape, such as {wrong[0]}. Take a checkpoint of a model with this backbone; a backbone's alone "
            "goes into model.backbone.init_cfg."
        )


class _AtomicBackend(LocalBackend):
    """MMEngine's way to write files, but in one step each."""

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        write_atomically(filepath, obj)

    def put_text(self, obj: str, filepath: str | os.PathLike, encoding: str = "utf-8") -> None:
        write_atomically(filepath, obj.encode(encoding))


def _prepare_for_cpu(config: Config) -> None:
    """What MMEngine takes to be CUDA's, replaced by what CPUs have."""
    if config.get("optim_wrapper", {}).get("type") == "AmpOptimWrapper":
        raise UserError("mixed precision (--amp, AmpOptimWrapper) needs a GPU, and there is none.")
    if config.launcher == "none":
        return
    _replace_sync_bn(config.model)
    config.model_wrapper_cfg = {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "find_unused_parameters": config.get("find_unused_parameters", False),
        **config.get("model_wrapper_cfg", {}),
        "device_ids": None,  # which says that the model is on the CPU
    }
    environment = config.get("env_cfg", {})
    set_multi_processing(**environment.get("mp_cfg", {}), distributed=True)  # as the Runner does, before init_dist
    set_device, torch.cuda.set_device = torch.cuda.set_device, lambda device: None
    try:
        init_dist(config.launcher, **{**environment.get("dist_cfg", {}), "backend": "gloo"})
    finally:
        torch.cuda.set_device = set_device


def _replace_sync_bn(config: Any) -> None:
    """SyncBN has no form for CPUs: BN in its place, each process with its own statistics."""
    if isinstance(config, dict):
        if config.get("type") in ("SyncBN", "MMSyncBN"):
            config["type"] = "BN"
        for value in config.values():
            _replace_sync_bn(value)
    elif isinstance(config, list | tuple):
        for value in config:
            _replace_sync_bn(value)
