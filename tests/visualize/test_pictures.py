"""`vim2 visualize`: what it draws and returns."""

import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vim2.command.errors import UserError
from vim2.visualize import plots, visualize
from vim2.visualize.cli import main
from vim2.visualize.layers import averaging_weights, map_sizes
from vim2.visualize.saliency import grad_cam, receptive_field

MODEL = ["--model", "test_vim2", "--device", "cpu", "--model-kwargs", "num_classes=3"]


@pytest.fixture
def images(tmp_path):
    """Two photographs in a folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (60, 80, 3)).astype("uint8")
        Image.fromarray(pixels).save(folder / f"photo{i}.png")
    return folder


def test_pictures_of_two_images(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    assert main(["visualize", str(images), "--output", str(tmp_path / "out"), *MODEL]) == 0
    told = capsys.readouterr().out
    assert "test_vim2 has random weights" in told and told.count('pip install "vim2[visualize]"') == 1
    names = ["averaging_weights", "receptive_field"]
    names += [f"photo{i}_{what}" for i in range(2) for what in ("channel_mixing", "token_attention")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(f"{name}.png" for name in names)
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 400 and max(picture.size) < 2000


def test_a_checkpoint_tells_model_and_classes(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    kwargs = dict(channel_mixer="mlp", token_mixers=1, in_chans=1)
    model = timm.create_model("test_vim2", num_classes=2, **kwargs)
    checkpoint = {"arch": "test_vim2", "model_kwargs": kwargs, "num_classes": 2, "in_chans": 1}
    torch.save({**checkpoint, "state_dict": model.state_dict()}, tmp_path / "best.pth")
    options = dict(images=images / "photo0.png", checkpoint=tmp_path / "best.pth", output=tmp_path / "out")
    written = visualize(**options, img_size=256, device="cpu")
    assert [path.name for path in written] == [
        "averaging_weights.png",
        "receptive_field.png",
        "photo0_token_attention.png",
    ]
    assert "No *_channel_mixing.png: the model has no S6 channel mixers." in capsys.readouterr().out


def test_grad_cam(images, tmp_path, capsys):
    pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)
    options = dict(images=images, model="test_vim2", device="cpu", output=tmp_path / "out")
    written = visualize(**options, model_kwargs=dict(num_classes=3))
    assert sum(path.name.endswith("_grad_cam.png") and path.exists() for path in written) == 2
    assert "grad-cam" not in capsys.readouterr().out
    visualize(**options, img_size=32)
    assert "No *_grad_cam.png: the map of stage 4 is a single token" in capsys.readouterr().out
    visualize(**options, model_kwargs=dict(num_classes=0))
    assert "No *_grad_cam.png: the model has no classifier" in capsys.readouterr().out


def test_grad_cam_is_of_the_class_that_the_model_sees():
    pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)
    torch.manual_seed(0)
    model = timm.create_model("test_vim2", num_classes=3).eval()
    image = torch.randn(3, 64, 96)
    heat, index, probability = grad_cam(model, image, 1)
    assert heat.shape == (64, 96) and heat.min() >= 0 and heat.max() == pytest.approx(1, abs=1e-4)
    assert all(p.grad is None for p in model.parameters()) and not model.stages[1]._forward_hooks
    best = model(image[None]).softmax(-1).max(-1)
    assert (index, probability) == (best.indices.item(), pytest.approx(best.values.item()))


def test_receptive_field_is_the_mean_magnitude_of_gradients():
    torch.manual_seed(0)
    model = timm.create_model("test_vim2").double().eval()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    field = receptive_field(model, images, 2)
    assert field.shape == (64, 96)
    pixels = images.clone().requires_grad_()
    features = model.forward_intermediates(pixels, indices=[2], intermediates_only=True)[0]
    features[:, :, 2, 3].sum().backward()
    torch.testing.assert_close(field, pixels.grad.abs().sum(1).mean(0))
    torch.testing.assert_close(receptive_field(model, images, 2, (2, 3)), field)  # the centre, by its name
    corner = receptive_field(model, images, 0, (0, 0))
    assert corner[:8, :8].sum() > corner[-8:, -8:].sum()


def test_averaging_weights_are_those_of_the_layers():
    model = timm.create_model("test_vim2")
    with torch.no_grad():
        model.stages[2].average.weight.copy_(torch.arange(7.0))
    stages = averaging_weights(model)
    assert len(stages) == 4 and [len(stage.rows) for stage in stages] == [4, 4, 7, 4]
    stage = stages[2]
    assert stage.features == ["input", "token 1", "token 2", "channel 1", "token 3", "token 4", "channel 2"]
    assert stage.readers == [*stage.features[1:], "output"]
    assert [len(row) for row in stage.rows] == [1, 2, 3, 4, 5, 6, 7] and stage.rows[-1].tolist() == list(range(7))


def test_cells_without_a_weight_hold_zeros(tmp_path, monkeypatch):
    """matplotlib multiplies what lies below a mask, too: of memory left over, it warned of overflows now and then."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda fig, path: figures.append(fig))
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float, **rest: np.full(shape, 7).astype(dtype))
    plots.plot_averaging_weights(averaging_weights(timm.create_model("test_vim2")), tmp_path / "weights.png")
    cells = figures[0].axes[0].images[0].get_array()
    assert cells.mask.any() and not cells.data[cells.mask].any()


def test_sizes_of_maps_are_those_of_the_model():
    model = timm.create_model("test_vim2").eval()
    maps = model.forward_intermediates(torch.randn(1, 3, 71, 100), intermediates_only=True)
    assert map_sizes(model, 71, 100) == [tuple(features.shape[2:]) for features in maps]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "Say what to draw: --checkpoint FILE, or --model NAME"),
        (["--model", "vim2_nan"], "did you mean vim2_nano?"),
        (["--model", "resnet18"], "looks into ViM2s, and resnet18 is a ResNet"),
        ([*MODEL, "--stage", "5"], "the model has 1 to 4"),
        ([*MODEL, "--token", "3", "12"], "lies outside the map of stages.1.blocks.0.layers.1"),
        ([*MODEL, "--token", "12", "0"], "which has rows 0 to 11 and columns 0 to 11"),
        ([*MODEL, "--token", "1"], "expected 2 arguments"),
        ([*MODEL, "--token", "-1", "0"], "--token must be 0 or more"),
        ([*MODEL, "--layer", "stages.0.blocks.0.layers.7"], "did you mean stages.0.blocks.0.layers."),
        (
            [*MODEL, "--layer", "stages.0.blocks.0.layers.2"],
            "is an S6 channel mixer, for --channel-layer, not a token mixer",
        ),
        (
            [*MODEL, "--channel-layer", "stages.0.blocks.0.layers.0"],
            "is a token mixer, for --layer, not an S6 channel mixer",
        ),
        ([*MODEL, "channel_mixer=none", "--channel-layer", "stages.0.blocks.0.layers.2"], "has no S6 channel mixers"),
        (
            [*MODEL, "channel_mixer=mlp", "--channel-layer", "stages.0.blocks.0.layers.2"],
            "is an MLP, not an S6 channel mixer; the model has no S6 channel mixers",
        ),
        ([*MODEL, "in_chans=4"], "the model takes 4"),
        (["--model", "test_vim2", "--checkpoint", "none.pth"], "no checkpoint at none.pth"),
    ],
)
def test_mistakes_are_told_in_one_line(images, tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    output = tmp_path / "out"
    assert main(["visualize", str(images), "--output", str(output), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vim2: error: ") and error.count("\n") == 1 and words in error
    assert not output.exists()


def test_mistakes_in_files(images, tmp_path, capsys):
    def fails(*argv) -> str:
        assert main(["visualize", *map(str, argv), "--output", str(tmp_path / "out"), *MODEL]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "There is no nothing.png" in fails("nothing.png")
    (tmp_path / "empty").mkdir()
    assert "There are no images" in fails(tmp_path / "empty")
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert "bad.png is no image that can be read" in fails(images, tmp_path / "bad.png")
    (tmp_path / "photo0.png").write_bytes((images / "photo0.png").read_bytes())
    assert "would both be drawn into photo0_*.png" in fails(images, tmp_path / "photo0.png")
    torch.save(timm.create_model("test_vim2", depths=(1, 1, 1, 1), num_classes=3).state_dict(), tmp_path / "x.pth")
    assert "another architecture" in fails(images, "--checkpoint", tmp_path / "x.pth")


def test_nothing_is_drawn_without_matplotlib(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        visualize(images=images, model="test_vim2")


def test_a_full_gpu_is_told_with_a_remedy(images, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("vim2.visualize.command.receptive_field", full)
    assert main(["visualize", str(images), "--output", str(tmp_path), *MODEL]) == 2
    assert "use a smaller --img-size" in capsys.readouterr().err
