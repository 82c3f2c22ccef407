"""The documents become a site without a warning, whose links lead somewhere, and which describes the public names."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_site(tmp_path):
    """One test, since building takes seconds."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name)
    config = ROOT / "docs" / "site" / "mkdocs.yml"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", tmp_path]
    done = subprocess.run(command, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    told = done.stdout + done.stderr
    assert done.returncode == 0 and "WARNING" not in told, told

    documents = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    pages = {str(path) for path in [*documents, Path("mmdet_configs"), Path("mmseg_configs"), Path()]}
    assert not [page for page in pages if not (tmp_path / page / "index.html").is_file()]

    def text(page: str) -> str:
        return (tmp_path / page / "index.html").read_text()

    assert 'href="training/#in-a-browser"' in text("") and 'href="LICENSE.txt"' in text("")
    assert 'href="../mmdet_configs/"' in text("openmmlab")
    assert 'href="../results/#camvid' in text("mmseg_configs")
    for document in (ROOT / "docs" / "api").glob("*.md"):
        module = re.search(r"^::: (\S+)$", document.read_text(), re.M)[1]
        described = text(f"api/{document.stem}")
        assert not [name for name in public(module) if f'id="{module}.{name}"' not in described], module


def public(module: str) -> list[str]:
    """The names in a module's __all__, read without importing it, which may need what is not installed."""
    path = ROOT / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    values = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
    return [name for name in ast.literal_eval(values[0]) if not name.startswith("_")]
