#!/usr/bin/env python
"""How long TSM2 takes: epochs of committees in the shape of known data sets, and time and memory of a single one over
variates and lookback.

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
from dataclasses import replace
from itertools import product

import torch

from vim2 import TSM2, TSM2Config
from vim2.benchmark.measuring import positive
from vim2.command.outputs import make_folder
from vim2.command.processes import choose_device
from vim2.files import write_atomically
from vim2.forecast.committee import Networks
from vim2.forecast.data import Windows
from vim2.forecast.options import FitOptions, fill_open, model_config
from vim2.forecast.scores import model_forecast, score
from vim2.forecast.trainer import Trainer
from vim2.ops.backend import DEFAULT_BACKEND

# Rows to train and to validate on, variates, horizon: as recipes have them, and as five-minute speeds of 207 sensors,
# over four months as in METR-LA and over two weeks. Everything else is what `fit` chooses for so many.
EPOCHS = {
    "ETTh1": (8640, 2880, 7, 96),
    "Weather": (36887, 5270, 21, 96),
    "207 sensors": (23990, 3427, 207, 12),
    "207 sensors, two weeks": (2822, 404, 207, 12),
}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_epochs(names: list[str], device: torch.device, amp: bool, share: float) -> list[dict]:
    """An epoch of a committee's TSM2 as `fit` trains it, and the pass over the validation windows behind it."""
    rows = []
    for name, graph in product(names, (False, True) if device.type == "cuda" else (False,)):
        train, val, variates, horizon = EPOCHS[name]
        options = FitOptions(data=name, split=[train, val, 0], lookback=512, horizon=horizon)
        o = fill_open(options, train + val, variates)
        torch.manual_seed(0)
        values = torch.randn(train + val, variates, device=device)
        windows = Windows(values, 512, horizon, 0, train)
        trainer = Trainer(Networks(model_config(o, 0), o.members).to(device), windows, o, amp)
        if graph:
            trainer.capture()
        trainer.options = replace(o, epoch_steps=3)
        trainer.epoch(0)  # warms up, and compiles
        steps = max(int(share * o.epoch_steps), 1)
        trainer.options = replace(o, epoch_steps=steps)
        start = time.process_time()
        seconds = trainer.epoch(0)["seconds"] * o.epoch_steps / steps
        processor = (time.process_time() - start) * o.epoch_steps / steps
        forecast = model_forecast(trainer.averages.eval(), amp=amp)
        validation = Windows(values, 512, horizon, train - 512, train + val)
        some = validation.stretch(0, max(int(share * len(validation)), 1))
        for _ in range(2 if device.type == "cuda" else 1):  # the first warms up
            synchronise(device)
            start = time.perf_counter()
            score(lambda x, _, forecast=forecast: forecast(x, None).float().mean(0), some)
            synchronise(device)
        rows.append(
            dict(
                name=name + (", CUDA graphs" if graph else ""),
                updates=o.epoch_steps,
                batch=o.batch_size,
                train_seconds=round(seconds, 2),
                processor_seconds=round(processor, 2),
                validation_seconds=round((time.perf_counter() - start) * len(validation) / len(some), 2),
            )
        )
        print(rows[-1], flush=True)
    return rows


def make_step(config: TSM2Config, device: torch.device, amp: bool):
    """A training step of a TSM2 on a batch."""
    torch.manual_seed(0)
    model = TSM2(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step(x, y):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            loss = (model(x).float() - y).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_scaling(
    device: torch.device, amp: bool, repeats: int, variates: list[int], lookbacks: list[int]
) -> list[dict]:
    """A training step at batch 8, d_model 64, 2 blocks."""
    rows = []
    for axis, sizes in (("variates", variates), ("lookback", lookbacks)):
        for size in sizes:
            m, lookback = (size, 512) if axis == "variates" else (21, size)
            step = make_step(TSM2Config(lookback=lookback, d_model=64, depth=2), device, amp)
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
    from vim2.command.figures import figure, from_zero, save

    fig = figure(figsize=(10, 4))
    for axes, axis in zip(fig.subplots(1, 2), ("variates", "lookback")):
        points = [row for row in rows if row["axis"] == axis]
        axes.plot([p["size"] for p in points], [p["ms"] for p in points], marker="o", label="time")
        axes.set_xlabel("variates (lookback 512)" if axis == "variates" else "lookback (21 variates)")
        axes.set_ylabel("training step at batch 8, ms")
        from_zero(axes)
        axes.grid(alpha=0.3)
        if points and points[0]["mib"] is not None:
            other = axes.twinx()
            other.plot([p["size"] for p in points], [p["mib"] for p in points], "s--", color="#c02626", label="memory")
            other.set_ylabel("peak memory, MiB", color="#c02626")
            from_zero(other)
    save(fig, path)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--output", type=Path, default=Path("runs/forecast-benchmark"))
    parser.add_argument("--names", nargs="*", choices=tuple(EPOCHS), default=list(EPOCHS), help="whose epochs")
    parser.add_argument("--amp", action="store_true", help="bfloat16 outside the scan")
    parser.add_argument("--share", type=float, default=1.0, help="of an epoch that is run, and scaled up")
    parser.add_argument("--repeats", type=positive, default=30, help="of a step")
    parser.add_argument("--variates", type=positive, nargs="*", default=[7, 21, 50, 100, 200, 400, 862])
    parser.add_argument("--lookbacks", type=positive, nargs="*", default=[256, 512, 1024, 2048, 4096])
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    device = choose_device(args.device)
    make_folder(args.output)
    amp = args.amp
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    where = f"{name}, PyTorch {torch.__version__}, {'bfloat16 autocast' if amp else 'float32'}"
    where += "" if DEFAULT_BACKEND == "auto" else f", VIM2_SCAN_BACKEND={DEFAULT_BACKEND}"
    epochs = time_epochs(args.names, device, amp, args.share)
    scaling = time_scaling(device, amp, args.repeats, args.variates, args.lookbacks)
    result = {"where": where, "share": args.share, "epochs": epochs, "scaling": scaling}
    write_atomically(args.output / "benchmark.json", json.dumps(result, indent=1) + "\n")
    if scaling:
        plot(scaling, args.output / "benchmark.png")
    print(f"\n{where}\n\n| epoch | updates | batch | training, s | of a processor, s | validation, s |")
    print("|---|---|---|---|---|---|")
    for row in epochs:
        print(f"| {' | '.join(str(value) for value in row.values())} |")
    print("\n| training step at batch 8 | size | ms | MiB |\n|---|---|---|---|")
    for row in scaling:
        memory = "" if row["mib"] is None else f"{row['mib']:.0f}"
        print(f"| {row['axis']} | {row['size']} | {row['ms']:.1f} | {memory} |")


if __name__ == "__main__":
    sys.exit(run_tool(main))
