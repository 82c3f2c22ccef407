"""timm's policies on the device, beside timm's own on Pillow's images."""

from types import SimpleNamespace

import matplotlib.cbook
import numpy as np
import pytest
import torch
from devices import needs_gpu
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, auto_augment_transform, rand_augment_transform

from vim2.classify import UserError, memory
from vim2.classify import data as files
from vim2.classify.augmentation import Augmentation, Normalize
from vim2.classify.policies import ARGUMENTS, KINDS, Operations, Policy, describe
from vim2.command.processes import Processes

CPU = torch.device("cpu")
ALONE = Processes(CPU)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
HEIGHT, WIDTH = 96, 120
MEANS = {"RGB": (0.4, 0.5, 0.6), "L": (0.5,)}
HPARAMS = dict(translate_const=43, img_mean=(102, 128, 153))
LEVELS = (0.0, 0.3, 1.0, 2.5, 4.2, 5.0, 7.7, 9.0, 10.0, 14.0)
RESAMPLE = {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
MOVING = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")
POLICIES = ("rand-m9-mstd0.5-inc1", "rand-m6-n3", "rand-m8-p0.7-tweights", "original-mstd0.5", "v0", "3a")


REFUSED = {
    "augmix-m3-w3": " does not work on images in memory",
    "rand-n16-tweights": " draws 16 of 15 operations",
    "random": ": use a policy of timm's",
    "rand-x3": r" \(Unknown RandAugment config section\): use",
    "rand-m0.5": r" \(invalid literal for int.*\): use",
    "v1": r" \(Unknown AA policy v1\): use",
}


def make(name: str, mode: str = "RGB", interpolation: str = "bilinear", size=(HEIGHT, WIDTH), device=CPU) -> Policy:
    return Policy(name, size, MEANS[mode], len(mode), device, interpolation)


def photograph(mode: str = "RGB") -> Image.Image:
    image = Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg"))
    return image.convert(mode).resize((WIDTH, HEIGHT))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(C, H, W) float32, from 0 to 255."""
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1).float()


def one_layer(kind: str, numbers: torch.Tensor, device=CPU) -> Operations:
    """Operations of one kind, for all images."""
    order, counts = torch.arange(len(numbers), device=device)[None], [len(numbers) * (kind == name) for name in KINDS]
    return Operations(order, order, numbers.float()[None].to(device), [counts])


def kinds_of_images(operations: Operations) -> torch.Tensor:
    """(layers, B): of each image, the number of its kind in each layer."""
    counts = torch.tensor(operations.counts)
    ordered = torch.stack([torch.arange(len(KINDS)).repeat_interleave(row) for row in counts])
    return ordered.gather(1, operations.back)


@pytest.fixture
def chance(monkeypatch):
    """Sets the number from 0 to 1 that is all of timm's chance."""

    def be(value: float) -> None:
        stub = SimpleNamespace(random=lambda: value, uniform=lambda low, high: low + (high - low) * value)
        monkeypatch.setattr(auto_augment, "random", stub)

    return be


@pytest.mark.parametrize("uniform", [0.2, 0.5, 0.8])
def test_arguments_are_timms(uniform, chance):
    chance(uniform)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    assert set(ARGUMENTS) == {name for name, function in LEVEL_TO_ARG.items() if function}
    for name, function in ARGUMENTS.items():
        found = function(levels / 10, torch.full_like(levels, uniform), HPARAMS)
        assert found.tolist() == pytest.approx([LEVEL_TO_ARG[name](level, HPARAMS)[0] for level in LEVELS]), name


def both(name: str, mode: str, interpolation: str, uniform: float, device=CPU) -> tuple[torch.Tensor, torch.Tensor]:
    """A photograph after an operation of all levels, here and in timm: (levels, C, H, W) each."""
    image, function = photograph(mode), LEVEL_TO_ARG[name]
    options = dict(fillcolor=HPARAMS["img_mean"] if mode == "RGB" else (128,), resample=RESAMPLE[interpolation])
    arguments = [function(level, HPARAMS) if function else () for level in LEVELS]
    expected = torch.stack([to_tensor(NAME_TO_OP[name](image, *values, **options)) for values in arguments])
    levels = torch.tensor(LEVELS, dtype=torch.float64) / 10
    kind, numbers = describe(name, levels, torch.full_like(levels, uniform), HPARAMS, (HEIGHT, WIDTH))
    images = to_tensor(image).expand(len(LEVELS), -1, -1, -1)
    policy = make("rand", mode, interpolation, device=device)
    return policy(images.to(device), one_layer(kind, numbers, device)).cpu(), expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", [name for name in NAME_TO_OP if name not in MOVING])
def test_bytes_are_pillows(name, mode, device, chance):
    for uniform in (0.2, 0.8):
        chance(uniform)
        assert torch.equal(*both(name, mode, "bilinear", uniform, torch.device(device)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Contrast", "Sharpness"])
def test_bytes_of_strange_images_are_pillows(name, device):
    """Of one colour, of two, with few values, dark, noise, and with a mean that is a half."""
    random = np.random.default_rng(0)
    shape = (HEIGHT, WIDTH, 3)
    pictures = [np.full(shape, 77), random.choice([3, 250], shape), random.integers(100, 104, shape),
                random.integers(0, 60, shape), random.integers(256, size=shape)]  # fmt: skip
    pictures += [np.indices(shape)[1] % 2 + value for value in range(0, 250, 10)]
    pictures.append(np.where(np.arange(HEIGHT * WIDTH * 3).reshape(shape) < 200, 9, 90))  # fewer than 255 pixels differ
    pictures = [Image.fromarray(pixels.astype("uint8")) for pixels in pictures]
    argument = 1.7
    expected = torch.stack([to_tensor(NAME_TO_OP[name](image, *([argument] if LEVEL_TO_ARG[name] else [])))
                            for image in pictures])  # fmt: skip
    level = torch.full((len(pictures),), (argument - 0.1) / 1.8, dtype=torch.float64)
    kind, numbers = describe(name, level, level, HPARAMS, (HEIGHT, WIDTH))
    images = torch.stack([to_tensor(image) for image in pictures]).to(device)
    found = make("rand", device=torch.device(device))(images, one_layer(kind, numbers, device))
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", MOVING)
def test_moved_images_are_pillows(name, mode, chance):
    for uniform in (0.2, 0.8):
        chance(uniform)
        nearest, bilinear, bicubic = (torch.sub(*both(name, mode, how, uniform)).abs() for how in RESAMPLE)
        assert (nearest > 0).float().mean() < 1e-3
        assert bilinear.max() <= 1 and (bilinear > 0).float().mean() < 0.02
        assert bicubic.max() < 32 and bicubic.mean() < 1  # another cubic than Pillow's


def chains_of(name: str):
    """timm's: lists of operations, and the probability of each list."""
    if not name.startswith("rand"):
        chains = auto_augment_transform(name, dict(HPARAMS)).policy
        return chains, [1 / len(chains)] * len(chains)
    policy = rand_augment_transform(name, dict(HPARAMS))
    weights = policy.choice_weights
    return [[op] for op in policy.ops], [1 / len(policy.ops)] * len(policy.ops) if weights is None else weights


def kind_of(op) -> int:
    one = torch.ones(1, dtype=torch.float64)
    return KINDS.index(describe(op.name, one, one, HPARAMS, (HEIGHT, WIDTH))[0])


@pytest.mark.parametrize("name", POLICIES)
def test_choices_have_timms_probabilities(name):
    torch.manual_seed(0)
    n = 20_000
    (operations,) = make(name).draw(1, n)
    chains, probabilities = chains_of(name)
    layers = range(len(chains[0])) if len(chains[0]) > 1 else [0]  # of a draw; weighted ones are without replacement
    for layer in layers:
        expected = np.zeros(len(KINDS))
        for chain, probability in zip(chains, probabilities):
            expected[kind_of(chain[layer])] += probability * chain[layer].prob
        expected[0] = 1 - expected.sum()
        found = np.array(operations.counts[layer]) / n
        assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9).all()


def test_an_image_gets_both_operations_of_one_pair():
    (operations,) = make("original").draw(1, 5000)
    pairs = {(kind_of(first), kind_of(second)) for first, second in chains_of("original")[0]}
    first, second = kinds_of_images(operations)
    both = (first > 0) & (second > 0)
    assert set(zip(first[both].tolist(), second[both].tolist())) == pairs


def test_weighted_choices_are_made_once():
    name = "rand-n14-p1-t3aw"
    (operations,) = make(name).draw(1, 50)
    expected = torch.tensor([kind_of(op) for (op,) in chains_of(name)[0]]).bincount(minlength=len(KINDS))
    kinds = kinds_of_images(operations)
    assert all(torch.equal(image.bincount(minlength=len(KINDS)), expected) for image in kinds.T)


@pytest.mark.parametrize(
    ("name", "low", "high", "mean", "deviation"),
    [
        ("rand-m6", 1.18, 1.18, 1.18, 0),
        ("rand-m5-mstd1", 0.1, 1.9, 1.0, 0.18),
        ("rand-m9-mstd9", 0.1, 1.9, None, None),  # cut off at 0 and at 10
        ("rand-m8-mstd101", 0.1, 1.54, 0.82, 1.44 / 12**0.5),
        ("rand-m30-mmax40", 5.5, 5.5, 5.5, 0),
    ],
)
def test_magnitudes(name, low, high, mean, deviation):
    """Of brightness, the factor is 0.1 + 0.18 times the magnitude."""
    torch.manual_seed(0)
    (operations,) = make(name).draw(1, 40_000)
    first = [numbers.split(counts) for numbers, counts in zip(operations.numbers, operations.counts)]
    factors = torch.cat([groups[KINDS.index("brightness")][:, 0] for groups in first])
    assert factors.min() >= low - 1e-5 and factors.max() <= high + 1e-5
    if mean is None:
        assert (factors == 0.1).float().mean() > 0.1 and (factors == 1.9).float().mean() > 0.3
    else:
        assert abs(factors.mean() - mean) < 0.02 and abs(factors.std() - deviation) < 0.02


@pytest.mark.parametrize("name", POLICIES)
def test_each_image_has_operations_of_its_own(name):
    """A batch is what its images are one by one."""
    torch.manual_seed(0)
    images = torch.randint(256, (40, 3, HEIGHT, WIDTH)).float()
    policy = make(name)
    (operations,) = policy.draw(1, len(images))
    together = policy(images, operations)
    kinds = kinds_of_images(operations)
    for i, image in enumerate(images):
        image = image[None]
        for layer, back in enumerate(operations.back):
            numbers = operations.numbers[layer, back[i]][None]
            image = policy(image, one_layer(KINDS[kinds[layer, i]], numbers))
        torch.testing.assert_close(together[i], image[0], atol=1, rtol=0)
        assert (together[i] != image[0]).float().mean() < 1e-3
    assert len({image.sum().item() for image in together}) > 35


def test_a_layer_may_be_missing_and_chance_may_be_0_or_1():
    images = torch.randint(256, (8, 3, HEIGHT, WIDTH)).float()
    for name in ("rand-n0", "rand-n0-tweights", "rand-p0"):
        policy = make(name)
        assert torch.equal(policy(images, *policy.draw(1, 8)), images)
    policy = make("rand-p1")
    assert all(layer[0] == 0 for operations in policy.draw(3, 8) for layer in operations.counts)


def test_where_a_policy_stands():
    """After flips, on whole bytes; before erasing; in place of colours, but for timm's 3-Augment."""
    images = torch.randint(256, (6, 3, 40, 48), dtype=torch.uint8)
    plain = Normalize((0.0,), (1.0,), 3, CPU)

    def augment(name: str | None, **options) -> torch.Tensor:
        policy = name and make(name, size=(32, 32))
        augmentation = Augmentation((40, 48), (32, 32), plain, 3, CPU, policy=policy, **options)
        torch.manual_seed(0)
        return augmentation(images, *next(augmentation.draw_epoch(1, 6)))

    still = augment(None, color_jitter=0.0)
    torch.testing.assert_close(augment("rand-n0"), (still * 255).round() / 255)
    assert not torch.allclose(augment("rand-n0-t3a"), still, atol=0.01)  # the colours
    inverted = augment("rand-p1-n4-m10", re_prob=1.0, re_mode="const")
    assert ((inverted == 0).all(1).float().mean((1, 2)) > 0.01).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_equal_seeds_give_equal_epochs(data, mode):
    config = dict(input_size=(len(mode), 32, 32), mean=MEANS[mode], std=(0.3,) * len(mode), interpolation="bicubic")
    images = files.open_split("", data, "train", mode=mode)
    options = dict(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel")
    loaders = [memory.train_loader(images, config, 6, 0, ALONE, **options) for _ in range(2)]

    def epoch(loader, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([batch for batch, _ in loader])

    first, second = epoch(loaders[0], 1), epoch(loaders[0], 2)
    assert first.shape == (36, len(mode), 32, 32) and first.isfinite().all()
    assert torch.equal(second, epoch(loaders[1], 2)) and not torch.equal(first, second)


def test_policies_that_cannot_be(data, monkeypatch):
    """Are told before any image is decoded."""
    monkeypatch.setattr(memory, "hold_to_train", None)
    images = files.open_split("", data, "train")
    config = dict(input_size=(3, 32, 32), mean=MEANS["RGB"], std=(0.3,) * 3, interpolation="bicubic")
    for name, words in REFUSED.items():
        with pytest.raises(UserError, match=f"--aa {name}{words}"):
            memory.train_loader(images, config, 6, 0, ALONE, auto_augment=name)
        if not name.startswith("augmix"):
            with pytest.raises(UserError, match=f"--aa {name}{words}"):
                files.train_loader(images, config, 6, 0, ALONE, auto_augment=name)


def test_pixels_are_moved_by_few_interpolations(data):
    images = files.open_split("", data, "train")
    config = dict(input_size=(3, 32, 32), mean=MEANS["RGB"], std=(0.3,) * 3, interpolation="bicubic")
    for name in ("rand-m9-mstd0.5-inc1", "original", "augmix-m3"):
        with pytest.raises(UserError, match=f"--aa {name} does not work with --train-interpolation lanczos"):
            files.train_loader(images, config, 6, 0, ALONE, auto_augment=name, interpolation="lanczos")
    assert len(files.train_loader(images, config, 6, 0, ALONE, auto_augment="3a", interpolation="lanczos")) == 6


@needs_gpu
@pytest.mark.parametrize("name", POLICIES)
def test_a_gpu_is_not_waited_for(name):
    size, images = (HEIGHT, WIDTH), torch.randint(256, (64, 3, HEIGHT, WIDTH)).float()
    device = torch.device("cuda")
    policies = [make(name, size=size, device=d) for d in (CPU, device)]
    operations = []
    for policy in policies:
        torch.manual_seed(0)
        operations += policy.draw(1, 64)
    on_gpu = images.to(device)
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = policies[1](on_gpu, operations[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    differences = (found.cpu() - policies[0](images, operations[0])).abs()
    assert (differences > 1).float().mean() < 1e-2 and differences.mean() < 0.5
