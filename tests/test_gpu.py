"""What only a GPU runs, on a machine that has one: python -m pytest -m gpu.

The oracle of every number is the plain formulas on the CPU, which test_model.py holds against transformers and float64.
"""

import json
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

import bench
import lab
import train
from config import ModelConfig, ReLoRAConfig, load_config
from instruments import timing
from model import Block, PicoDecoder
from optim import set_learning_rate
from relora import apply_relora, relora_layers
from runtime import dist, kernels, machine, wrap
from runtime.errors import TrainingError
from runtime.wrap import eval_mode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TREE = {"training.fabric.accelerator": "cuda", "training.fabric.precision": "bf16-mixed", "model.d_model": 128,
        "model.attention_n_kv_heads": 2, "model.activation_hidden_dim": 256}
WORDS = [f"{key}={value}" for key, value in TREE.items()]


# ---- numbers -----------------------------------------------------------------------------------------------------------

def decoder(head_dim, relora, fast):
    torch.manual_seed(0)
    cfg = ModelConfig(d_model=4 * head_dim, n_layers=2, vocab_size=1000, max_seq_len=256, attention_n_heads=4,
                      attention_n_kv_heads=2, activation_hidden_dim=8 * head_dim, fast_paths=fast)
    model = PicoDecoder(cfg)
    if relora:
        apply_relora(model, ReLoRAConfig(["attention", "swiglu"], reset_frequency=5, r=4, lora_dropout=0.0))
        for layer in relora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.02)
    return model


def loss_and_gradients(model, ids, precision="32-true"):
    with torch.autocast(ids.device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
        loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return loss.item(), {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("relora", [False, True], ids=["full-rank", "relora"])
@pytest.mark.parametrize(("precision", "loss_bound", "gradient_bound"), [("32-true", 1e-5, 1e-4), ("bf16-mixed", 1e-2, 5e-2)])
@pytest.mark.parametrize("head_dim", [8, 32, 64, 128])
def test_loss_and_gradients_are_those_of_the_plain_formulas(head_dim, precision, loss_bound, gradient_bound, relora, compiled,
                                                            monkeypatch):
    if compiled and head_dim not in (8, 64):
        pytest.skip("compiling is slow, and no other shape compiles to other code")
    monkeypatch.setattr(kernels, "GPU_CHUNK", 1 << 19)  # several chunks
    ids = torch.randint(1000, (3, 257))
    expected_loss, expected = loss_and_gradients(decoder(head_dim, relora, fast=False), ids)
    model = decoder(head_dim, relora, fast=True).cuda()
    monkeypatch.setattr(kernels, "_compiled_softmax", None)
    if compiled:
        for layer in model.layers:
            layer.compile()
        kernels.compile_loss()
    loss, gradients = loss_and_gradients(model, ids.cuda(), precision)
    assert loss == pytest.approx(expected_loss, abs=loss_bound)
    assert gradients.keys() == expected.keys()
    errors = {name: ((gradients[name] - g).norm() / g.norm()).item() for name, g in expected.items()}
    assert max(errors.values()) < gradient_bound, errors


def test_what_looks_at_a_model_computes_in_float32():
    model, ids = decoder(64, relora=True, fast=True), torch.randint(1000, (2, 256))
    with torch.no_grad():
        expected = model.eval()(ids)
    model.cuda().train()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), eval_mode(model, torch.device("cuda")):
        found = model(ids.cuda())
    assert (found.cpu() - expected).abs().max() < 1e-4
    greedy = model.cpu().generate(ids[:, :8], 20, temperature=0)
    assert torch.equal(model.cuda().generate(ids[:, :8].cuda(), 20, temperature=0).cpu(), greedy)


# ---- steps -------------------------------------------------------------------------------------------------------------

def trainer(mode, dropout, compiled, *words):
    case = bench.Case("tiny", mode, dropout, compiled, 2, 128, None)
    state = bench.train_state(case, bench.case_config(case, ["model.n_layers=2", *words]), torch.device("cuda"))
    return state, torch.randint(bench.VOCAB, (2, 129), device="cuda")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("mode", "dropout", "optimizer"), [
    ("full", 0.0, "adamw"), ("r4", 0.0, "adamw"), ("r4", 0.1, "adamw"), ("r4", 0.0, "sgd"), ("r4", 0.0, "muon")])
def test_an_update_never_waits_for_the_gpu_and_leaves_the_numbers_finite(mode, dropout, optimizer, compiled):
    t, rows = trainer(mode, dropout, compiled, f"training.optimization.optimizer={optimizer}")
    train.train_step(t, [(0, rows)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            set_learning_rate(t.optimizers, t.step, t.cfg.training, t.cfg.model.relora)
            train.train_step(t, [(0, rows), (1, rows)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in t.model.parameters())
    assert t.progress.read(t.step).loss < 12


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("mode", "dropout"), [("full", 0.0), ("r4", 0.0), ("r4", 0.1)])
def test_a_cuda_graph_takes_the_very_steps_of_the_code(mode, dropout, compiled):
    ends = []
    for graph in (False, True):
        t, rows = trainer(mode, dropout, compiled, f"training.cuda_graph={graph}", "training.deterministic=true")
        for step in range(4):
            set_learning_rate(t.optimizers, 5 + step, t.cfg.training, t.cfg.model.relora)
            train.train_step(t, [(0, rows), (1, rows.flip(0)), (2, rows.roll(step, 1))])
        assert bool(t.graph) == graph
        ends.append((t.progress.read(t.step).loss, {name: p.detach().clone() for name, p in t.model.named_parameters()}))
    assert ends[0][0] == ends[1][0]
    assert [name for name, p in ends[0][1].items() if not torch.equal(p, ends[1][1][name])] == []


def read_on_the_host(block, x):
    return x * (1.0 if x.sum().item() > 0 else 1.0)


def drawn_by_python(block, x):
    return x * random.random()


def counted(block, x):
    block.calls = getattr(block, "calls", 0) + 1
    return x


def scaled(block, x):
    return x * getattr(block, "strength", 1.0)


@pytest.mark.parametrize(("edit", "words"), [
    (read_on_the_host, "no CUDA graph can be made"), (drawn_by_python, "of the same rows and seed"),
    (counted, "each call changes layers.0.calls"), (scaled, "layers.0.strength of the model has changed")])
def test_what_a_cuda_graph_would_not_repeat_trains_without_one(edit, words, said, monkeypatch):
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, *rest: edit(self, forward(self, x, *rest)))
    losses = []
    for graph in (False, True):
        t, rows = trainer("full", 0.0, False, f"training.cuda_graph={graph}")
        for step in range(4):
            random.seed(step)
            if step == 2:
                t.model.layers[0].strength = 3.0
            set_learning_rate(t.optimizers, 5 + step, t.cfg.training, None)
            train.train_step(t, [(0, rows)])
        losses.append(t.progress.read(t.step).loss)
    assert any(words in line for line in said)
    torch.randn(3, device="cuda")  # a recording that failed has left the generator as it was
    if edit is not drawn_by_python:  # whose draws the attempt has used up
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_update_with_a_gradient_that_is_not_finite_is_skipped():
    t, rows = trainer("full", 0.0, False)
    train.train_step(t, [(0, rows)])
    set_learning_rate(t.optimizers, 5, t.cfg.training, None)
    before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    handle = t.model.output_norm.weight.register_hook(lambda g: g * float("nan"))
    train.train_step(t, [(0, rows)])
    assert all(torch.equal(p, before[name]) for name, p in t.model.named_parameters())
    handle.remove()
    train.train_step(t, [(0, rows)])
    assert not all(torch.equal(p, before[name]) for name, p in t.model.named_parameters())


def test_merges_recompile_nothing():
    t, rows = trainer("r4", 0.0, True)
    assert timing.recompilations(t, rows)["over_3_merges"] == 0


def test_too_little_memory_ends_in_a_sentence():
    with pytest.raises(TrainingError, match="micro-batches of 64 rows; use training.micro_batch_size=32"):
        with machine.advice(64):
            torch.empty(1 << 50, device="cuda")


# ---- runs --------------------------------------------------------------------------------------------------------------

@pytest.mark.timeout(400)
@pytest.mark.parametrize("words", [("training.compile=false",), ("training.compile=true",),
                                   ("training.compile=true", "model.relora.lora_dropout=0")], ids=" ".join)
def test_a_run_that_was_stopped_ends_as_the_one_that_was_not_and_can_be_replayed(words, dataset, tmp_path):
    runs = lab.Lab(tmp_path, dataset)
    printed = runs.train("whole", *WORDS, *words)
    assert "1 x cuda, no wrapping, bf16-mixed" in printed
    runs.train("stopped", *WORDS, *words, "training.stop_at_step=10")
    assert "resumed at step 10" in runs.train("stopped", *WORDS, *words)
    runs.same_end("stopped", "whole")
    assert "equal bit for bit" in lab.call("replay.py", tmp_path / "whole", "--steps", "7,13")


@pytest.mark.timeout(400)
def test_every_command_reads_a_run_of_a_gpu(dataset, tmp_path):
    runs = lab.Lab(tmp_path, dataset)
    runs.train("run", *WORDS)
    run = tmp_path / "run"
    recorded = runs.metrics("run", "eval/val_loss")[20]
    lab.call("evaluate.py", run, "evaluation.metrics=[val]")
    again = json.loads((run / "eval_results/step_20.json").read_text())
    assert again["val"]["loss"] == pytest.approx(recorded, abs=1e-4)
    lab.call("analyze.py", run)
    lab.call("export.py", "hf", run, tmp_path / "llama")
    assert (tmp_path / "llama/model.safetensors").is_file() and (run / "analysis").is_dir()


NCCL = "import sys; from test_gpu import one_rank; one_rank(sys.argv[1], sys.argv[2:])"


def one_rank(strategy, words):
    """A run as the only rank of a process group, wrapped all the same: NCCL, and DDP's or FSDP2's own code."""
    with dist.session(machine.pick_device()) as device:
        pretend = mock.Mock(wraps=dist)
        pretend.world_size = mock.Mock(side_effect=[2, 1] * 9 if strategy == "fsdp" else [2] * 9)
        with mock.patch.object(wrap, "dist", pretend):
            train.train(load_config(words[0], words[1:]), device)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_ddp_and_fsdp_over_nccl_train_as_the_bare_model_does(compiled, dataset, tmp_path):
    runs = lab.Lab(tmp_path, dataset)
    words = [word for word in WORDS if "precision" not in word]
    words += [f"training.compile={compiled}", "training.fabric.precision=32-true", "training.optimization.lr=1e-3"]
    runs.train("bare", *words)
    for port, strategy in enumerate(("ddp", "fsdp")):
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(29500 + os.getpid() % 1000 + port)}
        path = os.pathsep.join([str(lab.ROOT), str(lab.ROOT / "tests")])
        done = subprocess.run([sys.executable, "-c", NCCL, strategy, runs.config(strategy), *words,
                               f"training.strategy={strategy}"], env={**os.environ, **place, "PYTHONPATH": path}, cwd=lab.ROOT,
                              capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert {"ddp": "DDP", "fsdp": "FSDP2"}[strategy] in done.stdout + done.stderr
        bare, wrapped = runs.metrics("bare"), runs.metrics(strategy)
        assert max(abs(wrapped[step] - bare[step]) for step in bare) < 1e-3
        assert runs.state(strategy, 20)["model"].keys() == runs.state("bare", 20)["model"].keys()
