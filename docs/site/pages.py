"""What the site has beside the folder docs: the README as its first page, and the configs with their tables.

Links are written for those who read the files in the repository; here they become those between the site's pages.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
CODE = r"(^```.*?^```|`[^`\n]*`)"
CONFIGS = ("mmdet_configs", "mmseg_configs")


def on_files(files, config):
    """Add what lies outside of docs, under the site's names."""
    outside = [ROOT / "README.md", ROOT / "LICENSE"]
    outside += [path for name in CONFIGS for kind in ("README.md", "*.py") for path in (ROOT / name).glob(kind)]
    for path in outside:
        name = place(path.relative_to(ROOT).as_posix())
        files.append(File.generated(config, name, content=path.read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links between pages of the site."""
    page_uri = page.file.src_uri
    paths = page_uri, f"docs/{page_uri}", "README.md"  # where its text may lie
    source = posixpath.dirname(next(path for path in paths if (ROOT / path).is_file()))

    def link(match):
        code, target, anchor = match.groups()
        if code:
            return code
        there = place(posixpath.normpath(posixpath.join(source, target)))
        return f"]({posixpath.relpath(there, posixpath.dirname(page_uri) or '.')}{anchor})"

    return re.sub(rf"{CODE}|\]\((?![a-z]+:|#)([^)#\s]+)([^)\s]*)\)", link, markdown, flags=re.M | re.S)


def place(path):
    """The name on the site of a file of the repository."""
    return {"README.md": "index.md", "LICENSE": "LICENSE.txt"}.get(path, path.removeprefix("docs/"))
