"""`--model local-dir:FOLDER` and `hf-hub:USER/NAME`, names that timm.create_model takes."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from classify_helpers import TINY
from huggingface_hub.errors import LocalEntryNotFoundError

from benchmarks.arena.models import Entry, create
from vim2.benchmark.cli import main as benchmark
from vim2.checkpoints import save_checkpoint
from vim2.classify import predict, train, validate
from vim2.classify.cli import main
from vim2.classify.facts import read_described, read_pretrained_cfg
from vim2.classify.models import input_config, load_checkpoint_model
from vim2.classify.options import InputOptions
from vim2.classify.training import started_from
from vim2.command.errors import UserError
from vim2.export import export_timm
from vim2.export.cli import main as export

KWARGS = dict(d_state=2, dims=[16, 24, 32, 40])
TERMS = {"license": "mit", "description": "Ours.", "notes": ["A note."], "origin_url": "https://somewhere"}
CONFIG = dict(input_size=(3, 32, 32), mean=(0.3, 0.4, 0.5), std=(0.2, 0.2, 0.2), interpolation="bilinear", crop_pct=0.8)


@pytest.fixture
def folder(tmp_path):
    """Of a model with arguments, classes, images and terms of its own."""
    torch.manual_seed(0)
    model = timm.create_model("test_vim2", num_classes=3, **KWARGS)
    export_timm(model, tmp_path / "mine", CONFIG, ["blue", "green", "red"], KWARGS, TERMS)
    return tmp_path / "mine"


def options(data, tmp_path, **more):
    return dict(data_dir=data, workers=0, device="cpu", batch_size=8, output=tmp_path / "runs", **more)


def test_a_folder_is_as_good_as_its_weights(folder, data, tmp_path):
    image, out = data / "val" / "red" / "0.png", dict(output=tmp_path, device="cpu")
    ways = dict(model=f"local-dir:{folder}", pretrained=True), dict(checkpoint=folder)
    first, second = (predict(images=[image], **way, **out) for way in ways)
    assert first == second and first[0]["true_label"] == "red"
    first, second = (validate(**options(data, tmp_path), **way)[0] for way in ways)
    assert [first[k] for k in ("loss", "top1", "img_size")] == [second[k] for k in ("loss", "top1", "img_size")]


def test_training_from_a_folder_that_is_gone_later(folder, data, tmp_path):
    """What it says of the model and its images is in the checkpoints, by which the run goes on and is exported."""
    name = f"local-dir:{folder}"
    common = options(data, tmp_path, model=name, pretrained=True, sched="constant", warmup_epochs=0)
    whole = train(**common, epochs=2, experiment="whole")
    first = train(**common, epochs=1)
    assert first["folder"].endswith(f"runs/mine-{data.name}")
    shutil.rmtree(folder)
    after = train(**common, epochs=2, resume=True)
    assert [row["val_loss"] for row in after["history"]] == [row["val_loss"] for row in whole["history"]]
    saved = torch.load(f"{after['folder']}/best.pth", weights_only=True)
    assert saved["arch"] == "test_vim2" and saved["data_config"]["mean"] == CONFIG["mean"]
    assert {k: saved["model_kwargs"][k] for k in KWARGS} == KWARGS
    assert saved["terms"] == {**TERMS, "description": "Fine-tuned from mine. Ours."}
    model, facts = load_checkpoint_model(f"{after['folder']}/best.pth")
    assert model.num_features == 40 and facts["class_names"] == ["blue", "green", "red"]


def test_what_is_trained_on_from_a_checkpoint_keeps_its_terms(folder, data, tmp_path):
    common = options(data, tmp_path, model="test_vim2", model_kwargs=KWARGS, img_size=32, epochs=1)
    second = train(**common, initial_checkpoint=folder, experiment="second")["folder"]
    third = train(**common, initial_checkpoint=f"{second}/best.pth", experiment="third")["folder"]
    bare = tmp_path / "bare.pth"
    torch.save(timm.create_model("test_vim2", **KWARGS).state_dict(), bare)
    unknown = train(**common, initial_checkpoint=bare, experiment="unknown")["folder"]
    scratch = train(**common, experiment="scratch")["folder"]
    terms = [torch.load(f"{run}/best.pth", weights_only=True)["terms"] for run in (second, third, unknown, scratch)]
    assert terms[0] == terms[1] == {**TERMS, "description": "Fine-tuned from mine. Ours."}
    assert terms[2:] == [{"description": "Fine-tuned from bare.pth, in which no terms are told."}, {}]


def test_the_packages_weights_have_their_terms_by_their_path_too():
    cfg = timm.get_pretrained_cfg("vim2_nano")
    told = started_from(cfg.file)
    assert (told["license"], told["notes"]) == (cfg.license, list(cfg.notes))
    assert told["description"] == f"Fine-tuned from {Path(cfg.file).name}. {cfg.description}"


@pytest.mark.parametrize(
    ("args", "description"),
    [
        ({"initial_checkpoint": "somewhere/mine.pth", "pretrained": True}, "mine.pth, in which no terms are told."),
        ({"initial_checkpoint": None, "pretrained": True}, "test_vim2."),
        ({"initial_checkpoint": None, "pretrained": False}, None),
    ],
)
def test_a_run_from_before_terms_were_kept(args, description, data, tmp_path):
    """Its options say how it began, for it and for what is trained from it."""
    common = options(data, tmp_path, model="test_vim2", img_size=32)
    run = Path(train(**common, epochs=1, experiment="before")["folder"])
    for name in ("last.pth", "best.pth"):
        saved = torch.load(run / name, weights_only=True)
        del saved["terms"]
        save_checkpoint({**saved, "args": saved["args"] | args}, run / name)
    start = read_described(run / "best.pth")[1]["terms"]
    assert start == ({"description": f"Fine-tuned from {description}"} if description else {})
    after = train(**common, epochs=1, initial_checkpoint=run / "best.pth", experiment="after")["folder"]
    train(resume=run / "last.pth", epochs=2)
    assert [torch.load(f"{of}/last.pth", weights_only=True)["terms"] for of in (after, run)] == [start, start]


def test_other_classes_and_other_arguments(folder, data, tmp_path, fails):
    argv = ["train", "--data-dir", data, *TINY, "--epochs", 1, "--output", tmp_path, "--model", f"local-dir:{folder}"]
    assert main([*map(str, argv), "--num-classes", "5", "--pretrained", "--in-chans", "1"]) == 0
    said = fails(*argv, "--pretrained", "--model-kwargs", "d_state=4", "--experiment", "other")
    assert "cannot be made with these --model-kwargs (d_state=4): " in said and "site-packages" not in said
    assert main([*map(str, argv), "--model-kwargs", "d_state=4", "--experiment", "random"]) == 0
    saved = torch.load(tmp_path / "random" / "best.pth", weights_only=True)
    assert saved["model_kwargs"]["d_state"] == 4 and saved["terms"] == {}


def test_a_repository_on_the_hub(folder, data, tmp_path, monkeypatch):
    def download(repo_id, filename, **kwargs):
        assert (repo_id, kwargs["revision"]) == ("someone/mine", "v1")
        return str(folder / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    run = train(**options(data, tmp_path, model="hf-hub:someone/mine@v1", pretrained=True, epochs=1))
    assert run["folder"].endswith(f"runs/someone-mine@v1-{data.name}")
    saved = torch.load(f"{run['folder']}/best.pth", weights_only=True)
    assert saved["arch"] == "test_vim2" and saved["terms"]["description"] == "Fine-tuned from someone/mine@v1. Ours."
    argv = ["export", "--model", "hf-hub:someone/mine@v1", "--pretrained", "--format", "timm", "--output"]
    assert export([*argv, str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_no_way_to_the_hub(data, fails, monkeypatch):
    def no_network(*_, **__):
        raise LocalEntryNotFoundError("Cannot find the requested files.\nPlease check.")

    argv = ["predict", data / "val" / "red", "--pretrained", "--model", "hf-hub:someone/mine"]
    monkeypatch.setattr("timm.models._hub.hf_hub_download", no_network)
    assert "hf-hub:someone/mine cannot be had (Cannot find the requested files): check the name" in fails(*argv)
    monkeypatch.setattr("timm.models._hub._has_hf_hub", False)
    assert "`pip install huggingface_hub`" in fails(*argv)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("local-dir:nowhere", "nowhere is no folder, for the model local-dir:nowhere: name one that `vim2 export"),
        ("local-dir:empty", "empty has no config.json of timm's"),
        ("hf-hub:", "hf-hub: names nothing"),
        ("someone/mine", "There is no model someone/mine; a folder is local-dir:someone/mine, a repository of"),
        ("vim2_teeny", "There is no model vim2_teeny; did you mean vim2_tiny?"),
    ],
)
def test_names_that_stand_for_nothing(name, says, data, fails, failing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for command in (["predict", data / "val" / "red"], ["train", "--data-dir", data, "--device", "cpu"]):
        assert says in fails(*command, "--pretrained", "--model", name)
    for command in ("benchmark", "--count", "--device", "cpu"), ("export", "--format", "timm", "--output", "out"):
        room = {"benchmark": benchmark, "export": export}[command[0]]
        assert says in failing(room, "vim2")(*command, "--model", name)
    with pytest.raises(UserError) as error:
        create(Entry("label", name, {}))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("{", r"config.json cannot be read ("),
        ([1], "config.json cannot be read ("),
        ({"architectures": ["Bert"]}, "config.json cannot be read (it has no 'architecture')"),
        (
            {"architecture": "my_net", "pretrained_cfg": {}},
            "is of a model my_net, which timm does not know",
        ),
        ({"architecture": "hf-hub:a/b", "pretrained_cfg": {}}, "is of a model hf-hub:a/b, which timm does not know"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "checkpoint_path is none"),
        ({"model_args": {"no_such": 1}}, "no_such"),
        ({"architecture": "vim2_nano", "model_args": {}}, "cannot be made: Error(s) in loading state_dict"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_true(change, says, folder, data, fails):
    path = folder / "config.json"
    if isinstance(change, dict) and "architectures" not in change:
        change = {**json.loads(path.read_text()), **change}
    path.write_text(change if isinstance(change, str) else json.dumps(change))
    assert says in fails("predict", data / "val" / "red", "--pretrained", "--model", f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("mean", ["a", 0.5, 0.5], "mean must be a finite number, got ['a', 0.5, 0.5]"),
        ("mean", "grey", "mean must be a finite number, got 'grey'"),
        ("mean", [0.5, 0.5], "mean must be 3 numbers, one a channel, got [0.5, 0.5]"),
        ("std", [0.2, 0.2, 0], "std must be positive"),
        ("std", {"r": 1}, "std must be a finite number"),
        ("input_size", [3, 32], "input_size must be 3 values, got"),
        ("input_size", 32, "input_size must be 3 values, got 32"),
        ("interpolation", "cubic", "interpolation must be one of nearest"),
        ("crop_pct", "all", "crop_pct must be a finite number"),
        ("crop_mode", 1, "crop_mode must be text"),
        ("num_classes", "three", "num_classes must be a whole number"),
        ("label_names", 3, "label_names must be text"),
        ("label_names", ["blue", 1, 2], "label_names must be text"),
        ("label_descriptions", ["blue"], "label_descriptions must be a dictionary"),
        ("label_descriptions", {"blue": 1}, "label_descriptions must be text by name"),
        ("first_conv", 1, "first_conv must be text"),
        ("classifier", {"a": 1}, "classifier must be text"),
    ],
    ids=str,
)
def test_a_pretrained_cfg_that_cannot_be_true(key, value, says, folder, data, tmp_path, fails):
    """It is told by its file, its key and what is expected there, whatever the command, and however it is named."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    outside = key in content  # where timm has it
    (content if outside else content["pretrained_cfg"])[key] = value
    path.write_text(json.dumps(content))
    says = f"The pretrained_cfg in {path} cannot be used: {says}"
    name = f"local-dir:{folder}"
    assert says in fails("predict", data / "val" / "red", "--pretrained", "--model", name)
    assert says in fails("validate", "--data-dir", data, "--checkpoint", folder)
    assert says in fails("train", "--data-dir", data, *TINY, "--model", name, "--output", tmp_path / "runs")


def test_every_pretrained_cfg_of_timms_is_one():
    cfgs = {name: timm.get_pretrained_cfg(name) for name in (*timm.list_models(), *timm.list_models(pretrained=True))}
    for name, cfg in cfgs.items():
        if cfg is not None:
            read_pretrained_cfg(cfg.to_dict(), name)
    assert len(cfgs) > 1000


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mean_of_other_channels(channels, folder, data, tmp_path):
    """A folder of a model of grey images, with one mean or with ImageNet's, which timm leaves, and the reverse."""
    model = timm.create_model("test_vim2", num_classes=3, in_chans=channels)
    common = options(data, tmp_path, epochs=1, img_size=32, in_chans=4 - channels)
    for number, mean in enumerate(([0.2], [0.1, 0.2, 0.3])):
        made = tmp_path / f"grey{number}"
        export_timm(model, made, {"input_size": (channels, 32, 32), "mean": mean}, model_args={"in_chans": channels})
        assert predict(images=[data / "val" / "red" / "0.png"], checkpoint=made, device="cpu", output=tmp_path)
        run = train(**common, model=f"local-dir:{made}", pretrained=True, experiment=f"run{number}")["folder"]
        config = read_described(f"{run}/best.pth")[1]["data_config"]
        assert config["input_size"][0] == 4 - channels and len(config["mean"]) == len(config["std"]) == 4 - channels
        assert sum(config["mean"]) / len(config["mean"]) == pytest.approx(0.2)


def test_one_number_is_for_all_channels(folder, data, tmp_path):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key in ("mean", "std"):
        content["pretrained_cfg"][key] = 0.25
    path.write_text(json.dumps(content))
    for way in (dict(model=f"local-dir:{folder}", pretrained=True), dict(checkpoint=folder)):
        model, facts = load_checkpoint_model(**{"checkpoint": None, **way})
        config = input_config(model, InputOptions(), None, facts.get("data_config"))
        assert config["mean"] == config["std"] == (0.25, 0.25, 0.25)


def test_images_may_get_a_margin(folder, data, tmp_path):
    """As VOLO's, whose crop_pct is above 1: in the run's checkpoint, too."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["pretrained_cfg"]["crop_pct"] = 1.15
    path.write_text(json.dumps(content))
    run = train(**options(data, tmp_path, model=f"local-dir:{folder}", pretrained=True, epochs=1))["folder"]
    (row,) = validate(**options(data, tmp_path), checkpoint=f"{run}/best.pth")
    assert row["crop_pct"] == 1.15


def test_weights_that_cannot_be_true(folder, data, fails):
    argv = ["predict", data / "val" / "red", "--pretrained", "--model", f"local-dir:{folder}"]
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:3000])
    assert f"The weights of local-dir:{folder} are damaged (" in fails(*argv)
    weights.write_bytes(content[:-4] + b"\xff\xff\xff\x7f")  # the last number is NaN
    assert "NaN or infinite values" in fails(*argv)
    weights.unlink()
    assert "No suitable checkpoints found" in fails(*argv)


@pytest.mark.parametrize(
    ("told", "names"),
    [
        ({"0": "blue", "1": "green", "2": "red"}, ["blue", "green", "red"]),
        ({"2": "red", "1": "green", "0": "blue"}, ["blue", "green", "red"]),
        ({"0": "blue", "2": "red"}, None),  # a class between has no name
        ([], None),
        ({}, None),
    ],
    ids=str,
)
def test_names_of_classes_by_number(told, names, folder):
    """timm takes, and writes, a dictionary where not all classes have names, and no names at all."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "label_names": told}))
    for way in (dict(checkpoint=None, model=f"local-dir:{folder}", pretrained=True), dict(checkpoint=folder)):
        assert load_checkpoint_model(**way)[1].get("class_names") == names


def test_weights_without_a_classifier(folder, data, tmp_path):
    """As timm has them of DINOv2, whose config.json tells no classes, and terms that are kept."""
    model = timm.create_model("test_vim2", num_classes=0, **KWARGS)
    export_timm(model, tmp_path / "headless", CONFIG, model_args=KWARGS, terms=TERMS)
    assert json.loads((tmp_path / "headless" / "config.json").read_text())["num_classes"] == 0
    common = options(data, tmp_path, epochs=1, initial_checkpoint=str(tmp_path / "headless"))
    run = train(**common, model="test_vim2", model_kwargs=KWARGS)["folder"]
    assert read_described(f"{run}/best.pth")[1]["terms"]["license"] == "mit"
