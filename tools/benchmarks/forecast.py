#!/usr/bin/env python
"""How long TSM2 takes: epochs of a committee in the shape of ETTh1 and Weather, and one's time and memory over variates
and lookback.

Random series; medians. Writes benchmark.json, and benchmark.png of the scaling, to --output, and prints markdown.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.command import run_tool

import argparse
import json
import platform
import time

import torch
from timm.utils import ModelEmaV3

from vim2 import TSM2Config
from vim2.checkpoints import write_atomically
from vim2.command.graphs import record
from vim2.command.processes import require_backend
from vim2.forecast.committee import Networks
from vim2.forecast.data import Windows
from vim2.forecast.scores import model_forecast, score
from vim2.ops.backend import DEFAULT_BACKEND

MEMBERS = 3
EPOCHS = {  # windows to train on and to validate on, variates, batch, model
    "ETTh1": (8033, 2785, 7, 64, dict(d_model=16, variate_mixer="none")),
    "Weather": (36280, 5175, 21, 128, dict(d_model=64)),
}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_step(config: TSM2Config, members: int, device: torch.device, amp: bool, example: torch.Tensor | None = None):
    """A training step on a batch, as the training loop makes it; with CUDA graphs for batches like the example."""
    torch.manual_seed(0)
    model = Networks(config, members).to(device)
    ema = ModelEmaV3(model, decay=0.998)
    graphed = None if example is None else record(model.train(), (example,), torch.bfloat16 if amp else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step(x, y):
        if graphed is not None and x.shape == example.shape:
            loss = (graphed(x).float() - y).square().mean()
        else:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = (model(x).float() - y).square().mean()
        loss.backward()
        for network in model:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)

    return ema.module, step


def time_epochs(device: torch.device, amp: bool, share: float) -> list[dict]:
    rows = []
    cases = [(n, graph) for n in EPOCHS for graph in ((False, True) if device.type == "cuda" else (False,))]
    for name, graph in cases:
        train, val, variates, batch, options = EPOCHS[name]
        config = TSM2Config(lookback=512, horizon=96, patch=64, stride=32, d_state=8, **options)
        values = torch.randn(train + 607, variates, device=device)
        windows, validation = (Windows(values, 512, 96, 0, n + 607) for n in (train, val))
        model, step = make_step(config, MEMBERS, device, amp, windows[:batch][0].contiguous() if graph else None)
        count = len(windows) if share == 1 else max(int(share * train) // batch, 1) * batch
        order = torch.randperm(len(windows), device=device)[:count]
        for size in (batch, batch, batch, len(order) % batch or batch):  # kernels may be compiled for the last batch
            step(*windows[:size][:2])
        synchronise(device)
        start = time.perf_counter()
        for index in order.split(batch):
            step(*windows[index][:2])
        synchronise(device)
        seconds = (time.perf_counter() - start) * train / len(order)
        forecast = model_forecast(model.eval(), amp=amp)
        some = Windows(values, 512, 96, 0, 607 + max(int(share * val), 1))
        for _ in range(2):  # the first warms up
            synchronise(device)
            start = time.perf_counter()
            score(lambda x, _, forecast=forecast: forecast(x, None).mean(0), some)
            synchronise(device)
        rows.append(
            dict(
                name=name + (", CUDA graphs" if graph else ""),
                batch=batch,
                train_seconds=round(seconds, 2),
                validation_seconds=round((time.perf_counter() - start) * len(validation) / len(some), 2),
            )
        )
        print(rows[-1], flush=True)
    return rows


def time_scaling(
    device: torch.device, amp: bool, repeats: int, variates: list[int], lookbacks: list[int]
) -> list[dict]:
    """A training step at batch 8, d_model 64, 2 blocks."""
    rows = []
    for axis, sizes in (("variates", variates), ("lookback", lookbacks)):
        for size in sizes:
            m, lookback = (size, 512) if axis == "variates" else (21, size)
            _, step = make_step(TSM2Config(lookback=lookback, d_model=64, depth=2), 1, device, amp)
            x, y = torch.randn(8, lookback, m, device=device), torch.randn(8, 96, m, device=device)
            step(x, y)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            times = []
            for _ in range(repeats):
                synchronise(device)
                start = time.perf_counter()
                step(x, y)
                synchronise(device)
                times.append(time.perf_counter() - start)
            memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
            rows.append({"axis": axis, "size": size, "ms": 1e3 * sorted(times)[repeats // 2], "mib": memory})
            print(rows[-1], flush=True)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    from vim2.command.figures import figure, save

    fig = figure(figsize=(10, 4))
    for axes, axis in zip(fig.subplots(1, 2), ("variates", "lookback")):
        points = [row for row in rows if row["axis"] == axis]
        axes.plot([p["size"] for p in points], [p["ms"] for p in points], marker="o", label="time")
        axes.set_xlabel("variates (lookback 512)" if axis == "variates" else "lookback (21 variates)")
        axes.set_ylabel("training step at batch 8, ms")
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
        if points and points[0]["mib"] is not None:
            other = axes.twinx()
            other.plot([p["size"] for p in points], [p["mib"] for p in points], "s--", color="#c02626", label="memory")
            other.set_ylabel("peak memory, MiB", color="#c02626")
            other.set_ylim(0)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/forecast-benchmark"))
    parser.add_argument("--share", type=float, default=1.0, help="of an epoch that is run, and scaled up")
    parser.add_argument("--repeats", type=int, default=30, help="of a step")
    parser.add_argument("--variates", type=int, nargs="*", default=[7, 21, 50, 100, 200, 400, 862])
    parser.add_argument("--lookbacks", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096])
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    require_backend(device.type)
    amp = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if amp else f"{platform.machine()}, {torch.get_num_threads()} threads"
    where = f"{name}, PyTorch {torch.__version__}, {'bfloat16 autocast' if amp else 'float32'}"
    where += "" if DEFAULT_BACKEND == "auto" else f", VIM2_SCAN_BACKEND={DEFAULT_BACKEND}"
    epochs = time_epochs(device, amp, args.share)
    scaling = time_scaling(device, amp, args.repeats, args.variates, args.lookbacks)
    result = {"where": where, "share": args.share, "epochs": epochs, "scaling": scaling}
    write_atomically(args.output / "benchmark.json", json.dumps(result, indent=1) + "\n")
    plot(scaling, args.output / "benchmark.png")
    print(f"\n{where}\n\n| epoch | batch | training, s | validation, s |\n|---|---|---|---|")
    for row in epochs:
        print(f"| {row['name']} | {row['batch']} | {row['train_seconds']:.2f} | {row['validation_seconds']:.2f} |")
    print("\n| training step at batch 8 | size | ms | MiB |\n|---|---|---|---|")
    for row in scaling:
        memory = "" if row["mib"] is None else f"{row['mib']:.0f}"
        print(f"| {row['axis']} | {row['size']} | {row['ms']:.1f} | {memory} |")


if __name__ == "__main__":
    sys.exit(run_tool(main))
