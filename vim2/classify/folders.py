"""Class folders: a folder of images for each class, in a folder or in a tar archive.

Classes are the first level of folders. All else, such as images one folder deeper, is left out and counted.
"""

import dataclasses
import functools
import io
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from timm.data.readers.reader import Reader
from timm.utils import natural_key

from ..command.errors import UserError, first_line
from ..command.images import (
    EMPTY,
    HIDDEN,
    OTHER_SUFFIXES,
    SPECIAL,
    SUFFIXES,
    UNKNOWN,
    ImageFolder,
    describe_left_out,
    first_names,
    is_image,
)
from ..command.processes import free_memory

__all__ = ["ClassFolderReader", "TarFolder", "find_split", "is_tar", "open_class_folders", "read_class_map"]

SPLITS = (
    ("train", "training"),
    ("val", "valid", "validation", "eval", "evaluation"),
)  # folder names that mean the same
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

ABOVE = "beside the class folders"
DEEPER = "deeper than the class folders"


class ClassFolderReader(Reader):
    """A reader of timm's for class folders.

    Args:
        source: The folder, or the tar's, that holds them.
        class_map: Class names and their indices; images of other classes are left out. If None, the folders that hold
            images, in natural order.

    Attributes:
        samples: The images' paths within the source, and their classes.
        class_to_idx: The classes' names and their indices.
        left_out: A line about what is no image of a class folder, or nothing.
    """

    def __init__(self, source: "ImageFolder | TarFolder", class_map: Mapping[str, int] | None = None):
        super().__init__()
        self.source = source
        inside: dict[int, list[str]] = {0: [], 1: [], 2: []}
        for name in source.images:
            inside[min(name.count("/"), 2)].append(name)
        names = sorted({name.split("/")[0] for name in inside[1]}, key=lambda name: (natural_key(name), name))
        self.class_to_idx = dict(class_map) if class_map else {name: i for i, name in enumerate(names)}
        targets = [(name, self.class_to_idx.get(name.split("/")[0])) for name in inside[1]]
        self.samples = [(name, target) for name, target in targets if target is not None]
        self.left_out = describe_left_out(source, {ABOVE: inside[0], DEEPER: inside[2], **source.left_out})

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        name, target = self.samples[index]
        return self.source.open(name), target

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.samples[index][0]
        return posixpath.basename(name) if basename else self.source.name(name) if absolute else name


@dataclass(frozen=True)
class TarFolder:
    """The images in a tar archive, or in a folder of it.

    Attributes:
        path: The archive.
        members: The images' paths from that folder, in natural order: where they begin in the archive and how many
            bytes they have or, in a compressed one, these bytes.
        left_out: Why, as it is said after a number, and what was left out of the folder.
        folder: Its path in the archive, with a "/" at its end; empty for the archive itself.
    """

    path: Path
    members: dict[str, tuple[int, int] | bytes]
    left_out: dict[str, list[str]]
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.path}{'/' if self.folder else ''}{self.folder.rstrip('/')}"

    @property
    def images(self) -> list[str]:
        return list(self.members)

    def inside(self, name: str) -> "TarFolder | None":
        """A folder of this one; None if it holds no images."""
        start = f"{name}/"
        members = {path[len(start) :]: value for path, value in self.members.items() if path.startswith(start)}
        left_out = {
            why: [path[len(start) :] for path in paths if path.startswith(start)]
            for why, paths in self.left_out.items()
        }
        return TarFolder(self.path, members, left_out, self.folder + start) if members else None

    def open(self, name: str) -> BinaryIO:
        """Open one of the images."""
        value = self.members[name]
        if isinstance(value, bytes):
            return io.BytesIO(value)
        first, size = value
        with open(self.path, "rb") as file:  # opened anew, since threads and processes share this
            file.seek(first)
            return io.BytesIO(file.read(size))

    def name(self, name: str) -> str:
        """What to call one of the images in a message."""
        return f"{self}/{name}"


def is_tar(path: object) -> bool:
    """Whether a path is that of a tar archive, compressed or not."""
    return isinstance(path, str | os.PathLike) and str(path).lower().endswith(TARS) and Path(path).is_file()


def open_tar(path: str | os.PathLike) -> TarFolder:
    """List the images of a tar archive. Those of a compressed one, in which nothing can be found without reading all
    before it, are held in memory.

    Returns:
        The images; if a single folder holds everything, and is no class, those of that folder.

    Raises:
        UserError: The archive is damaged, or too large for memory.
    """
    info = os.stat(path)
    folder = TarFolder(Path(path), *_read_tar(str(path), info.st_size, info.st_mtime_ns))
    while len({name.split("/")[0] for name in folder.images}) == 1 and all(n.count("/") > 1 for n in folder.images):
        top = folder.images[0].split("/")[0]
        left_out = {why: [posixpath.relpath(name, top) for name in names] for why, names in folder.left_out.items()}
        folder = dataclasses.replace(folder.inside(top), left_out=left_out)
    return folder


@functools.lru_cache(maxsize=1)  # splits are looked for, and then opened one by one
def _read_tar(path: str, size: int, mtime: int) -> tuple[dict[str, tuple[int, int] | bytes], dict[str, list[str]]]:
    """The `members` and `left_out` of a `TarFolder`. Size and time of change tell whether the file is the same."""
    members: dict[str, tuple[int, int] | bytes] = {}
    left_out: dict[str, dict[str, None]] = {HIDDEN: {}, SPECIAL: {}, UNKNOWN: {}}
    folders: dict[str, None] = {}
    held, free = 0, free_memory(torch.device("cpu"))
    try:
        compressed = _is_compressed(path)
        with tarfile.open(path, tarinfo=_Member) as tar:
            for member in tar:
                name = posixpath.normpath(member.name.lstrip("/"))
                parts = name.split("/")
                hidden = next((i for i, part in enumerate(parts) if part.startswith(".")), None)
                if member.isdir():
                    if hidden is None and name != ".":
                        folders[name] = None
                elif hidden is not None:
                    left_out[HIDDEN]["/".join(parts[: hidden + 1])] = None
                elif not member.isreg() or member.issparse():
                    left_out[SPECIAL][name] = None
                elif is_image(name, OTHER_SUFFIXES):
                    left_out[UNKNOWN][name] = None
                elif is_image(name):
                    held += member.size
                    if compressed and free is not None and held > free:
                        raise UserError(
                            f"{path} is compressed, and its images need more than the {free / 1e9:.1f} GB of memory "
                            "that are free: unpack it, and give --data-dir the folder."
                        )
                    members[name] = tar.extractfile(member).read() if compressed else (member.offset_data, member.size)
            while compressed and tar.fileobj.read(2**20):
                pass  # checksums come last
    except UserError:
        raise
    except Exception as error:  # tarfile and the readers of compressed files each have their own ways to fail
        reason = first_line(error).rstrip(":")
        raise UserError(f"{path} is no tar archive, or damaged ({reason}): copy or download it again.") from None
    held_by = {os.path.dirname(name) for names in (members, folders, *left_out.values()) for name in names}
    left_out[EMPTY] = dict.fromkeys(name for name in folders if name not in held_by)
    order = sorted(members, key=lambda name: (natural_key(name), name))
    return {name: members[name] for name in order}, {why: list(names) for why, names in left_out.items()}


class _Member(tarfile.TarInfo):
    """A member of an archive, which must be whole: tarfile itself takes a damaged member, or a missing end, for the end
    of the archive."""

    @classmethod
    def frombuf(cls, *args, **kwargs):
        try:
            return super().frombuf(*args, **kwargs)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"its end is missing or a member is damaged: {error}") from None


def _is_compressed(path: str) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return False
    except tarfile.ReadError:
        return True


def find_split(root: str | os.PathLike, split: str) -> Path | TarFolder | None:
    """The folder of a split, under its own name or one that means the same, in a folder or a tar archive."""
    names = (split, *next((group for group in SPLITS if split in group), ()))
    if is_tar(root):
        archive = open_tar(root)
        return next((found for name in names if (found := archive.inside(name))), None)
    paths = [Path(root) / name for name in names]
    return next((path for path in paths if path.is_dir() or is_tar(path)), None)


def open_class_folders(
    root: str | os.PathLike | TarFolder, class_map: Mapping[str, int] | None = None
) -> ClassFolderReader:
    """The images of class folders.

    Args:
        root: What holds them: a folder or tar archive, or a split of one.
        class_map: As for `ClassFolderReader`.

    Raises:
        UserError: It is neither, is damaged, or has no images in class folders.
    """
    if isinstance(root, TarFolder):
        source = root
    elif is_tar(root):
        source = open_tar(root)
    elif Path(root).is_dir():
        source = ImageFolder(Path(root))
    else:
        raise UserError(
            f"{root} is no folder, tar archive ({', '.join(TARS)}) or pack (.npz): unpack it, and give --data-dir the "
            "folder."
        )
    reader = ClassFolderReader(source, class_map)
    if reader.samples:
        return reader
    depths = {name.count("/") for name in source.images}
    if depths == {0}:
        raise UserError(
            f"The images all lie in {source} itself: put them into a folder for each of two classes or more."
        )
    known = f", in folders named as these classes: {first_names(list(class_map))}" if class_map else ""
    problem = f"There are no images in {source}{known}; expected a folder of images for each class"
    problem += f" ({', '.join(SUFFIXES)})"
    if depths and min(depths) > 1:
        problem += ", and these lie deeper: give --data-dir the folder that holds the class folders"
    raise UserError(f"{problem}. {reader.left_out}")


def read_class_map(class_map: str | os.PathLike | Mapping[str, int]) -> dict[str, int]:
    """Class names and their indices, from a text file with a name a line.

    Args:
        class_map: The file; or names and indices, which are returned.

    Raises:
        UserError: It cannot be read, is empty, or names a class twice.
    """
    if isinstance(class_map, Mapping):
        return dict(class_map)
    remedy = "give a text file with a class name a line"
    if not Path(class_map).is_file():
        raise UserError(f"There is no class map {class_map}: {remedy}.")
    try:
        text = Path(class_map).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the class map {class_map} ({error}): {remedy}.") from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    twice = [name for name, number in Counter(names).items() if number > 1]
    if not names or twice:
        problem = f"names {first_names(twice)} twice" if twice else "is empty"
        raise UserError(f"The class map {class_map} {problem}: {remedy}.")
    return {name: i for i, name in enumerate(names)}
