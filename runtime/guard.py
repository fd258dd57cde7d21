"""What keeps a run whole on machines that die: stop signals, one run a folder, room on the disk, equal ranks.

SIGTERM, SIGINT and SIGUSR1 do not end the process: they are noted, and `stop_point`, which all long work calls, raises
Stopped on every rank together, so that the training loop can still write a checkpoint. A second SIGINT ends it at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

from config import Config, ConfigError, flat, to_dict
from runtime import dist

REQUEUE = 75  # "try again later" in BSD's sysexits; torchrun makes it 1, exit.json keeps it
TAKEOVER_SECONDS = 0.3
HEARTBEAT_SECONDS = 10.0  # between the lock's signs of life
ROOMS = ("config", "runtime", "hub", "instruments")


class Stopped(dist.Ending):
    """Told to stop by a signal; the same command goes on from the checkpoint."""

    def __init__(self, number: int, when: str = ""):
        super().__init__(f"stopped by {signal.Signals(number).name}{when}", REQUEUE)


# ---- signals -------------------------------------------------------------------------------------------------

_caught = 0  # the signal that this process was sent, if any
_deferred = False  # whether it waits for the next stop_point


@contextlib.contextmanager
def catching_signals() -> Iterator[None]:
    """Inside, SIGTERM, SIGINT and SIGUSR1 raise Stopped: at once, or after `defer_signals` at the next stop_point."""
    global _caught, _deferred
    _caught, _deferred = 0, False
    names = ("SIGTERM", "SIGINT", "SIGUSR1") if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, _note) for n in names if (number := getattr(signal, n, None))}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _caught = 0


def defer_signals() -> None:
    """From now on signals wait for the next stop_point, since there is something to lose."""
    global _deferred
    _deferred = True


def _note(number: int, frame: FrameType | None) -> None:
    global _caught
    if number == signal.SIGINT == _caught:
        raise KeyboardInterrupt
    first, _caught = not _caught, number
    if first and not _deferred:
        raise Stopped(number, " before the first update")


def stop_signal() -> int:
    """The signal that this process was sent, or 0: this rank's part in a vote."""
    return _caught


def stop_point(caught: int | None = None) -> None:
    """Raise Stopped on all ranks if any was sent a signal. Every rank must call it, in step with the others.

    `caught` is the outcome of a vote that was held already.
    """
    number = dist.max_over_ranks(_caught)[0] if caught is None else caught
    if number:
        raise Stopped(number)


# ---- one run a folder ------------------------------------------------------------------------------------------

class RunLock:
    """A file that says which process writes a run's folder. A dead one's is taken over.

    On this machine the process itself is asked after; on another one, its signs of life: the file's time changes every
    HEARTBEAT_SECONDS.
    """

    def __init__(self, folder: Path):
        self.folder, self.path, self.held = folder, folder / ".lock", False
        self._done = threading.Event()

    def acquire(self) -> None:
        """Raises ConfigError naming host and process where another one is at work."""
        me = json.dumps({"host": _machine(), "pid": os.getpid(), "born": _birth(os.getpid())})
        taken_over = False
        while not self.held:
            try:
                with open(self.path, "x", encoding="utf-8") as file:
                    file.write(me)
            except FileExistsError:
                self._refuse_if_alive()
                self.path.unlink(missing_ok=True)
                taken_over = True
            except OSError as error:
                raise ConfigError(f"checkpointing.runs_dir: {self.folder} cannot be written ({error.strerror})") from None
            else:
                if taken_over:  # perhaps by two at once, of whom the later removed the lock of the first
                    time.sleep(TAKEOVER_SECONDS)
                self.held = self.path.exists() and self.path.read_text(encoding="utf-8") == me
        threading.Thread(target=self._beat, daemon=True).start()

    def _refuse_if_alive(self) -> None:
        holder = self._holder()
        if holder is None:  # half written: its writer died, or is still writing
            time.sleep(1.0)
            holder = self._holder()
        if holder is not None and self._alive(*holder):
            host, pid, _ = holder
            raise ConfigError(f"checkpointing.run_name: {self.folder} is in use by process {pid} on {host.split()[0]}; "
                              f"wait for it, stop it, or choose another run_name")

    def _holder(self) -> tuple[str, int, str] | None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return str(found["host"]), int(found["pid"]), str(found["born"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _alive(self, host: str, pid: int, born: str) -> bool:
        if host == _machine() and os.name == "posix":
            return _birth(pid) == born
        before, end = self.path.stat().st_mtime, time.monotonic() + 3 * HEARTBEAT_SECONDS
        print(f"{self.path}: held by process {pid} on {host.split()[0]}; waiting for a sign of life", flush=True)
        while time.monotonic() < end:
            time.sleep(0.2)
            if not self.path.exists() or self.path.stat().st_mtime != before:
                return self.path.exists()
        return False

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        if self.held:
            self._done.set()
            self.path.unlink(missing_ok=True)
            self.held = False


def _machine() -> str:
    """Host name first; a reboot and a container's own process numbers make it another machine."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _birth(pid: int) -> str:
    """When a living process began, in words of this system; "" for a dead one: process numbers come again."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:  # not Linux; Windows cannot check a process number: only the signs of life count
        if os.name == "posix":
            os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"


# ---- equal ranks -------------------------------------------------------------------------------------------------

def same_everywhere(cfg: Config) -> None:
    """Raise ConfigError unless all ranks run with the same options, the same code and the same torch."""
    root = Path(__file__).parent.parent
    code = {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted([*root.glob("*.py"), *(p for room in ROOMS for p in root.glob(f"{room}/*.py"))])}
    everyone = dist.gather(flat(to_dict(cfg)) | code | {"torch": torch.__version__})
    for rank, theirs in enumerate(everyone):
        for key, value in everyone[0].items():
            if theirs.get(key) != value:
                how = "is other code" if key in code else f"is {theirs.get(key)!r}, {value!r} on rank 0"
                raise ConfigError(f"{key}: {how} on rank {rank}; start all ranks with the same words and the same code")
