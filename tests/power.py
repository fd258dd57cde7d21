"""Cut the power, in simulation, at any point of a small run, and judge every state that the disk may be left in.

    python tests/power.py                           # train, resume and the others; a quarter of an hour
    python tests/power.py train text --states 100 --seed 7

preload.c records what a command does to its folder: each entry made, renamed or removed, each write with its bytes, each
fsync. From the first n of these operations follow the states that a power cut after the n-th may leave, in two orders:

    ext4    entries change in order, as a journal has it, up to some point at or after the latest fsync; what was
            written to a file since its own fsync is there, or gone, or cut, or zeros
    strict  POSIX's letter: what was not fsynced, entries of folders too, is kept or lost, each for itself

Then the same command is given again. Whatever was synced must be used, nothing half written may be, and the end is that of a
run without a cut, bit for bit; a record that lost lines says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import faults
from cuts import Kept, Record, State, all_of, key, put
from faults import Scenario

ORDERS = ("ext4", "strict")
DRAWS = 4  # states of each kind that are drawn at each cut
PRUNED = ("run.yaml", "checkpointing.keep_training_states=1", "checkpointing.learning_dynamics.steps=[1,4,6]")
SCENARIOS = [s for s in faults.SCENARIOS if s.name in ("train", "resume", "text", "export")]
SCENARIOS += [Scenario("prune", "none", "train.py", PRUNED), Scenario("twice", "cut", "train.py", ("run.yaml",))]
TOLD = ("kept as", "may have gaps")  # of a record that a disk spoilt


# ---- judging ---------------------------------------------------------------------------------------------------------

def half_taken(folder: Path, state: State, record: Record) -> str | None:
    """A file that a loader would take though it is not what was written."""
    import shards
    from checkpoint import step_folders, verify
    from config import UserError
    from hub.folders import resolve
    taken: list[Path] = []

    def take(accepts: Any, *paths: Path) -> None:
        for path in paths:
            try:
                found = accepts(path)
                taken.extend([path / name for name in found] if isinstance(found, dict) else
                             [p for p in (found if isinstance(found, Path) else path).rglob("*") if p.is_file()])
            except UserError:
                continue
    take(verify, *step_folders(folder / "run/checkpoints"), *[p for p in [folder / "out"] if p.exists()])
    take(lambda path: {str(resolve(path).relative_to(path) / "model.safetensors"): 0}, folder / "run")
    take(shards.verify, *[p for p in [folder / "made"] if p.exists()])
    for path in taken:
        name = path.relative_to(folder).as_posix()
        if record.whole(state[name][0]) != state[name][1]:
            return name
    return None


def ends(folder: Path) -> dict[str, Any]:
    """What a run comes to, besides its record: losses and weights of every step, what its checkpoints list, its evaluations."""
    found = faults.contents(folder)
    for path in folder.glob("run/checkpoints/step_*/manifest.json"):
        found[path.relative_to(folder).as_posix()] = set(json.loads(path.read_text())["files"])
    for path in (*folder.glob("run/eval_results/*.json"), *folder.glob("run/checkpoints/latest")):
        found[path.relative_to(folder).as_posix()] = path.read_text()
    return found


def judge(folder: Path, scenario: Scenario, reference: dict[str, Any], newest: int) -> str:
    """fine, or what is wrong, once the same command is given again."""
    before = {name for name in ("made", "out") if (folder / name).exists()}
    again = faults.attempt(folder, scenario)
    if again.code is None or again.code < 0 or again.code == 70 or "Traceback" in again.text:
        return "hung" if again.code is None else f"traceback\n{again.text}"
    if again.code and not (before and "is already there" in again.text):
        return f"refused\n{again.text}"
    resumed = re.search(r"resumed at step (\d+)", again.text)
    if scenario.command == "train.py" and (int(resumed[1]) if resumed else -1) < newest:
        return f"lost\nresumed at {resumed and resumed[1]}, {newest} was synced; {again.text}"
    if scenario.command != "train.py" and newest == 0 and not before:
        return "lost"
    found = ends(folder)
    wrong = [name for name, value in reference.items()  # what is left to be pruned goes at the next save
             if found.get(name) != value and not (isinstance(value, set) and value <= found.get(name, set()))]
    if wrong and wrong != ["run/metrics.jsonl"]:
        return f"wrong\n{wrong}; {again.text}"
    if wrong:
        return "fine, a lost record is said" if any(word in again.text for word in TOLD) else f"unsaid\n{again.text}"
    return "fine"


def states_of(record: Record, order: str, seed: int, every: int) -> list[tuple[int, int]]:
    """(cut, seed of the draw) of states that differ, over every cut."""
    found, numbers = {}, random.Random(f"{seed} {order}")
    for cut in range(len(record.events) % every, len(record.events) + 1, every):
        for draw in [numbers.getrandbits(40) for _ in range(DRAWS)]:
            found.setdefault((key(record.state(cut, order, random.Random(draw))), record.newest(cut)), (cut, draw))
    return list(found.values())


def try_states(scenario: Scenario, record: Record, order: str, base: Path, reference: dict, args: argparse.Namespace) -> Counter:
    """Judge what lies on the disk in every state, and what comes of it in some of them."""
    states, counts = states_of(record, order, args.seed, args.every), Counter()
    chosen = set(random.Random(args.seed).sample(states, min(args.states, len(states))))
    folder = base / "try"
    for cut, draw in states:
        state = record.state(cut, order, random.Random(draw))
        put(state, folder)
        half = half_taken(folder, state, record)
        verdict = f"half a file is taken\n{half}" if half else \
            judge(folder, scenario, reference, record.newest(cut)) if (cut, draw) in chosen else "looked at"
        shutil.rmtree(folder)
        what, _, text = verdict.partition("\n")
        counts[what] += 1
        if text:
            print(f"{scenario.name}, {order}, cut {cut} of {len(record.events)}, draw {draw}: {what}\n    "
                  + "\n    ".join(text.strip().splitlines()[-6:]), flush=True)
    print(f"{scenario.name}, {order}: {len(record.events)} operations, {len(states)} states; "
          + ", ".join(f"{number} {what}" for what, number in counts.items()), flush=True)
    return counts


def recorded(scenario: Scenario, base: Path) -> tuple[Record, dict[str, Any]]:
    """The command, recorded on a disk that does not fail; and what it comes to."""
    log = base / "record"
    log.unlink(missing_ok=True)
    with faults.prepared(scenario, base) as folder:
        os.environ["FAULT_RECORD"] = str(log)
        told = faults.attempt(folder, scenario)
        del os.environ["FAULT_RECORD"]
        assert told.code == 0, told.text
        shutil.copytree(folder, base / "done")
        reference = ends(folder)
    shutil.copytree(base / scenario.before, folder)
    record = Record(folder, log)
    shutil.rmtree(folder)
    # the record is complete: all of it done to what was there before makes what is there now
    assert {path.relative_to(base / "done").as_posix(): path.read_bytes() if path.is_file() else None
            for path in (base / "done").rglob("*")} == all_of(record), "operations are missing from the record"
    shutil.rmtree(base / "done")
    # what it says that it has made must last
    assert record.newest(len(record.events)) == (8 if scenario.command == "train.py" else 0), record.saved
    return record, reference


def serve(args: argparse.Namespace) -> int:
    import export, lab, shards, train  # noqa: E401, F401 (imported for the forks)
    from runtime import locks
    locks.TAKEOVER_SECONDS = 0.0  # no second process takes over
    base = Path(os.environ["FAULT_UNDER"]).parent
    chosen, bad = [s for s in SCENARIOS if s.name in (args.commands or [s.name])], Counter()
    faults.prepare(base, {scenario.before for scenario in chosen})
    for scenario in chosen:
        if scenario.before == "cut":  # as the power was cut before the last checkpoint had its name
            first, _ = recorded(SCENARIOS[0], base)
            step = first.saved[-1][1]
            cut = next(n for n, e in enumerate(first.events) for _, name, node in e.entries if name == f"step_{step}" and node)
            (base / "cut").mkdir()
            put({path: found for path, found in first.state(cut, "ext4", Kept()).items() if path}, base / "cut")
        record, reference = recorded(scenario, base)
        for order in args.orders:
            bad += try_states(scenario, record, order, base, reference, args)
    print(f"{sum(bad.values())} states: " + ", ".join(f"{number} {what}" for what, number in bad.items()))
    return int(any(what.split(",")[0] not in ("fine", "looked at") for what in bad))


def main() -> int:
    from runtime.command import Parser, number
    parser = Parser(__doc__)
    parser.add_argument("commands", nargs="*", choices=[*(s.name for s in SCENARIOS), []], help="default: all")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS, help="of the disk (default: both)")
    parser.add_argument("--states", type=number(int, 1, 10 ** 6), default=150, help="from which it starts again (default: 150)")
    parser.add_argument("--every", type=number(int, 1, 10 ** 6), default=1, help="cut only after each n-th operation")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    args = parser.parse_args()
    if "FAULT_UNDER" in os.environ:
        return serve(args)
    os.environ["TQDM_DISABLE"] = "1"
    return faults.under_preload(__file__)


if __name__ == "__main__":
    sys.exit(main())
