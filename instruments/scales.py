"""A study's arms at equal steps, from the snapshots of their runs: losses, ranks and similarities in one figure.

What is shown can be compared between models of different widths: PER is over the layer's own size, and the likeness of a run's
activations to those of its own last step is debiased, since plain CKA of unrelated examples rises with the width.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint import CheckpointError
from instruments.components import Request, Row
from instruments.intervals import Interval
from instruments.measuring import analyse
from instruments.panels import add_legend, scale
from instruments.plots import LABELS, average, bands, draw_band, panels, part_of, plain
from instruments.record import training_record
from instruments.snapshots import BESIDE, Snapshots
from runtime.log import log

UPDATE = "updates since the start"
REQUESTS = [Request(["cka", "cka_debiased"], "activations"), Request(["per"], "weights"), Request(["per"], "gradients", "train"),
            Request(["per", "effective_rank"], "updates")]
SHOWN = {  # (data, metric) of a panel: its title
    ("activations", "cka_debiased"): "activations: debiased CKA with the last step", ("weights", "per"): "weights: PER",
    ("gradients", "per"): "gradients: PER", (UPDATE, "per"): "update since the start: PER",
    (UPDATE, "effective_rank"): "update since the start: effective rank"}
KEPT = (*SHOWN, ("activations", "cka"))  # in the table
COLUMNS = ("arm", "data", "metric", "step", "mean", "low", "high", "seeds")


class Scale(NamedTuple):
    """One arm: its runs that kept snapshots, and what was measured of each."""
    runs: list[Snapshots]
    rows: list[list[Row]]
    trainable: int | None = None  # parameters

    def band(self, data: str, metric: str) -> list[tuple[int, Interval]]:
        """[(step, mean and interval over the runs of the mean over the layers)]."""
        return bands(mean_over_layers(rows, data, metric) for rows in self.rows)

    def losses(self, key: str) -> list[tuple[int, Interval]]:
        return bands(training_record(run.path)[key] for run in self.runs)


def measured(arms: dict[str, list[Path]], trainable: dict[str, int | None]) -> dict[str, Scale]:
    """{arm: what its runs' snapshots hold}; arms without snapshots are left out. What was measured before is read."""
    found: dict[str, Scale] = {}
    for arm, folders in arms.items():
        runs = []
        for folder in folders:
            try:
                runs.append(Snapshots(folder))
            except CheckpointError as error:
                log.debug(f"{error}")
        if runs:
            rows = [analyse(run, REQUESTS, run.folders, run.path / "analysis") for run in runs]
            found[arm] = Scale(runs, rows, trainable.get(arm))
    return found


def mean_over_layers(rows: Iterable[Row], data: str, metric: str) -> list[tuple[int, float]]:
    """[(step, mean over the linear layers)] of one run."""
    at: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        wanted = (row["data"], row["metric"]) == (data, metric) and part_of(row["component"]) not in BESIDE
        if wanted and row["value"] is not None:
            at[row["step"]].append(row["value"])
    return [(step, average(values, metric)) for step, values in sorted(at.items())]


def shared_steps(scales: dict[str, Scale]) -> list[int]:
    """The steps whose snapshots all runs have."""
    return sorted(set.intersection(*(set(run.folders) for one in scales.values() for run in one.runs)))


def table(scales: dict[str, Scale]) -> list[list[Any]]:
    """Lines of COLUMNS: every measure of every arm at the steps that all have."""
    steps = set(shared_steps(scales))
    return [[arm, data, metric, step, span.mean, span.low, span.high, len(one.runs)] for data, metric in KEPT
            for arm, one in scales.items() for step, span in one.band(data, metric) if step in steps]


def same_rows(scales: dict[str, Scale]) -> str:
    """Whether each seed's runs trained on the same rows, as the first and the last snapshot that all have say."""
    steps = shared_steps(scales)
    ends = sorted({steps[0], steps[-1]}) if steps else []
    for step, runs in itertools.product(ends, zip(*(one.runs for one in scales.values()))):
        first, *others = (run.input_ids(step, "train") for run in runs)
        if not all(torch.equal(first, other) for other in others):
            return f"The runs had different rows before them at step {step}: what differs may be the data's."
    return f"All had the same rows before them at steps {' and '.join(map(str, ends))}." if ends else ""


def plot(plt, scales: dict[str, Scale]):
    """Six panels, an arm a line: losses, then what SHOWN names, over steps on a logarithmic scale that has a place for 0."""
    steps = shared_steps(scales)
    if len(steps) < 2:
        return None
    figure, axes = panels(plt, 2, 3, 2.2, top=0.35, bottom=0.85, across=0.7, down=0.65)
    first, *others = axes.flat
    legend: dict[str, Any] = {}
    for number, (arm, one) in enumerate(scales.items()):
        label = plain(arm) + (f" ({one.trainable:,} trained parameters)" if one.trainable else "")
        draw_band(first, one.losses("train/loss"), f"C{number}", label)
        evaluated = one.losses("eval/val_loss")
        first.plot([step for step, _ in evaluated], [span.mean for _, span in evaluated], "o", color=f"C{number}", markersize=4,
                   markerfacecolor="none")
        legend[label] = first.get_lines()[-2]
        for axis, (data, metric) in zip(others, SHOWN):
            points = [(step, span) for step, span in one.band(data, metric) if step in steps]
            draw_band(axis, points, f"C{number}", label)
            axis.plot([step for step, _ in points], [span.mean for _, span in points], "o", color=f"C{number}", markersize=2.5)
    first.set(title="loss: training, and (rings) val", ylabel="nats a token")
    for axis, ((data, metric), title) in zip(others, SHOWN.items()):
        axis.set(title=title, ylabel=LABELS[metric])
        values = [value for line in axis.get_lines() for value in line.get_ydata()]
        if metric != "effective_rank":
            scale(axis, metric, min(values, default=0), max(values, default=0))
        elif values:  # it grows with the width
            axis.set_yscale("log", base=2)
            axis.set_ylim(min(values) / 1.2, max(values) * 1.2)
            axis.yaxis.set_major_formatter("{x:g}")
    for axis in axes.flat:
        axis.title.set_fontsize(9)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(0, steps[-1] * 1.15)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("step" if axis in axes[-1] else "")
    add_legend(figure, legend, 4)
    return figure
