"""What bench.py measures: the parts of a step, checkpoints, attention, recompilation, conversion, a whole run."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import evaluate
import train
from config import UserError
from data import BatchLoader, TokenDataset, shard_entry, write_index
from hub import architecture, llama
from hub.parquet import convert_parquet
from instruments.planning import seconds
from optim import set_learning_rate
from relora import merge_and_reinit, reset_optimizer
from runtime import kernels, machine
from shards import write_shards
from train import TrainState


def our_step(t: TrainState, rows: torch.Tensor) -> Callable[[], None]:
    """One update of ours."""
    def step() -> None:
        set_learning_rate(t.optimizers, t.step, t.cfg.training, t.cfg.model.relora)
        train.train_step(t, [(0, rows)])
    return step


def product_speed(device: torch.device, size: int = 2048) -> float:
    """Operations a second that a square matrix product reaches, in the numbers that training multiplies: the median of ten."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    times = [seconds(lambda: torch.mm(a, b), device) for _ in range(12)]
    return 2 * size ** 3 / statistics.median(times[2:])


def merge(t: TrainState) -> None:
    merge_and_reinit(t.model, seed=0, step=t.step)
    reset_optimizer(t.optimizers, t.model, seed=0, step=t.step)


def breakdown(t: TrainState, rows: torch.Tensor) -> dict[str, float]:
    """Seconds of the parts of a step, medians of 5, and of what is due now and then."""
    parts: dict[str, list[float]] = {"data_wait": [], "forward_backward": [], "optimizer": []}
    loss = torch.zeros(())

    def forward_backward() -> None:
        nonlocal loss
        loss = train.accumulate(t, [(0, rows)])
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder) / "train", rows.cpu().numpy().repeat(8, 0), t.cfg.model.vocab_size, "random")
        with BatchLoader(TokenDataset(folder), t.step, len(rows), 1, 0, 1, t.device) as batches:
            for _ in range(5):
                parts["data_wait"].append(seconds(lambda: batches.next(60), t.device))
                parts["forward_backward"].append(seconds(forward_backward, t.device))
                parts["optimizer"].append(seconds(lambda: train.update(t, loss), t.device))
        found = {name: statistics.median(values) for name, values in parts.items()}
        if t.cfg.model.relora is not None:
            found["merge"] = seconds(lambda: merge(t), t.device)
        return found | checkpoint_costs(t, rows, Path(folder))


def checkpoint_costs(t: TrainState, rows: torch.Tensor, folder: Path) -> dict[str, float]:
    """Seconds that a checkpoint takes when it is waited for, and when training goes on: standing still, and run slower."""
    step = our_step(t, rows)
    usual, reason = statistics.median(seconds(step, t.device) for _ in range(3)), architecture.not_llama(t.cfg.model)
    saver = checkpoint.Saver(t.cfg.checkpointing, folder)

    def save() -> None:
        state = checkpoint.gather_state(t.model, t.optimizers)
        files = llama.writers(state["model"], t.cfg.model, folder, not_llama=reason)
        saver.save(t.step, files | {"training_state/checkpoint.pt": checkpoint.torch_writer(state | {"step": t.step})})
    blocking = seconds(save, t.device) + seconds(saver.wait, t.device)
    step()
    stall, slower = seconds(save, t.device), 0.0
    while saver.busy:
        slower += max(0.0, seconds(step, t.device) - usual)
    if saver.error is not None:
        raise saver.error
    return {"checkpoint_blocking": blocking, "checkpoint_stall": stall, "checkpoint_slowdown": slower}


def sweep_attention(batch: int, length: int) -> list[dict[str, Any]]:
    """Milliseconds of forward and backward of causal attention, 12 heads on 4, by head_dim and backend."""
    device = machine.pick_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ways = {backend.name: functools.partial(sdpa_of, backend) for backend in
            (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)}
    ways["blocks (cpu_kernels.py)" if device.type == "cpu" else "torch's choice"] = kernels.causal_attention
    found = []
    for head_dim in (8, 32, 64, 128):
        q, k, v = (torch.randn(batch, heads, length, head_dim, device=device, dtype=dtype, requires_grad=True)
                   for heads in (12, 4, 4))
        for name, attention in ways.items():
            def once(attention=attention, q=q, k=k, v=v) -> None:
                torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
            try:
                took = 1e3 * statistics.median(seconds(once, device) for _ in range(5))
            except RuntimeError:  # not for these shapes, or not on this device
                took = None
            found.append({"name": "attention", "head_dim": head_dim, "backend": name, "milliseconds": took})
            print(f"attention, {batch} x {length}, head_dim {head_dim:3}, {name:20} "
                  f"{'not available' if took is None else f'{took:8.2f} ms'}", flush=True)
    return found


def sdpa_of(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (each.repeat_interleave(q.size(1) // k.size(1), dim=1) for each in (k, v)) if q.device.type == "cpu" else (k, v)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))


def recompilations(t: TrainState, rows: torch.Tensor) -> dict[str, int]:
    """Graphs that torch.compile makes in the first step, and in 9 more with 3 merges and evaluations among them."""
    step, stats = our_step(t, rows), torch._dynamo.utils.counters["stats"]

    def evaluate_shorter() -> None:  # as Paloma's rows are, and the small batch that a merge is checked on
        evaluate.losses_of(t.model, rows[:, :-2], rows[:, 1:-1])
    evaluate_shorter()
    step()
    first = stats["unique_graphs"]
    for _ in range(3):
        evaluate_shorter()
        merge(t)
        for _ in range(3):
            step()
    return {"graphs": first, "over_3_merges": stats["unique_graphs"] - first}


def conversion(folder: Path, vocab_size: int) -> dict[str, float]:
    """Convert rows.parquet of a folder to a shard, on one core, and read it back."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    start = time.perf_counter()
    made = convert_parquet(folder / "rows.parquet", folder / "shard-00000.npy", vocab_size)
    took = time.perf_counter() - start
    peak = machine.peak_memory()
    entry = shard_entry(folder / "shard-00000.npy", made.rows)
    write_index(folder, [entry], made.row_length, vocab_size, "random")
    dataset, batch = TokenDataset(folder.parent, folder.name), 64
    start = time.perf_counter()
    for step in range(made.rows // batch):
        dataset.batch(step, batch)
    speed = made.rows * made.row_length / (time.perf_counter() - start)
    return {"convert_seconds": took, "peak_bytes": peak, "tokens_per_second": speed}


def whole_run(preset: str, batch: int, seq_len: int, vocab: int, steps: int = 50) -> dict[str, Any]:
    """A real run of train.py with its loader, merges and checkpoints: the median of its logged windows."""
    with tempfile.TemporaryDirectory() as folder:
        rows = np.random.default_rng(0).integers(vocab, size=(4 * batch, seq_len + 1))
        write_shards(Path(folder) / "data/train", rows, vocab, "random")
        numerals = {"type": "WordLevel", "vocab": {str(i): i for i in range(vocab)}, "unk_token": "0"}  # any of so many ids do
        made = llama.byte_tokenizer_json() | {"added_tokens": [], "model": numerals}
        (Path(folder) / "data/tokenizer.json").write_text(json.dumps(made))
        words = [f"data.dataset.name={folder}/data", f"data.dataloader.batch_size={batch}", f"training.micro_batch_size={batch}",
                 f"model.max_seq_len={seq_len}", f"training.stop_at_step={steps}", "training.optimization.lr_warmup_steps=5",
                 "model.relora.reset_frequency=20", "model.relora.lora_dropout=0", "model.relora.r=16", "evaluation.metrics=null",
                 "monitoring.logging.log_every_n_steps=5", "checkpointing.learning_dynamics=null",
                 f"checkpointing.runs_dir={folder}", "checkpointing.run_name=run", "checkpointing.save_every_n_steps=25"]
        root = Path(__file__).parent.parent
        done = subprocess.run([sys.executable, root / "train.py", root / f"config/pico-relora-{preset}.yaml", *words],
                              capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"bench: {done.stderr.strip().splitlines()[-1]}")
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    windows = [line for line in lines if "train/loss" in line][1:]  # the first compiles
    found = {key: statistics.median(w[key] for w in windows) for key in ("tokens_per_second", "data/wait_fraction")}
    print(f"{preset}: {steps} steps of train.py, ReLoRA r16 with its loader, merges and checkpoints: "
          f"{found['tokens_per_second']:,.0f} tokens/s, wait for data {found['data/wait_fraction']:.2%}", flush=True)
    return {"name": "whole run", "preset": preset, "steps": steps, **found}
