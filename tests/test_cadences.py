"""Checkpoints, snapshots and evaluations at steps of their own; and what a kill between them costs."""

import os
import signal

import pytest
import torch

import lab
import train
from checkpoint import verify
from config import ConfigError, config_from_dict
from instruments.snapshots import Snapshots

DENSE = "checkpointing.learning_dynamics.steps"
OWN = (f"{DENSE}=log", "evaluation.every_n_steps=4", "checkpointing.save_every_n_steps=8", "training.stop_at_step=18")


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """`dense` has cadences of its own, `plain` has none and saves every step's snapshots with a checkpoint."""
    found = lab.Lab(tmp_path_factory.mktemp("cadences"), dataset)
    found.train("dense", *OWN)
    found.train("plain", "checkpointing.save_every_n_steps=1", "training.stop_at_step=18")
    return found


def due(*words):
    cfg = config_from_dict(lab.tiny_tree("corpora/x", "runs"), words)
    steps = [(step, cfg.due(step)) for step in range(cfg.last_step + 1)]
    return [[step for step, found in steps if found[kind]] for kind in range(3)]


def test_each_kind_is_due_at_steps_of_its_own():
    assert due() == [[0, 5, 10, 15, 20]] * 3
    assert due(*OWN) == [[0, 8, 16, 18], [0, 4, 8, 12, 16, 18], [0, 1, 2, 4, 8, 16, 18]]
    assert due(f"{DENSE}=[3, 7]")[2] == [0, 3, 5, 7, 10, 15, 20]
    assert due("checkpointing.learning_dynamics=null")[2] == []


def test_steps_are_a_list_or_log_and_those_never_reached_are_said(runs):
    for words, complaint in ((f"{DENSE}=lin", "log"), (f"{DENSE}=[-1]", "negative"), (f"{DENSE}=[a]", "whole number")):
        with pytest.raises(ConfigError, match=complaint):
            due(words)
    assert "30 is never reached" in runs.train("late", f"{DENSE}=[30]", "training.stop_at_step=1")


def test_a_step_of_snapshots_alone_is_whole_and_holds_no_training_state(runs):
    folder = runs.folder / "dense/checkpoints"
    assert sorted(int(path.name[5:]) for path in folder.glob("step_*")) == [0, 1, 2, 4, 8, 16, 18]
    for step in (1, 2, 4):
        names = lab.checkpoint_names(folder / f"step_{step}")
        assert "model.safetensors" in names and "learning_dynamics/train_weights.pt" in names
        assert not any(name.startswith("training_state") for name in names)
    assert list(runs.metrics("dense", "eval/val_loss")) == [0, 4, 8, 12, 16, 18]


def test_what_is_looked_at_in_between_is_what_a_checkpoint_there_would_hold_and_changes_nothing(runs):
    assert runs.metrics("dense") == runs.metrics("plain")
    dense, plain = (Snapshots(runs.folder / name) for name in ("dense", "plain"))
    for step in (1, 2, 4, 8):
        for split in ("train", "val"):
            for kind in ("weights", "activations", "gradients"):
                found, expected = dense.load(step, split, kind)[1], plain.load(step, split, kind)[1]
                assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        paths = [runs.folder / run / f"checkpoints/step_4/{name}" for run in ("dense", "plain")]
        assert paths[0].read_bytes() == paths[1].read_bytes(), name


def test_a_run_killed_between_makes_its_snapshots_again(runs):
    """It goes on from the training state before them, without a word of what is none."""
    runs.copy("dense", "killed", step=4)
    before = (runs.folder / "killed/checkpoints/step_4/manifest.json").stat().st_mtime_ns
    out = runs.train("killed", *OWN)
    assert "resumed at step 0" in out and "holds no training state" not in out
    assert runs.metrics("killed") == runs.metrics("dense") and not list(runs.folder.glob("killed/**/*aside*"))
    assert (runs.folder / "killed/checkpoints/step_4/manifest.json").stat().st_mtime_ns != before
    for step in (1, 2, 4):
        assert lab.checkpoint_names(runs.folder / f"killed/checkpoints/step_{step}") == \
            lab.checkpoint_names(runs.folder / f"dense/checkpoints/step_{step}")


def test_a_run_stopped_at_a_step_of_snapshots_goes_on_from_it(runs, monkeypatch):
    """The training state is added to what is there, of which nothing is lost."""
    step = train.train_step

    def stopped(state, batch):
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batch)
    monkeypatch.setattr(train, "train_step", stopped)
    runs.train("stopped", *OWN, code=75)
    monkeypatch.undo()
    folder = runs.folder / "stopped/checkpoints/step_4"
    assert lab.checkpoint_names(folder) == lab.checkpoint_names(runs.folder / "dense/checkpoints/step_8")
    verify(folder)
    assert "resumed at step 4" in runs.train("stopped", *OWN)
    assert runs.metrics("stopped") == runs.metrics("dense")


def test_pruning_leaves_them_alone(runs):
    runs.train("pruned", *OWN, "checkpointing.keep_training_states=1")
    holders = [path.parent.name for path in (runs.folder / "pruned/checkpoints").glob("step_*/training_state")]
    assert holders == ["step_18"] and len(Snapshots(runs.folder / "pruned").folders) == 7


def test_the_first_row_shifts_the_data_and_is_fixed(runs):
    runs.train("shifted", "data.dataloader.first_row=8", "training.stop_at_step=5")
    runs.train("unshifted", "training.stop_at_step=5")
    rows = [Snapshots(runs.folder / name).folders[0] for name in ("shifted", "unshifted")]
    data = [torch.load(path / "learning_dynamics/train_data.pt")["input_ids"] for path in rows]
    assert not torch.equal(*data) and runs.metrics("shifted") != runs.metrics("unshifted")
    later = torch.load(runs.folder / "plain/checkpoints/step_1/learning_dynamics/train_data.pt")["input_ids"]
    assert torch.equal(data[0], later)
    assert "first_row: 8 -> 0" in runs.train("shifted", "training.stop_at_step=6", code=2)


def test_rows_of_val_can_be_left_to_another_purpose(runs):
    """The mean of both parts is that of the whole."""
    parts = [("first", "evaluation.val.max_rows=4"), ("rest", "evaluation.val.skip_rows=4")]
    whole = runs.metrics("plain", "eval/val_loss")[0]
    found = []
    for name, word in parts:
        runs.train(name, word, "training.stop_at_step=1", "checkpointing.learning_dynamics=null")
        found.append(runs.metrics(name, "eval/val_loss")[0])
    assert (4 * found[0] + 8 * found[1]) / 12 == pytest.approx(whole, rel=1e-6) and found[0] != found[1]
    assert "skip_rows" in runs.train("none", "evaluation.val.skip_rows=12", code=2)
