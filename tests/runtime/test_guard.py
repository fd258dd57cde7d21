"""What goes wrong on real machines, done for real: signals, dead launchers, full disks, locks, hanging and unequal ranks."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import checkpoint
import data
import evaluate
import lab
import train
from config import ConfigError, load_config
from hub import packing, parquet
from instruments import snapshots
from runtime import dist, files, locks, machine, run_folder, signals

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
QUICK = ("evaluation.metrics=null", "checkpointing.learning_dynamics=null")


@pytest.fixture
def here(tmp_path, dataset, worlds):
    """Runs that start from the undisturbed one as it was at step 5, and so have 15 updates before them."""
    runs = lab.Lab(tmp_path, dataset)
    shutil.copytree(worlds.folder / "single", tmp_path / "undisturbed")
    return runs


def end_of(run):
    return json.loads((run / "exit.json").read_text())


def newest(run):
    return (run / "checkpoints/latest").read_text().strip()


# ---- told to stop --------------------------------------------------------------------------------------------

MOMENTS = {  # what is going on when the signal comes: the function that is at it, and the event, from (what train.py does, step)
    "an update's second micro-batch": (train, "gradient_sync", ("train_step", 6)),
    "the evaluation": (evaluate, "losses_of", ("save", 5)),
    "a snapshot": (snapshots, "to_device", ("save", 5)), "a merge": (train, "merge_and_reinit", ("merge", 5)),
    "the wait for data": (data, "to_device", ("next_batch", 7))}


def signalled(monkeypatch, moment, number):
    """Send this very process a signal in the middle of a moment."""
    module, name, event = MOMENTS[moment]
    function, now, calls = getattr(module, name), [], []

    def noting(what, do):
        def call(state, *args, **options):
            now[:] = [(what, state.step)]
            return do(state, *args, **options)
        return call

    def work(*args, **options):
        calls.extend(now)
        if event in now and len(set(calls)) and calls.count(event) == 1:
            os.kill(os.getpid(), number)
        return function(*args, **options)
    for what in ("train_step", "save", "merge", "next_batch"):
        monkeypatch.setattr(train, what, noting(what, getattr(train, what)))
    monkeypatch.setattr(module, name, work)


@pytest.mark.parametrize("moment, number", [
    *((moment, signal.SIGTERM) for moment in MOMENTS), ("a merge", signal.SIGINT), ("a snapshot", signal.SIGUSR1)],
    ids=lambda value: getattr(value, "name", value))
def test_a_signal_at_any_moment_costs_nothing(here, monkeypatch, moment, number):
    signalled(monkeypatch, moment, number)
    printed = here.train("stopped", code=signals.REQUEUE)
    monkeypatch.undo()
    run = here.folder / "stopped"
    end = end_of(run)
    assert end == {"code": 75, "reason": f"stopped by {number.name}", "step": end["step"]} and "Traceback" not in printed
    assert newest(run) == f"step_{end['step']}", "the last whole step is checkpointed"
    assert end["step"] == max(here.metrics("stopped"), default=0)
    assert f"resumed at step {end['step']}" in here.train("stopped")
    here.same_end("stopped", "undisturbed")
    for step in range(0, 21, 5):
        assert (run / f"checkpoints/step_{step}/learning_dynamics/val_weights.pt").exists(), "no snapshot is missing"
        assert (run / f"eval_results/step_{step}.json").exists()


def test_a_signal_before_the_first_update_stops_at_once(here, monkeypatch):
    monkeypatch.setattr(train, "build", lambda *args, **options: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
    here.train("early", code=signals.REQUEUE)
    assert end_of(here.folder / "early") == {"code": 75, "reason": "stopped by SIGTERM before the first update", "step": None}


@pytest.mark.parametrize("module, name", [(evaluate, "local_or_hub"), (train, "Progress")])
def test_a_signal_while_a_run_is_set_up_is_no_error_in_its_options(here, monkeypatch, module, name):
    """Twice, as impatient schedulers do: the second comes while the first is being told."""
    monkeypatch.setattr(module, name, lambda *args: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
    close = run_folder.RunFolder._close
    monkeypatch.setattr(run_folder.RunFolder, "_close", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or close(*args))
    (here.folder / "early").mkdir()
    here.train("early", code=signals.REQUEUE)
    assert end_of(here.folder / "early")["code"] == 75 and not (here.folder / "early/.lock").exists()


def test_a_second_interrupt_stops_at_once(here, monkeypatch):
    def twice(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    monkeypatch.setattr(train, "train_step", twice)
    begun = time.monotonic()
    here.train("hasty", *QUICK, code=130)
    assert end_of(here.folder / "hasty")["reason"] == "KeyboardInterrupt: " and time.monotonic() - begun < 20


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with signals.catching_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


SLOW = """
from runtime.command import command
import sys, time
import train
from runtime import dist
step = train.train_step
train.train_step = lambda t, batch: (time.sleep(0.3), step(t, batch))
if __name__ == "__main__":
    command(train.main)
"""


@pytest.mark.parametrize("number, torchrun", [
    (signal.SIGTERM, ("--standalone",)),
    (signal.SIGUSR1, ("--standalone", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"))], ids=["SIGTERM", "SIGUSR1"])
def test_torchrun_passes_the_signal_on_and_all_ranks_end_in_time(here, number, torchrun):
    script, run = here.folder / "slow.py", here.folder / "preempted"
    script.write_text(SLOW)
    process = lab.start(script, here.config("preempted"), lab.HALF, ranks=2, torchrun=torchrun)
    try:
        lab.wait_until(lambda: (run / "metrics.jsonl").exists() and "train/loss" in (run / "metrics.jsonl").read_text(), 60)
        everyone, begun = lab.descendants(process.pid), time.monotonic()
        process.send_signal(number)
        lab.wait_until(lambda: not any(map(lab.alive, everyone)), timeout=30, pause=0.02)
        seconds = time.monotonic() - begun
    finally:
        lab.kill(process)
        out, err = process.communicate()
    assert seconds < 20, seconds
    end = end_of(run)
    assert end["code"] == 75 and end["reason"] == f"stopped by {number.name}", (end, err[-2000:])
    assert newest(run) == f"step_{end['step']}" and process.returncode != 0
    print(f"{number.name} to exit: {seconds:.1f} s")


ONE_RANK_ONLY = """
from runtime.command import command
import os, signal
import evaluate, train
from runtime import dist
losses_of, calls = evaluate.losses_of, []

def told(*args):
    calls.append(1)
    if dist.rank() == 1 and len(calls) == 3:  # of step 5's evaluation, in which each rank has two, the first
        os.kill(os.getpid(), signal.SIGTERM)
    assert len(calls) <= 3, "it went on"
    return losses_of(*args)

evaluate.losses_of = told
command(train.main)
"""


def test_a_signal_to_one_rank_inside_an_evaluation_stops_all_of_them_together(here, worlds):
    script, words = here.folder / "one.py", (lab.HALF, "training.strategy=fsdp", "evaluation.val.batch_size=4")
    script.write_text(ONE_RANK_ONLY)
    lab.run(script, here.config("one"), *words, ranks=2, code=1, timeout=60)
    end = end_of(here.folder / "one")
    assert (end["code"], end["step"], newest(here.folder / "one")) == (75, 5, "step_5")
    assert "resumed at step 5" in here.train("one", *words, ranks=2)
    assert here.metrics("one") == worlds.metrics("fsdp")
    assert here.metrics("one", "eval/val_loss").keys() == worlds.metrics("fsdp", "eval/val_loss").keys()


# ---- launchers that die, and heal ----------------------------------------------------------------------------------

def test_a_worker_that_is_killed_is_restarted_and_the_run_heals_itself(here, worlds):
    process = lab.start("train.py", here.config("healed"), lab.HALF, "training.strategy=ddp", ranks=2,
                        torchrun=("--standalone", "--max-restarts=2"))
    run = here.folder / "healed"
    try:
        lab.wait_until((run / "checkpoints/step_5/manifest.json").exists, 60, 0.01)
        lab.send(lab.workers(process)[1], signal.SIGKILL)
        out, err = process.communicate(timeout=90)
    finally:
        lab.kill(process)
    assert process.returncode == 0 and re.search(r"resumed at step (5|10|15)\b", out + err), out + err
    shutil.copytree(worlds.folder / "ddp", here.folder / "ddp")
    here.same_end("healed", "ddp")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_two_agents_meet_by_c10d_and_train_as_one(here, worlds):
    """Two torchruns stand for two machines; as on two machines, neither shares the other's environment."""
    endpoint = f"127.0.0.1:{free_port()}"
    words = (here.config("agents"), lab.HALF, "training.strategy=ddp")
    torchrun = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=test")
    agents = [lab.start("train.py", *words, ranks=1, torchrun=torchrun) for _ in range(2)]
    try:
        told = [agent.communicate(timeout=120) for agent in agents]
    finally:
        for agent in agents:
            lab.kill(agent)
    assert [agent.returncode for agent in agents] == [0, 0], told
    shutil.copytree(worlds.folder / "ddp", here.folder / "ddp")
    here.same_end("agents", "ddp")


@pytest.mark.parametrize("words, name", [([], "slurm-7"), (["checkpointing.run_name=mine"], "mine")])
@pytest.mark.parametrize("code, requeued", [(75, True), (0, False), (1, False), (None, False)])
def test_the_slurm_script_requeues_what_was_preempted_and_nothing_else(tmp_path, code, requeued, words, name):
    """The real script in a real shell; srun and scontrol, which only a cluster has, are stand-ins that take notes."""
    runs = tmp_path / "elsewhere"
    end = runs / name / "exit.json"
    end.parent.mkdir(parents=True)
    end.write_text('{"code": 75}')  # of the start before, which was preempted
    told = f'{{"code": {code}, "step": 3}}'
    took_notes = f"echo \"$@\" > {tmp_path}/srun.txt; [ '{code}' = None ] || echo '{told}' > {end}; exit 1"
    for command, body in (("srun", took_notes),
                          ("scontrol", f'[ "$1" = show ] && echo "$3" || echo "$@" >> {tmp_path}/scontrol.txt')):
        (tmp_path / command).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / command).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
           "SLURM_JOB_NODELIST": "a"}
    options = [lab.write_config(tmp_path / "run.yaml", {"training": {"max_steps": 5}}), f"checkpointing.runs_dir={runs}"]
    done = subprocess.run(["bash", "slurm/train.sbatch", *options, *words],
                          cwd=lab.ROOT, env=env, check=False, timeout=60)
    assert done.returncode == 1, "srun's"
    assert (tmp_path / "scontrol.txt").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text().split() == ["requeue", "7"]
    given = [word for word in (tmp_path / "srun.txt").read_text().split() if "run_name=" in word]
    assert given == (words or ["checkpointing.run_name='slurm-7'"])
    assert load_config(options[0], given).checkpointing.run_name == name


def test_the_slurm_script_tells_a_mistake_in_the_options_before_it_starts_anything(tmp_path):
    done = subprocess.run(["bash", "slurm/train.sbatch", "config/demo.yaml", "training.lr=1"], cwd=lab.ROOT, capture_output=True,
                          text=True, timeout=60, check=False,
                          env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"})
    assert done.returncode == 2
    assert done.stderr.strip() == "error: training.lr: unknown key; did you mean training.optimization.lr?"


# ---- one run a folder ----------------------------------------------------------------------------------------------

def test_a_second_run_is_refused_with_host_and_pid_and_a_dead_ones_place_is_taken(here):
    script = here.folder / "slow.py"
    script.write_text(SLOW)
    first = lab.start(script, here.config("one"), *QUICK)
    try:
        lab.wait_until((here.folder / "one/metrics.jsonl").exists, 60)
        before = (here.folder / "one/metrics.jsonl").read_bytes()
        printed = here.train("one", *QUICK, code=2)
        assert f"process {first.pid} on {socket.gethostname()}" in printed and printed.count("\n") == 1, printed
        assert (here.folder / "one/metrics.jsonl").read_bytes().startswith(before) and first.poll() is None
    finally:
        lab.kill(first)
        first.communicate()
    assert (here.folder / "one/.lock").exists()
    here.train("one", *QUICK)
    assert not (here.folder / "one/.lock").exists() and end_of(here.folder / "one")["code"] == 0


@pytest.mark.parametrize("words", ["", "{", "[1]", '{"host": "x"}', '{"host": "x", "pid": 1, "born": "2"}'])
def test_a_lock_without_signs_of_life_is_taken_over(tmp_path, monkeypatch, words):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.1)
    (tmp_path / ".lock").write_text(words)
    lock = locks.RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_of_another_machine_that_is_alive_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.5)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(locks, "_machine", lambda: "elsewhere boot ns")
        other = locks.RunLock(tmp_path)
        other.acquire()
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on elsewhere"):
        locks.RunLock(tmp_path).acquire()
    other.release()


# ---- full disks ----------------------------------------------------------------------------------------------------

@pytest.fixture
def disk(tmp_path):
    """A function that mounts a real, small disk; needs the right to mount."""
    mounted = []

    def make(size, name="disk"):
        folder = tmp_path / name
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True,
                              check=False)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder
    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, leave=0):
    """Fill a disk but for `leave` bytes."""
    free = shutil.disk_usage(folder).free - leave
    with open(folder / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free)


@pytest.fixture(params=["seen before", "in the middle"])
def noticed(request, monkeypatch):
    """When a full disk is noticed: by asking for the free space, or, where that is not the whole truth, by writing."""
    if request.param == "in the middle":
        for module in (files, packing, parquet):
            monkeypatch.setattr(module, "require_room", lambda *args: None)
    return request.param


def test_a_run_that_cannot_checkpoint_stops_cleanly_and_says_how_much_it_needs(disk, dataset, monkeypatch, noticed):
    small = disk("4m")
    runs, save = lab.Lab(small, dataset), train.save

    def filling(state, services, due):
        if state.step == 10 and not (small / "filler").exists():
            services.saver.wait()
            fill(small, leave=60_000)
        save(state, services, due)
    monkeypatch.setattr(train, "save", filling)
    printed = runs.train("full", code=1)
    assert "step_10 cannot be written" in printed and "Traceback" not in printed, printed
    assert "MB free; make room" in printed or noticed == "in the middle"
    assert newest(small / "full") == "step_5" and list((small / "full").rglob(".staging*")) == []
    assert end_of(small / "full")["code"] == 1 and "cannot be written" in end_of(small / "full")["reason"]
    monkeypatch.undo()
    (small / "filler").unlink()
    assert "resumed at step 5" in runs.train("full")


def test_training_goes_on_where_only_a_snapshot_has_no_room(disk, dataset, monkeypatch):
    small = disk("6m")
    runs, save = lab.Lab(small, dataset), train.save

    def filling(state, services, due):
        if state.step == 10:
            services.saver.wait()
            before = small / "poor/checkpoints/step_5"
            need = sum(p.stat().st_size for p in before.rglob("*") if p.is_file() and "learning_dynamics" not in p.parts)
            fill(small, leave=int(1.1 * need) + 150_000)
        if state.step == 15:
            services.saver.wait()
            (small / "filler").unlink()
        save(state, services, due)
    monkeypatch.setattr(train, "save", filling)
    printed = runs.train("poor", "checkpointing.learning_dynamics.layer_suffixes=[q_proj,k_proj,v_proj,o_proj,w_0,w_1,w_2]")
    assert "going on without the snapshots of step_10" in printed
    held = {step: (small / f"poor/checkpoints/step_{step}/learning_dynamics").exists() for step in (5, 10, 15, 20)}
    assert held == {5: True, 10: False, 15: True, 20: True}


def test_metrics_that_found_no_room_are_written_when_there_is_some(disk, dataset, monkeypatch):
    small = disk("4m")
    runs, step = lab.Lab(small, dataset), train.train_step

    def filling(state, batch):
        if state.step == 1:  # what is left of a file's last page still takes a few lines
            lab.wait_until((small / "quiet/checkpoints/latest").exists, 20)
            fill(small)
        if state.step == 19:
            (small / "filler").unlink()
        step(state, batch)
    monkeypatch.setattr(train, "train_step", filling)
    printed = runs.train("quiet", *QUICK, "checkpointing.save_every_n_steps=20")
    assert printed.count("metrics.jsonl cannot be written (No space left on device)") == 1, "told once"
    assert list(runs.metrics("quiet")) == list(range(1, 21))


def test_metrics_that_found_no_room_are_in_the_next_checkpoint(disk, dataset, monkeypatch):
    small = disk("4m")
    runs, step = lab.Lab(small, dataset), train.train_step

    def filling(state, batch):
        step(state, batch)
        if state.step == 2:
            lab.wait_until((small / "quiet/checkpoints/latest").exists, 20)
            fill(small)
        if state.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)  # the line of step 10 comes before the checkpoint, and finds no room
    monkeypatch.setattr(train, "train_step", filling)
    save = train.save_before_ending
    monkeypatch.setattr(train, "save_before_ending", lambda *args: ((small / "filler").unlink(), save(*args)))
    runs.train("quiet", *QUICK, "checkpointing.save_every_n_steps=20", code=75)
    monkeypatch.undo()
    assert "resumed at step 10" in runs.train("quiet", *QUICK)
    assert list(runs.metrics("quiet")) == list(range(1, 21))


def test_a_disk_that_fills_just_after_a_checkpoint_is_no_failed_checkpoint(here, monkeypatch):
    def full(folder):
        if folder.name == "step_10":
            raise OSError(28, "No space left on device")
        mark(folder)
    mark = checkpoint.mark_latest
    monkeypatch.setattr(checkpoint, "mark_latest", full)
    assert "cannot be tidied (No space left on device)" in here.train("tidy")
    assert newest(here.folder / "tidy") == "step_20" and (here.folder / "tidy/checkpoints/step_10/manifest.json").exists()


def test_a_conversion_without_room_is_one_line_and_leaves_nothing(disk, tmp_path, noticed):
    from hub import parquet
    small = disk("300k")
    parquet.write_rows(tmp_path / "train-0.parquet", np.ones((2000, 129), np.int64))
    printed = lab.call("shards.py", "parquet", tmp_path / "train-0.parquet", "--out", small / "made", code=1)
    assert "needs 0.5 MB" in printed and "Traceback" not in printed and list(small.iterdir()) == []


# ---- ranks that hang, fail, or differ ---------------------------------------------------------------------------------

WAYWARD = """
import sys, time
from pathlib import Path
rank_1_only, how = sys.argv.pop(1), sys.argv.pop(1)
if "RANK" in __import__("os").environ and __import__("os").environ["RANK"] == "1":
    sys.path.insert(0, rank_1_only)
import checkpoint, config, data, train
from runtime import dist
from runtime.command import command
step = train.train_step

def fall_asleep_here(t, batch):
    if t.step == 3 and dist.rank() == 1 and how in ("hangs", "fails"):
        if how == "hangs":
            time.sleep(100)
        raise RuntimeError("the error of rank 1")
    step(t, batch)

train.train_step = fall_asleep_here
if how == "reads slowly" and dist.rank() == 1:
    read = data.BatchLoader._read
    data.BatchLoader._read = lambda loader, step: (time.sleep(2.2 if step in (4, 9) else 0), read(loader, step))[1]
if how == "bad data" and dist.rank() == 1:
    def read(loader, step):
        raise data.DataError("shard-00007 is damaged")
    data.BatchLoader._read = read
if how == "no room for the last checkpoint":
    def publish(folder, files, publish=checkpoint.publish):
        if folder.name == "step_20":
            raise checkpoint.CheckpointError("step_20 cannot be written: it needs 1 MB")
        publish(folder, files)
    checkpoint.publish = publish
if how == "cannot read" and dist.rank() == 1:  # as where the disk of runs/ is not shared
    def resume(*args):
        raise checkpoint.CheckpointError("checkpoint.pt: cannot be read")
    checkpoint.resume = resume
if how == "other words":
    sys.argv += [f"training.seed={dist.rank()}"]
if __name__ == "__main__":
    command(train.main)
"""


def wayward(here, how, rank_1_only, code=1, words=()):
    """A run of two ranks of which one behaves otherwise; (what it printed, its seconds)."""
    script, begun = here.folder / "wayward.py", time.monotonic()
    script.write_text(WAYWARD)
    printed = lab.run(script, rank_1_only, how, here.config("wayward"), lab.HALF, *words, *QUICK, ranks=2, code=code, timeout=90)
    return printed, time.monotonic() - begun


def test_a_rank_that_hangs_shows_where_and_takes_the_job_down(here):
    printed, seconds = wayward(here, "hangs", here.folder, words=("training.hang_timeout_minutes=0.2",))
    assert "Timeout (0:00:12)!" in printed and "fall_asleep_here" in printed and seconds < 60
    assert printed.index("fall_asleep_here") < printed.find("RuntimeError") or "RuntimeError" not in printed


def test_a_single_process_that_hangs_shows_where_too(here):
    script = here.folder / "asleep.py"
    script.write_text(SLOW.replace("0.3", "100"))
    printed = lab.run(script, here.config("asleep"), *QUICK, "training.hang_timeout_minutes=0.05", code=1, timeout=60)
    assert "Timeout (0:00:03)!" in printed and "asleep.py" in printed


def test_an_error_that_only_another_rank_meets_is_told(here):
    printed, _ = wayward(here, "cannot read", here.folder)
    assert "error: rank 1: checkpoint.pt: cannot be read" in printed


def test_a_rank_whose_data_are_late_is_waited_for_and_loses_no_batch(here, worlds):
    wayward(here, "reads slowly", here.folder, code=0, words=("training.strategy=ddp",))
    assert here.metrics("wayward") == worlds.metrics("ddp")


def test_an_error_of_one_rank_is_told_before_what_follows_from_it(here):
    printed, _ = wayward(here, "fails", here.folder)
    errors = re.findall(r"RuntimeError: (.*)", printed)
    assert errors[0] == "the error of rank 1", errors


def test_an_error_in_the_data_of_one_rank_is_told(here):
    printed, _ = wayward(here, "bad data", here.folder)
    assert printed.count("error: shard-00007 is damaged") == 1, printed
    assert end_of(here.folder / "wayward") == {"code": 2, "reason": "shard-00007 is damaged", "step": 0}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_end_together_where_the_last_checkpoint_cannot_be_written(here, strategy):
    printed, seconds = wayward(here, "no room for the last checkpoint", here.folder, words=(f"training.strategy={strategy}",))
    assert "error: step_20 cannot be written: it needs 1 MB" in printed and seconds < 60, printed
    assert end_of(here.folder / "wayward")["code"] == 1 and newest(here.folder / "wayward") == "step_15"


def test_ranks_with_other_options_are_refused(here):
    printed, _ = wayward(here, "other words", here.folder)
    assert "error: training.seed: is 1, 0 on rank 0 on rank 1; start all ranks with the same words" in printed
    assert not (here.folder / "wayward").exists()


def test_ranks_with_other_code_are_refused(here, tmp_path):
    other = tmp_path / "other"
    for room in machine.ROOMS:
        shutil.copytree(lab.ROOT / room, other / room)
    for path in lab.ROOT.glob("*.py"):
        shutil.copy(path, other)
    (other / "model.py").write_text((other / "model.py").read_text() + "\n# edited on one machine only\n")
    printed, _ = wayward(here, "code", other)
    assert "error: model.py: is other code on rank 1" in printed and not (here.folder / "wayward").exists()


# ---- elsewhere -----------------------------------------------------------------------------------------------------------

def test_a_run_that_was_moved_goes_on_where_it_is(here, worlds):
    worlds_at_10 = lab.Lab(worlds.folder, worlds.dataset)
    worlds_at_10.copy("single", "moved", step=10)
    shutil.move(worlds.folder / "moved", here.folder / "elsewhere")
    assert "resumed at step 10" in here.train("elsewhere")
    here.same_end("elsewhere", "undisturbed")


def test_a_run_that_may_not_be_written_is_read_all_the_same(here, disk):
    """On a disk mounted read-only, which stops root too."""
    folder = disk("8m", "archive")
    shutil.copytree(here.folder / "undisturbed", folder / "run")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    assert "val loss" in lab.call("evaluate.py", folder / "run", "evaluation.metrics=[val]")
    assert lab.call("sample.py", folder / "run", "--tokens", "4", "--prompt", "1 2 3")
    assert "--out" in lab.call("analyze.py", folder / "run", code=2)
    assert "measures of 5 steps" in lab.call("analyze.py", folder / "run", "--out", here.folder / "analysis")
    lab.call("analyze.py", "compare", folder / "run", here.folder / "undisturbed", "--out", here.folder / "compared")
    lab.call("export.py", "hf", folder / "run", here.folder / "exported")


def test_a_run_folder_that_cannot_be_written_is_one_line(here, disk):
    folder = disk("1m", "archive")
    (folder / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    (here.folder / "file").write_text("not a folder")
    for words in ((f"checkpointing.runs_dir={folder}", "checkpointing.run_name=run"),
                  (f"checkpointing.runs_dir={folder}", "checkpointing.run_name=new"), ("checkpointing.run_name=file",)):
        printed = here.train("unwritten", *words, code=2)
        assert printed.count("error: checkpointing.runs_dir: ") == 1 and "cannot be" in printed and "Traceback" not in printed


def test_no_file_of_a_run_is_a_link(worlds):
    assert not any(path.is_symlink() for path in worlds.folder.rglob("*"))


def test_votes_hold_without_a_group():
    assert dist.max_over_ranks(3, 0, True) == [3, 0, True]
