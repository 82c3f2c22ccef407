"""tools/comparisons/scan_states.py: what is left out are the states and nothing else."""

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from comparisons.scan_states import main, shares_of_states, without_states
from vim2.checkpoints import save_checkpoint
from vim2.mixers import SelectiveChannelMixer, SelectiveTokenMixer


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = timm.create_model("test_vim2", num_classes=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "s6" in name:  # states that count
                parameter += torch.randn_like(parameter)
    return model


def mixers_of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("kind", [SelectiveChannelMixer, SelectiveTokenMixer])
def test_a_scan_without_states_is_one_that_reads_none_of_them(model, kind):
    image = torch.randn(2, 3, 64, 64)
    before = model(image)
    with without_states(model, kind):
        without = model(image)
    assert not torch.allclose(without, before, rtol=1e-2)
    assert torch.equal(model(image), before)
    with torch.no_grad():
        for mixer in mixers_of(model, kind):
            mixer.s6.x_proj_weight[:, -mixer.s6.d_state :] = 0  # C
    torch.testing.assert_close(model(image), without)


def test_shares(model):
    with torch.no_grad():
        for mixer in mixers_of(model, SelectiveTokenMixer):
            mixer.s6.D.zero_()
        for mixer in mixers_of(model, SelectiveChannelMixer):
            mixer.s6.x_proj_weight[:, -mixer.s6.d_state :] = 0
    shares = shares_of_states(model, torch.randn(2, 3, 64, 64))
    assert len(shares) == 15 and all(name.endswith(".mixer") for name in shares)
    for name, share in shares.items():
        is_channel_mixer = isinstance(model.get_submodule(name), SelectiveChannelMixer)
        assert share == pytest.approx(0 if is_channel_mixer else 1, abs=1e-5)


def test_the_command(model, tmp_path, capsys):
    names, files = ["a", "b", "c"], []
    for i in range(9):
        Image.fromarray(np.full((32, 32, 3), 20 * i, "uint8")).save(file := io.BytesIO(), "png")
        files.append(np.frombuffer(file.getvalue(), "uint8"))
    offsets = np.cumsum([0, *map(len, files)])
    pack = dict(data=np.concatenate(files), offsets=offsets, labels=np.arange(9) % 3, names=np.array(names))
    np.savez(tmp_path / "val.npz", **pack)
    facts = dict(arch="test_vim2", num_classes=3, class_names=names)
    save_checkpoint({**facts, "state_dict": model.state_dict()}, tmp_path / "best.pth")
    argv = ["--data-dir", tmp_path, "--split", "val.npz", "--checkpoint", tmp_path / "best.pth", "--img-size", 32]
    main([*map(str, argv), "--device", "cpu"])
    out = capsys.readouterr().out
    assert "test_vim2, 32 pixels, 9 images" in out
    for row in ("| - | ", "| channel mixers | ", "| token mixers | ", "| stages.2.blocks.1.layers.2.mixer | "):
        assert row in out
