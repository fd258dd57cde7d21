"""What a study came to: a table with intervals, figures and a page, from the results of its runs (study.py)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint import read_state, step_folders
from hub.llama import load_plain
from instruments import measures, scales
from instruments.intervals import LEVEL, Interval, interval, paired_difference
from instruments.plots import bands, plot_bands, pyplot
from instruments.record import training_record
from instruments.report import Page, table
from instruments.results import Results, as_text, table_text
from runtime.files import finite
from runtime.progress import perplexity

COLUMNS = ("arm", "learning_rate", "at_edge", "seeds", "loss", "loss_low", "loss_high", "perplexity", "against", "difference",
           "difference_low", "difference_high", "p", "tokens", "seconds", "peak_bytes", "trainable")


COSTS = ("tokens", "seconds", "trainable")


class Result(NamedTuple):
    """One run: losses in nats a token on the rows of val that count and on those that choose, and what it took."""
    arm: str
    rate: float
    seed: int
    final: bool
    loss: float  # infinite where the run diverged
    selection: float
    folder: Path
    peak_bytes: int | None
    tokens: int
    seconds: float  # of training
    trainable: int | None  # parameters that the optimizer held at the end


# ---- from a run's folder --------------------------------------------------------------------------------------------

def last_loss(run: Path) -> float:
    """The latest val loss that training recorded."""
    losses = training_record(run)["eval/val_loss"]
    return float(losses[-1][1]) if losses else math.inf


def costs(run: Path) -> dict[str, Any]:
    """{tokens, seconds, trainable} of a run so far."""
    record, seconds, before = training_record(run), 0.0, 0
    for (_, tokens), (_, speed) in zip(record["tokens"], record["tokens_per_second"]):
        seconds, before = seconds + (tokens - before) / max(speed, 1e-9), tokens
    states = [path for folder in step_folders(run / "checkpoints") if (path := folder / "training_state/checkpoint.pt").exists()]
    state = read_state(states[0]) if states else None
    trainable = sum(state["model"][name].numel() for name in state["optimizer"]) if state else None
    return {"tokens": before, "seconds": seconds, "trainable": trainable}


def update_ranks(run: Path) -> list[tuple[int, float]]:
    """[(step, mean effective rank of the cumulative update of the blocks' matrices)] over a run's checkpoints."""
    folders = list(reversed(step_folders(run / "checkpoints")))
    if len(folders) < 2:
        return []
    first, found = load_plain(folders[0])[1], []
    names = [name for name, tensor in first.items() if name.startswith("layers.") and tensor.dim() == 2]
    for folder in folders[1:]:
        weights = load_plain(folder)[1]
        ranks = [measures.effective_rank(measures.singular_values(weights[name] - first[name])) for name in names
                 if not weights[name].equal(first[name])]
        if ranks:
            found.append((int(folder.name.removeprefix("step_")), statistics.fmean(ranks)))
    return found


# ---- the table ---------------------------------------------------------------------------------------------------------

def arm_row(arm: str, rate: float | None, results: list[Result], against: str) -> dict[str, Any]:
    """One line of the table: the arm's final runs, beside those of the arm `against`, of the same seeds."""
    finals = [result for result in results if result.arm == arm and result.final]
    rates = sorted({result.rate for result in results if result.arm == arm and not result.final})
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {
        "arm": arm, "learning_rate": rate, "seeds": len(finals),
        "at_edge": rate is not None and len(rates) > 1 and rate in (rates[0], rates[-1])}
    if not finals:
        return row
    losses = {result.seed: result.loss for result in finals}
    mean = interval(list(losses.values())) if all(map(math.isfinite, losses.values())) else Interval(math.inf, None, None)
    row |= {"loss": mean.mean, "loss_low": mean.low, "loss_high": mean.high, "perplexity": perplexity(mean.mean),
            "tokens": finals[0].tokens, "seconds": statistics.median(result.seconds for result in finals),
            "peak_bytes": max((result.peak_bytes or 0 for result in finals)) or None, "trainable": finals[0].trainable}
    others = {result.seed: result.loss for result in results if result.arm == against and result.final}
    both = [seed for seed in losses if seed in others and math.isfinite(losses[seed] - others[seed])]
    if both and arm != against:
        found = paired_difference([losses[seed] for seed in both], [others[seed] for seed in both])
        row |= {"against": against, "difference": found.mean, "difference_low": found.low, "difference_high": found.high,
                "p": found.p}
    return row


def shown(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(head, lines) of the table as people read it."""
    def span(row: dict[str, Any], key: str, sign: str = "") -> str:
        if row[key] is None:
            return ""
        reach = "" if row[f"{key}_low"] is None else f" +- {(row[f'{key}_high'] - row[f'{key}_low']) / 2:.4f}"
        return f"{row[key]:{sign}.4f}{reach}"

    def number(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)
    head = ["arm", "learning rate", "seeds", "val loss", "perplexity", "difference", "to", "p", "tokens", "seconds",
            "peak MB", "trainable"]
    lines = [[row["arm"], number(row["learning_rate"], "g") + (" (edge)" if row["at_edge"] else ""), str(row["seeds"]),
              span(row, "loss"), number(row["perplexity"], ".3f"), span(row, "difference", "+"), row["against"] or "",
              number(row["p"], ".2g"), number(row["tokens"], ","), number(row["seconds"], ".0f"),
              number(row["peak_bytes"] and row["peak_bytes"] / 1e6, ".0f"), number(row["trainable"], ",")] for row in rows]
    return head, lines


# ---- the figures -------------------------------------------------------------------------------------------------------

def plot_losses(plt, rows: list[dict[str, Any]], finals: list[Result]):
    """Each arm's mean with its interval, and its runs as points."""
    rows = [row for row in rows if row["loss"] is not None and math.isfinite(row["loss"])]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.4 * len(rows)), layout="constrained")
    for height, row in enumerate(reversed(rows)):
        losses = [result.loss for result in finals if result.arm == row["arm"]]
        axis.plot(losses, [height] * len(losses), "o", color="0.6", markersize=3)
        reach = None if row["loss_low"] is None else [[row["loss"] - row["loss_low"]], [row["loss_high"] - row["loss"]]]
        axis.errorbar([row["loss"]], [height], xerr=reach, fmt="o", color="tab:blue", capsize=3)
    axis.set_yticks(range(len(rows)), [row["arm"] for row in reversed(rows)])
    axis.set_xlabel(f"val loss (nats a token): mean of the seeds, {LEVEL:.0%} interval; grey: single runs")
    return figure


def plot_rates(plt, arms: Iterable[str], results: list[Result]):
    """Loss on the selection rows over the learning rate, an arm a line; none where nothing was swept."""
    if all(result.final for result in results):
        return None
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for number, arm in enumerate(arms):
        tried: dict[float, list[float]] = {}
        for result in results:
            if result.arm == arm and not result.final and math.isfinite(result.selection):
                tried.setdefault(result.rate, []).append(result.selection)
        points = [(rate, statistics.fmean(losses)) for rate, losses in sorted(tried.items())]
        if points:
            axis.plot(*zip(*points), "o-", color=f"C{number}", markersize=4, linewidth=1, label=arm)
            axis.plot(*min(points, key=lambda point: point[1]), "o", color=f"C{number}", markersize=9, markerfacecolor="none")
    axis.set_xscale("log")
    axis.set(xlabel="learning rate (ringed: the one taken)", ylabel="val loss on the rows that choose (nats a token)")
    if axis.get_lines():
        axis.legend(fontsize=8)
    return figure


# ---- the page ------------------------------------------------------------------------------------------------------------

def write_scales(plt, page: Page, arms: Iterable[str], finals: list[Result]) -> dict[str, scales.Scale]:
    """The chapter and the table of what snapshots of runs that did not diverge hold, and of which arms; without any, none."""
    ended = sorted((result for result in finals if math.isfinite(result.loss)), key=lambda result: result.seed)
    kept = scales.measured({arm: [result.folder for result in ended if result.arm == arm] for arm in arms},
                           {result.arm: result.trainable for result in ended})
    if kept:
        page.results.write("scales.csv", table_text(scales.COLUMNS, scales.table(kept)))
        page.chapter("At equal steps", f"Means over the layers that snapshots keep. {scales.same_rows(kept)} The last step is "
                     "each run's own; CKA is debiased: plain CKA of unrelated examples rises with the width. analyze.py compare "
                     "shows each kind of layer.", page.picture("scales", scales.plot(plt, kept)))
    return kept


def write(name: str, against: dict[str, str], best: dict[str, float | None], results: list[Result], out: Path) -> str:
    """table.csv, study.json, study.html and the figures of a study; returns its table as text, and where the page is.

    `against` holds the arm that each is compared with, `best` each arm's rate, None where its sweep has not ended.
    """
    finals = [result for result in results if result.final]
    rows = [arm_row(arm, rate, results, against[arm]) for arm, rate in best.items()]
    files = Results(out, chosen=True)
    files.write("table.csv", table_text(COLUMNS, ([row[key] for key in COLUMNS] for row in rows)))
    tree = {"study": name, "level": LEVEL, "table": rows,
            "runs": [result._asdict() | {"folder": str(result.folder)} for result in results]}
    files.write("study.json", json.dumps(finite(tree), indent=1, allow_nan=False) + "\n")
    head, lines = shown(rows)
    edges = [row["arm"] for row in rows if row["at_edge"]]
    warning = f"The best rate of {', '.join(edges)} is the last that was tried: a better one may lie beyond." if edges else ""
    plt = pyplot()
    page = Page(plt, f"Study {name}", files)
    runs = {arm: [result.folder for result in finals if result.arm == arm] for arm in best}
    page.chapter("The arms", f"Mean over the seeds and {LEVEL:.0%} interval (Student's t); differences are paired by seed, p is "
                 f"of the paired t-test, not corrected for the number of arms. {warning}", table(head, lines),
                 page.picture("losses", plot_losses(plt, rows, finals)))
    curves = {arm: bands(training_record(run)["train/loss"] for run in folders) for arm, folders in runs.items()}
    page.chapter("Training", "Mean over the seeds, and its interval.",
                 page.picture("training", plot_bands(plt, curves, "training loss (nats a token, log scale)", log=True)))
    kept = write_scales(plt, page, best, finals)
    ranks = {arm: bands(map(update_ranks, folders)) for arm, folders in runs.items() if arm not in kept}
    page.chapter("Rank of the update", "Effective rank, exp of the entropy of the normalised singular values, of each matrix's "
                 "weight minus that at step 0; mean over the blocks' matrices that have changed.",
                 page.picture("update_rank", plot_bands(plt, ranks, "effective rank of the cumulative update")))
    page.chapter("Learning rates", "", page.picture("rates", plot_rates(plt, best, results)))
    path = page.write("study.html")
    return f"{as_text(head, lines)}\n{warning and f'warning: {warning}' + chr(10)}open {path}"
