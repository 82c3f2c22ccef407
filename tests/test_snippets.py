"""Every Python snippet of the README and the documents runs, those of a document one after another, as a reader would.
The commands in their blocks of bash exist, with the options that they are given.

What a snippet needs to be there, its document's preparation makes; what would take long there is cut short.
"""

import functools
import importlib.util
import re
import socket
import sys
import timeit
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vim2.classify
import vim2_cli
from vim2.checkpoints import save_checkpoint
from vim2.export import export_timm

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
CONFIG_PAGES = ["mmdet_configs/README.md", "mmseg_configs/README.md"]
SNIPPETS = {page: re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S) for page in PAGES}
# by a text of theirs, those that cannot run here, and why
LEFT_OUT = {
    "from vim2.forecast import Forecaster, evaluate": "tests/forecast calls these on data of its own",
    "Forecaster.from_pretrained(": "the same",
    "from neuralforecast import": "tests/forecast/test_neuralforecast.py fits the same",
    "aoti_load_package(": "a package takes minutes to compile",
    "def my_net(": "tests/classify/test_own_models.py has such a file",
    "from onnxruntime.quantization import": "wants a file that a command writes",
}


def photo(path: str, seed: int = 0) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 53, 3), dtype=np.uint8)).save(path)


def make_smaller(monkeypatch, name: str, **smaller) -> None:
    """Have timm make a model of this name with these arguments besides."""
    create = timm.create_model

    def create_model(model, **options):
        return create(model, **options, **(smaller if model == name else {}))

    monkeypatch.setattr(timm, "create_model", create_model)


def prepare_readme(monkeypatch) -> dict:
    """A model of the same widths, and so of the same maps."""
    make_smaller(monkeypatch, "vim2_tiny", depths=(1, 1, 1, 1), token_mixers=1, d_state=1)
    return {}


def prepare_training(monkeypatch) -> dict:
    """Two classes of flowers and a rose; a training is one epoch of a tiny model."""
    for i in range(8):
        photo(f"flowers/{'tulip' if i % 2 else 'rose'}/{i}.png", i)
    photo("rose.jpg")
    tiny = dict(model="test_vim2", epochs=1, img_size=32, workers=0, device="cpu", batch_size=2, warmup_epochs=0)
    train, predict = vim2.classify.train, vim2.classify.predict
    monkeypatch.setattr(vim2.classify, "train", lambda **options: train(**{**options, **tiny}))
    monkeypatch.setattr(vim2.classify, "predict", functools.partial(predict, device="cpu"))
    return {}


def prepare_export(monkeypatch) -> dict:
    """A tiny model in the folder "mine", and one of a single stage in "mine.onnx"; the exporters get one, too."""
    photo("photo.jpg")
    smaller = dict(depths=(1,), token_mixers=1, dims=(16,), d_state=1, channel_expand=1.0)
    images = dict(timm.data.resolve_model_data_config(timm.create_model("test_vim2")), input_size=(3, 48, 48))
    facts = dict(arch="test_vim2", num_classes=2, model_kwargs=smaller, class_names=["cat", "dog"], data_config=images)
    weights = timm.create_model("test_vim2", num_classes=2, **smaller).state_dict()
    save_checkpoint({**facts, "state_dict": weights}, "best.pth")
    assert vim2_cli.main(["export", "--checkpoint", "best.pth", "--format", "onnx", "--output", "mine.onnx"]) == 0
    export_timm(timm.create_model("test_vim2", num_classes=2), "mine", class_names=["cat", "dog"])
    make_smaller(monkeypatch, "vim2_nano", depths=(1,), token_mixers=1, dims=(16,), d_state=1, channel_expand=1.0)
    return {"model": timm.create_model("vim2_nano")}


def prepare_mixers(monkeypatch) -> dict:
    """What is measured, is measured once."""
    monkeypatch.setattr(timeit, "repeat", lambda call, number, repeat: [timeit.timeit(call, number=1)] * repeat)
    return {}


def prepare_openmmlab(monkeypatch) -> dict:
    """The weights that the config names."""
    save_checkpoint({"state_dict": timm.create_model("vim2_tiny").state_dict()}, "best.pth")
    return {}


def prepare_ecosystem(monkeypatch) -> dict:
    """Two classes of flowers, the variables that torchrun sets for a single process, and a tiny model."""
    create = timm.create_model

    def create_model(name, pretrained=False, **options):
        return create("test_vim2" if pretrained else name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    for i in range(8):
        photo(f"flowers/{'tulip' if i % 2 else 'rose'}/{i}.png", i)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    return {}


PREPARE = {
    "README.md": prepare_readme,
    "docs/training.md": prepare_training,
    "docs/export.md": prepare_export,
    "docs/ecosystem.md": prepare_ecosystem,
    "docs/mixers.md": prepare_mixers,
    "docs/openmmlab.md": prepare_openmmlab,
    "docs/faq.md": lambda monkeypatch: {"model": timm.create_model("test_vim2"), "torch": torch},
}


@pytest.mark.parametrize("page", [page for page in PAGES if SNIPPETS[page]])
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = PREPARE.get(page, lambda monkeypatch: {})(monkeypatch)
    for number, text in enumerate(SNIPPETS[page], 1):
        wanted = re.findall(r"^(?:import|from) (\w+)", text, re.M)
        if any(importlib.util.find_spec(name) is None for name in wanted if name not in sys.modules):
            continue
        if any(part in text for part in LEFT_OUT):
            continue
        exec(compile(text, f"{page}, snippet {number}", "exec"), names)
    if page == "docs/openmmlab.md":
        check_config(names)
    if page == "docs/export.md" and "probabilities" in names:
        check_probabilities(names["probabilities"])


def check_probabilities(served: np.ndarray) -> None:
    """Those of the ONNX file are the command's."""
    (prediction,) = vim2.classify.predict(images=["photo.jpg"], checkpoint="best.pth", device="cpu")
    expected = {top["index"]: top["probability"] for top in prediction["top"]}
    np.testing.assert_allclose(served[0], [expected[k] for k in range(2)], rtol=1e-4)


def check_config(names: dict) -> None:
    """The backbone of the config is built and reads its weights, and there is such a constructor of optimisers."""
    mmengine = pytest.importorskip("mmengine")
    import vim2.mm

    backbone = mmengine.registry.MODELS.build(names["model"]["backbone"])
    backbone.init_weights()
    kind = names["optim_wrapper"]["constructor"]
    assert mmengine.registry.OPTIM_WRAPPER_CONSTRUCTORS.get(kind) is vim2.mm.ViM2LayerDecayOptimWrapperConstructor


def test_what_is_left_out_is_there():
    texts = "".join(text for page in PAGES for text in SNIPPETS[page])
    assert all(part in texts for part in LEFT_OUT)


def commands(text: str) -> set[tuple[str, str]]:
    """The commands of `vim2` in a document's blocks of bash, each with one of its options, or with none."""
    found = set()
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S):
        for line in block.replace("\\\n", " ").replace("python tools/forecast.py", "vim2 forecast").splitlines():
            for words in re.findall(r"(?:^|\s)vim2 ([^&|]+)", line.partition("#")[0]):
                first, second, *_ = *words.split(), ""
                command = f"{first} {second}" if first in vim2_cli._GROUPS else first
                found |= {(command, option) for option in ["", *re.findall(r"(?:^|\s|\[)(--[\w-]+)", words)]}
    return found


NAMED = commands("".join((ROOT / page).read_text() for page in [*PAGES, *CONFIG_PAGES]))


@pytest.mark.parametrize("command", sorted({command for command, _ in NAMED}))
def test_commands_in_the_documents_have_their_options(command, capsys):
    if command.startswith("mm"):
        pytest.importorskip("mmdet")
    with pytest.raises(SystemExit) as end:
        vim2_cli.main([*command.split(), "--help"])
    told = capsys.readouterr().out
    assert end.value.code == 0
    assert all(re.search(rf"{option}\b", told) for name, option in NAMED if name == command)


def test_documents_show_every_command():
    assert {command.partition(" ")[0] for command, _ in NAMED} >= set(vim2_cli._PACKAGES)
