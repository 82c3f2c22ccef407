#!/usr/bin/env python
"""The results tables of the benchmark data sets: run cells, print tables.

    forecast_results.py ridge   the ridge baseline's test errors, which show that the protocol is the field's
    forecast_results.py run     trains and tests, with one recipe for all, a cell for data set, horizon and seed
    forecast_results.py table   prints what was run, beside the paper's and published figures

Flights, Retail, Employment, Tourism and Electricity are made by many_variates.py; they are run where --names has them.

Every finished cell is a line of OUTPUT/results.jsonl; a cell that is there already is not run again. With --no-test,
cells are trained and validated, and the test splits are not looked at. Trainings stay in OUTPUT/runs: where
results.jsonl was removed, `run` trains none of them again, but mixes their members by today's rule for weights.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.command import run_tool
from common.scheduler import STOPPED, find_result, read_results, run_tasks, visible_gpus

import argparse
import json
import statistics
from collections.abc import Sequence

from vim2.benchmark.measuring import positive
from vim2.benchmark.reporting import is_number
from vim2.command.errors import UserError

FILES = {
    "ETTh1": "ETTh1.csv",
    "ETTh2": "ETTh2.csv",
    "ETTm1": "ETTm1.csv",
    "ETTm2": "ETTm2.csv",
    "Exchange": "exchange_rate.csv",
    "Weather": "weather.csv",
}
# Series with many variates, and one with features that are known ahead, as many_variates.py makes them: file, horizons,
# options of `fit`.
MANY = {
    "Flights": ("flights.csv", (24, 96), {}),
    "Retail": ("retail.csv", (12, 24), {}),
    "Employment": ("employment.csv", (12, 24), {}),
    "Tourism": ("tourism.csv", (4, 8), dict(split=[0.6, 0.2, 0.2])),  # 80 rows in all
    "Electricity": ("electricity.csv", (48,), dict(targets=["Demand"])),
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
STATIC = {"Retail": ["State", "Industry"], "Tourism": ["Region", "State", "Purpose"]}
# Comparisons. What TSM2 does alone, and ridge, is told of every cell.
_S6 = dict(variate_mixer="s6")
ABLATIONS = {
    "S6 along time and variates": _S6,
    "no variate mixer": dict(variate_mixer="none"),
    "Mamba + linear time": dict(_S6, time_mixer="linear"),
    "linear time, no variate mixer": dict(variate_mixer="none", time_mixer="linear"),
    "TSM2-MLP": dict(variate_mixer="mlp"),
    "2-D norm, no instance norm": dict(_S6, norm="2d", instance_norm="none"),
}
COMPARISONS = {
    "ablations": ABLATIONS,
    "calendar": {
        "history alone": {},
        "with calendar features": dict(calendar=True),
    },
    "variates": {name: ABLATIONS[name] for name in ("S6 along time and variates", "no variate mixer")},
    "static": {"S6 along time and variates": _S6},
    "known": {
        "history alone": {},
        "temperature and holidays known": dict(future_columns=["Temperature", "Holiday"]),
        "temperature, holidays and calendar known": dict(future_columns=["Temperature", "Holiday"], calendar=True),
    },
}
COMPARED = {
    "ablations": ("ETTh1", "Weather", "Exchange", "ETTm1", *MANY),
    "variates": ("Weather", "Flights", "Retail", "Employment", "Tourism"),
    "calendar": ("ETTh1", "ETTh2", "Weather"),
    "static": tuple(STATIC),
    "known": ("Electricity",),
}


def data_file(folder: Path, name: str) -> Path:
    file = FILES[name] if name in FILES else MANY[name][0]
    for suffix in ("", ".xz", ".gz"):
        if (path := folder / (file + suffix)).is_file():
            return path
    raise UserError(f"there is no {file}, .xz or .gz in {folder}: give another --data-dir.")


def run_cell(task: dict) -> dict:
    """Train, and test if asked to."""
    import torch

    from vim2.forecast import evaluate, fit

    torch.set_num_threads(task["threads"])
    cell = task["key"]
    experiment = f"{cell['name']}-{cell['horizon']}-{cell['label'].replace(' ', '_')}-{cell['seed']}"
    options = {k: task[k] for k in ("data", "device", "cuda_graph", "output")} | task["settings"]["changes"]
    options |= dict(task["of_set"], horizon=cell["horizon"], seed=cell["seed"])
    run = fit(**options, experiment=experiment, resume=True)
    committee = run["committee"]
    weights = {name: row["weight"] for name, row in committee["members"].items()}
    result = dict(
        val_mse=committee["val_mse"],
        val_mae=committee["val_mae"],
        tsm2_val_mse=run["best"]["val_mse"],
        ridge_val_mse=run["baselines"]["ridge"]["val_mse"],
        weights=weights,
        tsm2_weight=sum(weight for name, weight in weights.items() if name.startswith("TSM2")),
        epoch=run["best"]["epoch"],
        epochs=len(run["history"]),
        epoch_seconds=sorted(row["seconds"] for row in run["history"])[len(run["history"]) // 2],
        parameters=run["parameters"],
        device=run["device"],
        versions=run["versions"],
    )
    if task["settings"]["test"]:
        scores = evaluate(data=task["data"], checkpoint=run["folder"], device=task["device"], amp=run["options"]["amp"])
        first = next(iter(scores["scores"]))  # the committee, or with members=1 the TSM2
        for name, row in scores["scores"].items():
            prefix = "" if name == first else name.replace(" ", "_") + "_"
            result |= {prefix + error: row[error] for error in ("mse", "mae", "mase")}
        for part in ("quantiles", "without_conformal"):
            result |= {f"{part}_{name}": value for name, value in scores.get(part, {}).items()}
    return result


def print_ridge(args: argparse.Namespace) -> None:
    """Markdown: ridge's MSE on the test windows, for every data set and horizon, beside published averages."""
    import torch

    from vim2.forecast.baselines import Ridge
    from vim2.forecast.data import Scaler, Windows, make_split
    from vim2.forecast.recipes import RECIPES
    from vim2.forecast.scores import score
    from vim2.forecast.table import read_table

    torch.set_num_threads(args.threads)
    horizons = args.horizons or HORIZONS
    print(f"| data set | {' | '.join(map(str, horizons))} | average | penalties | paper's TSM2 | DUET |")
    print("|---" * (len(horizons) + 5) + "|")
    for name in (name for name in args.names if name in RECIPES):
        recipe = RECIPES[name]
        reading = {k: recipe[k] for k in ("times", "keep_values") if k in recipe}
        table = read_table(data_file(args.data_dir, name), **reading)
        errors, penalties = [], []
        for horizon in horizons:
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


def run_all(tasks: list[dict], args: argparse.Namespace) -> tuple[list[dict], int]:
    """Run the cells that have no result yet, several at a time, until the time is over; all results, and how many cells
    have none."""
    path = args.output / "results.jsonl"
    done = read_results(path, fault)
    left = sum(find_result(task, done) is None for task in tasks)
    print(f"{left} cells to run, {len(done)} done before", flush=True)

    def finished(task: dict, row: dict | None, rows: list[dict]) -> list[dict]:
        if row:
            test = f"  test {row['mse']:.4f} (ridge {row['ridge_mse']:.4f})" if "mse" in row else ""
            print(
                f"{row['name']:<11} {row['horizon']:>3} seed {row['seed']} {row['label']:<20} validation "
                f"{row['val_mse']:.4f} (ridge {row['ridge_val_mse']:.4f}){test}  TSM2's weight "
                f"{row['tsm2_weight']:.2f}  epoch {row['epoch']} of {row['epochs']}, {row['seconds']} s",
                flush=True,
            )
        return []

    gpus = visible_gpus() if args.device in (None, "cuda") else []
    rows, count = run_tasks(
        run_cell, tasks, path, jobs=args.jobs, minutes=args.minutes, gpus=gpus, then=finished, fault=fault
    )
    print(f"{count} cells are left." if count else "All cells are done.", flush=True)
    return rows, count


def tables(rows: list[dict]) -> str:
    """Markdown: errors of every cell with at least one seed, mean ± deviation over the seeds, beside the baselines' and
    published ones, and averages.

    "weight" is what TSM2 has of the committee's weights; "TSM2" is the error of their mean, without linear members, and
    "linear" that of the committee without TSM2, by weights that validation finds for what is left of it. An MSE
    in bold is below ridge's; "p" is below the paper's, "d" below DUET's, which is known to us as an average.
    """
    lines, by_cell = [], {}
    for row in rows:
        if "mse" in row:
            by_cell.setdefault((row["label"], row["name"], row["horizon"]), []).append(row)
    for label in dict.fromkeys(label for label, name, _ in by_cell if name in FILES):
        heads = ["data set", "H", "MSE", "MAE", "MASE", "weight", "TSM2, MSE", "linear, MSE"]
        heads += ["ridge, MSE", "ridge, MAE", "last value, MSE", "paper, MSE", "DUET, MSE"]
        lines += [f"\n{label}\n", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name in FILES:
            cells = {h: by_cell[label, name, h] for h in HORIZONS if (label, name, h) in by_cell}
            for h, group in cells.items():
                group.sort(key=lambda row: row["seed"])
                lines.append(line(f"{name} | {h}", group, PAPER[name][HORIZONS.index(h)]))
            seeds = set.intersection(*({row["seed"] for row in group} for group in cells.values())) if cells else ()
            if len(cells) == len(HORIZONS) and seeds:
                averages = []
                for seed in sorted(seeds):
                    of_seed = [next(row for row in group if row["seed"] == seed) for group in cells.values()]
                    shared = [k for k in COLUMNS if all(k in row for row in of_seed)]
                    averages.append({k: sum(row[k] for row in of_seed) / len(of_seed) for k in shared})
                paper = sum(PAPER[name]) / len(HORIZONS)
                lines.append(line(f"{name} | average", averages, paper, DUET[name], len(seeds)))
    many = [cell for cell in sorted(by_cell, key=lambda cell: (cell[1], cell[2])) if cell[1] in MANY]
    if many:
        heads = ["data set", "H", "", "MSE", "MAE", "MASE", "weight", "TSM2, MSE", "linear, MSE"]
        heads += ["ridge, MSE", "ridge, MAE", "last value, MSE", "last season, MSE"]
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [
            f"| {name} | {h} | {label} | {' | '.join(columns(by_cell[label, name, h], (*COLUMNS, SEASON)))} |"
            for label, name, h in many
        ]
    banded = {cell: group for cell, group in by_cell.items() if "quantiles_coverage" in group[0]}
    if banded:
        heads = ["data set", "H", "coverage", "CRPS", "coverage without correction", "CRPS without correction"]
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for (_, name, h), group in banded.items():
            means = (statistics.fmean(row[k] for row in group) for k in BANDS)
            shown = (f"{m:.1%}" if "coverage" in k else f"{m:.4f}" for k, m in zip(BANDS, means, strict=True))
            lines.append(f"| {name} | {h} | {' | '.join(shown)} |")
    return "\n".join(lines)


BANDS = ("quantiles_coverage", "quantiles_crps", "without_conformal_coverage", "without_conformal_crps")
SEASON = "seasonal_naive_mse"
COLUMNS = ("mse", "mae", "mase", "tsm2_weight", "TSM2_members_alone_mse", "linear_members_alone_mse")
COLUMNS += ("ridge_mse", "ridge_mae", "last_value_mse")
OF_COMMITTEES = ("TSM2_members_alone_mse", "linear_members_alone_mse")  # which a single TSM2 (members=1) has not
KEY_NUMBERS, VALIDATION = ("horizon", "seed"), ("epoch", "val_mse", "ridge_val_mse")  # numbers that every row has


def fault(row: dict) -> str:
    """What a line of results.jsonl has that no cell's can have, in words; "" where all is well."""
    if bad := [name for name in ("name", "label") if not isinstance(row.get(name), str)]:
        return f"has no text as its {bad[0]}"
    names = (*KEY_NUMBERS, *VALIDATION, *(COLUMNS if "mse" in row else ()))
    bad = [name for name in names if not (is_number(row.get(name)) or (name in OF_COMMITTEES and name not in row))]
    return f"has no number as its {bad[0]}" if bad else ""


def line(start: str, group: list[dict], paper: float, duet: float | None = None, seeds: int = 0) -> str:
    """A row of the table from the rows of its seeds."""
    cells, mse = columns(group, COLUMNS), statistics.fmean(row["mse"] for row in group)
    marks = [mark for mark, other in (("p", paper), ("d", duet)) if other is not None and mse < other]
    cells[0] += "".join(f" {mark}" for mark in marks)
    return f"| {start} | {' | '.join(cells)} | {paper:.{4 if seeds else 3}f} | {'' if duet is None else duet} |"


def columns(group: list[dict], names: Sequence[str]) -> list[str]:
    """Cells of a table from the rows of its seeds: means, two with deviations; an MSE below ridge's in bold."""
    means = {k: statistics.fmean(row[k] for row in group) for k in names if all(k in row for row in group)}
    cells = [f"{means[k]:.{2 if k == 'tsm2_weight' else 4}f}" if k in means else "" for k in names]
    if len(group) > 1:
        for i in range(2):
            cells[i] += f" ± {statistics.stdev(row[names[i]] for row in group):.4f}"
    if round(means["mse"], 4) < round(means["ridge_mse"], 4):
        cells[0] = f"**{cells[0]}**"
    return cells


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("ridge", "run", "table"))
    parser.add_argument("--data-dir", type=Path, help="folder with ETTh1.csv, ..., weather.csv, flights.csv, ...")
    parser.add_argument("--output", type=Path, default=Path("runs/forecast-results"), help="folder of the results")
    parser.add_argument("--names", nargs="+", choices=(*FILES, *MANY), default=list(FILES))
    parser.add_argument(
        "--horizons",
        nargs="+",
        type=int,
        help="those that a data set has of these; default: all, of a comparison the first",
    )
    parser.add_argument(
        "--center", choices=("mean", "last"), default="mean", help="what `ridge` subtracts from a window"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--compare",
        nargs="+",
        choices=tuple(COMPARISONS),
        default=[],
        help="this instead of the recipe alone",
    )
    parser.add_argument("--no-test", action="store_true", help="validate only")
    parser.add_argument("--jobs", type=positive, default=1, help="cells at a time")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads a cell")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--device", default=None)
    parser.add_argument("--cuda-graph", action="store_true", help="see `fit`")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=JSON", help="further options of `fit`")
    args = parser.parse_args(argv)
    if args.command == "table":
        rows = read_results(args.output / "results.jsonl", fault)
        if not rows:
            raise UserError(f"There is no result in {args.output}: `run` makes them, or give another --output.")
        print(tables(rows))
        return 0
    if args.data_dir is None:
        raise UserError(f"`{args.command}` wants --data-dir, the folder with the data sets' files.")
    if args.command == "ridge":
        print_ridge(args)
        return 0
    tasks = [task for name in args.names for task in plan(name, args)]
    if not tasks:
        raise UserError(f"None of {', '.join(args.names)} has such a comparison or horizon.")
    rows, left = run_all(tasks, args)
    print(tables(rows))
    return int(left > 0)


def read_option(text: str) -> tuple[str, object]:
    """Name and value of a further option of `fit`, written OPTION=JSON."""
    name, sign, value = text.partition("=")
    try:
        if name and sign:
            return name, json.loads(value)
    except ValueError:
        pass
    raise UserError(f"--set {text} is not OPTION=JSON, such as epochs=4, 'split=[0.6,0.2,0.2]' or 'norm=\"2d\"'.")


def plan(name: str, args: argparse.Namespace) -> list[dict]:
    """The cells of a data set."""
    extra = dict(map(read_option, args.set))
    common = dict(data=str(data_file(args.data_dir, name)), output=str(args.output / "runs"))
    common |= dict(device=args.device, cuda_graph=args.cuda_graph, threads=args.threads)
    common |= dict(group=name, places=1 + (name == "Weather"))  # the largest, with which a GPU is busy
    horizons, of_set = HORIZONS, dict(recipe=name)
    if name in MANY:
        _, horizons, options = MANY[name]
        of_set = dict(options, refit=False)
    settings = {} if args.compare else {"TSM2": {}}
    for comparison in args.compare:
        if name in COMPARED[comparison]:
            settings |= COMPARISONS[comparison]
        if comparison == "static" and name in STATIC:
            settings["series described"] = dict(_S6, static_columns=STATIC[name])
    if args.horizons:
        horizons = [h for h in args.horizons if h in horizons]
    elif args.compare:
        horizons = horizons[:1]
    return [
        dict(
            common,
            of_set=of_set,
            key=dict(name=name, horizon=horizon, seed=seed, label=label),
            settings=dict(changes={**changes, **extra}, test=not args.no_test),
            priority=seed + i / len(settings),  # of all data sets, what a comparison names first comes first
        )
        for seed in args.seeds
        for horizon in horizons
        for i, (label, changes) in enumerate(settings.items())
    ]


if __name__ == "__main__":
    sys.exit(run_tool(main, stopped=STOPPED))
