"""A model of a disk: what a command did to a folder, as preload.c recorded it, and what a power cut may leave of it.

tests/power.py says which orders there are, and uses it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FILL = ("all", "none", "part", "zeros")  # what may be there of data that were not synced


# ---- what was done ---------------------------------------------------------------------------------------------------

class Node:
    """A file or folder, whatever its names; `base` is what it held at first: bytes, or {name: node}."""

    def __init__(self, base: bytes | dict[str, Node]):
        self.base, self.live = base, base if isinstance(base, bytes) else dict(base)


State = dict[str, tuple[Node, "bytes | None"]]  # {path: (node, bytes; None of a folder)}


class Event(NamedTuple):
    """One operation: entries of folders that change together; or bytes at a place; or a size; or, of neither, an fsync."""
    node: Node
    entries: tuple[tuple[Node, str, Node | None], ...] = ()
    place: int = 0
    data: bytes | None = None
    size: int | None = None

    @property
    def syncs(self) -> bool:
        return not self.entries and self.data is None and self.size is None


class Record:
    """The operations of a command on a folder, over what the folder held before."""

    def __init__(self, folder: Path, log: Path):
        self.root, self.events, self.files, self.top = self._node(folder), [], {}, str(folder)
        self.saved: list[tuple[int, int]] = []  # (events after which it lasts, its step; 0 of what is no run)
        renamed: dict[int, Node] = {}  # steps that have their name in a folder, but not yet for good
        with open(log, "rb") as file:
            while line := file.readline():
                call, fd, place, size = line.split()
                path, other = (file.readline().decode().rstrip("\n") for _ in range(2))
                self._add(call.decode(), int(fd), int(place), int(size), path, other, file)
                step = re.search(r"/checkpoints/step_(\d+)$|/try/(?:made|out)$", path) if call == b"rename" else None
                if step and (not step[1] or "training_state" in self._find(path).live):
                    renamed[int(step[1] or 0)] = self._place(path)[0]
                for step in [step for step, folder in renamed.items() if self.events and self.events[-1] == Event(folder)]:
                    self.saved.append((len(self.events), step))
                    del renamed[step]

    def _node(self, path: Path) -> Node:
        return Node(path.read_bytes() if path.is_file() else {p.name: self._node(p) for p in path.iterdir()})

    def _place(self, path: str) -> tuple[Node, str]:
        """(the folder, the name in it) that a path means now."""
        *parents, name = Path(os.path.normpath(path)).relative_to(self.top).parts or ("",)
        node = self.root
        for parent in parents:
            node = node.live[parent]
        return node, name

    def _find(self, path: str) -> Node | None:
        folder, name = self._place(path)
        return folder.live.get(name) if name else self.root

    def _add(self, call: str, fd: int, place: int, size: int, path: str, other: str, file: Any) -> None:
        if call in ("open", "empty"):
            self.files[fd] = node = self._find(path)
            if node is None:
                self.files[fd] = node = Node(b"")
                self._entries((*self._place(path), node))
            elif call == "empty":
                self.events.append(Event(node, size=0))
        elif call == "mkdir":
            self._entries((*self._place(path), Node({})))
        elif call == "unlink":
            self._entries((*self._place(path), None))
        elif call == "link":
            self._entries((*self._place(path), self._find(other)))
        elif call == "rename":
            (source, name), (target, name_there) = self._place(other), self._place(path)
            into, out = (target, name_there, source.live[name]), (source, name, None)
            self._entries(*((into, out),) if source is target else ((into,), (out,)), grouped=True)
        elif call == "write":
            self.events.append(Event(self.files[fd], place=place, data=file.read(size)))
        elif call == "truncate":
            self.events.append(Event(self.files[fd] if fd else self._find(path), size=size))
        elif call == "sync":
            self.events.append(Event(self.files[fd]))

    def _entries(self, *changes: Any, grouped: bool = False) -> None:
        """Changes of entries, those of a group together; from one folder to another they are two, of which one may be lost."""
        for group in changes if grouped else [changes]:
            for folder, name, node in group:
                folder.live.pop(name, None)
                if node is not None:
                    folder.live[name] = node
            self.events.append(Event(group[0][2] or group[0][0], entries=tuple(group)))

    # ---- what a cut leaves ---------------------------------------------------------------------------------------

    @functools.cached_property
    def committed(self) -> list[int]:
        """Of each cut: the events that a journal has for good, all up to the latest one that an fsync asked for."""
        last: dict[Node, int] = {}
        found = [0]
        for number, event in enumerate(self.events):
            found.append(max(found[-1], last.get(event.node, -1) + 1) if event.syncs else found[-1])
            for node in {event.node, *(folder for folder, _, _ in event.entries)} if not event.syncs else ():
                last[node] = number
        return found

    def state(self, cut: int, order: str, rng: random.Random) -> State:
        """As a power cut after `cut` operations may leave them."""
        synced: dict[Node, int] = {}
        for number, event in enumerate(self.events[:cut]):
            if event.syncs:
                synced[event.node] = number
        first = self.committed[cut]
        end, share = rng.choice((first, cut, rng.randint(first, cut))), rng.choice((0, 0.2, 0.5, 0.8, 1))
        fill = rng.choice(FILL)
        data: dict[Node, list[tuple[Event, bool]]] = {}
        entries: dict[Node, dict[str, Node | None]] = {}
        for number, event in enumerate(self.events[:cut]):
            kept = number < end if order == "ext4" else rng.random() < share
            for folder, name, node in event.entries:
                if kept or order == "strict" and number < synced.get(folder, -1):
                    entries.setdefault(folder, dict(folder.base))[name] = node
            if not event.entries and not event.syncs:
                data.setdefault(event.node, []).append((event, number < synced.get(event.node, -1)))
                if event.size is not None and not data[event.node][-1][1] and not kept:
                    data[event.node].pop()

        def walk(node: Node, path: str) -> Iterator[tuple[str, tuple[Node, bytes | None]]]:
            if isinstance(node.base, bytes):
                yield path, (node, filled(node.base, data.get(node, []), fill if rng.random() < 0.5 else rng.choice(FILL), rng))
                return
            yield path, (node, None)
            for name, inner in sorted(entries.get(node, node.base).items()):
                if inner is not None:
                    yield from walk(inner, f"{path}/{name}" if path else name)
        return dict(walk(self.root, ""))

    def whole(self, node: Node) -> bytes:
        """What a file holds when all is done."""
        changes = [(event, True) for event in self.events if event.node is node and not event.entries and not event.syncs]
        return filled(node.base, changes, "all", random)

    def newest(self, cut: int) -> int:
        """The step that was saved for good by then; -1: none. Of what is no run: 0, if it was."""
        return max((step for number, step in self.saved if number <= cut), default=-1)


def filled(base: bytes, changes: list[tuple[Event, bool]], fill: str, rng: Any) -> bytes:
    """A file's bytes: those that are synced, and as many of the others as `fill` says."""
    if not changes:
        return base
    data, unsynced = bytearray(base), sum(len(event.data or b"") for event, synced in changes if not synced)
    left = {"all": unsynced, "none": 0, "zeros": unsynced}.get(fill, rng.randrange(unsynced + 1))
    for event, synced in changes:
        if event.size is not None:
            data[event.size:] = bytes(max(0, event.size - len(data)))
            continue
        written = event.data if synced else (event.data if fill != "zeros" else bytes(len(event.data)))[:left]
        left -= 0 if synced else len(written)
        if written:
            data[len(data):] = bytes(max(0, event.place - len(data)))
            data[event.place:event.place + len(written)] = written
    return bytes(data)


def put(state: State, folder: Path) -> None:
    for path, (_, data) in state.items():
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)


def key(state: State) -> bytes:
    """The same of states that differ in nothing that a command reads."""
    digest = hashlib.sha256()
    for path, (node, data) in state.items():
        if data is not node.base and not path.endswith(("/train.log", "/.lock")):
            digest.update(f"{path}\n{data and len(data)}\n".encode() + (data or b""))
    return digest.digest()


def all_of(record: Record) -> dict[str, bytes | None]:
    """{path: bytes; None of a folder} when all is done."""
    def walk(node: Node, path: str) -> Iterator[tuple[str, bytes | None]]:
        for name, inner in node.live.items():
            folder = isinstance(inner.live, dict)
            yield f"{path}{name}", None if folder else record.whole(inner)
            yield from walk(inner, f"{path}{name}/") if folder else ()
    return dict(walk(record.root, ""))


class Kept(random.Random):
    """Draws that keep everything."""

    def choice(self, given: Any) -> Any:
        return given[0] if given == FILL else max(given)
