"""Folders for timm, transformers and the Hugging Face Hub: read again, the model is the same."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import push_to_hf_hub

import vim2  # noqa: F401  (registers the models)
from vim2.checkpoints import save_checkpoint
from vim2.export import export_timm
from vim2.export.cli import main

KWARGS = dict(depths=(1, 1), dims=(16, 24), d_state=2, channel_patch=8, channel_expand=2.0)
INPUT = dict(input_size=(1, 40, 40), mean=(0.3,), std=(0.2,), interpolation="bilinear", crop_pct=0.8)
INPUT["crop_mode"] = "center"
NAMES = ["cat", "dog", "hen"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vim2", num_classes=3, in_chans=1, **KWARGS).eval()


@pytest.fixture
def folder(model, tmp_path):
    """Of a checkpoint as `vim2 train` writes it."""
    facts = dict(arch="test_vim2", num_classes=3, in_chans=1, class_names=NAMES, data_config=INPUT, model_kwargs=KWARGS)
    save_checkpoint({**facts, "state_dict": model.state_dict()}, tmp_path / "best.pth")
    argv = ["export", "--checkpoint", tmp_path / "best.pth", "--format", "timm", "--output", tmp_path / "mine"]
    assert main(list(map(str, argv))) == 0
    return tmp_path / "mine"


@torch.no_grad()
def assert_same(read, model):
    x = torch.randn(2, 1, 40, 48)
    torch.testing.assert_close(read.eval()(x), model(x), rtol=0, atol=0)


def test_folder(folder, model):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    read = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert_same(read, model)
    assert read.pretrained_cfg["label_names"] == NAMES
    config = resolve_data_config({}, model=read)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()} == INPUT
    maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(0, 1))(
        torch.zeros(1, 1, 64, 64)
    )
    assert [m.shape[1] for m in maps] == [16, 24]
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).num_classes == 7


def test_without_what_is_around_it(model, tmp_path):
    """Compiled models have no len(), which timm asks for, and parallel ones no pretrained_cfg."""
    export_timm(torch.nn.DataParallel(torch.compile(model)), tmp_path / "mine")
    assert_same(timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True), model)


def test_from_the_hub(folder, model, monkeypatch):
    def download(repo_id, filename, **kwargs):
        assert repo_id == "someone/mine"
        return str(folder / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    assert_same(timm.create_model("hf-hub:someone/mine", pretrained=True), model)


def test_to_the_hub(model, tmp_path, monkeypatch):
    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": repo_id})

        def file_exists(self, **kwargs):
            return False

        def upload_folder(self, folder_path, **kwargs):
            for path in Path(folder_path).iterdir():
                path.rename(tmp_path / path.name)

    monkeypatch.setattr("timm.models._hub.HfApi", Api)
    push_to_hf_hub(model, "someone/mine", safe_serialization=True, model_args=dict(KWARGS, in_chans=1))
    assert "mine" in (tmp_path / "README.md").read_text()
    assert_same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model)


def test_transformers(folder, model):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    read = transformers.AutoModelForImageClassification.from_pretrained(folder)
    x = torch.randn(2, 1, 40, 48)
    torch.testing.assert_close(read.eval()(pixel_values=x).logits, model(x), rtol=0, atol=1e-6)
    assert [read.config.id2label[i] for i in range(3)] == NAMES


def test_the_model_stays_as_it_is(model, tmp_path):
    before = dict(model.pretrained_cfg)
    export_timm(model, tmp_path, data_config=INPUT)
    assert dict(model.pretrained_cfg) == before
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["crop_pct"] == 0.8 and "label_names" not in config


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--opset", "20"], "--opset is for --format onnx"),
        (["--compare"], "--compare is for"),
        ([], "is a file"),
        (["--output", "file/inside"], "file/inside (Not a directory): choose another --output"),
    ],
)
def test_mistakes(argv, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    command = ["export", "--model", "test_vim2", "--format", "timm", "--output", "file", *argv]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error


def test_weights_that_cannot_be_written(tmp_path, capsys):
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_vim2").state_dict(), file)
    output = file / "a.safetensors"
    command = ["export", "--model", "test_vim2", "--checkpoint", str(file), "--format", "safetensors"]
    assert main([*command, "--output", str(output)]) == 2
    told = f"Nothing can be written into {file} (File exists): choose another --output."
    assert capsys.readouterr().err == f"vim2: error: {told}\n"


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def test_what_is_said_of_shipped_weights_is_not_said_of_others(tmp_path):
    export_timm(timm.create_model("vim2_nano", num_classes=3), tmp_path)
    config = read_config(tmp_path)
    assert not config.get("label_names") and not config["pretrained_cfg"].get("label_descriptions")
    assert "Tiny-ImageNet" not in json.dumps(config) and "tiny_in200" not in json.dumps(config)
    assert "license" not in config["pretrained_cfg"] and "license" not in (tmp_path / "README.md").read_text()


TERMS = {"license": "other", "notes": ["ImageNet's terms allow non-commercial research and education only."]}


@pytest.mark.parametrize("kept", [True, False], ids=["", "of a run from before terms were kept"])
def test_the_terms_of_weights_go_with_what_is_trained_from_them(kept, tmp_path):
    name = "vim2_nano_token_d1"
    said = "Trained on Tiny-ImageNet-200 at 128 x 128 pixels, for research only."
    tuned = TERMS | {"description": f"Fine-tuned from {name}.tiny_in200. {said}"}
    facts = dict(arch=name, num_classes=3, args={"pretrained": True}) | ({"terms": tuned} if kept else {})
    model = timm.create_model(name, num_classes=3)
    save_checkpoint({**facts, "state_dict": model.state_dict()}, tmp_path / "best.pth")
    argv = ["export", "--checkpoint", tmp_path / "best.pth", "--format", "timm", "--output", tmp_path / "mine"]
    assert main([*map(str, argv)]) == 0
    cfg = read_config(tmp_path / "mine")["pretrained_cfg"]
    assert {k: cfg.get(k) for k in tuned} == tuned
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("---\n") and '\nlicense: "other"\n' in card
    assert tuned["description"] in card and TERMS["notes"][0] in card
    (tmp_path / "mine" / "README.md").write_text("my own card")
    # exported again, they say the same, and a card that its owner has written stays
    argv = ["export", "--model", f"local-dir:{tmp_path / 'mine'}", "--pretrained", "--format", "timm", "--output"]
    assert main([*argv, str(tmp_path / "again")]) == 0
    again = read_config(tmp_path / "again")["pretrained_cfg"]
    assert {k: again.get(k) for k in tuned} == tuned
    export_timm(model, tmp_path / "mine", terms=timm.get_pretrained_cfg(name).to_dict())
    assert read_config(tmp_path / "mine")["pretrained_cfg"]["description"] == said
    assert (tmp_path / "mine" / "README.md").read_text() == "my own card"
