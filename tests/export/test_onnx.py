"""ONNX files, read by onnxruntime, give what PyTorch does."""

import copy
import json
import sys

import pytest
import timm
import torch

import vim2
from vim2.checkpoints import save_checkpoint
from vim2.command.errors import UserError
from vim2.export import export_onnx, onnx_translations
from vim2.export.cli import main
from vim2.export.comparison import ONNX_RUNTIMES
from vim2.ops import BIDIRECTIONAL, CROSS_SCAN, FORWARD, selective_scan

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

SIZES = ((1, 3, 64, 64), (2, 3, 97, 71), (3, 3, 32, 128))
TINY = dict(depths=(1, 1), dims=(32, 48), d_state=2, channel_expand=2.0, channel_patch=8)  # scans of both layouts
SMALLER = dict(TINY, token_mixers=1)  # one of each in a block


def read(path):
    """A function of tensors, and the names of its results."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*tensors):
        results = session.run(None, {name: t.numpy() for name, t in zip(names, tensors)})
        return [torch.from_numpy(r) for r in results]

    return run, [o.name for o in session.get_outputs()]


def randomised(model):
    """Weights that show a mistake: at initialisation, averages and norms are ones."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.05)
    return model.eval()


def assert_alike(results, expected):
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=0, atol=1e-4 * max(1.0, right.abs().max().item()))


@pytest.fixture(scope="module")
def model():
    return randomised(timm.create_model("test_vim2", num_classes=7, **TINY))


@pytest.fixture(scope="module")
def smaller():
    return randomised(timm.create_model("test_vim2", num_classes=7, **SMALLER))


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(model, path)
    return path


@pytest.fixture(scope="module")
def chunked_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "chunked.onnx"
    export_onnx(model, path, scan="chunks")
    return path


@torch.no_grad()
@pytest.mark.parametrize("of_form", ["file", "chunked_file"])
def test_any_batch_and_size(model, of_form, request):
    run, names = read(request.getfixturevalue(of_form))
    assert names == ["logits"]
    for shape in SIZES:
        x = torch.randn(shape)
        assert_alike(run(x), [model(x)])


def test_channel_scans_are_too_short_for_chunks(file, chunked_file):
    """Every other one is scanned in chunks, which are joined, and scanned again."""
    scans, in_chunks = (
        sum(node.op_type == "Scan" for node in onnx.load(path).graph.node) for path in (file, chunked_file)
    )
    assert (scans, in_chunks) == (6, 14)  # of two blocks with two long scans each


def test_file_is_of_standard_operators_with_named_axes_and_no_paths(file):
    written = onnx.load(file)
    onnx.checker.check_model(written, full_check=True)
    assert [(o.domain, o.version) for o in written.opset_import] == [("", 20)] and not written.functions
    assert {node.domain for node in written.graph.node} == {""}
    (images,) = written.graph.input
    axes = [axis.dim_param or axis.dim_value for axis in images.type.tensor_type.shape.dim]
    assert images.name == "images" and axes == ["batch", 3, "height", "width"]
    assert b".py" not in file.read_bytes()


@torch.no_grad()
def test_features_only_and_the_oldest_opset(tmp_path):
    model = randomised(timm.create_model("test_vim2", features_only=True, out_indices=(0, 1), **SMALLER))
    export_onnx(model, tmp_path / "features.onnx", opset=18)
    run, names = read(tmp_path / "features.onnx")
    assert names == ["features_0", "features_1"]
    x = torch.randn(SIZES[1])
    assert_alike(run(x), model(x))


@torch.no_grad()
def test_one_image_size(smaller, tmp_path):
    export_onnx(smaller, tmp_path / "fixed.onnx", img_size=(33, 64), opset=23)
    run, _ = read(tmp_path / "fixed.onnx")
    x = torch.randn(3, 3, 33, 64)
    assert_alike(run(x), [smaller(x)])


@torch.no_grad()
@pytest.mark.parametrize("wide", [False, True])
def test_tsm2(wide, tmp_path):
    config = vim2.TSM2Config(
        lookback=24, horizon=5, patch=4, stride=2, d_model=32 if wide else 8, d_state=2, static_features=2,
        future_features=1,
    )  # fmt: skip
    model = randomised(vim2.TSM2(config))
    export_onnx(model, tmp_path / "tsm2.onnx")
    run, names = read(tmp_path / "tsm2.onnx")
    assert names == ["forecast"]
    for batch, variates in ((1, 4), (3, 2)):
        inputs = [torch.randn(s) for s in ((batch, 24, variates), (batch, variates, 2), (batch, 5, variates, 1))]
        assert_alike(run(*inputs), [model(*inputs)])


class Scan(torch.nn.Module):
    def __init__(self, orders, low_rank, softplus):
        super().__init__()
        self.orders, self.low_rank, self.softplus = orders, low_rank, softplus

    def forward(self, u, delta, A, B, C, weight):
        weight = weight if self.low_rank else None
        return selective_scan(u, delta, A, B, C, None, None, self.softplus, self.orders, weight)


@torch.no_grad()
# every scan in both layouts (3 features or 64) and in both forms, and every layout in both forms
@pytest.mark.parametrize(
    ("orders", "shared", "rank", "softplus", "dtype", "features", "form"),
    [
        (CROSS_SCAN, True, 2, True, torch.float32, 3, "steps"),
        (CROSS_SCAN, True, 2, True, torch.float32, 64, "chunks"),
        (BIDIRECTIONAL, False, 0, True, torch.float64, 3, "chunks"),
        (BIDIRECTIONAL, False, 0, True, torch.float64, 64, "steps"),
        (FORWARD, True, 1, False, torch.float16, 3, "chunks"),
        (FORWARD, True, 1, False, torch.float16, 64, "steps"),
    ],
    ids=str,
)
def test_scan_in_a_users_own_export(orders, shared, rank, softplus, dtype, features, form, tmp_path):
    k, n, (batch, height, width) = len(orders), 2, (2, 5, 13)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = (
        random(batch, height, width, *(() if shared else (k,)), features),
        random(batch, height, width, k, rank or features) * (1 if softplus else 0.1),
        -random(k, features, n).abs(),
        random(batch, height, width, k, n),
        random(batch, height, width, k, n),
        random(k, features, max(rank, 1)),
    )
    scan = Scan(orders, rank > 0, softplus).eval()
    path = tmp_path / "scan.onnx"
    torch.onnx.export(
        scan,
        inputs,
        path,
        dynamo=True,
        custom_translation_table=onnx_translations(form),
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}  # without delta's weight where it is not used
    named = dict(zip(("u", "delta", "a", "b", "c", "weight"), inputs))
    result = session.run(None, {name: t.numpy() for name, t in named.items() if name in wanted})[0]
    expected = scan(*inputs)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_openvino_reads_it(model, tmp_path, monkeypatch):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    export_onnx(model, tmp_path / "model.onnx")
    name, run = ONNX_RUNTIMES["openvino"](tmp_path / "model.onnx", "cpu")
    assert name == f"OpenVINO {openvino.__version__.partition('-')[0]}"
    for shape in SIZES:
        x = torch.randn(shape)
        assert_alike(run(x), [model(x)])


def test_inputs_of_a_scans_step_have_types(file):
    """Which ONNX leaves open, and OpenVINO needs."""
    scans = [node for node in onnx.load(file).graph.node if node.op_type == "Scan"]
    bodies = [attribute.g for node in scans for attribute in node.attribute if attribute.name == "body"]
    types = {i.type.tensor_type.elem_type for body in bodies for i in body.input}
    assert len(bodies) > 1 and types == {onnx.TensorProto.FLOAT}


def test_last_state_is_refused():
    from vim2.export.onnx_scan import selective_scan as translated

    with pytest.raises(NotImplementedError, match="last state"):
        translated(chunked=False)(*[None] * 8, True, [0], 1, 1, False, True, 1, "torch")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(opset=17), "must be 18 to"),
        (dict(opset=99), "must be 18 to"),
        (dict(img_size=(31, 64)), "at least 32 x 32, got 31 x 64"),
        (dict(scan="blocks"), "steps or chunks, got blocks"),
    ],
)
def test_what_cannot_be_written(model, options, says, tmp_path):
    with pytest.raises(UserError, match=says):
        export_onnx(model, tmp_path / "model.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_without_what_is_around_it(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 8, 8), torch.nn.AdaptiveAvgPool2d(1)).eval()
    export_onnx(torch.compile(torch.nn.DataParallel(model)), tmp_path / "model.onnx")
    x = torch.randn(3, 3, 40, 48)
    assert_alike(read(tmp_path / "model.onnx")[0](x), [model(x)])


def test_models_that_onnx_has_no_form_of(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 8), torch.nn.Flatten(), torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="takes no bfloat16"):
        export_onnx(copy.deepcopy(model).bfloat16(), tmp_path / "model.onnx")
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    with pytest.raises(UserError, match="were quantized by torch"):
        export_onnx(quantized, tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())


def test_tsm2_has_no_image_size(tmp_path):
    with pytest.raises(UserError, match="reads no images"):
        export_onnx(vim2.TSM2(vim2.TSM2Config()), tmp_path / "model.onnx", img_size=(64, 64))


def test_missing_package(model, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "vim2.export.onnx_scan", raising=False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r'pip install "vim2\[export\]"'):
        export_onnx(model, tmp_path / "model.onnx")


@torch.no_grad()
def test_command(smaller, tmp_path, capsys):
    checkpoint, output = tmp_path / "best.pth", tmp_path / "new" / "features.onnx"
    facts = dict(arch="test_vim2", num_classes=7, model_kwargs=SMALLER, class_names=list("abcdefg"))
    facts["data_config"] = dict(input_size=(3, 48, 48), mean=(0.1, 0.2, 0.3))
    save_checkpoint({**facts, "state_dict": smaller.state_dict()}, checkpoint)
    command = [
        "--format",
        "onnx",
        "--scan",
        "chunks",
        "--features-only",
        "--checkpoint",
        str(checkpoint),
        "--output",
        str(output),
    ]
    assert main(["export", *command, "--compare"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{output}: ") and printed[-1].startswith("| 97 x 131 |")
    run, names = read(output)
    x = torch.randn(SIZES[0])
    assert_alike(run(x), smaller.forward_intermediates(x, intermediates_only=True))
    assert names == ["features_0", "features_1"]
    told = {p.key: json.loads(p.value) for p in onnx.load(output).metadata_props}
    assert told["input_size"] == [3, 48, 48] and told["mean"] == [0.1, 0.2, 0.3] and told["crop_mode"] == "center"
    assert "labels" not in told  # of maps, which have no classes


def test_classes_of_any_name_are_told(smaller, tmp_path, monkeypatch):
    """Such as folders have whose names are not UTF-8: lone surrogates to Python, which a file of ONNX cannot hold."""
    file = onnx.ModelProto()

    def write(model, path, size, opset, scan, metadata):
        onnx.helper.set_model_props(file, metadata)
        path.write_bytes(file.SerializeToString())

    monkeypatch.setattr("vim2.export.command.export_onnx", write)
    names = ["k\udce4se", "日本", 'a "quoted" name', *"defg"]
    facts = dict(arch="test_vim2", num_classes=7, model_kwargs=SMALLER, class_names=names)
    facts["terms"] = {"license": "other", "notes": ["For research."]}
    save_checkpoint({**facts, "state_dict": smaller.state_dict()}, tmp_path / "best.pth")
    options = ["--checkpoint", tmp_path / "best.pth", "--output", tmp_path / "x.onnx", "--img-size", 32]
    assert main(["export", "--format", "onnx", *map(str, options)]) == 0
    told = {p.key: p.value for p in onnx.load(tmp_path / "x.onnx").metadata_props}
    assert json.loads(told["labels"]) == names
    assert {name: json.loads(told[name]) for name in facts["terms"]} == facts["terms"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "vim2_nan"], "did you mean vim2_nano"),
        (["--model", "resnet18"], "Only ViM2 models"),
        (["--model", "test_vim2", "--checkpoint", "missing.pth"], "no checkpoint at"),
        (["--model", "vim2_nano", "--checkpoint", "weights.pth"], "another architecture"),
        (["--model", "resnet18", "--features-only"], "for ViM2 models"),
        (["--model", "swin_tiny_patch4_window7_224", "--img-size", "100"], "cannot read images of 100 x 100"),
        (["--model", "test_vim2", "--device", "cuda"], "for all devices"),
        (["--model", "test_vim2", "--batch-size", "2"], "add --compare"),
        (["--model", "test_vim2", "--compare", "--batch-size", "0"], "from 1 on, got 0"),
        (["--forecaster", "runs/none", "--model", "test_vim2"], "not for --forecaster"),
        (["--model", "test_vim2", "--opset", "11"], "must be 18 to"),
        (["--model", "test_vim2", "--img-size", "16"], "at least 32 x 32"),
        (["--model", "test_vim2", "--img-size", "64", "64", "3"], "a height and a width"),
        ([], "Say what to export"),
    ],
)
def test_mistakes_of_the_command(arguments, says, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint({"state_dict": model.state_dict()}, "weights.pth")
    assert main(["export", *arguments, "--format", "onnx", "--output", "x.onnx"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vim2: error: ") and error.count("\n") == 1 and says in error, error


@pytest.mark.parametrize("form", ["onnx", "pt2", "timm", "safetensors"])
def test_an_output_that_cannot_be_written_costs_no_work(form, model, tmp_path, monkeypatch, capsys):
    work = ("export_onnx", "export_pt2", "export_timm", "save_half_precision")
    for name in work:
        monkeypatch.setattr(f"vim2.export.command.{name}", lambda *_, **__: pytest.fail("something was exported"))
    save_checkpoint(
        {"arch": "test_vim2", "num_classes": 7, "model_kwargs": TINY, "state_dict": model.state_dict()},
        tmp_path / "weights.pth",
    )
    (tmp_path / "file").touch()
    command = ["export", "--checkpoint", str(tmp_path / "weights.pth"), "--format", form, "--output"]
    assert main([*command, str(tmp_path / "file" / "inside" / f"x.{form}")]) == 2
    assert "Nothing can be written into" in capsys.readouterr().err
    if form != "timm":
        assert main([*command, str(tmp_path)]) == 2
        assert f"{tmp_path} is a folder" in capsys.readouterr().err
