"""`vim2 convert`: the weights of a vanilla VMamba-T, -S or -B as those of a ViM2 that computes the same."""

from collections.abc import Sequence
from pathlib import Path

from ..checkpoints import convert_vmamba, read_state_dict, save_checkpoint
from ..command.errors import UserError
from ..command.options import Parser
from ..command.outputs import keep_source
from ..command.progress import say

__all__ = ["convert"]


def convert(argv: Sequence[str]) -> None:
    """Turn a file with weights of VMamba into one of a ViM2, and say how to use it.

    Args:
        argv: The command line.

    Raises:
        UserError: A file that cannot be read or written, or is not of a vanilla VMamba.
    """
    parser = Parser(
        prog="vim2 convert",
        description="Turn the weights of a vanilla VMamba-T, -S or -B (v0: SS2D with d_state 16, ratio 2, gate, no "
        "MLP) into those of a ViM2 that computes the same: its channel mixers start as identity.",
    )
    parser.add_argument("input", metavar="IN", help="VMamba's checkpoint, .pth")
    parser.add_argument("output", metavar="OUT", help="where to write the ViM2 checkpoint, .pth")
    parser.add_argument(
        "--no-ema", action="store_true", help="take the model's own weights where IN also has their EMA"
    )
    args = parser.parse_args(argv)
    keep_source(args.input, args.output)
    try:
        state_dict = read_state_dict(args.input, use_ema=not args.no_ema)
        variant, converted = convert_vmamba(state_dict)
        name = Path(args.input).name
        terms = {"description": f"Converted from weights of vanilla VMamba, {name}, whose terms are its authors'."}
        save_checkpoint({"arch": variant, "terms": terms, "state_dict": converted}, args.output)
    except (OSError, ValueError) as error:
        message = f"{error.strerror}." if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(message) from error

    classes = converted["head.fc.weight"].shape[0] if "head.fc.weight" in converted else 0
    num_classes = "" if classes == 1000 else f", num_classes={classes}"
    total = sum(value.numel() for value in converted.values()) / 1e6
    given = sum(value.numel() for value in state_dict.values()) / 1e6
    say(
        f"Converted {len(state_dict)} weights ({given:.2f} M parameters) into {variant} ({total:.2f} M), {args.output}."
    )
    say("Its channel mixers are new and add nothing yet; fine-tuning lets them.\nUse it with\n")
    say("    import timm, vim2")
    say(f"    model = timm.create_model({variant!r}, checkpoint_path={args.output!r}{num_classes})")
