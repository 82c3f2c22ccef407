import json
import os
import sys

import numpy as np
import pytest
import timm
import torch
from classify_helpers import COLOURS, make_folders, make_image
from PIL import Image

from vim2.classify import predict, validate
from vim2.classify.cli import main
from vim2.classify.models import load_checkpoint_model
from vim2.command.errors import UserError


def test_accuracy_at_many_sizes(data, trained, tmp_path, capsys):
    argv = ["validate", "--data-dir", data, "--checkpoint", trained / "best.pth", "--img-size", 32, 48, 64]
    assert main([*map(str, argv), "-j", "0", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "validation.json").read_text())
    assert [row["img_size"] for row in rows] == [32, 48, 64]
    assert all(row["images"] == 15 and 0 <= row["top1"] <= row["top5"] == 100 for row in rows)
    table = (tmp_path / "validation.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("\n") == 5 and f"| 32 | {rows[0]['top1']:.2f} | 100.00 |" in table
    assert Image.open(tmp_path / "input_scaling.png").size[0] > 300
    history = json.loads((trained / "metrics.json").read_text())["history"]
    best = max(history, key=lambda row: (row["ema_top1"], row["epoch"]))
    assert rows[0]["loss"] == pytest.approx(best["ema_val_loss"], rel=1e-5)  # the EMA is what counts
    plain = validate(data_dir=data, checkpoint=trained / "best.pth", no_ema=True, workers=0, output=tmp_path)
    assert plain[0]["loss"] == pytest.approx(best["val_loss"], rel=1e-5)


def test_classes_are_matched_by_name(data, trained, tmp_path):
    """A folder with some of the classes only: their numbers are the model's, not the folder's."""
    some = make_folders(tmp_path / "some", train=0, val=5, colours={"red": COLOURS["red"]})
    whole = predict(images=[some], checkpoint=trained / "best.pth", output=tmp_path)
    right = sum(p["top"][0]["label"] == "red" for p in whole)
    scores = validate(data_dir=some, checkpoint=trained / "best.pth", workers=0, output=tmp_path)[0]
    assert scores["images"] == 5 and scores["top1"] == pytest.approx(100 * right / 5)


def test_weights_of_any_origin_need_a_model_and_nothing_else(data, trained, tmp_path):
    weights = torch.load(trained / "best.pth", weights_only=True)["state_dict"]
    torch.save(weights, tmp_path / "bare.pth")
    options = dict(data_dir=data, img_size=32, workers=0, output=tmp_path)
    bare = validate(checkpoint=tmp_path / "bare.pth", model="test_vim2", crop_pct=0.9, **options)
    ours = validate(checkpoint=trained / "best.pth", no_ema=True, crop_pct=0.9, **options)
    assert bare[0]["loss"] == pytest.approx(ours[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["test_vim2", "test_vit", "levit_128s"])
def test_bare_weights_tell_their_classes_and_channels(data, tmp_path, name):
    """levit_128s has two heads of names of their own, and as many convolutions in its stem."""
    kwargs = dict(num_classes=3) if name == "levit_128s" else dict(num_classes=3, in_chans=1)
    torch.save(timm.create_model(name, **kwargs).state_dict(), tmp_path / "bare.pth")
    options = dict(checkpoint=tmp_path / "bare.pth", model=name, output=tmp_path)
    (row,) = validate(data_dir=data, workers=0, **options)
    found = predict(images=[data / "val"], **options)
    assert all(len(p["top"]) == 3 for p in found)
    right = sum(p["top"][0]["label"] == str(sorted(COLOURS).index(p["file"].split("/")[-2])) for p in found)
    assert row["images"] == len(found) == 15 and row["top1"] == pytest.approx(100 * right / 15)


def test_bare_weights_whose_first_convolution_sees_several_pixels_at_once(tmp_path):
    small = dict(layers=[1, 1, 1, 1], width_factor=0.1)
    torch.save(timm.create_model("tresnet_m", num_classes=3, **small).state_dict(), tmp_path / "bare.pth")
    model, _ = load_checkpoint_model(tmp_path / "bare.pth", "tresnet_m", small)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_bare_weights_of_a_name_with_a_tag_that_there_is_not(data, tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"There are no weights test_vit\.none: take test_vit\.r160_in1k"):
        predict(images=[data / "val"], checkpoint=tmp_path / "bare.pth", model="test_vit.none", output=tmp_path)


@pytest.mark.parametrize(
    ("name", "kwargs", "options", "says"),
    [
        ("test_vit", {}, {"img_size": 100}, r"cannot read images of 100 x 100 pixels .*: change --img-size, to 96"),
        ("test_vim2", {"in_chans": 4}, {}, "Images have 1 or 3 channels, and the model takes 4: use another"),
    ],
)
def test_images_that_a_model_cannot_read(data, tmp_path, name, kwargs, options, says):
    torch.save(timm.create_model(name, num_classes=3, **kwargs).state_dict(), tmp_path / "bare.pth")
    common = dict(checkpoint=tmp_path / "bare.pth", model=name, output=tmp_path / "out")
    with pytest.raises(UserError, match=says):
        predict(images=[data / "val"], **options, **common)
    with pytest.raises(UserError, match=says):
        validate(data_dir=data, workers=0, **options, **common)
    assert not (tmp_path / "out").exists()


def test_prediction_of_a_folder(data, trained, tmp_path, capsys):
    argv = ["predict", data / "val", "--checkpoint", trained / "last.pth", "--topk", 2, "--output", tmp_path]
    assert main(list(map(str, argv))) == 0
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    assert len(predictions) == 15
    assert lines[15:] == [f"{tmp_path}/predictions.json has all 15", f"{tmp_path}/predictions.png shows 15 of 15"]
    for line, prediction in zip(lines, predictions):
        first, second = prediction["top"]
        assert first["probability"] >= second["probability"] and first["probability"] + second["probability"] <= 1.0001
        assert line == (
            f"{prediction['file']}: {first['label']} {100 * first['probability']:.1f} %, "
            f"{second['label']} {100 * second['probability']:.1f} %"
        )
        assert prediction["true_label"] in prediction["file"]
        assert ["blue", "green", "red"][first["index"]] == first["label"]
    right = sum(p["top"][0]["label"] == p["true_label"] for p in predictions)
    best = json.loads((trained / "metrics.json").read_text())["history"][-1]
    assert 100 * right / 15 == pytest.approx(best["ema_top1"])
    assert Image.open(tmp_path / "predictions.png").size[0] > 300


def test_prediction_of_images_and_globs(trained, tmp_path):
    for i in range(3):
        make_image(tmp_path / "mine" / f"{i}.webp", COLOURS["green"], i)
    (tmp_path / "mine" / "notes.txt").write_text("no image")
    found = predict(images=[str(tmp_path / "mine" / "*")], checkpoint=trained / "best.pth", output=tmp_path / "a")
    assert [p["file"][-6:] for p in found] == ["0.webp", "1.webp", "2.webp"]
    assert all("true_label" not in p and len(p["top"]) == 3 for p in found)
    one = predict(images=tmp_path / "mine" / "1.webp", checkpoint=trained / "best.pth", output=tmp_path / "b")
    assert one[0]["top"][0]["probability"] == pytest.approx(found[1]["top"][0]["probability"], rel=1e-4)
    assert (tmp_path / "b" / "predictions.png").exists()


def test_photographs_that_lie_on_their_side_are_the_same_to_all_commands(trained, tmp_path):
    """Upright, both are half blue and half red, in columns; what a camera held askew stores is in rows."""
    columns = np.zeros((40, 40, 3), dtype=np.uint8)
    columns[:, :20], columns[:, 20:] = COLOURS["blue"], COLOURS["red"]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    for split in ("plain", "turned"):
        (tmp_path / split / "blue").mkdir(parents=True)
    Image.fromarray(columns).save(tmp_path / "plain" / "blue" / "0.png")
    Image.fromarray(np.rot90(columns)).save(tmp_path / "turned" / "blue" / "0.png", exif=exif)
    losses, found = {}, {}
    for split in ("plain", "turned"):
        options = dict(checkpoint=trained / "best.pth", output=tmp_path)
        for in_memory in (False, True):
            (row,) = validate(data_dir=tmp_path, split=split, workers=0, in_memory=in_memory, **options)
            losses[split, in_memory] = row["loss"]
        found[split] = predict(images=[tmp_path / split], **options)[0]["top"]
    assert losses["turned", False] == losses["plain", False] == pytest.approx(losses["turned", True], rel=1e-6)
    assert found["turned"] == found["plain"]
    by_label = {t["label"]: t["probability"] for t in found["plain"]}
    assert -np.log(by_label["blue"]) == pytest.approx(losses["plain", False], rel=1e-4)


def test_names_that_are_not_utf_8(trained, tmp_path):
    folder = os.fsencode(tmp_path) + b"/k\xe4se"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system has no such names")
    make_image(tmp_path / "0.png", COLOURS["red"], 0)
    os.rename(tmp_path / "0.png", folder + b"/\xdc.png")
    predict(images=[os.fsdecode(folder)], checkpoint=trained / "best.pth", output=tmp_path)
    (told,) = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert os.fsencode(told["file"]) == folder + b"/\xdc.png"
    assert (tmp_path / "predictions.png").exists()


def test_a_class_map_names_the_classes(data, trained, tmp_path):
    (tmp_path / "names.txt").write_text("bleu\nvert\nrouge\n")
    options = dict(images=[data / "val" / "red" / "0.png"], checkpoint=trained / "best.pth", output=tmp_path, topk=9)
    named = predict(class_map=tmp_path / "names.txt", **options)[0]["top"]
    french = {"blue": "bleu", "green": "vert", "red": "rouge"}
    assert [t["label"] for t in named] == [french[t["label"]] for t in predict(**options)[0]["top"]]


def test_a_class_map_chooses_classes_by_name_whatever_its_order(data, trained, tmp_path):
    options = dict(data_dir=data, workers=0, output=tmp_path, checkpoint=trained / "best.pth")
    (tmp_path / "names.txt").write_text("red\nblue\ngreen\n")
    assert validate(class_map=tmp_path / "names.txt", **options)[0]["top1"] == validate(**options)[0]["top1"]
    (tmp_path / "names.txt").write_text("red\nblue\n")
    (row,) = validate(class_map=tmp_path / "names.txt", **options)
    found = predict(
        images=[data / "val" / c for c in ("red", "blue")], checkpoint=trained / "best.pth", output=tmp_path
    )
    assert row["images"] == len(found)
    assert row["top1"] == pytest.approx(100 * np.mean([p["top"][0]["label"] == p["true_label"] for p in found]))
    (tmp_path / "names.txt").write_text("blue\nred\nverde\n")
    for command, others in ((validate, {}), (predict, dict(images=data / "val" / "red" / "0.png"))):
        given = {k: v for k, v in options.items() if command is validate or k in ("output", "checkpoint")}
        with pytest.raises(UserError, match="order"):
            command(class_map=tmp_path / "names.txt", **given, **others)


def test_an_output_that_cannot_be_written_costs_no_work(data, trained, tmp_path, monkeypatch):
    def work(*_, **__):
        raise AssertionError("something was computed")

    monkeypatch.setattr("vim2.classify.validation.evaluate", work)
    monkeypatch.setattr("vim2.classify.prediction.read_pixels", work)
    (tmp_path / "file").touch()
    common = dict(checkpoint=trained / "best.pth", output=tmp_path / "file" / "out")
    told = r"Nothing can be written into .*out \(Not a directory\): choose another --output"
    with pytest.raises(UserError, match=told):
        predict(images=[data / "val"], **common)
    with pytest.raises(UserError, match=told):
        validate(data_dir=data, workers=0, **common)


def test_without_matplotlib_only_the_pictures_are_missing(data, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    image = data / "val" / "red" / "0.png"
    assert len(predict(images=[image], checkpoint=trained / "best.pth", output=tmp_path)) == 1
    options = dict(data_dir=data, workers=0, output=tmp_path, img_size=[32, 48])
    assert len(validate(checkpoint=trained / "best.pth", **options)) == 2
    assert capsys.readouterr().out.count("pip install matplotlib") == 2
    assert {p.name for p in tmp_path.iterdir()} == {"predictions.json", "validation.json", "validation.md"}


def test_two_classes_may_have_one_name(data, trained, tmp_path):
    """As ImageNet's cranes have. Only a folder of that name is not known to be of either."""
    saved = torch.load(trained / "best.pth", weights_only=True)
    assert saved["class_names"] == ["blue", "green", "red"]
    torch.save({**saved, "class_names": ["crane", "crane", "red"]}, tmp_path / "cranes.pth")
    options = dict(workers=0, output=tmp_path, checkpoint=tmp_path / "cranes.pth")
    images = dict(images=[data / "val" / "red" / "0.png"], output=tmp_path, topk=3)
    (found,), (before,) = (predict(checkpoint=path, **images) for path in (options["checkpoint"], trained / "best.pth"))
    renamed = {"blue": "crane", "green": "crane", "red": "red"}
    assert [t["label"] for t in found["top"]] == [renamed[t["label"]] for t in before["top"]]
    assert [t["index"] for t in found["top"]] == [t["index"] for t in before["top"]] and found["true_label"] == "red"

    red = make_folders(tmp_path / "red", train=0, val=2, colours={"red": COLOURS["red"]})
    assert validate(data_dir=red, **options)[0]["images"] == 2
    one = make_folders(tmp_path / "one", train=0, val=2, colours={"crane": COLOURS["green"], "red": COLOURS["red"]})
    with pytest.raises(UserError, match=r"several classes called crane, .* in a file, give it as --class-map"):
        validate(data_dir=one, **options)
    images["images"] = [one / "val" / "crane" / "0.png"]
    assert "true_label" not in predict(checkpoint=options["checkpoint"], **images)[0]
    (tmp_path / "some.txt").write_text("crane\n")
    with pytest.raises(UserError, match="several classes called crane"):
        validate(data_dir=one, class_map=tmp_path / "some.txt", **options)
    (tmp_path / "all.txt").write_text("bird\ncrane\nred\n")
    assert validate(data_dir=one, class_map=tmp_path / "all.txt", **options)[0]["images"] == 4
