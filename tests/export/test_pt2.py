"""Programs of PyTorch's own operators give what the model does, in a process that knows nothing of this package.

Compiling a package takes the smallest model most of a minute: here the compiler is replaced."""

import json
import shutil
import subprocess
import sys
import zipfile
from contextlib import nullcontext

import pytest
import timm
import torch
from torch._inductor.exc import CppCompileError, InductorError

import vim2
from tools.comparisons import cpp_package
from vim2.checkpoints import save_checkpoint
from vim2.command.errors import UserError
from vim2.export import aten_scan, export_program, export_pt2, pt2
from vim2.export.cli import main
from vim2.ops.triton_launch import INTERPRETED

TINY = dict(depths=(1,), dims=(8,), token_mixers=1, d_state=2, channel_expand=2.0, channel_patch=8)
ONE_SCAN = dict(TINY, channel_mixer="none")
ELSEWHERE = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
for inputs, expected in torch.load(sys.argv[2]):
    results = program(*inputs)
    torch.testing.assert_close([results] if isinstance(results, torch.Tensor) else results, expected, rtol=0, atol=1e-5)
assert not {"vim2", "timm", "numba"} & set(sys.modules)
"""


def randomised(model):
    """Weights that show a mistake: at initialisation, averages and norms are ones."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.05)
    return model.eval()


@torch.no_grad()
def assert_same_elsewhere(program, model, cases, folder):
    torch.export.save(program, folder / "program.pt2")
    results = [(inputs, model(*inputs)) for inputs in cases]
    torch.save([(i, [r] if isinstance(r, torch.Tensor) else r) for i, r in results], folder / "cases.pt")
    command = [sys.executable, "-I", "-c", ELSEWHERE, folder / "program.pt2", folder / "cases.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("width", [8, 32], ids=["rank 1", "rank 2"])
def test_any_batch_and_size(width, tmp_path):
    model = randomised(
        timm.create_model("test_vim2", features_only=True, out_indices=(0,), **{**TINY, "dims": (width,)})
    )
    program = export_program(model)
    cases = [(torch.randn(shape),) for shape in ((1, 3, 64, 64), (2, 3, 97, 71), (3, 3, 36, 128))]
    assert_same_elsewhere(program, model, cases, tmp_path)
    ranges = sorted((int(r.lower), int(r.upper)) for r in program.range_constraints.values())
    assert ranges == [(1, 65536), (36, 4096), (36, 4096)]
    with pytest.raises(AssertionError, match="36"):
        program.module()(torch.zeros(1, 3, 64, 32))


@torch.no_grad()
def test_tsm2():
    config = vim2.TSM2Config(lookback=24, horizon=5, patch=4, stride=2, d_model=8, d_state=2, variate_mixer="none")
    model = randomised(vim2.TSM2(config))
    program = export_program(model).module()
    for shape in ((1, 24, 4), (3, 24, 2)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-5)


def test_the_compiled_package_is_written(monkeypatch, tmp_path, capsys):
    metadata = {}

    def compile_and_package(program, package_path, inductor_configs):
        assert not [n for n in program.graph.nodes if "vim2" in str(n.target)]
        metadata.update(inductor_configs["aot_inductor.metadata"])
        torch.export.save(program, package_path)
        return package_path

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", compile_and_package)
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: torch.export.load(path).module())
    output = tmp_path / "new" / "model.pt2"
    model = timm.create_model("test_vim2", num_classes=3, **ONE_SCAN)
    facts = dict(arch="test_vim2", num_classes=3, model_kwargs=ONE_SCAN, class_names=["a", "b", "é"])
    facts["data_config"] = dict(input_size=(3, 48, 48), mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0), crop_pct=0.5)
    save_checkpoint({**facts, "state_dict": model.state_dict()}, tmp_path / "best.pth")
    command = ["export", "--checkpoint", str(tmp_path / "best.pth"), "--format", "pt2", "--output", str(output)]
    assert main([*command, "--img-size", "32", "33", "--compare"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{output}: ") for line in printed) and printed[-1].startswith("| 32 x 33 | ")
    assert float(printed[-1].split("|")[3]) < 1e-5
    assert b"/vim2/" not in output.read_bytes()
    told = {name: json.loads(text) for name, text in metadata.items()}  # to whoever serves it without this package
    assert told["labels"] == ["a", "b", "é"] and told["input_size"] == [3, 32, 33]
    assert told["mean"] == [0.1, 0.2, 0.3] and told["std"] == [1, 1, 2] and told["crop_pct"] == 0.5
    assert {"interpolation", "crop_mode"} <= told.keys()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(path="model.onnx"), "by the name NAME.pt2, got model.onnx"),
        (dict(img_size=(31, 64)), "at least 32 x 32, got 31 x 64"),
        pytest.param(
            dict(device="cuda"),
            "compiled on a machine with one",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_written(options, says, tmp_path):
    path = tmp_path / options.pop("path", "model.pt2")
    with pytest.raises(UserError, match=says):
        export_pt2(timm.create_model("test_vim2", **TINY), path, **options)
    assert not list(tmp_path.iterdir())


def test_the_scan_for_gpus_is_a_kernel_that_the_compiler_sees(monkeypatch):
    """PyTorch's compiler takes Triton's kernel out of the operator; here it runs in Triton's interpreter."""
    triton_scan = pytest.importorskip("vim2.export.triton_scan", reason="Triton is not installed")
    assert pt2._compiled_scan("cuda") is triton_scan.selective_scan
    assert pt2._compiled_scan("cpu") is aten_scan.selective_scan
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    for orders, shared, rank, features, states in (((0, 1, 2, 3), True, 2, 20, 3), ((0, 2), False, 0, 16, 16)):
        batch, height, width, k = 2, 5, 3, len(orders)
        length = height * width
        operands = [
            random(batch, length, *(() if shared else (k,)), features),
            random(batch, length, k, rank or features),
            -random(k, features, states).abs(),
            random(batch, length, k, states),
            random(batch, length, k, states),
            random(k, features),
            random(k, features),
            random(k, features, rank) if rank else torch.empty(0),
        ]
        options = (True, orders, height, width, True, False, length, "torch")
        expected = torch.ops.vim2.selective_scan(*operands, *options)[0]
        torch.testing.assert_close(aten_scan.selective_scan(*operands, *options)[0], expected, rtol=1e-5, atol=1e-5)
        if INTERPRETED:
            result = triton_scan.selective_scan(*operands, *options)[0]
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="last state"):
        triton_scan.selective_scan(*operands, True, (0, 2), 5, 3, True, True, 15, "torch")


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_program_in_cpp(tmp_path):
    """It is built, and reads what it is given as a package. tools/comparisons/cpp_package.py runs a model's, which
    takes minutes to compile."""
    program = cpp_package.build(tmp_path)
    (tmp_path / "no.pt2").write_text("no package")
    done = subprocess.run([program, tmp_path / "no.pt2", "64", "64"], capture_output=True, text=True)
    assert done.returncode and "zip archive" in done.stderr, done.stderr
    assert subprocess.run([program], capture_output=True).returncode == 2


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    def link(program, package_path, **_):
        said = "/usr/bin/ld: warning: a stack\n/usr/bin/ld: cannot find -lcuda\ncollect2: error: ld returned 1"
        error = CppCompileError(["g++"], said)
        raise InductorError(error, None)

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", link)
    with pytest.raises(UserError, match=r"fails, /usr/bin/ld: cannot find -lcuda.*docs/export.md"):
        export_pt2(timm.create_model("test_vim2", **ONE_SCAN), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("library", "refused"),
    [(b"GCC: (Ubuntu) libc.so.6", True), (b"GCC: (Ubuntu) libc.so.6 libstdc++.so.6", False)],
)
def test_a_runtime_of_its_own(library, refused, monkeypatch, tmp_path):
    def link(program, package_path, **_):
        with zipfile.ZipFile(package_path, "w") as package:
            package.writestr("model/data/aotinductor/model/a.wrapper.so", library)
        return package_path

    monkeypatch.setattr(pt2, "_program", lambda *args: None)
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", link)
    path = tmp_path / "model.pt2"
    with pytest.raises(UserError, match=r"linked libstdc\+\+\.a into") if refused else nullcontext():
        export_pt2(torch.nn.Identity(), path)
    assert path.exists() != refused


def test_no_compiler(monkeypatch, tmp_path):
    def missing():
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr("vim2.export.pt2.get_cpp_compiler", missing)
    with pytest.raises(UserError, match=r"install g\+\+"):
        export_pt2(timm.create_model("test_vim2", **TINY), tmp_path / "model.pt2")
