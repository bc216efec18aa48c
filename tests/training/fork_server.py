"""A program that has imported PyTorch and DeepSpeed, and forks a process off itself for each rank of a test's program.

The imports last longer than most of these programs. It reads requests on standard input and answers on standard output,
a line of JSON each, and ends with its input. A forked process has run no operation of PyTorch before.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from typing import Any

IMPORTED = ("deepspeed", "torch._dynamo", "xlstm_lm.training.loop")


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # what is imported stays shared memory of all processes
    for line in sys.stdin:
        request = json.loads(line)
        ports = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        processes = [_fork(request, rank, ports) for rank in range(request["ranks"])]
        print(json.dumps(_wait(processes)), file=answers, flush=True)


def _fork(request: dict[str, Any], rank: int, ports: dict[str, str]) -> int:
    process = os.fork()
    if process:
        return process
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["is_launched"]:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "LOCAL_WORLD_SIZE": request["ranks"]}
        os.environ.update({name: str(value) for name, value in ranks.items()} | ports)
    os.chdir(request["folder"])
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    raise SystemExit  # out of `serve`, through the interpreter's own end


def _wait(processes: list[int]) -> list[int]:
    """Exit codes of the processes, in their order. Once one has failed, the others are ended, as torchrun does it."""
    codes: dict[int, int] = {}
    while len(codes) < len(processes):
        process, status = os.wait()
        codes[process] = os.waitstatus_to_exitcode(status)
        if codes[process] and len(codes) < len(processes):
            for other in set(processes) - codes.keys():
                os.kill(other, signal.SIGTERM)
    return [codes[process] for process in processes]


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


if __name__ == "__main__":
    serve()
