"""Runs that share an ancestor, compared on the same batches: what they differ by is not which rows came.

A fork trains on the rows that its original goes on with, so their losses at a step are a pair. Their difference has far less
noise than either loss: the interval of its mean over some steps shows what two single runs cannot. It takes steps for
independent, which those close to each other are not quite.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from config import UserError
from config.reading import flat
from hub.folders import read_json
from instruments.intervals import Difference, Interval, interval, paired_difference
from instruments.record import Curves

SPANS = 20  # points of the band, each of as many logged steps
SAME_ROWS = ("data.dataset.name", "data.dataset.subset", "data.dataset.revision", "data.dataloader.batch_size",
             "data.dataloader.first_row")
LOSS = "train/loss"


class Pair(NamedTuple):
    """The losses of one run less those of another, from the step where they parted on."""
    names: tuple[str, str]
    parted: int
    whole: Difference
    band: list[tuple[int, Interval]]  # (last step of a span, the mean difference in it)

    @property
    def told(self) -> str:
        d = self.whole
        spread = "" if d.low is None else f", 95 % interval {d.low:+.4f} to {d.high:+.4f}"
        spread += "" if d.p is None else f", p {d.p:.2g}"
        return f"{self.names[0]} - {self.names[1]}, the same batches since step {self.parted}: {d.mean:+.4f} nats a token{spread}"


def lineage(run: Path) -> dict[Path, float]:
    """{run folder: the step up to which its past is this run's too} of a run and what it was forked from, and so on."""
    found, upto = {run.resolve(): float("inf")}, float("inf")
    while (run / "fork.json").is_file() and len(found) < 100:
        try:
            told = read_json(run / "fork.json")
            source, upto = Path(told["from"]).resolve(), min(upto, int(told["step"]))
        except (UserError, KeyError, TypeError, ValueError, AttributeError):
            break
        run = source.parent.parent if source.name.startswith("step_") else source
        found.setdefault(run, upto)
    return found


def parted(run: Path, other: Path) -> int | None:
    """The last step that two runs share; None where they have no ancestor in common."""
    mine, theirs = lineage(run), lineage(other)
    steps = [min(mine[folder], theirs[folder]) for folder in mine.keys() & theirs.keys()]
    return int(max(steps)) if steps and max(steps) < float("inf") else None


def pairs(runs: dict[str, Path], configs: dict[str, dict[str, Any]], records: dict[str, Curves]) -> list[Pair]:
    """All pairs of runs that share an ancestor and go on with the same rows; the later named less the earlier."""
    found = []
    for one, other in combinations(runs, 2):
        options = [flat(configs[name]) for name in (one, other)]
        since = parted(runs[one], runs[other])
        if since is None or any(options[0].get(key) != options[1].get(key) for key in SAME_ROWS):
            continue
        losses = [{step: loss for step, loss in records[name][LOSS] if step > since} for name in (other, one)]
        steps = sorted(losses[0].keys() & losses[1].keys())
        if steps:
            differences = [losses[0][step] - losses[1][step] for step in steps]
            size = max(2, -(-len(steps) // SPANS))
            spans = [slice(first, first + size) for first in range(0, len(steps), size)]
            band = [(steps[span][-1], interval(differences[span])) for span in spans]
            whole = paired_difference(*([loss[step] for step in steps] for loss in losses))
            found.append(Pair((other, one), since, whole, band))
    return found
