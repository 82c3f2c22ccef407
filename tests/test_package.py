"""The source distribution and the wheel that is made of it: what they hold, and what an installed wheel can do."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="build is not installed")
pytest.importorskip("setuptools", reason="setuptools is not installed")
ROOT = Path(__file__).parents[1]
PARTS = ("vim2", "mmdet_configs", "mmseg_configs", "tools", "setup.cfg", "pyproject.toml", "MANIFEST.in")
COMMANDS = ["train", "validate", "predict", "convert", "visualize", "demo", "benchmark", "export"]
COMMANDS += [f"forecast {name}" for name in ("fit", "evaluate", "predict")] * bool(importlib.util.find_spec("pandas"))
COMMANDS += [f"mm {name}" for name in ("train", "test", "predict")] * bool(importlib.util.find_spec("mmdet"))
HELP = f"""
import contextlib, io, sys
import vim2_cli

for command in {COMMANDS}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        vim2_cli.main([*command.split(), "--help"])
    print(command if out.getvalue().startswith(f"usage: vim2 {{command}} ") else out.getvalue())
print(vim2_cli.__file__, sys.modules["vim2"].__file__)
if "vim2.mm" in sys.modules:
    from vim2.mm.config_loading import load_config

    print(load_config("vim2::mmdet/mask-rcnn_vim2-tiny_fpn_1x_coco.py").model.backbone.type)
"""


def call(*argv, **kwargs) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **kwargs.pop("env", {})}
    done = subprocess.run(list(map(str, argv)), env=env, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    (folder / "source").mkdir()
    for name in (*PARTS, "README.md", "LICENSE"):  # a copy, since building writes into the folder
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, folder / "source")
    call(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", folder, folder / "source")
    (sdist,) = folder.glob("*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    call(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, sdist)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel):
    """The environment of processes that have the wheel's content, and not the checkout's, on their path."""
    folder = wheel.parent / "installed"
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    call(sys.executable, "-m", "pip", "install", *options, "--target", folder, wheel)
    return {"PYTHONPATH": str(folder), "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def test_wheel_holds_the_package_and_the_configs(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"vim2_cli.py", "vim2/py.typed", "vim2/.mim/model-index.yml"}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "vim2").rglob("*.py") if ".mim" not in p.parts}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "vim2" / "weights").iterdir()}
    for kind in ("mmdet", "mmseg"):
        configs = [p for p in (ROOT / f"{kind}_configs").rglob("*") if p.suffix in (".py", ".yml", ".md")]
        expected |= {f"vim2/.mim/configs/{kind}/{p.relative_to(ROOT / f'{kind}_configs')}" for p in configs}
    assert names >= expected
    assert all(name.startswith(("vim2/", "vim2_cli.py")) for name in names)  # no tests, no tools


def test_help_of_every_command(installed, tmp_path):
    *commands, files, backbone = call(sys.executable, "-c", HELP, cwd=tmp_path, env=installed).splitlines()
    if backbone != "ViM2":  # without OpenMMLab's libraries
        commands, files = [*commands, files], backbone
    assert commands == COMMANDS
    assert all(file.startswith(installed["PYTHONPATH"]) for file in files.split())


def test_a_prediction(installed, tmp_path):
    shutil.copy(next((ROOT / "docs" / "images").glob("*.webp")), tmp_path / "photo.webp")
    argv = ["predict", "photo.webp", "--model", "vim2_nano", "--pretrained", "--device", "cpu"]
    # Numba would compile its scan for seconds, as it does once for every installation
    told = call("vim2", *argv, cwd=tmp_path, env={**installed, "VIM2_SCAN_BACKEND": "torch"})
    assert re.search(r"photo\.webp.*[a-z]{3}.* \d", told)  # a class by its words, and how likely it is
