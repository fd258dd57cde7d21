"""Kill a run again and again, at random moments, and compare what comes out with a run left in peace.

    make soak                                     # 30 kills of runs on two ranks, about 8 minutes on 2 cores
    python tests/soak.py --kills 100 --seed 7
    python tests/soak.py --agents                 # of one run on two machines' torchruns, which heal it; about 15 minutes
"""

from __future__ import annotations

import random
import signal
import subprocess
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


# ---- two torchruns -------------------------------------------------------------------------------------------------

AGENT_VICTIMS = ("the first one's worker", "the second one's worker", "both workers", "the first torchrun", "the second torchrun")
HEALING = 150.0  # seconds that a run may take to go on, by itself or with torchruns that were started again


class Agents:
    """Two torchruns that stand for machines, of one run; whichever ends is started again, as by hand or by a queue."""

    def __init__(self, *words: object):
        self.words, self.started = words, 0
        port = lab.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port  # is free again at once
        self.launcher = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=soak",
                         "--max-restarts=100")
        self.both = [self._start(), self._start()]

    def _start(self) -> subprocess.Popen:
        self.started += 1
        return lab.start("train.py", *self.words, ranks=1, torchrun=self.launcher, quiet=True)

    def revive(self) -> None:
        """Start again what has ended, unless the run has."""
        self.both = [self._start() if agent.poll() not in (None, 0) else agent for agent in self.both]

    def hit(self, victim: str) -> None:
        number = "second" in victim
        chosen = self.both if victim.startswith("both") else [self.both[number]]
        for agent in chosen:
            for pid in lab.workers(agent) if "worker" in victim else [agent.pid]:
                lab.send(pid, signal.SIGKILL)

    def end(self) -> None:
        for agent in self.both:
            lab.kill(agent)


def soak_agents(runs: lab.Lab, kills: int, seed: int, say=lambda words: None) -> dict[str, Counter]:
    """One long run on two torchruns, hit `kills` times while it trains; it must end undisturbed."""
    steps = 20 * kills
    words = (lab.HALF, "training.strategy=ddp", f"training.max_steps={steps}", "checkpointing.save_every_n_steps=10",
             "checkpointing.learning_dynamics=null", "training.hang_timeout_minutes=0.5")
    runs.train("undisturbed", *words, ranks=2)
    rng, told, folder = random.Random(seed), {"victims": Counter(), "healed": Counter()}, runs.folder / "hit"
    agents = Agents(runs.config("hit"), *words)
    try:
        for number in range(kills):
            reach(agents, lambda: lines(folder) >= 18 * number + rng.randint(1, 10))
            started, begun, victim = agents.started, time.monotonic(), rng.choice(AGENT_VICTIMS)
            agents.hit(victim)
            before = lines(folder)
            reach(agents, lambda: lines(folder) > before + 3)
            how = "by itself" if agents.started == started else f"with {agents.started - started} torchruns started again"
            told["victims"][victim] += 1
            told["healed"][how] += 1
            say(f"{number + 1}: {victim} killed, at step {before}; healed {how} in {time.monotonic() - begun:.0f} s")
        reach(agents, lambda: all(agent.poll() == 0 for agent in agents.both))
    finally:
        agents.end()
    runs.same_end("hit", "undisturbed", steps)
    return told


def reach(agents: Agents, holds) -> None:
    """Wait until something holds, while torchruns that end are started again."""
    def now() -> bool:
        agents.revive()
        return holds()
    lab.wait_until(now, HEALING, 0.05)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--agents", action="store_true", help="kill workers and torchruns of one run on two of these")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = lab.Lab(Path(folder), lab.make_dataset(Path(folder) / "data"))
        kill_all = soak_agents if args.agents else soak
        for what, counts in kill_all(runs, args.kills, args.seed, lambda words: print(words, flush=True)).items():
            print(f"{what}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    print("every run ended with the losses and weights of the undisturbed one, bit for bit")


if __name__ == "__main__":
    main()
