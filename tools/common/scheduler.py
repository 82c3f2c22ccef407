"""Runs tasks that take minutes or hours, several at a time, so that they can be stopped and gone on with.

    def train(task):  # at a module's top level, where the processes that run it can find it
        return {"top1": fit(task["key"]["model"], **task["settings"])}

    tasks = [{"key": {"model": model}, "settings": {"epochs": 5}} for model in models]
    rows, left = run_tasks(train, tasks, output / "results.jsonl", jobs=2, minutes=60, gpus=visible_gpus())

A task is a dict with

- `key`, what it is known by, such as {"model": "vim2_nano", "seed": 0}. Of several tasks with one key, one runs.
- `settings` (optional), what its result depends on besides, such as {"epochs": 5}.
- `priority` (optional), a number: the lowest first, and what is equal in the order given. Default 0.
- `places` (optional), how many of the `jobs` it takes. Default 1, at most `jobs`.
- `group` (optional): tasks of one group take about equally long, so that none is started which would not end in time.
- whatever else the worker wants to know. All of it must go through `pickle`, `key` and `settings` through JSON, too.

Every finished task is a line of the results' file: its key and settings, what the worker returned, and "seconds". A
task whose key has a line there is done. One that was cut off or has failed starts again in the next run, and it is for
the worker to go on from where it was.

vim2, and with it PyTorch, is imported in functions: a process that runs tasks loads what its worker needs, no more.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

__all__ = ["STOPPED", "find_result", "name_of", "read_results", "run_tasks", "visible_gpus"]

STOPPED = "stopped; the same command goes on where it was"  # what such a command says after Ctrl-C

_SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


def read_results(path: Path, fault: Callable[[dict], str] | None = None) -> list[dict]:
    """The lines of a results' file but for blank ones; none where there is no file.

    Args:
        path: The file.
        fault: Says what a row has that no result can have, such as "has no seed"; "" where all is well.

    Raises:
        UserError: The file cannot be read, or a line is no JSON object, or has a fault.
    """
    from vim2.command.errors import UserError

    try:
        lines = path.read_bytes().splitlines() if path.is_file() else []
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}).") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            row = None
        found = (fault(row) if fault else "") if isinstance(row, dict) else "is no JSON object"
        if found:
            raise UserError(f"{path}, line {number}, {found}: delete that line; what it told of is then run again.")
        rows.append(row)
    return rows


def find_result(task: dict, rows: Iterable[dict]) -> dict | None:
    """The row of a task, or None where it has none.

    Raises:
        UserError: The row is of other settings.
    """
    from vim2.command.errors import UserError

    key, settings = (json.loads(json.dumps(task.get(part, {}))) for part in ("key", "settings"))
    for row in rows:
        if key.items() <= row.items():
            found = {name: row.get(name) for name in settings}
            if found != settings:
                raise UserError(f"{name_of(task)} is there with {found}, not {settings}: choose another output folder.")
            return row
    return None


def name_of(task: dict) -> str:
    """The values of a task's key, in words."""
    return " ".join(map(str, task["key"].values()))


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes; [] where there is none."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def run_tasks(
    worker: Callable[[dict], dict],
    tasks: Iterable[dict] | Callable[[list[dict]], Iterable[dict]],
    path: Path,
    *,
    jobs: int = 1,
    minutes: float = float("inf"),
    gpus: Sequence[str] = (),
    then: Callable[[dict, dict | None, list[dict]], Iterable[dict]] | None = None,
    fault: Callable[[dict], str] | None = None,
) -> tuple[list[dict], int]:
    """Run the tasks that have no result yet, several at a time, until the time is over.

    The results' folder is locked meanwhile: of two commands, each would write the file without the other's results.

    Args:
        worker: Runs a task and returns its result, a dict that JSON can hold. It runs in other processes, `jobs` of
            them, one task after another in each; what it prints is not shown.
        tasks: As the module's docstring describes them; or what makes them of the rows that are there, once the
            folder is locked.
        path: The results' file, which is written anew, in one step, after every task.
        jobs: How many tasks at a time.
        minutes: After these, what still runs is cut off, and nothing new is started.
        gpus: GPUs by the names that CUDA_VISIBLE_DEVICES takes: each process sees one, in turn. By default all see all.
        then: Called after every task with it, its row (None where it has failed) and all rows. Returns further tasks.
        fault: As for `read_results`.

    Returns:
        All rows of the file, and how many tasks have no result: those that are left, and those that have failed.

    Raises:
        UserError: There is a result with a task's key, but of other settings; what `read_results` refuses; another
            command runs tasks in the folder, or it cannot be written.
    """
    from vim2.command.runs import identity, own_folder

    with own_folder(path.parent, identity(path.parent / "last.pth"), output="output folder", then="then start again"):
        rows = read_results(path, fault)
        return _run_tasks(worker, tasks(rows) if callable(tasks) else tasks, path, rows, jobs, minutes, gpus, then)


def _run_tasks(worker, tasks, path, rows, jobs, minutes, gpus, then) -> tuple[list[dict], int]:
    """As `run_tasks`, in a folder that is locked, with the rows that are there."""
    from vim2.command.processes import ctrl_c_ignored
    from vim2.files import write_atomically

    known, queue = [], []
    failed, latest = 0, {}  # how long the latest task of each group took

    def add(further: Iterable[dict]) -> None:
        for task in further:
            if find_result(task, rows) is None and find_result(task, known) is None:
                known.append(json.loads(json.dumps({**task["key"], **task.get("settings", {})})))
                queue.append(task)
        queue.sort(key=lambda task: task.get("priority", 0))

    def places(task: dict) -> int:
        return min(task.get("places", 1), jobs)

    add(tasks)
    end = time.monotonic() + 60 * minutes
    idle = deque(_Process(worker, gpus[i % len(gpus)] if gpus else None) for i in range(jobs))
    running: dict[Connection, tuple[_Process, dict, float]] = {}
    try:
        while queue or running:
            free = jobs - sum(places(task) for _, task, _ in running.values())
            for task in queue[:]:
                if places(task) > free:
                    break  # smaller ones behind it must not keep it waiting for ever
                if time.monotonic() + latest.get(task.get("group"), 0) < end:
                    queue.remove(task)
                    process = idle[0]
                    running[process.start(task)] = process, task, time.monotonic()
                    idle.popleft()  # not before: Ctrl-C comes as soon as it has started, and it is to be stopped then
                    free -= places(task)
            ready = wait(list(running), timeout=max(0, min(end - time.monotonic(), 3600))) if running else []
            if not ready and (not running or time.monotonic() >= end):
                break
            for connection in ready:
                process, task, start = running.pop(connection)
                idle.append(process)
                row, (result, error) = None, process.result()
                seconds = round(time.monotonic() - start, 1)
                if error is None:
                    rows.append(row := {**task["key"], **task.get("settings", {}), **result, "seconds": seconds})
                    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
                    latest[task.get("group")] = seconds if "group" in task else 0
                else:  # one task's failure is no reason to lose the others
                    failed += 1
                    print(f"{name_of(task)} has failed: {error}", flush=True)
                add(then(task, row, rows) if then else ())
    finally:
        with ctrl_c_ignored():
            processes = [*idle, *(process for process, _, _ in running.values())]
            for process in processes:
                process.terminate()
            for process in processes:
                process.stop()
    return rows, len(queue) + len(running) + failed


class _Process:
    """A process that runs one task after another. It is started for its first, and anew after one that has failed."""

    def __init__(self, worker: Callable[[dict], dict], gpu: str | None):
        self.worker, self.gpu = worker, gpu
        self.process = None

    def start(self, task: dict) -> Connection:
        """Begin a task. The connection is ready when it has ended, one way or another."""
        from vim2.command.processes import ctrl_c_put_off

        if self.process is None:
            self.connection, other = _SPAWN.Pipe()
            method = multiprocessing.get_start_method()
            self.process = _SPAWN.Process(target=_serve, args=(other, self.worker, self.gpu, method))
            with ctrl_c_put_off():
                self.process.start()
            other.close()  # so that the process's end is the connection's
        self.connection.send(task)
        return self.connection

    def result(self) -> tuple[dict | None, str | None]:
        """What the worker has returned, or why it has not."""
        try:
            result, error = self.connection.recv()
        except EOFError:
            self.process.join()
            result, error = None, f"its process has ended, with exit code {self.process.exitcode}"
        if error is not None:
            self.stop()  # what has broken CUDA for one task would break it for the next
        return result, error

    def terminate(self) -> None:
        if self.process is not None:
            self.process.terminate()

    def stop(self) -> None:
        """Wait for its end."""
        self.terminate()
        if self.process is not None:
            self.process.join()
            self.connection.close()
            self.process = None


def _serve(connection: Connection, worker: Callable[[dict], dict], gpu: str | None, method: str) -> None:
    """The life of a process: tasks come in, results or error messages go out."""
    # What a task starts is started as everywhere else. A process that was spawned would spawn its own, too: those of a
    # loader would each import PyTorch, one after another where each is handed all the images that it is to decode.
    multiprocessing.set_start_method(method, force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (what several print would be mixed up)
    while True:
        try:
            task = connection.recv()
        except EOFError:  # nobody waits for results any more
            return
        try:
            answer = worker(task), None
        except Exception as error:
            from vim2.command.errors import UserError

            if isinstance(error, UserError):  # one of a loader's worker comes with the worker's trace before it
                answer = None, str(error).rsplit("UserError: ", 1)[-1]
            else:
                traceback.print_exc()
                answer = None, f"{type(error).__name__}: {error}"
        connection.send(answer)


def _end_with_parent() -> None:
    """End this process once the one that started it has ended, however that came.

    A task would run on where it was killed: nobody takes its result, and it keeps its folder from who goes on with it.
    """
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
