"""Draws an analysis: PNG plots and one self-contained HTML page. Needs matplotlib, which nothing else here does.

Rows are those of analyze.py; the training's curves come from metrics.jsonl.
"""

from __future__ import annotations

import base64
import html
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import UserError

Rows = list[dict[str, Any]]
LABELS = {"effective_rank": "effective rank", "per": "proportional effective rank", "condition_number": "condition number",
          "numerical_rank": "numerical rank", "norm_frobenius": "Frobenius norm", "norm_nuclear": "nuclear norm",
          "norm_spectral": "spectral norm", "norm_inf": "largest absolute entry", "gini": "Gini coefficient",
          "hoyer": "Hoyer sparsity"}


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib: is needed to draw; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"figure.dpi": 130, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                         "axes.spines.right": False, "figure.constrained_layout.use": True})
    return plt


def training_record(run: Path) -> dict[str, list]:
    """{key: [(step, value), ...]} of metrics.jsonl."""
    found: dict[str, list] = defaultdict(list)
    path = run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        record = json.loads(line)
        for key, value in record.items():
            if key != "step" and value is not None:
                found[key].append((record["step"], value))
    return found


def layer_of(component: str) -> int:
    return int(component.split(".")[1])


def part_of(component: str) -> str:
    """The component's name without its layer: attention.o_proj, or ov_circuit.heads.3."""
    return component.split(".", 2)[2]


def series(rows: Rows, data: str, metric: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{part: {component: [(step, value), ...]}} of the values that are defined."""
    found: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["data"] == data and row["metric"] == metric and row["value"] is not None:
            part = part_of(row["component"])
            found["OV circuit, mean of heads" if part.startswith("ov_circuit") else part][row["component"]].append(
                (row["step"], row["value"]))
    return found


# ---- plots of one run ----------------------------------------------------------------------------------------------------

def plot_training(plt, run: Path):
    record = training_record(run)
    if not record["train/loss"]:
        return None
    figure, axis = plt.subplots(figsize=(8, 3.4))
    axis.plot(*zip(*record["train/loss"]), color="tab:blue", label="training loss")
    for key, style in (("eval/val_loss", "o-"), ("eval/paloma_loss", "s-")):
        if record[key]:
            axis.plot(*zip(*record[key]), style, color="tab:red", markersize=4, label=key.removeprefix("eval/").replace("_", " "))
    merges = [step for step, _ in record["relora/reset_count"]]
    for number, step in enumerate(merges):
        axis.axvline(step, color="0.5", linewidth=0.8, linestyle=":", label="merge" if number == 0 else None)
    axis.set(xlabel="step", ylabel="loss (nats a token)", title=f"{run.name}: loss and learning rate")
    rate = axis.twinx()
    rate.plot(*zip(*record["trainer/learning_rate"]), color="tab:green", linewidth=0.9, alpha=0.7, label="learning rate")
    rate.set_ylabel("learning rate")
    rate.grid(False)
    rate.spines["right"].set_visible(True)
    lines = [*axis.get_legend_handles_labels()[0], *rate.get_legend_handles_labels()[0]]
    axis.legend(lines, [line.get_label() for line in lines], loc="upper right", frameon=False)
    return figure


def scale_for(axis, metric: str) -> None:
    """Condition numbers span decades; a rank is read against 0."""
    if metric == "condition_number":
        axis.set_yscale("log")
    elif metric in ("per", "effective_rank", "numerical_rank"):
        axis.set_ylim(bottom=0)


def plot_over_steps(plt, rows: Rows, data: str, metric: str):
    """A panel a kind of layer, a line a layer, darker where deeper."""
    parts = series(rows, data, metric)
    if not parts:
        return None
    figure, axes = plt.subplots(1, len(parts), figsize=(3.4 * len(parts) + 0.8, 3.0), squeeze=False, sharex=True)
    depth = max(layer_of(c) for lines in parts.values() for c in lines) + 1
    colours = plt.get_cmap("viridis_r")
    for axis, (part, lines) in zip(axes[0], sorted(parts.items())):
        by_layer: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for component, points in lines.items():
            for step, value in points:
                by_layer[layer_of(component)][step].append(value)
        for layer, points in sorted(by_layer.items()):
            steps = sorted(points)
            axis.plot(steps, [sum(points[s]) / len(points[s]) for s in steps], "o-", markersize=3,
                      color=colours((layer + 1) / depth), label=f"layer {layer}")
        axis.set(title=part, xlabel="step")
        scale_for(axis, metric)
    axes[0][0].set_ylabel(LABELS.get(metric, metric))
    if depth <= 4:
        axes[0][-1].legend(frameon=False)
    else:
        scale = plt.cm.ScalarMappable(plt.Normalize(0, depth - 1), colours)
        figure.colorbar(scale, ax=axes[0][-1], label="layer")
    figure.suptitle(f"{LABELS.get(metric, metric)} of {data}")
    return figure


def plot_heat(plt, rows: Rows, data: str, metric: str):
    """Layers by steps, a panel a kind of layer."""
    parts = {p: lines for p, lines in series(rows, data, metric).items() if not p.startswith("OV")}
    if not parts:
        return None
    figure, axes = plt.subplots(1, len(parts), figsize=(3.2 * len(parts) + 1, 2.8), squeeze=False)
    values = [v for lines in parts.values() for points in lines.values() for _, v in points]
    for axis, (part, lines) in zip(axes[0], sorted(parts.items())):
        steps = sorted({s for points in lines.values() for s, _ in points})
        layers = sorted({layer_of(c) for c in lines})
        grid = [[float("nan")] * len(steps) for _ in layers]
        for component, points in lines.items():
            for step, value in points:
                grid[layers.index(layer_of(component))][steps.index(step)] = value
        image = axis.imshow(grid, aspect="auto", origin="lower", vmin=min(values), vmax=max(values), cmap="viridis")
        ticks = range(0, len(steps), max(1, len(steps) // 5))
        axis.set_xticks(list(ticks), [str(steps[i]) for i in ticks])
        axis.set_yticks(range(len(layers)), [str(n) for n in layers])
        axis.set(title=part, xlabel="step")
        axis.grid(False)
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0][-1], label=LABELS.get(metric, metric))
    figure.suptitle(f"{LABELS.get(metric, metric)} of {data}")
    return figure


def plot_spectra(plt, rows: Rows, data: str):
    """Singular values over their largest at the last step, a panel a kind of layer."""
    last = max((r["step"] for r in rows if r["data"] == data), default=None)
    chosen: dict[str, list] = defaultdict(list)
    for row in rows:
        wanted = row["data"] == data and row["step"] == last and row["metric"] == "spectrum" and row["value"]
        if wanted and "ov_circuit" not in row["component"]:
            chosen[part_of(row["component"])].append((layer_of(row["component"]), row["value"]))
    if not chosen:
        return None
    figure, axes = plt.subplots(1, len(chosen), figsize=(3.2 * len(chosen) + 0.5, 2.9), squeeze=False, sharey=True)
    colours = plt.get_cmap("viridis_r")
    for axis, (part, spectra) in zip(axes[0], sorted(chosen.items())):
        depth = max(layer for layer, _ in spectra) + 1
        for layer, values in sorted(spectra):
            shown = [v / values[0] for v in values if values[0] and v > 1e-8 * values[0]]
            axis.semilogy(range(1, len(shown) + 1), shown, color=colours((layer + 1) / depth), label=f"layer {layer}")
        axis.set(title=part, xlabel="singular value number")
    axes[0][0].set_ylabel("singular value / the largest")
    axes[0][0].legend(frameon=False, fontsize=7) if depth <= 4 else None
    figure.suptitle(f"spectra of {data}, step {last}")
    return figure


# ---- the page --------------------------------------------------------------------------------------------------------------

def save(plt, figure, out: Path, name: str) -> Path | None:
    if figure is None:
        return None
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.png")
    plt.close(figure)
    return out / f"{name}.png"


def page(title: str, pictures: list[tuple[str, Path]], table: str, out: Path) -> Path:
    """One HTML file with the pictures inside."""
    shown = "".join(f'<figure><img alt="{html.escape(words)}" src="data:image/png;base64,'
                    f'{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{html.escape(words)}</figcaption></figure>'
                    for words, path in pictures)
    target = out / "report.html"
    target.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>body{{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;"
        f"padding:0 1em;color:#222}}img{{max-width:100%}}figure{{margin:2em 0}}figcaption{{color:#555}}table{{border-collapse:"
        f"collapse;font-size:13px}}td,th{{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}}td:first-child,"
        f"th:first-child{{text-align:left}}</style><h1>{html.escape(title)}</h1>{shown}{table}</html>\n", encoding="utf-8")
    return target


def last_table(rows: Rows) -> str:
    """The effective weights' measures at the last step."""
    last = max((r["step"] for r in rows if r["data"] == "weights"), default=None)
    metrics = [m for m in LABELS if any(r["metric"] == m for r in rows)]
    lines: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in rows:
        if row["data"] == "weights" and row["step"] == last and "ov_circuit" not in row["component"]:
            lines[row["component"]][row["metric"]] = row["value"]
    head = "".join(f"<th>{html.escape(LABELS[m])}" for m in metrics)

    def cell(value: Any) -> str:
        return f"<td>{value:.4g}" if isinstance(value, (int, float)) else "<td>undefined"
    body = "".join(f"<tr><td>{html.escape(name)}{''.join(cell(found.get(m)) for m in metrics)}" for name, found in lines.items())
    return f"<h2>Effective weights at step {last}</h2><table><tr><th>layer{head}{body}</table>" if lines else ""


def write_run(run: Path, rows: Rows, out: Path) -> Path:
    """Draw one run's analysis into `out`; returns the page."""
    plt = _pyplot()
    plots: list[tuple[str, str, Callable[[], Any]]] = [
        ("training", "Loss and learning rate; dotted lines are merges.", lambda: plot_training(plt, run)),
        ("update_rank", "Effective rank of the cumulative update of the effective weights since the first snapshot: does it grow "
         "across cycles?", lambda: plot_over_steps(plt, rows, "updates since the start", "effective_rank")),
        ("cycle_rank", "Effective rank of the update since the snapshot before.",
         lambda: plot_over_steps(plt, rows, "updates since the last snapshot", "effective_rank"))]
    for data in ("weights", "gradients", "activations"):
        plots.append((f"rank_{data}", f"Effective rank of {data}.",
                      lambda d=data: plot_over_steps(plt, rows, d, "effective_rank")))
        plots.append((f"heat_{data}", f"Proportional effective rank of {data}, layers by steps.",
                      lambda d=data: plot_heat(plt, rows, d, "per")))
    for metric in sorted({r["metric"] for r in rows if " to step " in r["metric"]}):
        plots.append((metric.replace(" ", "_"), f"{metric.split()[0].upper()} of each layer's activations with those of step "
                      f"{metric.split()[-1]}.", lambda m=metric: plot_over_steps(plt, rows, "activations", m)))
    for metric in ("condition_number", "gini", "norm_nuclear"):
        plots.append((f"{metric}_weights", f"{LABELS[metric].capitalize()} of the effective weights.",
                      lambda m=metric: plot_over_steps(plt, rows, "weights", m)))
    for data in ("weights", "updates since the start"):
        plots.append((f"spectra_{data.replace(' ', '_')}", f"Singular values of the {data}, relative to the largest.",
                      lambda d=data: plot_spectra(plt, rows, d)))
    pictures = [(words, path) for name, words, draw in plots if (path := save(plt, draw(), out, name))]
    return page(f"{run.name}: learning dynamics", pictures, last_table(rows), out)


# ---- several runs --------------------------------------------------------------------------------------------------------------

def plot_losses(plt, runs: dict[str, Path]):
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), sharey=True)
    for name, run in runs.items():
        record = training_record(run)
        steps, losses = zip(*record["train/loss"]) if record["train/loss"] else ((), ())
        tokens, speed = dict(record["tokens"]), dict(record["tokens_per_second"])
        seconds, clock, before = [], 0.0, 0
        for step in steps:
            clock += (tokens[step] - before) / speed[step]
            before = tokens[step]
            seconds.append(clock)
        for axis, x in zip(axes, (steps, [tokens[s] for s in steps], seconds)):
            axis.plot(x, losses, label=name)
    for axis, label in zip(axes, ("step", "tokens", "seconds of training")):
        axis.set_xlabel(label)
    axes[0].set_ylabel("training loss (nats a token)")
    axes[0].legend(frameon=False)
    return figure


def plot_compared(plt, tables: dict[str, Rows], data: str, metric: str):
    """A panel a kind of layer, a line a run: the mean over its layers."""
    found = {name: series(rows, data, metric) for name, rows in tables.items()}
    parts = sorted({part for s in found.values() for part in s})
    if not parts:
        return None
    figure, axes = plt.subplots(1, len(parts), figsize=(3.4 * len(parts) + 0.5, 3.0), squeeze=False)
    for axis, part in zip(axes[0], parts):
        for name, parts_of_run in found.items():
            by_step: dict[int, list[float]] = defaultdict(list)
            for points in parts_of_run.get(part, {}).values():
                for step, value in points:
                    by_step[step].append(value)
            steps = sorted(by_step)
            axis.plot(steps, [sum(by_step[s]) / len(by_step[s]) for s in steps], "o-", markersize=3, label=name)
        axis.set(title=part, xlabel="step")
        scale_for(axis, metric)
    axes[0][0].set_ylabel(LABELS.get(metric, metric))
    axes[0][0].legend(frameon=False)
    figure.suptitle(f"{LABELS.get(metric, metric)} of {data}, mean over layers")
    return figure


def write_comparison(runs: dict[str, Path], tables: dict[str, Rows], out: Path) -> Path:
    """Overlay several runs' analyses; returns the page."""
    plt = _pyplot()
    pictures = [("Training loss over steps, tokens and time.", save(plt, plot_losses(plt, runs), out, "loss"))]
    for data in ("updates since the start", "updates since the last snapshot", "weights", "gradients", "activations"):
        for metric in LABELS:
            name = f"{metric}_{data.replace(' ', '_')}"
            if path := save(plt, plot_compared(plt, tables, data, metric), out, name):
                pictures.append((f"{LABELS[metric].capitalize()} of {data}, mean over layers.", path))
    return page("Runs compared: " + ", ".join(runs), pictures, "", out)
