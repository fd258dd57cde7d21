"""Forks: a run that begins with another's whole state, and with what is changed on purpose."""

import json

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

import lab
from config import load_config
from hub.llama import plain_state
from instruments.pairs import pairs
from instruments.record import training_record
from relora import has_adapters

FORK = "training.fork_from={}/{}/checkpoints/step_10"
QUICK = ("evaluation.metrics=null", "checkpointing.learning_dynamics=null")


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """`whole` is ReLoRA, `full` is full-rank; both of 20 steps, checkpoints every 5, a merge due at 10."""
    found = lab.Lab(tmp_path_factory.mktemp("forks"), dataset)
    found.train("whole", *QUICK)
    found.train("full", *QUICK, relora=False)
    return found


def fork(runs, name, *words, source="whole", **options):
    return runs.train(name, *QUICK, FORK.format(runs.folder, source), *words, **options)


def told(runs, name):
    return json.loads((runs.folder / name / "fork.json").read_text())


@pytest.mark.parametrize("source", ["whole", "full"])
def test_a_fork_without_a_change_is_the_original_bit_for_bit(runs, source):
    out = fork(runs, f"same-{source}", source=source, relora=source == "whole")
    assert f"forked from {runs.folder}/{source}/checkpoints/step_10 at step 10; changed: nothing" in out
    for key in ("train/loss", "trainer/grad_norm", "trainer/learning_rate", "relora/update_norm"):
        first = 10 if "relora" in key else 11  # the merge that is due at 10 is the fork's
        original = {step: value for step, value in runs.metrics(source, key).items() if step >= first}
        assert runs.metrics(f"same-{source}", key) == original, key
    ours, theirs = (runs.state(name, 20) for name in (f"same-{source}", source))
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    assert ours["progress"] == theirs["progress"] and ours["data"] == theirs["data"]
    assert told(runs, f"same-{source}")["changes"] == {} and told(runs, f"same-{source}")["step"] == 10


def test_a_fork_is_resumed_and_forked_again(runs):
    """A fork of a fork, and one killed on the way, end as the original does."""
    fork(runs, "first", "training.stop_at_step=13")
    assert "resumed at step 13" in fork(runs, "first")
    assert "at step 15" in runs.train("second", *QUICK, f"training.fork_from={runs.folder}/first/checkpoints/step_15")
    for name in ("first", "second"):
        ours, theirs = runs.state(name, 20)["model"], runs.state("whole", 20)["model"]
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def moments_of(state, names):
    return {name: values for name, values in state["optimizer"].items() if name in names}


CHANGES = {  # name: (source, words, whether the weights are taken over as they are, what is begun anew)
    "rate": ("whole", ["training.optimization.lr=5e-3"], True, None),
    "schedule": ("whole", ["training.optimization.lr_scheduler=constant_with_warmup"], True, None),
    "horizon": ("whole", ["training.max_steps=40", "training.stop_at_step=12"], True, None),
    "seed": ("whole", ["training.seed=7"], True, None),
    "no-merge": ("whole", ["model.relora.reset_frequency=1000"], True, None),
    "no-reset": ("whole", ["model.relora.optimizer_reset.mode=none"], True, None),
    "dropout": ("whole", ["model.relora.lora_dropout=0"], True, None),
    "clip": ("whole", ["training.grad_clip=0.1"], True, None),
    "rank": ("whole", ["model.relora.r=8", "model.relora.lora_alpha=16"], False, "new ones begin at 0"),
    "scale": ("whole", ["model.relora.lora_alpha=4"], False, "new ones begin at 0"),
    "targets": ("whole", ["model.relora.target_modules=[attention]"], False, "new ones begin at 0"),
    "full-rank": ("whole", ["model.relora=null", "training.optimization.lr_scheduler=cosine_with_warmup"], False,
                  "train in full"),
    "optimizer": ("whole", ["training.optimization.optimizer=sgd"], True, "optimizer's state was begun anew"),
    "adam": ("whole", ["training.optimization.optimizer=adam"], True, None),
    "to-relora": ("full", [], False, None)}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_told_and_carries_over_what_it_can(runs, name):
    source, words, as_is, anew = CHANGES[name]
    out = fork(runs, name, *words, "training.stop_at_step=12", source=source)
    state, origin = runs.state(name, 10), runs.state(source, 10)
    cfg = load_config(runs.config(source, relora=source == "whole"))
    effective = [plain_state(s["model"], c.model) for s, c in (
        (state, load_config(runs.folder / name / "training_config.yaml")), (origin, cfg))]
    for key, tensor in effective[1].items():  # the function is the same
        torch.testing.assert_close(effective[0][key], tensor, rtol=1e-6, atol=1e-7)
    if as_is:
        assert all(torch.equal(state["model"][key], origin["model"][key]) for key in origin["model"])
    else:
        assert not has_adapters(state["model"])  # merged; adapters that are wanted begin with the next update
    kept = set(origin["optimizer"]) & set(state["optimizer"])
    assert "embedding_proj.weight" in kept or name == "optimizer"
    if name != "optimizer":
        assert all(torch.equal(state["optimizer"][key]["exp_avg"], origin["optimizer"][key]["exp_avg"]) for key in kept)
    changes = told(runs, name)["changes"]
    for word in words[:1]:
        key = word.partition("=")[0]
        assert any(found.startswith(key) for found in changes) and f"{key}" in out, (key, changes)
    assert bool(told(runs, name)["begun_anew"]) == (anew is not None) and (anew is None or anew in out)
    assert list(runs.metrics(name)) == [11, 12]


@pytest.mark.parametrize("words, complaint", [
    (["model.d_model=64"], "use model.d_model=32"), (["model.relora.lora_only=true"], "throws the weights"),
    (["data.dataloader.batch_size=16"], "is at row 80"), (["training.start_from=x"], "drop one of them")])
def test_what_cannot_be_carried_over_is_refused_by_name(runs, words, complaint):
    assert complaint in fork(runs, "refused", *words, code=2)
    assert not (runs.folder / "refused").exists()


def test_another_batch_size_goes_on_at_the_same_row_where_it_is_told_to(runs):
    out = fork(runs, "smaller", "data.dataloader.batch_size=4", code=2)
    assert "set data.dataloader.first_row=40 too" in out
    fork(runs, "smaller", "data.dataloader.batch_size=4", "data.dataloader.first_row=40", "training.stop_at_step=12")
    assert runs.state("smaller", 10)["data"]["next_row"] == runs.state("whole", 10)["data"]["next_row"] == 80


def test_a_source_that_cannot_be_had_is_told(runs, tmp_path):
    assert "holds no training state" in runs.train("nothing", *QUICK, f"training.fork_from={tmp_path}", code=2)
    runs.copy("whole", "spoilt", step=10)
    (runs.folder / "spoilt/checkpoints/step_10/training_state/checkpoint.pt").write_bytes(b"x")
    assert "instead of" in runs.train("nothing", *QUICK, f"training.fork_from={runs.folder}/spoilt/checkpoints/step_10", code=2)


def test_other_data_are_refused(runs, tmp_path):
    other = lab.make_dataset(tmp_path / "other", seed=3)
    assert "holds other tokens" in fork(runs, "other", f"data.dataset.name={other}", code=2)


# ---- pairs ---------------------------------------------------------------------------------------------------------

def test_runs_that_share_an_ancestor_are_compared_on_the_same_batches(runs):
    some = ("evaluation.metrics=null", "checkpointing.learning_dynamics.max_rows=2", "checkpointing.learning_dynamics.eval_data=null")
    runs.train("origin", *some)
    for name, source, step, lr in (("fast", "origin", 10, 2e-2), ("slow", "origin", 5, 5e-3), ("child", "fast", 15, 1e-2)):
        runs.train(name, *some, f"training.fork_from={runs.folder}/{source}/checkpoints/step_{step}",
                   f"training.optimization.lr={lr}")
    runs.train("other", *some, "data.dataloader.first_row=8")
    paths = {name: runs.folder / name for name in ("origin", "fast", "slow", "child", "other")}
    configs = {name: yaml.safe_load((path / "training_config.yaml").read_text()) for name, path in paths.items()}
    found = {pair.names: pair for pair in pairs(paths, configs, {name: training_record(path) for name, path in paths.items()})}
    assert {names: pair.parted for names, pair in found.items()} == {
        ("fast", "origin"): 10, ("slow", "origin"): 5, ("child", "origin"): 10, ("slow", "fast"): 5, ("child", "fast"): 15,
        ("child", "slow"): 5}
    losses = {name: runs.metrics(name) for name in paths}
    a, b = ([losses[name][step] for step in range(11, 21)] for name in ("fast", "origin"))
    whole = found["fast", "origin"].whole
    assert whole.mean == pytest.approx(np.mean(np.subtract(a, b))) and whole.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert [step for step, _ in found["fast", "origin"].band] == [12, 14, 16, 18, 20]
    assert found["fast", "origin"].band[0][1].mean == pytest.approx((a[0] - b[0] + a[1] - b[1]) / 2)
    said = lab.call("analyze.py", "compare", paths["origin"], paths["fast"], "--out", runs.folder / "compared")
    assert "fast - origin, the same batches since step 10: " in said and (runs.folder / "compared/figures/paired.png").exists()
    assert "fast - origin, the same batches since step 10: " in (runs.folder / "compared/report.html").read_text()
    assert [line.split()[0] for line in said.splitlines()[-5:-2]] == ["run", "origin", "fast"]
