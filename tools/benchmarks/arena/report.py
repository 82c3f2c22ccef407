"""The arena's tables and pictures, from its results' file and its runs' folders."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vim2.benchmark.reporting import is_number
from vim2.command.figures import figure, save, whole_numbers
from vim2.command.tables import ABSENT, table

__all__ = [
    "best_rate",
    "collect",
    "fault",
    "plot_all",
    "plot_scaling",
    "report",
    "scaling_report",
    "scaling_rows",
    "unfinished_runs",
]

RUN = ("epochs", "lr", "seed")
NEEDED = {  # numbers that every row of a kind has, and those of a row that has not failed
    "search": (RUN, ("top1",)),
    "train": ((*RUN, "sharing"), ("top1", "top5", "params_m", "gflops", "images_per_second", "train_seconds")),
    "time": ((), ("images_per_second",)),
    "scale": ((*RUN, "img_size"), ("top1", "top5", "gflops")),
}


def fault(row: dict) -> str:
    """What a line of arena.jsonl has that no result can have, in words; "" where all is well."""
    kind = row.get("kind")
    if not isinstance(kind, str) or kind not in NEEDED:
        return "has no kind of run"
    always, finished = NEEDED[kind]
    names = always if "failed" in row else (*always, *finished)
    if bad := [name for name in names if not is_number(row.get(name))]:
        return f"has no number as its {bad[0]}"
    texts = ("label", *(("hardware", "versions", "date") if "date" in row else ()))
    if bad := [name for name in texts if not isinstance(row.get(name), str)]:
        return f"has no text as its {bad[0]}"
    if "failed" in row:
        return ""
    if kind in ("train", "time") and not ("gib" in row and is_number(row["gib"] or 0)):  # None on a CPU
        return "has no number as its gib"
    if kind == "train" and not is_history(row.get("history")):
        return "has no epochs as its history"
    return ""


def is_history(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict) and is_number(row.get("epoch")) and is_number(row.get("top1") or 0) for row in value
    )


def collect(results: list[dict], settings: dict) -> list[dict]:
    """What the main table holds: a row for each label, length and learning rate, over its finished seeds.

    Args:
        results: Lines of arena.jsonl.
        settings: The content of settings.json.

    Returns:
        Dictionaries with `label`, `epochs`, `lr`, `seeds`, `params_m`, `gflops`; `top1`, `top5` and their deviations
        `top1_sd`, `top5_sd` (None for one seed); `images_per_second`, `minutes` of training, `gib`; `curve`, top-1
        over the epochs, means over the seeds; `timed`, whether the costs are those of a run alone on its device.
    """
    groups, times = defaultdict(list), defaultdict(list)
    for row in results:
        if row["kind"] == "time":
            times[row["label"]].append(row)
        if row["kind"] == "train" and "failed" not in row:
            groups[row["label"], row["epochs"], row["lr"]].append(row)
    rows = []
    for (label, epochs, lr), group in groups.items():
        group.sort(key=lambda row: row["seed"])
        speed = statistics.median(row["images_per_second"] for row in group)
        minutes = statistics.fmean(row["train_seconds"] for row in group) / 60
        gib, alone = group[0]["gib"], times.get(label)
        if alone:  # in several arenas, it may be
            speed = statistics.median(row["images_per_second"] for row in alone)
            minutes, gib = epochs * settings["images"] / speed / 60, alone[0]["gib"]
        rows.append(
            {
                "label": label,
                "epochs": epochs,
                "lr": lr,
                "seeds": [row["seed"] for row in group],
                **{k: group[0][k] for k in ("params_m", "gflops")},
                **{k: statistics.fmean(row[k] for row in group) for k in ("top1", "top5")},
                **{f"{k}_sd": deviation([row[k] for row in group]) for k in ("top1", "top5")},
                "images_per_second": speed,
                "minutes": minutes,
                "gib": gib,
                "timed": bool(alone) or all(row["sharing"] == 1 for row in group),
                "curve": mean_curve([row["history"] for row in group]),
            }
        )
    return sorted(rows, key=lambda row: -row["top1"])


def deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def mean_curve(histories: list[list[dict]]) -> list[tuple[int, float]]:
    """(epoch, mean top-1) wherever it was validated."""
    return [
        (rows[0]["epoch"], statistics.fmean(row["top1"] for row in rows))
        for rows in zip(*histories)
        if rows[0].get("top1") is not None
    ]


def unfinished_runs(output: Path, results: list[dict]) -> list[dict]:
    """Runs that were begun and have no line among the results.

    Returns:
        Dictionaries with `label`, `epochs`, `lr`, `seed`, the last `epoch`, the last that was `validated` (None where
        none was) and its `top1`, and the `curve`.
    """
    done = {(r["label"], r["epochs"], r["lr"], r["seed"]) for r in results if r["kind"] == "train"}
    rows = []
    for path in sorted((output / "runs").glob("*/epochs*-seed*/metrics.json")):
        run = json.loads(path.read_text())
        args, last = run["args"], run["history"][-1]
        if (path.parent.parent.name, args["epochs"], args["lr"], args["seed"]) not in done:
            curve = mean_curve([run["history"]])
            validated, top1 = curve[-1] if curve else (None, None)
            row = {"label": path.parent.parent.name, **{k: args[k] for k in ("epochs", "lr", "seed")}}
            rows.append({**row, "epoch": last["epoch"], "validated": validated, "top1": top1, "curve": curve})
    return rows


def report(rows: list[dict], unfinished: list[dict], results: list[dict], settings: dict) -> str:
    """Markdown: finished runs, what learning rates were chosen by, and what is not finished or has failed."""
    parts = [caption(results, settings)]
    if rows:
        parts.append(main_table(rows))
        parts.append(costs_note(rows, results))
    if searched := [row for row in results if row["kind"] == "search"]:
        parts.append(
            f"Learning rates, seed 0: top-1 in % on {settings['options']['holdout']:.0%} of the training images, set "
            "aside in these runs alone. The best is used above."
        )
        parts.append(search_table(searched))
        if ends := at_an_end(searched):
            text = "The best of these is the lowest or the highest, beyond which others may be better"
            parts.append(f"{text}: {', '.join(ends)}.")
    if unfinished:
        parts.append("Not finished, and in no figure above:")
        lines = [
            [
                u["label"],
                f"{u['lr']:g}",
                str(u["seed"]),
                f"{u['epoch']} of {u['epochs']}",
                number(u["top1"]),
                ABSENT if u["validated"] is None else str(u["validated"]),
            ]
            for u in unfinished
        ]
        parts.append(table(["label", "lr", "seed", "epoch", "top-1 so far", "after epoch"], lines))
    parts += [
        f"Failed: {row['label']}, lr {row['lr']:g}, seed {row['seed']}, epochs {row['epochs']}: {row['failed']}"
        for row in results
        if row["kind"] == "train" and "failed" in row
    ]
    return "\n\n".join(parts) + "\n"


def caption(results: list[dict], settings: dict) -> str:
    options = settings["options"]
    stem = "stems of half the stride" if settings["stem_stride"] == "half" else "stems as they are"
    data = f"{settings['images']:,} training images of {settings['num_classes']} classes"
    text = f"{options['img_size']} x {options['img_size']} pixels, {stem}, {data}, batch {options['batch_size']}. "
    text += (
        "Accuracies in % on the validation images after the last epoch: the best one would have been chosen by them."
    )
    places = dict.fromkeys(f"{row['hardware']}, {row['date']}. {row['versions']}." for row in results if "date" in row)
    return "\n\n".join([text, *places])


def main_table(rows: list[dict]) -> str:
    header = ["label", "params M", "GFLOPs", "lr", "epochs", "seeds", "top-1", "top-5", "train img/s", "minutes", "GiB"]
    lines = [
        [
            row["label"],
            f"{row['params_m']:.2f}",
            f"{row['gflops']:.3f}",
            f"{row['lr']:g}",
            str(row["epochs"]),
            ", ".join(map(str, row["seeds"])),
            number(row["top1"], row["top1_sd"]),
            number(row["top5"], row["top5_sd"]),
            f"{row['images_per_second']:.0f}",
            f"{row['minutes']:.1f}",
            number(row["gib"]),
        ]
        for row in rows
    ]
    return table(header, lines)


def costs_note(rows: list[dict], results: list[dict]) -> str:
    memory = " GiB is the most that was allocated, images held on the device included." if rows[0]["gib"] else ""
    if all(row["timed"] for row in rows):
        return f"Images a second, minutes of training and memory are those of a run alone on its device.{memory}"
    shared = max(row["sharing"] for row in results if row["kind"] == "train")
    return (
        f"Up to {shared} runs shared a device, and slowed one another down: compare minutes and images a second only "
        f"after `arena.py time`.{memory}"
    )


def search_table(rows: list[dict]) -> str:
    rates = sorted({row["lr"] for row in rows})
    lines = []
    for (label, epochs, _), group in searches(rows).items():
        cells = {row["lr"]: number(row.get("top1"), missing="failed") for row in group}
        lines.append([label, str(epochs), *(cells.get(rate, ABSENT) for rate in rates)])
    return table(["label", "epochs", *(f"{rate:g}" for rate in rates)], lines)


def at_an_end(searched: list[dict]) -> list[str]:
    """The models whose best learning rate is an end of the range that was tried, with it."""
    found = []
    for (label, *_), rows in searches(searched).items():
        rates, best = [row["lr"] for row in rows], best_rate(rows)
        if best in (min(rates), max(rates)):
            found.append(f"{label} ({best:g})")
    return found


def searches(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows of one search each, by label, length and the arena that made it."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["label"], row["epochs"], row.get("folder")].append(row)
    return groups


def best_rate(rows: list[dict]) -> float | None:
    """The learning rate that a search has found best, the lowest of several; None where all have failed."""
    tried = [row for row in rows if "failed" not in row]
    return max(tried, key=lambda row: (row["top1"], -row["lr"]))["lr"] if tried else None


def number(value: float | None, sd: float | None = None, missing: str = ABSENT) -> str:
    if value is None:
        return missing
    return f"{value:.2f}" + ("" if sd is None else f" ± {sd:.2f}")


def scaling_rows(results: list[dict], rows: list[dict]) -> list[dict]:
    """Accuracy at each image size, over the finished seeds: `label`, `epochs`, `lr`, `img_size`, `top1`, ...

    In the order of `rows`, those of `collect`, so that a model has one colour in all pictures.
    """
    groups, names = defaultdict(list), ("label", "epochs", "lr", "img_size")
    for row in results:
        if row["kind"] == "scale":
            groups[tuple(row[name] for name in names)].append(row)
    place = {(row["label"], row["epochs"], row["lr"]): i for i, row in enumerate(rows)}
    return [
        {
            **dict(zip(names, key)),
            "seeds": sorted(row["seed"] for row in group),
            "gflops": group[0]["gflops"],
            **{k: statistics.fmean(row[k] for row in group) for k in ("top1", "top5")},
            "top1_sd": deviation([row["top1"] for row in group]),
        }
        for key, group in sorted(groups.items(), key=lambda item: (place.get(item[0][:3], len(place)), item[0]))
    ]


def scaling_report(rows: list[dict], results: list[dict], settings: dict) -> str:
    sizes = sorted({row["img_size"] for row in rows})
    groups = by_run(rows)
    lines = []
    for name, group in groups.items():
        cells = {row["img_size"]: number(row["top1"], row["top1_sd"]) for row in group}
        lines.append([name, *(cells.get(size, ABSENT) for size in sizes)])
    about = "Top-1 in % at other image sizes than the trained one, images resized, without further training."
    return "\n\n".join([caption(results, settings), about, table(["label", *map(str, sizes)], lines)]) + "\n"


def by_run(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by a name for their label, length and rate that says no more than it takes to tell them apart."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["label"], row["epochs"], row["lr"]].append(row)
    labels = [label for label, _, _ in groups]
    lengths = [(label, epochs) for label, epochs, _ in groups]
    named = {}
    for (label, epochs, lr), group in groups.items():
        name = label if labels.count(label) == 1 else f"{label}, {epochs} epochs"
        named[name if lengths.count((label, epochs)) == 1 else f"{label}, {epochs} epochs, lr {lr:g}"] = group
    return named


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def plot_all(rows: list[dict], unfinished: list[dict], output: Path) -> None:
    """accuracy_over_time.png and accuracy_over_flops.png of finished runs, and curves.png of all."""
    if rows:
        points = {name: group[0] for name, group in by_run(rows).items()}
        plot_points(points, "minutes", "minutes of training", output / "accuracy_over_time.png")
        plot_points(points, "gflops", "GFLOPs an image", output / "accuracy_over_flops.png")
    if rows or unfinished:
        plot_learning(rows, unfinished, output / "curves.png")


def look(i: int) -> dict[str, str]:
    """Colour and marker of the i-th model."""
    return {"color": f"C{i % 10}", "marker": "osD^v"[i // 10 % 5]}


def plot_points(points: dict[str, dict], column: str, description: str, path: Path) -> None:
    """Top-1 with its deviation over a cost, on a logarithmic scale where costs differ by much, labels beside points."""
    fig = figure(figsize=(9, 6), dpi=120)  # as it is saved, for labels are placed in pixels
    axes = fig.subplots()
    for i, row in enumerate(points.values()):
        axes.errorbar(row[column], row["top1"], yerr=row["top1_sd"], capsize=3, linestyle="", **look(i))
    costs = [row[column] for row in points.values()]
    if max(costs) > 3 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="minor", labelsize="small")
    axes.margins(0.2)
    axes.set(xlabel=description, ylabel="top-1, %")
    axes.grid(alpha=0.3)
    label_points(fig, axes, [(name, row[column], row["top1"]) for name, row in points.items()])
    save(fig, path)


def label_points(fig, axes, points: list[tuple[str, float, float]]) -> None:
    """Write a label beside each point, at the nearest of some places where it covers as little as can be."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(fig).get_renderer()
    fig.draw_without_rendering()  # so that the axes have their place
    inside = axes.get_window_extent(renderer)
    pixels = axes.transData.transform([point[1:] for point in points])
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in pixels]
    angles = [math.pi * i / 8 for i in range(16)]
    places = [(d * math.cos(a), d * math.sin(a)) for d in (12, 20, 32, 48, 66, 86, 110) for a in angles]
    crowds = [sum(math.dist(a, b) < 60 for b in pixels) for a in pixels]
    for i in sorted(range(len(points)), key=lambda i: crowds[i]):  # those with room stay out of the crowds' way
        text = points[i][0].replace("$", r"\$")  # a dollar would start a formula
        measured = fig.text(0, 0, text, fontsize="small")
        size = measured.get_window_extent(renderer)
        measured.remove()

        def box(place: tuple[float, float], at=pixels[i], width=size.width, height=size.height) -> Bbox:
            """What a label covers whose nearest side or corner is at a distance, in pixels, from the point."""
            x, y = (at[axis] + place[axis] for axis in range(2))
            across, up = (round(v / math.hypot(*place)) for v in place)
            return Bbox.from_bounds(x + (across - 1) * width / 2, y + (up - 1) * height / 2, width, height)

        def covered(place: tuple[float, float], box=box) -> float:
            covers = box(place)
            outside = covers.width * covers.height - overlap(covers, inside)
            return round(5 * outside + sum(overlap(covers, other) for other in taken))

        best = min(places, key=covered)  # of equal ones the first, which is the nearest
        taken.append(box(best).padded(2))
        middle = [(low + high) / 2 - at for low, high, at in zip(taken[-1].min, taken[-1].max, pixels[i])]
        note = axes.annotate(
            text,
            points[i][1:],
            middle,
            textcoords="offset pixels",
            ha="center",
            va="center",
            fontsize="small",
            color=look(i)["color"],
        )
        note.set_in_layout(False)
        if math.hypot(*best) > 20:
            ends = axes.transData.inverted().transform([pixels[i], pixels[i] + best])
            axes.plot(*zip(*ends), color=look(i)["color"], alpha=0.5, lw=0.6)


def overlap(a, b) -> float:
    """The area that two boxes share."""
    return max(min(a.x1, b.x1) - max(a.x0, b.x0), 0) * max(min(a.y1, b.y1) - max(a.y0, b.y0), 0)


def plot_learning(rows: list[dict], unfinished: list[dict], path: Path) -> None:
    """Validation top-1 over epochs; means over seeds, and unfinished runs dashed."""
    fig = figure(figsize=(9, 5.5))
    axes = fig.subplots()
    for i, (name, group) in enumerate(by_run(rows).items()):
        axes.plot(*zip(*group[0]["curve"]), **look(i), markersize=4, label=name)
    for i, run in enumerate(unfinished, len(rows)):
        if run["curve"]:
            name = f"{run['label']}, seed {run['seed']}, lr {run['lr']:g}: {run['epoch']} of {run['epochs']}"
            axes.plot(*zip(*run["curve"]), **look(i), markersize=4, linestyle="--", label=name)
    finish_lines(fig, axes, "epoch", path)


def plot_scaling(rows: list[dict], path: Path) -> None:
    """Top-1 over the image size, the paper's figure of input scaling."""
    fig = figure(figsize=(9, 5.5))
    axes = fig.subplots()
    for i, (name, group) in enumerate(by_run(rows).items()):
        group.sort(key=lambda row: row["img_size"])
        sizes, accuracies = zip(*((row["img_size"], row["top1"]) for row in group))
        axes.errorbar(sizes, accuracies, yerr=[row["top1_sd"] or 0 for row in group], capsize=3, label=name, **look(i))
    axes.set_xticks(sorted({row["img_size"] for row in rows}))
    finish_lines(fig, axes, "image size, pixels", path)


def finish_lines(fig, axes, description: str, path: Path) -> None:
    axes.set(xlabel=description, ylabel="top-1, %")
    if description == "epoch":
        whole_numbers(axes.xaxis)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        fig.legend(handles, labels, loc="outside right upper", fontsize="small")
    save(fig, path)
