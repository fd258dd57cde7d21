"""Kill a run again and again, at random moments, and compare what comes out with a run left in peace.

    make soak                                     # 30 kills of runs on two ranks, about 8 minutes on 2 cores
    python tests/soak.py --kills 100 --seed 7
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lab  # noqa: E402
from runtime.command import Parser  # noqa: E402

WORDS = ("training.strategy=ddp", lab.HALF, "checkpointing.learning_dynamics.max_rows=2")
VICTIMS = ("one rank", "all ranks", "torchrun", "everything")
PHASES = ("starting", "training", "writing a checkpoint")


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("train/loss") if path.exists() else 0


def phase(run: Path, lines_before: int) -> str:
    if list(run.glob("checkpoints/.staging*")):
        return "writing a checkpoint"
    return "training" if lines(run) != lines_before else "starting"


def kill(process, victim: str, rng: random.Random) -> None:
    """SIGKILL `victim`; whatever it was, nothing may be left of the job soon after."""
    everyone = lab.descendants(process.pid)
    workers = lab.workers(process)
    chosen = {"one rank": [rng.choice(workers)] if workers else [], "all ranks": workers, "torchrun": everyone[:1],
              "everything": everyone}[victim]
    for pid in chosen:
        lab.send(pid, signal.SIGKILL)
    try:
        lab.wait_until(lambda: process.poll() is not None and not any(map(lab.alive, everyone)), timeout=60, pause=0.05)
    finally:
        for pid in filter(lab.alive, everyone):  # found wanting; adopted by init, nobody else would find them
            lab.send(pid, signal.SIGKILL)


def soak(runs: lab.Lab, kills: int, seed: int, say=lambda words: None) -> dict[str, Counter]:
    """Until `kills` kills have hit: runs of 20 steps, killed and resumed to their end; each must end undisturbed."""
    rng, told = random.Random(seed), {"phases": Counter(), "victims": Counter(), "totals": Counter()}
    runs.train("undisturbed", *WORDS, ranks=2)
    while told["totals"]["kills"] < kills:
        name = f"run-{told['totals']['runs']}"
        ended = False
        while not ended:
            wanted = told["totals"]["kills"] < kills and lines(runs.folder / name) < 20  # a kill of what is done hits nothing
            hit = one_round(runs, name, rng, told) if wanted else None
            if not wanted:
                runs.train(name, *WORDS, ranks=2)
            ended = not wanted or hit is None
            say(f"{name}: {hit or 'ran to its end'}")
        runs.same_end(name, "undisturbed")
        told["totals"]["runs"] += 1
        told["totals"]["losses compared"] += len(runs.metrics(name))
    return told


def one_round(runs: lab.Lab, name: str, rng: random.Random, told: dict[str, Counter]) -> str | None:
    """Start or resume the run and kill it in a phase drawn at random; what was hit, or None where it ended first."""
    folder, victim, wish = runs.folder / name, rng.choice(VICTIMS), rng.choice(PHASES)
    before = lines(folder)
    process = lab.start("train.py", runs.config(name), *WORDS, ranks=2)
    try:
        begun, delay = time.monotonic(), rng.uniform(0.0, 6.0 if wish == "starting" else 0.3)
        while process.poll() is None and time.monotonic() - begun < 90:
            if (wish == "starting" or phase(folder, before) == wish) and time.monotonic() - begun >= delay:
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.05))
        if process.poll() is not None:
            output = process.communicate()
            assert process.returncode == 0, output
            return None
        where = phase(folder, before)
        kill(process, victim, rng)
    finally:
        lab.kill(process)
        process.communicate()
    told["phases"][where] += 1
    told["victims"][victim] += 1
    told["totals"]["kills"] += 1
    return f"{victim} killed, {where}, {lines(folder)} steps told"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = lab.Lab(Path(folder), lab.make_dataset(Path(folder) / "data"))
        for what, counts in soak(runs, args.kills, args.seed, lambda words: print(words, flush=True)).items():
            print(f"{what}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    print("every run ended with the losses and weights of the undisturbed one, bit for bit")


if __name__ == "__main__":
    main()
