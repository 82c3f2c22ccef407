"""Tiny images, options and processes for these tests."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from timm.utils import natural_key

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


def encoded(image, form: str = "PNG") -> bytes:
    """An image, or (H, W, 3) uint8 pixels, as the bytes of a file."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form)
    return file.getvalue()


def make_pack(path: Path, files: list[bytes], labels, names, split=None, key: str = "wnids", changed=None) -> Path:
    """A pack of encoded images; `changed` arrays go in place of the right ones."""
    arrays = {
        "data": np.frombuffer(b"".join(files), dtype=np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.array(labels, dtype=np.int16),
        key: np.array(names),
    }
    if split is not None:
        arrays["split"] = np.array(split, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: array for name, array in {**arrays, **(changed or {})}.items() if array is not None})
    return path


def pack_folders(root: Path, path: Path, splits=("train", "val"), with_split: bool = True) -> Path:
    """The images of {train,val}/*/* as a pack, in the order in which they are read from folders."""
    names = sorted({folder.name for split in splits for folder in (root / split).iterdir()})
    found = [
        (file.read_bytes(), c, number)
        for number, split in enumerate(splits)
        for c, name in enumerate(names)
        for file in sorted((root / split / name).iterdir(), key=lambda file: natural_key(str(file)))
    ]
    files, labels, numbers = zip(*found)
    return make_pack(path, list(files), labels, names, numbers if with_split else None)
