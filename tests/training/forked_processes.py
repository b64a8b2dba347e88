"""Processes of one training that a test forks, as torchrun would start them, and how each of them ended."""

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

PATIENCE = 240  # seconds, of a busy machine; a hang would be one of half an hour


class Ended(list):
    """Exit code (of a signal: less than zero), standard output and standard error of each process."""

    @property
    def codes(self):
        return [code for code, _, _ in self]

    @property
    def said(self):
        """What a person at the terminal reads, but what the process of a test's fault itself says."""
        return self[0][1] + self[0][2]


def forked(folder: Path, rank: int, size: int, port: int, act) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        with open(folder / f"out.{rank}", "w") as sys.stdout, open(folder / f"err.{rank}", "w") as sys.stderr:
            try:
                code = act(rank)
            except SystemExit as ended:
                code = ended.code
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code or 0)


def ended_processes(folder: Path, act, size: int) -> Ended:
    """Of ``size`` processes that each return what act(rank) does. They have ``PATIENCE`` seconds, and write what they say into ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [forked(folder, rank, size, port, act) for rank in range(size)]
    codes, deadline = {}, time.monotonic() + PATIENCE
    try:
        while len(codes) < size:
            for rank, child in enumerate(children):
                if rank not in codes and (done := os.waitpid(child, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(done[1])
            assert time.monotonic() < deadline, f"process {set(range(size)) - codes.keys()} hangs"
            time.sleep(0.01)
    finally:
        for rank in set(range(size)) - codes.keys():
            os.kill(children[rank], signal.SIGKILL)
            os.waitpid(children[rank], 0)
    texts = [[(folder / f"{name}.{rank}").read_text() for name in ("out", "err")] for rank in range(size)]
    return Ended((codes[rank], *texts[rank]) for rank in range(size))
