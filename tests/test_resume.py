"""Killed by SIGKILL at any moment, the same command goes on and ends as if nothing had been: bit for bit."""

import random
import shutil
import signal

import lab
import pytest
import soak

LAST = 20
WORDS = ("model.d_model=64", "model.vocab_size=4096", "checkpointing.learning_dynamics.max_rows=2")  # slower to save
RANKS = {1: ((), 0), 2: (("training.strategy=ddp", lab.HALF), 2)}  # processes: their options, ranks for torchrun


@pytest.fixture(scope="module", params=RANKS, ids=["one process", "two processes"])
def runs(request, tmp_path_factory, dataset):
    """The undisturbed run; `start` starts another like it in processes of its own, `finish` waits for its end."""
    words, ranks = RANKS[request.param]
    runs = lab.Lab(tmp_path_factory.mktemp("runs"), dataset)
    runs.start = lambda name: lab.start("train.py", runs.config(name), *WORDS, *words, ranks=ranks)
    runs.finish = lambda name: runs.train(name, *WORDS, *words, ranks=ranks)
    runs.finish("undisturbed")
    return runs


def kill_when(runs, name, moment):
    """Start the run, and kill all of its processes at a moment that must come before its end."""
    process = runs.start(name)
    try:
        lab.wait_until(lambda: process.poll() is not None or moment(runs.folder / name), timeout=60)
        early = process.poll() is None
    finally:
        lab.kill(process)
        words = process.communicate(timeout=20)
    assert early, f"it ended before the moment came: {words}"


def kill_while_staging(runs, name, step):
    """Kill while the checkpoint of `step` is being written; a kill that comes too late is tried again."""
    for _ in range(5):
        kill_when(runs, name, lambda run: staged(run, step))
        if staged(runs.folder / name, step):
            return
        shutil.rmtree(runs.folder / name)
    pytest.fail("every kill came too late")


def staged(run, step):
    return any((run / "checkpoints").glob(f".staging-step_{step}@*"))


def test_killed_while_the_first_checkpoint_is_written_then_a_later_one_then_at_a_random_moment(runs):
    kill_while_staging(runs, "killed", 0)
    kill_while_staging(runs, "killed", 10)
    moment = random.SystemRandom().randint(soak.lines(runs.folder / "killed") + 1, LAST - 2)
    kill_when(runs, "killed", lambda run: soak.lines(run) >= moment)
    assert "resumed at step" in runs.finish("killed"), f"killed again after update {moment}"
    runs.same_end("killed", "undisturbed")


def test_whichever_process_is_killed_nothing_is_lost_and_no_orphan_trains_on(tmp_path, dataset):
    seed = random.SystemRandom().randint(0, 10**6)
    print(f"seed {seed}")  # shown where it fails
    told = soak.soak(lab.Lab(tmp_path, dataset), kills=3, seed=seed)
    assert told["totals"]["kills"] == 3


def test_workers_whose_torchrun_died_before_they_knew_it_end_too(tmp_path, dataset):
    runs = lab.Lab(tmp_path, dataset)
    process = lab.start("train.py", runs.config("orphaned"), "training.strategy=ddp", lab.HALF, ranks=2)
    lab.wait_until(lambda: len(lab.workers(process)) == 2, timeout=60)
    orphans = lab.workers(process)
    lab.send(process.pid, signal.SIGKILL)  # they are still importing torch
    try:
        lab.wait_until(lambda: not any(map(lab.alive, orphans)), timeout=40, pause=0.05)
    finally:
        for pid in orphans:
            lab.send(pid, signal.SIGKILL)
        words = process.communicate(timeout=20)[1]
    assert "torchrun at" in words and "does not answer" in words and "Traceback" not in words, words
