"""What files may and may not do: checkpoints act on nothing, runs keep their folder and images to themselves."""

import copy
import json
import shutil
import signal
import sys
import time
import uuid

import pytest
import timm
import torch
from classify_helpers import COLOURS, TINY, make_folders, make_image, pack_folders, tool
from two_processes import start_two

from vim2.classify import UserError, predict, train, validate
from vim2.classify.cli import main
from vim2.classify.models import load_checkpoint_model
from vim2.export import export_timm


def change(path, to, **changes):
    """A copy of a checkpoint with other content; ... leaves something out."""
    saved = {**torch.load(path, weights_only=True), **changes}
    torch.save({name: value for name, value in saved.items() if value is not ...}, to)
    return to


@pytest.fixture
def commands(data, trained, tmp_path, fails):
    """Errors of the commands that read a changed best.pth."""

    def run(**changes):
        path = change(trained / "best.pth", tmp_path / "changed.pth", **changes)
        common = ["--checkpoint", path, "--output", tmp_path / "out", "--device", "cpu"]
        yield fails("predict", data / "val" / "red" / "0.png", *common)
        yield fails("validate", "--data-dir", data, *common, "-j", "0")

    return run


@pytest.mark.parametrize(
    "name",
    [
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "cache_dir",
        "checkpoint_path",
        "features_only",
        "out_indices",
        "feature_cls",
        "pruned",
        "scriptable",
        "exportable",
        "no_jit",
        "pretrained_strict",
        "kwargs_filter",
        "device",
        "dtype",
        "no_such_argument",
    ],
)
def test_a_file_gives_a_models_constructor_its_own_arguments_and_no_others(commands, tmp_path, name):
    values = {"pretrained_cfg": {"url": f"file://{tmp_path}/x.pth"}, "checkpoint_path": str(tmp_path / "x.pth")}
    values.update(pretrained=True, out_indices=[1], device="meta", dtype="float64", cache_dir=str(tmp_path / "cache"))
    for error in commands(model_kwargs={name: values.get(name, "x")}):
        assert name in error
    assert not (tmp_path / "cache").exists()


def test_neither_does_a_last_pth(fails, trained, data, tmp_path):
    saved = torch.load(trained / "last.pth", weights_only=True)
    kwargs = {"pretrained": True, "cache_dir": str(tmp_path / "cache"), "pretrained_cfg": {"url": "http://localhost/x"}}
    path = change(trained / "last.pth", tmp_path / "last.pth", args={**saved["args"], "model_kwargs": kwargs})
    assert "pretrained is none" in fails("train", "--resume", path, "--epochs", 3)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["checkpoint_path=x.pth"], "checkpoint_path is none"),
        (["num_classes=3"], "num_classes"),
        (["in_chans=1"], "in_chans"),
        (["dims='abcd'"], "cannot be made"),
        (["d_state=1e999"], "finite"),
        (["global_pool=''"], "global_pool"),
    ],
    ids=str,
)
def test_arguments_of_the_model(fails, data, tmp_path, given, words):
    assert words in fails("train", "--data-dir", data, *TINY, "--output", tmp_path, "--model-kwargs", *given)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": 3}, "arch must be text"),
        ({"arch": "hf-hub:someone/model"}, "There is no model"),
        ({"model_kwargs": [1]}, "model_kwargs must be"),
        ({"model_kwargs": {"depths": [1, [1, torch.ones(2)]]}}, "depths is none"),
        ({"model_kwargs": {"drop_path_rate": float("nan")}}, "drop_path_rate is none"),
        ({"model_kwargs": {"global_pool": ""}}, "global_pool"),
        ({"model_kwargs": {"mlp_ratio": "4"}}, "mlp_ratio must be above 0, in finite numbers, got '4'"),
        ({"model_kwargs": {"d_state": "4"}}, "d_state"),
        ({"model_kwargs": {"token_mixers": [True, True, True, True]}}, "True or False for token_mixers"),
        ({"model_kwargs": {"dims": [16, 24]}}, "dims must have a value a stage"),
        ({"model_kwargs": {"depths": [1, 1, 3, 1]}}, "another architecture"),
        ({"num_classes": -3}, "num_classes must be 1 or more"),
        ({"num_classes": "3"}, "num_classes must be a whole number"),
        ({"num_classes": 4}, "3 classes, the model 4"),
        ({"in_chans": 0}, "in_chans must be 1 or more"),
        ({"class_names": [1, 2, 3]}, "class_names must be text"),
        ({"class_names": ["a", "b", "c", "d"]}, "4 classes, more than its model has"),
        ({"data_config": 3}, "data_config must be"),
        ({"data_config": {"input_size": [3, 32]}}, "input_size must be 3 values"),
        ({"data_config": {"input_size": [3, 0, 0]}}, "input_size must be 1 or more"),
        ({"data_config": {"mean": [0.5, 0.5, float("nan")]}}, "mean must be a finite number"),
        ({"data_config": {"mean": [0.5, 0.5]}}, "mean must be 3 numbers, one a channel, got [0.5, 0.5]"),
        ({"data_config": {"std": [0.5, 0.5, 0]}}, "std must be positive"),
        ({"data_config": {"crop_pct": 0}}, "crop_pct must lie in [0.1, 2]"),
        ({"data_config": {"crop_mode": "x"}}, "crop_mode must be one of"),
        ({"data_config": {"interpolation": "x"}}, "interpolation must be one of"),
        ({"held_out": True, "args": {}}, "holdout"),
        ({"held_out": True, "args": {"data_dir": 3, "holdout": 0.2}}, "data_dir must be text"),
        ({"held_out": 1}, "held_out must be True or False"),
        ({"state_dict_ema": {"norm.weight": torch.tensor(1.0)}}, "another architecture"),
        ({"state_dict_ema": {1: torch.tensor(1.0)}}, "no model weights"),
        ({"state_dict_ema": {"head.fc.weight": torch.tensor(1.0)}}, "single number"),
        ({"num_classes": ..., "state_dict_ema": {"head.fc.weight": torch.tensor(1.0)}}, "single number"),
        ({"num_classes": ..., "state_dict_ema": {"head.fc.weight": 3}}, "no model weights"),
    ],
    ids=str,
)
def test_a_checkpoint_that_tells_what_cannot_be_true(commands, changes, words):
    for error in commands(**changes):
        assert words in error


def test_checkpoints_that_tell_less_are_as_good(trained, data, tmp_path):
    few = change(trained / "best.pth", tmp_path / "few.pth", data_config=..., args=..., class_names=..., in_chans=...)
    picture = data / "val" / "red" / "0.png"
    argv = ["predict", picture, "--checkpoint", few, "--img-size", 32, "--output", tmp_path, "--device", "cpu"]
    assert main(list(map(str, argv))) == 0
    elsewhere = change(trained / "best.pth", tmp_path / "e.pth", held_out=True, args={"data_dir": None, "holdout": 0.5})
    argv = ["validate", "--data-dir", data / "val", "--checkpoint", elsewhere, "-j", 0, "--device", "cpu"]
    assert main([*map(str, argv), "--output", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"history": ...}, "not a last.pth"),
        ({"history": 3}, "its history is damaged"),
        ({"history": [{"epoch": 1}, {"epoch": 2}]}, "its history is damaged"),
        ({"updates": "2"}, "its updates is damaged"),
        ({"state_dict": {1: torch.ones(1)}}, "lacks weights"),
        ({"state_dict": {}}, "does not fit the model"),
        ({"state_dict": {"norm.weight": torch.full((48,), torch.inf)}}, "NaN or infinite"),
        ({"state_dict_ema": ...}, "lacks weights"),
        ({"optimizer": {"param_groups": 3}}, "its optimiser's state is damaged, or of other parameters"),
        ({"args": {"lr": "high"}}, "lr must be a finite number"),
    ],
    ids=str,
)
def test_a_last_pth_with_an_odd_inside(fails, trained, data, tmp_path, changes, words):
    path = change(trained / "last.pth", tmp_path / "last.pth", **changes)
    assert words in fails("train", "--resume", path, "--data-dir", data, "--epochs", 3)


def test_an_optimisers_state_of_other_parameters(fails, trained, tmp_path):
    saved = torch.load(trained / "last.pth", weights_only=True)
    for value, words in ((torch.ones(3), "the shape (3,)"), (torch.nan, "NaN or infinite")):
        optimizer = copy.deepcopy(saved["optimizer"])
        moments = optimizer["state"][0]
        moments["exp_avg"] = value if isinstance(value, torch.Tensor) else moments["exp_avg"] * value
        path = change(trained / "last.pth", tmp_path / "last.pth", optimizer=optimizer)
        assert words in fails("train", "--resume", path, "--epochs", 3)


@pytest.mark.parametrize(("name", "value"), [("step", torch.ones(3)), ("exp_avg_sq", ...)], ids=str)
def test_an_optimisers_state_that_only_a_step_finds_damaged(fails, trained, tmp_path, name, value):
    optimizer = torch.load(trained / "last.pth", weights_only=True)["optimizer"]
    optimizer["state"][0][name] = value
    if value is ...:
        del optimizer["state"][0][name]
    path = change(trained / "last.pth", tmp_path / "last.pth", optimizer=optimizer)
    before = path.read_bytes()
    error = fails("train", "--resume", path, "--epochs", 3)
    assert f"{path} cannot be resumed: its optimiser's state is damaged" in error and "Copy the file again" in error
    assert path.read_bytes() == before


def test_an_optimisers_options_are_those_of_the_run(trained, data, tmp_path):
    optimizer = torch.load(trained / "last.pth", weights_only=True)["optimizer"]
    for group in optimizer["param_groups"]:
        group |= dict(betas=None, amsgrad="x", capturable=[1], lr="high", fused=torch.ones(3))
    kept = []
    for name, changes in (("damaged", {"optimizer": optimizer}), ("whole", {})):
        (tmp_path / name).mkdir()
        path = change(trained / "last.pth", tmp_path / name / "last.pth", **changes)
        train(resume=path, epochs=3, output=tmp_path, experiment=name)
        kept.append(torch.load(path, weights_only=True)["state_dict"])
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[1])


def test_a_damaged_last_pth(fails, trained, tmp_path):
    content = bytearray((trained / "last.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "last.pth").write_bytes(content)
    assert "damaged" in fails("train", "--resume", tmp_path / "last.pth", "--epochs", 3)


@pytest.fixture
def interrupted(tmp_path):
    """A run of one epoch, and its images."""
    data = make_folders(tmp_path / "data")
    argv = ["train", "--data-dir", data, *TINY, "--output", tmp_path, "--experiment", "run", "--epochs", 1]
    assert main(list(map(str, argv))) == 0
    return tmp_path / "run", data


def test_other_images_of_the_same_classes_are_refused(fails, interrupted):
    folder, data = interrupted
    argv = ["train", "--resume", folder / "last.pth", "--epochs", 2]
    picture = data / "train" / "red" / "0.png"
    whole = picture.read_bytes()
    picture.unlink()
    assert "images are not those" in fails(*argv)
    make_image(picture, (1, 2, 3), 7)  # another picture in its place
    assert "images are not those" in fails(*argv)
    picture.write_bytes(whole)
    (data / "val" / "red" / "0.png").rename(data / "val" / "blue" / "red.png")
    assert "images are not those" in fails(*argv)
    (data / "val" / "blue" / "red.png").rename(data / "val" / "red" / "0.png")
    data = data.rename(data.with_name("moved"))
    assert main([*map(str, argv), "--data-dir", str(data)]) == 0


def test_a_run_from_before_images_had_fingerprints_goes_on(interrupted):
    folder, _ = interrupted
    change(folder / "last.pth", folder / "last.pth", images=...)
    assert main(["train", "--resume", str(folder / "last.pth"), "--epochs", "2"]) == 0
    assert torch.load(folder / "last.pth", weights_only=True)["images"]["train"]["images"] == 36


def test_other_images_of_a_pack_are_refused(fails, interrupted, tmp_path):
    _, data = interrupted
    pack = pack_folders(data, tmp_path / "data.npz")
    argv = ["train", *TINY, "--output", tmp_path, "--experiment", "packed"]
    assert main([*map(str, argv), "--data-dir", str(pack), "--epochs", "1"]) == 0
    argv = ["train", "--resume", tmp_path / "packed" / "last.pth", "--epochs", 2, "--data-dir"]
    assert main([*map(str, argv), str(pack.rename(tmp_path / "moved.npz"))]) == 0
    (data / "train" / "red" / "0.png").unlink()
    argv[4] = 3
    assert "images are not those" in fails(*argv, pack_folders(data, tmp_path / "other.npz"))


def test_a_run_does_not_go_on_in_anothers_folder(fails, interrupted, trained, tmp_path):
    folder, _ = interrupted
    before = (folder / "last.pth").read_bytes()
    argv = ["train", "--resume", trained / "last.pth", "--output", tmp_path, "--experiment", "run", "--epochs", 3]
    assert "holds a run already" in fails(*argv)
    assert (folder / "last.pth").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_two_runs_in_one_folder(data, tmp_path):
    options = dict(data_dir=str(data), model="test_vim2", img_size=32, workers=1, batch_size=8, device="cpu")
    options.update(output=str(tmp_path), experiment="run", epochs=400)
    argv = ["train", "--data-dir", data, *TINY, "-j", "1", "--output", tmp_path, "--experiment", "run", "--epochs", 400]
    first = tool(*argv)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run" / "last.pth").exists() and first.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(UserError, match="Another run is writing to"):
            train(**options, resume=True)
        first.send_signal(signal.SIGKILL)
    finally:
        first.kill()
        first.communicate()
    left = tmp_path / "run" / f".last.pth.{uuid.uuid4().hex}"
    left.touch()
    # its workers may still live, and hold nothing back
    done = len(torch.load(tmp_path / "run" / "last.pth", weights_only=True)["history"])
    assert len(train(resume=str(tmp_path / "run" / "last.pth"), epochs=done + 1)["history"]) == done + 1
    assert not left.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_two_processes_share_a_folder_and_are_refused_together(trained, tmp_path):
    from vim2.command.runs import identity, own_folder

    folder = shutil.copytree(trained, tmp_path / "run")
    with own_folder(folder, identity(folder / "last.pth")):
        argv = ["train", "--resume", folder / "last.pth", "--epochs", 3]
        run = start_two("vim2.classify.cli", ["vim2.classify"], *argv)
        error = run.communicate()[1]
    assert run.returncode and error.count("Another run is writing to") == 1, error


class TestFolders:
    """What `vim2 export --format timm` writes, and the Hugging Face Hub has."""

    @pytest.fixture
    def folder(self, trained, tmp_path):
        model, facts = load_checkpoint_model(trained / "best.pth")
        export_timm(model, tmp_path / "mine", facts["data_config"], facts["class_names"])
        return tmp_path / "mine"

    @pytest.mark.parametrize("inside", ["", "model.safetensors"])
    def test_one_is_as_good_as_the_checkpoint(self, inside, folder, trained, data, tmp_path):
        images = [data / "val" / "red", data / "val" / "blue"]
        checkpoints = (trained / "best.pth", folder / inside)
        first, second = (predict(images=images, checkpoint=c, output=tmp_path) for c in checkpoints)
        assert first == second and first[0]["top"][0]["label"] in COLOURS
        first, second = (validate(data_dir=data, checkpoint=c, workers=0, output=tmp_path)[0] for c in checkpoints)
        assert [first[k] for k in ("loss", "top1", "img_size")] == [second[k] for k in ("loss", "top1", "img_size")]

    def test_what_is_written_without_an_output_lies_in_it(self, folder, data):
        validate(data_dir=data, checkpoint=folder, workers=0)
        assert (folder / "validation.json").is_file() and not (folder.parent / "validation.json").exists()

    def test_training_starts_from_one(self, folder, data, tmp_path):
        options = dict(data_dir=data, epochs=1, batch_size=8, workers=0, device="cpu", img_size=32, output=tmp_path)
        train(model="test_vim2", initial_checkpoint=folder, experiment="run", **options)
        assert (tmp_path / "run" / "best.pth").exists()

    def test_names_of_shipped_weights(self, folder, data, tmp_path):
        export_timm(timm.create_model("vim2_nano", pretrained=True), folder)
        image = data / "val" / "red" / "0.png"
        (told,) = predict(images=[image], checkpoint=folder, topk=200, output=tmp_path)
        assert "golden retriever" in {t["label"] for t in told["top"]}

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"model_args": {"checkpoint_path": "x.pth"}}, "checkpoint_path is none"),
            ({"num_classes": -1}, "num_classes must be 0 or more"),
            ({"pretrained_cfg": {"std": [0, 0, 0]}}, "std"),
            ("{", "cannot be read"),
            ("[" * 100_000, "cannot be read"),
        ],
    )
    def test_a_damaged_config(self, change, says, folder, tmp_path, data):
        path = folder / "config.json"
        path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(UserError, match=rf"config\.json .*{says}"):
            predict(images=[data / "val" / "red"], checkpoint=folder, output=tmp_path)
