"""Stop signals. SIGTERM, SIGINT and SIGUSR1 do not end the process: they are noted, and `stop_point`, which all long work
calls, raises Stopped on every rank together, so that the training loop can still write a checkpoint. A second SIGINT ends
it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from config import UserError
from runtime import dist
from runtime.errors import Ending

REQUEUE = 75  # "try again later" in BSD's sysexits; torchrun makes it 1, exit.json keeps it


class Stopped(Ending):
    """Told to stop by a signal; the same command goes on from the checkpoint."""

    def __init__(self, number: int, when: str = ""):
        super().__init__(f"stopped by {signal.Signals(number).name}{when}", REQUEUE)


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


def end_together(problem: UserError | None, waiting: bool = False) -> int:
    """A vote, which every rank must hold: raises Ending if any rank has a reason; whether any rank is `waiting`."""
    ended, caught, anyone_waits = dist.max_over_ranks(problem is not None, _caught, waiting)
    if ended:  # every rank raises the first error met
        mine = problem and (str(problem), problem.exit_code)
        raise Ending(*next(theirs for theirs in dist.all_gather_object(mine) if theirs))
    stop_point(caught)
    return anyone_waits
