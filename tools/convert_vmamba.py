#!/usr/bin/env python
"""Turn the weights of a vanilla VMamba-T, -S or -B into those of a ViM2 that computes the same.

Usage: python tools/convert_vmamba.py IN OUT
"""

from common.command import run_tool

import argparse
import sys

from vim2.checkpoints import convert_vmamba, read_state_dict, save_checkpoint
from vim2.command.errors import UserError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Turn the weights of a vanilla VMamba-T, -S or -B (v0: SS2D with d_state 16, ratio 2, gate, no "
        "MLP) into those of a ViM2 that computes the same: its channel mixers start as identity."
    )
    parser.add_argument("input", metavar="IN", help="VMamba's checkpoint, .pth")
    parser.add_argument("output", metavar="OUT", help="where to write the ViM2 checkpoint, .pth")
    parser.add_argument(
        "--no-ema", action="store_true", help="take the model's own weights where IN also has their EMA"
    )
    args = parser.parse_args(argv)
    try:
        state_dict = read_state_dict(args.input, use_ema=not args.no_ema)
        variant, converted = convert_vmamba(state_dict)
        save_checkpoint({"arch": variant, "state_dict": converted}, args.output)
    except (OSError, ValueError) as error:
        message = f"{error.strerror}." if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(message) from error

    classes = converted["head.fc.weight"].shape[0] if "head.fc.weight" in converted else 0
    num_classes = "" if classes == 1000 else f", num_classes={classes}"
    total = sum(value.numel() for value in converted.values()) / 1e6
    given = sum(value.numel() for value in state_dict.values()) / 1e6
    print(
        f"Converted {len(state_dict)} weights ({given:.2f} M parameters) into {variant} ({total:.2f} M), {args.output}."
    )
    print("Its channel mixers are new and add nothing yet; fine-tuning lets them.\nUse it with\n")
    print("    import timm, vim2")
    print(f"    model = timm.create_model({variant!r}, checkpoint_path={args.output!r}{num_classes})")


if __name__ == "__main__":
    sys.exit(run_tool(main))
