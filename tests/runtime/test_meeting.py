"""Ranks that meet through the launcher's store, again after restarts; and a sentence about those that are gone."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from torch.distributed import DistBackendError, PrefixStore, TCPStore

import lab
from config import UserError
from runtime import dist, meeting

SLOW = """
from runtime.command import command
import time
import train
step = train.train_step
train.train_step = lambda state, batch: (time.sleep(0.15), step(state, batch))
if __name__ == "__main__":
    command(train.main)
"""


@pytest.fixture
def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet_all(store, ranks, world, seconds=20.0):
    """{rank: the name that it met under, or its error} of ranks that come from threads."""
    told = {}

    def come(rank):
        mine = PrefixStore("x", TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False))
        try:
            told[rank] = meeting.meet(mine, rank, world, datetime.timedelta(seconds=seconds))
        except UserError as error:
            told[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_ranks_meet_and_meet_anew_however_often_each_was_started(store):
    names = [set(meet_all(store, [2, 0, 3, 1], 4).values()) for _ in range(3)]
    assert all(len(name) == 1 for name in names) and len(set.union(*names)) == 3


@pytest.mark.parametrize("early", [[0, 1], [1], [0], [0, 2]])
def test_who_came_and_died_is_not_waited_for(store, early):
    """Some were there and gave up; later all come, of whom the store still holds the tokens of the dead."""
    gave_up = meet_all(store, early, 3, seconds=0.5)
    assert all("did not meet within" in words for words in gave_up.values())
    assert len(set(meet_all(store, [0, 1, 2], 3).values())) == 1


def test_who_did_not_come_is_named(store):
    told = meet_all(store, [0, 1], 4, seconds=0.5)
    assert "ranks 0-3 of 4 did not come" in told[0] or "ranks 2-3 of 4 did not come" in told[0], told


def test_ranks_in_words():
    assert [meeting.named(ranks) for ranks in ([3], [0, 1, 2], [9, 0, 8, 1, 5])] == ["rank 3", "ranks 0-2", "ranks 0-1, 5, 8-9"]


def test_where_nobody_is_gone_the_librarys_own_words_are_told(store, monkeypatch):
    """NCCL says there what it wants: more of /dev/shm, another interface."""
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(store.port)), ("RANK", "0"), ("WORLD_SIZE", "1"),
                        ("TORCHELASTIC_USE_AGENT_STORE", "True")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "BEAT_SECONDS", 0.1)
    heartbeat = meeting.Heartbeat("x", 0, 1)
    monkeypatch.setattr(dist, "_heartbeat", heartbeat)
    with pytest.raises(meeting.Lost) as told, dist.naming_the_lost():
        raise DistBackendError("NCCL error, unhandled system error\nLast error:\nError while creating /dev/shm/nccl-x")
    heartbeat.close()
    assert str(told.value) == ("work between the ranks failed, though all of them are alive, since before the first step: "
                               "NCCL error, unhandled system error Last error: Error while creating /dev/shm/nccl-x")


KEEPER = """
import time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(100)
"""


def test_a_store_that_answers_no_more_is_said_and_not_waited_for(tmp_path, monkeypatch):
    """As on a machine whose network is cut: no connection is refused, and none answers."""
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER], stdout=subprocess.PIPE, text=True)
    try:
        port = keeper.stdout.readline().strip()
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("RANK", "1"), ("WORLD_SIZE", "2"),
                            ("TORCHELASTIC_USE_AGENT_STORE", "True")):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(meeting, "BEAT_SECONDS", 0.2)
        monkeypatch.setattr(meeting, "ANSWER_SECONDS", 1.0)
        heartbeat = meeting.Heartbeat("x", 1, 2)
        heartbeat.step = 7
        lab.send(keeper.pid, signal.SIGSTOP)
        begun = time.monotonic()
        said = str(heartbeat.lost("Connection reset"))
        assert time.monotonic() - begun < 10
        assert said == f"127.0.0.1:{port}, where the ranks meet, does not answer (its network or process is gone): nothing since step 7"
        heartbeat.close()
    finally:
        lab.send(keeper.pid, signal.SIGKILL)
        keeper.wait()


def test_a_place_where_nobody_meets_and_one_that_is_taken_are_said(monkeypatch, store):
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(UserError, match="127.0.0.1:1, where the ranks meet: rank 0 does not answer there"):
        meeting.connect(datetime.timedelta(seconds=1))
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match="its port is taken: give this job another MASTER_PORT"):
            meeting.connect(datetime.timedelta(seconds=1))


# ---- two agents ----------------------------------------------------------------------------------------------------

def agents(words, script, launchers):
    """Torchruns that stand for machines: neither shares the other's environment."""
    return [lab.start(script, *words, ranks=1, torchrun=launcher) for launcher in launchers]


def launchers(kind):
    port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port  # is free again at once
    dynamic = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--max-restarts=4")
    static = ("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}", "--max-restarts=4")
    return {"c10d": [("--nnodes=2", *dynamic)] * 2, "static": [(*static, f"--node-rank={node}") for node in range(2)]}[kind]


def newest_step(run):
    path = run / "metrics.jsonl"
    return path.read_text().count("train/loss") if path.exists() else 0


@pytest.mark.parametrize("kind, name", [("static", "healed"), ("c10d", "null")])
def test_a_run_on_two_agents_heals_after_kills_of_either_ones_worker(lab_of, worlds, kind, name):
    script = lab_of.folder / "slow.py"
    script.write_text(SLOW)
    words = (lab_of.config("healed"), lab.HALF, "training.strategy=ddp", f"checkpointing.run_name={name}")
    both = agents(words, script, launchers(kind))
    find = lambda: next((path.parent for path in lab_of.folder.glob("*/metrics.jsonl")), lab_of.folder / "none")  # noqa: E731
    try:
        for number, step in enumerate((6, 12)):
            lab.wait_until(lambda: newest_step(find()) >= step, 90, 0.01)
            lab.send(lab.workers(both[number])[0], signal.SIGKILL)
            time.sleep(0.5)
        told = [agent.communicate(timeout=120) for agent in both]
    finally:
        for agent in both:
            lab.kill(agent)
    assert [agent.returncode for agent in both] == [0, 0], told
    assert len(list(lab_of.folder.glob("*/metrics.jsonl"))) == 1
    assert len(re.findall(r"resumed at step", "".join(map("".join, told)))) == 2, told
    shutil.move(find(), lab_of.folder / "ended")
    shutil.copytree(worlds.folder / "ddp", lab_of.folder / "ddp")
    lab_of.same_end("ended", "ddp")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_named_and_nobody_stays_behind(lab_of, rank):
    script, run = lab_of.folder / "slow.py", lab_of.folder / "stopped"
    script.write_text(SLOW)
    process = lab.start(script, lab_of.config("stopped"), lab.HALF, "training.hang_timeout_minutes=0.1", ranks=2)
    try:
        lab.wait_until(lambda: newest_step(run) >= 3, 60, 0.01)
        everyone, begun = lab.descendants(process.pid), time.monotonic()
        lab.send(lab.workers(process)[rank], signal.SIGSTOP)
        out, err = process.communicate(timeout=130)
        lab.wait_until(lambda: not any(map(lab.alive, everyone)), timeout=5)
    finally:
        lab.kill(process)
    assert time.monotonic() - begun < 90
    sentence = re.search(rf"error: (?:rank 1: )?(rank {rank} on \S+: nothing since step \d+; start again .*)", err)
    assert sentence and process.returncode == 1, err
    end = json.loads((run / "exit.json").read_text())
    assert end["reason"] == sentence[1] and end["code"] == 1
    assert (run / "logs/train.log").read_text().splitlines()[-1].endswith(f"ended with code 1: {sentence[1]}")


@pytest.fixture
def lab_of(tmp_path, dataset):
    return lab.Lab(tmp_path, dataset)


APART = """
import os, sys
os.chdir(sys.argv.pop(1) + os.environ["RANK"])  # as on two machines whose disks are not the same
import train
from runtime import run_folder
from runtime.command import command
run_folder.SHARED_SECONDS = 0.5
if __name__ == "__main__":
    command(train.main)
"""


@pytest.fixture
def apart(tmp_path):
    """train(words ..., code): a run of two ranks, each in a folder of its own, of which rank 0's is disks/0."""
    script, config = tmp_path / "apart.py", tmp_path / "run.yaml"
    script.write_text(APART)
    (tmp_path / "disks").mkdir()
    for rank in "01":
        lab.make_dataset(tmp_path / "disks" / rank / "rows")
    lab.write_config(config, lab.tiny_tree("rows", "runs"))
    words = (f"{tmp_path}/disks/", config, lab.HALF)
    return tmp_path / "disks", lambda *more, code: lab.forked(script, *words, *more, ranks=2, code=code, timeout=60)


@pytest.mark.parametrize("split, key", [("train", "data.dataset.name"), ("val", "evaluation.metrics")])
def test_other_rows_on_one_machine_are_refused(apart, split, key):
    disks, train = apart
    shutil.rmtree(disks / "1/rows")
    other = lab.make_dataset(disks / "1/rows", seed=3)
    if split == "val":  # its training rows are the same
        shutil.rmtree(other / "train")
        shutil.copytree(disks / "0/rows/train", other / "train")
    said = train(code=2)
    assert f"error: {key}: rows/{split} holds other rows on " in said and "(rank 1) than on" in said, said
    assert list(disks.rglob("metrics.jsonl")) == []


def test_a_run_folder_that_the_machines_do_not_share_is_refused(apart):
    disks, train = apart
    assert "error: checkpointing.runs_dir: runs/run is another folder on " in train(code=2)
    assert list(disks.rglob("checkpoints")) == [] and list(disks.rglob("metrics.jsonl")) == []


def test_a_resume_by_a_machine_without_the_checkpoints_is_refused(apart):
    """The ranks come in another order: the run lies on what is now rank 1's disk."""
    disks, train = apart
    (disks / "1/runs").mkdir()
    (disks / "0/runs").symlink_to(disks / "1/runs")
    train(code=0)
    (disks / "0/runs").unlink()
    assert "error: checkpointing.runs_dir: runs/run is another folder on " in train(code=2)
    assert "step_20\n" == (disks / "1/runs/run/checkpoints/latest").read_text() and not list(disks.glob("0/runs/*/metrics.jsonl"))
