"""How the ranks of a job find each other, and who of them is gone: all through the store that the launcher keeps.

A launcher on several machines restarts its processes, and each machine counts the restarts for itself; so no count tells
which processes belong together. Here each process writes a fresh token, rank 0 proposes the tokens that it finds, and when
every rank has said that its own is among them, these processes are the ones that meet.

Once they have met, each tells the store every few seconds how far it is. A rank whose work with the others fails asks there
who has fallen silent, since what gloo and NCCL say is only who noticed.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterable
from typing import Any

import torch.distributed as torch_dist

from config import UserError

POLL_SECONDS = 0.05
BEAT_SECONDS = 2.0
ANSWER_SECONDS = 10.0  # for the store, to those who ask for the silent
LAUNCHER_SECONDS = 20  # for a launcher whose store is gone, to end by itself
NEVER = ["an unknown machine", 0, 0, ""]  # told by a rank that was gone before its first beat
TELLING = "telling"  # the state of a rank that ends because another is gone


def connect(timeout: datetime.timedelta) -> torch_dist.Store:
    """The launcher's store: torchrun's, which lives through restarts; of other launchers rank 0's own. Raises UserError."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeper = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and int(os.environ["RANK"]) == 0
    try:
        return torch_dist.TCPStore(host, port, is_master=keeper, timeout=timeout, wait_for_workers=False, multi_tenant=keeper)
    except RuntimeError as error:
        why = "its port is taken: give this job another MASTER_PORT" if keeper else "rank 0 does not answer there"
        raise UserError(f"{host}:{port}, where the ranks meet: {why} ({str(error).splitlines()[0][:200]})") from None


def meet(store: torch_dist.Store, rank: int, world: int, timeout: datetime.timedelta) -> str:
    """A name that exactly the processes which work together from now on share. Raises UserError after the timeout."""
    mine, acknowledged, end = uuid.uuid4().hex, None, time.monotonic() + timeout.total_seconds()
    store.set(f"token/{rank}", mine)
    while time.monotonic() < end:
        if rank == 0 and store.check(keys := [f"token/{r}" for r in range(world)]):
            store.set("proposal", b",".join(store.multi_get(keys)))
        proposal = store.get("proposal") if store.check(["proposal"]) else b""
        if mine.encode() in proposal.split(b","):
            name = hashlib.sha256(proposal).hexdigest()[:16]
            if name != acknowledged:
                store.set(f"{name}/{rank}", b"1")
                acknowledged = name
            if rank == 0 and store.check([f"{name}/{r}" for r in range(world)]):
                store.set(f"{name}/go", b"1")
            if store.check([f"{name}/go"]):
                return name
        time.sleep(POLL_SECONDS)
    missing = [r for r in range(world) if not store.check([f"{acknowledged}/{r}"])]
    raise UserError(f"the ranks did not meet within {timeout}: {named(missing)} of {world} did not come; look at their machines")


def named(ranks: list[int]) -> str:
    """Ranks in words: rank 3, or ranks 0, 8-15."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    told = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' * (len(ranks) > 1)} {told}"


class Lost(UserError):
    """Ranks that are gone: dead, stopped, or cut off. The first of the others tells it where rank 0 would have."""
    exit_code = 1

    def __init__(self, words: str, gone: Iterable[int] = ()):
        super().__init__(words)
        self.teller = min(set(range(int(os.environ["WORLD_SIZE"]))) - set(gone), default=0)


class Heartbeat:
    """Tells the store, from a thread, that this rank is alive and how far it is; asked, who is not."""

    def __init__(self, name: str, rank: int, world: int):
        self.name, self.rank, self.world = name, rank, world
        self.step: int | None = None  # updates made
        self.votes = 0  # come to
        self._state, self._beats, self._done = "", 0, threading.Event()
        # a connection of its own: one that waits for a key is busy
        self._store = torch_dist.PrefixStore(name, connect(datetime.timedelta(seconds=ANSWER_SECONDS)))
        self._beat()
        threading.Thread(target=self._work, daemon=True).start()

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self.rank}", json.dumps([socket.gethostname(), self.votes, self._beats, self._state]))

    def _work(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            with contextlib.suppress(RuntimeError):  # the store's machine is gone; whoever works with it will notice
                self._beat()

    def _read(self) -> list[list[Any]]:
        keys = [f"beat/{rank}" for rank in range(self.world)]
        if self._store.check(keys):
            return [json.loads(beat) for beat in self._store.multi_get(keys)]
        return [json.loads(self._store.get(key)) if self._store.check([key]) else NEVER for key in keys]

    def lost(self, error: str) -> Lost:
        """Which ranks are gone: those that do not tell any more; where all do, those that others have waited for.

        Where none is, `error`, what gloo or NCCL said, is all that is known: too small a /dev/shm, for one.
        """
        # what one rank has done, all have taken part in
        since = "since before the first step" if self.step is None else f"since step {self.step}"
        found: list[list[list[Any]]] = []
        asking = threading.Thread(target=self._ask, args=(found,), daemon=True)  # a store that is cut off may never answer
        asking.start()
        asking.join(2.5 * BEAT_SECONDS + ANSWER_SECONDS)
        if len(found) < 2:
            _end_launcher()
            keeper = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            return Lost(f"{keeper}, where the ranks meet, does not answer (its network or process is gone): nothing {since}")
        before, after = found
        silent = [r for r in range(self.world) if r != self.rank and before[r][2] == after[r][2] and after[r][3] != TELLING]
        behind = [r for r in range(self.world) if r != self.rank and after[r][1] < self.votes and after[r][3] != TELLING]
        gone = silent or behind
        if not gone:
            return Lost(f"work between the ranks failed, though all of them are alive, {since}: {' '.join(error.split())[:600]}")
        hosts = sorted({after[r][0] for r in gone})
        how = "nothing" if silent else "alive, but did not come to the others"
        return Lost(f"{named(gone)} on {', '.join(hosts)}: {how} {since}; start again to go on from the checkpoint", gone)

    def _ask(self, found: list[list[list[Any]]]) -> None:
        """Twice what all ranks told, some beats apart; and then that this one is about to end."""
        with contextlib.suppress(RuntimeError):
            found.append(self._read())
            time.sleep(2.5 * BEAT_SECONDS)
            found.append(self._read())
            self._state = TELLING
            self._beat()

    def close(self) -> None:
        self._done.set()


def _end_launcher() -> None:
    """Have this machine's torchrun killed in a while: without the store, which it waits for, it can do nothing, nor end."""
    if os.name == "posix" and "TORCHELASTIC_RUN_ID" in os.environ:
        subprocess.Popen(["sh", "-c", f"sleep {LAUNCHER_SECONDS}; kill -9 {os.getppid()}"], start_new_session=True,
                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def is_broken(error: BaseException) -> bool:
    """Whether an error of torch is that work with other ranks failed."""
    return isinstance(error, torch_dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)
