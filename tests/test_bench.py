"""The benchmark measures what it says; and what it is about: no recompilation at merges, no waiting for the device."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import lab
import train
from instruments import timing
from optim import set_learning_rate

SMALL = ("model.d_model=32", "model.n_layers=1", "model.vocab_size=64", "model.attention_n_heads=4",
         "model.attention_n_kv_heads=2", "model.activation_hidden_dim=64")


def trainer(compiled=False, device="cpu", words=()):
    case = bench.Case("tiny", "r4", 0.0, compiled, 2, 16, None)
    state = bench.train_state(case, bench.case_config(case, (*SMALL, *words)), torch.device(device))
    return state, torch.randint(64, (2, 17), device=device)


@pytest.mark.timeout(480)  # three models in processes of their own, on whatever machine
def test_the_command_measures_and_compares(tmp_path):
    done = subprocess.run([sys.executable, lab.ROOT / "bench.py", "--baseline", "hf", "--modes", "full", "r16", "--batch", "1",
                           "--seq-len", "32", "--rounds", "2", "--steps", "1", "--attention", "--run", "--json",
                           tmp_path / "b.json"],
                          capture_output=True, text=True, timeout=440, check=True)
    found = json.loads((tmp_path / "b.json").read_text())
    cases = {r["mode"]: r for r in found if "mode" in r}
    assert cases.keys() == {"full", "r16", "hf"}
    for r in cases.values():
        assert r["tokens_per_second"] == pytest.approx(32 / r["step_seconds"]) and r["steps_timed"] == 2
        assert 10**8 < r["peak_bytes"] < 10**10 and r["name"] in done.stdout
    parts = {"data_wait", "forward_backward", "optimizer", "checkpoint_blocking", "checkpoint_stall", "checkpoint_slowdown"}
    assert cases["full"]["seconds_of"].keys() == parts and cases["r16"]["seconds_of"].keys() == parts | {"merge"}
    assert "ratios to tiny stock transformers Llama" in done.stdout
    run = next(r for r in found if r["name"] == "whole run")
    assert run["tokens_per_second"] > 0 and 0 <= run["data/wait_fraction"] < 1
    sweep = [r for r in found if r["name"] == "attention"]
    assert {r["head_dim"] for r in sweep} == {8, 32, 64, 128} and any(r["milliseconds"] for r in sweep)


def test_merges_recompile_nothing():
    t, rows = trainer(compiled=True)
    found = timing.recompilations(t, rows)
    assert found == {"graphs": 1, "over_3_merges": 0}, "one block, compiled for one shape"


class Reads(TorchDispatchMode):
    """Counts what the host reads from tensors: on a GPU each of it waits for the device."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
def test_an_update_reads_nothing_from_the_device(optimizer):
    t, rows = trainer(words=[f"training.optimization.optimizer={optimizer}"])
    train.train_step(t, [(0, rows)])
    with Reads() as reads:
        torch.ones(()).item()
        assert reads.count == 1, "the recorder sees it"
        for _ in range(3):
            set_learning_rate(t.optimizers, t.step, t.cfg.training, t.cfg.model.relora)
            train.train_step(t, [(0, rows), (1, rows)])
    assert reads.count == 1
