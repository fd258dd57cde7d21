"""The record of a run: metrics.jsonl as curves, fork.json as a sentence."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from config import UserError
from config.reading import show
from hub.folders import read_json
from runtime.files import read_text
from runtime.log import log

Curves = dict[str, list[tuple[int, float]]]


def training_record(run: Path) -> Curves:
    """{key: [(step, number), ...]} of metrics.jsonl, empty lists for what it does not tell.

    A last line without an end is one that is being written; any other that is no object with a step is left out, and said.
    """
    found: Curves = defaultdict(list)
    path = run / "metrics.jsonl"
    try:
        lines = read_text(path).split("\n")
    except FileNotFoundError:
        return found
    except (OSError, UnicodeDecodeError) as error:
        log.warning(f"{path}: cannot be read ({error}); the figures do without it")
        return found
    wrong = []
    for number, line in enumerate(lines, 1):
        if (told := _told(line)) is None:
            wrong += [number] if number < len(lines) else []
            continue
        for key, value in told.items():
            if key != "step" and _is_number(value):
                found[key].append((told["step"], value))
    if wrong:
        log.warning(f"{path}: line {wrong[0]} is no JSON object with a step, and is left out"
                    + (f", as are {len(wrong) - 1} others" if wrong[1:] else ""))
    return found


def fork_of(run: Path) -> str:
    """What fork.json tells of a run that began with another one's state, as a sentence; empty where there is none."""
    if not (run / "fork.json").is_file():
        return ""
    try:
        told = read_json(run / "fork.json")
        changes = "; ".join(f"{key} {show(old)} -> {show(new)}" for key, (old, new) in told["changes"].items()) or "nothing"
        return f" Forked from {Path(told['from']).name} at step {show(told['step'])}; changed: {changes}."
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        log.warning(f"{run}/fork.json: does not tell what a fork is of, and is left out")
        return ""


def _told(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int and _is_number(value["step"]) else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
