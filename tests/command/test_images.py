"""Which files of a folder are images, and what becomes of their pixels."""

import os

import numpy as np
import pytest
from PIL import Image

from vim2.command.errors import UserError
from vim2.command.images import ImageFolder, UnreadableImage, describe_left_out, read_image, read_pixels, to_8_bits

RAMP = np.array([[0, 128, 129, 257, 32768, 65278, 65535]], dtype=np.uint16)
SCALED = [[0, 0, 1, 1, 128, 254, 255]]  # to the nearest of 65535 / 257


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bits_are_scaled(name, mode, tmp_path):
    pixels = np.asarray(read_pixels(save(tmp_path / name, RAMP), mode))
    assert pixels.dtype == np.uint8
    assert (pixels if mode == "L" else pixels[..., 2]).tolist() == SCALED


def test_16_bits_in_big_endian_order_and_as_integers(tmp_path):
    big = Image.frombytes("I;16B", (7, 1), RAMP.astype(">u2").tobytes())
    assert np.asarray(read_pixels(save(tmp_path / "big.tif", big), "L")).tolist() == SCALED
    # as Pillows before 11 open a PNG of 16 bits
    integers = Image.fromarray(RAMP.astype(np.int32))
    integers.format = "PNG"
    assert np.asarray(to_8_bits(integers, "L")).tolist() == SCALED


def test_white_is_zero_and_12_bits_in_tiff(tmp_path):
    inverted = save(tmp_path / "inverted.tif", RAMP, tiffinfo={262: 0})
    assert Image.open(inverted).tag_v2[262] == 0
    assert np.asarray(read_pixels(inverted, "L")).tolist() == [[255 - v for v in SCALED[0]]]
    # two pixels, 4095 and 0, of 12 bits each
    entries = [(256, 4, 2), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, 1)]
    entries += [(279, 4, 3)]
    head = b"II*\0" + (12).to_bytes(4, "little") + b"\xff\xf0\x00\0" + len(entries).to_bytes(2, "little")
    body = b"".join(
        t.to_bytes(2, "little") + k.to_bytes(2, "little") + (1).to_bytes(4, "little") + v.to_bytes(4, "little")
        for t, k, v in entries
    )
    (tmp_path / "twelve.tif").write_bytes(head + body + bytes(4))
    assert np.asarray(read_pixels(tmp_path / "twelve.tif", "L")).tolist() == [[255, 0]]


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_pixels_without_a_range_are_refused_by_name(dtype, kind, tmp_path):
    path = save(tmp_path / "odd.tif", np.arange(4, dtype=dtype).reshape(2, 2))
    with pytest.raises(UserError, match=rf"odd\.tif has {kind} pixels .* 8 or 16 bits") as error:
        read_pixels(path, "RGB")
    assert not isinstance(error.value, UnreadableImage)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "RGB"])
def test_other_modes_are_pillows(mode, tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = Image.fromarray(colours).convert(mode)
    path = save(tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png"), image)
    for wanted in ("RGB", "L"):
        assert np.array_equal(read_pixels(path, wanted), Image.open(path).convert(wanted))


def test_a_palette_with_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "L").convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    path = save(tmp_path / "a.png", image, transparency=1)
    assert np.asarray(read_pixels(path)).tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a.png", "a.tif"])
def test_the_first_frame_counts(name, tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if name == "a.webp" else {}
    path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **options)
    assert Image.open(path).n_frames == 2
    assert read_pixels(path).getpixel((0, 0)) == (255, 0, 0)


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right
    path = save(tmp_path / "a.jpg", Image.new("RGB", (8, 4)), exif=exif)
    assert read_image(path).size == read_pixels(path).size == (4, 8)
    turned = read_pixels(save(tmp_path / "a.png", RAMP, exif=exif), "L")
    assert np.asarray(turned).T.tolist() == SCALED


def test_damaged_exif_data_are_ignored(tmp_path):
    path = save(tmp_path / "a.jpg", Image.new("RGB", (8, 4)), exif=b"Exif\0\0" + b"no exif data")
    assert read_image(path).size == (8, 4)


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    whole = save(tmp_path / "whole.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    contents = whole.read_bytes()
    (tmp_path / "cut.jpg").write_bytes(contents[: len(contents) // 2])
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("cut.jpg", "text.png", "empty.png", "folder.png", "pipe.png", "none.png"):
        with pytest.raises(UnreadableImage, match=rf"{name} is no image that can be read \(.*\)") as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value) and "0x" not in str(error.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        read_image(whole)


@pytest.mark.timeout(30)
def test_a_folder_of_images(tmp_path):
    root = tmp_path / "above" / "root"
    images = "b/10.png", "b/2.png", "a/x/1.JPG", ".hidden/1.png", "a/._1.png"
    for name in (*images, "a/.DS_Store", "a/note.txt", "a/2.HEIC"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root.parent / "other").mkdir()
    (root.parent / "other" / "1.png").touch()
    links = {"0-again": root / "b", "loop": root, "up": root.parent, "a/up": "..", "c": root.parent / "other"}
    links |= {"b/3.png": root / "b" / "2.png", "b/broken.png": "nothing", "b/self": "self", "b/zero.png": "/dev/zero"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "b" / "pipe.png")
    for name in ("empty/in", "text"):
        (root / name).mkdir(parents=True)
    (root / "text" / "note.txt").touch()
    found = ImageFolder(root)
    assert found.images == ["a/x/1.JPG", "b/2.png", "b/3.png", "b/10.png", "c/1.png"]
    assert {why: sorted(names) for why, names in found.left_out.items()} == {
        "hidden": [".hidden", "a/.DS_Store", "a/._1.png"],
        "linked back or to nothing": ["0-again", "a/up", "b/broken.png", "b/self", "loop", "up"],
        "neither file nor folder": ["b/pipe.png", "b/zero.png"],
        "named as other images than .bmp, .jpeg, .jpg, .png, .tif, .tiff, .webp": ["a/2.HEIC"],
        "without an image": ["empty/in", "text"],
    }
    line = describe_left_out("root", found.left_out)
    assert "3 hidden (" in line and "and 3 more" in line and "\n" not in line
    assert describe_left_out("root", {}) == ""
