"""Two processes that work together, as torchrun would start them, in a third of its time: what both import is imported
once, before they part."""

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def start_two(program: str, packages: Sequence[str], *argv, **options) -> subprocess.Popen:
    """Start a program twice, as ranks 0 and 1, on one thread each.

    Args:
        program: The module whose `main` it is.
        packages: What it imports only when it is called, imported beforehand.
        argv: Its arguments.
        options: Of subprocess.Popen.

    Returns:
        The process that waits for both. Its exit code is 0 if theirs are.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        [sys.executable, __file__, program, ",".join(packages), *map(str, argv)], **{"env": env, **pipes, **options}
    )


def main() -> int:
    program, packages, *argv = sys.argv[1:]
    run = importlib.import_module(program).main
    for package in packages.split(","):
        importlib.import_module(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
            return run(argv)
        children.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    sys.exit(main())
