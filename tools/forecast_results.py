#!/usr/bin/env python
"""The results tables of the benchmark data sets: search settings on validation, run cells, print tables.

    forecast_results.py ridge   the ridge baseline's test errors, which show that the protocol is the field's
    forecast_results.py search  validates candidate settings of each data set, seed 0, and names the best
    forecast_results.py run     trains and tests the frozen recipes, a cell for data set, horizon and seed
    forecast_results.py table   prints what was run, beside the paper's and published figures

Every finished cell is a line of OUTPUT/results.jsonl; a cell that is there already is not run again.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

FILES = {
    "ETTh1": "ETTh1.csv",
    "ETTh2": "ETTh2.csv",
    "ETTm1": "ETTm1.csv",
    "ETTm2": "ETTm2.csv",
    "Exchange": "exchange_rate.csv",
    "Weather": "weather.csv",
}
HORIZONS = (96, 192, 336, 720)
PAPER = {  # arXiv 2403.19888, MSE at the four horizons
    "ETTh1": (0.375, 0.398, 0.419, 0.422),
    "ETTh2": (0.253, 0.334, 0.347, 0.401),
    "ETTm1": (0.322, 0.349, 0.366, 0.407),
    "ETTm2": (0.173, 0.230, 0.279, 0.388),
    "Exchange": (0.163, 0.229, 0.383, 0.999),
    "Weather": (0.161, 0.208, 0.252, 0.337),
}
DUET = {"ETTh1": 0.398, "ETTh2": 0.334, "ETTm1": 0.338, "ETTm2": 0.248, "Exchange": 0.280, "Weather": 0.218}  # averages
# Settings that `search` tries: what differs from the recipe, by name. Those that docs/results.md names are complete, so
# that they stay what they were when the recipe becomes another.
_SMALL = {
    "recipe": {},
    "gentle": dict(lr=1e-4, head_dropout=0.5),
    "eager": dict(lr=5e-4, head_dropout=0.7),
    "sam": dict(lr=5e-4, head_dropout=0.7, sam=0.3),
    "fine": dict(patch=16, stride=8, d_state=16),
    "path-trained": dict(lr=5e-4, head_dropout=0.7, linear_path_lr=0.05),
    "plain-sam": dict(linear_path=False, head_dropout=0.3, sam=0.3, epochs=10, patience=3),
}
_LARGE = {
    "recipe": {},
    "fast": dict(lr=1e-3),
    "head-dropout": dict(head_dropout=0.6),
    "path-trained": dict(linear_path_lr=0.05),
    "plain": dict(linear_path=False),
    "plain-2d": dict(linear_path=False, norm="2d"),
}
CANDIDATES = {
    "ETTh1": _SMALL,
    "ETTh2": _SMALL,
    "Exchange": {**_SMALL, "mean": dict(instance_norm="mean")},
    "ETTm1": _LARGE,
    "ETTm2": _LARGE,
    "Weather": _LARGE,
}
# Without the linear path, which would hide what the mixers do.
ABLATIONS = {
    "TSM2 without linear path": dict(linear_path=False),
    "TSM2-MLP": dict(linear_path=False, variate_mixer="mlp"),
    "Mamba + linear time": dict(linear_path=False, time_mixer="linear"),
    "no variate mixer": dict(linear_path=False, variate_mixer="none"),
}


def data_file(folder: Path, name: str) -> Path:
    for suffix in ("", ".xz", ".gz"):
        if (path := folder / (FILES[name] + suffix)).is_file():
            return path
    raise SystemExit(f"There is no {FILES[name]}, .xz or .gz in {folder}: give another --data-dir.")


def run_cell(task: dict) -> dict:
    """Train, and test unless it is a search; in a process of its own or not."""
    import torch

    from vim2.forecast import evaluate, fit

    torch.set_num_threads(task["threads"])
    key = f"{task['name']}-{task['horizon']}-{task['label'].replace(' ', '_')}-{task['seed']}"
    options = dict(
        data=task["data"], recipe=task["name"], horizon=task["horizon"], seed=task["seed"], device=task["device"]
    )
    start = time.perf_counter()
    run = fit(**options, **task["changes"], output=task["output"], experiment=key, resume=True)
    result = {k: task[k] for k in ("name", "horizon", "seed", "label", "changes")}
    best = run["best"]
    result.update(
        val_mse=best["val_mse"],
        val_mae=best["val_mae"],
        epoch=best["epoch"],
        epochs=len(run["history"]),
        epoch_seconds=sorted(row["seconds"] for row in run["history"])[len(run["history"]) // 2],
        ridge_val_mse=run["baselines"]["ridge"]["val_mse"],
        parameters=run["parameters"],
        device=run["device"],
        versions=run["versions"],
    )
    if task["test"]:
        scores = evaluate(data=task["data"], checkpoint=run["folder"], device=task["device"], amp=run["options"]["amp"])
        for name, row in scores["scores"].items():
            prefix = "" if name == "TSM2" else name.replace(" ", "_") + "_"
            result[prefix + "mse"], result[prefix + "mae"] = row["mse"], row["mae"]
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def print_ridge(args: argparse.Namespace) -> None:
    """Markdown: ridge's MSE on the test windows, for every data set and horizon, beside published averages."""
    import torch

    from vim2.forecast.baselines import Ridge
    from vim2.forecast.data import Scaler, Windows, make_split, read_table
    from vim2.forecast.recipes import RECIPES
    from vim2.forecast.scores import score

    torch.set_num_threads(args.threads)
    print(f"| data set | {' | '.join(map(str, args.horizons))} | average | penalties | paper's TSM2 | DUET |")
    print("|---" * (len(args.horizons) + 5) + "|")
    for name in args.names:
        recipe = RECIPES[name]
        reading = {k: recipe[k] for k in ("times", "keep_values") if k in recipe}
        table = read_table(data_file(args.data_dir, name), **reading)
        errors, penalties = [], []
        for horizon in args.horizons:
            lookback = recipe["lookback"]
            split = make_split(len(table), recipe["split"], lookback, horizon)
            values = Scaler.fit(table.values[: split.train]).transform(table.values)
            values = torch.tensor(values, dtype=torch.float32, device=args.device)
            parts = [Windows(values, lookback, horizon, *split.borders(p, lookback)) for p in ("train", "val", "test")]
            ridge = Ridge.fit(*parts[:2], center=args.center)
            errors.append(score(lambda x, _, ridge=ridge: ridge(x), parts[2])["mse"])
            penalties.append(f"{ridge.penalty:g}")
        cells = " | ".join(f"{e:.4f}" for e in errors)
        average, paper = sum(errors) / len(errors), sum(PAPER[name]) / len(HORIZONS)
        others = f"{', '.join(penalties)} | {paper:.4f} | {DUET[name]:.3f}"
        print(f"| {name} | {cells} | {average:.4f} | {others} |", flush=True)


def read_results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def key_of(row: dict) -> tuple:
    return row["name"], row["horizon"], row["seed"], row["label"]


def run_all(tasks: list[dict], args: argparse.Namespace) -> tuple[list[dict], int]:
    """Run the tasks that have no result yet, several at a time, until the time is over; all results, and how many are
    left."""
    path = args.output / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {key_of(row): row["changes"] for row in read_results(path)}
    for task in tasks:  # or the table would take other settings for another seed
        if done.get(key_of(task), task["changes"]) != task["changes"]:
            raise SystemExit(
                f"{path} holds {task['name']} {task['horizon']} {task['label']!r} with {done[key_of(task)]}, "
                f"not {task['changes']}: choose another --output."
            )
    tasks = [task for task in tasks if key_of(task) not in done]
    print(f"{len(tasks)} cells to run, {len(done)} done before", flush=True)
    end = time.monotonic() + 60 * args.minutes
    with multiprocessing.get_context("spawn").Pool(args.jobs, initializer=quiet) as pool:
        running, failed = [], []
        while tasks or running:
            while tasks and len(running) < args.jobs and time.monotonic() < end:
                running.append(pool.apply_async(run_cell, (tasks.pop(0),)))
            if (not running and time.monotonic() > end) or time.monotonic() > end + 60 * args.grace:
                pool.terminate()
                break
            for job in [job for job in running if job.ready()]:
                running.remove(job)
                try:
                    row = job.get()
                except Exception as error:  # one cell's failure is no reason to lose the others
                    failed.append(f"{type(error).__name__}: {error}")
                    print(f"A cell failed: {failed[-1]}", flush=True)
                    continue
                with open(path, "a") as file:
                    file.write(json.dumps(row) + "\n")
                test = f"  test {row['mse']:.4f} (ridge {row['ridge_mse']:.4f})" if "mse" in row else ""
                print(
                    f"{row['name']:<8} {row['horizon']:>3} seed {row['seed']} {row['label']:<20} validation "
                    f"{row['val_mse']:.4f} (ridge {row['ridge_val_mse']:.4f}){test}  {row['seconds']} s",
                    flush=True,
                )
            time.sleep(0.2)
    left = len(tasks) + len(running)
    print(f"{left} cells are left, {len(failed)} failed." if left or failed else "All cells are done.", flush=True)
    return read_results(path), left + len(failed)


def quiet() -> None:
    sys.stdout = io.StringIO()  # the cells' own lines would be mixed up


def chosen_labels(rows: list[dict]) -> dict[str, str]:
    """For each data set, the candidate with the lowest validation error over the horizons, each relative to ridge's."""
    best = {}
    for name in FILES:
        totals = {}
        for row in rows:
            if row["name"] == name and row["label"] in CANDIDATES[name] and row["seed"] == 0:
                totals.setdefault(row["label"], []).append(row["val_mse"] / row["ridge_val_mse"])
        complete = max(map(len, totals.values()), default=0)
        means = {label: sum(v) / len(v) for label, v in totals.items() if len(v) == complete}
        if means:
            best[name] = min(means, key=means.get)
            print(
                f"{name}, validation over ridge's: "
                + ", ".join(f"{k} {v:.4f}" for k, v in sorted(means.items(), key=lambda kv: kv[1]))
            )
    return best


def tables(rows: list[dict]) -> str:
    """Markdown: errors of every cell with at least one seed, beside the baselines' and the paper's, and averages.

    `epoch` has the chosen epoch of every seed. A mean in bold is below ridge's, one with a "p" below the paper's.
    """
    lines, by_cell = [], {}
    for row in rows:
        if "mse" in row:
            by_cell.setdefault((row["label"], row["name"], row["horizon"]), []).append(row)
    for label in dict.fromkeys(label for label, _, _ in by_cell):
        lines += [
            f"\n{label}\n",
            "| data set | H | epoch | MSE | MAE | ridge, MSE | ridge, MAE | last value, MSE | paper, MSE |",
        ]
        lines.append("|---" * 9 + "|")
        for name in FILES:
            cells = {h: by_cell[label, name, h] for h in HORIZONS if (label, name, h) in by_cell}
            means = []
            for h, group in cells.items():
                values = {k: [r[k] for r in group] for k in ("mse", "mae", "ridge_mse", "ridge_mae", "last_value_mse")}
                paper = PAPER[name][HORIZONS.index(h)]
                means.append([sum(v) / len(v) for v in values.values()] + [paper])
                epochs = ", ".join(str(r["epoch"]) for r in group)
                lines.append(line(f"{name} | {h} | {epochs}", means[-1], f"{paper:.3f}", deviations(values)))
            if len(means) == len(HORIZONS):
                average = [sum(column) / len(means) for column in zip(*means)]
                lines.append(line(f"{name} | average |", average, f"{average[-1]:.4f}", ("", "")))
    return "\n".join(lines)


def line(start: str, means: list[float], paper: str, deviations: tuple[str, str]) -> str:
    """Means of mse, mae, ridge's mse and mae, the last value's mse, the paper's mse."""
    mse = f"**{means[0]:.4f}**" if means[0] < means[2] else f"{means[0]:.4f}"
    mark = " p" if means[0] < means[5] else ""
    baselines = " | ".join(f"{v:.4f}" for v in means[2:5])
    return f"| {start} | {mse}{deviations[0]}{mark} | {means[1]:.4f}{deviations[1]} | {baselines} | {paper} |"


def deviations(values: dict[str, list[float]]) -> tuple[str, str]:
    """Of mse and mae over the seeds; nothing of one seed."""
    if len(values["mse"]) == 1:
        return "", ""
    return tuple(f" ± {statistics.stdev(values[k]):.4f}" for k in ("mse", "mae"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("ridge", "search", "run", "table"))
    parser.add_argument("--data-dir", type=Path, help="folder with ETTh1.csv, ..., exchange_rate.csv, weather.csv")
    parser.add_argument("--output", type=Path, default=Path("runs/forecast-results"), help="folder of the results")
    parser.add_argument("--names", nargs="+", choices=tuple(FILES), default=list(FILES))
    parser.add_argument("--horizons", nargs="+", type=int, choices=HORIZONS, default=list(HORIZONS))
    parser.add_argument(
        "--center", choices=("mean", "last"), default="mean", help="what `ridge` subtracts from a window"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ablations", action="store_true", help="of the frozen recipes, instead of these")
    parser.add_argument("--candidates", nargs="+", metavar="LABEL", help="of `search`; default: all")
    parser.add_argument("--chosen", action="store_true", help="run what `search` found best, not the frozen recipes")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a cell")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no cell after these")
    parser.add_argument("--grace", type=float, default=1e6, help="minutes after which running cells are cut off, too")
    parser.add_argument("--device", default=None)
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=JSON", help="further options of `fit`")
    args = parser.parse_args()
    if args.command == "table":
        print(tables(read_results(args.output / "results.jsonl")))
        return
    if args.data_dir is None:
        parser.error("--data-dir is needed")
    if args.command == "ridge":
        print_ridge(args)
        return
    extra = {k: json.loads(v) for k, v in (pair.split("=", 1) for pair in args.set)}
    common = dict(device=args.device, output=str(args.output / "runs"), threads=args.threads)
    chosen = chosen_labels(read_results(args.output / "results.jsonl")) if args.chosen else {}
    tasks = []
    for horizon, name in itertools.product(args.horizons, args.names):
        cell = dict(name=name, horizon=horizon, data=str(data_file(args.data_dir, name)), **common)
        if args.command == "search":
            for label, changes in CANDIDATES[name].items():
                if args.candidates is None or label in args.candidates:
                    tasks.append(dict(cell, label=label, seed=0, changes={**changes, **extra}, test=False))
            continue
        base = CANDIDATES[name][chosen[name]] if name in chosen else {}
        settings = {k: {**base, **v} for k, v in ABLATIONS.items()} if args.ablations else {"TSM2": base}
        for seed, (label, changes) in itertools.product(args.seeds, settings.items()):
            tasks.append(dict(cell, label=label, seed=seed, changes={**changes, **extra}, test=True))
    rows, left = run_all(tasks, args)
    if args.command == "search":
        for name, label in chosen_labels(rows).items():
            print(f"{name}: {label} {CANDIDATES[name][label]}")
    else:
        print(tables(rows))
    sys.exit(left > 0)


if __name__ == "__main__":
    main()
