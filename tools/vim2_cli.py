"""The console command `vim2`, or `python -m vim2_cli`.

Nothing of the package is imported before it is known for which command: PyTorch takes seconds to load. Importing this
before it also tells OpenMP's threads to sleep. On a CPU that other programs use as well they would burn the time in
which they wait for one another, and a step take 2 to 20 times as long. OpenMP reads this once, when PyTorch is loaded.
"""

import difflib
import importlib
import importlib.util
import logging
import os
import signal
import sys

__all__ = ["loaded", "main", "start"]

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

USAGE = """usage: vim2 COMMAND ...

images
  train              train or fine-tune a classifier
  validate           top-1 and top-5 accuracy at one or many image sizes
  predict            classes of an image, a folder or a glob
  visualize          receptive field, attention, Grad-CAM
  demo               the same in a browser, for images that you drop
  convert            weights of VMamba into those of a ViM2 that computes the same
  benchmark          parameters, FLOPs, times and memory, and where the time goes
  export             a file for ONNX runtimes, or a folder for timm and the Hugging Face Hub

time series
  forecast fit       train a TSM2 on the series of a file
  forecast evaluate  its errors, and the baselines'
  forecast predict   forecast beyond the end of a file

detection and segmentation, by configs of MMDetection and MMSegmentation
  mm train           train
  mm test            evaluate
  mm predict         draw boxes, masks or maps on images

vim2 COMMAND --help lists the options of each, vim2 --version says what is installed."""

# the package of each command, whose cli.py runs it; the last two have commands of their own
_PACKAGES = {
    "train": "vim2.classify",
    "validate": "vim2.classify",
    "predict": "vim2.classify",
    "convert": "vim2.classify",
    "visualize": "vim2.visualize",
    "demo": "vim2.visualize",
    "benchmark": "vim2.benchmark",
    "export": "vim2.export",
    "forecast": "vim2.forecast",
    "mm": "vim2.mm",
}
_GROUPS = ("forecast", "mm")  # each has an extra of its name
_ALWAYS = ("torch", "torchvision", "timm")  # what comes with the package without any extra


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0; 2 after one line on stderr for what the user can put right; 130 where
    stopped. `argv` None takes the process's arguments."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        _print(USAGE)
        return 0
    if name not in _PACKAGES and name != "--version":
        close = difflib.get_close_matches(name, _PACKAGES, n=1, cutoff=0.7)
        return _fail(f"unknown command {name}{f'; did you mean {close[0]}?' if close else ''} (see vim2 --help)")
    start()
    try:
        if name == "--version":
            _print(_versions())
            return 0
        cli = importlib.import_module(f"{_PACKAGES[name]}.cli")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or importlib.util.find_spec(package) is not None:
            raise
        missing = package if package in _ALWAYS or name not in _GROUPS else f'"vim2[{name}]"'
        return _fail(f"{name} needs {package}, which is not installed: pip install {missing}.")
    finally:
        loaded()
    return cli.main(rest if name in _GROUPS else [name, *rest])


def _print(text: str) -> None:
    """Print a text whose reader may leave before its end, as `head` does. `say` does so for what has loaded PyTorch."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _fail(message: str) -> int:
    print(f"vim2: error: {message}", file=sys.stderr)
    return 2


def _versions() -> str:
    import timm
    import torch

    import vim2

    return f"vim2 {vim2.__version__} (PyTorch {torch.__version__}, timm {timm.__version__})"


def start() -> None:
    """Make the process one of a command: call this before modules are loaded, and `loaded` when they are.

    PyTorch and its like take seconds to load, and Ctrl-C in their midst would be a traceback, or be taken for a module
    that is missing.
    """
    logging.raiseExceptions = False  # with a full disk, every line of a log would be a traceback
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def loaded() -> None:
    """Say that a command has its modules: from now on Ctrl-C is an exception again, of which its main takes care."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*_) -> None:
    sys.stderr.write("stopped\n")
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
