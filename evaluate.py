"""Evaluation: loss on held-out rows (val) and Paloma perplexity."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

import dist
from config import Config, ConfigError, UserError
from data import TokenDataset, to_device
from run import RunFolder
from shards import local_or_hub


@torch.no_grad()
def row_losses(model: nn.Module, rows: np.ndarray, batch_size: int, device: torch.device) -> np.ndarray:
    """Summed token loss in nats of each row (rows, tokens), in order, float64, on every rank.

    Batches are dealt to the ranks in turn, and are the same for any number of ranks. Under FSDP2 all ranks must run
    forward equally often, so a rank without a batch repeats the first one and drops the result.
    """
    starts = range(0, len(rows), batch_size)
    was_training = model.training
    model.eval()
    mine = {}
    try:
        for turn in range(-(-len(starts) // dist.world_size())):
            number = turn * dist.world_size() + dist.rank()
            start = starts[number] if number < len(starts) else 0
            ids = to_device(rows[start:start + batch_size], device)
            with torch.autocast(device.type, enabled=False):
                losses = model(ids[:, :-1], ids[:, 1:], reduction="none")
            if number < len(starts):
                mine[number] = losses.double().sum(1).cpu().numpy() if device.type != "mps" else \
                    losses.cpu().double().sum(1).numpy()
    finally:
        model.train(was_training)
    parts = {number: part for ranks in dist.gather(mine) for number, part in ranks.items()}
    return np.concatenate([parts[number] for number in range(len(starts))])


def perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))  # e^710 overflows


def rows_metrics(losses: np.ndarray, tokens: int) -> dict[str, float]:
    """Of rows with `tokens` labels each: mean loss, perplexity over tokens, and the mean of the rows' perplexities.

    The last is the Pico models' published Paloma score; one bad document makes it explode.
    """
    loss = float(losses.sum() / (len(losses) * tokens))
    by_row = [perplexity(row / tokens) for row in losses]
    return {"loss": loss, "perplexity": perplexity(loss), "mean_row_perplexity": float(np.mean(by_row))}


def open_rows(name: str, split: str, key: str, cfg: Config) -> TokenDataset:
    """The evaluation rows that the option `key` names, a folder or a Hub dataset. Raises ConfigError naming key and fix."""
    try:
        return TokenDataset(local_or_hub(name, split, cfg.data.dataset, cfg.model.vocab_size), split)
    except UserError as error:
        raise ConfigError(f"{key}: {name!r} cannot be had ({error}); give a folder made by shards.py, or null") from None


class Evaluation:
    """The evaluations that a run's config asks for; opens their data at once, so that errors come at the start."""

    def __init__(self, cfg: Config, dataset: TokenDataset, device: torch.device):
        self.cfg, self.device = cfg, device
        e, dynamics, metrics = cfg.evaluation, cfg.checkpointing.learning_dynamics, cfg.evaluation.metrics or []
        self.rows: dict[str, np.ndarray] = {}
        self.entropy = dataset.index.get("entropy")
        if "val" in metrics:
            val = open_rows(str(dataset.folder.parent), "val", "evaluation.metrics", cfg)
            self.rows["val"] = val.rows(0, min(len(val), e.val.max_rows or len(val)))
        if "paloma" in metrics:
            paloma = open_rows(e.paloma.dataset_name, e.paloma.dataset_split, "evaluation.paloma.dataset_name",
                               cfg)
            self.rows["paloma"] = paloma.rows(0, len(paloma))[:, :e.paloma.max_length]
        self.snapshot_rows: np.ndarray | None = None
        if dynamics is not None and dynamics.eval_data is not None:
            name = str(dataset.folder.parent) if dynamics.eval_data == "val" else dynamics.eval_data
            source = open_rows(name, "val", "checkpointing.learning_dynamics.eval_data", cfg)
            self.snapshot_rows = source.rows(0, min(len(source), dynamics.max_rows or len(source)))
        for name, rows in {**self.rows, "eval_data": self.snapshot_rows}.items():
            if rows is not None and rows.shape[1] - 1 > cfg.model.max_seq_len:
                raise ConfigError(f"model.max_seq_len: {cfg.model.max_seq_len} is too short for the {rows.shape[1]} tokens "
                                  f"of a row of {name}; evaluate on shorter rows")

    def run(self, model: nn.Module, step: int, folder: RunFolder) -> dict[str, float]:
        """Evaluate; writes eval_results/step_N.json and returns {"eval/NAME_METRIC": value}. For every rank to call."""
        batch_sizes = {"val": self.cfg.evaluation.val.batch_size, "paloma": self.cfg.evaluation.paloma.batch_size}
        results = {}
        for name, rows in self.rows.items():
            losses = row_losses(model, rows, batch_sizes[name], self.device)
            results[name] = rows_metrics(losses, rows.shape[1] - 1)
            beside = ""
            if name == "val" and self.entropy:
                beside = (f" (the corpus's entropy: unigram {self.entropy['unigram']:.2f}, "
                          f"bigram {self.entropy['bigram']:.2f})")
            folder.say(f"step {step}: {name} loss {results[name]['loss']:.4f} nats a token{beside}")
        if results:
            folder.save_evaluation(step, results)
        return {f"eval/{name}_{metric}": value for name, result in results.items() for metric, value in result.items()}
