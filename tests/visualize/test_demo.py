"""`vim2 demo`: what its page answers; and the page in a browser, where Gradio, playwright and Chromium are there."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vim2_cli
from vim2.command.errors import UserError
from vim2.visualize import demo
from vim2.visualize.page import DemoOptions, Explorer, make_page

TINY = dict(model="test_vim2", model_kwargs=dict(num_classes=3), img_size=64, device="cpu")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 200, (60, 80, 3), dtype=np.uint8)).save(path)
    return path


def marked(look) -> tuple[int, ...]:
    """Left, top, right and bottom of the frame in what the model sees, as shares of its width or height."""
    pixels = np.asarray(look.seen).astype(int)
    rows, columns = np.nonzero((pixels[..., 0] == 255) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60))
    ends = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return tuple(end / look.seen.width for end in ends)


def test_an_image_is_looked_at(photo):
    explorer = Explorer(DemoOptions(**TINY))
    look = explorer.look(photo)
    assert explorer.layer == "stages.1.blocks.0.layers.1"
    assert marked(look) == (0.5, 0.5, 0.625, 0.625)  # of 8 x 8 tokens, one behind the centre
    with torch.no_grad():
        image = explorer.transform(Image.open(photo))
        probabilities = explorer.model(image[None])[0].softmax(-1).sort(descending=True)
    assert list(look.classes) == [str(int(i)) for i in probabilities.indices]
    assert list(look.classes.values()) == pytest.approx(probabilities.values.tolist(), abs=1e-5)
    assert min(look.attention.size) > 400 and min(look.field.size) > 400


def test_another_token_and_layer(photo):
    explorer = Explorer(DemoOptions(**TINY))
    first = explorer.layers[0]
    corner = explorer.look(photo, first, (1.0, 0.0))  # 16 x 16 tokens; the right edge is inside
    assert marked(corner) == (1 - 1 / 16, 0, 1, 1 / 16)
    other = explorer.look(photo, first, (0.0, 0.0))
    assert corner.classes == other.classes
    for name in ("seen", "attention", "field"):
        assert getattr(corner, name) != getattr(other, name)
    assert not any(module._forward_pre_hooks for module in explorer.model.modules())


def test_the_model_by_default_knows_its_classes():
    explorer = Explorer(DemoOptions(device="cpu"))
    assert len(explorer.names) == 200 and "barn" in explorer.names and explorer.config["input_size"] == (3, 128, 128)


def test_mistakes(photo, monkeypatch, capsys):
    explorer = Explorer(DemoOptions(**TINY))
    photo.write_bytes(b"no image")
    with pytest.raises(UserError, match="no image that can be read"):
        explorer.look(photo)
    with pytest.raises(UserError, match="demo looks into ViM2s, and resnet18 is a ResNet"):
        Explorer(DemoOptions(model="resnet18", device="cpu"))
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert vim2_cli.main(["demo"]) == 2
    assert 'demo needs gradio, which is not installed: pip install "vim2[demo]"' in capsys.readouterr().err


def test_a_port_that_is_taken():
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot be served on 127\.0\.0\.1:{port}"):
            demo(**TINY, port=port)


def test_the_page_needs_no_server_but_its_own():
    pytest.importorskip("gradio")
    page = make_page(Explorer(DemoOptions(**TINY)))
    assert page.title == "vim2" and not page.analytics_enabled


@pytest.fixture
def served(tmp_path):
    """The address of a page that a process of `vim2 demo` serves; Ctrl-C ends it."""
    pytest.importorskip("gradio")
    tools = Path(vim2_cli.__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tools), str(tools.parent)])}
    command = [sys.executable, "-u", "-m", "vim2_cli", "demo", "--model", "test_vim2", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--img-size", "64"], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        yield next(word for line in process.stdout for word in line.split() if word.startswith("http://"))
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def test_in_a_browser(photo, served):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1060})
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served)
        page.set_input_files("input[type=file]", photo)
        pictures = page.locator("img[src*='/file=']")
        pictures.nth(3).wait_for()
        before = [pictures.nth(i).get_attribute("src") for i in range(4)]
        pictures.nth(1).click(position={"x": 60, "y": 60})
        page.wait_for_function("old => document.querySelectorAll(\"img[src*='/file=']\")[3].src != old", arg=before[3])
        after = [pictures.nth(i).get_attribute("src") for i in range(4)]
        photo.write_bytes(b"no image")
        page.goto(served)
        page.set_input_files("input[type=file]", photo)
        page.get_by_text("no image that can be read").wait_for()
        browser.close()
    assert after[0] == before[0] and not {*after[1:]} & {*before[1:]}
    assert all(url.startswith((served, "blob:", "data:")) for url in asked)
