"""Markdown tables of what was measured, and a plot."""

from pathlib import Path

from ..command.figures import from_zero
from ..command.tables import ABSENT, table


def report(results: dict) -> str:
    about = results["machine"]
    parts = [f"{about['hardware']}, {about['date']}. {about['versions']}. {about['settings']}."]
    tables = {
        "models": model_table,
        "scans": scan_table,
        "compilations": compilation_table,
        "launches": launch_table,
        "first_steps": first_step_table,
    }
    parts += [to_table(results[kind]) for kind, to_table in tables.items() if kind in results]
    parts += [profile_table(result) for result in results.get("profiles", ())]
    return "\n\n".join(parts) + "\n"


def is_number(value) -> bool:
    """Whether a value from a file of results is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def figure(row: dict, mode: str, key: str, digits: int) -> str:
    """One cell: a number, or on its absence the reason."""
    if mode not in row:
        return ABSENT
    return f"{row[mode][key]:.{digits}f}" if key in row[mode] else row[mode].get("error", ABSENT)


def model_table(rows: list[dict]) -> str:
    header = ["model", "size", "batch", "params M", "GFLOPs"]
    header += ["infer ms", "infer img/s", "infer Mpix/s", "infer GiB", "train ms", "train img/s", "train GiB"]
    cells = [("infer", "ms", 2), ("infer", "img_s", 1), ("infer", "mpix_s", 2), ("infer", "gib", 2)]
    cells += [("train", "ms", 2), ("train", "img_s", 1), ("train", "gib", 2)]
    lines = []
    for row in rows:
        gflops = ABSENT if row["gflops"] is None else f"{row['gflops']:.2f}"
        line = [row["model"], str(row["size"]), str(row["batch"]), f"{row['params_m']:.2f}", gflops]
        lines.append(line + [figure(row, *cell) for cell in cells])
    return table(header, lines)


def scan_table(rows: list[dict]) -> str:
    header = ["scan", "E", "L", "batch", "forward ms", "forward GiB", "forward + backward ms", "forward + backward GiB"]
    cells = [("infer", "ms", 3), ("infer", "gib", 2), ("train", "ms", 3), ("train", "gib", 2)]
    lines = []
    for row in rows:
        line = [row["scan"], str(row["features"]), str(row["length"]), str(row["batch"])]
        lines.append(line + [figure(row, *cell) for cell in cells])
    return table(header, lines)


def profile_table(result: dict) -> str:
    """The longest first; the floor beside its operator, and how many times longer the operator took."""
    rows = result["profile"]
    total = sum(row["ms"] for row in rows)
    floor = sum(row.get("floor_ms", 0.0) for row in rows)
    lines = []
    for row in [*rows, {"operators": "all", "ms": total, "floor_ms": floor}]:
        members = sorted(row.get("members", {}).items(), key=lambda item: -item[1])
        named = ", ".join(f"{name} {ms:.2f}" for name, ms in members[:3]) if len(members) > 1 else ""
        name = f"{row['operators']} ({named})" if named else row["operators"]
        line = [name, str(row.get("calls", ABSENT)), f"{row['ms']:.3f}", f"{row['ms'] / total:.1%}"]
        line += [f"{row[key]:.2f}" if row.get(key) else ABSENT for key in ("gb", "gflop", "gexp")]
        has_floor = row.get("floor_ms") and row["ms"]
        line += [f"{row['floor_ms']:.3f}", f"{row['ms'] / row['floor_ms']:.1f}"] if has_floor else [ABSENT, ABSENT]
        lines.append(line)
    header = ["operators", "calls", "ms", "share", "GB", "GFLOP", "G exponentials", "floor, ms", "time / floor"]
    title = f"{result['model']}, {result['shape']}, batch {result['batch']}, {result['mode']}: "
    title += f"{result['step_ms']:.2f} ms a step"
    title += f", {result['launches']} launches" if "launches" in result else ""
    title += f"; by operators, {total:.2f} ms:"
    tables = [title, table(header, lines)]
    if "kept" in result:
        tables.append(kept_table(result["kept"]))
    return "\n\n".join(tables)


def kept_table(rows: list[dict]) -> str:
    total = {key: sum(row[key] for row in rows) for key in ("tensors", "bytes")}
    lines = [
        [row["operators"], str(row["tensors"]), f"{row['bytes'] / 2**20:.1f}", f"{row['bytes'] / total['bytes']:.1%}"]
        for row in [*rows, {"operators": "all"} | total]
    ]
    return f"Kept for the backward pass:\n\n{table(['operators', 'tensors', 'MiB', 'share'], lines)}"


def compilation_table(rows: list[dict]) -> str:
    header = ["model", "size", "batch"]
    header += [f"{mode}, {what}" for mode in ("infer", "train") for what in ("Triton kernels", "torch.compile graphs")]
    lines = []
    for row in rows:
        line = [row["model"], str(row["size"]), str(row["batch"])]
        for mode in ("infer", "train"):
            counts = row.get(mode)
            kernels = sum(n for name, n in counts.items() if name != "graphs") if counts else 0
            line += [str(kernels), str(counts["graphs"])] if counts else [ABSENT, ABSENT]
        lines.append(line)
    return table(header, lines)


def launch_table(rows: list[dict]) -> str:
    header = ["model", "size", "batch", "mode", "launches", "host us a launch", "ms", "device ms", "ms / device ms"]
    lines = []
    for row in rows:
        line = [row["model"], str(row["size"]), str(row["batch"]), row["mode"]]
        if "ms" in row:
            line += [str(row["launches"]), f"{row['host_us']:.1f}", f"{row['ms']:.2f}", f"{row['device_ms']:.2f}"]
            line.append(f"{row['ms'] / row['device_ms']:.2f}")
        else:
            line += [row["error"], *[ABSENT] * 4]
        lines.append(line)
    return table(header, lines)


def first_step_table(rows: list[dict]) -> str:
    header = ["model", "size", "batch"]
    header += [f"{mode}, {which} step, s" for mode in ("infer", "train") for which in ("first", "second")]
    cells = [(mode, key, 2) for mode in ("infer", "train") for key in ("first_s", "second_s")]
    lines = [
        [row["model"], str(row["size"]), str(row["batch"]), *(figure(row, *cell) for cell in cells)] for row in rows
    ]
    return table(header, lines)


def plot(rows: list[dict], path: Path, where: str) -> None:
    """Throughput in Mpix/s over the image's side, one panel for inference and one for training."""
    from matplotlib.figure import Figure

    modes = [mode for mode in ("infer", "train") if any("mpix_s" in row.get(mode, {}) for row in rows)]
    image = Figure(figsize=(5 * max(1, len(modes)), 4), layout="constrained")
    for axes, mode in zip(image.subplots(1, max(1, len(modes)), squeeze=False)[0], modes):
        for name in dict.fromkeys(row["model"] for row in rows):
            points = [(r["size"], r[mode]["mpix_s"]) for r in rows if r["model"] == name and "mpix_s" in r[mode]]
            axes.plot(*zip(*sorted(points)), marker="o", label=name)
        axes.set(title={"infer": "inference", "train": "training"}[mode], xlabel="side, pixels", ylabel="Mpix/s")
        from_zero(axes)
        axes.grid(alpha=0.3)
        axes.legend()
    image.suptitle(where, fontsize="small")
    image.savefig(path, dpi=150)
