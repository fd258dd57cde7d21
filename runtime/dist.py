"""Ranks, devices and collectives; every function also works in one process without a process group.

torchrun tells each process its place through the environment (RANK, WORLD_SIZE, LOCAL_RANK); a plain
`python train.py` has none of these and is rank 0 of 1. Nothing else in the project asks torch.distributed
who it is.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import hashlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from config import UserError
from runtime import meeting

T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # of Linux's prctl
LAUNCHER_SECONDS = 30  # for torchrun's store to answer

_hosts: torch_dist.ProcessGroup | None = None  # for votes, which must not wait for a device
_patient: torch_dist.ProcessGroup | None = None  # for objects: one rank may be downloading while the others wait
_store: torch_dist.Store | None = None  # the launcher's, which lives through its restarts
_heartbeat: meeting.Heartbeat | None = None
_watched_seconds: float | None = None  # inside `watched`: how long a rank may stay silent


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


@contextlib.contextmanager
def session(device: torch.device, hang_minutes: float = 30, patience_minutes: float = 60) -> Iterator[torch.device]:
    """Join the process group, if torchrun started us, and leave it at the end; yields `device`, this rank's.

    A collective in which a rank is missing fails after hang_minutes; one that waits for another rank's result, such as
    a download at the start, after patience_minutes more.
    """
    global _hosts, _patient, _store, _heartbeat
    if not faulthandler.is_enabled():
        faulthandler.enable(file=sys.__stderr__)  # a crash inside a library shows from where it was called
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif local_world > 1:  # torchrun sets OMP_NUM_THREADS=1, which idles the cores of a laptop
        torch.set_num_threads(max(1, cores() // local_world))
    if "RANK" in os.environ:
        _die_with_torchrun()
        hang, patience = (datetime.timedelta(minutes=m) for m in (hang_minutes, hang_minutes + patience_minutes))
        _store = torch_dist.PrefixStore(f"pico-{os.environ.get('TORCHELASTIC_RUN_ID', '')}", meeting.connect(hang))
        name = meeting.meet(_store, rank(), world_size(), hang)
        _heartbeat = meeting.Heartbeat(name, rank(), world_size())
        # votes between hosts come first, and name who is missing; NCCL would end the process without a word
        backend, longer = ("nccl", 2 * hang) if device.type == "cuda" else ("gloo", hang)
        with naming_the_lost():
            torch_dist.init_process_group(backend, store=torch_dist.PrefixStore(name, _store), rank=rank(),
                                          world_size=world_size(), timeout=longer)
            _hosts = torch_dist.new_group(backend="gloo", timeout=hang)
            _patient = torch_dist.new_group(backend="gloo", timeout=patience)
    with naming_the_lost():
        yield device
    # Not after an error: the other ranks would notice, and print their errors before ours.
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
        # gloo's threads, which may hold the last reference to a tensor, must end before the interpreter does
        _hosts = _patient = None
        gc.collect()  # a DDP or FSDP2 model, in whatever cycle it is, refers to the group
    if _heartbeat is not None:
        _heartbeat.close()
        _heartbeat = _store = None


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """Around work with other ranks: where it fails because one is gone, the error says which. Raises meeting.Lost."""
    try:
        yield
    except Exception as error:
        if _heartbeat is None or not meeting.is_broken(error):
            raise
        raise _heartbeat.lost(str(error)) from None


def at_step(step: int) -> None:
    """Tell the others how far this rank is, should it fall silent."""
    if _heartbeat is not None:
        _heartbeat.step = step


def settled(key: str, value: str) -> str:
    """What the first of this job's processes to ask for `key` gave as its value, also where they were restarted since."""
    return value if _store is None else _store.compare_set(key, "", value).decode()


def derive_seed(*place: int | str) -> int:
    """A 63-bit seed from the run's seed and a place in it, such as (42, step, layer name): the same on every rank."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest(), "big") >> 1


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with_parent(name: str = "SIGKILL") -> None:
    """Have Linux send this process a signal when the one that started it dies, so that none works on as an orphan."""
    if sys.platform == "linux" and hasattr(signal, name):
        import ctypes
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, getattr(signal, name))


def _die_with_torchrun() -> None:
    """Raises UserError where it is dead already: its store, which is there before its workers are, does not answer."""
    die_with_parent()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(store, timeout=LAUNCHER_SECONDS).close()
        except OSError as error:
            raise UserError(f"torchrun at {store[0]}:{store[1]} does not answer ({error}); start it again") from None


@contextlib.contextmanager
def watched(minutes: float) -> Iterator[None]:
    """Inside, a rank that does not come to a vote for so long shows where it hangs, and ends."""
    global _watched_seconds
    _watched_seconds = 60 * minutes
    try:
        yield
    finally:
        _watched_seconds = None
        faulthandler.cancel_dump_traceback_later()


def _group() -> bool:
    return torch_dist.is_initialized() and torch_dist.get_world_size() > 1


def barrier() -> None:
    if _group():
        torch_dist.barrier(group=_patient)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Add up `tensor` over the ranks, in place, and return it."""
    if _group():
        torch_dist.all_reduce(tensor)
    return tensor


def max_over_ranks(*values: int) -> list[int]:
    """Each value's maximum over the ranks: a vote. It goes between the hosts, so no device is waited for."""
    votes = torch.tensor(values, dtype=torch.int32)
    if _group():
        faulthandler.cancel_dump_traceback_later()  # from here on it is the others who are late
        if _heartbeat is not None:
            _heartbeat.votes += 1
        torch_dist.all_reduce(votes, torch_dist.ReduceOp.MAX, group=_hosts)
    if _watched_seconds is not None:
        faulthandler.dump_traceback_later(_watched_seconds, exit=True, file=sys.__stderr__)
    return votes.tolist()


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` (a picklable object) on every rank."""
    box = [value]
    if _group():
        torch_dist.broadcast_object_list(box, src=0, group=_patient)
    return box[0]


def on_rank0(work: Callable[[], T]) -> T:
    """What rank 0's work() returns, on every rank; a UserError that it raises is raised on all."""
    result: T | UserError | None = None
    if rank() == 0:
        try:
            result = work()
        except UserError as error:
            result = error
    result = broadcast_object(result)
    if isinstance(result, UserError):
        raise result
    return result


def on_each_node(work: Callable[[], Any]) -> None:
    """work() on one rank of every machine; an error on any of them is raised on all ranks, as a UserError."""
    problem: UserError | None = None
    if local_rank() == 0:
        try:
            work()
        except UserError as error:
            problem = error
        except OSError as error:
            problem = UserError(str(error))
    problem = next(filter(None, all_gather_object(problem)), None)
    if problem is not None:
        raise problem


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's `value` (a picklable object), in rank order, on every rank."""
    if not _group():
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value, group=_patient)
    return values


# ---- tensors that FSDP2 may have sharded -------------------------------------------------------------------

def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Only a run that shards imports the class: that takes a third of a command's start."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered if it is sharded. Every rank must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def replicated(tensor: Tensor) -> Tensor:
    """`tensor` with all of its rows on every rank, still fit for arithmetic with sharded tensors."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Replicate
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def shard_like(whole: Tensor, target: Tensor) -> Tensor:
    """`whole`, the same on every rank, placed and sharded as `target` is."""
    whole = whole.to(target.device)
    if not is_sharded(target):
        return whole
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(whole, target.device_mesh, target.placements)


@torch.no_grad()
def assign_(target: Tensor, whole: Tensor) -> None:
    """Copy `whole`, the same on every rank, into `target` in place: optimizers and wrappers hold on to it."""
    target.copy_(shard_like(whole, target))
