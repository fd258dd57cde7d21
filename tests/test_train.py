"""Whole runs, as a user starts them: the same run on any ranks, merges, warm starts, optimizers, refusals."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

import checkpoint
import lab
import train
from config import ConfigError, check_strategy, config_from_dict, load_config
from data import TokenDataset
from model import PicoDecoder
from runtime import wrap

QUICK = ("evaluation.metrics=null", "checkpointing.learning_dynamics=null")
BARE = (*QUICK, "checkpointing.save_every_n_steps=1000")
DDP, FSDP = (("training.strategy=ddp", lab.HALF), ("training.strategy=fsdp", lab.HALF))
SHORT = "training.stop_at_step=10"
WARM = "model.relora.warm_start_steps=6"

BROKEN_MERGE = """
from runtime.command import command
import train
from runtime import dist
from relora import ReLoRALinear
ReLoRALinear.merged_delta = lambda layer: 0.5 * layer.delta_weight()  # what is merged is half of what forward adds
command(train.main)
"""
NAN_ON_RANK_1 = """
import hashlib, json, math, os, sys
import torch
import train
from runtime import dist
from config import load_config
from model import PicoDecoder

class SpoilsGradients(torch.autograd.Function):
    forward = staticmethod(lambda ctx, loss: loss.clone())
    backward = staticmethod(lambda ctx, gradient: gradient * math.inf)

forward, calls, spoil = PicoDecoder.forward, 0, None

def broken(model, ids, labels=None, **options):
    global calls
    calls += model.training
    loss = forward(model, ids, labels, **options)
    return spoil(loss) if model.training and calls == 13 and os.environ["RANK"] == "1" else loss  # in update 7

loop = train.loop

def checked(t, *others):
    loop(t, *others)
    weights = [dist.full_tensor(p.detach()) for p in t.model.parameters()]
    assert all(w.isfinite().all() for w in weights), "weights are not finite"
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest()
    assert len(set(dist.all_gather_object(digest))) == 1, "weights differ between the ranks"

PicoDecoder.forward, train.loop = broken, checked
with dist.session(torch.device("cpu")) as device:
    for path, *words in json.loads(sys.argv[1]):
        calls, spoil = 0, SpoilsGradients.apply if "gradient" in path else lambda loss: loss * math.nan
        train.train(load_config(path, words), device)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory, dataset):
    return lab.Lab(tmp_path_factory.mktemp("here"), dataset)


@pytest.fixture(scope="module")
def warm(here):
    here.train("warm", WARM)
    return here


@pytest.fixture(scope="module")
def pair(worlds):
    """More runs on two ranks beside those of `worlds`, under one torchrun."""
    others = [("single", "ddp"), ("single", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")]
    for before, after in others:
        worlds.copy(before, f"{before}-to-{after}", 10)
    printed = worlds.train_in_turn(
        *((f"{before}-to-{after}", *(DDP if after == "ddp" else FSDP), *BARE) for before, after in others),
        ("fsdp-muon", *FSDP, *BARE, SHORT, "training.optimization.optimizer=muon"),
        ("ddp-bare", *DDP, *BARE), ("ddp-warm", *DDP, *BARE, WARM),
        *(("ddp-warm-" + stop, *DDP, *QUICK, WARM, *words) for stop in ("5", "10")
          for words in ([f"training.stop_at_step={stop}"], [])), ranks=2)
    assert printed.count("resumed at step 10") == 5 and printed.count("resumed at step 5") == 1
    return worlds


def close(found, expected, **tolerance):
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()), **tolerance)


def falls(losses, by=0.5):
    assert sum(list(losses.values())[-3:]) / 3 < losses[1] - by


# ---- what is derived from a step ----------------------------------------------------------------------------------

KILLED = """
import os, signal
import evaluate, train
from runtime.command import command
run = evaluate.run_evaluators

def killed(evaluators, model, prefix=""):
    if prefix == "step 20: ":
        os.kill(os.getpid(), signal.SIGKILL)
    return run(evaluators, model, prefix)

evaluate.run_evaluators = killed
command(train.main)
"""


def test_a_kill_inside_an_evaluation_costs_the_evaluation_alone(worlds):
    """At every start again: the training state was safe first, and what is missing is made at the next one."""
    script = worlds.folder / "killed.py"
    script.write_text(KILLED)
    for _ in range(2):
        lab.run(script, worlds.config("evaluated"), code=-9)
        assert worlds.state("evaluated", 20)["step"] == 20
    assert not (worlds.folder / "evaluated/eval_results/step_20.json").exists()
    printed = worlds.train("evaluated")
    assert "resumed at step 20" in printed and "step 20: val loss" in printed
    worlds.same_end("evaluated", "single")
    for name in ("train_activations", "val_gradients"):
        found, expected = (torch.load(worlds.folder / run / f"checkpoints/step_20/learning_dynamics/{name}.pt")
                           for run in ("evaluated", "single"))
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_an_evaluation_without_memory_says_what_to_lower_and_training_goes_on(worlds, monkeypatch):
    def no_memory(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    monkeypatch.setattr("evaluate.losses_of", no_memory)
    printed = worlds.train("poor")
    assert "warning: step 5: val is left out: rank 0 ran out of memory; lower evaluation.val.batch_size" in printed
    assert worlds.metrics("poor") == worlds.metrics("single") and not worlds.metrics("poor", "eval/val_loss")


def test_training_without_memory_says_which_micro_batch_needs_less(worlds, monkeypatch):
    def no_memory(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    monkeypatch.setattr(train, "accumulate", no_memory)
    printed = worlds.train("out-of-memory", code=1)
    assert "error: out of memory with micro-batches of 2 rows; use training.micro_batch_size=1" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("words, told", [
    (("training.stop_at_step=12",), "is past the last step of this configuration, 12: nothing is left to train"),
    (("training.grad_clip=0.5",), "training.grad_clip: None -> 0.5 bends the course of the run from here on"),
    (("training.optimization.gradient_accumulation_steps=2",), "micro-batches of 2 rows -> 4: dropout is drawn for each"),
    (("model.fast_paths=false",), "model.fast_paths: True -> False changes the rounding")])
def test_what_a_resumed_run_changes_is_said(worlds, words, told):
    name = f"changed-{words[0].partition('=')[0]}"
    worlds.copy("single", name, 20 if "past" in told else 15)
    printed = worlds.train(name, *words, *(() if "stop" in words[0] else ("training.stop_at_step=16",)))
    assert told in printed or ("fast_paths" in told and not lab.FAST_PATHS)


def test_one_of_two_equal_commands_trains_and_the_other_is_refused_and_harms_nothing(worlds):
    for number in range(3):
        name = f"twice-{number}"
        both = [lab.start("train.py", worlds.config(name)) for _ in range(2)]
        ends = [(process.communicate(timeout=120), process.returncode) for process in both]
        assert sorted(code for _, code in ends) == [0, 2], ends
        refused = next(err for (_, err), code in ends if code == 2)
        assert "is in use by process" in refused or "another process has just made" in refused
        worlds.same_end(name, "single")


def test_runs_without_a_name_begun_in_the_same_second_are_two(worlds):
    words = [worlds.config("nameless"), "checkpointing.run_name=null", "training.stop_at_step=1",
             f"checkpointing.runs_dir={worlds.folder}/nameless-runs"]
    both = [lab.start("train.py", *words) for _ in range(2)]
    assert [(process.communicate(timeout=120), process.returncode)[1] for process in both] == [0, 0]
    assert len(list((worlds.folder / "nameless-runs").iterdir())) == 2


# ---- the same run on any ranks -------------------------------------------------------------------------------

@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_does(worlds, strategy):
    assert list(worlds.metrics(strategy)) == list(range(1, 21))
    close(worlds.metrics(strategy), worlds.metrics("single"), abs=1e-4)
    close(worlds.metrics(strategy, "trainer/grad_norm"), worlds.metrics("single", "trainer/grad_norm"), rel=1e-4)


@pytest.mark.parametrize("name", ["single-to-ddp", "single-to-fsdp", "ddp-to-fsdp", "fsdp-to-ddp"])
def test_another_strategy_goes_on_from_a_checkpoint(pair, name):
    close(pair.metrics(name), pair.metrics("single"), abs=1e-4)
    close(pair.metrics(name, "trainer/grad_norm"), pair.metrics("single", "trainer/grad_norm"), rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_goes_on_from_a_checkpoint_of_two(worlds, strategy):
    name = f"{strategy}-to-single"
    worlds.copy(strategy, name, 10)
    assert "resumed at step 10" in worlds.train(name)
    close(worlds.metrics(name), worlds.metrics("single"), abs=1e-4)


def test_copies_that_are_sharded_inside_of_two_machines_train_as_one_process_does(worlds):
    """HSDP on 2 x 2 ranks: from one process's checkpoint, on to FSDP2 over all four, and back to one."""
    once = "training.optimization.gradient_accumulation_steps=1"
    worlds.copy("single", "hsdp", 5)
    for strategy, stop in (("hsdp", 10), ("fsdp", 15)):
        words = (once, f"training.strategy={strategy}", f"training.stop_at_step={stop}")
        told = worlds.train("hsdp", *words, ranks=4, machines=2)
        assert f"resumed at step {stop - 5}" in told and ("FSDP2 inside of 2 machines" in told) == (strategy == "hsdp")
    worlds.train("hsdp")
    close(worlds.metrics("hsdp"), worlds.metrics("single"), abs=1e-4)
    close(worlds.metrics("hsdp", "trainer/grad_norm"), worlds.metrics("single", "trainer/grad_norm"), rel=1e-4)
    assert worlds.metrics("hsdp") != worlds.metrics("single")


def test_what_cannot_be_sharded_over_these_ranks_is_refused(monkeypatch):
    cfg = config_from_dict(lab.tiny_tree(Path("data"), Path("runs")), ["training.strategy=hsdp", "training.optimization.optimizer=muon"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_strategy(cfg, 8)  # each machine's 4 ranks share r = 4 rows
    with pytest.raises(ConfigError, match="hsdp wants as many ranks on each machine, and 6 are not a multiple of the 4"):
        check_strategy(cfg, 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="4 rows cannot be sharded over 8 ranks for muon"):
        check_strategy(cfg, 8)


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_sharding_is_refused_where_torch_would_sum_gradients_for_their_mean(monkeypatch, strategy):
    """FSDP2 before torch 2.8 cannot be told to divide by itself, and gloo did not; NCCL does, and one process has no need."""
    cfg = config_from_dict(lab.tiny_tree(Path("data"), Path("runs")), [f"training.strategy={strategy}"])
    monkeypatch.delattr(FSDPModule, wrap.SUMS, raising=False)
    wrap.check_sharding(cfg, torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    wrap.check_sharding(cfg, torch.device("cuda"))
    with pytest.raises(ConfigError, match=rf"training.strategy: {strategy} on CPUs needs torch 2\.8, and this is .*; use ddp$"):
        wrap.check_sharding(cfg, torch.device("cpu"))


def test_a_micro_batch_size_is_the_accumulation_that_it_implies(worlds, here):
    here.train("micro", "training.micro_batch_size=2", "training.optimization.gradient_accumulation_steps=1", *BARE)
    assert here.metrics("micro") == worlds.metrics("single")


def test_snapshots_evaluation_and_checkpoints_change_nothing(worlds, pair, here):
    here.train("bare", *BARE)
    for key in ("train/loss", "trainer/grad_norm"):
        assert here.metrics("bare", key) == worlds.metrics("single", key)
        assert pair.metrics("ddp-bare", key) == worlds.metrics("ddp", key)
    assert [p.name for p in (here.folder / "bare/checkpoints").glob("step_*")] != [], "the first step is always saved"
    assert not list((here.folder / "bare").rglob("learning_dynamics"))


# ---- merges --------------------------------------------------------------------------------------------------

def test_merges_come_at_multiples_of_the_reset_frequency_and_are_recorded(worlds):
    assert worlds.metrics("single", "relora/reset_count") == {5: 1, 10: 2, 15: 3}
    close(worlds.metrics("single", "relora/loss_after"), worlds.metrics("single", "relora/loss_before"), abs=1e-4)
    assert all(norm > 0.01 for norm in worlds.metrics("single", "relora/update_norm").values())
    assert all(0.99 < share <= 1 for share in worlds.metrics("single", "relora/opt_zeroed").values())


def test_a_known_fault_of_the_merge_is_only_reported(here):
    printed = here.train("fault", "model.relora.reference_faults=[unscaled_merge]", *BARE)
    assert "warning: step 5: the merge changed the logits" in printed
    assert list(here.metrics("fault"))[-1] == 20
    before, after = (here.metrics("fault", f"relora/loss_{when}") for when in ("before", "after"))
    assert abs(after[5] - before[5]) > 1e-3


def test_a_merge_that_changes_the_function_stops_the_run(here):
    script = here.folder / "broken_merge.py"
    script.write_text(BROKEN_MERGE)
    printed = lab.forked(script, here.config("broken"), code=1)
    assert "error: step 5: the merge changed the logits" in printed and "Traceback" not in printed
    end = json.loads((here.folder / "broken/exit.json").read_text())
    assert (end["code"], end["step"]) == (1, 5) and "the merge changed the logits" in end["reason"]
    checkpoint.verify(here.folder / "broken/checkpoints/step_5")


@pytest.mark.parametrize("option", ["keep_original_weights=false", "lora_only=true"])
def test_a_model_without_initial_weights_learns(here, option):
    here.train(option, f"model.relora.{option}", *BARE)
    falls(here.metrics(option), by=1.0)


def test_a_trained_scaling_is_recorded_as_it_was_merged(here):
    here.train("scaling", *QUICK, "model.relora.trainable_scaling=true")
    state = here.state("scaling", 5)["model"]  # of just before the merge at 5
    scalings = torch.cat([tensor for name, tensor in state.items() if name.endswith(".scaling")])
    assert (scalings - 1).abs().max() > 1e-3, "they train"
    assert here.metrics("scaling", "relora/sf_mean")[5] == pytest.approx(scalings.mean().item(), abs=1e-6)
    assert here.metrics("scaling", "relora/sf_std")[5] == pytest.approx(scalings.std(correction=0).item(), abs=1e-6)


# ---- warm starts ---------------------------------------------------------------------------------------------

def test_a_warm_start_ends_in_fewer_trained_parameters_and_no_jump(warm, worlds):
    log = (warm.folder / "warm/logs/train.log").read_text()
    assert "22,688 parameters, 22,688 trainable" in log
    assert "step 6: the warm start is over; 8,352 of 26,784 parameters train from here on" in log
    losses = warm.metrics("warm")
    assert losses[7] < losses[1] - 0.5 and abs(losses[7] - losses[6]) < 0.3
    assert list(warm.metrics("warm", "relora/reset_count")) == [10, 15]
    state = warm.state("warm", 5)["model"], warm.state("warm", 10)["model"]
    assert [any(name.endswith("lora_A") for name in names) for names in state] == [False, True]


@pytest.mark.parametrize("step", [5, 10])
def test_a_warm_start_resumes_before_and_after_its_end(warm, pair, step):
    warm.copy("warm", f"warm-{step}", step)
    assert f"resumed at step {step}" in warm.train(f"warm-{step}", WARM)
    assert warm.metrics(f"warm-{step}") == warm.metrics("warm")
    assert pair.metrics(f"ddp-warm-{step}") == pair.metrics("ddp-warm")
    close(pair.metrics("ddp-warm"), warm.metrics("warm"), abs=1e-4)


def test_a_run_starts_from_the_weights_of_another(worlds, here):
    here.train("second", f"training.start_from={worlds.folder / 'single'}", "training.max_steps=3")
    assert here.metrics("second", "eval/val_loss")[0] == pytest.approx(
        worlds.metrics("single", "eval/val_loss")[20], abs=1e-5)
    assert here.metrics("second")[1] < worlds.metrics("single")[1] - 1


# ---- optimizers ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e-2), ("adam", 1e-2), ("sgd", 0.1), ("muon", 1e-2)])
def test_every_optimizer_learns_across_merges(here, optimizer, lr):
    here.train(optimizer, f"training.optimization.optimizer={optimizer}", f"training.optimization.lr={lr}", *BARE)
    falls(here.metrics(optimizer))
    assert list(here.metrics(optimizer, "relora/reset_count")) == [5, 10, 15]


def test_sgd_trains_under_fsdp_as_on_one_process(here):
    sgd = ("training.optimization.optimizer=sgd", "training.optimization.lr=0.1", "training.grad_clip=0.5", *BARE)
    here.train("sgd-single", *sgd)
    here.train("sgd-fsdp", *sgd, *FSDP, ranks=2)
    close(here.metrics("sgd-fsdp"), here.metrics("sgd-single"), abs=1e-4)


def test_sgd_survives_a_warm_start_and_a_first_update_that_is_skipped(here, monkeypatch):
    accumulate, poison = train.accumulate, torch.empty_like
    monkeypatch.setattr(train, "accumulate", lambda t, batch: accumulate(t, batch) * (math.nan if t.step == 0 else 1))
    monkeypatch.setattr(torch, "empty_like", lambda like, **options: poison(like, **options).fill_(1e20))  # as memory may hold
    here.train("skips", "training.optimization.optimizer=sgd", "training.optimization.lr=0.1", WARM, *BARE)
    monkeypatch.undo()
    assert here.metrics("skips")[1] is None
    losses = list(here.metrics("skips").values())[1:]
    assert all(loss < 5 for loss in losses) and losses[-1] < losses[0] - 0.5


def test_muon_learns_on_sharded_parameters(pair):
    falls(pair.metrics("fsdp-muon"))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_gradients_are_clipped_as_torch_clips_them(here, optimizer):
    name = f"clip-{optimizer}"
    here.train(name, "training.grad_clip=0.05", f"training.optimization.optimizer={optimizer}", "training.max_steps=3",
               "training.optimization.lr_warmup_steps=0", "training.optimization.lr_scheduler=constant_with_warmup",
               relora=False)
    cfg = load_config(here.folder / name / "training_config.yaml")
    found = here.state(name, 3)["model"]

    def oracle(largest):
        torch.manual_seed(cfg.training.seed)
        model, data = PicoDecoder(cfg.model), TokenDataset(here.dataset)
        o = {"lr": cfg.training.optimization.lr, "weight_decay": 0.01}
        update = (torch.optim.AdamW(model.parameters(), **o) if optimizer == "adamw" else
                  torch.optim.SGD(model.parameters(), momentum=0.95, **o))
        for step in range(3):
            rows = torch.from_numpy(data.batch(step, 8).astype("int64"))
            F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
            update.step()
            update.zero_grad()
        return max((found[name] - tensor).abs().max().item() for name, tensor in model.state_dict().items())

    assert oracle(0.05) < 4e-5
    assert oracle(1e9) > 1e-4, "clipping makes a difference"


# ---- losses that are not finite ------------------------------------------------------------------------------

def test_all_ranks_skip_what_is_not_finite_on_one(here):
    muon = "training.optimization.optimizer=muon"
    names = {"nan-ddp": DDP, "nan-fsdp": FSDP, "gradient-ddp": DDP, "gradient-fsdp": FSDP, "gradient-muon": (*DDP, muon),
             "gradient-fsdp-muon": (*FSDP, muon)}
    here.train_in_turn(*((name, *words, *BARE, SHORT) for name, words in names.items()), ranks=2, script=NAN_ON_RANK_1)
    for name in names:
        losses = here.metrics(name)
        assert [step for step, loss in losses.items() if loss is None] == [7]  # the update counts for nothing
        assert set(list(here.metrics(name, "trainer/inf_or_nan_count").values())[6:]) == {1}
        falls(losses)


def test_a_loss_that_explodes_is_logged_and_not_fatal(here):
    here.train("explodes", "training.optimization.lr=30", *BARE)
    losses = here.metrics("explodes")  # None where not finite, which rounding decides here
    assert max(filter(None, losses.values())) > 20 and len(losses) == 20


def test_a_run_whose_every_loss_is_not_finite_stops_and_says_why(here):
    printed = here.train("hopeless", "training.max_nonfinite_steps=3", "training.optimization.optimizer=sgd",
                         "training.optimization.lr=1e40", relora=False, code=1)
    assert "error: step 5: 3 updates in a row were skipped" in printed and "Traceback" not in printed
    end = json.loads((here.folder / "hopeless/exit.json").read_text())
    assert (end["code"], end["step"]) == (1, 5) and "not finite" in end["reason"]
    assert here.metrics("hopeless", "trainer/inf_or_nan_count") == {1: 0, 2: 0, 3: 1, 4: 2}


# ---- the schedule, the record and compiled blocks ------------------------------------------------------------

def test_a_run_that_stops_early_continues_the_same_schedule(worlds, here):
    assert "resumed" not in here.train("stops", "training.stop_at_step=7")
    assert list(here.metrics("stops")) == list(range(1, 8))
    assert "resumed at step 7" in here.train("stops", "training.stop_at_step=13")
    assert here.metrics("stops") == {s: loss for s, loss in worlds.metrics("single").items() if s <= 13}


def test_a_run_killed_after_its_first_checkpoint_starts_over_from_it(worlds):
    worlds.copy("single", "from-zero", 0)
    assert "resumed at step 0" in worlds.train("from-zero")
    for key in ("train/loss", "eval/val_loss"):
        assert worlds.metrics("from-zero", key) == worlds.metrics("single", key)
    assert not list((worlds.folder / "from-zero").rglob("*.aside*")), "a sound checkpoint was written again"


def test_a_run_none_of_whose_checkpoints_can_be_used_keeps_its_record(worlds):
    worlds.copy("single", "ruined", 5)
    for path in (worlds.folder / "ruined").rglob("checkpoint.pt"):
        path.write_bytes(b"")
    before = (worlds.folder / "ruined/metrics.jsonl").read_bytes()
    printed = worlds.train("ruined")
    assert printed.count("kept as step_") == 2 and "kept as metrics.jsonl.aside-1" in printed and "resumed" not in printed
    assert (worlds.folder / "ruined/metrics.jsonl.aside-1").read_bytes() == before
    assert worlds.metrics("ruined") == worlds.metrics("single")


def test_a_run_without_a_checkpoint_starts_its_record_anew(worlds):
    """As after a kill before the first checkpoint was there."""
    worlds.copy("single", "anew", -1)
    record = worlds.folder / "anew/metrics.jsonl"
    before = "".join(line for line in record.read_text().splitlines(keepends=True) if json.loads(line)["step"] < 4)
    record.write_text(before)
    printed = worlds.train("anew")
    assert "resumed" not in printed and "kept as metrics.jsonl.aside-1" in printed
    assert (worlds.folder / "anew/metrics.jsonl.aside-1").read_text() == before
    for key in ("train/loss", "eval/val_loss"):
        assert worlds.metrics("anew", key) == worlds.metrics("single", key)


@pytest.mark.parametrize("how", ["deleted", "renamed", "emptied"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(worlds, how):
    name = f"checkpoints-{how}"
    worlds.copy("single", name, -1 if how == "emptied" else 20)
    folder = worlds.folder / name
    before = (folder / "metrics.jsonl").read_bytes()
    if how == "renamed":
        (folder / "checkpoints").rename(folder / "old")
    elif how == "deleted":
        shutil.rmtree(folder / "checkpoints")
    printed = worlds.train(name, code=2)
    assert f"{folder}: holds the record of 20 steps, but no checkpoint" in printed
    assert (folder / "metrics.jsonl").read_bytes() == before and not (folder / "metrics.jsonl.aside-1").exists()


def test_the_record_holds_what_is_promised(worlds):
    lines = [json.loads(line) for line in (worlds.folder / "single/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert {"step", "train/loss", "train/perplexity", "trainer/learning_rate", "trainer/grad_norm", "tokens",
            "trainer/inf_or_nan_count", "tokens_per_second"} <= set.intersection(*map(set, steps))
    assert [line["tokens"] for line in steps] == [step * 8 * 16 for step in range(1, 21)]
    assert [line["step"] for line in lines if "eval/val_loss" in line] == [0, 5, 10, 15, 20]
    assert all(math.exp(line["train/loss"]) == pytest.approx(line["train/perplexity"]) for line in steps)
    assert json.loads((worlds.folder / "single/exit.json").read_text()) == {"code": 0, "reason": "finished", "step": 20}


def test_a_logged_loss_is_the_mean_over_the_steps_since_the_last(worlds, here):
    here.train("rarely", "monitoring.logging.log_every_n_steps=5", *BARE)
    each = worlds.metrics("single")
    close(here.metrics("rarely"), {s: sum(each[i] for i in range(s - 4, s + 1)) / 5 for s in (5, 10, 15, 20)}, abs=1e-5)


@pytest.mark.parametrize("every", [1, 5])
def test_a_new_epoch_is_told(worlds, here, every):
    printed = here.train(f"epoch-{every}", f"monitoring.logging.log_every_n_steps={every}", *BARE)
    assert printed.count("epoch 2 of the data has begun") == 1  # 96 rows, 8 an update: after 12 updates


def test_compiled_blocks_train_as_the_plain_ones_do(here):
    words = ("model.n_layers=1", "training.max_steps=3", "model.relora.lora_dropout=0", "training.micro_batch_size=4")
    here.train("plain", *words, *BARE)
    lab.forked("train.py", here.config("compiled"), *words, "training.compile=true", "evaluation.metrics=null",
               "checkpointing.save_every_n_steps=1000")  # with the snapshots of the first step and the last
    close(here.metrics("compiled"), here.metrics("plain"), abs=1e-4)


# ---- what a run refuses, and what it survives ----------------------------------------------------------------

@pytest.fixture(scope="module")
def done(here):
    here.train("done", "training.max_steps=2", *BARE)
    return here


@pytest.mark.parametrize("change", ["training.optimization.lr=0.02", "model.d_model=64", "training.seed=7",
                                    "data.dataloader.batch_size=16", "model.relora.r=2"])
def test_another_run_is_not_resumed_into(done, change):
    printed = done.train("done", "training.max_steps=2", *BARE, change, code=2)
    assert change.split("=")[0] in printed and "checkpointing.run_name" in printed and "Traceback" not in printed
    assert (done.folder / "done/checkpoints/step_2/manifest.json").is_file()


@pytest.mark.parametrize("change", ["model.attention_n_heads=8", "model.norm_eps=1e-5", "model.position_emb_theta=500",
                                    "model.n_layers=3"])
def test_weights_of_another_model_are_not_started_from(done, change):
    printed = done.train("other", f"training.start_from={done.folder / 'done'}", change, *BARE, code=2)
    key = change.split("=")[0]
    assert "training.start_from: " in printed and f"use {key}=" in printed and not (done.folder / "other").exists()


def test_muon_with_fewer_rows_than_shards_is_refused(here):
    printed = lab.run("train.py", here.config("few"), lab.HALF, "training.strategy=fsdp", "training.optimization.optimizer=muon",
                      "model.relora.r=1", ranks=2, code=1)
    assert "model.relora.r: 1 rows cannot be sharded over 2 ranks" in printed and not (here.folder / "few").exists()


def test_other_tokens_are_not_resumed_into(done, tmp_path):
    other = lab.make_dataset(tmp_path / "other", seed=1)
    printed = done.train("done", "training.max_steps=2", *BARE, f"data.dataset.name={other}", code=2)
    assert "data.dataset.name" in printed and "checkpointing.run_name" in printed


def test_another_horizon_only_warns(done):
    shutil.copytree(done.folder / "done", done.folder / "longer")
    assert "warning: training.max_steps: 2 -> 4" in done.train("longer", "training.max_steps=4", *BARE)
    assert list(done.metrics("longer")) == [1, 2, 3, 4]


def test_without_auto_resume_no_run_is_overwritten(done):
    before = (done.folder / "done/metrics.jsonl").read_bytes()
    printed = done.train("done", "checkpointing.training.auto_resume=false", code=2)
    assert "checkpointing.training.auto_resume" in printed
    assert (done.folder / "done/metrics.jsonl").read_bytes() == before


def test_a_mirror_to_tensorboard_is_there_or_said_to_be_missing(here):
    printed = here.train("board", "monitoring.save_to_tensorboard=true", "training.max_steps=2", *BARE)
    there = importlib.util.find_spec("tensorboard") is not None
    assert ("TensorBoard is not installed" in printed) != there and (here.folder / "board/tensorboard").exists() == there
    assert list(here.metrics("board")) == [1, 2]


def test_a_run_finishes_without_wandb(here):
    printed = here.train("wandb", "monitoring.save_to_wandb=true", "training.max_steps=2", *BARE)
    assert "warning: monitoring.save_to_wandb" in printed
    assert list(here.metrics("wandb")) == [1, 2]
