"""What the tests share: tiny datasets and configurations, and the real commands as a user starts them."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from torch.distributed import TCPStore

from runtime import command as commands
from runtime import wrap
from shards import write_shards

ROOT = Path(__file__).resolve().parent.parent
ENV = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # one thread, as conftest sets here: the same bits, and faster
IN_TURN = """
import json, sys
import torch
import train
from config import load_config
from runtime import dist
with dist.session(torch.device("cpu")) as device:
    for path, *words in json.loads(sys.argv[1]):
        train.train(load_config(path, words), device)
"""
FAST_PATHS = True  # of the runs of tiny_tree; pytest --plain turns them off
HALF = "training.optimization.gradient_accumulation_steps=2"  # on two ranks, tiny_tree's micro-batches of 2 rows
FORKED_FROM = ["lab", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"]  # what `forked` finds imported
SHARED = ROOT.parent / "shared" / "data"  # real data, where it is at hand


def shards() -> bool:
    """Whether this torch trains with fsdp on CPUs; see wrap.check_sharding."""
    from torch.distributed.fsdp import FSDPModule  # which takes seconds
    return hasattr(FSDPModule, wrap.SUMS)


def open_by(opened: Callable, monkeypatch: Any) -> None:
    """Have `opened` stand for open, also where pathlib took that in when it was imported (Python 3.10)."""
    for name in ("builtins.open", "io.open"):
        monkeypatch.setattr(name, opened)
    if accessor := getattr(pathlib, "_NormalAccessor", None):
        monkeypatch.setattr(accessor, "open", staticmethod(opened))


def make_dataset(folder: Path, rows: int = 96, row_length: int = 17, vocab: int = 64, val_rows: int = 12,
                 seed: int = 0) -> Path:
    """A dataset with something to learn: each token mostly follows from the one before."""
    rng = np.random.default_rng(seed)
    successor = rng.permutation(vocab)
    tokens = np.empty((rows + val_rows, row_length), dtype=np.int64)
    tokens[:, 0] = rng.integers(vocab, size=len(tokens))
    for t in range(1, row_length):
        noise = rng.random(len(tokens)) < 0.2
        tokens[:, t] = np.where(noise, rng.integers(vocab, size=len(tokens)), successor[tokens[:, t - 1]])
    write_shards(folder / "train", tokens[:rows], vocab, "made for a test")
    write_shards(folder / "val", tokens[rows:], vocab, "made for a test")
    return folder


def tiny_tree(dataset: Path, runs: Path, name: str = "run", relora: bool = True) -> dict:
    """A nested configuration of a run of seconds: 2 layers, GQA, 8 rows an update in 4 accumulation steps."""
    model = {"d_model": 32, "n_layers": 2, "vocab_size": 64, "max_seq_len": 16, "attention_n_heads": 4,
             "attention_n_kv_heads": 2, "activation_hidden_dim": 64, "fast_paths": FAST_PATHS}
    if relora:
        model["relora"] = {"target_modules": ["attention", "swiglu"], "reset_frequency": 5, "r": 4, "lora_alpha": 8,
                           "lora_dropout": 0.1}
    return {
        "data": {"dataset": {"name": str(dataset)}, "dataloader": {"batch_size": 8}},
        "model": model,
        "training": {"max_steps": 20, "fabric": {"precision": "32-true", "accelerator": "cpu"},
                     "optimization": {"lr": 1e-2, "lr_scheduler": "relora_jagged_cosine" if relora else "cosine_with_warmup",
                                      "lr_warmup_steps": 2, "restart_warmup_steps": 2, "min_lr_ratio": 0.1,
                                      "gradient_accumulation_steps": 4}},
        "evaluation": {"metrics": ["val"]},
        "monitoring": {"logging": {"log_every_n_steps": 1}},
        "checkpointing": {"run_name": name, "runs_dir": str(runs), "save_every_n_steps": 5,
                          "learning_dynamics": {"eval_data": "val", "batch_size": 4}},
    }


def write_config(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def start(command: str, *words: object, ranks: int = 0, env: dict[str, str] | None = None,
          torchrun: tuple[str, ...] = ("--standalone",), quiet: bool = False) -> subprocess.Popen:
    """Start `python COMMAND words`, under a real torchrun where ranks >= 1; COMMAND may be a script elsewhere. What a quiet one
    says is lost: nobody needs to read it.
    """
    out = subprocess.DEVNULL if quiet else subprocess.PIPE
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={ranks}"]
    return subprocess.Popen([*launcher, str(ROOT / command), *map(str, words)], cwd=ROOT, text=True,
                            stdout=out, stderr=out, env={**os.environ, **ENV, **(env or {})},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # which a shell's `&` ignores


def run(command: str, *words: object, ranks: int = 0, timeout: float = 180, code: int | None = 0,
        env: dict[str, str] | None = None) -> str:
    """Run a command to its end and return what it printed; fails if its exit code is not `code` (None: any)."""
    process = start(command, *words, ranks=ranks, env=env)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate(timeout=40)
        raise AssertionError(f"{command} did not end in {timeout} s:\n{out[-2000:]}\n{err[-4000:]}") from None
    except BaseException:
        kill(process)
        raise
    assert code is None or process.returncode == code, f"exit code {process.returncode}:\n{out[-2000:]}\n{err[-4000:]}"
    return out + err


def forked(command: str, *words: object, ranks: int = 0, timeout: float = 180, code: int = 0,
           env: dict[str, str] | None = None, machines: int = 1) -> str:
    """`run`, in copies of a process that has imported torch already: a third of the processor time.

    Ranks are given their place as torchrun gives it, as if on several `machines`, and its store. Each must end with `code`; once one has not, or after
    the timeout, all are killed.
    """
    context, places = multiprocessing.get_context("forkserver"), [{}]
    context.set_forkserver_preload(FORKED_FROM)
    with mock.patch.dict(os.environ, ENV, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    if ranks:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        local = ranks // machines
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank % local), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(local),
                   "GROUP_RANK": str(rank // local), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True"} for rank in range(ranks)]
    with tempfile.NamedTemporaryFile() as told:
        copies = [context.Process(target=_copy, args=(told.name, ROOT / command, [str(word) for word in words],
                                                      {**os.environ, **ENV, **(env or {}), **place})) for place in places]
        end = time.monotonic() + timeout
        try:
            for process in copies:
                process.start()
            while (running := [p.sentinel for p in copies if p.exitcode is None]) and time.monotonic() < end:
                if any(p.exitcode not in (None, code) for p in copies):
                    break
                connection.wait(running, end - time.monotonic())
        finally:
            for process in copies:
                if process.pid is not None:
                    process.kill()
                    process.join()
        text, codes = Path(told.name).read_text(), [process.exitcode for process in copies]
    assert codes == [code] * len(copies), f"exit codes {codes}:\n{text[-6000:]}"
    return text


def _copy(told: str, script: Path, words: list[str], env: dict[str, str]) -> None:
    """A forked process becomes the command."""
    file = os.open(told, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def descendants(pid: int) -> list[int]:
    """`pid` and all processes below it; torchrun's workers have sessions of their own."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        children.setdefault(parent_of(int(folder.name)), []).append(int(folder.name))
    found = [pid]
    for parent in found:  # grows as it goes
        found += children.get(parent, [])
    return found


def workers(process: subprocess.Popen) -> list[int]:
    """The ranks that a torchrun has started."""
    return [pid for pid in descendants(process.pid) if parent_of(pid) == process.pid]


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def kill(process: subprocess.Popen) -> None:
    """SIGKILL a process that `start` started and all below it, and wait until they are gone."""
    pids = descendants(process.pid)
    for pid in pids:
        send(pid, signal.SIGKILL)
    process.wait(timeout=20)
    wait_until(lambda: not any(alive(pid) for pid in pids), timeout=20)


def send(pid: int, number: int) -> None:
    """A signal to a process that may have ended by now."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(holds: Callable[[], bool], timeout: float, pause: float = 0.001) -> None:
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, f"still not so after {timeout} s"
        time.sleep(pause)


def call(command: str, *words: object, code: int = 0) -> str:
    """`run` of one process, but in this one, which saves the seconds of a start."""
    out, argv, ended = io.StringIO(), sys.argv, None
    sys.argv = [command, *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            commands.command(importlib.import_module(command.removesuffix(".py")).main)
    except SystemExit as error:
        ended = error.code
    finally:
        sys.argv = argv
    assert ended == code, f"exit code {ended}:\n{out.getvalue()[-4000:]}"
    return out.getvalue()


class Lab:
    """Runs of `tiny_tree` on one dataset below one folder: lab.train("name", "key=value", ...)."""

    def __init__(self, folder: Path, dataset: Path):
        self.folder, self.dataset = folder, dataset

    def config(self, name: str, relora: bool = True) -> Path:
        return write_config(self.folder / f"{name}.yaml", tiny_tree(self.dataset, self.folder, name, relora))

    def train(self, name: str, *words: object, relora: bool = True, ranks: int = 0, code: int = 0,
              machines: int = 1) -> str:
        """Train the run `name` as its user would, in this process unless it takes several; what was printed."""
        config = self.config(name, relora)
        if ranks:
            return forked("train.py", config, *words, ranks=ranks, code=code, machines=machines)
        return call("train.py", config, *words, code=code)

    def train_in_turn(self, *runs: tuple[str, ...], ranks: int, script: str = IN_TURN) -> str:
        """Train several runs (name, words ...) in the same processes, one after the other."""
        path = self.folder / "in_turn.py"
        path.write_text(script)
        return forked(path, json.dumps([[str(self.config(name)), *words] for name, *words in runs]), ranks=ranks)

    def copy(self, name: str, new: str, step: int) -> None:
        """The run `new` is `name` as it was when it had written the checkpoint of `step`."""
        shutil.copytree(self.folder / name, self.folder / new)
        for path in (self.folder / new / "checkpoints").glob("step_*"):
            if int(path.name.removeprefix("step_")) > step:
                shutil.rmtree(path)

    def metrics(self, name: str, key: str = "train/loss") -> dict[int, float]:
        return metrics(self.folder / name, key)

    def same_end(self, name: str, other: str, last: int = 20) -> None:
        """The run `name` has told the very numbers of `other`, and has ended with its weights, bit for bit."""
        for key in ("train/loss", "trainer/grad_norm", "eval/val_loss", "relora/loss_after"):
            assert self.metrics(name, key) == self.metrics(other, key), key
        assert list(self.metrics(name)) == list(range(1, last + 1))
        found, expected = self.state(name, last)["model"], self.state(other, last)["model"]
        assert found.keys() == expected.keys()
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
        assert list((self.folder / name).rglob(".staging*")) == []
        assert (self.folder / name / "checkpoints/latest").read_text() == f"step_{last}\n"

    def state(self, name: str, step: int) -> dict:
        """The training state of a step, read as plain torch would."""
        return torch.load(self.folder / name / f"checkpoints/step_{step}/training_state/checkpoint.pt")


def checkpoint_names(step_folder: Path) -> set[str]:
    """The files that a step's manifest names."""
    return set(json.loads((step_folder / "manifest.json").read_text())["files"])


def metrics(run_folder: Path, key: str = "train/loss") -> dict[int, float]:
    """{step: value} of one key of metrics.jsonl, which must be strict JSON without a step told twice."""
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.jsonl")
    text = (run_folder / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert len(dict(found)) == len(found), f"a step of {key} is told twice"
    return dict(found)
