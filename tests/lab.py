"""What the tests share: tiny datasets and configurations, and the real commands as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from shards import write_shards

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real data, where it is at hand


def make_dataset(folder: Path, rows: int = 96, row_length: int = 17, vocab: int = 64, val_rows: int = 12,
                 seed: int = 0) -> Path:
    """A dataset with something to learn: each token mostly follows from the one before."""
    rng = np.random.default_rng(seed)
    successor = rng.permutation(vocab)
    tokens = np.empty((rows + val_rows, row_length), dtype=np.int64)
    tokens[:, 0] = rng.integers(vocab, size=len(tokens))
    for t in range(1, row_length):
        noise = rng.random(len(tokens)) < 0.2
        tokens[:, t] = np.where(noise, rng.integers(vocab, size=len(tokens)), successor[tokens[:, t - 1]])
    write_shards(folder / "train", tokens[:rows], vocab, "made for a test")
    write_shards(folder / "val", tokens[rows:], vocab, "made for a test")
    return folder


def tiny_tree(dataset: Path, runs: Path, name: str = "run", relora: bool = True) -> dict:
    """A nested configuration of a run of seconds: 2 layers, GQA, 8 rows an update in 4 accumulation steps."""
    model = {"d_model": 32, "n_layers": 2, "vocab_size": 64, "max_seq_len": 16, "attention_n_heads": 4,
             "attention_n_kv_heads": 2, "activation_hidden_dim": 64}
    if relora:
        model["relora"] = {"target_modules": ["attention", "swiglu"], "reset_frequency": 5, "r": 4, "lora_alpha": 8,
                           "lora_dropout": 0.1}
    return {
        "data": {"dataset": {"name": str(dataset)}, "dataloader": {"batch_size": 8}},
        "model": model,
        "training": {"max_steps": 20, "fabric": {"precision": "32-true", "accelerator": "cpu"},
                     "optimization": {"lr": 1e-2, "lr_scheduler": "relora_jagged_cosine" if relora else "cosine_with_warmup",
                                      "lr_warmup_steps": 2, "restart_warmup_steps": 2, "min_lr_ratio": 0.1,
                                      "gradient_accumulation_steps": 4}},
        "evaluation": {"metrics": ["val"]},
        "monitoring": {"logging": {"log_every_n_steps": 1}},
        "checkpointing": {"run_name": name, "runs_dir": str(runs), "save_every_n_steps": 5,
                          "learning_dynamics": {"eval_data": "val", "batch_size": 4}},
    }


def write_config(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def start(command: str, *words: object, ranks: int = 0, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Start `python COMMAND words`, under a real torchrun where ranks >= 1."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen([*launcher, str(ROOT / command), *map(str, words)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(env or {})})


def run(command: str, *words: object, ranks: int = 0, timeout: float = 180, code: int | None = 0,
        env: dict[str, str] | None = None) -> str:
    """Run a command to its end and return what it printed; fails if its exit code is not `code` (None: any)."""
    process = start(command, *words, ranks=ranks, env=env)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, err = process.communicate(timeout=40)
        raise AssertionError(f"{command} did not end in {timeout} s:\n{out[-2000:]}\n{err[-4000:]}") from None
    assert code is None or process.returncode == code, f"exit code {process.returncode}:\n{out[-2000:]}\n{err[-4000:]}"
    return out + err


def metrics(run_folder: Path, key: str = "train/loss") -> dict[int, float]:
    """{step: value} of one key of metrics.jsonl, which must be strict JSON without a step told twice."""
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.jsonl")
    lines = [json.loads(line, parse_constant=refuse) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert len(dict(found)) == len(found), f"a step of {key} is told twice"
    return dict(found)
