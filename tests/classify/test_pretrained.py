"""The weights that come with the package, by their class names in predict and validate."""

import json

import pytest
import timm
import torch
from classify_helpers import COLOURS, make_image, make_pack
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from vim2.classify import predict, train, validate
from vim2.vim2 import TINY_IMAGENET

MODEL = dict(model="vim2_nano", pretrained=True, device="cpu")


@pytest.fixture
def photo(tmp_path):
    """An image in a folder with WordNet's id of golden retrievers."""
    make_image(tmp_path / "n02099601" / "0.png", COLOURS["red"], 0)
    return tmp_path / "n02099601" / "0.png"


def test_predict_names_what_it_sees(photo, tmp_path):
    (prediction,) = predict(images=[photo], topk=200, output=tmp_path, **MODEL)
    assert json.loads((tmp_path / "predictions.json").read_text()) == [prediction]
    labels = {t["index"]: t["label"] for t in prediction["top"]}
    assert [labels[i] for i in range(200)] == [words.partition(",")[0] for words in TINY_IMAGENET.values()]
    assert len(set(labels.values())) == 200 and labels[26] == "golden retriever"
    assert prediction["true_label"] == "golden retriever"
    model = timm.create_model("vim2_nano", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(transform(Image.open(photo).convert("RGB"))[None]).softmax(1)[0]
    found = torch.tensor([t["probability"] for t in sorted(prediction["top"], key=lambda t: t["index"])])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_validate_matches_classes_by_wordnets_ids(photo, tmp_path):
    """Here of a pack that has three of them, in another order."""
    names = ["n12267677", "n01443537", "n02099601"]  # the last, the first, golden retrievers
    pack = make_pack(tmp_path / "some.npz", [photo.read_bytes()] * 3, [2, 1, 0], names)
    best = predict(images=[photo], topk=1, output=tmp_path, **MODEL)[0]["top"][0]["index"]
    (row,) = validate(data_dir=pack, workers=0, output=tmp_path, **MODEL)
    assert row["img_size"] == 128 and row["images"] == 3
    assert row["top1"] == pytest.approx(100 / 3 if best in (0, 26, 199) else 0)


def test_other_classes_are_refused_by_name(data, fails, tmp_path):
    said = fails("validate", "--data-dir", data, "--model", "vim2_nano", "--pretrained", "--output", tmp_path)
    assert "classes that vim2_nano does not know (blue" in said and "knows n01443537" in said


def test_weights_that_are_not_at_hand_without_a_network(photo, fails, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise LocalEntryNotFoundError("Cannot find the requested files.\nPlease check.")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    said = fails("predict", photo, "--model", "resnet18", "--pretrained", "--output", tmp_path)
    assert "weights of resnet18 cannot be had (Cannot find the requested files): fetch them" in said


def test_fine_tuning_starts_from_them(data, tmp_path, capsys):
    """A linear probe trains the classifier alone: all else is still what ships."""
    options = dict(freeze=5, epochs=1, batch_size=8, workers=0, img_size=32, output=tmp_path, experiment="probe")
    train(data_dir=data, **MODEL, **options)
    said = capsys.readouterr().out
    assert "963 of them trained" in said and "random weights" not in said
    probe = torch.load(tmp_path / "probe" / "best.pth", weights_only=True)
    shipped = timm.create_model("vim2_nano", pretrained=True).state_dict()
    assert probe["num_classes"] == 3 and probe["class_names"] == ["blue", "green", "red"]
    assert probe["state_dict"]["head.fc.weight"].shape == (3, 320)
    assert all(torch.equal(v, shipped[n]) for n, v in probe["state_dict"].items() if not n.startswith("head.fc"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("test_vim2", "no pretrained weights of test_vim2: take a model that has some (vim2_nano, vim2_nano_token_d1)"),
        ("vim2_nano.x", "take vim2_nano.tiny_in200."),
    ],
)
def test_weights_that_there_are_not(name, says, data, fails):
    assert says in fails("train", "--data-dir", data, "--model", name, "--pretrained", "--device", "cpu")
