"""Tiny images, options and processes for these tests."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

TOOL = Path(__file__).parents[2] / "tools" / "classify.py"
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}
TINY = ["--model", "test_vim2", "--img-size", "32", "-j", "0", "-b", "8", "--device", "cpu"]


def make_image(path: Path, colour, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(-30, 30, (36, 40, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (np.array(colour) + noise).clip(0, 255).astype("uint8")
    options = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(pixels).save(path, **options)


def make_folders(root: Path, train: int = 12, val: int = 5, suffix: str = ".png", colours=COLOURS) -> Path:
    """{train,val}/{red,green,blue}/*: noisy images of one colour, which a tiny model learns in an epoch or two."""
    for split, number in (("train", train), ("val", val)):
        for c, (name, colour) in enumerate(colours.items()):
            for i in range(number):
                make_image(root / split / name / f"{i}{suffix}", colour, 1000 * c + i + 500 * (split == "val"))
    return root


def tool(*argv, torchrun: int = 0, **kwargs) -> subprocess.Popen:
    """Start tools/classify.py in a process of its own, or several."""
    start = [sys.executable]
    if torchrun:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
    path = os.pathsep.join([str(TOOL.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        [*start, str(TOOL), *map(str, argv)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )
