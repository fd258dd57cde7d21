"""Measures over steps: a sheet shows one measure, a panel a kind of layer, and in it a line a layer, or a run where several are
compared. Each panel can be drawn alone, as wide as a column of a paper."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from instruments.components import IN_CYCLE
from instruments.plots import CIRCUITS, Line, head, over_steps, panels, plain
from instruments.similarity import MEASURES

COLUMN = 3.3  # inches, of a paper in two columns
BOUND = "rank times cycles, at most"
LEGEND = 12  # names; more layers than that are told by a bar of colours


def in_order(parts: Iterable[str]) -> list[str]:
    return sorted(set(parts), key=lambda part: (part in CIRCUITS, part))


class Panels(NamedTuple):
    """One measure of one kind of data: lines by kind of layer, and what is drawn with them."""
    data: str
    metric: str
    label: str
    lines: dict[str, list[Line]]  # {part: lines}
    bounds: dict[str, list[tuple[int, float]]] = {}  # {part: what the values cannot exceed}
    merges: tuple[int, ...] = ()

    @property
    def parts(self) -> list[str]:
        return in_order(part for part, found in self.lines.items() if found)

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest of what is drawn, bounds included."""
        values = [value for found in self.lines.values() for line in found for both in line.spread for value in both]
        values += [value for part in self.parts for _, value in self.bounds.get(part, [])]
        return min(values), max(values)


def pieces(line: Line, breaks: Iterable[int]) -> tuple[list[float], list[float], list[tuple[float, float]]]:
    """Steps, values and spreads of a line, with a gap where a break lies between two points."""
    steps, values, spread = [], [], []
    for (step, value), both in zip(line.points, line.spread):
        if steps and any(steps[-1] <= merge < step for merge in breaks):
            steps, values, spread = [*steps, step], [*values, math.nan], [*spread, (math.nan, math.nan)]
        steps, values, spread = [*steps, step], [*values, value], [*spread, both]
    return steps, values, spread


def draw(axis, shown: Panels, part: str) -> dict[str, Any]:
    """One panel; returns {label: what stands for it in a legend}."""
    legend: dict[str, Any] = {}
    for line in shown.lines.get(part, []):
        steps, values, spread = pieces(line, shown.merges if shown.data == IN_CYCLE else ())
        legend[line.label], = axis.plot(steps, values, "o-", markersize=2.5, linewidth=1.2, color=line.colour)
        if any(low != high for low, high in line.spread):
            axis.fill_between(steps, *zip(*spread), color=line.colour, alpha=0.12, linewidth=0)
    if shown.bounds.get(part):
        legend[BOUND], = axis.plot(*zip(*shown.bounds[part]), "--", color="0.45", linewidth=1)
    for number, step in enumerate(shown.merges):
        mark = axis.axvline(step, color="0.3", linewidth=0.8, linestyle=":")
        legend |= {} if number else {"merge": mark}
    scale(axis, shown.metric, *shown.range)
    over_steps(axis)
    return legend


def sheet(plt, shown: Panels):
    """A row of panels, a kind of layer each."""
    labelled = {line.label for found in shown.lines.values() for line in found}
    if not labelled:
        return None
    few = has_legend(labelled)
    figure, [axes] = panels(plt, 1, len(shown.parts), 1.7, sharex=True, sharey=True,
                            bottom=0.55 + 0.22 * -(-(len(labelled) + 2) // 6) if few else 0.5, right=0.15 if few else 1.0)
    legend: dict[str, Any] = {}
    for axis, part in zip(axes, shown.parts):
        legend |= draw(axis, shown, part)
        axis.set_title(part, fontsize=9)
    axes[0].set_ylabel(shown.label)
    head(figure, f"{shown.data.capitalize()}: {shown.label}")
    if few:
        add_legend(figure, legend, 6)
    else:
        width, height = figure.get_size_inches()
        bar = figure.add_axes((1 - 0.8 / width, 0.5 / height, 0.15 / width, 1.7 / height))
        add_colours(plt, figure, bar, labelled)
    return figure


def alone(plt, shown: Panels, part: str):
    """One panel as wide as a column, with its own legend."""
    labelled = [line.label for line in shown.lines[part]]
    few = has_legend(labelled)
    bottom = 0.45 + (0.17 * -(-(len(labelled) + 2) // 3) if few else 0.0)
    figure, axis = plt.subplots(figsize=(COLUMN, 2.1 + bottom))
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left=0.75 / width, right=1 - (0.12 if few else 0.75) / width, bottom=bottom / height,
                           top=1 - 0.3 / height)
    legend = draw(axis, shown, part)
    axis.set_title(f"{shown.data.capitalize()}, {part}", fontsize=8)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(shown.label, fontsize=8)
    axis.tick_params(which="both", labelsize=7)
    if few:
        add_legend(figure, legend, 3)
    else:
        add_colours(plt, figure, figure.add_axes((1 - 0.65 / width, bottom / height, 0.1 / width, 1.8 / height)), labelled)
    return figure


def has_legend(labels: Iterable[str]) -> bool:
    """Many layers are told by a bar of colours; runs have no scale of colours."""
    labels = set(labels)
    return len(labels) <= LEGEND or not all(label.startswith("layer ") for label in labels)


def add_legend(figure, legend: dict[str, Any], columns: int) -> None:
    names = list(map(plain, legend))
    figure.legend(list(legend.values()), names, loc="lower center", ncols=min(columns, len(legend)), fontsize=7)


def add_colours(plt, figure, bar, labels: Iterable[str]) -> None:
    layers = [int(label.split()[1]) for label in labels]
    colours = plt.cm.ScalarMappable(plt.Normalize(min(layers), max(layers)), plt.get_cmap("viridis_r"))
    figure.colorbar(colours, bar, label="layer")


def scale(axis, metric: str, least: float, largest: float) -> None:
    """Condition numbers span decades; a fraction is read against 0 and 1, a rank or a norm against 0."""
    if MEASURES[metric].scale == "log":
        axis.set_yscale("log")
    elif MEASURES[metric].scale == "fraction":
        axis.set_ylim(-0.03, 1.03)
    elif MEASURES[metric].scale == "similarity":
        axis.set_ylim(min(0, least) - 0.03, 1.03)
    else:
        axis.set_ylim(0, 1.08 * largest or 1)
