"""Lets mmcv run without compiled operators: `mmcv._ext` then is `vim2.mm.mmcv_ext`, through torchvision."""

import importlib.abc
import importlib.machinery
import importlib.util
import multiprocessing
import sys
from pathlib import Path

__all__ = ["install"]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `mmcv._ext` where no other finder has found it: a compiled mmcv has its own, and comes first."""

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != "mmcv._ext":
            return None
        return importlib.util.spec_from_file_location(name, Path(__file__).with_name("mmcv_ext.py"))


def install() -> None:
    """Make `import mmcv.ops` work where mmcv has no compiled operators, here and in processes that are started from
    here. Doing it twice does nothing more."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.append(_Finder())
    # A spawned worker unpickles its data set, and so imports mmdet and mmcv.ops, before anything that we could hook
    # into; but every process first unpickles this dict, which holds what its parent hands down, and our function in it.
    multiprocessing.current_process()._config["vim2.mm"] = install
