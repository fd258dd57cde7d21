"""Replay: any step of a run again, bit for bit; and what it refuses."""

import json
import random
import shutil

import pytest
import torch

import lab
import replay
from checkpoint import verify
from config import ConfigError
from instruments.snapshots import Snapshots

SPARSE = ("checkpointing.save_every_n_steps=10",)
KINDS = [(split, kind) for split in ("train", "val") for kind in ("weights", "activations", "gradients")]


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """`dense` keeps every step, `sparse` every tenth; merges every 5, with dropout; `warm` begins full-rank."""
    found = lab.Lab(tmp_path_factory.mktemp("replay"), dataset)
    for name, words in (("", ()), ("warm-", ("model.relora.warm_start_steps=7",))):
        found.train(f"{name}dense", "checkpointing.save_every_n_steps=1", *words)
        found.train(f"{name}sparse", *SPARSE, *words)
    return found


def again(runs, name, steps, *words, **options):
    return lab.call("replay.py", runs.folder / name, "--steps", steps, *words, **options)


def same_snapshots(runs, name, other, steps):
    one, two = (Snapshots(runs.folder / run) for run in (name, other))
    for step in steps:
        for split, kind in KINDS:
            found, expected = one.load(step, split, kind)[1], two.load(step, split, kind)[1]
            assert found.keys() == expected.keys() and found, (step, kind)
            assert [key for key in found if not torch.equal(found[key], expected[key])] == [], (step, kind)


@pytest.mark.parametrize("kind", ["", "warm-"])
def test_steps_chosen_at_random_are_those_of_a_run_that_kept_them(runs, kind):
    shutil.copytree(runs.folder / f"{kind}sparse", runs.folder / f"{kind}looked-at")
    steps = sorted(random.Random(kind).sample([s for s in range(1, 20) if s != 10], 4))
    before = {path: path.read_bytes() for path in (runs.folder / f"{kind}looked-at").rglob("*") if path.is_file()}
    out = again(runs, f"{kind}looked-at", ",".join(map(str, steps)))
    assert "4 steps replayed" in out and "equal bit for bit" in out
    same_snapshots(runs, f"{kind}looked-at", f"{kind}dense", steps)
    for step in steps:
        folder = runs.folder / f"{kind}looked-at/checkpoints/step_{step}"
        proof = json.loads((folder / "replay.json").read_text())
        assert proof["processes"] == 1 and proof["largest_difference"] == 0 and proof["losses_compared"] > 0
        assert not (folder / "training_state").exists() and verify(folder)
        theirs = runs.folder / f"{kind}dense/checkpoints/step_{step}/model.safetensors"
        assert (folder / "model.safetensors").read_bytes() == theirs.read_bytes()
    for path, content in before.items():
        assert path.read_bytes() == content, path  # nothing that was there is touched


def test_two_processes_replay_what_one_has_trained(runs):
    shutil.copytree(runs.folder / "sparse", runs.folder / "two")
    out = lab.forked("replay.py", runs.folder / "two", "--steps", "3,12", ranks=2)
    assert "of their size from those that the run recorded" in out
    one, two = (Snapshots(runs.folder / run) for run in ("two", "dense"))
    for step in (3, 12):
        for key, tensor in one.load(step, "train", "weights")[1].items():
            torch.testing.assert_close(tensor, two.load(step, "train", "weights")[1][key], rtol=1e-4, atol=1e-5)


def test_called_again_it_makes_what_is_missing(runs):
    shutil.copytree(runs.folder / "sparse", runs.folder / "again")
    again(runs, "again", "3..4")
    times = {step: (runs.folder / f"again/checkpoints/step_{step}/manifest.json").stat().st_mtime_ns for step in (3, 4)}
    out = again(runs, "again", "3..6")
    assert "2 of 4 steps hold their snapshots already" in out and "2 steps replayed" in out
    for step, time in times.items():
        assert (runs.folder / f"again/checkpoints/step_{step}/manifest.json").stat().st_mtime_ns == time
    same_snapshots(runs, "again", "dense", range(3, 7))


def test_evaluations_and_probes(runs, tmp_path):
    shutil.copytree(runs.folder / "sparse", runs.folder / "probed")
    probe = tmp_path / "norm_of_w2.py"
    probe.write_text("def probe(model, batch):\n"
                     "    model(batch[:, :-1], batch[:, 1:]).backward()\n"
                     "    return float(model.layers[0].swiglu.w_2.lora_B.grad.norm()), batch.shape\n")
    again(runs, "probed", "6,7", "--probe", probe, "--eval")
    found = [torch.load(runs.folder / f"probed/probes/norm_of_w2/step_{step}.pt") for step in (6, 7)]
    assert all(norm > 0 and tuple(shape) == (8, 17) for norm, shape in found)
    assert not (runs.folder / "probed/checkpoints/step_6").exists()
    result = json.loads((runs.folder / "probed/eval_results/step_6.json").read_text())["val"]["loss"]
    assert result == runs.metrics("dense", "eval/val_loss")[6]
    assert 6 not in runs.metrics("probed", "eval/val_loss")  # the record is not touched
    manifest = (runs.folder / "probed/checkpoints/step_10/manifest.json").read_bytes()
    again(runs, "probed", "10,11", "--eval")  # where a snapshot is already, it stays
    assert (runs.folder / "probed/checkpoints/step_10/manifest.json").read_bytes() == manifest
    same_snapshots(runs, "probed", "dense", [11])
    assert "no function probe" in again(runs, "probed", "6", "--probe", lab.ROOT / "sample.py", code=2)


def test_a_damaged_state_gives_way_to_an_older_one(runs):
    shutil.copytree(runs.folder / "sparse", runs.folder / "damaged")
    (runs.folder / "damaged/checkpoints/step_10/training_state/checkpoint.pt").write_bytes(b"x")
    assert "an older step is taken" in again(runs, "damaged", "12")
    same_snapshots(runs, "damaged", "dense", [12])


def test_a_run_whose_data_or_course_changed_is_refused(runs, tmp_path):
    moved = lab.make_dataset(tmp_path / "data")
    found = lab.Lab(tmp_path, moved)
    found.train("run", *SPARSE)
    shutil.rmtree(moved)
    lab.make_dataset(moved, seed=5)
    assert "other tokens" in lab.call("replay.py", tmp_path / "run", "--steps", "3", code=2)
    shutil.copytree(runs.folder / "sparse", runs.folder / "strayed")
    record = runs.folder / "strayed/metrics.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    record.write_text("".join(json.dumps(line | ({"train/loss": 9.0} if line["step"] == 12 and "train/loss" in line else {})) + "\n"
                              for line in lines))
    assert "this is not its course" in again(runs, "strayed", "11..13", code=1)
    assert (runs.folder / "strayed/checkpoints/step_11").exists() and not (runs.folder / "strayed/checkpoints/step_13").exists()


@pytest.mark.parametrize("steps, complaint", [
    ("21", "has come to step 20"), ("x", "neither a step nor a range"), ("7..3", "no range that goes up"), ("", "neither"),
    ("0..9999999", "a million")])
def test_steps_that_make_no_sense_are_refused(runs, steps, complaint):
    assert complaint in again(runs, "sparse", steps, code=2)


def test_steps_are_read_from_numbers_and_ranges():
    assert replay.read_steps("3,5,7..9,5") == [3, 5, 7, 8, 9]
    with pytest.raises(ConfigError):
        replay.read_steps("3,,5")


def test_a_run_that_is_being_trained_is_left_alone(runs):
    lock = runs.folder / "dense/.lock"
    other = replay.locks.RunLock(runs.folder / "dense")
    other.acquire()
    try:
        assert "in use by process" in again(runs, "dense", "3", code=2)
    finally:
        other.release()
    assert not lock.exists() and "no such" not in again(runs, "dense", "3")
    assert "not a run folder" in lab.call("replay.py", runs.folder / "nowhere", "--steps", "3", code=2)
