"""Measure training speed and memory, beside a stock Hugging Face Llama of the same shape.

    python bench.py                                            # tiny, full-rank and ReLoRA r 16, on this machine
    python bench.py --baseline hf --json bench.json            # and the stock Llama, taking turns in the same run
    python bench.py --presets tiny small --batch 16 --seq-len 2048 --compile on off --dropout 0.0 0.1
    python bench.py --sweep                                    # seven shapes, each beside the stock Llama, and what it reaches
    python bench.py --everything --json gpu.json               # all that docs/performance.md wants of a GPU, in one go

Every case lives in a process of its own, so that its peak memory is its own. The cases of a preset take turns, a few
steps at a time, so that a machine whose speed drifts treats them alike; the median step is reported. A step is
the whole of train.train_step: forward, backward, gradient norm, fused AdamW. MFU counts attention as PaLM does.
The second table breaks a step down: forward and backward, optimizer, wait for data, and what a merge and a checkpoint
cost when they are due; "stall" is how long training stands still for a checkpoint that is written meanwhile.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import config  # noqa: F401  # isort: skip  # before torch, whose threads it teaches to wait
import numpy as np
import torch

from config import Config, UserError, load_config
from hub import parquet
from instruments import planning, timing
from model import PicoDecoder
from runtime import machine
from runtime.command import Parser, command
from runtime.progress import Progress
from train import TrainState, build

VOCAB = 50304
PRESETS = ("tiny", "small", "medium", "large")
SMALLER_BATCH = {"medium": 8, "large": 4}  # for --everything: three models share the memory
SWEEP = (  # d_model, layers, heads, key and value heads, tokens a row, rows a step, ids
    (128, 2, 4, 2, 128, 16, 257), (96, 12, 12, 4, 128, 16, 257), (96, 12, 12, 4, 2048, 1, 50304), (384, 6, 6, 2, 256, 4, 257),
    (384, 12, 12, 4, 512, 1, 50304), (768, 4, 12, 4, 512, 1, 50304), (1536, 2, 12, 4, 256, 1, 50304))
SWEPT = {"full-rank": ("full", 0.0), "r 16": ("r16", 0.0), "r 16, dropout 0.1": ("r16", 0.1), "r 128": ("r128", 0.0)}


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
    words: tuple[str, ...] = ()  # options of ours

    @property
    def name(self) -> str:
        mode = {"full": "full-rank", "hf": "stock transformers Llama"}.get(self.mode, f"ReLoRA {self.mode}")
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.preset} {mode}{dropout}{', compiled' if self.compile else ''}"


def case_config(case: Case, more: Iterable[str] = ()) -> Config:
    overrides = [f"data.dataloader.batch_size={case.batch}", f"training.micro_batch_size={case.batch}",
                 f"model.max_seq_len={case.seq_len}", f"training.compile={str(case.compile).lower()}",
                 "training.optimization.lr_warmup_steps=10"]
    if re.fullmatch(r"r\d+", case.mode):
        overrides += ["model.relora.target_modules=[attention, swiglu]", "model.relora.reset_frequency=2000",
                      f"model.relora.r={case.mode[1:]}", f"model.relora.lora_dropout={case.dropout}"]
    return load_config(Path(__file__).parent / f"config/pico-decoder-{case.preset}.yaml", [*overrides, *case.words, *more])


# ---- in the process of a case ----------------------------------------------------------------------------------

def train_state(case: Case, cfg: Config, device: torch.device) -> TrainState:
    precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    return TrainState(cfg, device, precision, *build(cfg, device, adapters=case.mode.startswith("r")), Progress(device))


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
        flops = PicoDecoder(m).flops_per_token()
    return step, flops


def work(case: Case) -> None:
    """Warm up, then answer each line "N" with the seconds of N steps, and "end" with the peak memory."""
    device = machine.pick_device()
    if case.threads:
        torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    cfg = case_config(case)
    rows = torch.randint(cfg.model.vocab_size, (case.batch, case.seq_len + 1), device=device)
    if case.mode == "hf":
        t, (step, flops) = None, stock_step(case, cfg, device, rows)
    else:
        t = train_state(case, cfg, device)
        step, flops = timing.our_step(t, rows), t.model.flops_per_token()
    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        print(json.dumps([planning.seconds(step, device) for _ in range(int(line))]), flush=True)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else machine.peak_memory()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    parts = timing.breakdown(t, rows) if t is not None else {}
    print(json.dumps({"peak_bytes": peak, "flops_per_token": flops, "device": name, "seconds_of": parts,
                      "peak_flops": machine.peak_flops(device)}), flush=True)


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
        for case in cases:
            processes.append(start(case))
            if not torch.cuda.is_available():  # on a CPU one after the other, so that no warm-up disturbs another
                ask(processes[-1], case, None)
        for case, process in zip(cases, processes) if torch.cuda.is_available() else ():  # while all of them compile
            ask(process, case, None)
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
    peak = end["peak_flops"]
    return {**vars(case), "name": case.name, "tokens_per_second": speed, "step_seconds": median,
            "steps_timed": len(seconds), "peak_bytes": end["peak_bytes"], "device": end["device"],
            "flops_per_token": end["flops_per_token"], "seconds_of": end["seconds_of"],
            "mfu": speed * end["flops_per_token"] / peak if peak else None}


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


def show_parts(results: list[dict[str, Any]]) -> None:
    """Milliseconds of the parts of a step, and of what is due now and then."""
    names = list(dict.fromkeys(name for r in results for name in r["seconds_of"]))
    print(f"\n{'milliseconds':44}" + "".join(f"{name.replace('checkpoint_', 'ckpt_'):>18}" for name in names))
    for r in results:
        if r["seconds_of"]:
            cells = (f"{1e3 * r['seconds_of'][n]:18.1f}" if n in r["seconds_of"] else f"{'-':>18}" for n in names)
            print(f"{r['name']:44}" + "".join(cells))


def sweep(args: argparse.Namespace) -> None:
    """A line for each shape of SWEEP: the stock Llama's speed, ours as ratios to it, and the share of the products' speed."""
    speed, results = timing.product_speed(machine.pick_device()), []
    print(f"tokens/s of the stock Llama, ratios to it, and the share of the {speed / 1e9:,.0f} GFLOP/s that products reach\n\n"
          f"| d, layers, heads, T, B, V | stock Llama | {' | '.join(SWEPT)} |\n|{' --- |' * (2 + len(SWEPT))}")
    for d, layers, heads, kv_heads, length, batch, ids in SWEEP:
        words = (f"model.d_model={d}", f"model.n_layers={layers}", f"model.attention_n_heads={heads}", f"model.vocab_size={ids}",
                 f"model.attention_n_kv_heads={kv_heads}", f"model.activation_hidden_dim={4 * d}", *args.set)
        stock, *ours = measure([Case("tiny", mode, dropout, args.compile[0] == "on", batch, length, args.threads, words)
                                for mode, dropout in (("hf", 0.0), *SWEPT.values())], args.rounds, args.steps)
        cells = (f"{r['tokens_per_second'] / stock['tokens_per_second']:.2f} "
                 f"({r['tokens_per_second'] * r['flops_per_token'] / speed:.0%})" for r in ours)
        print(f"| {d}, {layers}, {heads}/{kv_heads}, {length}, {batch}, {ids} | {stock['tokens_per_second']:,.0f} | "
              f"{' | '.join(cells)} |", flush=True)
        keep(results := [*results, stock, *ours], args.json)


def keep(results: list[dict[str, Any]], path: Path | None) -> None:
    """Write what there is so far: a run that is cut short has it."""
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")


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


def count_recompilations(preset: str, batch: int, seq_len: int) -> dict[str, Any]:
    case, device = Case(preset, "r16", 0.0, True, batch, seq_len, None), machine.pick_device()
    rows = torch.randint(VOCAB, (batch, seq_len + 1), device=device)
    found = timing.recompilations(train_state(case, case_config(case), device), rows)
    print(f"{preset}: {found['graphs']} graphs compiled in the first step, {found['over_3_merges']} more over 3 merges",
          flush=True)
    return {"name": "recompilations", "preset": preset, **found}


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--presets", nargs="+", default=["tiny"], choices=PRESETS)
    parser.add_argument("--modes", nargs="+", default=["full", "r16"], help="full, or rN for ReLoRA of rank N")
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0], help="of ReLoRA (default: 0)")
    parser.add_argument("--compile", nargs="+", choices=["on", "off"], default=["off"])
    parser.add_argument("--baseline", choices=["hf"], help="beside it, the stock transformers Llama")
    parser.add_argument("--batch", type=int, default=2, help="rows a step (default: 2)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a row (default: 1024)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each case (default: 4)")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads of each case (default: torch's)")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="options of our cases, such as "
                        "training.deterministic=false")
    parser.add_argument("--data", action="store_true", help="also measure conversion and delivery of a full-size shard")
    parser.add_argument("--attention", action="store_true", help="also compare attention backends")
    parser.add_argument("--recompilations", action="store_true", help="also count what merges make torch.compile do again")
    parser.add_argument("--run", action="store_true", help="also time 50 steps of train.py, loader and checkpoints on")
    parser.add_argument("--sweep", action="store_true", help="instead: seven shapes from d 96 to 1,536, beside the stock Llama")
    parser.add_argument("--everything", action="store_true", help="all of the above for all sizes, as a GPU with 80 GB wants it")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--data-case", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for mode in args.modes:
        if not re.fullmatch(r"full|r\d+", mode):
            raise UserError(f"--modes: {mode!r} is neither full nor rN, such as r16")
    if (args.baseline or args.sweep) and importlib.util.find_spec("transformers") is None:
        raise UserError("--baseline hf: needs transformers; pip install transformers")
    if args.everything:
        args.presets, args.compile, args.baseline, args.batch, args.seq_len = list(PRESETS), ["on"], "hf", 16, 2048
        args.data = args.attention = args.recompilations = args.run = True
    return args


def main() -> None:
    args = parse()
    if args.case:
        return work(Case(**json.loads(args.case)))
    if args.data_case:
        return print(json.dumps(timing.conversion(args.data_case, VOCAB)))
    if args.sweep:
        return sweep(args)
    results = [bench_data()] if args.data else []
    results += timing.sweep_attention(args.batch, args.seq_len) if args.attention else []
    results += [count_recompilations("tiny", args.batch, args.seq_len)] if args.recompilations else []
    results += [timing.whole_run(args.presets[0], args.batch, args.seq_len, VOCAB)] if args.run else []
    for preset in args.presets:
        cases = []
        batch = SMALLER_BATCH.get(preset, args.batch) if args.everything else args.batch
        for compiled in (c == "on" for c in args.compile):
            common = {"compile": compiled, "batch": batch, "seq_len": args.seq_len, "threads": args.threads, "words": args.set}
            for mode in args.modes:
                for dropout in args.dropout if mode != "full" else [0.0]:
                    cases.append(Case(preset, mode, dropout, **common))
            if args.baseline:
                cases.append(Case(preset, "hf", 0.0, **common))
        for case in cases:
            case_config(case)  # a mistake shows before anything runs
        results += (rows := measure(cases, args.rounds, args.steps))
        show(rows)
        show_parts(rows)
        keep(results, args.json)
    return None


if __name__ == "__main__":
    command(main)
