"""tools/common/scheduler.py: what runs, in which order, where, until when, and what is left after failures."""

from common.scheduler import _Process, find_result, read_results, run_tasks, visible_gpus

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOLS = Path(sys.modules["common.scheduler"].__file__).parents[1]


@pytest.fixture(autouse=True)
def light_processes(monkeypatch):
    """Where other tests have imported vim2.mm, every new process would import it, too, and take seconds for it."""
    monkeypatch.delitem(multiprocessing.current_process()._config, "vim2.mm", raising=False)


def work(task):
    """Does what the task says, in a process of the scheduler's."""
    print("This is not shown.")
    if "refuses" in task:
        from vim2.command.errors import UserError

        raise UserError("There is no file: give another.")
    if "fails" in task:
        raise ValueError("broken")
    if "dies" in task:
        os._exit(3)
    start = time.time()
    while "until" in task and not task["until"].exists():
        time.sleep(0.01)
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    method = multiprocessing.get_start_method()
    return {"process": os.getpid(), "gpu": gpu, "method": method, "start": start, "end": time.time()}


def task(name, **options):
    return {"key": {"name": name}, **options}


def names(rows):
    return [row["name"] for row in rows]


def test_by_priority_and_only_what_has_no_result(tmp_path, capfd):
    path = tmp_path / "new" / "results.jsonl"
    tasks = [task("last", priority=2), task("b"), task("c"), task("first", priority=-1), task("b")]
    rows, left = run_tasks(work, tasks, path)
    assert names(rows) == ["first", "b", "c", "last"] and left == 0
    assert read_results(path) == rows and all(row["seconds"] >= 0 for row in rows)
    assert len({row["process"] for row in rows} - {os.getpid()}) == 1
    assert run_tasks(work, tasks, path) == (rows, 0)
    assert path.read_text().count("\n") == 4
    assert capfd.readouterr() == ("", "")


def test_a_task_starts_processes_as_is_usual_here(tmp_path):
    (row,), _ = run_tasks(work, [task("a")], tmp_path / "results.jsonl")
    assert row["method"] == multiprocessing.get_start_method()


def test_a_result_of_other_settings_is_refused(tmp_path):
    from vim2.command.errors import UserError  # here, since the processes that work import this module

    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"name": "a", "epochs": 5, "sizes": [1, 2]}) + "\n")
    same = task("a", settings={"epochs": 5, "sizes": (1, 2)})
    assert find_result(same, read_results(path))["epochs"] == 5
    assert run_tasks(work, [same], path)[1] == 0
    with pytest.raises(UserError, match=r"a is there with {'epochs': 5}, not {'epochs': 6}: choose another output"):
        run_tasks(work, [task("a", settings={"epochs": 6})], path)
    with pytest.raises(UserError, match="choose another"):
        run_tasks(work, [task("b", settings={"epochs": 5}), task("b", settings={"epochs": 6})], path)


def test_failures_leave_the_others_alone(tmp_path, capfd):
    path = tmp_path / "results.jsonl"
    tasks = [task("before"), task("raises", fails=True), task("ends", dies=True), task("after")]
    rows, left = run_tasks(work, tasks, path)
    assert names(rows) == ["before", "after"] and left == 2
    assert rows[0]["process"] != rows[1]["process"]  # a new one, whatever has become of the old
    out, err = capfd.readouterr()
    assert out == "raises has failed: ValueError: broken\nends has failed: its process has ended, with exit code 3\n"
    assert "in work" in err  # where it was
    assert names(run_tasks(work, [task("raises")], path)[0]) == ["before", "after", "raises"]


def test_what_the_user_can_put_right_is_one_line(tmp_path, capfd):
    assert run_tasks(work, [task("a", refuses=True)], tmp_path / "results.jsonl") == ([], 1)
    assert capfd.readouterr() == ("a has failed: There is no file: give another.\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_a_folder_belongs_to_one_command(tmp_path):
    from vim2.command.errors import UserError

    path, seen = tmp_path / "results.jsonl", []

    def then(task, row, rows):
        with pytest.raises(UserError, match=r"Another run is writing to .*: wait for its end, then start again, or"):
            run_tasks(work, [{"key": {"name": "b"}}], path)
        return []

    def plan(rows):  # sees what is there once the folder is locked
        seen.extend(names(rows))
        return [{"key": {"name": "b"}}]

    run_tasks(work, [task("a")], path, then=then)
    assert names(run_tasks(work, plan, path)[0]) == ["a", "b"] and seen == ["a"]
    assert os.listdir(tmp_path) == ["results.jsonl"]
    with pytest.raises(UserError, match="choose another output folder"):
        run_tasks(work, [task("a")], path / "results.jsonl")


@pytest.mark.parametrize("line", [b'{"name": "b', b"\xff\xfe", b"\0\0", b"[1]", b"null", b"{}", b"[" * 100_000])
def test_a_damaged_line_is_named(line, tmp_path):
    from vim2.command.errors import UserError

    path = tmp_path / "results.jsonl"
    path.write_bytes(b'\n{"name": "a"}\n  \n')
    assert read_results(path) == [{"name": "a"}]
    path.write_bytes(b'\n{"name": "a"}\n' + line)
    with pytest.raises(UserError, match=r"results.jsonl, line 3, (is no JSON object|has no name): delete that line"):
        run_tasks(work, [task("c")], path, fault=lambda row: "" if "name" in row else "has no name")


def test_several_at_a_time_each_on_its_gpu(tmp_path):
    go = tmp_path / "go"
    tasks = [task("one", until=go), task("two"), task("both", places=2), task("small")]
    then = lambda task, row, rows: [] if go.exists() else go.touch() or []  # noqa: E731
    rows, left = run_tasks(work, tasks, tmp_path / "results.jsonl", jobs=2, gpus=["5", "GPU-7"], then=then)
    assert names(rows) == ["two", "one", "both", "small"] and left == 0
    assert [row["gpu"] for row in rows[:2]] == ["GPU-7", "5"]
    assert rows[2]["start"] >= rows[1]["end"] and rows[3]["start"] >= rows[2]["end"]  # alone, and not kept waiting


def test_results_bring_further_tasks(tmp_path):
    seen = []

    def then(task, row, rows):
        seen.append((task["key"]["name"], row and row["name"], len(rows)))
        return [{"key": {"name": "second"}}] if task["key"]["name"] == "first" else []

    rows, left = run_tasks(work, [task("first"), task("bad", fails=True)], tmp_path / "results.jsonl", then=then)
    assert names(rows) == ["first", "second"] and left == 1
    assert seen == [("first", "first", 1), ("bad", None, 1), ("second", "second", 2)]


def test_until_the_time_is_over(tmp_path, monkeypatch):
    assert run_tasks(work, [task("a"), task("b")], tmp_path / "none.jsonl", minutes=0) == ([], 2)
    go, passed, clock = tmp_path / "go", [0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + passed[0])

    def then(task, row, rows):
        if row["name"] == "quick":
            passed[0] += 3600
            go.touch()
        elif row["name"] == "slow":  # an hour, as the clock shows
            return [{"key": {"name": "slow, too"}, "group": "slow"}, task_forever, {"key": {"name": "last"}}]
        elif row["name"] == "last":
            passed[0] += 3600
        return []

    task_forever = task("forever", until=tmp_path / "never")
    tasks = [task("slow", until=go, group="slow"), task("quick")]
    rows, left = run_tasks(work, tasks, tmp_path / "results.jsonl", jobs=2, minutes=110, then=then)
    assert names(rows) == ["quick", "slow", "last"]
    assert left == 2  # one that would not have ended in time, one that was cut off


def test_what_runs_ends_with_a_command_that_is_killed(tmp_path):
    script, running = tmp_path / "command.py", tmp_path / "running"
    script.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from common.scheduler import run_tasks\n"
        "def work(task):\n"
        f"    Path({str(running)!r}).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        f"    run_tasks(work, [dict(key=dict(name='a'))], Path({str(tmp_path / 'results.jsonl')!r}))\n"
    )
    paths = os.pathsep.join([str(TOOLS), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": paths}) as command:
        wait_for(lambda: running.exists() and running.read_text())
        command.kill()
    wait_for(lambda: not alive(int(running.read_text())))


def test_ctrl_c_is_told_once(tmp_path):
    """A terminal sends it to all processes of a command: one says so, as each would that begins as tools do."""
    script = tmp_path / "command.py"
    script.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "import vim2_cli\n"
        "vim2_cli.start()\n"
        "from common.scheduler import STOPPED, run_tasks\n"
        "def work(task):\n"
        "    Path(task['key']['name']).touch()\n"
        "    time.sleep(60)\n"
        "def main(argv):\n"
        "    tasks = [dict(key=dict(name=name)) for name in sys.argv[1:]]\n"
        "    run_tasks(work, tasks, Path(sys.argv[1] + '.jsonl'), jobs=2)\n"
        "if __name__ == '__main__':\n"
        "    from common.command import run_tool\n"
        "    sys.exit(run_tool(main, stopped=STOPPED))\n"
    )
    running = [tmp_path / "a", tmp_path / "b"]
    paths = os.pathsep.join([str(TOOLS), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, str(script), *map(str, running)],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a program in the background ignores Ctrl-C, and so would those that it starts
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as command:
        wait_for(lambda: all(path.exists() for path in running))
        os.killpg(command.pid, signal.SIGINT)
        assert command.stderr.read() == "stopped; the same command goes on where it was\n"
    assert command.returncode == 130


def test_ctrl_c_while_a_process_is_started_stops_it_too(tmp_path, monkeypatch):
    start = _Process.start

    def stopped(self, task):
        start(self, task)
        raise KeyboardInterrupt

    monkeypatch.setattr(_Process, "start", stopped)
    before = multiprocessing.active_children()
    with pytest.raises(KeyboardInterrupt):
        run_tasks(work, [task("a", until=tmp_path / "never")], tmp_path / "results.jsonl")
    assert multiprocessing.active_children() == before


def test_a_second_ctrl_c_leaves_nothing_running(tmp_path, monkeypatch):
    """The first one's work of stopping is done, whatever comes meanwhile."""
    go, terminate = tmp_path / "go", _Process.terminate

    def stopped_again(self):
        terminate(self)
        os.kill(os.getpid(), signal.SIGINT)

    def then(task, row, rows):
        monkeypatch.setattr(_Process, "terminate", stopped_again)
        raise KeyboardInterrupt

    before, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGINT)
    tasks = [task("a"), task("b", until=go)]
    with pytest.raises(KeyboardInterrupt):
        run_tasks(work, tasks, tmp_path / "results.jsonl", jobs=2, then=then)
    assert multiprocessing.active_children() == before
    assert signal.getsignal(signal.SIGINT) is handler


def wait_for(condition):
    end = time.monotonic() + 50
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")  # whoever takes it over may be slow to ask for its exit code
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_visible_gpus(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-1")
    assert visible_gpus() == ["3", "GPU-1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_gpus() == []
