"""What a run will take, before it takes it: parameters, memory, disk, and the hours of its steps by a few that are measured.

`train.py CONFIG --plan` measures on the machine and the ranks that it is started with, and writes nothing; every start warns
where disk or memory are too small.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import checkpoint
from config import Config
from data import DataError, TokenDataset
from hub import architecture, tokenizers
from hub.folders import write_safetensors
from hub.llama import plain_state
from instruments import snapshots
from relora import ReLoRALinear, has_adapters, relora_layers
from runtime import dist, machine
from runtime.files import free_bytes
from runtime.log import log
from runtime.wrap import SHARDED, eval_mode

MOMENTS = {"SGD": 1, "Muon": 1}  # tensors of a parameter's own size that an optimizer keeps; Adam and its kin: 2
TEXT_BYTES = 4  # of a token, about: a snapshot holds its rows as text too
RECORD_BYTES = 350  # of a line of metrics.jsonl
SCATTERED = 1.05  # a whole run leaves more holes in its memory than a trial: 2 to 12 % were seen
ROUNDS = 3


class Parts(NamedTuple):
    """Bytes of what a run holds."""
    weights: int
    gradients: int
    moments: int


def parts_of(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Parts:
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    moments = sum(MOMENTS.get(type(o).__name__, 2) * p.nbytes for o in optimizers for g in o.param_groups for p in g["params"])
    return Parts(sum(t.nbytes for t in model.state_dict().values()), trained, moments)


# ---- disk ------------------------------------------------------------------------------------------------------

def disk(cfg: Config, model: nn.Module, parts: Parts, rows: dict[str, int], first: int = 0) -> dict[str, tuple[int, int]]:
    """{kind: (how many, bytes of each)} of the files that a run writes from step `first` on; `rows` of each split's snapshot."""
    due = [cfg.due(step, step == first) for step in range(first, cfg.last_step + 1)]
    states, kept = sum(d.state for d in due), cfg.checkpointing.keep_training_states
    adapters = sum(t.nbytes for layer in relora_layers(model).values() for t in (layer.lora_A, layer.lora_B))
    found = {"weights": (sum(d.state or d.snapshot for d in due), parts.weights - adapters),
             "training states": (states if kept is None else min(states, kept), parts.weights + parts.moments),
             "record": (1, RECORD_BYTES * (cfg.last_step - first) // cfg.monitoring.logging.log_every_n_steps)}
    if rows:
        size = sum(snapshot_bytes(cfg, model, count, first_split) for first_split, count in zip((True, False), rows.values()))
        found["snapshots"] = sum(d.snapshot for d in due), size
    return found


def snapshot_bytes(cfg: Config, model: nn.Module, rows: int, with_weights: bool) -> int:
    """Of one split's; weights are written once, and linked by the other split."""
    size = rows * row_bytes(cfg, model)
    for layer in snapshots.chosen_layers(model, cfg.checkpointing.learning_dynamics.layer_suffixes).values():
        whole = 4 * layer.in_features * layer.out_features
        factors = layer.lora_A.nbytes + layer.lora_B.nbytes if isinstance(layer, ReLoRALinear) else 0
        base = whole if factors and layer.weight is not None else 0
        size += (whole + factors) + with_weights * (whole + factors + base)
    return size


def row_bytes(cfg: Config, model: nn.Module) -> int:
    """Of one row in a snapshot: its tokens, their text, its activations."""
    dynamics = cfg.checkpointing.learning_dynamics
    positions = len(dynamics.sequence_idx) if isinstance(dynamics.sequence_idx, list) else 1
    return ((cfg.model.max_seq_len + 1) * (8 + TEXT_BYTES)
            + 4 * positions * sum(snapshots.widths(model, dynamics.layer_suffixes).values()))


def snapshot_rows(cfg: Config) -> dict[str, int]:
    """{split: rows} of a snapshot; of the val one as many as are allowed, where its data are not at hand."""
    dynamics = cfg.checkpointing.learning_dynamics
    if dynamics is None:
        return {}
    most = dynamics.max_rows or cfg.data.dataloader.batch_size
    rows = {"train": min(most, cfg.data.dataloader.batch_size)}
    if dynamics.eval_data is not None:
        name = cfg.data.dataset.name if dynamics.eval_data == "val" else dynamics.eval_data
        with contextlib.suppress(DataError):
            most = min(most, len(TokenDataset(name, "val")))
        rows["val"] = most
    return rows


def misfits(cfg: Config, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> Iterator[str]:
    """A line for each of disk and memory that is too small for what is left of a run."""
    parts, folder = parts_of(model, optimizers), Path(cfg.checkpointing.runs_dir)
    kinds = disk(cfg, model, parts, snapshot_rows(cfg), step)
    size, free = sum(count * each for count, each in kinds.values()), free_bytes(folder)
    if size > free:
        fix = "" if cfg.checkpointing.keep_training_states else "checkpointing.keep_training_states=2, "
        yield (f"the run will write about {size / 1e9:,.1f} GB ({told(kinds)}), and {folder} has {free / 1e9:,.1f} GB free; make "
               f"room, or use {fix}a larger checkpointing.save_every_n_steps")
    here = 1 if cfg.training.strategy in SHARDED else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_cpu = next(model.parameters()).device.type == "cpu"
    held = (sum(parts) * here if on_cpu else 0) + parts.weights + parts.moments  # and a copy, while a checkpoint is written
    if memory_bytes() and held > memory_bytes():
        yield (f"weights, gradients, moments and a checkpoint's copy take {held / 1e9:,.1f} GB, and this machine has "
               f"{memory_bytes() / 1e9:,.1f} GB of memory; see train.py CONFIG --plan")


def told(kinds: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{count:,} x {name} {size / 1e6:,.1f} MB" if count > 1 else f"{name} {size / 1e6:,.1f} MB"
                     for name, (count, size) in kinds.items())


def memory_bytes() -> int:
    """Of this machine, or of the share of it that its container or job may use; 0 where it does not tell."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    with contextlib.suppress(OSError, ValueError):  # "max": no less than the machine
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=0)


# ---- a trial ---------------------------------------------------------------------------------------------------

class Trial(NamedTuple):
    """Seconds on this rank, and bytes at its peak: of its GPU, or of its process."""
    step: float
    evaluation: float
    snapshot: float
    memory: int


def trial(state: Any, train_step: Callable, rows: dict[str, int]) -> Trial:
    """What a run does, in its order, on made-up rows, a micro-batch or two of each; and count on from there."""
    cfg, model, device = state.cfg, state.model, state.device
    (micro, accumulation), ranks, metrics = cfg.micro_batches(dist.world_size()), dist.world_size(), cfg.evaluation.metrics or ()
    evaluating = look = left = 0.0
    architecture.not_llama(cfg.model)
    tokenizers.load_tokenizer(Path(cfg.data.dataset.name))  # its library, too, stays in memory
    write_nowhere(state)
    if metrics:
        some, val = made_up(cfg, max(getattr(cfg.evaluation, name).batch_size for name in metrics), device), cfg.evaluation.val
        with torch.no_grad(), eval_mode(model, device):
            took = seconds(lambda: model(some[:, :-1], some[:, 1:]), device)
        evaluating = took * (val.max_rows or 0) / len(some) / ranks if "val" in metrics else 0.0
    held = []  # as while it is written
    for count in rows.values():
        dynamics = cfg.checkpointing.learning_dynamics
        some = made_up(cfg, min(dynamics.batch_size * ranks, count), device).cpu().numpy()
        took = seconds(lambda: held.append(snapshots.snapshot(model, some, dynamics, device)), device)
        look += took * count / len(some)
        left += (count - len(some)) * row_bytes(cfg, model) * (dist.rank() == 0)
    batch = [(number, made_up(cfg, micro, device)) for number in range(min(2, accumulation))]
    train_step(state, batch)  # compiles, and makes the optimizer's state
    one, two = (statistics.median(seconds(lambda: train_step(state, some), device) for _ in range(ROUNDS)) for some in
                (batch[:1], batch))
    write_nowhere(state)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else int(SCATTERED * machine.peak_memory() + left)
    return Trial(one + (accumulation - 1) * max(0.0, two - one), evaluating, look, memory)


class Nowhere:
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass


def write_nowhere(state: Any) -> None:
    """What a checkpoint takes besides its disk: a copy of everything, written in a thread."""
    whole = checkpoint.gather_state(state.model, state.optimizers)

    def write() -> None:
        write_safetensors(Nowhere(), plain_state(whole["model"], state.cfg.model))
        checkpoint.torch_writer(whole).write(Nowhere())
    if dist.rank() == 0:
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def made_up(cfg: Config, rows: int, device: torch.device) -> Tensor:
    return torch.randint(cfg.model.vocab_size, (rows, cfg.model.max_seq_len + 1), device=device)


def tell(state: Any, train_step: Callable) -> None:
    """Print the plan of a run whose state is `state`. Every rank must call it."""
    cfg, model = state.cfg, state.model
    rows, parts = snapshot_rows(cfg), parts_of(model, state.optimizers)
    kinds = disk(cfg, model, parts, rows)
    micro, _ = cfg.micro_batches(dist.world_size())
    log.info(f"measuring a few micro-batches of {micro} rows of {cfg.model.max_seq_len} tokens on {state.device.type} ...")
    with machine.advice(micro):
        found = dist.all_gather_object(trial(state, train_step, rows))
    slowest = Trial(*(max(values) for values in zip(*found)))
    lines = [f"parameters   {parameters(model)}", f"memory       {memory(cfg, state.device, parts, slowest.memory)}",
             f"disk         {sum(n * size for n, size in kinds.values()) / 1e9:,.2f} GB: {told(kinds)}; "
             f"{free_bytes(Path(cfg.checkpointing.runs_dir)) / 1e9:,.1f} GB free",
             f"work         {work(cfg)}", f"time         {hours(cfg, slowest)}"]
    for line in [*lines, *misfits(cfg, model, state.optimizers, 0)]:
        log.info(line)


def parameters(model: nn.Module) -> str:
    counts: Counter = Counter()
    for name, parameter in model.named_parameters():
        part = "adapters" if has_adapters([name]) else name.split(".")[2 if name.startswith("layers.") else 0]
        counts["norms" if part.endswith("norm") else part] += parameter.numel()
    trained = model.num_parameters(trainable_only=True)
    return f"{model.num_parameters():,}, of which {trained:,} train: " + ", ".join(f"{part} {n:,}" for part, n in counts.items())


def memory(cfg: Config, device: torch.device, parts: Parts, peak: int) -> str:
    sharded = {"fsdp": dist.world_size(), "hsdp": int(os.environ.get("LOCAL_WORLD_SIZE", 1))}
    share = sharded.get(cfg.training.strategy, 1)
    held = "".join(f"{name} {size / share / 1e9:,.3f}, " for name, size in parts._asdict().items())
    what = "of the GPU" if device.type == "cuda" else "of the process"
    rest = (peak - sum(parts) / share) / 1e9
    return (f"{peak / 1e9:,.3f} GB {what} at the peak of a rank: {held}the rest (activations, logits, a checkpoint's copy, torch "
            f"itself) {rest:,.3f}")


def work(cfg: Config) -> str:
    tokens = cfg.data.dataloader.batch_size * cfg.model.max_seq_len
    return f"{cfg.last_step:,} steps of {tokens:,} tokens: {cfg.last_step * tokens:,} tokens"


def hours(cfg: Config, of: Trial) -> str:
    due = [cfg.due(step, step == 0) for step in range(cfg.last_step + 1)]
    counts = {"steps": (cfg.last_step, of.step), "evaluations on val": (sum(d.evaluation for d in due), of.evaluation),
              "snapshots": (sum(d.snapshot for d in due), of.snapshot)}
    total = sum(count * each for count, each in counts.values())
    parts = ", ".join(f"{count:,} {name} of {each:,.3g} s" for name, (count, each) in counts.items() if each)
    return f"{total / 3600:,.2f} hours on this machine: {parts}"
