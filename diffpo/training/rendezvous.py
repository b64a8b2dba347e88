"""How the processes of one start find each other, and part.

torchrun keeps its store when it restarts them (torch 2.13, ``TORCHELASTIC_USE_AGENT_STORE``), so the addresses of those that were killed are still
in it, and who reads one waits for a dead process. Here each process says who it is, and the first gives to each that answers a part
of the store that nobody has used before.
"""

import time
import uuid
from datetime import timedelta

from torch import distributed

_PAUSE = 0.02  # seconds
_PARTING = timedelta(seconds=30)


def fresh_store(timeout: timedelta) -> "distributed.Store":
    """An empty store that the processes of this start share; their number and places are in the environment. RuntimeError if one does not
    come in time."""
    store, rank, size = next(distributed.rendezvous("env://", timeout=timeout))
    part = _invite(store, size, timeout) if rank == 0 else _answer(store, rank)
    return distributed.PrefixStore(part, store)


def leave_together(store: "distributed.Store", rank: int, size: int) -> None:
    """Wait until all have nothing more to say: a connection that one closes early could cost another what was said last. RuntimeError if
    the store has gone."""
    store.set(f"{rank} leaves", "")
    store.wait([f"{other} leaves" for other in range(size)], _PARTING)


def _invite(store: "distributed.Store", size: int, timeout: timedelta) -> str:
    part = uuid.uuid4().hex
    missing, invited = set(range(1, size)), set()
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([f"{part} has {rank}"]):
                missing.remove(rank)
            elif store.check([f"here is {rank}"]):
                # perhaps of one that is dead: then a later one will stand there
                name = store.get(f"here is {rank}").decode()
                if name not in invited:
                    invited.add(name)
                    store.set(f"to {name}", part)
        if time.monotonic() > deadline:
            raise RuntimeError(f"process {min(missing)} has not come")
        time.sleep(_PAUSE)
    return part


def _answer(store: "distributed.Store", rank: int) -> str:
    name = uuid.uuid4().hex
    store.set(f"here is {rank}", name)
    part = store.get(f"to {name}").decode()  # waits for it
    store.set(f"{part} has {rank}", "")
    return part
