"""How cost grows: every axis of the work stretched over three sizes, with times, peak memory and exponent.

    python tests/scale.py                          # every axis, about 25 minutes on 2 cores; prints a Markdown table
    python tests/scale.py width rows --small       # some, at sizes for a test
    python tests/scale.py --project OTHER          # another checkout's commands on the same inputs
    python tests/scale.py --presets medium large   # every command on the large decoders; an hour, 30 GB of disk

A size is a whole command, with one thread a process: seconds of the clock and of the processor, both less those of the smallest
run of one step, and the memory of the largest process. The exponent is log(ratio of processor times) / log(ratio of sizes) to the
size before. No process may hold more than 256 files open.
"""

from __future__ import annotations

import functools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

import lab  # noqa: E402
from data import shard_entry, token_dtype, write_index  # noqa: E402
from hub.llama import byte_tokenizer_json  # noqa: E402
from runtime.command import Parser  # noqa: E402

Words = list[Any]
ROWS = 8  # of a batch
SNAPSHOT = "checkpointing.learning_dynamics.eval_data=val"


class Axis(NamedTuple):
    """What is stretched; `prepare(folder, size)` returns the words of the command that is timed."""
    unit: str
    sizes: tuple[int, int, int]
    small: tuple[int, int, int]
    prepare: Callable[[Path, int], Words]


class Cost(NamedTuple):
    seconds: float
    processor: float  # seconds
    megabytes: float


# ---- what is made ----------------------------------------------------------------------------------------------

def dataset(folder: Path, rows: int = 64, row_length: int = 17, vocab: int = 257, shards: int = 1) -> Path:
    """Random tokens: `rows` in each of `shards` of the split train, and as many in val."""
    rng, kinds = np.random.default_rng(0), token_dtype(vocab)
    for split, count in (("train", shards), ("val", 1)):
        out = folder / split
        out.mkdir(parents=True)
        entries = []
        for number in range(count):
            path = out / f"shard-{number:05d}.npy"
            np.save(path, rng.integers(vocab, size=(rows, row_length)).astype(kinds))
            entries.append(shard_entry(path, rows))
        write_index(out, entries, row_length, vocab, "random tokens")
    numerals = {"type": "WordLevel", "vocab": {str(i): i for i in range(vocab)}, "unk_token": "0"}  # any of so many ids do
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json() | {"added_tokens": [], "model": numerals}))
    return folder


def training(folder: Path, *words: str, rows: int = 64, shards: int = 1, relora: bool = False, steps: int = 2,
             **model: Any) -> Words:
    """A small run with a model of these sizes, on random tokens: train.py's words."""
    tree = lab.tiny_tree(folder / "data", folder / "runs", relora=relora)
    tree["model"] |= {"vocab_size": 257, "max_seq_len": 16} | model
    tree["training"]["optimization"]["gradient_accumulation_steps"] = 1
    tree["training"]["max_steps"], tree["evaluation"]["metrics"] = steps, None
    tree["checkpointing"] |= {"learning_dynamics": None, "save_every_n_steps": 1_000_000}
    if not (folder / "data").exists():
        dataset(folder / "data", rows, tree["model"]["max_seq_len"] + 1, tree["model"]["vocab_size"], shards)
    return ["train.py", lab.write_config(folder / "config.yaml", tree), *words]


def wide(folder: Path, *words: str, d: int = 96, **more: Any) -> Words:
    """`training` of rows of 128 tokens with heads of 8 or more."""
    sizes = {"d_model": d, "attention_n_heads": 12, "attention_n_kv_heads": 4, "activation_hidden_dim": 4 * d, "max_seq_len": 128}
    return training(folder, *words, **(sizes | more))


def width(folder: Path, d: int) -> Words:
    return wide(folder, d=d, steps=4)


def layers(folder: Path, count: int) -> Words:
    return wide(folder, n_layers=count, steps=4)


def length(folder: Path, tokens: int) -> Words:
    return wide(folder, max_seq_len=tokens, steps=4)


def vocabulary(folder: Path, ids: int) -> Words:
    return wide(folder, vocab_size=ids, steps=4)


def rank(folder: Path, r: int) -> Words:
    return wide(folder, f"model.relora.r={r}", d=384, relora=True, steps=4)


def steps(folder: Path, count: int) -> Words:
    return training(folder, steps=count)


def ranks(folder: Path, processes: int) -> Words:
    return ["torchrun", processes, *wide(folder, d=192, steps=64)]


def micro_batches(folder: Path, count: int) -> Words:
    return training(folder, f"data.dataloader.batch_size={ROWS * count}", f"training.micro_batch_size={ROWS}",
                    f"training.optimization.gradient_accumulation_steps={count}")


def merges(folder: Path, count: int) -> Words:
    """As many steps of each size; more and more of them merge."""
    return training(folder, f"model.relora.reset_frequency={4096 // count}", "training.optimization.restart_warmup_steps=1",
                    relora=True, steps=4096)


def shards(folder: Path, count: int) -> Words:
    """A start in a data set of so many shards."""
    return training(folder, shards=count, rows=1)


def shards_read(folder: Path, count: int) -> Words:
    """Three times through so many shards of one batch each."""
    return training(folder, shards=count, rows=ROWS, steps=3 * count)


def saved(folder: Path, count: int, *words: str) -> Words:
    """A run that has made so many step folders."""
    made = training(folder, "checkpointing.save_every_n_steps=1", *words, steps=count)
    spend(made, lab.ROOT)
    return made


def step_folders(folder: Path, count: int) -> Words:
    """A resume where so many whole checkpoints are."""
    return [*saved(folder, count), f"training.max_steps={count + 1}"]


def pruning(folder: Path, count: int) -> Words:
    """A resume that removes all but two of so many training states."""
    return [*saved(folder, count), f"training.max_steps={count + 1}", "checkpointing.keep_training_states=2"]


def record(folder: Path, count: int) -> Words:
    """A comparison of two runs with a record of so many lines."""
    spend(training(folder, SNAPSHOT), lab.ROOT)
    run = folder / "runs/run"
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    (run / "metrics.jsonl").write_text("".join(json.dumps(line | {"step": step}) + "\n" for step in range(1, count + 1)))
    shutil.copytree(run, folder / "runs/other")
    return ["analyze.py", "compare", run, folder / "runs/other", "--out", folder / "both"]


def run_folders(folder: Path, count: int) -> Words:
    """A start beside so many runs."""
    words = training(folder)
    spend(words, lab.ROOT)
    for number in range(count):
        shutil.copytree(folder / "runs/run", folder / f"runs/run-{number}", copy_function=os.link)
    return [*words, "checkpointing.run_name=new"]


def rows(folder: Path, count: int) -> Words:
    """One snapshot of so many rows of 512 tokens."""
    return [*wide(folder, max_seq_len=512, rows=count, n_layers=12, steps=1), SNAPSHOT,
            f"checkpointing.learning_dynamics.max_rows={count}", "data.dataloader.batch_size=1", "training.micro_batch_size=1"]


def snapshots(folder: Path, count: int) -> Words:
    """An analysis of so many snapshots."""
    spend([*training(folder, relora=True, steps=count), "checkpointing.save_every_n_steps=1",
           SNAPSHOT], lab.ROOT)
    return ["analyze.py", folder / "runs/run"]


def width_analysed(folder: Path, d: int) -> Words:
    """An analysis of two snapshots of 2 layers, so wide."""
    spend([*wide(folder, d=d, steps=1), SNAPSHOT], lab.ROOT)
    return ["analyze.py", folder / "runs/run"]


AXES = {
    "width": Axis("d_model, 2 layers", (96, 384, 1536), (24, 48, 96), width),
    "layers": Axis("layers, d 96", (2, 12, 96), (1, 2, 4), layers),
    "length": Axis("tokens a row", (128, 512, 2048), (16, 32, 64), length),
    "vocabulary": Axis("ids", (257, 4096, 50304), (257, 300, 400), vocabulary),
    "rank": Axis("r at d 384", (4, 16, 128), (2, 4, 8), rank),
    "ranks": Axis("processes, one batch", (1, 2, 4), (1, 2, 4), ranks),
    "steps": Axis("steps", (250, 1000, 4000), (10, 20, 40), steps),
    "micro-batches": Axis("micro-batches of one step", (16, 128, 1024), (1, 2, 4), micro_batches),
    "merges": Axis("merges in 4,096 steps", (1, 64, 1024), (1, 2, 4), merges),
    "shards": Axis("shards, a start", (10, 1000, 10000), (1, 10, 20), shards),
    "shards-read": Axis("shards, read three times", (10, 100, 1000), (1, 2, 4), shards_read),
    "step-folders": Axis("step folders, a resume", (10, 100, 1000), (1, 2, 4), step_folders),
    "pruning": Axis("training states pruned at once", (10, 100, 1000), (3, 4, 5), pruning),
    "record": Axis("lines of a record, compared", (1000, 10000, 100000), (10, 20, 40), record),
    "run-folders": Axis("run folders beside", (10, 100, 1000), (1, 2, 4), run_folders),
    "rows": Axis("rows of a snapshot, 512 tokens", (16, 64, 256), (2, 4, 8), rows),
    "snapshots": Axis("snapshots analysed", (5, 20, 80), (2, 3, 4), snapshots),
    "width-analysed": Axis("d_model, 2 snapshots analysed", (96, 384, 768), (24, 48, 96), width_analysed),
}
AT_NOTHING = {"analyze.py": ["analyze.py", "--list"]}  # of the others a run of one step


def through(preset: str, folder: Path) -> Iterator[tuple[str, Words]]:
    """(what it does, the words) of every command on a preset with ReLoRA; rows are shorter than the preset's."""
    data, run = dataset(folder / "data", rows=8, row_length=129, vocab=50_304), folder / "runs/run"
    config = [lab.ROOT / f"config/pico-relora-{preset}.yaml", f"data.dataset.name={data}", f"checkpointing.runs_dir={folder}/runs",
              "checkpointing.run_name=run", "model.max_seq_len=128", "model.relora.reset_frequency=2",
              "data.dataloader.batch_size=4", "training.micro_batch_size=4", "training.fabric.num_devices=1",
              "training.fabric.accelerator=cpu", "training.fabric.precision=32-true", "evaluation.metrics=[val]",
              "checkpointing.learning_dynamics.eval_data=val", "checkpointing.learning_dynamics.max_rows=4",
              "checkpointing.learning_dynamics.steps=null", "checkpointing.save_every_n_steps=2",
              "training.optimization.gradient_accumulation_steps=1", "training.optimization.lr_warmup_steps=1",
              "training.optimization.restart_warmup_steps=1", "training.max_steps=3"]
    yield "train 2 steps with a merge, 2 snapshots, val", ["train.py", *config, "training.stop_at_step=2"]
    yield "resume, train 1 step, snapshot, val", ["train.py", *config]
    yield "evaluate val", ["evaluate.py", run, "evaluation.metrics=[val]"]
    yield "sample 1 token", ["sample.py", run, "--prompt", "1 2 3", "--tokens", "1"]
    yield "sample 17 tokens", ["sample.py", run, "--prompt", "1 2 3", "--tokens", "17"]
    yield "export hf", ["export.py", "hf", run, folder / "out"]
    yield "replay step 1", ["replay.py", run, "--steps", "1"]
    yield "analyze", ["analyze.py", run]


# ---- what it costs ---------------------------------------------------------------------------------------------

def spend(words: Words, project: Path) -> Cost:
    """Run a command of the project to its end. Raises RuntimeError, with its last words, where it fails."""
    launcher = [sys.executable]
    if words[0] == "torchrun":
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={words[1]}"]
        words = words[2:]
    script, *rest = map(str, words)
    with tempfile.TemporaryFile("w+") as told:
        begun = time.monotonic()
        process = subprocess.Popen([*launcher, project / script, *rest], cwd=project, stdout=told, stderr=told,
                                   env={**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        took = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            told.seek(0)
            raise RuntimeError(f"{' '.join(words[:1])} ended with {process.returncode}:\n{told.read()[-3000:]}")
    return Cost(took, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


@functools.cache
def at_nothing(project: Path, command: str, processes: int) -> Cost:
    """Of a command that has nothing to do."""
    with tempfile.TemporaryDirectory() as folder:
        words = AT_NOTHING.get(command) or training(Path(folder), steps=1)
        return spend(["torchrun", processes, *words] if processes else words, project)


def measure(name: str, project: Path, small: bool) -> Iterator[str]:
    """A row of the table for each size of an axis."""
    axis, before = AXES[name], None
    for size in axis.small if small else axis.sizes:
        with tempfile.TemporaryDirectory() as folder:
            words = axis.prepare(Path(folder), size)
            processes = words[1] if words[0] == "torchrun" else 0
            nothing = at_nothing(project, words[2 if processes else 0], processes)
            cost = spend(words, project)
        more, exponent = max(cost.processor - nothing.processor, 0.01), ""
        if before:
            exponent = f"{math.log(more / before[1]) / math.log(size / before[0]):.2f}"
        yield (f"| {name} | {size:,} {axis.unit} | {max(cost.seconds - nothing.seconds, 0):.1f} | {more:.1f} "
               f"| {cost.megabytes:,.0f} | {exponent} |")
        before = size, more


def measure_presets(presets: list[str], project: Path) -> Iterator[str]:
    """The whole cost of each command: to start is part of it."""
    yield f"| preset | command | seconds | of processor | MB |\n|{' --- |' * 5}"
    for preset in presets:
        with tempfile.TemporaryDirectory() as folder:
            for label, words in through(preset, Path(folder)):
                cost = spend(words, project)
                yield f"| {preset} | {label} | {cost.seconds:.1f} | {cost.processor:.1f} | {cost.megabytes:,.0f} |"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("axes", nargs="*", help=f"which: {', '.join(AXES)} (default: all)")
    parser.add_argument("--small", action="store_true", help="sizes of seconds, which measure nothing: for a test")
    parser.add_argument("--presets", nargs="+", choices=["tiny", "small", "medium", "large"], help="every command on these instead")
    parser.add_argument("--project", type=Path, default=lab.ROOT, help="the checkout whose commands are measured")
    args = parser.parse_args()
    if unknown := [name for name in args.axes if name not in AXES]:
        parser.error(f"no axis {', '.join(unknown)}; there are {', '.join(AXES)}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    if args.presets:
        for line in measure_presets(args.presets, args.project):
            print(line, flush=True)
        return
    print(f"| axis | size | seconds | of processor | MB | exponent |\n|{' --- |' * 6}", flush=True)
    for name in args.axes or AXES:
        try:
            for line in measure(name, args.project, args.small):
                print(line, flush=True)
        except RuntimeError as error:
            print(f"| {name} | failed: {str(error).strip().splitlines()[-1]} | | | | |", flush=True)


if __name__ == "__main__":
    main()
