"""Packs: NumPy archives (.npz) that hold the encoded images of a data set in one file.

A pack has the arrays

    data      uint8, the bytes of all encoded images (WebP, PNG, JPEG, ...), one after the other
    offsets   n + 1 integers: image i is data[offsets[i]:offsets[i + 1]]
    labels    n integers: the class of each image, from 0
    wnids, names or classes   text: the name of each class; the first of these that is there counts
    split     optional, n integers: 0 to train on, 1 to validate on
"""

import glob
import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from timm.data.readers.reader import Reader
from timm.utils import natural_key

from ..command.errors import UserError, first_line
from .folders import read_class_map

__all__ = ["Pack", "PackReader", "find_packs", "is_pack", "open_packs", "read_pack"]

NAMES = ("wnids", "names", "classes")


@dataclass(frozen=True)
class Pack:
    """The checked content of one pack.

    Attributes:
        path: Its file.
        data: (bytes,) uint8.
        offsets: (n + 1,) int64.
        labels: (n,) int64.
        names: Names of the classes.
        split: (n,) int64 of 0 (to train on) and 1 (to validate on), or None.
    """

    path: Path
    data: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    names: list[str]
    split: np.ndarray | None


class PackReader(Reader):
    """A reader of timm's for the images of packs.

    Args:
        packs: Packs with the same classes.
        indices: The images to read of each pack.
        class_map: Class names and their indices, or a file with a class name a line; images of other classes are left
            out. The packs' own classes if None.
    """

    def __init__(
        self,
        packs: Sequence[Pack],
        indices: Sequence[np.ndarray],
        class_map: str | dict[str, int] | None = None,
    ):
        super().__init__()
        self.packs = packs
        names = packs[0].names
        self.class_to_idx = read_class_map(class_map) if class_map else {name: i for i, name in enumerate(names)}
        targets = [self.class_to_idx.get(name) for name in names]
        self.samples = [
            ((number, int(i)), targets[pack.labels[i]])
            for number, (pack, chosen) in enumerate(zip(packs, indices))
            for i in chosen
            if targets[pack.labels[i]] is not None
        ]

    @property
    def has_splits(self) -> bool:
        """Whether the packs tell which images are to be trained and validated on."""
        return any(pack.split is not None for pack in self.packs)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        (number, i), target = self.samples[index]
        pack = self.packs[number]
        return io.BytesIO(pack.data[pack.offsets[i] : pack.offsets[i + 1]].tobytes()), target

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        number, i = self.samples[index][0]
        path = self.packs[number].path
        return f"image {i} of {path.name if basename else path}"


def is_pack(name: str | os.PathLike | None) -> bool:
    """Whether a path, or a glob, names packs."""
    return name is not None and str(name).lower().endswith(".npz")


def read_pack(path: str | os.PathLike) -> Pack:
    """Read a pack and check that it is whole.

    Raises:
        UserError: It is missing, damaged, or its arrays do not fit together.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no pack {path}: give --data-dir an .npz file or the folder that holds it.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # NumPy's, zipfile's and zlib's; those of NumPy advise to read the file unsafely
        said = isinstance(error, OSError | zipfile.BadZipFile | zlib.error)
        raise UserError(
            f"{path} cannot be read as a pack{f' ({first_line(error)})' if said else ''}: it is damaged, or no .npz "
            "file of plain arrays. Copy it again or make it anew."
        ) from None

    def require(holds: bool, problem: str) -> None:
        if not holds:
            raise UserError(
                f"{path} is no whole pack of images: {problem}. Copy it again or make it anew: a pack has the arrays "
                "data, offsets, labels and names (docs/training.md)."
            )

    missing = [name for name in ("data", "offsets", "labels") if name not in arrays]
    require(not missing, f"it has no array {', '.join(missing)}")
    key = next((name for name in NAMES if name in arrays), None)
    require(key is not None, "it has none of the arrays wnids, names and classes")
    data, offsets, labels, names, split = (arrays.get(k) for k in ("data", "offsets", "labels", key, "split"))
    require(data.dtype == np.uint8 and data.ndim == 1, "data is not a row of bytes")
    for name, array in (("offsets", offsets), ("labels", labels), ("split", split)):
        require(array is None or (array.dtype.kind in "iu" and array.ndim == 1), f"{name} is not a row of integers")
    n = len(labels)
    require(len(offsets) == n + 1, f"{n} labels need {n + 1} offsets, and it has {len(offsets)}")
    require(
        split is None or len(split) == n, f"it has {n} labels and the split of {0 if split is None else len(split)}"
    )
    offsets, labels = offsets.astype(np.int64), labels.astype(np.int64)
    require(offsets[0] >= 0 and bool((np.diff(offsets) >= 0).all()), "its offsets do not rise")
    require(offsets[-1] <= len(data), f"its offsets reach to byte {offsets[-1]} of {len(data)}")
    require(names.dtype.kind == "U" and names.ndim == 1, f"{key} is not a row of text")
    names = names.tolist()
    require(len(set(names)) == len(names), f"{key} names a class twice")
    require(
        bool(((labels >= 0) & (labels < len(names))).all()), f"it has labels that none of its {len(names)} classes has"
    )
    require(split is None or bool(np.isin(split, (0, 1)).all()), "its split has other values than 0 and 1")
    return Pack(path, data, offsets, labels, names, None if split is None else split.astype(np.int64))


def find_packs(root: str | os.PathLike | None, pattern: str) -> list[Path]:
    """The packs in a folder that a name or a glob stands for, in natural order.

    Raises:
        UserError: There are none.
    """
    path = Path(root or "") / pattern
    if path.is_file():
        return [path]
    found = glob.glob(os.path.join(glob.escape(str(root or "")), pattern))
    if not found:
        raise UserError(
            f"There is no {path}: check --data-dir and the name of the split, put globs in quotation marks."
        )
    return [Path(name) for name in sorted(found, key=natural_key)]


def open_packs(
    root: str | os.PathLike | None,
    split: str,
    number: int | None,
    class_map: str | dict[str, int] | None = None,
) -> PackReader:
    """One split of a data set of packs.

    Args:
        root: A pack, or the folder of several.
        split: Of a folder, the name of a pack in it or a glob for several, which are joined. Of a pack only its name
            in messages.
        number: What stands for the split in a pack's own `split`: 0 or 1; None if nothing does.
        class_map: As for `PackReader`.

    Returns:
        The images; all of them where a single pack has no split.

    Raises:
        UserError: As `read_pack` and `find_packs`; packs of other classes; no images.
    """
    if is_pack(root):
        if is_pack(split):
            raise UserError(f"{root} is a pack itself: give --data-dir the folder that holds {split}.")
        pack = read_pack(root)
        if number is None:
            there = "no splits" if pack.split is None else "the splits train and validation"
            remedy = "leave it out to take all images" if pack.split is None else "name one of these"
            raise UserError(f"{root} has {there}, and none is {split}: {remedy}.")
        chosen = np.arange(len(pack.labels)) if pack.split is None else np.flatnonzero(pack.split == number)
        packs, indices = [pack], [chosen]
    else:
        packs = [read_pack(path) for path in find_packs(root, split)]
        for pack in packs:
            if pack.names != packs[0].names:
                raise UserError(f"{packs[0].path} and {pack.path} do not have the same classes in the same order.")
            if pack.split is not None:
                raise UserError(f"{pack.path} holds images to train and to validate on: give it as --data-dir.")
        indices = [np.arange(len(pack.labels)) for pack in packs]
    reader = PackReader(packs, indices, class_map)
    if not len(reader):
        where = ", of the classes that are asked for" if class_map else ""
        raise UserError(f"There are no images in {', '.join(str(pack.path) for pack in packs)} for {split}{where}.")
    return reader
