#!/usr/bin/env python
"""Run a model's .pt2 package where none of our Python code is, in a C++ program and in a Python process of its own, and
compare its logits with each other and with the model's.

python tools/comparisons/cpp_package.py --model test_vim2 [--package test_vim2.pt2] [--img-size 224] [--device cuda]

The program is tools/comparisons/run_package.cpp, built by g++ with the headers and libraries that PyTorch's wheel
brings. Without --package the model is compiled first, which takes minutes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.command import run_tool

import argparse
import subprocess
import tempfile

import torch
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

from vim2.benchmark.measuring import positive
from vim2.classify.models import create_model
from vim2.command.errors import UserError, first_line
from vim2.command.processes import choose_device
from vim2.export import export_pt2
from vim2.export.comparison import SIZES

SOURCE = Path(__file__).with_name("run_package.cpp")
# The same in Python, which imports nothing of ours.
SCRIPT = """
import sys, torch
_, package, device, *sides = sys.argv
torch.backends.cudnn.allow_tf32 = False
loaded = torch._inductor.aoti_load_package(package)
for height, width in zip(*[map(int, sides)] * 2):
    images = torch.arange(3 * height * width).float().sin().reshape(1, 3, height, width)
    for logit in loaded(images.to(device))[0].tolist():
        print(logit)
assert not {"vim2", "timm"} & set(sys.modules)
"""


def build(folder: Path) -> Path:
    """The program, as built in a folder. Where PyTorch has CUDA, it can run packages for GPUs.

    Raises:
        UserError: No g++, or one that cannot.
    """
    program = folder / "run_package"
    command = ["g++", "-std=c++20", str(SOURCE), "-o", str(program), *(f"-I{path}" for path in include_paths("cpu"))]
    command += [f"-L{TORCH_LIB_PATH}", f"-Wl,-rpath,{TORCH_LIB_PATH}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    if (Path(TORCH_LIB_PATH) / "libtorch_cuda.so").exists():
        command += ["-ltorch_cuda", "-Wl,--allow-shlib-undefined"]  # of CUDA's own libraries, which it finds itself
    try:
        subprocess.run([*command, "-lc10"], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("There is no g++ here: install it.") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"g++ does not build {SOURCE}: {first_line(error.stderr)}") from None
    return program


def run(*command: str | Path) -> torch.Tensor:
    """The logits that a program prints.

    Raises:
        UserError: It fails.
    """
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{Path(command[0]).name} ends with {done.returncode}: {done.stderr.strip()[-300:]}")
    return torch.tensor([float(line) for line in done.stdout.split()])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        default="test_vim2",
        metavar="NAME",
        help="with the random weights of vim2 export; default %(default)s",
    )
    add("--package", type=Path, metavar="FILE", help="that vim2 export wrote of it, for the device")
    add("--img-size", type=positive, metavar="PIXELS", help="of a package for one size; default: three sizes")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    args = parser.parse_args(argv)
    choose_device(args.device)
    fixed = args.img_size and (args.img_size, args.img_size)
    sizes = [fixed] if fixed else SIZES
    torch.manual_seed(0)
    model = create_model(args.model).eval()
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        package = args.package or Path(folder) / "model.pt2"
        if args.package is None:
            export_pt2(model, package, img_size=fixed, device=args.device)
        model.to(args.device)
        torch.backends.cudnn.allow_tf32 = False
        sides = [str(side) for size in sizes for side in size]
        alone = run(sys.executable, "-I", "-c", SCRIPT, package, args.device, *sides).chunk(len(sizes))  # loads it once
        print("| size | C++ and Python, largest difference | C++ and the model | largest output |\n|---|---|---|---|")
        for (height, width), in_python in zip(sizes, alone):
            logits = run(program, package, str(height), str(width))
            images = torch.arange(3 * height * width).float().sin().reshape(1, 3, height, width)
            with torch.no_grad():
                expected = model(images.to(args.device))[0].cpu()
            differences = [(logits - other).abs().max().item() for other in (in_python, expected)]
            print(f"| {height} x {width} | {differences[0]:.1e} | {differences[1]:.1e} | {logits.abs().max():.2f} |")


if __name__ == "__main__":
    sys.exit(run_tool(main))
