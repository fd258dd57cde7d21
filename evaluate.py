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
import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from config import Config, ConfigError, UserError, config_from_dict, load_config
from data import INDEX, TokenDataset, Tokenizer, load_tokenizer, read_index, to_device
from hub.datasets import local_or_hub
from hub.llama import load_decoder, resolve
from instruments import blimp
from runtime import dist, machine, signals
from runtime.command import Parser, command
from runtime.files import write_json
from runtime.kernels import IGNORE
from runtime.log import log
from runtime.wrap import eval_mode

T = TypeVar("T")
TIDY_TURNS = 64  # of an evaluation, between two calls of return_free_memory


def map_over_ranks(count: int, work: Callable[[int], T], what: str) -> list[T]:
    """[work(0), ..., work(count - 1)] on every rank; the numbers are dealt to the ranks in turn.

    What each call computes does not depend on the number of ranks. Under FSDP2 all ranks must run forward equally
    often, so a rank without a number left repeats the first and drops the result.
    """
    world, mine = dist.world_size(), {}
    for turn in tqdm(range(-(-count // world)), desc=what, disable=None if dist.rank() == 0 else True, leave=False):
        signals.stop_point()
        number = turn * world + dist.rank()
        result = work(number if number < count else 0)
        if number < count:
            mine[number] = result
        if turn % TIDY_TURNS == TIDY_TURNS - 1:
            return_free_memory()
    merged = {number: result for part in dist.all_gather_object(mine) for number, result in part.items()}
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


def perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))  # e^710 overflows


def rows_metrics(losses: np.ndarray, tokens: int) -> dict[str, float]:
    """Of rows with `tokens` labels each: mean loss, perplexity over tokens, and the mean of the rows' perplexities.

    The last is the Pico models' published Paloma score; one bad document makes it explode.
    """
    loss = float(losses.sum() / (len(losses) * tokens))
    by_row = [perplexity(row / tokens) for row in losses]
    return {"loss": loss, "perplexity": perplexity(loss), "mean_row_perplexity": float(np.mean(by_row))}


def by_source(losses: np.ndarray, tokens: int, sources: list[str]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for loss, source in zip(losses, sources):
        groups[source].append(loss)
    return {source: rows_metrics(np.array(group), tokens) for source, group in sorted(groups.items())}


def evaluate_blimp(model: nn.Module, pairs: list[blimp.Pair], tokenizer: Tokenizer, start: int | None, batch_size: int,
                   device: torch.device) -> dict[str, Any]:
    """Accuracy of full-sentence log-probabilities on minimal pairs; ties count as wrong.

    With `start`, a token id, before every sentence its first token is scored too; without, the first token has no
    probability and only conditions the others. Sentences of like length share a batch of 2 batch_size.
    """
    sentences = [([] if start is None else [start]) + tokenizer.encode(text) for p in pairs for text in (p.good, p.bad)]
    longest = model.cfg.max_seq_len + 1
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
    return {"start_token": start, "pairs": len(pairs), **blimp.accuracies(pairs, losses[0::2] < losses[1::2])}


# ---- what a config asks for --------------------------------------------------------------------------------------

def open_rows(name: str, split: str, key: str, cfg: Config) -> TokenDataset:
    """The evaluation rows that the option `key` names, a folder or a Hub dataset. Raises ConfigError naming key and fix."""
    try:
        rows = TokenDataset(local_or_hub(name, split, cfg.data.dataset, cfg.model.vocab_size), split)
    except UserError as error:
        raise ConfigError(f"{key}: {name!r} cannot be had ({error}); give a folder made by shards.py, or null") from None
    if rows.vocab_size > cfg.model.vocab_size:
        raise ConfigError(f"{key}: {name!r} holds ids up to {rows.vocab_size - 1}, and the model knows "
                          f"{cfg.model.vocab_size}; give rows of the model's own tokenizer, or null")
    return rows


class Evaluation:
    """The evaluations that a config asks for; opens their data at once, so that errors come at the start.

    `dataset` is the folder of the training data, for its val split, entropy and tokenizer. Rows longer than the model
    reads are cut.
    """

    def __init__(self, cfg: Config, dataset: Path, device: torch.device):
        self.cfg, self.device, self.tokenizer = cfg, device, load_tokenizer(dataset)
        e, dynamics, metrics = cfg.evaluation, cfg.checkpointing.learning_dynamics, cfg.evaluation.metrics or []
        longest = cfg.model.max_seq_len + 1
        self.rows: dict[str, np.ndarray] = {}
        if "val" in metrics:
            val = open_rows(str(dataset), "val", "evaluation.metrics", cfg)
            self.rows["val"] = val.rows(0, min(len(val), e.val.max_rows or len(val)))[:, :longest]
        if "paloma" in metrics:
            paloma = open_rows(e.paloma.dataset_name, e.paloma.dataset_split, "evaluation.paloma.dataset_name", cfg)
            self.rows["paloma"] = paloma.rows(0, len(paloma))[:, :min(e.paloma.max_length, longest)]
            self.sources = [s for shard in paloma.index["shards"] for s in shard.get("sources", [])]
        self.pairs = blimp.load_pairs(e.blimp) if "blimp" in metrics else []
        index = dataset / "train" / INDEX
        self.entropy = read_index(index.parent).get("entropy") if index.exists() else None
        self.snapshot_rows: np.ndarray | None = None
        if dynamics is not None and dynamics.eval_data is not None:
            name = str(dataset) if dynamics.eval_data == "val" else dynamics.eval_data
            source = open_rows(name, "val", "checkpointing.learning_dynamics.eval_data", cfg)
            self.snapshot_rows = source.rows(0, min(len(source), dynamics.max_rows or len(source)))[:, :longest]

    def run(self, model: nn.Module, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
        """{metric: results}. Every rank must call it."""
        e, results = self.cfg.evaluation, {}
        for name, rows in self.rows.items():
            size = e.val.batch_size if name == "val" else e.paloma.batch_size
            losses = row_losses(model, rows, size, self.device, name)
            results[name] = {"rows": len(rows), "tokens": rows[:, 1:].size} | rows_metrics(losses, rows.shape[1] - 1)
            beside = ""
            if name == "val" and self.entropy:
                beside = (f" (the corpus's entropy: unigram {self.entropy['unigram']:.2f}, "
                          f"bigram {self.entropy['bigram']:.2f})")
            if name == "paloma":
                beside = f", perplexity {results[name]['perplexity']:.2f}, Pico score {results[name]['mean_row_perplexity']:.2f}"
                results[name]["by_source"] = by_source(losses, rows.shape[1] - 1, self.sources) if self.sources else None
            say(f"{name} loss {results[name]['loss']:.4f} nats a token{beside}")
        if self.pairs:
            if self.tokenizer.vocab_size > model.cfg.vocab_size:
                raise ConfigError(f"evaluation.metrics: blimp needs a model of its tokenizer's {self.tokenizer.vocab_size} ids, "
                                  f"and this one knows {model.cfg.vocab_size}; leave blimp out")
            start = self.tokenizer.eos if e.blimp.start_token == "eos" else None
            results["blimp"] = evaluate_blimp(model, self.pairs, self.tokenizer, start, e.blimp.batch_size, self.device)
            say(f"BLiMP accuracy {results['blimp']['accuracy']:.2%} on {len(self.pairs):,} pairs, start token {start}")
        return results


def flat_metrics(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """{"eval/NAME_METRIC": number} for metrics.jsonl; the details stay in eval_results."""
    wanted = ("loss", "perplexity", "mean_row_perplexity", "accuracy")
    return {f"eval/{name}_{key}": found[key] for name, found in results.items() for key in wanted if key in found}


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
        cfg.model = model.cfg
        dataset = Path(cfg.data.dataset.name) if Path(cfg.data.dataset.name).exists() else folder
        evaluation = Evaluation(cfg, dataset, device)
        evaluation.tokenizer = load_tokenizer(folder)
        results = evaluation.run(model, log.info)
    if not results:
        raise ConfigError("evaluation.metrics: is empty; give one or more of val, paloma, blimp")
    out = args.out or (run and run / cfg.checkpointing.evaluation.eval_results_dir / f"{folder.name}.json")
    if dist.rank() == 0 and out is not None:
        write_results(out, results, beside=args.out is None)


def write_results(out: Path, results: dict[str, dict[str, Any]], beside: bool) -> None:
    """Write a JSON file; with `beside`, other metrics that it holds already stay."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(out.read_text(encoding="utf-8")) if beside and out.is_file() else {}
        write_json(out, before | results)
    except (OSError, ValueError) as error:
        words = f"{out}: cannot be written ({getattr(error, 'strerror', error)}); give another file with --out"
        if not beside:
            raise UserError(words) from None
        print(words)  # such as the run of somebody else
    else:
        print(f"written to {out}")


if __name__ == "__main__":
    command(main)
