"""Image files, wherever a command reads them: which files of a folder are images, and what becomes of their pixels."""

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.utils import natural_key

from .errors import UserError

__all__ = [
    "EMPTY",
    "HIDDEN",
    "OTHER_SUFFIXES",
    "SPECIAL",
    "SUFFIXES",
    "UNKNOWN",
    "ImageFolder",
    "UnreadableImage",
    "describe_left_out",
    "first_names",
    "is_image",
    "read_image",
    "read_pixels",
    "to_8_bits",
    "upright",
]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
OTHER_SUFFIXES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".pgm", ".ppm")  # of images, too
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF

# what is left out of a folder, as it is said after a number
HIDDEN = "hidden"
LINKED_BACK = "linked back or to nothing"
SPECIAL = "neither file nor folder"
CLOSED = "not allowed to be opened"
EMPTY = "without an image"
UNKNOWN = f"named as other images than {', '.join(SUFFIXES)}"


class UnreadableImage(UserError):
    """A file that is missing, damaged, or no image."""


def is_image(name: str, suffixes: Sequence[str] = SUFFIXES) -> bool:
    """Whether a file is named as an image, of the formats that are read or of others."""
    return os.path.splitext(name)[1].lower() in suffixes


def read_image(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """Decode an image, of an animated one the first frame, and turn it `upright`.

    Args:
        file: Its path, or an open file.

    Raises:
        UnreadableImage: It is missing, damaged, larger than Pillow allows, or no image.
    """
    try:
        # opening a pipe would wait for somebody to write into it
        if isinstance(file, str | os.PathLike) and not stat.S_ISREG(os.stat(file).st_mode):
            raise OSError("it is no ordinary file")
        with Image.open(file) as image:
            image.load()
            return upright(image)
    except Exception as error:  # Pillow's readers each have their own ways to fail on a damaged file
        reason = "no format of an image is known in it" if isinstance(error, UnidentifiedImageError) else ""
        reason = reason or getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(f"{file} is no image that can be read ({reason}): leave it out or replace it.") from None


def upright(image: Image.Image) -> Image.Image:
    """A decoded image as it is to be seen, turned in place. Photographs carry their rotation aside, in EXIF data."""
    with contextlib.suppress(Exception):  # damaged EXIF data, which say nothing of the pixels
        ImageOps.exif_transpose(image, in_place=True)
    return image


def to_8_bits(image: Image.Image, mode: str) -> Image.Image:
    """An image with 8 bits a channel. Pillow's own `convert` cuts all values above 255 off instead.

    Args:
        image: An image of any of Pillow's modes; 16 bits a pixel are scaled, so that 65535 becomes 255.
        mode: "RGB" or "L".

    Raises:
        ValueError: Floats or 32-bit integers, of which nothing says where white is. The message wants the image's name
            before it.
    """
    # Pillow keeps 16 bits of these two formats as 32-bit integers, of PNG in older versions
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode == "F" or (image.mode == "I" and not is_16_bit):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ValueError(
            f"has {kind} pixels (mode {image.mode}), and nothing says which value of them is white: convert such "
            "images to 8 or 16 bits a channel."
        )
    if is_16_bit:
        tags: Mapping = getattr(image, "tag_v2", {})
        white = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
        values = np.asarray(image).astype(np.uint32)
        if tags.get(PHOTOMETRIC) == 0:  # 0 is white, which Pillow minds at 8 bits only
            values = white - values
        image = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
    return image.convert(mode)


def read_pixels(path: str | os.PathLike, mode: str = "RGB") -> Image.Image:
    """As `read_image`, with 8 bits a channel, as `to_8_bits` makes them.

    Raises:
        UnreadableImage: As `read_image`.
        UserError: As `to_8_bits`.
    """
    image = read_image(path)
    try:
        return to_8_bits(image, mode)
    except ValueError as error:
        raise UserError(f"{path} {error}") from None


@dataclass
class ImageFolder:
    """The images in a folder and the folders in it.

    Links are followed, but no folder is entered twice, nor one above. Hidden files and folders, links that lead back or
    to nothing, pipes, devices and images of other formats are left out, and so are folders in which there is nothing to
    mention, such as of a class whose images are missing.

    Attributes:
        path: The folder.
        images: Their paths from there, with "/" between names, in natural order.
        left_out: Why, as it is said after a number, and what was left out.

    Raises:
        UserError: The folder cannot be listed.
    """

    path: Path
    images: list[str] = field(init=False, default_factory=list)
    left_out: dict[str, list[str]] = field(init=False, default_factory=dict)

    def __post_init__(self):
        root = os.path.realpath(self.path)
        entered = {root, *map(str, Path(root).parents)}
        # all real folders before any link, so that no link takes a folder's images away from it
        folders, links = [""], []
        while folders or links:
            name = folders.pop() if folders else links.pop(0)
            real = os.path.realpath(self.path / name)
            if name and real in entered:
                self._leave_out(LINKED_BACK, name)
                continue
            entered.add(real)
            try:
                with os.scandir(self.path / name) as entries:
                    entries = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                if not name:
                    raise UserError(f"{self.path} cannot be listed ({error.strerror}): check --data-dir.") from None
                self._leave_out(CLOSED, name)
                continue
            is_empty = True
            for entry in entries:
                inner = f"{name}/{entry.name}" if name else entry.name
                kind = self._kind(entry)
                if kind == "folder":
                    (links if entry.is_symlink() else folders).append(inner)
                elif kind != "file":
                    self._leave_out(kind, inner)
                elif is_image(inner):
                    self.images.append(inner)
                elif is_image(inner, OTHER_SUFFIXES):
                    self._leave_out(UNKNOWN, inner)
                else:
                    continue
                is_empty = False
            if is_empty and name:
                self._leave_out(EMPTY, name)
        self.images.sort(key=lambda name: (natural_key(name), name))

    def __str__(self) -> str:
        return str(self.path)

    def open(self, name: str) -> BinaryIO:
        """Open one of the images."""
        return open(self.path / name, "rb")

    def name(self, name: str) -> str:
        """What to call one of the images in a message."""
        return str(self.path / name)

    @staticmethod
    def _kind(entry: os.DirEntry) -> str:
        """ "file", "folder", or why it is left out."""
        if entry.name.startswith("."):
            return HIDDEN
        try:
            mode = entry.stat().st_mode if entry.is_symlink() else None
        except OSError:
            return LINKED_BACK
        if entry.is_dir() if mode is None else stat.S_ISDIR(mode):
            return "folder"
        return "file" if (entry.is_file() if mode is None else stat.S_ISREG(mode)) else SPECIAL

    def _leave_out(self, why: str, name: str) -> None:
        self.left_out.setdefault(why, []).append(name)


def describe_left_out(where: object, left_out: Mapping[str, Sequence[str]]) -> str:
    """A line about what was left out of a folder; empty if nothing was."""
    kinds = [f"{len(names)} {why} ({first_names(names, 3)})" for why, names in left_out.items() if names]
    return f"Left out of {where}: {'; '.join(kinds)}." if kinds else ""


def first_names(names: Sequence[str], number: int = 5) -> str:
    """The first of some names, for a message."""
    names = list(names)
    return ", ".join(names[:number]) + (f" and {len(names) - number} more" if len(names) > number else "")
