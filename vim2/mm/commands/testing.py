"""`vim2 mm test`: evaluate a detector or a segmenter from a config of MMDetection or MMSegmentation."""

import argparse
import copy
import os
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from ...command.errors import UserError
from ...command.options import Parser
from ...command.outputs import make_folder, make_folder_of
from ..annotations import lies_in
from ..config_loading import add_config_arguments, add_launcher_arguments, check_parts, choose_work_dir, load_config
from ..runner import build_data, build_runner, removed_unless_started, run_errors

__all__ = ["test"]


def test(argv: Sequence[str]) -> None:
    """Evaluate a detector or a segmenter.

    Args:
        argv: The command line, as OpenMMLab's tools/test.py has it.

    Raises:
        UserError: Anything that the user can put right.
    """
    parser = Parser(prog="vim2 mm test", description="Evaluate a detector or a segmenter.")
    add_config_arguments(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="path or address")
    add_launcher_arguments(parser)
    parser.add_argument("--tta", action="store_true", help="test-time augmentation: flips, and the config's scales")
    parser.add_argument(
        "--out", metavar="OUT", help="also write predictions: a .pkl of a detector's, or a folder of a segmenter's maps"
    )
    parser.add_argument("--show", action="store_true", help="show pictures of the predictions")
    parser.add_argument("--show-dir", metavar="DIR", help="write pictures of the predictions there")
    parser.add_argument("--wait-time", type=float, default=2, metavar="S", help="for each picture shown, in seconds")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.cfg_options)
    check_parts(config, args.config, "test")
    if args.show or args.show_dir:
        draw(config, args)
    if args.tta:
        augment(config)
    if args.out:
        write_predictions(config, args.out)
    prepare_outputs(config, args)
    with removed_unless_started(choose_work_dir(config, args)):
        runner = build_runner(config, args)
        build_data(runner, "test")
        for option, folder in (("--out", args.out), ("--show-dir", args.show_dir)):
            if folder and lies_in(runner.test_loop.dataloader.dataset, Path(folder)):
                problem = f"{option} {folder} holds what is tested on, which would be written over"
                raise UserError(f"{problem}: choose another folder.")
        # what runner.test() does, but strictly: by default, weights that do not fit would stay random
        runner.call_hook("before_run")  # where hooks make models of their own (EMAHook), which load as well
        runner.load_checkpoint(args.checkpoint, strict=True)
    with run_errors():
        runner.test_loop.run()
        runner.call_hook("after_run")


def prepare_outputs(config: Config, args: argparse.Namespace) -> None:
    """Raises UserError where predictions or pictures could not be written, before there are any."""
    if args.show_dir:
        make_folder(Path(args.show_dir), "--show-dir")
    if args.out:
        make = make_folder_of if config.get("default_scope") == "mmdet" else make_folder
        make(Path(args.out), "--out")


def draw(config: Config, args: argparse.Namespace) -> None:
    hook = config.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise UserError(f"--show and --show-dir need a visualization hook in default_hooks, which {args.config} lacks.")
    hook.update(draw=True, show=args.show, wait_time=args.wait_time, interval=1)
    if args.show_dir:
        if config.get("default_scope") == "mmdet":
            hook.test_out_dir = os.path.abspath(args.show_dir)  # relative, it would lie within the work dir
        else:
            config.visualizer.save_dir = args.show_dir


def augment(config: Config) -> None:
    if config.get("default_scope") == "mmdet":
        parts = {**config.model, **(config.model.get("roi_head") or {})}
        if parts.get("mask_head") or parts.get("panoptic_head"):
            raise UserError("MMDetection has no test-time augmentation of masks, only of boxes; leave out --tta.")
        nms = dict(type="nms", iou_threshold=0.5)
        config.setdefault("tta_model", dict(type="DetTTAModel", tta_cfg=dict(nms=nms, max_per_img=100)))
        if "tta_pipeline" not in config:
            config.tta_pipeline = flipped(innermost(config.test_dataloader.dataset).pipeline)
    elif "tta_model" not in config or "tta_pipeline" not in config:
        raise UserError("--tta needs tta_model and tta_pipeline in the config.")
    innermost(config.test_dataloader.dataset).pipeline = config.tta_pipeline
    config.model = dict(**config.tta_model, module=config.model)


def flipped(pipeline: list[dict]) -> list[dict]:
    """A detector's test pipeline, whose last step packs, once as it is and once mirrored."""
    pack = copy.deepcopy(pipeline[-1])
    meta_keys = pack.get("meta_keys", ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"))
    pack["meta_keys"] = tuple(dict.fromkeys((*meta_keys, "flip", "flip_direction")))
    flips = [dict(type="RandomFlip", prob=prob) for prob in (1.0, 0.0)]
    return [*pipeline[:-1], dict(type="TestTimeAug", transforms=[flips, [pack]])]


def innermost(dataset: dict) -> dict:
    while "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset


def write_predictions(config: Config, out: str) -> None:
    evaluators = config.test_evaluator if isinstance(config.test_evaluator, list) else [config.test_evaluator]
    if config.get("default_scope") == "mmdet":
        if not out.endswith((".pkl", ".pickle")):
            raise UserError(f"--out must be a .pkl file for a detector, got {out}.")
        config.test_evaluator = [*evaluators, dict(type="DumpDetResults", out_file_path=out)]
    else:
        for evaluator in evaluators:
            evaluator.update(output_dir=out, keep_results=True)
