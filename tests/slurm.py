"""A real SLURM on this machine, of two nodes that are one: jobs of slurm/train.sbatch are signalled, requeued, cancelled.

    apt-get install slurmctld slurmd slurm-client munge     # as root, who also starts munged; then
    python tests/slurm.py                                    # about 4 minutes on 2 cores

Every run must end with the losses and weights of one that nothing happened to, bit for bit; two that would be one are refused.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lab  # noqa: E402
from runtime.command import Parser  # noqa: E402

STEPS = 600
WORDS = (f"training.max_steps={STEPS}", "training.optimization.gradient_accumulation_steps=2", "model.relora.reset_frequency=50",
         "checkpointing.save_every_n_steps=200", "checkpointing.learning_dynamics=null", "training.strategy=ddp")
NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "munge")
NODES = ("127.0.0.1", "127.0.0.2")  # a node's name is where the ranks meet, so it must lead to this machine
CONFIG = """
ClusterName=lab
SlurmctldHost=localhost
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
KillWait=20
GresTypes=gpu
NodeName=127.0.0.[1-2] NodeHostname=localhost Port=[{first}-{second}] CPUs=4 RealMemory=1000 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A controller and two nodes that belong to this process; `folder` holds all that they write."""

    def __init__(self, folder: Path):
        self.folder, self.env = folder, {**os.environ, **lab.ENV, "SLURM_CONF": str(folder / "slurm.conf")}
        self.env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{self.env['PATH']}"
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Slurm:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, user=getpass.getuser(), control=port,
                                                              first=port + 1, second=port + 2))
        (self.folder / "gres.conf").write_text(f"NodeName=127.0.0.[1-2] Name=gpu File={self.folder}/gpu[0-1]\n")
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        for name in ("gpu0", "gpu1"):
            (self.folder / name).touch()
        for words in (["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)):
            self.daemons.append(subprocess.Popen(words, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        lab.wait_until(lambda: self.call("sinfo", "-h", "-o", "%T", check=False).strip() == "idle", timeout=60, pause=0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self.call("scancel", "--user", getpass.getuser(), check=False)
        for process in reversed(self.daemons):
            process.terminate()
            process.wait(timeout=30)

    def call(self, *words: object, check: bool = True) -> str:
        done = subprocess.run(list(map(str, words)), env=self.env, cwd=lab.ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: object, nodes: int = 1) -> int:
        """A job of slurm/train.sbatch with two ranks in all."""
        return int(self.call("sbatch", "--parsable", f"--nodes={nodes}", f"--gpus-per-node={2 // nodes}", "--cpus-per-task=1",
                             f"--output={self.folder}/%j.log", "slurm/train.sbatch", *words))

    def state(self, job: int) -> str:
        """Such as RUNNING; a job that waits to be begun again is begun now."""
        found = self.call("squeue", "-h", "-j", job, "-o", "%T", check=False).strip() or "gone"
        if found == "PENDING":
            self.call("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        return found

    def wait(self, job: int, timeout: float = 300) -> str:
        """The state in which a job has ended."""
        lab.wait_until(lambda: self.state(job) in ("gone", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), timeout, pause=0.5)
        return self.shown(job, "JobState")

    def shown(self, job: int, name: str) -> str:
        """A field of `scontrol show job`."""
        return self.call("scontrol", "show", "job", job).partition(f"{name}=")[2].split()[0]


def steps_told(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("train/loss") if path.exists() else 0


def steps_done(run: Path, job: int, slurm: Slurm, count: int) -> None:
    """Wait until a run has told `count` steps more than now."""
    before = steps_told(run)
    try:
        lab.wait_until(lambda: steps_told(run) >= before + count, timeout=120, pause=0.02)
    except AssertionError:
        raise AssertionError((slurm.folder / f"{job}.log").read_text()[-3000:]) from None


def signalled(slurm: Slurm, runs: lab.Lab) -> None:
    """Its time is up, as SLURM says it, twice: a checkpoint, the queue again, the same job goes on."""
    job = slurm.submit(runs.config("signalled"), *WORDS)
    for number in (1, 2):
        steps_done(runs.folder / "signalled", job, slurm, 60)
        slurm.call("scancel", "--signal=USR1", job)
        lab.wait_until(lambda: slurm.state(job) == "RUNNING" and slurm.shown(job, "Restarts") == str(number), 120, 0.5)
    assert slurm.wait(job) == "COMPLETED"


def requeued(slurm: Slurm, runs: lab.Lab) -> None:
    """Somebody else needs the nodes."""
    job = slurm.submit(runs.config("requeued"), *WORDS)
    steps_done(runs.folder / "requeued", job, slurm, 250)
    slurm.call("scontrol", "requeue", job)
    assert slurm.wait(job) == "COMPLETED"


def two_nodes(slurm: Slurm, runs: lab.Lab) -> None:
    job = slurm.submit(runs.config("two_nodes"), *WORDS, nodes=2)
    assert slurm.wait(job) == "COMPLETED", (slurm.folder / f"{job}.log").read_text()[-3000:]


def cancelled(slurm: Slurm, runs: lab.Lab) -> None:
    """Nobody is left behind; the job is submitted again."""
    job = slurm.submit(runs.config("cancelled"), *WORDS)
    steps_done(runs.folder / "cancelled", job, slurm, 100)
    slurm.call("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    time.sleep(1)
    left = subprocess.run(["pgrep", "-f", "cancelled.yaml"], capture_output=True, text=True).stdout
    assert not left, f"still there: {left}"
    assert slurm.wait(slurm.submit(runs.config("cancelled"), *WORDS)) == "COMPLETED"


def without_torchrun(slurm: Slurm, runs: lab.Lab) -> None:
    """srun with a task for each rank: two runs that would be one are refused by both, and nothing is there."""
    done = subprocess.run(["srun", "--ntasks=2", "--nodes=2", "--gpus-per-node=1", "python", "train.py",
                           runs.config("without_torchrun"), *WORDS], env=slurm.env, cwd=lab.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("error: srun started 2 copies of this command") == 2, done.stderr
    assert not (runs.folder / "without_torchrun").exists()


CASES = (signalled, requeued, two_nodes, cancelled, without_torchrun)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("cases", nargs="*", help=f"which of {', '.join(case.__name__ for case in CASES)} (default: all)")
    args = parser.parse_args()
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        parser.error(f"{', '.join(missing)}: not here; on Debian: apt-get install slurmctld slurmd slurm-client munge")
    with tempfile.TemporaryDirectory() as folder:
        runs = lab.Lab(Path(folder), lab.make_dataset(Path(folder) / "data"))
        (Path(folder) / "slurm").mkdir()
        runs.train("undisturbed", *WORDS, ranks=2)
        with Slurm(Path(folder) / "slurm") as slurm:
            for case in CASES:
                if not args.cases or case.__name__ in args.cases:
                    begun = time.monotonic()
                    case(slurm, runs)
                    if case is not without_torchrun:
                        runs.same_end(case.__name__, "undisturbed", STEPS)
                    print(f"{case.__name__}: as it should be; {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
