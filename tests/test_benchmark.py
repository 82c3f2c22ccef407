"""tools/benchmark.py: its FLOPs against a sum by hand and the published figure, its files, its errors."""

import json

import pytest
import timm
import torch

from tools import benchmark


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
    flops = benchmark.count_flops(vmamba, 224)
    assert flops == vmamba_flops(96, (2, 2, 9, 2), 224)
    assert round(flops / 1e9, 1) == 5.6  # as published for VMamba-T
    swin = benchmark.create_model("swin_tiny_patch4_window7_224", 224, "meta")
    assert round(benchmark.count_flops(swin, 224) / 1e9, 1) == 4.5  # as published for Swin-T


def test_models_and_scan(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "SCAN_SHAPES", ((8, 4), (16, 2)))
    options = "--device cpu --model test_vim2 --compare timm:test_vit --img-size 32 64 --batch-size 2 --ops"
    options += f" --warmup 1 --repeats 1 --plot --output {tmp_path}"
    assert benchmark.main(options.split()) == 0
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
    assert [r["length"] for r in results["scans"]] == [16, 4]
    assert {"date", "hardware", "versions"} <= results["machine"].keys()


def test_one_mode_only(capsys):
    options = "--device cpu --model test_vim2 --img-size 32 --infer --warmup 1 --repeats 1"
    assert benchmark.main(options.split()) == 0
    out = capsys.readouterr().out
    assert "infer ms" in out and "train" not in out and "GiB" not in out


def test_counts_only(capsys):
    assert benchmark.main(["--device", "cpu", "--model", "vim2_tiny", "--count"]) == 0
    assert capsys.readouterr().out.endswith("\n| vim2_tiny | 224 | 1 | 24.02 | 6.15 |\n")


def test_mamba_inputs_are_the_same_work():
    ours = benchmark.scan_inputs(2, 8, 3, torch.float32, "cpu")
    theirs = benchmark.mamba_inputs(2, 8, 3, torch.float32, "cpu")
    assert theirs["u"].shape == theirs["delta"].shape == (2, 32, 9)
    assert theirs["B"].shape == (2, 4, 16, 9) and theirs["A"].shape == (32, 16)
    torch.testing.assert_close(theirs["delta"][1, 8 * 3 + 5, 7], ours["delta"][1, 2, 1, 3, 5])
    torch.testing.assert_close(theirs["B"][0, 2, 9, 4], ours["B"][0, 1, 1, 2, 9])
    torch.testing.assert_close(theirs["u"][0, 8 + 5, 4], ours["u"][0, 1, 1, 5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model nope", "no model 'nope'"),
        ("--device tpu", "cpu or cuda"),
        ("--plot", "--output"),
        ("--count --ops", "--count measures no times"),
    ],
)
def test_errors(options, message, capsys):
    assert benchmark.main([*options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
