"""Evaluation: loss on held-out rows (val), Paloma perplexity, BLiMP minimal pairs; in training, and as a command.

    python evaluate.py runs/demo                                     # as the run's own config says, on its newest step
    python evaluate.py runs/demo/checkpoints/step_150 evaluation.metrics=[val]
    python evaluate.py LLAMA_FOLDER evaluation.metrics=[paloma,blimp] evaluation.blimp.dataset_name=BLiMP.zip
    torchrun --standalone --nproc_per_node=2 evaluate.py runs/demo   # the same numbers from any number of ranks

Paloma (arXiv 2312.10523) and BLiMP (1912.00582) are measured in float32, whatever the training's precision.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import config  # noqa: F401  # isort: skip  # before torch, whose threads it teaches to wait
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from config import (ConfigError, DatasetConfig, EvaluationConfig, LearningDynamicsConfig, ModelConfig, UserError,
                    config_from_dict, load_config)
from data import INDEX, TokenDataset, read_index, to_device
from hub.datasets import local_or_hub
from hub.llama import load_decoder, resolve
from hub.tokenizers import Tokenizer, load_tokenizer, text_bytes
from instruments import blimp
from runtime import dist, machine, signals
from runtime.command import Parser, command
from runtime.files import read_object, refuse_links, write_json
from runtime.kernels import IGNORE
from runtime.log import log, printable
from runtime.progress import perplexity
from runtime.wrap import eval_mode

T = TypeVar("T")
TIDY_TURNS = 64  # of an evaluation, between two calls of return_free_memory


class OutOfMemory(Exception):
    """One of the ranks had no memory left for a batch."""


def map_over_ranks(count: int, work: Callable[[int], T], what: str) -> list[T]:
    """[work(0), ..., work(count - 1)] on every rank; the numbers are dealt to the ranks in turn.

    What each call computes does not depend on the number of ranks. Under FSDP2 all ranks must run forward equally
    often, so a rank without a number left repeats the first and drops the result.
    """
    world, mine, problem = dist.world_size(), {}, None
    for turn in tqdm(range(-(-count // world)), desc=what, disable=None if dist.rank() == 0 else True, leave=False):
        signals.stop_point()
        number = turn * world + dist.rank()
        try:
            if problem is None:
                result = work(number if number < count else 0)
        except (RuntimeError, MemoryError) as error:
            if not machine.is_out_of_memory(error):
                raise
            problem = f"rank {dist.rank()} ran out of memory"  # told to the others at the end: until then they vote with us
        if number < count and problem is None:
            mine[number] = result
        if turn % TIDY_TURNS == TIDY_TURNS - 1:
            return_free_memory()
    parts = dist.all_gather_object((mine, problem))
    if problem := next((theirs for _, theirs in parts if theirs), None):
        raise OutOfMemory(problem)
    merged = {number: result for part, _ in parts for number, result in part.items()}
    return [merged[number] for number in range(count)]


def return_free_memory() -> None:
    """Have glibc give back what lies free between buffers in use: batches of many lengths once left 23 GB of such holes."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another system's library
        ctypes.CDLL(None).malloc_trim(0)


@torch.no_grad()
def losses_of(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Summed loss in nats of each row's labels: (B, T) int64 -> (B,) float64; eval mode, float32."""
    with eval_mode(model, inputs.device):
        return model(inputs, labels, reduction="none").cpu().double().sum(1).numpy()


def row_losses(model: nn.Module, rows: np.ndarray, batch_size: int, device: torch.device, what: str = "rows") -> np.ndarray:
    """Summed token loss in nats of each row (rows, tokens), in order, float64, on every rank."""
    def batch(number: int) -> np.ndarray:
        ids = to_device(rows[number * batch_size:(number + 1) * batch_size], device)
        return losses_of(model, ids[:, :-1], ids[:, 1:])
    return np.concatenate(map_over_ranks(-(-len(rows) // batch_size), batch, what))


def rows_metrics(losses: np.ndarray, tokens: int) -> dict[str, float]:
    """Of rows with `tokens` labels each: mean loss, perplexity over tokens, and the mean of the rows' perplexities.

    The last is the Pico models' published Paloma score; one bad document makes it explode.
    """
    loss = float(losses.sum() / (len(losses) * tokens))
    by_row = [perplexity(row / tokens) for row in losses]
    return {"loss": loss, "perplexity": perplexity(loss), "mean_row_perplexity": float(np.mean(by_row))}


def bits_per_byte(losses: np.ndarray, text_bytes: int) -> dict[str, float]:
    """The loss in bits for each byte of text, in which models of different tokenizers compare; nothing where there is no text."""
    bits = float(losses.sum()) / math.log(2)
    return {"bits_per_byte": bits / text_bytes} if text_bytes else {}


def by_source(losses: np.ndarray, tokens: int, sources: list[str]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for loss, source in zip(losses, sources):
        groups[source].append(loss)
    return {source: rows_metrics(np.array(group), tokens) for source, group in sorted(groups.items())}


def evaluate_blimp(model: nn.Module, pairs: list[blimp.Pair], tokenizer: Tokenizer, start: int | None, batch_size: int,
                   device: torch.device) -> dict[str, Any]:
    """Accuracy of full-sentence log-probabilities on minimal pairs; ties count as wrong.

    With `start`, a token id, before every sentence its first token is scored too; without, the first token has no
    probability and only conditions the others. Sentences of like length share a batch of 2 batch_size; those longer than
    the model are cut, and counted.
    """
    sentences = [([] if start is None else [start]) + tokenizer.encode(text) for p in pairs for text in (p.good, p.bad)]
    longest = model.cfg.max_seq_len + 1
    if cut := sum(len(ids) > longest for ids in sentences):
        log.warning(f"{cut} of {len(sentences)} BLiMP sentences are cut to the {longest} tokens that the model reads")
    # longest first: buffers that grew from batch to batch once left 6.5 GB of holes in the heap
    order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
    batches = [order[i:i + 2 * batch_size] for i in range(0, len(order), 2 * batch_size)]

    def batch(number: int) -> np.ndarray:
        chosen = [sentences[i][:longest] for i in batches[number]]
        width = max(2, max(map(len, chosen)))
        inputs, labels = np.zeros((len(chosen), width), np.int64), np.full((len(chosen), width), IGNORE, np.int64)
        for row, ids in enumerate(chosen):  # padding comes after: what is causal does not see it
            inputs[row, :len(ids)] = labels[row, :len(ids)] = ids
        ids, targets = to_device(inputs, device), to_device(labels, device)
        return losses_of(model, ids[:, :-1], targets[:, 1:])

    losses = np.empty(len(sentences))
    losses[np.concatenate(batches)] = np.concatenate(map_over_ranks(len(batches), batch, "BLiMP"))
    return {"start_token": start, "pairs": len(pairs), "cut": cut, **blimp.accuracies(pairs, losses[0::2] < losses[1::2])}


# ---- what there is to evaluate -------------------------------------------------------------------------------------

@dataclass
class Setting:
    """What evaluators are made from: their options, and the model and the data that they are about."""
    cfg: EvaluationConfig
    data: DatasetConfig
    model: ModelConfig
    dataset: Path  # the folder of the training data, for its val split and entropy
    tokenizer: Tokenizer
    device: torch.device

    def open_rows(self, name: str, split: str, key: str) -> TokenDataset:
        """The rows that the option `key` names, a folder or a Hub dataset. Raises ConfigError naming key and fix."""
        try:
            rows = TokenDataset(local_or_hub(name, split, self.data, self.model.vocab_size), split)
        except UserError as error:
            raise ConfigError(f"{key}: {name!r} cannot be had ({error}); give a folder made by shards.py, or null") from None
        if rows.vocab_size > self.model.vocab_size:
            raise ConfigError(f"{key}: {name!r} holds ids up to {rows.vocab_size - 1}, and the model knows "
                              f"{self.model.vocab_size}; give rows of the model's own tokenizer, or null")
        machine.same_data(key, rows.folder, rows.fingerprint)
        return rows

    def cut(self, rows: np.ndarray, longest: int, what: str) -> np.ndarray:
        """Rows of at most `longest` tokens more than the first, as the model reads them; says what is cut."""
        longest = min(longest, self.model.max_seq_len) + 1
        if rows.shape[1] > longest:
            log.warning(f"{what}: rows of {rows.shape[1]} tokens are cut to {longest}, which the model reads; the losses are of "
                        "these")
        return rows[:, :longest]

    def snapshot_rows(self, cfg: LearningDynamicsConfig) -> np.ndarray | None:
        """The rows of the val snapshot, where one is wanted."""
        if cfg.eval_data is None:
            return None
        name = str(self.dataset) if cfg.eval_data == "val" else cfg.eval_data
        rows = self.open_rows(name, "val", "checkpointing.learning_dynamics.eval_data")
        count = min(len(rows), cfg.max_rows or len(rows))
        if count < len(rows):
            log.info(f"the val snapshot: the first {count:,} of {len(rows):,} rows (checkpointing.learning_dynamics.max_rows)")
        return self.cut(rows.rows(0, count), self.model.max_seq_len, "the val snapshot")


class Evaluator(Protocol):
    """One kind of evaluation: opens its data at once, so that errors come at the start; measures a model when called."""

    def __init__(self, setting: Setting):
        """Raises ConfigError naming key and fix."""

    def __call__(self, model: nn.Module) -> tuple[dict[str, Any], str]:
        """(results, a line that tells them). Every rank must call it."""


class ValLoss:
    """Loss on the dataset's own val split."""

    def __init__(self, setting: Setting):
        self.options, self.device = setting.cfg.val, setting.device
        val = setting.open_rows(setting.dataset.as_posix(), "val", "evaluation.metrics")
        left = len(val) - self.options.skip_rows
        if left < 1:
            raise ConfigError(f"evaluation.val.skip_rows: {self.options.skip_rows} of {len(val)} rows leave none to evaluate")
        rows = val.rows(self.options.skip_rows, min(left, self.options.max_rows or left))
        self.rows = setting.cut(rows, setting.model.max_seq_len, "val")
        self.bytes = text_bytes(setting.tokenizer, self.rows)
        index = setting.dataset / "train" / INDEX
        self.entropy = read_index(index.parent).get("entropy") if index.exists() else None

    def __call__(self, model: nn.Module) -> tuple[dict[str, Any], str]:
        losses = row_losses(model, self.rows, self.options.batch_size, self.device, "val")
        results = {"rows": len(self.rows), "tokens": self.rows[:, 1:].size, **rows_metrics(losses, self.rows.shape[1] - 1),
                   **bits_per_byte(losses, self.bytes)}
        beside = (f" (the corpus's entropy: unigram {self.entropy['unigram']:.2f}, bigram {self.entropy['bigram']:.2f})"
                  if self.entropy else "")
        bits = f", {results['bits_per_byte']:.4f} bits a byte" if self.bytes else ""
        return results, f"val loss {results['loss']:.4f} nats a token{bits}{beside}"


class Paloma:
    """Perplexity on Paloma's documents, over tokens and as the mean over documents that Pico publishes."""

    def __init__(self, setting: Setting):
        self.options, self.device = setting.cfg.paloma, setting.device
        paloma = setting.open_rows(self.options.dataset_name, self.options.dataset_split, "evaluation.paloma.dataset_name")
        self.rows = setting.cut(paloma.rows(0, len(paloma)), self.options.max_length - 1, "paloma")
        self.bytes = text_bytes(setting.tokenizer, self.rows)
        shards = [shard.get("sources") for shard in paloma.index["shards"]]
        self.sources = [s for sources in shards for s in sources] if all(shards) else None

    def __call__(self, model: nn.Module) -> tuple[dict[str, Any], str]:
        losses = row_losses(model, self.rows, self.options.batch_size, self.device, "paloma")
        tokens = self.rows.shape[1] - 1
        results = {"rows": len(self.rows), "tokens": self.rows[:, 1:].size, **rows_metrics(losses, tokens),
                   **bits_per_byte(losses, self.bytes)}
        results["by_source"] = by_source(losses, tokens, self.sources) if self.sources else None
        return results, (f"paloma loss {results['loss']:.4f} nats a token, perplexity {results['perplexity']:.2f}, Pico score "
                         f"{results['mean_row_perplexity']:.2f}")


class Blimp:
    """Accuracy on BLiMP's minimal pairs."""

    def __init__(self, setting: Setting):
        self.options, self.device, self.tokenizer = setting.cfg.blimp, setting.device, setting.tokenizer
        self.pairs = blimp.load_pairs(self.options, setting.data.patience_minutes)
        if self.tokenizer.vocab_size > setting.model.vocab_size:
            raise ConfigError(f"evaluation.metrics: blimp needs a model of its tokenizer's {self.tokenizer.vocab_size} ids, and "
                              f"this one knows {setting.model.vocab_size}; leave blimp out")
        self.start = self.tokenizer.eos if self.options.start_token == "eos" else None
        if self.options.start_token == "eos" and self.start is None:
            raise ConfigError("evaluation.blimp.start_token: the tokenizer knows no end of text; name it in data.tokenizer.eos, "
                              "or use null")
        blimp.check_lengths(self.pairs, self.tokenizer, setting.model.max_seq_len + (self.start is None))

    def __call__(self, model: nn.Module) -> tuple[dict[str, Any], str]:
        results = evaluate_blimp(model, self.pairs, self.tokenizer, self.start, self.options.batch_size, self.device)
        return results, (f"BLiMP accuracy {results['accuracy']:.2%} on {len(self.pairs):,} pairs, start token {self.start}")


EVALUATORS: dict[str, type[Evaluator]] = {"val": ValLoss, "paloma": Paloma, "blimp": Blimp}


def make_evaluators(setting: Setting) -> dict[str, Evaluator]:
    """{name: evaluator} of what cfg.metrics asks for, in EVALUATORS' order. Raises ConfigError."""
    wanted = setting.cfg.metrics or []
    if unknown := set(wanted) - EVALUATORS.keys():
        raise ConfigError(f"evaluation.metrics: {', '.join(sorted(unknown))} is none of {', '.join(EVALUATORS)}")
    return {name: make(setting) for name, make in EVALUATORS.items() if name in wanted}


def run_evaluators(evaluators: dict[str, Evaluator], model: nn.Module, prefix: str = "") -> dict[str, dict[str, Any]]:
    """{name: results}, each told in a line; one that runs out of memory is told too, and left out. Every rank must call it."""
    results = {}
    for name, evaluator in evaluators.items():
        try:
            results[name], line = evaluator(model)
        except OutOfMemory as error:
            line = f"{name} is left out: {error}; lower evaluation.{name}.batch_size"
            log.warning(f"{prefix}{line}")
        else:
            log.info(f"{prefix}{line}")
    return results


def flat_metrics(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """{"eval/NAME_METRIC": number} for metrics.jsonl; the details stay in eval_results."""
    return {f"eval/{name}_{key}": value for name, found in results.items() for key, value in found.items()
            if isinstance(value, float)}


# ---- the command ---------------------------------------------------------------------------------------------------

def run_of(folder: Path) -> Path | None:
    """The run that a step folder belongs to."""
    run = folder.resolve().parent.parent
    return run if (run / "training_config.yaml").is_file() else None


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", help="a run (its newest step), a step folder, or a Llama folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options, as for train.py")
    parser.add_argument("--out", type=Path, help="JSON file (default: eval_results/ of the run; none for other folders)")
    args = parser.parse_intermixed_args()
    folder = resolve(args.model)
    run, words = run_of(folder), ["checkpointing.learning_dynamics=null", *args.overrides]
    cfg = load_config(run / "training_config.yaml", words) if run else config_from_dict({}, words)
    with dist.session(machine.pick_device()) as device:
        model = load_decoder(folder).to(device)
        dataset = Path(cfg.data.dataset.name) if run else folder
        setting = Setting(cfg.evaluation, cfg.data.dataset, model.cfg, dataset, load_tokenizer(folder), device)
        results = run_evaluators(make_evaluators(setting), model)
    if not results:
        raise ConfigError("evaluation.metrics: is empty; give one or more of val, paloma, blimp")
    out = args.out or (run and run / cfg.checkpointing.evaluation.eval_results_dir / f"{folder.name}.json")
    if dist.rank() == 0 and out is not None:
        write_results(out, results, beside=args.out is None)


def write_results(out: Path, results: dict[str, dict[str, Any]], beside: bool) -> None:
    """Write a JSON file; with `beside`, other metrics that it holds already stay."""
    try:
        refuse_links(*((out.parents[1], out) if beside else (out,)))
        out.parent.mkdir(parents=True, exist_ok=True)
        before = read_object(out) if beside and out.exists() else {}
        write_json(out, before | results)
    except (OSError, ValueError, UserError) as error:
        words = printable(f"{out}: cannot be written ({getattr(error, 'strerror', None) or error}); give another with --out")
        if not beside:
            raise UserError(words) from None
        print(words)  # such as the run of somebody else
    else:
        print(f"written to {out}")


if __name__ == "__main__":
    command(main)
