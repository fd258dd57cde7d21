"""One process a run folder: a file that says which, and a way to tell whether it still lives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

from config import ConfigError, UserError
from runtime import files
from runtime.log import printable

TAKEOVER_SECONDS = 0.3
HEARTBEAT_SECONDS = 10.0  # between the lock's signs of life


class RunLock:
    """A file that says which process writes a run's folder. A dead one's is taken over.

    On this machine the process itself is asked after; on another one, its signs of life: the file's time changes every
    HEARTBEAT_SECONDS.
    """

    def __init__(self, folder: Path, option: str = "checkpointing.run_name"):
        """`option` chose the folder, and may choose another."""
        self.folder, self.path, self.held, self.option = folder, folder / ".lock", False, option
        self._done = threading.Event()

    def acquire(self) -> None:
        """Raises ConfigError naming host and process where another one is at work."""
        me = json.dumps({"host": _machine(), "pid": os.getpid(), "born": birth(os.getpid())})
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
                self.held = self.text() == me
        threading.Thread(target=self._beat, daemon=True).start()

    def text(self) -> str | None:
        """What the file holds: nothing if it is not there, None if even its folder is not. Raises Unreadable."""
        try:
            return files.read_text(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return "" if self.folder.is_dir() else None

    def _refuse_if_alive(self) -> None:
        holder = self._holder()
        if holder is None:  # half written: its writer died, or is still writing
            time.sleep(1.0)
            holder = self._holder()
        if holder is not None and self._alive(*holder):
            host, pid, _ = holder
            raise ConfigError(f"{self.option}: {self.folder} is in use by process {pid} on {host.split()[0]}; "
                              f"wait for it, stop it, or choose another {self.option.rpartition('.')[2]}")

    def _holder(self) -> tuple[str, int, str] | None:
        try:
            found = files.read_object(self.path)
        except (OSError, UserError, ValueError):
            return None
        host, pid, born = (found.get(key) for key in ("host", "pid", "born"))
        return (host, pid, str(born)) if isinstance(host, str) and host.split() and type(pid) is int else None

    def _alive(self, host: str, pid: int, born: str) -> bool:
        if host == _machine() and os.name == "posix":
            return birth(pid) == born
        before, end = self.path.stat().st_mtime, time.monotonic() + 3 * HEARTBEAT_SECONDS
        print(printable(f"{self.path}: held by process {pid} on {host.split()[0]}; waiting for a sign of life"), flush=True)
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


def alive(pid: int) -> bool:
    """Whether there is such a process on this machine, as far as this system tells."""
    return birth(pid) != ""


def birth(pid: int) -> str:
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
