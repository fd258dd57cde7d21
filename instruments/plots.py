"""The figures of an analysis, from analyze.py's rows and a run's record. Needs matplotlib, which nothing else here does.

Measures over steps are drawn by panels.py.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from config import UserError
from instruments.components import AGAINST, AGAINST_UPDATES, Row, layer_of
from instruments.intervals import Interval, interval
from instruments.landscape import Point
from instruments.record import Curves
from instruments.similarity import MEASURES, PAIRED

LABELS = {name: measure.label for name, measure in MEASURES.items()}
RANKS = ("effective_rank", "numerical_rank")
CIRCUITS = "OV circuit, heads", "OV circuit, heads side by side"
CHAPTERS = {  # data: what to know of it
    "updates since the start": "Effective weight minus that of the first snapshot: the cumulative update.",
    "updates within the cycle": "s B A of ReLoRA layers: what has been learnt since the latest merge. Overlap with the "
                                "directions of the cycle before: 1 the same, r / width for unrelated ones.",
    AGAINST: "Outputs of the layers beside those of another run at the same step, on the same rows.",
    AGAINST_UPDATES: "The leading directions of both runs' cumulative updates, r of each, or an eighth of the layer's where "
                     "that is less: overlap 1 the same, r / width for unrelated ones.",
    "updates since the last snapshot": "Effective weight minus that of the snapshot before.",
    "weights": "Effective weights W + s B A.",
    "gradients": "Of the mean loss with respect to the effective weights.",
    "activations": "Outputs of the layers at one position of each example. CKA and PWCCA compare a step's with those of the step "
                   "named. CKA of unrelated examples is what CKA would be on average if the examples were paired at random: only "
                   "what lies above it is likeness. Debiased CKA is 0 there, and may be negative. PWCCA of noise is 0.45 where "
                   "there are 4 examples for each dimension, and falls with more.",
}


class Line(NamedTuple):
    label: str
    colour: Any
    points: list[tuple[int, float]]
    spread: list[tuple[float, float]]  # least and largest behind each point


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib: is needed to draw; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"figure.dpi": 130, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                         "axes.spines.right": False, "legend.frameon": False})
    return plt


def plain(name: str) -> str:
    """A run's name in a figure: matplotlib reads formulas between dollars, and leaves out of legends what begins with _."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def panels(plt, rows: int, columns: int, height: float, *, top: float = 0.65, right: float = 0.15, bottom: float = 0.5,
           across: float = 0.15, down: float = 0.15, **options):
    """(figure, axes): panels of one height, margins, and gaps across and down, in inches; widths fill what a page holds.

    Placed by hand: matplotlib's own layouts measure every label, and take longer than all the drawing.
    """
    left, gaps = 0.75, (columns - 1) * across
    width = max(4.0 / columns, min(3.1, (12.2 - right - gaps) / columns))
    size = (left + right + columns * width + gaps, top + bottom + rows * height + (rows - 1) * down)
    frame = {"left": left / size[0], "right": 1 - right / size[0], "top": 1 - top / size[1], "bottom": bottom / size[1],
             "wspace": across / width, "hspace": down / height}
    return plt.subplots(rows, columns, squeeze=False, figsize=size, gridspec_kw=frame, **options)


def head(figure, title: str) -> None:
    characters = int(figure.get_size_inches()[0] * 11)  # of a line: more would be cut at both ends
    figure.suptitle(textwrap.fill(title, characters), y=1 - 0.1 / figure.get_size_inches()[1], verticalalignment="top")


def over_steps(axis) -> None:
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)


# ---- what there is to draw --------------------------------------------------------------------------------------------

def part_of(component: str) -> str:
    """The kind of component, its name without the layer: attention.o_proj."""
    part = component.split(".", 2)[-1]
    return CIRCUITS[part == "ov_circuit"] if part.startswith("ov_circuit") else part


def curves(rows: Iterable[Row], data: str, metric: str) -> dict[str, dict[int, dict[int, list[float]]]]:
    """{part: {layer: {step: values}}} of what is defined; several values are those of an OV circuit's heads."""
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        if row["data"] == data and row["metric"] == metric and row["value"] is not None:
            found[part_of(row["component"])][layer_of(row["component"])][row["step"]].append(row["value"])
    return found


def average(values: list[float], metric: str) -> float:
    return statistics.geometric_mean(values) if MEASURES[metric].scale == "log" else statistics.fmean(values)


def layer_lines(plt, by_layer: dict[int, dict[int, list[float]]], metric: str, depth: int) -> list[Line]:
    """A line a layer, darker where deeper."""
    colours = plt.get_cmap("viridis_r")
    return [Line(f"layer {layer}", colours((layer + 1) / depth), [(s, average(v, metric)) for s, v in sorted(by_step.items())],
                 [(min(v), max(v)) for _, v in sorted(by_step.items())]) for layer, by_step in sorted(by_layer.items())]


def run_line(label: str, colour: Any, by_layer: dict[int, dict[int, list[float]]], metric: str) -> Line:
    """The mean over a run's layers, and from which to which it spreads."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for steps in by_layer.values():
        for step, values in steps.items():
            by_step[step] += values
    return Line(label, colour, [(s, average(v, metric)) for s, v in sorted(by_step.items())],
                [(min(v), max(v)) for _, v in sorted(by_step.items())])


def axis_label(rows: list[Row], data: str, metric: str) -> str:
    """A similarity's says with which step's activations, where that is one."""
    steps = {row["other_step"] for row in rows if row["metric"] == metric and row["data"] == data}
    one = metric in PAIRED and data != AGAINST and len(steps) == 1
    return f"{LABELS[metric]} with step {steps.pop()}" if one else LABELS[metric]


# ---- figures ---------------------------------------------------------------------------------------------------------

def plot_heat(plt, rows: list[Row], metric: str = "per"):
    """Layers by steps: a row of panels a kind of data, a column a kind of layer."""
    found = {data: {p: layers for p, layers in curves(rows, data, metric).items() if p not in CIRCUITS}
             for data in CHAPTERS}
    found = {data: parts for data, parts in found.items() if parts and data != "updates since the last snapshot"}
    if not found:
        return None
    columns = sorted({part for parts in found.values() for part in parts})
    figure, axes = panels(plt, len(found), len(columns), 1.4, top=0.9, right=0.9, across=0.35, down=0.7)
    for across, (data, parts) in zip(axes, found.items()):
        for axis, part in zip(across, columns):
            layers = sorted(parts.get(part, {}))
            steps = sorted({step for by_step in parts.get(part, {}).values() for step in by_step})
            if not layers:
                axis.axis("off")
                continue
            grid = [[average(parts[part][n][s], metric) if s in parts[part][n] else math.nan for s in steps] for n in layers]
            image = axis.imshow(grid, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
            shown = range(0, len(steps), max(1, -(-len(steps) // 6)))
            axis.set_xticks(list(shown), [str(steps[i]) for i in shown])
            named = range(0, len(layers), max(1, -(-len(layers) // 6)))
            axis.set_yticks(list(named), [str(layers[i]) for i in named])
            axis.grid(False)
            axis.set_title(f"{data}\n{part}" if axis is across[0] else part, fontsize=8)
        across[0].set_ylabel("layer")
        place = across[-1].get_position()
        figure.colorbar(image, figure.add_axes((place.x1 + 0.01, place.y0, 0.01, place.height)))
    for axis in axes[-1]:
        axis.set_xlabel("step")
    head(figure, f"{LABELS[metric]}, layers by steps")
    return figure


def plot_spectra(plt, rows: list[Row]):
    """Singular values over their largest at the last step, of weights and of cumulative updates."""
    chosen: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    last = max((r["step"] for r in rows if r["metric"] == "spectrum"), default=None)
    for row in rows:
        if row["metric"] == "spectrum" and row["step"] == last and row["value"] and row["value"][0] > 0:
            if row["data"] in ("weights", "updates since the start", "gradients") and part_of(row["component"]) not in CIRCUITS:
                chosen[row["data"]][part_of(row["component"])].append((layer_of(row["component"]), row["value"]))
    if not chosen:
        return None
    columns = sorted({part for parts in chosen.values() for part in parts})
    figure, axes = panels(plt, len(chosen), len(columns), 1.7, down=0.35, sharey=True, sharex="col")
    colours = plt.get_cmap("viridis_r")
    for across, (data, parts) in zip(axes, chosen.items()):
        for axis, part in zip(across, columns):
            depth = max((layer for layer, _ in parts.get(part, [])), default=0) + 1
            for layer, values in sorted(parts.get(part, [])):
                axis.semilogy(range(1, len(values) + 1), [max(v / values[0], 1e-9) for v in values],
                              color=colours((layer + 1) / depth), label=f"layer {layer}")
            axis.axhline(1e-5, color="0.5", linewidth=0.8, linestyle="--")
            axis.set_ylim(3e-7, 2)
            axis.set_title(f"{data}: {part}" if axis is across[0] else part, fontsize=8)
        across[0].set_ylabel("relative to the largest")
    for axis in axes[-1]:
        axis.set_xlabel("singular value number")
    if len(axes[0][0].get_lines()) <= 5:
        axes[0][0].legend(fontsize=7)
    head(figure, f"Singular values at step {last}; below the dashed line rounding begins to show")
    return figure


def plot_training(plt, name: str, record: Curves, rates: list[tuple[int, float]]):
    if not record["train/loss"]:
        return None
    figure, (axis, below) = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True, height_ratios=(3, 1))
    figure.subplots_adjust(left=0.09, right=0.98, top=0.93, bottom=0.11, hspace=0.1)
    draw_loss(axis, record, record["train/loss"], "tab:blue", "training loss")
    for number, (step, _) in enumerate(record["relora/reset_count"]):
        for panel in (axis, below):
            panel.axvline(step, color="0.3", linewidth=0.8, linestyle=":", label="merge" if not number else None)
    if rates := rates or record["trainer/learning_rate"]:
        below.plot(*zip(*rates), color="tab:green", linewidth=1)
    axis.set(ylabel="loss (nats a token, log scale)", title=f"{plain(name)}: loss and learning rate")
    below.set(ylabel="learning rate", ylim=(0, None))
    over_steps(below)
    axis.legend(loc="upper right")
    return figure


def draw_loss(axis, record: Curves, points: list[tuple[float, float]], colour: str, label: str) -> None:
    """Training loss over any measure of progress, and the evaluations' as markers where that is the step."""
    axis.plot(*zip(*points), color=colour, linewidth=1.2, label=label)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:.3g}")
    axis.tick_params(axis="y", which="minor", labelsize=7)
    if points is record["train/loss"]:
        for key, marker in (("eval/val_loss", "o"), ("eval/paloma_loss", "s")):
            if record[key]:
                axis.plot(*zip(*record[key]), marker, color=colour, markersize=5, markerfacecolor="none",
                          label=f"{label}: {key[5:-5]}" if label != "training loss" else f"{key[5:-5]} loss")


def plot_losses(plt, records: dict[str, Curves]):
    """Loss over steps, tokens and seconds of training."""
    figure, [axes] = panels(plt, 1, 3, 3.3, top=0.2, sharey=True)
    for number, (name, record) in enumerate(records.items()):
        if not record["train/loss"]:
            continue
        tokens, speed, clock, before = dict(record["tokens"]), dict(record["tokens_per_second"]), 0.0, 0
        by_tokens, by_time = [], []
        for step, loss in record["train/loss"]:
            if step not in tokens or speed.get(step, 0) <= 0:
                continue
            clock += (tokens[step] - before) / speed[step]
            before = tokens[step]
            by_tokens.append((tokens[step] / 1e6, loss))
            by_time.append((clock, loss))
        for axis, points in zip(axes, (record["train/loss"], by_tokens, by_time)):
            if points:
                draw_loss(axis, record, points, f"C{number}", plain(name))
    for axis, label in zip(axes, ("step", "millions of tokens", "seconds of training, each on its machine")):
        axis.set_xlabel(label)
    axes[0].set_ylabel("training loss (nats a token, log scale)")
    axes[0].legend(fontsize=8)
    return figure


def plot_path(plt, points: list[Point]):
    """Loss along the line between two checkpoints, and the straight line between the losses of its ends."""
    figure, [[axis]] = panels(plt, 1, 1, 2.4, top=0.2)
    axis.plot([p.share for p in points], [p.loss for p in points], "o-", markersize=3, label="loss")
    axis.plot([0, 1], [points[0].loss, points[-1].loss], "--", color="0.45", linewidth=1, label="between the ends")
    axis.set(xlabel="share of the second checkpoint", ylabel="loss (nats a token)")
    axis.legend()
    return figure


def plot_around(plt, found: dict[str, list[Point]]):
    """Loss along directions from a checkpoint: random ones grey, principal ones in colours."""
    figure, [[axis]] = panels(plt, 1, 1, 2.4, top=0.2)
    for number, (name, points) in enumerate(found.items()):
        colour = "0.6" if name.startswith("random") else f"C{number}"
        axis.plot([p.share for p in points], [p.loss for p in points], "o-", markersize=3, color=colour, label=name)
    axis.set(xlabel="share of the weights' norm", ylabel="loss (nats a token)")
    axis.legend(fontsize=8)
    return figure


# ---- several seeds of an arm -------------------------------------------------------------------------------------------

def bands(runs: Iterable[list[tuple[int, float]]]) -> list[tuple[int, Interval]]:
    """[(step, mean and interval over the runs)] of the steps that all of them have."""
    runs = [dict(points) for points in runs if points]
    shared = sorted(set.intersection(*map(set, runs))) if runs else []
    return [(step, interval([points[step] for points in runs])) for step in shared]


def draw_band(axis, points: list[tuple[int, Interval]], colour: str, label: str) -> None:
    if not points:
        return
    steps, spans = zip(*points)
    axis.plot(steps, [span.mean for span in spans], color=colour, linewidth=1.2, label=label,
              marker="o" if len(steps) < 3 else None)
    if all(span.low is not None for span in spans):
        axis.fill_between(steps, [span.low for span in spans], [span.high for span in spans], color=colour, alpha=0.2)


def plot_bands(plt, found: dict[str, list[tuple[int, Interval]]], label: str, log: bool = False, zero: bool = False):
    if not any(found.values()):
        return None
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for number, (arm, points) in enumerate(found.items()):
        draw_band(axis, points, f"C{number}", plain(arm))
    axis.set_ylabel(label)
    if zero:
        axis.axhline(0, color="0.6", linewidth=0.8)
    if log:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:.3g}")
    over_steps(axis)
    axis.legend(fontsize=8)
    return figure
