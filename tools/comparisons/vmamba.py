#!/usr/bin/env python
"""Compare converted weights with VMamba's own code, which is read from a clone of its repository.

Usage: python tools/comparisons/vmamba.py CLONE [--size tiny small base] [--img-size 64x64 96x160 ...]

Vanilla VMamba is made with random weights (every parameter away from its initial value), converted, and both compute
logits in float32. Of VMamba's dependencies only PyTorch and timm are needed: what its vanilla models import but never
call is stood in for, and its own plain-PyTorch scan replaces the CUDA one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.command import run_tool

import argparse
import importlib.util
from types import ModuleType

import timm
import torch

import vim2  # noqa: F401  (registers the models)
from vim2.checkpoints import convert_vmamba
from vim2.command.errors import UserError


def load_vmamba(clone: Path) -> ModuleType:
    """classification/models/vmamba.py, with its scan in plain PyTorch."""
    stand_ins = {
        "fvcore": (),
        "fvcore.nn": ("FlopCountAnalysis", "flop_count_str", "flop_count", "parameter_count"),
        "csm_triton": ("cross_scan_fn", "cross_merge_fn"),
        "mamba2": (),
        "mamba2.ssd_minimal": ("selective_scan_chunk_fn",),
    }
    for name, attributes in stand_ins.items():
        module = sys.modules[name] = ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, None)
    sys.modules["timm.models.layers"] = timm.layers  # its name in timm 1.0
    for name in ("custom_fwd", "custom_bwd"):  # decorators of its CUDA scans, gone from recent PyTorch
        if not hasattr(torch.cuda.amp, name):
            setattr(torch.cuda.amp, name, lambda function=None, **_: function or (lambda f: f))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, clone / "classification" / "models" / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    scans = load("csms6s")
    scans.selective_scan_fn = lambda *args, backend=None, **kwargs: scans.selective_scan_torch(*args, **kwargs)
    return load("vmamba")


def randomise(model: torch.nn.Module) -> None:
    """Weights of linear maps that keep the size of their input; everything else near its initial value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 or name.endswith(("A_logs", "dt_projs_bias")):
                parameter.add_(0.3 * noise)
            else:
                fan_in = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]
                parameter.copy_(noise * fan_in**-0.5)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare converted weights with VMamba's own code.")
    parser.add_argument("clone", type=Path, help="folder of a clone of VMamba's repository")
    parser.add_argument("--size", nargs="+", default=["tiny", "small", "base"], choices=["tiny", "small", "base"])
    parser.add_argument("--img-size", nargs="+", default=["64x64", "65x101"], metavar="HxW")
    args = parser.parse_args(argv)
    if not (args.clone / "classification" / "models" / "vmamba.py").is_file():
        raise UserError(f"{args.clone} holds no classification/models/vmamba.py.")
    vmamba = load_vmamba(args.clone)

    print("| model | image | largest difference of logits / largest logit |\n|---|---|---|")
    for size in args.size:
        theirs = getattr(vmamba, f"vanilla_vmamba_{size}")().eval()
        randomise(theirs)
        variant, state_dict = convert_vmamba(theirs.state_dict())
        ours = timm.create_model(variant).eval()
        ours.load_state_dict(state_dict)
        for img_size in args.img_size:
            x = torch.randn(1, 3, *map(int, img_size.split("x")), generator=torch.Generator().manual_seed(1))
            with torch.inference_mode():
                expected, actual = theirs(x), ours(x)
            difference = (actual - expected).abs().max() / expected.abs().max()
            print(f"| {variant} | {img_size} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_tool(main))
