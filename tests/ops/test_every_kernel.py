"""every_kernel.py, which tools look at kernels through, runs all of them."""

import ast
from pathlib import Path

import every_kernel
import pytest
from devices import DEVICE

import vim2.ops

pytest.importorskip("triton")
from vim2.ops.triton_launch import Launch


def launched_kernels() -> set[tuple[str, str]]:
    """By their module and name: functions of Triton's that are named as kernels are."""
    files = Path(vim2.ops.__file__).parent.rglob("*.py")
    return {
        (file.stem, node.name)
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    }


def test_it_launches_every_kernel(monkeypatch):
    seen = set()
    monkeypatch.setattr(Launch, "__call__", lambda launch, *tensors: seen.add(launch.kernel.fn))
    every_kernel.main(["--device", DEVICE, "--dtype", "bfloat16"])
    assert {(f.__module__.rpartition(".")[2], f.__name__) for f in seen} == launched_kernels()
