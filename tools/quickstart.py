#!/usr/bin/env python
"""Name what two photographs show, then teach ViM2 digits from few examples: from the shipped weights and from scratch.

tools/quickstart.sh runs this in an environment of its own. It uses nothing that `tools/classify.py` does not offer.
"""

from common.command import run_tool

import argparse
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from vim2.classify import UserError, predict, train

EXAMPLES = 10  # to train on, of each digit
TEST_IMAGES = 360  # the last fifth: other writers than those of the images before
PIXELS = 48
FEW_IMAGES = "-b 16 --lr 1e-3 --layer-decay 0.8 --epochs 8 --warmup-epochs 1"  # docs/training.md says why


def find_photographs() -> list[Path]:
    """Those that come with scikit-learn."""
    try:
        import sklearn.datasets
    except ImportError:
        raise UserError("The quickstart's images come with scikit-learn: pip install scikit-learn.") from None
    return sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))


def write_digits(folder: Path) -> None:
    """Write handwritten digits, 8 x 8 pixels each, as folders {train,val}/{0..9} of enlarged PNGs."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    shutil.rmtree(folder, ignore_errors=True)
    written = [0] * 10
    first_test = len(digits.images) - TEST_IMAGES
    for i, (image, digit) in enumerate(zip(digits.images, digits.target)):
        written[digit] += 1
        if i < first_test and written[digit] > EXAMPLES:
            continue
        path = folder / ("train" if i < first_test else "val") / str(digit) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((image * 255 / 16).round().astype("uint8"))
        grey.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(path)


def learn(model: str, data: Path, output: Path, name: str, epochs: int, pretrained: bool) -> dict[str, Any]:
    """Train on the digits; both ways get the same options, but for where they start."""
    # a quickstart starts anew every time
    (output / name / "last.pth").unlink(missing_ok=True)
    return train(
        data_dir=data,
        model=model,
        pretrained=pretrained,
        img_size=PIXELS,
        epochs=epochs,
        batch_size=20,
        lr=1e-3,
        warmup_epochs=1,
        scale=(0.7, 1.0),
        hflip=0.0,  # a mirrored digit is another digit, or none
        color_jitter=0.0,
        log_interval=1000,
        workers=0,  # the images are tiny: reading them is quicker than starting processes for it
        output=output,
        experiment=name,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for everything it makes")
    of = "whose weights come with the package: %(default)s, or the paper's kind, vim2_nano"
    parser.add_argument("--model", default="vim2_nano_token_d1", help=of)
    parser.add_argument("--epochs", type=int, default=8, help="on the digits; default: %(default)s")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    out, data = args.output, args.output / "digits"

    print("What the shipped weights, of 200 kinds of things, see in two photographs:", flush=True)
    predict(images=find_photographs(), model=args.model, pretrained=True, output=out / "photographs")
    print("(A pagoda and a dahlia. Neither is among the 200, so it names what comes nearest.)")

    print(f"\nTen digits, from {EXAMPLES} examples of each. From the shipped weights:", flush=True)
    write_digits(data)
    shipped = learn(args.model, data, out, "shipped", args.epochs, pretrained=True)
    print("\nThe same from scratch:", flush=True)
    scratch = learn(args.model, data, out, "scratch", args.epochs, pretrained=False)
    folder = Path(shipped["folder"])
    examples = sorted((data / "val").rglob("*.png"))[::15]
    print(f"\nWhat the first sees in {len(examples)} test images:", flush=True)
    predict(images=examples, checkpoint=folder / "best.pth", output=out / "digits_seen", topk=3)

    path = os.environ.get("PYTHONPATH")
    words = [sys.executable, str(Path(__file__).with_name("classify.py"))]
    command = " ".join([*([f"PYTHONPATH={shlex.quote(path)}"] if path else []), *map(shlex.quote, words)])
    rows = [
        f"  {title:>21}" + "".join(f"{row['top1']:7.1f}" for row in run["history"])
        for title, run in (("from shipped weights", shipped), ("from scratch", scratch))
    ]
    print(f"""
Of {TEST_IMAGES} test images, % right after each of {args.epochs} epochs ({time.perf_counter() - start:.0f} s in all):

{chr(10).join(rows)}

  {out / "photographs" / "predictions.png"}: what the shipped weights see in the photographs
  {out / "digits_seen" / "predictions.png"}: what the fine-tuned model sees in {len(examples)} digits, and what they are
  {folder / "best.pth"}, {folder / "curves.png"}: the fine-tuned model, and how it learned
  {data}: the images

The same on images of your own, in a folder for each class:

  {command} train --data-dir YOUR_FOLDER --model {args.model} --pretrained {FEW_IMAGES} --experiment mine
  {command} predict SOME_IMAGE.jpg --checkpoint runs/mine/best.pth
""")


if __name__ == "__main__":
    sys.exit(run_tool(main))
