"""The record of a run: what a disk lost is noticed, kept and said; nothing is written through a planted link."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

import lab
from config import CheckpointingConfig, MonitoringConfig, UserError
from runtime import files
from runtime.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(CheckpointingConfig(runs_dir=str(tmp_path), run_name="run"), MonitoringConfig(), {})
    made.open()
    yield made
    made._lock.release()


def lines_of(folder):
    return [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]


def record(folder, steps):
    for step in steps:
        folder.record({"step": step, "train/loss": 1 / (1 + step)})


def test_a_record_is_cut_to_what_the_checkpoint_counted_and_its_evaluation(folder):
    record(folder, range(1, 6))
    counted = folder.sync_metrics()
    before = folder.metrics_path.read_bytes()
    assert counted == {"metrics_bytes": len(before), "metrics_sha256": hashlib.sha256(before).hexdigest()}
    folder.record({"step": 5, "eval/val_loss": 2.0})
    folder.record({"step": 5, "relora/reset_count": 1})
    record(folder, range(6, 9))
    with open(folder.metrics_path, "a") as file:
        file.write('{"step": 9, "train/lo')  # half written
    assert folder.rewind_metrics(5, counted["metrics_bytes"], counted["metrics_sha256"])
    assert lines_of(folder)[-1] == {"step": 5, "eval/val_loss": 2.0} and len(lines_of(folder)) == 6
    assert folder.rewind_metrics(5, counted["metrics_bytes"], counted["metrics_sha256"]) and len(lines_of(folder)) == 6
    assert not list(folder.path.glob("*.aside-*"))


@pytest.mark.parametrize("damage, left", [
    (lambda text: text[:-40], [1, 2, 3, 4]), (lambda text: text[:60] + b"\0" * 30 + text[90:], [1, 4, 5]),
    (lambda text: b"", []), (lambda text: text.replace(b"\n", b"", 1), [3, 4, 5])],
    ids=["shorter", "NULs", "gone", "glued lines"])
def test_a_record_that_a_disk_spoilt_is_kept_aside_and_said(folder, capsys, damage, left):
    record(folder, range(1, 6))
    counted = folder.sync_metrics()
    spoilt = damage(folder.metrics_path.read_bytes())
    folder.metrics_path.write_bytes(spoilt)
    folder.rewind_metrics(5, counted["metrics_bytes"], counted["metrics_sha256"])
    assert [line["step"] for line in lines_of(folder)] == left
    printed = capsys.readouterr().out
    assert "is not what the checkpoint of step 5 counted on" in printed and f"{len(left)} of its lines taken over" in printed
    if spoilt:
        assert (folder.path / "metrics.jsonl.aside-1").read_bytes() == spoilt


def test_a_checkpoint_of_an_earlier_version_has_no_checksum_of_the_record(folder):
    record(folder, range(1, 4))
    size = folder.sync_metrics()["metrics_bytes"]
    record(folder, range(4, 6))
    folder.rewind_metrics(3, size)
    assert [line["step"] for line in lines_of(folder)] == [1, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/mem opens, and its first byte is an I/O error")
def test_a_record_that_the_disk_does_not_give_is_tried_again_and_named(folder, monkeypatch):
    monkeypatch.setattr("runtime.files.PAUSES", (0.01,))
    folder.metrics_path.symlink_to("/proc/self/mem")
    for read in (lambda: folder.rewind_metrics(3, 10), lambda: folder.check_no_record(5)):
        with pytest.raises(files.Unreadable, match="metrics.jsonl: cannot be read .Input/output error."):
            read()
    assert folder.metrics_path.is_symlink()


@pytest.mark.parametrize("name", ["metrics.jsonl", "logs/train.log"])
def test_a_planted_link_is_refused_and_what_it_leads_to_stays(dataset, tmp_path, name):
    runs = lab.Lab(tmp_path, dataset)
    runs.train("run", "training.stop_at_step=2")
    (tmp_path / "precious").write_text("theirs")
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    printed = runs.train("run", code=2)
    assert f"{name}: is a link to {tmp_path}/precious" in printed and (tmp_path / "precious").read_text() == "theirs"


@pytest.mark.parametrize("name", ["logs", "eval_results", "checkpoints", "tensorboard"])
def test_a_planted_folder_is_refused_before_anything_in_it_changes(folder, tmp_path, name):
    (tmp_path / "mine/.staging-step_1@elsewhere-1").mkdir(parents=True)
    (tmp_path / "mine/train.log").write_text("mine")
    shutil.rmtree(folder.path / name, ignore_errors=True)
    (folder.path / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=f"{name}: is a link to {tmp_path}/mine"):
        folder.lock()
    assert (tmp_path / "mine/train.log").read_text() == "mine" and len(list((tmp_path / "mine").iterdir())) == 2


def test_a_users_own_links_go_on_working(dataset, tmp_path):
    (tmp_path / "big disk").mkdir()
    (tmp_path / "data").symlink_to(dataset)
    (tmp_path / "runs").symlink_to(tmp_path / "big disk")
    runs = lab.Lab(tmp_path / "runs", tmp_path / "data")
    runs.train("run", "training.stop_at_step=2")
    assert "resumed at step 2" in runs.train("run", "training.stop_at_step=3")
    assert (tmp_path / "big disk/run/checkpoints/step_3").is_dir() and os.path.islink(tmp_path / "runs")


def test_what_killed_processes_left_half_written_goes_and_what_is_being_written_stays(folder, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = files.host_name()
    left = [folder.path / f".staging-metrics.jsonl@{host}-{dead.pid}",
            folder.path / f"checkpoints/step_5/.staging-more@{host}-{dead.pid}",
            folder.path / "eval_results/.staging-step_5.json@elsewhere-7"]
    at_work = [folder.path / f"eval_results/.staging-step_9.json@{host}-{os.getpid()}",
               folder.path / "analysis/.staging-x@elsewhere-8"]
    for path in (*left, *at_work):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if "more" in path.name else path.touch()
    os.utime(left[2], (1, 1))
    folder.open()
    assert [path.exists() for path in left] == [False] * 3 and all(path.exists() for path in at_work)
