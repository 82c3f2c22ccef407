"""`vim2 benchmark`: its FLOPs against a sum by hand and the published figure, its files, its errors."""

from common.command import run_tool

import contextlib
import functools
import json
import re
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from devices import DEVICE, needs_triton
from timm.models import _registry as registry
from torch.autograd import DeviceType

from benchmarks import forecast
from vim2.benchmark import command, compilations, kept, launches, models, profiles, scans
from vim2.benchmark.cli import main
from vim2.benchmark.reporting import launch_table, profile_table
from vim2.command.errors import UserError
from vim2.export import export_timm
from vim2.ops import backend
from vim2.ops.observers import is_observed
from vim2.ops.scan.projected_scan import _scan_parameters


def vmamba_flops(dim, depths, size, classes=1000, n=16):
    """Multiply-adds of vanilla VMamba's layers, and 9 N + 2 operations a channel, token and direction of its scans."""
    total = (size // 4) ** 2 * 48 * dim
    for i, depth in enumerate(depths):
        d, tokens = dim * 2**i, (size // 4 // 2**i) ** 2
        inner, rank = 2 * d, -(-d // 16)
        merging = tokens * 2 * d * d if i else 0
        scan = 4 * inner * (9 * n + 2)
        block = d * 2 * inner + 9 * inner + 4 * inner * (rank + 2 * n) + 4 * rank * inner + scan + inner * d
        total += merging + depth * tokens * block
    return total + d * classes


def test_flops():
    with torch.device("meta"):
        vmamba = timm.create_model("vim2_tiny_vmamba", channel_mixer="none")
    flops = models.count_flops(vmamba, 224)
    assert flops == vmamba_flops(96, (2, 2, 9, 2), 224)
    assert round(flops / 1e9, 1) == 5.6  # as published for VMamba-T
    swin = models.create_model("swin_tiny_patch4_window7_224", 224, "meta")
    assert round(models.count_flops(swin, 224) / 1e9, 1) == 4.5  # as published for Swin-T


def test_models(tmp_path, capsys):
    options = "--device cpu --model test_vim2 --compare timm:test_vit --img-size 32 64 --batch-size 2"
    options += f" --warmup 1 --repeats 1 --plot --output {tmp_path}"
    assert main(["benchmark", *options.split()]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "benchmark.md").read_text() == out
    assert (tmp_path / "benchmark.png").stat().st_size > 0
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert [(r["model"], r["size"]) for r in results["models"]] == [
        (name, size) for name in ("test_vim2", "test_vit") for size in (32, 64)
    ]
    for row in results["models"]:
        assert row["infer"]["img_s"] == pytest.approx(2000 / row["infer"]["ms"])
        assert row["infer"]["ms"] > 0 and row["train"]["ms"] > 0
        assert f"| {row['model']} | {row['size']} | 2 | {row['params_m']:.2f} |" in out
    assert {"date", "hardware", "versions"} <= results["machine"].keys()


def test_one_mode_only(capsys):
    options = "--device cpu --model test_vim2 --img-size 32 --infer --warmup 1 --repeats 1"
    assert main(["benchmark", *options.split()]) == 0
    out = capsys.readouterr().out
    assert "infer ms" in out and "train" not in out and "GiB" not in out


def test_counts_only(capsys):
    assert main(["benchmark", "--device", "cpu", "--model", "vim2_tiny", "--count"]) == 0
    assert capsys.readouterr().out.endswith("\n| vim2_tiny | 224 | 1 | 24.02 | 6.15 |\n")


def test_the_readmes_table_is_the_output():
    """With the classes that each model has by default, which are fewer where weights come with it."""
    row = re.compile(r"^\| `?(vim2_\w+)`? \| ([\d.]+) \| ([\d.]+) \|", re.M)
    told = {name: counts for name, *counts in row.findall((Path(__file__).parents[2] / "README.md").read_text())}
    assert sorted(told) == timm.list_models("vim2_*", module="vim2")
    counted = {name: models.model_size(name, 224, "cpu") for name in told}
    assert told == {name: [f"{params / 1e6:.2f}", f"{flops / 1e9:.2f}"] for name, (params, flops) in counted.items()}


def test_models_with_arguments(capsys):
    variant = "vim2_nano:dims=(96,192,384,768),depths=(1,1,3,1),num_classes=1000"  # vim2_tiny, that is
    assert main(["benchmark", "--device", "cpu", "--model", variant, "--count"]) == 0
    assert capsys.readouterr().out.endswith(f"\n| {variant} | 224 | 1 | 24.02 | 6.15 |\n")
    assert models.parse_model("a:b=text,c=1.5") == ("a", {"b": "text", "c": 1.5})
    assert models.parse_model("a:b=[3,(4,5),{6:(7,)}],c=(),d=8") == (
        "a",
        {"b": [3, (4, 5), {6: (7,)}], "c": (), "d": 8},
    )


@pytest.mark.parametrize(
    ("text", "name", "kwargs"),
    [
        ("local-dir:mine", "local-dir:mine", {}),
        ("local-dir:mine:d_state=4, depths=(1,2)", "local-dir:mine", {"d_state": 4, "depths": (1, 2)}),
        ("local-dir:a=1", "local-dir:a=1", {}),
        ("local-dir:C:/a:b:x=1", "local-dir:C:/a:b", {"x": 1}),
        ("hf-hub:someone/mine@v1:x=text", "hf-hub:someone/mine@v1", {"x": "text"}),
    ],
)
def test_places_with_arguments(text, name, kwargs):
    assert models.parse_model(text) == (name, kwargs)


def test_a_folder_of_timms(tmp_path, capsys, failing):
    """It is measured with the arguments that its config.json has, and with given ones in their place."""
    own = dict(d_state=2, dims=[16, 24, 32, 40])
    made = timm.create_model("test_vim2", num_classes=3, **own)
    export_timm(made, tmp_path / "mine", model_args=own)
    name = f"local-dir:{tmp_path / 'mine'}"
    options = "--device cpu --img-size 32 --infer --warmup 1 --repeats 1 --model"
    assert main(["benchmark", *options.split(), name, f"{name}:d_state=1"]) == 0
    out = capsys.readouterr().out
    counts = [models.model_size(text, 32, "cpu") for text in (name, f"{name}:d_state=1")]
    assert counts[0] == (models.count_parameters(made), models.count_flops(made.to("meta"), 32)) != counts[1]
    assert f"| {name} | 32 | 1 | {counts[0][0] / 1e6:.2f} |" in out and f"| {name}:d_state=1 | 32 |" in out
    config = tmp_path / "mine" / "config.json"
    content = json.loads(config.read_text())
    content["model_args"]["in_chans"] = 1
    config.write_text(json.dumps(content))
    assert "mine has an in_chans of 1, and images" in failing(main, "vim2")("benchmark", *options.split(), name)
    assert main(["benchmark", *options.split(), f"{name}:in_chans=3"]) == 0


@pytest.mark.parametrize("text", ["a:b=(1,c=2", "a:b=1),c=(2", "a:b=[3,(4,5]"])
def test_brackets_that_do_not_close(text):
    with pytest.raises(UserError, match="brackets do not close"):
        models.parse_model(text)


@pytest.mark.parametrize("size", [[], ["--img-size", "32"]])
@pytest.mark.parametrize(("argument", "instead"), [("img_size=64", "--img-size"), ("in_chans=1", "in_chans=3")])
def test_what_images_are_like_is_not_a_models_argument(argument, instead, size, failing):
    error = failing(main, "vim2")("benchmark", "--device", "cpu", "--count", "--model", f"test_vim2:{argument}", *size)
    assert f"test_vim2:{argument} has an {argument.partition('=')[0]}" in error and instead in error


def test_scan_backends_side_by_side(capsys, monkeypatch, tmp_path):
    pytest.importorskip("numba")
    monkeypatch.setattr(command, "SCAN_SHAPES", ((8, 4),))
    options = f"--device cpu --ops --batch-size 2 --warmup 1 --repeats 1 --output {tmp_path}"
    assert main(["benchmark", *options.split()]) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())["scans"]
    assert [row["scan"] for row in rows] == ["numba", "torch"]
    assert all(row["infer"]["ms"] > 0 and row["train"]["ms"] > 0 for row in rows)
    assert "| numba | 8 | 16 | 2 |" in capsys.readouterr().out
    monkeypatch.setattr(scans, "HAS_TRITON", True)
    monkeypatch.setattr(scans, "HAS_MAMBA_SSM", True)
    assert scans.scan_backends("cuda") == ["triton", "mamba_ssm"]


def test_mamba_kernels_get_the_same_work(monkeypatch):
    calls = []

    def fwd(u, delta, A, B, C, D, z, bias, softplus):
        calls.append((u, delta, A, B))
        return u, "states"

    def bwd(u, delta, A, B, C, D, z, bias, grad, states, *options):
        calls.append(states)

    monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.SimpleNamespace(fwd=fwd, bwd=bwd))
    monkeypatch.delitem(sys.modules, "vim2.ops.scan.mamba_ssm_scan", raising=False)
    try:
        inputs = scans.scan_inputs(2, 8, 3, torch.float32, "cpu")
        steps = scans.scan_steps(scans.MAMBA_KERNELS, inputs)
    finally:
        sys.modules.pop("vim2.ops.scan.mamba_ssm_scan", None)  # it holds the stand-in
    steps["infer"]()
    steps["train"]()
    (u, delta, A, B), _, states = calls
    assert states == "states"
    assert u.shape == delta.shape == (2, 32, 9) and B.shape == (2, 4, 16, 9) and A.shape == (32, 16)
    # step 5 of the second direction, down the columns, is in the last row of the second column
    torch.testing.assert_close(u[0, 8 + 5, 5], inputs["u"][0, 2, 1, 5])
    torch.testing.assert_close(delta[1, 8 * 3 + 5, 0], inputs["delta"][1, 2, 2, 3, 5])  # the last direction's first
    torch.testing.assert_close(B[0, 2, 9, 4], inputs["B"][0, 1, 1, 2, 9])


def test_same_pixels():
    options = "--device cpu --img-size 224 1024 --batch-size 128 --same-pixels"
    assert command.parse(options.split()).shapes == [(224, 128), (1024, 6)]
    assert command.parse(["--img-size", "512", "--device", "cpu", "--same-pixels"]).shapes == [(512, 1)]


def test_work_is_what_operators_move_and_multiply():
    a, b = torch.ones(3, 4), torch.ones(1, 5).expand(4, 5).requires_grad_()
    with profiles.CountWork() as counted:
        y = (a @ b).t().relu()
        y.sum().backward()
        torch.empty(7).zero_()
        torch.ones(3, 5).addmm_(a, b.detach())
    mm = counted.operators["aten::mm"]
    assert (mm.calls, mm.flops) == (2, 2 * 2 * 3 * 4 * 5)  # the product and its backward pass
    # a (12), b (its 5 and not their copies) and y (15) forward; a, y's gradient and b's own, of 20, backward
    assert mm.bytes == 4 * (12 + 5 + 15) + 4 * (12 + 15 + 20)
    relu, zero = counted.operators["aten::relu"], counted.operators["aten::zero_"]
    assert relu.bytes == 2 * 4 * 15 and zero.bytes == 4 * 7
    added = counted.operators["aten::addmm_"]  # a product, too, though it writes in place
    assert (added.flops, added.bytes) == (2 * 3 * 4 * 5, 4 * (12 + 5 + 15 + 15))
    assert profiles.operator_family("aten::addmm_") == profiles.operator_family("aten::mm") == "products"
    assert profiles.operator_family("aten::add_") == "element-wise"
    assert not counted.operators.keys() & {"aten::t", "aten::expand", "aten::empty"}


def test_work_of_a_scan_and_of_a_grouped_convolution():
    inputs = scans.scan_inputs(2, 8, 3, torch.float32, "cpu")
    with profiles.CountWork() as counted:
        scans.scan_steps("torch", inputs)["train"]()
        weight = torch.ones(6, 1, 3, 3, requires_grad=True)
        x = torch.ones(1, 6, 5, 5, requires_grad=True)
        torch.nn.functional.conv2d(x, weight, padding=1, groups=6).sum().backward()
    for name in ("vim2::selective_scan", "vim2::selective_scan_backward"):
        assert counted.operators[name].exponentials == 2 * 9 * 4 * 8 * 16
    forward, backward = counted.operators["aten::convolution"], counted.operators["aten::convolution_backward"]
    assert forward.flops == 2 * 6 * 25 * 9 and backward.flops == 2 * forward.flops


@needs_triton
def test_exponentials_are_counted_of_scans_alone():
    """Not of the operators that only hand A on to them."""
    weight, A_log = (torch.ones(shape, device=DEVICE, requires_grad=True) for shape in ((2, 8, 16), (2, 16, 3)))
    with profiles.CountWork() as counted:
        matrix, _ = _scan_parameters(weight, A_log, True, torch.bfloat16)
        matrix.sum().backward()
    work = counted.operators["vim2::scan_parameters_backward"]
    assert work.calls == 1 and work.exponentials == 0


def test_profile(tmp_path, capsys):
    options = "--device cpu --model test_vim2 --img-size 64 --profile --warmup 1 --repeats 1"
    assert main(["benchmark", *options.split(), "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    infer, train = json.loads((tmp_path / "benchmark.json").read_text())["profiles"]
    assert (infer["mode"], train["mode"]) == ("infer", "train")
    for result in (infer, train):
        rows = {row["operators"]: row for row in result["profile"]}
        assert rows["selective_scan"]["calls"] == 15 and rows["selective_scan"]["ms"] > 0
        assert rows["products"]["ms"] == pytest.approx(sum(rows["products"]["members"].values()))
        assert ("selective_scan_backward" in rows) == (result["mode"] == "train")
        assert result["profile"] == sorted(result["profile"], key=lambda row: -row["ms"])
    assert f"{train['step_ms']:.2f} ms a step" in out
    assert "floor" not in out  # which only GPUs have
    kept = {row["operators"]: row["bytes"] for row in train["kept"]}
    assert "kept" not in infer and kept["projected_scan"] > 0 and kept["products"] > 0
    assert (
        f"| all | {sum(row['tensors'] for row in train['kept'])} | {sum(kept.values()) / 2**20:.1f} | 100.0% |" in out
    )


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.operator = "vim2::an_operator"
        ctx.save_for_backward(x, x + 1, x.bfloat16())
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_what_is_kept_counts_once_with_the_first_that_keeps_it():
    x, weight = torch.ones(3, 4), torch.ones(4, 5, requires_grad=True)
    y = (x @ weight).exp()  # which keeps its result, as do the sine and the product that follow
    z = Kept.apply(y.sin() * y)
    rows = kept.kept_for(z[:, :2].tanh().sum(), [x, weight])
    assert {row["operators"]: (row["tensors"], row["bytes"]) for row in rows} == {
        "element-wise": (3, 2 * 4 * 15 + 4 * 6),  # of the exponential, the sine and the hyperbolic tangent
        "an_operator": (3, (4 + 4 + 2) * 15),
    }
    assert rows[0]["operators"] == "an_operator"


def test_kernels_belong_to_the_outermost_operator(monkeypatch):
    """On a GPU; here with a profiler that makes its events up, in microseconds."""

    def event(name, *kernels, parent=None):
        kernels = [types.SimpleNamespace(duration=us) for us in kernels]
        return types.SimpleNamespace(name=name, device_type=DeviceType.CPU, kernels=kernels, cpu_parent=parent)

    def on_device(us, annotation=False):
        span = types.SimpleNamespace(elapsed_us=lambda: us)
        return types.SimpleNamespace(device_type=DeviceType.CUDA, time_range=span, is_user_annotation=annotation)

    scan, linear = event("vim2::selective_scan", 3000.0, 200.0), event("aten::linear")
    cpu = [scan, event("aten::sum", 1000.0, parent=scan), linear, event("aten::mm", 500.0, parent=linear)]
    device = [on_device(us) for us in (3000.0, 200.0, 1000.0, 500.0, 300.0)] + [on_device(5000.0, annotation=True)]

    class Profiler(contextlib.nullcontext):
        def __enter__(self):
            return types.SimpleNamespace(events=lambda: cpu + device)

    monkeypatch.setattr(torch.profiler, "profile", lambda **options: Profiler())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    args = types.SimpleNamespace(device="cuda", device_type="cuda", repeats=2)
    steps = []
    counted = {"vim2::selective_scan", "aten::sum", "aten::mm"}
    times = profiles.operator_times(lambda: steps.append(1), counted, args)
    assert len(steps) == 2
    assert times == pytest.approx({"vim2::selective_scan": 2.1, "aten::mm": 0.25, "": 0.15})


@pytest.fixture
def reads_values(monkeypatch):
    """The name of a model that does not run without them, on images of 32 pixels."""

    class ReadsValues(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pretrained_cfg = {"input_size": (3, 32, 32)}
            self.fc = torch.nn.Linear(3 * 32 * 32, 2)

        def forward(self, x):
            return self.fc(x.flatten(1)) * (x.abs().max().item() + 1)

    monkeypatch.setitem(registry._model_entrypoints, "reads_values", lambda pretrained=False, **kwargs: ReadsValues())
    models.model_size.cache_clear()
    models._say_not_counted.cache_clear()
    return "reads_values"


def test_a_model_whose_flops_cannot_be_counted(reads_values, tmp_path, capsys):
    options = f"--device cpu --model test_vim2 {reads_values} --img-size 32 --warmup 1 --repeats 1 --output {tmp_path}"
    for more in ("--count", "--infer"):
        assert main(["benchmark", *options.split(), more]) == 0
        rows = json.loads((tmp_path / "benchmark.json").read_text())["models"]
        assert rows[0]["gflops"] > 0 and rows[1]["gflops"] is None
        assert rows[1]["params_m"] == 2 * (3 * 32 * 32 + 1) / 1e6
        out, err = capsys.readouterr()
        assert f"| {reads_values} | 32 | 1 | 0.01 | -" in out
        assert err.count("cannot be counted") == (more == "--count")  # once
    models._say_not_counted.cache_clear()
    models.model_size.cache_clear()
    models.model_size(reads_values, 32, "cpu")
    said = capsys.readouterr().err
    assert said.startswith(f"The FLOPs of {reads_values} cannot be counted (RuntimeError: ") and "item()" in said
    assert rows[1]["infer"]["ms"] > 0
    assert main(["benchmark", *f"--device cpu --profile --infer --model {reads_values} --img-size 32".split()]) == 0
    assert main(["benchmark", *f"--device cpu --count --model {reads_values} --img-size 64".split()]) == 2
    assert f"{reads_values} does not run on images of 64 x 64 pixels: " in capsys.readouterr().err


OWN = """
from timm.models import register_model
from torch import nn

class Own(nn.Module):
    def __init__(self, fault=None):
        super().__init__()
        self.fault, self.fc = fault, nn.Linear(3 * 32 * 32, 2)

    def forward(self, x):
        return self.fc(x[self.fault] if self.fault else x.flatten(1))

@register_model
def own_benchmarked(pretrained=False, **kwargs):
    return Own(kwargs.get("fault"))
"""


def test_models_of_ones_own(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (own := tmp_path / "own_benchmarked.py").write_text(OWN)
    options = ["benchmark", *["--device", "cpu", "--img-size", "32", "--model", "own_benchmarked"]]
    assert main(options) == 2 and "yours come with --imports" in capfd.readouterr().err
    options += ["--imports", str(own)]
    assert main([*options, "--count"]) == 0
    assert "| own_benchmarked | 32 | 1 | 0.01 | 0.00 |" in capfd.readouterr().out
    assert main([*options, "--first-step", "--infer"]) == 0  # in a process that has not imported the file
    assert "| own_benchmarked | 32 | 1 | 0." in capfd.readouterr().out
    options[options.index("own_benchmarked")] += ":fault=a"
    assert main(options) == 2
    told = capfd.readouterr().err
    assert "own_benchmarked:fault=a does not run on images of 32 x 32 pixels: " in told and f"({own}, line 11)" in told


@pytest.mark.parametrize("default", ["numba", "mamba_ssm"])
def test_counts_whatever_the_default_backend(default, monkeypatch):
    """They are counted on tensors without data, which these backends could not take."""
    expected = models.count_flops(models.create_model("test_vim2", 64, "meta"), 64)
    monkeypatch.setattr(backend, "DEFAULT_BACKEND", default)
    assert models.count_flops(models.create_model("test_vim2", 64, "meta"), 64) == expected > 0


def test_launches_are_those_of_a_step_that_nobody_profiles(monkeypatch):
    """So layers are replayed in it. On a GPU; here with a profiler of the CPU."""
    profile = torch.profiler.profile
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: profile(acc_events=True))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    args, observed = types.SimpleNamespace(device="cpu"), []
    launches.on_device(lambda: observed.append(is_observed()), args)
    assert observed == [False] * launches.PROFILED
    with pytest.raises(ZeroDivisionError):
        launches.on_device(lambda: 1 / 0, args)
    with profile():
        assert is_observed()


def test_launches(monkeypatch):
    """On a GPU; here with a profiler that makes its events up: a kernel of 2 ms and one of 1 in every step."""

    def event(us, kind=DeviceType.CUDA, annotation=False):
        span = types.SimpleNamespace(elapsed_us=lambda: us)
        return types.SimpleNamespace(device_type=kind, time_range=span, is_user_annotation=annotation)

    class Profiler(contextlib.nullcontext):
        def __enter__(self):
            others = [event(9.0, DeviceType.CPU), event(9.0, annotation=True)]
            return types.SimpleNamespace(events=lambda: [event(2000.0), event(1000.0)] * 3 + others)

    monkeypatch.setattr(torch.profiler, "profile", lambda **options: Profiler())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    options = "--device cpu --model test_vim2 timm:test_resnet --img-size 64 --batch-size 1 2 --infer --repeats 3"
    args = command.parse(options.split())
    rows = list(launches.measure_launches(args))
    assert [(row["batch"], row["model"]) for row in rows] == [
        (batch, name) for batch in (1, 2) for name in ("test_vim2", "test_resnet")
    ]
    for row in rows:
        assert row["launches"] == 2 and row["device_ms"] == pytest.approx(3.0) and row["ms"] > 0
        assert 0 < row["host_us"] <= row["ms"] * 1e3 / 2
    rows[0] |= {"ms": 6.0, "host_us": 1234.5}
    rows.append({"model": "large", "size": 64, "batch": 9, "mode": "infer", "error": "out of memory"})
    lines = launch_table(rows).splitlines()
    assert "| test_vim2 | 64 | 1 | infer | 2 | 1234.5 | 6.00 | 3.00 | 2.00 |" in lines
    assert lines[-1] == "| large | 64 | 9 | infer | out of memory | - | - | - | - |"


def test_launches_of_what_does_not_fit(monkeypatch):
    """A model that runs out of memory leaves the others' rows."""

    def too_much():
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(launches, "on_device", lambda run, args: {"launches": 1, "device_ms": 1.0})
    args = command.parse(["--device", "cpu", "--repeats", "1"])
    first, second = launches._in_turn([{}, {}], [too_much, lambda: None], args)
    assert first == {"error": "out of memory"} and second["ms"] > 0


@pytest.mark.parametrize(
    ("main", "options"),
    [(command.benchmark, "--model test_vim2"), (forecast.main, "")],
    ids=["models", "forecast"],
)
def test_devices_that_are_not_there_are_one_line(main, options, capsys):
    for device, message in (("nope", "nope"), ("cuda:99", "--device cpu")):
        assert run_tool(main, ["--device", device, *options.split()]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("default", "message"), [("mamba_ssm", "needs the package mamba-ssm"), ("cuda", "must be one of")]
)
@pytest.mark.parametrize(
    ("main", "options"),
    [(command.benchmark, "--model test_vim2"), (forecast.main, "")],
    ids=["models", "forecast"],
)
def test_a_default_backend_that_cannot_run_here_is_one_line(main, options, default, message, monkeypatch, capsys):
    monkeypatch.setattr(backend, "DEFAULT_BACKEND", default)
    monkeypatch.setattr(backend, "HAS_MAMBA_SSM", False)
    assert run_tool(main, ["--device", "cpu", *options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_floors():
    """Each operator's is the longest of its three, a family's the sum of them."""
    args = command.parse(["--device", "cpu", "--warmup", "1", "--repeats", "1"])
    rates = {"bytes": 1e9, "flops": 1e9, "exponentials": 1e6}
    result = profiles.profile_model("test_vim2", 64, 1, "infer", rates, args)
    rows = {row["operators"]: row for row in result["profile"]}
    scan, products, copies = (rows[name] for name in ("selective_scan", "products", "copies"))
    assert scan["floor_ms"] == pytest.approx(scan["gexp"] * 1e6)
    assert products["floor_ms"] >= max(products["gflop"], products["gb"]) * 1e3
    assert copies["floor_ms"] == pytest.approx(copies["gb"] * 1e3)
    table = profile_table(result | {"launches": 77})
    assert " ms a step, 77 launches; by operators, " in table
    assert f"| {scan['floor_ms']:.3f} | {scan['ms'] / scan['floor_ms']:.1f} |" in table


def test_compilations(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    options = "--device cpu --model timm:test_resnet --compilations --torchcompile --infer --img-size 64 96 64"
    assert main(["benchmark", *options.split()]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| test_resnet")]
    assert rows == [f"| test_resnet | {size} | 1 | 0 | {graphs} |" for size, graphs in ((64, 1), (96, 1), (64, 0))]


def test_first_steps(capfd):
    """Each model in a process of its own: what the first has prepared there, the second must prepare again."""
    options = "--device cpu --first-step --model test_vim2 --img-size 32 --batch-size 2 --train"
    assert main(["benchmark", *options.split()]) == 0
    out, err = capfd.readouterr()
    (row,) = map(json.loads, err.splitlines())
    assert row["train"]["first_s"] > row["train"]["second_s"] > 0 and "infer" not in row
    figures = f"{row['train']['first_s']:.2f} | {row['train']['second_s']:.2f}"
    assert out.endswith(f"| test_vim2 | 32 | 2 | {figures} |\n")


def test_triton_kernels_are_counted():
    knobs = pytest.importorskip("triton.knobs")
    with compilations.counting_compilations() as counts:
        for name in ("a", "b", "a"):
            knobs.runtime.jit_post_compile_hook(fn=types.SimpleNamespace(name=name), already_compiled=False)
    assert counts == {"kernel a": 2, "kernel b": 1, "graphs": 0}
    assert knobs.runtime.jit_post_compile_hook is None
    assert len(command.parse(["--compilations", "--torchcompile", "--device", "cpu"]).shapes) == 10


def test_what_was_measured_before_an_error_is_kept(tmp_path, capsys, monkeypatch):
    def measure_model(name, size, batch, args):
        if size == 64:
            raise UserError("no more")
        return models.measure_model(name, size, batch, args)

    monkeypatch.setattr(command, "measure_model", measure_model)
    options = "--device cpu --model test_vim2 --img-size 32 64 --infer --warmup 1 --repeats 1"
    assert main(["benchmark", *options.split(), "--output", str(tmp_path)]) == 2
    assert "no more" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "benchmark.json").read_text())["models"]
    assert row["model"] == "test_vim2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model nope", "There is no model nope"),
        ("--model test_vim2:d_state", "Cannot read 'd_state' in the model 'test_vim2:d_state'"),
        ("--model test_vim2:size=3", "test_vim2 cannot be made with {'size': 3}"),
        ("--model test_vit:embed_dim=-1", "error: test_vit cannot be made with {'embed_dim': -1}: "),
        ("--model test_vit:num_heads=7", "error: test_vit cannot be made with {'num_heads': 7}: "),
        (
            "--model test_vim2:pretrained=True",
            "error: test_vim2 cannot be made with {'pretrained': True}: No pretrained",
        ),
        (
            "--model test_vit:patch_size=7 --img-size 64",
            "test_vit:patch_size=7 does not run on images of 64 x 64 pixels",
        ),
        ("--model", "--model: expected at least one argument"),
        ("--img-sise 32", "unknown option --img-sise; did you mean --img-size?"),
        (
            "--device cpu --model test_vim2 --img-size 64 16 --infer",
            "test_vim2 does not run on images of 16 x 16 pixels",
        ),
        ("--device tpu", "cpu or cuda"),
        ("--device cpu:x", "cpu or cuda"),
        ("--device cuda:99", "there is no cuda:99, of "),
        ("--plot", "--output"),
        ("--count --ops", "--count measures no times"),
        ("--profile --ops", "give one of them"),
        ("--profile --torchcompile", "eager models"),
        ("--device cpu --launches", "what a GPU is given to do"),
        ("--profile --launches", "give one of them"),
        ("--device cpu --compilations", "give --torchcompile"),
        ("--torchcompile-mode reduce-overhead", "wants --torchcompile"),
        ("--plot --profile --output x", "--plot draws"),
        (f"--count --model test_vim2 --output {__file__}", "Nothing can be written into"),
        ("--device cpu --ops mamba_ssm", "The mamba_ssm backend needs"),
    ],
)
def test_errors(options, message, capsys):
    assert main(["benchmark", *options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
