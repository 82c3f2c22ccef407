"""Images held on the device, and their augmentation there."""

import math
import multiprocessing
import shutil
import sys

import numpy as np
import pytest
import torch
from classify_helpers import make_folders
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation, resized_crop

from vim2.classify import UserError, memory, train, validate
from vim2.classify import data as files
from vim2.classify.augmentation import Augmentation, Normalize
from vim2.command.processes import Processes

CPU = torch.device("cpu")
ALONE = Processes(CPU)
CONFIG = dict(
    input_size=(3, 32, 32),
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.25),
    interpolation="bicubic",
    crop_pct=0.9,
    crop_mode="center",
)
PLAIN = Normalize((0.0,), (1.0,), 3, CPU)
STILL = dict(scale=(1, 1), ratio=(1, 1), hflip=0.0, color_jitter=0.0, interpolation="bilinear")


def pictures(n: int, height: int = 24, width: int = 24) -> torch.Tensor:
    return torch.randint(256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def augment(images: torch.Tensor, size=None, seed: int = 0, **options) -> torch.Tensor:
    """Augmented images from 0 to 1; as they are but for the options given."""
    source = tuple(images.shape[2:])
    augmentation = Augmentation(source, size or source, PLAIN, images.shape[1], CPU, **{**STILL, **options})
    torch.manual_seed(seed)
    return augmentation(images, augmentation.draw(len(images)))


@pytest.fixture
def opened(data):
    """The images of the tests' folders to train and to validate on."""
    return tuple(files.open_split("", data, split) for split in ("train", "validation"))


def test_no_worker_is_started_that_has_no_batch_to_read(opened):
    assert files.eval_loader(opened[1], CONFIG, 4, 1_000_000, ALONE).loader.num_workers == math.ceil(len(opened[1]) / 4)
    loader = files.train_loader(opened[0], CONFIG, 4, 1, ALONE, no_aug=True, interpolation="bicubic")
    assert loader.loader.num_workers == 1


@pytest.mark.parametrize("config", [CONFIG, {**CONFIG, "crop_pct": 1.0}, {**CONFIG, "input_size": (3, 48, 48)}])
def test_images_to_validate_on_are_those_from_files(opened, config):
    held, read = (module.eval_loader(opened[1], config, 4, 0, ALONE) for module in (memory, files))
    assert len(held) == len(read) == 4
    for (images, targets), (images_read, targets_read) in zip(held, read, strict=True):
        assert torch.equal(images, images_read) and torch.equal(targets, targets_read)


def test_without_augmentation_training_sees_what_it_sees_from_files(opened):
    loaders = (module.train_loader(opened[0], CONFIG, 6, 0, ALONE, no_aug=True, interpolation="bicubic")
               for module in (memory, files))  # fmt: skip
    held, read = (sorted((image.sum().item(), target.item()) for batch in loader for image, target in zip(*batch))
                  for loader in loaders)  # fmt: skip
    assert len(held) == 36 and held == read


def test_each_process_validates_on_its_share(opened):
    whole = torch.cat([images for images, _ in memory.eval_loader(opened[1], CONFIG, 4, 0, ALONE)])
    shares = [memory.eval_loader(opened[1], CONFIG, 4, 0, Processes(CPU, rank, 2)) for rank in range(2)]
    first, second = (torch.cat([images for images, _ in share]) for share in shares)
    assert torch.equal(first, whole[::2]) and torch.equal(second, whole[1::2])


def test_one_size_is_kept_and_many_are_made_square(opened, tmp_path, capsys):
    kept = memory.hold_to_train(opened[0], 32, ALONE, 2)
    assert kept.images.shape == (36, 3, 36, 40) and "36 x 40 pixels as they are" in capsys.readouterr().out
    pixels = np.array(opened[0].load(0)[0])
    assert torch.equal(kept.images[0], torch.from_numpy(pixels).permute(2, 0, 1)) and kept.targets[0] == 0
    small = memory.hold_to_train(opened[0], 14, ALONE, 1)  # 36 is more than twice of it
    assert small.images.shape == (36, 3, 16, 16)
    root = make_folders(tmp_path, train=2, val=0)
    path = root / "train" / "red" / "1.png"
    image = files.open_split("", root, "train").load(5)[0]
    image.resize((50, 60)).save(path)
    capsys.readouterr()
    mixed = memory.hold_to_train(files.open_split("", root, "train"), 28, ALONE, 1)
    assert mixed.images.shape == (6, 3, 32, 32) and "32 x 32 pixels resized" in capsys.readouterr().out
    assert mixed.targets.tolist() == [0, 0, 1, 1, 2, 2]


def test_grey_images(data):
    images = files.open_split("", data, "train", mode="L")
    config = {**CONFIG, "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    batch, _ = next(iter(memory.train_loader(images, config, 6, 0, ALONE)))
    assert batch.shape == (6, 1, 32, 32)


def test_unreadable_images_are_left_out_and_noted(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "data")
    (root / "train" / "red" / "3.png").write_text("no image")
    images = files.open_split("", root, "train")
    held = memory.hold_to_train(images, 32, ALONE, 2)
    assert len(held) == 35 and held.targets.bincount().tolist() == [12, 12, 11]
    assert images.report_unreadable(ALONE) == (1, [str(root / "train" / "red" / "3.png")])
    with pytest.raises(UserError, match="Only 35 images can be read"):
        memory.train_loader(images, CONFIG, 36, 0, ALONE)
    for path in (root / "val").rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(UserError, match="Not one of the 15 images can be read"):
        memory.eval_loader(files.open_split("", root, "val"), CONFIG, 4, 0, ALONE)


@pytest.fixture
def small_blocks(monkeypatch):
    """Five images of 36 x 40 a block, so that processes decode them."""
    monkeypatch.setattr(memory, "BLOCK", 5 * 3 * 36 * 40)


def test_processes_decode_what_one_does(data, tmp_path, small_blocks):
    root = shutil.copytree(data, tmp_path / "data")
    for name in ("3", "4", "5", "6", "7", "8"):  # a whole block among them
        (root / "train" / "green" / f"{name}.png").write_text("no image")
    state = torch.get_rng_state()
    here, there = (memory.hold_to_train(files.open_split("", root, "train"), 32, ALONE, workers) for workers in (0, 2))
    assert torch.equal(torch.get_rng_state(), state)  # what is trained does not depend on how many decode
    assert len(there) == 30 and torch.equal(here.images, there.images) and torch.equal(here.targets, there.targets)
    images = files.open_split("", root, "train")
    memory.hold_to_train(images, 32, ALONE, 2)
    assert images.report_unreadable(ALONE)[0] == 6


@pytest.mark.parametrize("module", [memory, files])
def test_an_error_of_a_process_that_reads_is_that_error(module, data, tmp_path, small_blocks):
    path = shutil.copytree(data, tmp_path / "data") / "train" / "red" / "0.tif"
    Image.fromarray(np.ones((36, 40), dtype=np.float32)).save(path)
    images = files.open_split("", tmp_path / "data", "train")
    with pytest.raises(UserError) as caught:
        list(module.train_loader(images, CONFIG, 4, 2, ALONE, no_aug=True, interpolation="bicubic"))
    assert str(caught.value).startswith(f"{path} has floating-point pixels") and caught.value.one_process


@pytest.mark.timeout(120)
def test_images_in_memory_need_no_shared_memory(opened, small_blocks, fill_shared_memory):
    fill_shared_memory()
    here, there = (memory.hold_to_train(opened[0], 32, ALONE, workers) for workers in (0, 2))
    assert torch.equal(here.images, there.images)


@pytest.mark.timeout(120)
def test_a_batch_for_which_shared_memory_has_no_room_is_told(opened, fill_shared_memory):
    here, there = (files.eval_loader(opened[1], CONFIG, 4, workers, ALONE) for workers in (0, 2))
    fill_shared_memory()
    assert len(list(here)) == math.ceil(len(opened[1]) / 4)
    with pytest.raises(UserError, match=r"shared memory .*No space left.*: use fewer --workers, 0 for none,") as caught:
        list(there)
    assert caught.value.one_process and len(str(caught.value)) < 400


def test_too_little_memory(opened, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000)
    with pytest.raises(UserError, match=r"36 images of 3 x 36 x 40 .* 0\.0 GB free: choose a smaller --img-size"):
        memory.train_loader(opened[0], CONFIG, 6, 0, ALONE)


def test_an_epoch_shows_every_image_once_in_a_new_order(opened):
    loader = memory.train_loader(opened[0], CONFIG, 5, 0, ALONE, **STILL)
    assert len(loader) == 7  # of 36 images, the last one is dropped
    torch.manual_seed(0)
    sums = [[round(image.sum().item(), 2) for images, _ in loader for image in images] for _ in range(2)]
    assert len(set(sums[0])) == len(set(sums[1])) == 35 and sums[0] != sums[1]
    shares = [memory.train_loader(opened[0], CONFIG, 6, 0, Processes(CPU, rank, 2), **STILL) for rank in range(2)]
    for share in shares:
        share.sampler.set_epoch(3)
    seen = [{round(image.sum().item(), 2) for images, _ in share for image in images} for share in shares]
    assert len(seen[0]) == len(seen[1]) == 18 and not seen[0] & seen[1]


def test_equal_seeds_give_equal_epochs(opened):
    """Whatever the epochs before were: a run that is cut off goes on with the same batches."""
    options = dict(re_prob=0.5, re_mode="pixel", re_count=2)
    loader, other = (memory.train_loader(opened[0], CONFIG, 6, 0, ALONE, **options) for _ in range(2))

    def epoch(loader, seed):
        torch.manual_seed(seed)
        return [torch.cat([t.flatten().float() for t in batch]) for batch in loader]

    first, second = epoch(loader, 1), epoch(loader, 2)
    assert all(map(torch.equal, second, epoch(other, 2)))
    assert not any(map(torch.equal, first, second))


def test_every_image_is_augmented_differently():
    images = pictures(1).expand(16, -1, -1, -1)
    for options in (
        dict(scale=(0.2, 0.8), ratio=(0.5, 2)),
        dict(color_jitter=0.4),
        dict(re_prob=1.0, re_mode="const"),
    ):
        result = augment(images, **options)
        assert len({image.sum().item() for image in result}) > 12, options


def test_the_whole_image_as_crop_is_the_image():
    images = pictures(3, 24, 30)
    for interpolation in ("nearest", "bilinear", "bicubic", "random"):
        result = augment(images, ratio=(1.25, 1.25), interpolation=interpolation)
        torch.testing.assert_close(result, images / 255, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_crops_are_those_of_torchvision(mode):
    """Enlarged, since torchvision smooths what is made smaller; away from the crop's borders, behind which it does not
    look."""
    images = pictures(8, 40, 48)
    augmentation = Augmentation(
        (40, 48), (32, 32), PLAIN, 3, CPU, **{**STILL, "scale": (0.1, 0.3), "interpolation": mode}
    )
    torch.manual_seed(0)
    numbers = augmentation.draw(8)
    torch.manual_seed(0)
    corners = augmentation.crops(torch.Size((8, 3, 40, 48)))["src"].int()
    result = augmentation(images, numbers)
    for image, box, crop in zip(images, corners, result):
        (left, top), (right, bottom) = box[0].tolist(), box[2].tolist()
        expected = resized_crop(
            image / 255,
            top,
            left,
            bottom - top + 1,
            right - left + 1,
            (32, 32),
            InterpolationMode(mode),
            antialias=False,
        ).clamp(0, 1)
        inner = slice(5, -5)
        torch.testing.assert_close(crop[:, inner, inner], expected[:, inner, inner], atol=0.02, rtol=0)


def test_crops_have_the_areas_and_ratios_that_were_asked_for():
    augmentation = Augmentation(
        (64, 64), (32, 32), PLAIN, 3, CPU, **{**STILL, "scale": (0.3, 0.6), "ratio": (0.5, 1.5)}
    )
    torch.manual_seed(0)
    width, x, height, y = augmentation.draw(4000).T
    area, ratio = width * height, width / height
    assert 0.28 < area.min() < 0.32 and 0.58 < area.max() < 0.62 and abs(area.mean() - 0.45) < 0.01
    assert 0.47 < ratio.min() < 0.55 and 1.4 < ratio.max() < 1.56
    for middle, side in ((x, width), (y, height)):
        assert (middle.abs() + side <= 1 + 1e-6).all() and abs(middle.mean()) < 0.03


def test_flips():
    images = pictures(200)
    for option, axis in (("hflip", 3), ("vflip", 2)):
        assert torch.allclose(augment(images, **{option: 1.0}), images.flip(axis) / 255, atol=1e-4)
        half = augment(images, **{option: 0.5})
        flipped = [torch.allclose(a, b.flip(axis - 1) / 255, atol=1e-4) for a, b in zip(half, images)]
        kept = [torch.allclose(a, b / 255, atol=1e-4) for a, b in zip(half, images)]
        assert sum(flipped) + sum(kept) == 200 and 70 < sum(flipped) < 130


def test_colours_are_those_of_torchvision(monkeypatch):
    images = pictures(6)
    augmentation = Augmentation((24, 24), (24, 24), PLAIN, 3, CPU, **{**STILL, "color_jitter": 0.4})
    numbers = augmentation.draw(6)
    factors = numbers[:, 4:7]
    assert factors.min() >= 0.6 and factors.max() <= 1.4
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n))
    for image, (brightness, contrast, saturation), result in zip(images / 255, factors, augmentation(images, numbers)):
        expected = adjust_contrast(adjust_brightness(image, brightness), contrast)
        torch.testing.assert_close(result, adjust_saturation(expected, saturation), atol=2e-3, rtol=0)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing(mode):
    images = torch.full((600, 3, 32, 32), 204, dtype=torch.uint8)
    erased = augment(images, re_prob=0.25, re_mode=mode)
    changed = (erased - 0.8).abs().amax(1) > 1e-4
    shares = changed.float().mean((1, 2))
    assert 0.18 < (shares > 0).float().mean() < 0.32
    shares = shares[shares > 0]
    assert shares.min() > 0.015 and shares.max() < 0.36 and abs(shares.mean() - (0.02 + 1 / 3) / 2) < 0.03
    values = erased.permute(0, 2, 3, 1)[changed]
    if mode == "const":
        assert (values == 0).all()
    else:
        assert abs(values.mean()) < 0.15 and abs(values.std() - 1) < 0.1
    first = erased[(changed.sum((1, 2)) > 1).nonzero()[0, 0]].permute(1, 2, 0)
    colours = first[(first - 0.8).abs().amax(-1) > 1e-4].unique(dim=0)
    assert (len(colours) == 1) == (mode != "pixel")


def test_several_rectangles_share_the_area():
    images = torch.full((400, 3, 32, 32), 204, dtype=torch.uint8)
    shares = [((augment(images, re_prob=1.0, re_mode="const", re_count=n) - 0.8).abs() > 1e-4).float().mean()
              for n in (1, 3)]  # fmt: skip
    assert 0.7 * shares[0] < shares[1] < 1.05 * shares[0]


def test_normalisation_and_erasing_after_it():
    normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), 3, CPU)
    images = pictures(4)
    augmentation = Augmentation((24, 24), (24, 24), normalize, 3, CPU, **STILL)
    torch.testing.assert_close(augmentation(images, augmentation.draw(4)), normalize(images), atol=1e-3, rtol=0)
    augmentation = Augmentation((24, 24), (24, 24), normalize, 3, CPU, **STILL, re_prob=1.0, re_mode="const")
    assert ((augmentation(images, augmentation.draw(4)) == 0).float().mean((1, 2, 3)) > 0.01).all()


def test_what_does_not_work_in_memory(opened, monkeypatch):
    monkeypatch.setattr(memory, "hold_to_train", None)  # it is told before any image is decoded
    with pytest.raises(UserError, match="--train-interpolation lanczos"):
        memory.train_loader(opened[0], CONFIG, 6, 0, ALONE, interpolation="lanczos")
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(UserError, match=r"vim2\[classify\]"):
        memory.train_loader(opened[0], CONFIG, 6, 0, ALONE)
    assert len(memory.train_loader(opened[0], CONFIG, 6, 0, ALONE, no_aug=True, interpolation="bicubic")) == 6


@pytest.mark.parametrize("command", [train, validate])
def test_a_server_of_processes_loads_once_what_those_of_loaders_need(command, monkeypatch):
    """Python 3.14's way on Linux; nothing is changed elsewhere."""
    loaded, needed = [], memory._Decoded.__module__
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", loaded.append)
    context = multiprocessing.get_start_method.__self__
    for chosen, default, expected in (
        (None, "fork", []),
        ("spawn", "forkserver", []),
        (None, "forkserver", [[needed]]),
        ("forkserver", "fork", [[needed]]),
    ):
        before = chosen and multiprocessing.get_context(chosen)
        monkeypatch.setattr(context, "_actual_context", before)
        monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda default=default: [default])
        with pytest.raises(UserError):
            command(device="cpu")
        assert loaded == expected and context._actual_context is before  # a program may still choose
        loaded.clear()
