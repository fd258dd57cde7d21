"""Let every call that touches a run's or a dataset's folder fail once, in every command, and judge what comes of it.

    python tests/faults.py                          # all commands, an I/O error each time; half an hour on 2 cores
    python tests/faults.py train resume --error ENOSPC --every 5
    python tests/faults.py --mounts                 # mounts with a habit: a quota that shows at close, no fsync of folders ...

A fault may cost a line that says which file and why, or a snapshot, and nothing else: no traceback, no hang, no checkpoint;
after it the same command ends as it does on a good disk, bit for bit. The calls are those of libc, counted and failed by
preload.c; each try is a fork of a process that has imported torch already.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MOUNTS = ("a quota that shows at close", "no fsync of folders", "no blocks told", "rename replaces nothing")
SECONDS = 120  # after which a try hangs
LINE = re.compile(r"error: \S+(?: cannot be written)?: ")


class Scenario(NamedTuple):
    """A command, in a folder as `before` has it."""
    name: str
    before: str  # the run as it is then: none, half or whole
    command: str
    words: tuple[str, ...]


SCENARIOS = [
    Scenario("train", "none", "train.py", ("run.yaml",)),
    Scenario("resume", "half", "train.py", ("run.yaml",)),
    Scenario("evaluate", "whole", "evaluate.py", ("run", "evaluation.metrics=[val]")),
    Scenario("sample", "whole", "sample.py", ("run", "--tokens", "4", "--prompt", "1 2")),
    Scenario("analyze", "whole", "analyze.py", ("run",)),
    Scenario("export", "whole", "export.py", ("hf", "run", "out")),
    Scenario("replay", "whole", "replay.py", ("run", "--steps", "6")),
    Scenario("verify", "whole", "shards.py", ("verify", "data")),
    Scenario("text", "whole", "shards.py", ("text", "text.txt", "--out", "made", "--row-length", "17")),
]


class Told(NamedTuple):
    code: int | None  # None: it hung
    text: str
    calls: int  # of this command, below the folder


# ---- a try, in a fork ------------------------------------------------------------------------------------------------

def attempt(folder: Path, scenario: Scenario, at: int = 0, number: int = errno.EIO, mount: int = 0) -> Told:
    """Run the command in `folder`; its `at`-th call fails (0: none does)."""
    told, counted = folder.parent / "told.txt", folder.parent / "calls.txt"
    pid = os.fork()
    if pid == 0:
        _become(folder, scenario, told, counted, at, number, mount)
    end = time.monotonic() + SECONDS
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Told(None, told.read_text(), 0)
        time.sleep(0.01)
    return Told(os.waitstatus_to_exitcode(ended[1]), told.read_text(), int(counted.read_text() or 0))


def _become(folder: Path, scenario: Scenario, told: Path, counted: Path, at: int, number: int, mount: int) -> None:
    """This process becomes the command."""
    code, library = 70, ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.fault_count.restype = ctypes.c_long
    try:
        file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        counted.write_text("")
        os.chdir(folder)
        sys.argv = [scenario.command, *scenario.words]
        library.fault_mount(mount)
        library.fault_arm(ctypes.c_long(at), number)
        try:
            runpy.run_path(str(ROOT / scenario.command), run_name="__main__")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        counted.write_text(str(library.fault_count()))
        sys.stdout.flush()
    finally:
        os._exit(code)


# ---- judging ---------------------------------------------------------------------------------------------------------

def contents(folder: Path) -> dict[str, Any]:
    """What a run, or what was made of it, comes to: losses and weights of every step, and the files of a dataset."""
    import torch
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [(line["step"], line.get("train/loss"), line.get("eval/val_loss")) for line in lines]
        elif path.name == "model.safetensors" or path.suffix == ".npy":
            found[name] = path.read_bytes()
        elif path.name == "checkpoint.pt":
            state = torch.load(path, weights_only=True)
            found[name] = [state["step"], *(tensor.tolist() for tensor in state["model"].values())]
    return found


def steps(folder: Path) -> set[str]:
    """The whole checkpoints."""
    return {path.parent.name for path in folder.glob("run/checkpoints/step_*/manifest.json")}


def judge(folder: Path, scenario: Scenario, fault: Told, reference: dict[str, Any], before: set[str]) -> str:
    """fine, or what is wrong. After the fault the same command is given again, on a good disk."""
    if fault.code is None:
        return "hung"
    if "Traceback" in fault.text or fault.code < 0 or fault.code == 70:
        return "traceback"
    if fault.code and not LINE.search(fault.text):
        return "no file named"
    if not before <= steps(folder):
        return "lost"
    if scenario.command == "train.py" or fault.code:
        again = attempt(folder, scenario)
        done = "is already there" in again.text and scenario.command in ("shards.py", "export.py")
        if again.code and not done:
            return "not after it either"
        if before and scenario.command == "train.py" and "resumed at step" not in again.text + fault.text:
            return "begun anew"
    found = contents(folder)
    if any(found.get(name) != value for name, value in reference.items() if "learning_dynamics" not in name):
        return "unlike the reference"
    return "fine"


@contextlib.contextmanager
def prepared(scenario: Scenario, base: Path) -> Iterator[Path]:
    """A folder in which the command finds what it needs."""
    folder = base / "try"
    shutil.copytree(base / scenario.before, folder, symlinks=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def prepare(base: Path, needed: Collection[str] = ("half", "whole")) -> None:
    """The states that commands begin in: no run, half of one, a whole one; with the data beside it."""
    import lab
    ends = {"half": "training.stop_at_step=4", "whole": "training.stop_at_step=null"}
    for before in ("none", "half", "whole"):
        folder = base / before
        lab.make_dataset(folder / "data", rows=64)
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
        tree = lab.tiny_tree(Path("data"), Path("."))
        tree["training"]["max_steps"] = 8
        tree["checkpointing"] |= {"save_every_n_steps": 4}
        lab.write_config(folder / "run.yaml", tree)
    # as a run that was killed after step 4: the others are the same folder, a step on
    told = [attempt(base / name, Scenario("", "", "train.py", ("run.yaml", end))) for name, end in ends.items() if name in needed]
    assert not any(one.code for one in told), told


def try_all(scenarios: list[Scenario], base: Path, number: int, calls: slice, mounts: bool) -> dict[str, Counter]:
    counts: dict[str, Counter] = {}
    for scenario in scenarios:
        found = counts[scenario.name] = Counter()
        with prepared(scenario, base) as folder:
            good, before = attempt(folder, scenario), steps(base / scenario.before)
            assert good.code == 0, good.text
            reference = contents(folder)
        for at in range(1, len(MOUNTS) + 1) if mounts else range(good.calls + 1)[calls]:
            with prepared(scenario, base) as folder:
                fault = attempt(folder, scenario, 0, 0, at) if mounts else attempt(folder, scenario, at, number)
                verdict = judge(folder, scenario, fault, reference, before)
            found[verdict] += 1
            if verdict != "fine":
                what = MOUNTS[at - 1] if mounts else f"call {at} of {good.calls}"
                told = "\n    ".join(["", *fault.text.strip().splitlines()[-6:]])
                print(f"{scenario.name}, {what}: {verdict}{told}", flush=True)
        print(f"{scenario.name}: {good.calls} calls; " + ", ".join(f"{n} {what}" for what, n in found.items()), flush=True)
    return counts


def serve(names: list[str], number: int, calls: slice, mounts: bool) -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    import analyze, evaluate, export, lab, replay, sample, shards, train  # noqa: E401, F401 (imported for the forks)
    base = Path(os.environ["FAULT_UNDER"]).parent
    prepare(base)
    counts = try_all([s for s in SCENARIOS if s.name in (names or [s.name])], base, number, calls, mounts)
    return int(any(set(found) - {"fine"} for found in counts.values()))


def main() -> int:
    from runtime.command import Parser
    parser = Parser(__doc__)
    parser.add_argument("commands", nargs="*", choices=[*(s.name for s in SCENARIOS), []], help="default: all")
    parser.add_argument("--error", default="EIO", help="of the failing call (default: EIO)")
    parser.add_argument("--every", type=int, default=1, help="try only each n-th call")
    parser.add_argument("--first", type=int, default=1, help="begin with this call")
    parser.add_argument("--mounts", action="store_true", help="in place of errors: mounts with a habit")
    args = parser.parse_args()
    if "FAULT_UNDER" in os.environ:
        return serve(args.commands, getattr(errno, args.error), slice(args.first, None, args.every), args.mounts)
    return under_preload(__file__)


def under_preload(script: str) -> int:
    """Run this command again, with preload.c before libc and a folder to work in."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "preload.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests/preload.c", "-ldl"], check=True)
        env = {**os.environ, "LD_PRELOAD": str(library), "FAULT_UNDER": f"{folder}/try", "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, script, *sys.argv[1:]], env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
