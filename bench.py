"""Measure training speed and memory, beside a stock Hugging Face Llama of the same shape.

    python bench.py                                            # tiny, full-rank and ReLoRA r 16, on this machine
    python bench.py --baseline hf --json bench.json            # and the stock Llama, taking turns in the same run
    python bench.py --presets tiny small medium large --batch 16 --seq-len 2048 --compile on off

Every case lives in a process of its own, so that its peak memory is its own. The cases of a preset take turns, a few
steps at a time, so that a machine whose speed drifts treats them alike; what is told is the median step. A step is
the whole of train.train_step: forward, backward, gradient norm, fused AdamW. MFU counts attention as PaLM does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dist
import parquet
import shards
import train
from config import Config, UserError, load_config
from data import TokenDataset
from run import Progress

VOCAB = 50304


@dataclass
class Case:
    """One row of the table; sent to its process as JSON."""
    preset: str
    mode: str  # full, rN (ReLoRA of rank N), or hf
    dropout: float
    compile: bool
    batch: int
    seq_len: int
    threads: int | None

    @property
    def name(self) -> str:
        mode = {"full": "full-rank", "hf": "stock transformers Llama"}.get(self.mode, f"ReLoRA {self.mode}")
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.preset} {mode}{dropout}{', compiled' if self.compile else ''}"


def case_config(case: Case) -> Config:
    overrides = [f"data.dataloader.batch_size={case.batch}", f"training.micro_batch_size={case.batch}",
                 f"model.max_seq_len={case.seq_len}", f"training.compile={str(case.compile).lower()}",
                 "training.optimization.lr_warmup_steps=10"]
    if case.mode.startswith("r"):
        overrides += ["model.relora.target_modules=[attention, swiglu]", "model.relora.reset_frequency=2000",
                      f"model.relora.r={case.mode[1:]}", f"model.relora.lora_dropout={case.dropout}"]
    return load_config(Path(__file__).parent / f"config/pico-decoder-{case.preset}.yaml", overrides)


def peak_memory() -> int:
    """Most bytes that this process has held. On Linux not from getrusage, which also knows who started us."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- in the process of a case ----------------------------------------------------------------------------------

def our_step(case: Case, cfg: Config, device: torch.device, rows: torch.Tensor) -> tuple[Callable[[], None], float]:
    """(one update of ours, FLOPs a token)."""
    precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    t = train.Trainer(cfg, device, precision, None, None, None, None, None, Progress(device))
    train.build(t, adapters=case.mode.startswith("r"))

    def step() -> None:
        train.set_learning_rate(t)
        train.train_step(t, [(0, rows)])
    return step, t.model.flops_per_token()


def stock_step(case: Case, cfg: Config, device: torch.device, rows: torch.Tensor) -> tuple[Callable[[], None], float]:
    """(one update of transformers' Llama with its own loss and the same optimizer, FLOPs a token)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    m = cfg.model
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=m.d_model, intermediate_size=m.activation_hidden_dim, num_hidden_layers=m.n_layers,
        num_attention_heads=m.attention_n_heads, num_key_value_heads=m.attention_n_kv_heads, rms_norm_eps=m.norm_eps,
        max_position_embeddings=m.max_seq_len, vocab_size=m.vocab_size, tie_word_embeddings=False, use_cache=False,
        attn_implementation="sdpa")).to(device)
    forward = torch.compile(model) if case.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = forward(input_ids=rows[:, :-1], labels=rows[:, :-1]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.device("meta"):
        flops = train.PicoDecoder(m).flops_per_token()
    return step, flops


def work(case: Case) -> None:
    """Warm up, then answer each line "N" with the seconds of N steps, and "end" with the peak memory."""
    device = dist.pick_device()
    if case.threads:
        torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    cfg = case_config(case)
    rows = torch.randint(VOCAB, (case.batch, case.seq_len + 1), device=device)
    step, flops = (stock_step if case.mode == "hf" else our_step)(case, cfg, device, rows)

    def timed() -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
    for _ in range(3):
        timed()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        print(json.dumps([timed() for _ in range(int(line))]), flush=True)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(json.dumps({"peak_bytes": peak, "flops_per_token": flops, "device": name}), flush=True)


def work_on_data(folder: Path) -> None:
    """Convert a full-size parquet file on one core and read it back; prints one JSON object."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    start = time.perf_counter()
    made = parquet.convert_parquet(folder / "rows.parquet", folder / "shard-00000.npy", VOCAB)
    seconds = time.perf_counter() - start
    peak = peak_memory()
    entry = shards.shard_entry(folder / "shard-00000.npy", made.rows)
    shards.write_index(folder, [entry], made.row_length, VOCAB, "random")
    dataset, batch = TokenDataset(folder.parent, folder.name), 64
    start = time.perf_counter()
    for step in range(made.rows // batch):
        dataset.batch(step, batch)
    speed = made.rows * made.row_length / (time.perf_counter() - start)
    print(json.dumps({"convert_seconds": seconds, "peak_bytes": peak, "tokens_per_second": speed}))


def bench_data() -> dict[str, float]:
    """A shard of the size of Dolma's: 20,480 rows of 2,049 random ids, converted and delivered on one core."""
    with tempfile.TemporaryDirectory() as folder:
        split = Path(folder) / "train"
        split.mkdir()
        parquet.write_rows(split / "rows.parquet", np.random.default_rng(0).integers(VOCAB, size=(20_480, 2_049)))
        done = subprocess.run([sys.executable, __file__, "--data-case", split], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout)
    print(f"a full-size shard (20,480 x 2,049): converted in {found['convert_seconds']:.1f} s on one core, peak memory "
          f"{found['peak_bytes'] / 1e6:.0f} MB; batches delivered at {found['tokens_per_second'] / 1e6:,.0f} M tokens/s")
    return {"name": "data", **found}


# ---- in the command's process ----------------------------------------------------------------------------------

def start(case: Case) -> subprocess.Popen:
    env = {**os.environ, **({"OMP_NUM_THREADS": str(case.threads)} if case.threads else {})}
    return subprocess.Popen([sys.executable, __file__, "--case", json.dumps(vars(case))], text=True, env=env,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def ask(process: subprocess.Popen, case: Case, line: str | None) -> Any:
    """Send a line to a case's process, if any, and read its answer."""
    if line is not None:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise UserError(f"bench: {case.name} ended early with exit code {process.wait()}; its message is above")
    return answer


def measure(cases: list[Case], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Run the cases side by side, in turns; one result each."""
    processes, times = [], [[] for _ in cases]
    try:
        for case in cases:  # one after the other, so that no warm-up disturbs another
            processes.append(start(case))
            ask(processes[-1], case, None)
        for _ in range(rounds):
            for case, process, seconds in zip(cases, processes, times):
                seconds += json.loads(ask(process, case, str(steps)))
        ends = [json.loads(ask(process, case, "end")) for case, process in zip(cases, processes)]
    finally:
        for process in processes:
            process.stdin.close()
            process.wait(timeout=60)
    return [result(case, seconds, end) for case, seconds, end in zip(cases, times, ends)]


def result(case: Case, seconds: list[float], end: dict[str, Any]) -> dict[str, Any]:
    median = statistics.median(seconds)
    speed = case.batch * case.seq_len / median
    peak = next((f for name, f in train.PEAK_FLOPS.items() if name in end["device"]), None)
    return {**vars(case), "name": case.name, "tokens_per_second": speed, "step_seconds": median,
            "steps_timed": len(seconds), "peak_bytes": end["peak_bytes"], "device": end["device"],
            "flops_per_token": end["flops_per_token"], "mfu": speed * end["flops_per_token"] / peak if peak else None}


def show(results: list[dict[str, Any]]) -> None:
    """The table of one preset; ratios are against the stock Llama where it ran, else the first row."""
    base = next((r for r in results if r["mode"] == "hf"), results[0])
    first = results[0]
    print(f"\n{first['device']}, torch {torch.__version__}: {first['batch']} x {first['seq_len']} tokens a step, vocabulary "
          f"{VOCAB:,}, median of {first['steps_timed']} steps; ratios to {base['name']}")
    print(f"{'':44}{'tokens/s':>10}{'ratio':>8}{'peak MB':>9}{'ratio':>8}{'MFU':>8}")
    for r in results:
        mfu = f"{r['mfu']:.1%}" if r["mfu"] else "-"
        print(f"{r['name']:44}{r['tokens_per_second']:10,.0f}{r['tokens_per_second'] / base['tokens_per_second']:8.2f}"
              f"{r['peak_bytes'] / 1e6:9,.0f}{r['peak_bytes'] / base['peak_bytes']:8.2f}{mfu:>8}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tiny"], choices=["tiny", "small", "medium", "large"])
    parser.add_argument("--modes", nargs="+", default=["full", "r16"], help="full, or rN for ReLoRA of rank N")
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0], help="of ReLoRA (default: 0)")
    parser.add_argument("--compile", nargs="+", choices=["on", "off"], default=["off"])
    parser.add_argument("--baseline", choices=["hf"], help="beside it, the stock transformers Llama")
    parser.add_argument("--batch", type=int, default=2, help="rows a step (default: 2)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a row (default: 1024)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each case (default: 4)")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads of each case (default: torch's)")
    parser.add_argument("--data", action="store_true", help="also measure conversion and delivery of a full-size shard")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--data-case", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.case:
        return work(Case(**json.loads(args.case)))
    if args.data_case:
        return work_on_data(args.data_case)
    results = [bench_data()] if args.data else []
    for preset in args.presets:
        cases = []
        for compiled in (c == "on" for c in args.compile):
            common = {"compile": compiled, "batch": args.batch, "seq_len": args.seq_len, "threads": args.threads}
            for mode in args.modes:
                for dropout in args.dropout if mode != "full" else [0.0]:
                    cases.append(Case(preset, mode, dropout, **common))
            if args.baseline:
                cases.append(Case(preset, "hf", 0.0, **common))
        for case in cases:
            case_config(case)  # a mistake shows before anything runs
        results += (rows := measure(cases, args.rounds, args.steps))
        show(rows)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    dist.command(main)
