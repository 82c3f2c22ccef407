"""`vim2 mm train`: train a detector or a segmenter from a config of MMDetection or MMSegmentation."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.device import get_device
from mmengine.dist import get_dist_info

from ...command.errors import UserError
from ...command.options import Parser
from ...command.processes import Processes
from ...command.runs import identity, own_folder
from ..config_loading import add_config_arguments, add_launcher_arguments, check_parts, choose_work_dir, load_config
from ..runner import build_data, build_runner, removed_unless_started, run_errors

__all__ = ["train"]


def train(argv: Sequence[str]) -> None:
    """Train a detector or a segmenter.

    Args:
        argv: The command line, as OpenMMLab's tools/train.py has it.

    Raises:
        UserError: Anything that the user can put right.
    """
    parser = Parser(prog="vim2 mm train", description="Train a detector or a segmenter.")
    add_config_arguments(parser)
    add_launcher_arguments(parser)
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate to the real batch size")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without a name from the last one in the work dir, or from the start if none is",
    )
    args = parser.parse_args(argv)
    config = load_config(args.config, args.cfg_options)
    check_parts(config, args.config, "train")
    if args.amp:
        config.optim_wrapper.type = "AmpOptimWrapper"
        config.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise UserError(f"--auto-scale-lr needs auto_scale_lr.base_batch_size, which {args.config} does not set.")
        config.auto_scale_lr.enable = True
    if args.resume:
        if args.resume != "auto" and "://" not in args.resume and not os.path.isfile(args.resume):
            raise UserError(f"There is no checkpoint at {args.resume}.")
        config.resume = True
        config.load_from = None if args.resume == "auto" else args.resume
    with removed_unless_started(choose_work_dir(config, args)):
        runner = build_runner(config, args)
        build_data(runner, "train")
    folder = Path(runner.work_dir)
    processes = Processes(torch.device(get_device()), *get_dist_info())
    with own_folder(folder, identity(folder / "last.pth"), processes), run_errors():
        runner.train()
