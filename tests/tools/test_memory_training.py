"""tools/comparisons/memory_training.py: training from memory beside training on noise."""

import re

import numpy as np
from PIL import Image

from comparisons.memory_training import Noise, main
from vim2.classify.training import Run


def test_images_and_noise_are_trained_on_in_turn(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 2)):
        for name in ("a", "b"):
            (folder := tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(number):
                Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    losses, train_epoch = {"noise": [], "memory": []}, Run.train_epoch

    def timed(run, epoch):
        row = train_epoch(run, epoch)
        noise = isinstance(run.loader, Noise)
        losses["noise" if noise else "memory"].append(row["train_loss"])
        return {**row, "images_per_second": 200.0 if noise else 180.0 + epoch}

    monkeypatch.setattr(Run, "train_epoch", timed)
    argv = ["--data-dir", str(tmp_path / "data"), "--model", "test_vim2", "--img-size", "32", "-b", "8", "-j", "0"]
    argv += ["--mixup", "0.8", "--lr", "1e-3", "--device", "cpu", "--output", str(tmp_path / "runs")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert re.findall(r"memory (\d+), noise (\d+); share ([\d.]+)", out) == [
        ("181", "200", "0.905"),  # the first pair, which compiles, isn't among them
        ("182", "200", "0.910"),
        ("183", "200", "0.915"),
    ]
    assert out.endswith("median share 0.910\n")
    assert len(losses["noise"]) == len(losses["memory"]) == 4
    assert np.isfinite([*losses["noise"], *losses["memory"]]).all()
    assert not (tmp_path / "runs").exists()
