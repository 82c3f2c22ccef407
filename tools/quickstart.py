#!/usr/bin/env python
"""Train a small ViM2 on scikit-learn's handwritten digits, on any CPU, and look at what it learned.

tools/quickstart.sh runs this in an environment of its own. It uses nothing that `tools/classify.py` does not offer.
"""

from common.command import run_tool

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from PIL import Image

from vim2.classify import UserError, predict, train

TEST_IMAGES = 360  # the last fifth: other writers than those of the images before
PIXELS = 32  # the least that ViM2 takes
MODEL = dict(dims=(32, 64, 96, 128), depths=(1, 1, 1, 1), d_state=8)  # vim2_nano, narrower: 0.8 M parameters


def write_digits(folder: Path) -> None:
    """Write the digits, 8 x 8 pixels each, as folders {train,val}/{0..9} of enlarged PNGs."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("The quickstart's images come with scikit-learn: pip install scikit-learn.") from None
    digits = load_digits()
    shutil.rmtree(folder, ignore_errors=True)
    for i, (image, digit) in enumerate(zip(digits.images, digits.target)):
        split = "train" if i < len(digits.images) - TEST_IMAGES else "val"
        path = folder / split / str(digit) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((image * 255 / 16).round().astype("uint8"))
        grey.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for everything it makes")
    parser.add_argument("--epochs", type=int, default=15, help="default: %(default)s")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    data = args.output / "digits"
    write_digits(data)
    # a quickstart starts anew every time
    (args.output / "run" / "last.pth").unlink(missing_ok=True)
    run = train(
        data_dir=data,
        model="vim2_nano",
        model_kwargs=MODEL,
        img_size=PIXELS,
        crop_pct=1.0,
        epochs=args.epochs,
        batch_size=64,
        lr=2e-3,
        warmup_epochs=1,
        scale=(0.7, 1.0),
        hflip=0.0,  # a mirrored digit is another digit, or none
        color_jitter=0.0,
        workers=0,  # the images are tiny: reading them is quicker than starting processes for it
        output=args.output,
        experiment="run",
    )
    folder = Path(run["folder"])
    examples = sorted((data / "val").rglob("*.png"))[::15]
    predict(images=examples, checkpoint=folder / "best.pth", output=args.output, topk=3)
    path = os.environ.get("PYTHONPATH")
    command = (f"PYTHONPATH={path} " if path else "") + f"{sys.executable} {Path(__file__).with_name('classify.py')}"
    print(f"""
{run["best"]["top1"]:.2f} % of {TEST_IMAGES} test images right, after {time.perf_counter() - start:.0f} s.

  {folder / "best.pth"}: the trained model
  {folder / "curves.png"}: how it learned
  {args.output / "predictions.png"}: what it sees in {len(examples)} test images, and what they are
  {data}: the images

The same on images of your own, in a folder for each class:

  {command} train --data-dir YOUR_FOLDER --model vim2_nano --epochs 30 --experiment mine
  {command} predict SOME_IMAGE.jpg --checkpoint runs/mine/best.pth
""")


if __name__ == "__main__":
    sys.exit(run_tool(main))
