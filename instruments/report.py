"""The page of an analysis: one self-contained HTML file of pictures (plots.py) and tables, of a run or of several.

It opens with what one looks for first (losses, the rank of the updates, spectra) and goes on with a chapter for each kind of
data. Rows are those of analyze.py.
"""

from __future__ import annotations

import base64
import html
import io
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from config import UserError
from config.reading import show
from instruments.components import Row, layer_of
from instruments.landscape import Point, barrier
from instruments.panels import COLUMN, Panels, alone, sheet
from instruments.plots import (CHAPTERS, CIRCUITS, LABELS, RANKS, Line, axis_label, bands, curves, layer_lines, part_of,
                               plot_around, plot_bands, plot_heat, plot_losses, plot_path, plot_spectra, plot_training, pyplot,
                               run_line)
from instruments.pairs import Pair
from instruments.record import Curves, fork_of, training_record
from instruments.results import Results, table_text
from instruments.similarity import MEASURES, PAIRED
from runtime.log import log, printable

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}img{max-width:100%}
.wide{overflow-x:auto}
figure{margin:1em 0 2em}figcaption,.note{color:#555}table{border-collapse:collapse;font-size:13px;margin:1em 0}
td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}
nav a{margin-right:1.2em}"""


# ---- the page --------------------------------------------------------------------------------------------------------------

class Page:
    """Chapters of pictures and tables, written as one HTML file; pictures lie beside it, with their tables."""

    def __init__(self, plt, title: str, results: Results, panels: bool = False):
        self.plt, self.title, self.results, self.panels, self.chapters = plt, title, results, panels, []

    def chapter(self, title: str, note: str, *content: str) -> None:
        if any(content):
            self.chapters.append((title, f"<p class=note>{escape(note)}</p>{''.join(content)}"))

    def picture(self, name: str, figure, words: str = "") -> str:
        """A figure as part of the page, and beside it."""
        if figure is None:
            return ""
        data = base64.b64encode(self.save(name, figure)).decode()
        caption = f"<figcaption>{escape(words)}</figcaption>" if words else ""
        return f'<figure><img alt="{escape(words or name)}" src="data:image/png;base64,{data}">{caption}</figure>'

    def save(self, name: str, figure) -> bytes:
        """Write figures/NAME.png, and .svg where panels are wanted, which takes half of the time; returns the former."""
        images = {kind: io.BytesIO() for kind in (("svg", "png") if self.panels else ("png",))}
        for kind, image in images.items():
            figure.savefig(image, format=kind, dpi=200 if figure.get_size_inches()[0] <= COLUMN else None)
            self.results.write(f"figures/{name}.{kind}", image.getvalue())
        self.plt.close(figure)
        return images["png"].getvalue()

    def sheet(self, shown: Panels) -> str:
        """A measure on the page, and its table beside the figure; where asked for, each panel alone too."""
        name = file_name(shown.data, shown.metric)
        if not shown.parts:
            return ""
        self.results.write(f"figures/{name}.csv", panel_table(shown, shown.parts))
        for part in shown.parts if self.panels else ():
            single = file_name(shown.data, shown.metric, part)
            self.save(single, alone(self.plt, shown, part))
            self.results.write(f"figures/{single}.csv", panel_table(shown, [part]))
        return self.picture(name, sheet(self.plt, shown))

    def write(self, name: str = "report.html") -> Path:
        links = "".join(f"<a href='#c{n}'>{escape(title)}</a>" for n, (title, _) in enumerate(self.chapters))
        body = "".join(f"<h2 id=c{n}>{escape(title)}</h2>{text}" for n, (title, text) in enumerate(self.chapters))
        text = (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
                f"<title>{escape(self.title)}</title><style>{STYLE}</style><h1>{escape(self.title)}</h1><nav>{links}</nav>{body}"
                "</html>\n")
        path = self.results.write(name, text)
        self.results.finish()
        return path


def escape(text: str) -> str:
    """A stranger's name as text of a page, and no more than that."""
    return html.escape(printable(text))


def file_name(*names: str) -> str:
    return re.sub(r"\W+", "_", "_".join(names))


def panel_table(shown: Panels, parts: list[str]) -> str:
    """What a figure was drawn from, as CSV."""
    return table_text(("layers", "line", "step", shown.metric, "least", "largest"),
                      ((part, line.label, step, value, *spread) for part in parts for line in shown.lines[part]
                       for (step, value), spread in zip(line.points, line.spread)))


def glossary(metrics: Iterable[str]) -> str:
    return table(["measure", "is"], [[LABELS[m], MEASURES[m].definition] for m in LABELS if m in set(metrics)])


def table(head: list[str], body: Iterable[list[Any]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
    lines = "".join(f"<tr>{''.join(f'<td>{cell(v)}' for v in line)}" for line in body)
    return f"<div class=wide><table><tr>{''.join(f'<th>{escape(h)}' for h in head)}{lines}</table></div>" if lines else ""


def rank_table(rows: list[Row], data: str = "updates since the start") -> str:
    """Effective (numerical) rank of the cumulative update, a line a layer, a column a step."""
    found: dict[str, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["data"] == data and row["metric"] in RANKS and row["value"] is not None:
            found[row["component"]][row["step"]][row["metric"]] = row["value"]
    steps = sorted({step for by_step in found.values() for step in by_step})
    if len(steps) > 12:
        steps = [steps[round(i * (len(steps) - 1) / 11)] for i in range(12)]
    body = [[name, *(f"{v[RANKS[0]]:.1f} ({v[RANKS[1]]:.0f})" if len(v := by_step.get(s, {})) == 2 else "" for s in steps)]
            for name, by_step in found.items()]
    return table(["effective (numerical) rank at step", *map(str, steps)], body)


def by_layer(line: tuple[str, Any]) -> tuple[int, str]:
    """Layers in their order: layers.10 comes after layers.9."""
    layer = re.search(r"layers\.(\d+)", line[0])
    return int(layer[1]) if layer else -1, line[0]


def last_table(rows: list[Row], data: str = "weights") -> str:
    """Every measure that was asked for, a line a layer, at the last step."""
    last = max((r["step"] for r in rows if r["data"] == data), default=None)
    lines: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in rows:
        if row["data"] == data and row["step"] == last and row["metric"] in LABELS and part_of(row["component"]) not in CIRCUITS:
            lines[row["component"]][row["metric"]] = "undefined" if row["value"] is None else float(row["value"])
    metrics = [m for m in LABELS if any(m in found for found in lines.values())]
    return table([f"at step {last}", *(LABELS[m] for m in metrics)],
                 [[name, *(found.get(m, "") for m in metrics)] for name, found in sorted(lines.items(), key=by_layer)])


def undefined_table(rows: list[Row]) -> str:
    counts = Counter((row["data"], row["metric"], row["reason"]) for row in rows if row["value"] is None)
    return table(["data", "measure", "values", "why"], [[d, m, str(n), why] for (d, m, why), n in counts.items()])


def plain(value: Any) -> str:
    return value[:100] if isinstance(value, str) else show(value)


def run_summary(config: dict, rows: list[Row]) -> str:
    """What one must know of a run to read its figures."""
    def options(tree: Any, *path: str) -> dict:
        for key in path:
            tree = tree.get(key) if isinstance(tree, dict) else None
        return tree if isinstance(tree, dict) else {}
    m, o, relora = options(config, "model"), options(config, "training", "optimization"), options(config, "model", "relora")
    words = [f"d_model {m['d_model']}, {show(m.get('n_layers'))} layers, {m['attention_n_heads']} heads on "
             f"{m['attention_n_kv_heads']}",
             f"ReLoRA r {show(relora.get('r', 128))}, merged every {show(relora.get('reset_frequency'))} steps" if relora
             else "full-rank",
             f"{plain(o.get('optimizer'))}, learning rate {show(o.get('lr'))}, {plain(o.get('lr_scheduler'))}"]
    splits = sorted({f"{row['data']} of the {row['split']} snapshot" for row in rows if not row["data"].startswith("update")})
    return "; ".join(words) + ". Measured: " + ", ".join(splits) + "."


def rank_bounds(config: dict, rows: list[Row], merges: list[int]) -> dict[str, list[tuple[int, float]]]:
    """{part: what the rank of the cumulative update cannot exceed}: r a cycle, and the layer's own size."""
    relora, bounds = config["model"].get("relora"), {}
    rank = relora.get("r", 128) if isinstance(relora, dict) else None
    for row in rows if type(rank) is int else ():
        if row["data"] == "updates since the start" and row["metric"] == "spectrum" and row["value"]:
            cycles = sum(merge < row["step"] for merge in merges) + 1
            points = bounds.setdefault(part_of(row["component"]), {})
            points[row["step"]] = min(rank * cycles, len(row["value"]))
    return {part: sorted(points.items()) for part, points in bounds.items() if part not in CIRCUITS}


def write_run(run: Path, config: dict, rates: list[tuple[int, float]], rows: list[Row], results: Results,
              panels: bool = False) -> Path:
    """Draw one run's analysis; returns the page."""
    plt = pyplot()
    page, record = Page(plt, f"{run.name}: learning dynamics", results, panels), training_record(run)
    merges = [step for step, _ in record["relora/reset_count"]]
    depth = max((layer_of(r["component"]) for r in rows if r["value"] is not None), default=0) + 1

    def shown(data: str, metric: str, bounds: dict = {}) -> Panels:
        lines = {part: layer_lines(plt, layers, metric, depth) for part, layers in curves(rows, data, metric).items()}
        return Panels(data, metric, axis_label(rows, data, metric), lines, bounds, tuple(merges))
    page.chapter("Training", run_summary(config, rows) + fork_of(run),
                 page.picture("training", plot_training(plt, run.name, record, rates)))
    start, bounds = "updates since the start", rank_bounds(config, rows, merges)
    page.chapter("Does the rank of the update grow?", "Effective weight minus that of the first snapshot. Dotted: merges; "
                 "dashed: r for each cycle so far, up to the layer's size.",
                 *(page.sheet(shown(start, metric, bounds)) for metric in RANKS), rank_table(rows))
    page.chapter("Spectra", "", page.picture("spectra", plot_spectra(plt, rows)))
    page.chapter("Layers by steps", "Proportional effective rank: exp(entropy of the singular values) over their number.",
                 page.picture("layers_by_steps", plot_heat(plt, rows)))
    for data in dict.fromkeys([*CHAPTERS, *(row["data"] for row in rows)]):
        found = (page.sheet(shown(data, metric)) for metric in LABELS if not (data == start and metric in RANKS))
        page.chapter(data.capitalize(), CHAPTERS.get(data, ""), *found, last_table(rows, data))
    page.chapter("Words", "What each measure is; more in docs/measures.md.", glossary(row["metric"] for row in rows))
    page.chapter("Undefined", "Measures without a value, and why.", undefined_table(rows))
    return page.write()


def write_path(ends: list[str], points: list[Point], results: Results) -> Path:
    """Draw the losses along the line between two checkpoints; returns the page."""
    plt = pyplot()
    page = Page(plt, f"From {ends[0]} to {ends[1]}", results)
    page.chapter("Loss along the straight line", f"Barrier: {barrier(points):.4f} nats a token above the line between both ends.",
                 page.picture("loss_path", plot_path(plt, points)),
                 table(["share of the second", "loss"], [[point.share, point.loss] for point in points]))
    return page.write()


def write_around(checkpoint: str, found: dict[str, list[Point]], results: Results) -> Path:
    """Draw the losses around a checkpoint; returns the page."""
    plt = pyplot()
    page = Page(plt, f"Around {checkpoint}", results)
    page.chapter("Loss around the checkpoint", "Along random directions, each row of each matrix as long as the weights' own, "
                 "and along the leading principal components of the run's way, as long as the weights are together.",
                 page.picture("loss_around", plot_around(plt, found)),
                 table(["direction", *(f"{point.share:+.3g}" for point in next(iter(found.values())))],
                       [[name, *(point.loss for point in points)] for name, points in found.items()]))
    return page.write()


# ---- several runs --------------------------------------------------------------------------------------------------------------

def run_table(records: dict[str, Curves], tables: dict[str, list[Row]]) -> tuple[list[str], list[list[Any]]]:
    """(head, rows) of what each run came to: tokens, losses, ranks of its update."""
    body = []
    for name, record in records.items():
        def last(key: str, record=record) -> Any:
            return float(record[key][-1][1]) if record[key] else ""
        tokens = f"{record['tokens'][-1][1]:,}" if record["tokens"] else ""
        body.append([name, str(record["train/loss"][-1][0]) if record["train/loss"] else "", tokens, last("train/loss"),
                     last("eval/val_loss"), last("eval/paloma_loss"),
                     *(mean_at_end(tables[name], "updates since the start", m) for m in RANKS)])
    return ["run", "last step", "tokens", "training loss", "val loss", "Paloma loss", "effective rank of the update",
            "numerical rank of it"], body


def mean_at_end(rows: list[Row], data: str, metric: str) -> Any:
    chosen = [r for r in rows if r["data"] == data and r["metric"] == metric and r["value"] is not None]
    last = max((r["step"] for r in chosen), default=None)
    return statistics.fmean(r["value"] for r in chosen if r["step"] == last) if chosen else ""


def loss_bands(plt, arms: dict[str, list[Curves]]):
    try:
        found = {arm: bands(record["train/loss"] for record in records) for arm, records in arms.items()}
    except UserError as error:  # scipy is not installed, which all the rest works without
        log.warning(f"{error}; the page does without intervals")
        return None
    return plot_bands(plt, found, "training loss (nats a token, log scale)", log=True)


def write_comparison(records: dict[str, Curves], tables: dict[str, list[Row]], arms: dict[str, list[str]], paired: list[Pair],
                     results: Results, panels: bool = False) -> Path:
    """Overlay several runs' analyses; returns the page. Runs of one of the `arms` {its name: runs} are drawn as one.

    Lines are means over layers and runs, and shades their range; the losses' shades are intervals of the mean.
    """
    plt = pyplot()
    page = Page(plt, "Runs compared: " + ", ".join(records), results, panels)
    page.chapter("Training", "Lines: training loss; markers: loss on held-out rows. Time leaves out evaluation and saving. Ranks "
                 "are means over the layers.", page.picture("loss", plot_losses(plt, records)),
                 table(*run_table(records, tables)))
    if len(arms) < len(records):
        page.chapter("Seeds", "Runs that differ in nothing but their seed are one arm: mean and 95 % interval (Student's t).",
                     page.picture("arms", loss_bands(plt, {a: [records[run] for run in of] for a, of in arms.items()})))
    if paired:
        bands_of = {f"{pair.names[0]} - {pair.names[1]}": pair.band for pair in paired}
        page.chapter("Paired", "Runs that share an ancestor and go on with the same batches: differences of their training "
                     "losses, means of some steps each with 95 % intervals that take steps for independent.",
                     page.picture("paired", plot_bands(plt, bands_of, "difference of training losses (nats a token)", zero=True)),
                     "".join(f"<p>{escape(pair.told)}" for pair in paired))
    for data in dict.fromkeys([*CHAPTERS, *(row["data"] for rows in tables.values() for row in rows)]):
        found = []
        for metric in LABELS:
            parts: dict[str, list[Line]] = defaultdict(list)
            for number, (name, names) in enumerate(arms.items()):
                rows = [row for each in names for row in tables[each]]
                for part, layers in curves(rows, data, metric).items():
                    parts[part].append(run_line(name, f"C{number}", layers, metric))
            label = f"{LABELS[metric]} with the last step" if metric in PAIRED else LABELS[metric]
            found.append(page.sheet(Panels(data, metric, label, parts)))
        page.chapter(data.capitalize(), CHAPTERS.get(data, ""), *found)
    return page.write()
