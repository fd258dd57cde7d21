"""Analyse the learning dynamics of runs: ranks, spectra, sparsity, norms and similarities over steps and layers.

    python analyze.py runs/demo                          # everything, into runs/demo/analysis: JSON, CSV, PNG, report.html
    python analyze.py runs/demo --since 150              # also the updates since that step's snapshot
    python analyze.py runs/tiny --config demo.yaml       # a YAML file of pico-analyze, unchanged
    python analyze.py compare runs/full runs/relora      # several runs over steps, tokens and time; seeds of an arm as one
    python analyze.py runs/relora --against runs/full    # also how alike activations and updates are, step by step
    python analyze.py path runs/full runs/relora         # loss along the straight line between two checkpoints
    python analyze.py path runs/relora                   # around one: along random directions, and its run's own
    python analyze.py --list                             # the measures, each with its definition

Weights, activations and gradients come from the snapshots. Updates are differences of effective weights: since the first
snapshot (does the cumulative update's rank grow across merges?), since the one before, and, in ReLoRA layers, since
the latest merge (s B A). The OV circuit of a head is W_O W_V (Elhage et al. 2021), heads of a group sharing W_V. A measure
that is undefined is null with its reason. What has been measured is kept in analysis/cache: a second call does new steps only.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import config  # noqa: F401  # isort: skip  # before torch, whose threads it teaches to wait
import torch

from config import ConfigError, config_from_dict
from config.reading import flat, read_yaml, show, yaml_text
from data import TokenDataset
from hub.folders import resolve
from instruments import report
from instruments.components import KINDS, AnalysisError, Request, Row, target_of
from instruments.landscape import barrier, loss_along, loss_around
from instruments.measures import SINGLE
from instruments.measuring import analyse, rows_against
from instruments.pairs import pairs
from instruments.record import training_record
from instruments.results import Results, as_text, table_text
from instruments.similarity import MEASURES, OVERLAPS, PAIRED
from instruments.snapshots import Snapshots
from optim import learning_rate_multiplier
from runtime.command import Parser, command, number
from runtime.log import log, printable

OF_A_SEED = ("training.seed", "data.dataloader.first_row", "checkpointing.run_name", "checkpointing.runs_dir")  # no arm's own
PATH_ROWS = 64  # token rows that a loss along a line is measured on
DEFAULT = [
    Request(list(SINGLE), "updates"), Request(list(SINGLE), "weights"), Request(list(SINGLE), "gradients", "train"),
    Request(list(SINGLE), "activations"), Request(list(PAIRED), "activations"),
    Request(["effective_rank", "per", "norm_nuclear"], "weights", circuit=True),
    Request(list(PAIRED), "activations", circuit=True), Request(list(OVERLAPS), "updates"),
]


# ---- pico-analyze's YAML ----------------------------------------------------------------------------------------------

def read_requests(path: Path) -> tuple[list[Request], list[int] | range | None]:
    """(requests, steps) of a pico-analyze configuration. Raises AnalysisError naming what it does not know."""
    try:
        tree = read_yaml(yaml_text(path), plain=False)
        steps = tree.get("steps")
        requests = [_request(metric, component) for metric in tree["metrics"] for component in metric["components"]]
        if isinstance(steps, dict):  # as there, the first step at or past `end` counts too
            steps = range(steps["start"], steps["end"] + steps["step"], steps["step"])
        elif not (steps is None or isinstance(steps, list)):
            raise TypeError(f"steps are {{start, end, step}} or a list, not {show(steps)}")
    except (OSError, ValueError, ConfigError, KeyError, TypeError, AttributeError) as error:
        raise AnalysisError(f"{path}: not a pico-analyze configuration ({error})") from None
    return requests, steps


def _request(metric: dict, component: dict) -> Request:
    name, suffixes, layers = metric["metric_name"], component["layer_suffixes"], component.get("layers")
    if name == "norm":
        name = f"norm_{metric['norm_type'].lower()}"
    if name not in MEASURES or component["component_name"] not in ("simple", "ov_circuit") or component["data_type"] not in KINDS:
        raise AnalysisError(f"metric {show(name)} of {show(component['component_name'])} {show(component['data_type'])} is not "
                            f"known; metrics are {', '.join(MEASURES)}")
    if not (layers is None or isinstance(layers, list)):
        raise TypeError(f"layers are a list such as [0, 11], not {show(layers)}")
    target, split = metric.get("target_checkpoint"), metric.get("data_split", "val")
    if not (target is None or isinstance(target, int)) or not (isinstance(split, str) and re.fullmatch(r"[\w-]+", split)):
        raise TypeError(f"target_checkpoint is a step and data_split a name, not {show(target)} and {show(split)}")
    circuit = component["component_name"] == "ov_circuit"
    listed = [suffixes["value_layer"], suffixes["output_layer"]] if circuit else [suffixes] if isinstance(suffixes, str) \
        else list(suffixes)
    return Request([name], component["data_type"], split, circuit, [str(suffix) for suffix in listed], layers, target)


# ---- the command -------------------------------------------------------------------------------------------------------

class Plan(NamedTuple):
    """What the command's words ask for."""
    requests: list[Request]
    wanted: list[int] | range | None  # steps; None: all

    def steps(self, run: Snapshots) -> list[int]:
        found = [step for step in run.folders if self.wanted is None or step in self.wanted]
        if not found:
            raise AnalysisError(f"{run.path}: none of the wanted steps has a snapshot; there are "
                                f"{', '.join(map(str, run.folders))}")
        for request in self.requests:
            target_of(run, request)
        return found


def write_tables(rows: list[Row], results: Results) -> None:
    results.write("metrics.json", json.dumps(rows, allow_nan=False) + "\n")
    results.write("metrics.csv", table_text(rows[0], ([row[name] for name in rows[0]] for row in rows
                                                            if row["metric"] != "spectrum")))


def learning_rates(run: Snapshots) -> list[tuple[int, float]]:
    """(step, learning rate) of 20,000 updates so far at most, or nothing where another lab's config names its schedule."""
    try:
        cfg = config_from_dict(run.config)
    except ConfigError:
        return []
    rate, steps = cfg.training.optimization.lr, range(min(cfg.last_step, max(run.folders)))
    return [(step, rate * learning_rate_multiplier(step, cfg.training, cfg.model.relora))
            for step in steps[::len(steps) // 20_000 + 1]]


def compare(runs: dict[str, Snapshots], plan: Plan, out: Path, device: torch.device, panels: bool) -> None:
    results = Results(out, chosen=True)
    tables = {label: analyse(run, plan.requests, plan.steps(run), run.path / "analysis", device) for label, run in runs.items()}
    write_tables([{"run": label} | row for label, rows in tables.items() for row in rows], results)
    paths = {label: run.path for label, run in runs.items()}
    records = {label: training_record(path) for label, path in paths.items()}
    paired = pairs(paths, {label: run.config for label, run in runs.items()}, records)
    page = report.write_comparison(records, tables, arms(runs), paired, results, panels)
    for line in [*as_text(*report.run_table(records, tables)).splitlines(), *(pair.told for pair in paired)]:
        print(printable(line))
    print(printable(f"open {page}"))


def arms(runs: dict[str, Snapshots]) -> dict[str, list[str]]:
    """Runs that differ in their seed and in nothing else, together, under the name of the folder that they share."""
    alike: dict[str, dict[Any, str]] = {}
    for label, run in runs.items():
        options = flat(run.config)
        told = repr(sorted(((key, value) for key, value in options.items() if key not in OF_A_SEED), key=repr))
        seeds = alike.setdefault(told, {})
        seed = repr([options.get(key) for key in OF_A_SEED[:2]])
        if seed in seeds:  # a copy of a run is no second seed
            alike[f"{label} {told}"] = {seed: label}
        seeds.setdefault(seed, label)
    found: dict[str, list[str]] = {}
    for labels in map(list, map(dict.values, alike.values())):
        folders = {runs[label].path.resolve().parent.name for label in labels}
        name = folders.pop() if len(labels) > 1 and len(folders) == 1 else labels[0]
        name = labels[0] if any(name == other.split(",")[0] for other in found) else name
        found[name if len(labels) == 1 else f"{name}, {len(labels)} seeds"] = labels
    return found


def labelled(paths: list[Path]) -> dict[str, Path]:
    """Each run by its folder's name, or by as much of its path as tells it from the others."""
    paths = list(dict.fromkeys(path.resolve() for path in paths))
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-length:]).lstrip("/") for path in paths]
        if len(set(labels)) == len(paths):
            break
    return dict(zip(labels, paths))


def path_rows(end: Path, data: Path | None) -> torch.Tensor:
    """(rows, tokens): of a data set's val split, or those that a checkpoint's snapshot was taken on."""
    if data is not None:
        rows = TokenDataset(data, "val")
        return torch.from_numpy(rows.rows(0, min(len(rows), PATH_ROWS)).astype("int64"))
    step = resolve(end)
    ids = Snapshots(step.parent.parent).input_ids(int(step.name.removeprefix("step_")), "val")[:PATH_ROWS] \
        if step.name.startswith("step_") else None
    if ids is None:
        raise AnalysisError(f"path: {step} has no snapshot to take rows from; name a data set with --data")
    return ids


def loss_path(ends: list[Path], args: argparse.Namespace, device: torch.device) -> None:
    """Write and tell the losses along the line between two checkpoints, or around one."""
    if len(ends) not in (1, 2):
        raise AnalysisError("path: give two checkpoints, such as runs/a/checkpoints/step_100 runs/b, or one to look around")
    ids, results = path_rows(ends[0], args.data), Results(args.out or Path("path"), chosen=True)
    if len(ends) == 1:
        found = {}
        for name, points in loss_around(ends[0], ids, args.directions, args.reach, args.points, device):
            found[name] = points
            log.info(f"{name}: loss {', '.join(f'{point.loss:.4f}' for point in points)}")
        table = ((name, *point) for name, points in found.items() for point in points)
        results.write("path.csv", table_text(("direction", "share", "loss"), table))
        return print(printable(f"open {report.write_around(str(ends[0]), found, results)}"))
    found = []
    for point in loss_along(*ends, ids, args.points, device):
        log.info(f"{point.share:.3f} of the way: loss {point.loss:.4f}")
        found.append(point)
    log.info(f"barrier {barrier(found):.4f} nats a token above the line between both ends, on {len(ids)} rows")
    results.write("path.csv", table_text(("share", "loss"), found))
    print(printable(f"open {report.write_path([str(end) for end in ends], found, results)}"))


def list_measures() -> None:
    """What there is to ask for, by --config in a YAML file of pico-analyze."""
    for title, table in (("one matrix (weights, gradients, updates, activations, OV circuits)", SINGLE),
                         ("activations of two steps, or of two runs (--against)", PAIRED),
                         ("updates of two cycles of ReLoRA", OVERLAPS)):
        print(f"{title}:")
        for name, measure in table.items():
            print(f"  {name:22}{measure.label}: {measure.definition}")
    print(f"data_type: {', '.join(KINDS)}\ncomponent_name: simple, ov_circuit\ndata_split: train, val\nlayer_suffixes: as the "
          "run's checkpointing.learning_dynamics.layer_suffixes")


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run folder; `compare` and several; or `path` and "
                        "one checkpoint or two")
    parser.add_argument("--config", type=Path, help="a YAML file of pico-analyze (default: all measures of all layers)")
    parser.add_argument("--since", type=int, metavar="STEP", help="also measure the updates since this step's snapshot")
    parser.add_argument("--against", type=Path, metavar="RUN", help="also how alike another run's activations and "
                        "updates are, step by step")
    parser.add_argument("--out", type=Path, help="folder for the results (default: RUN/analysis, comparison or path)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where spectra are computed (default: cpu)")
    parser.add_argument("--panels", action="store_true", help="figures as SVG too, and every panel alone, a paper's "
                        "column wide")
    parser.add_argument("--data", type=Path, help="path: a data set whose val rows are scored (default: those of "
                        "the first one's snapshot)")
    parser.add_argument("--points", type=number(int, 2, 1001), default=11, help="path: places on the line (default: 11)")
    parser.add_argument("--directions", type=number(int, 1, 20), default=3, help="path, of one checkpoint: directions of each "
                        "kind (default: 3)")
    parser.add_argument("--reach", type=number(float, 1e-6, 10.0), default=0.25, help="path, of one checkpoint: how far, as a "
                        "share of the weights' norm (default: 0.25)")
    parser.add_argument("--list", action="store_true", help="show what there is to measure")
    args = parser.parse_args()
    if not args.list and not args.runs:
        raise AnalysisError("give a run folder, such as runs/demo; --list shows what there is to measure")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise AnalysisError("--device cuda: there is no CUDA device here; leave it out to measure on the CPU")
    return args


def main() -> None:
    args = parse()
    if args.list:
        return list_measures()
    device, word = torch.device(args.device), str(args.runs[0])
    if word == "path":
        return loss_path(args.runs[1:], args, device)
    comparing = word == "compare"
    if not comparing and not args.runs[0].exists() and (near := difflib.get_close_matches(word, ["compare", "path"])):
        raise AnalysisError(f"{word}: no such run; did you mean {near[0]}?")
    if comparing and len(args.runs) < 3:
        raise AnalysisError("compare: give two runs or more")
    runs = {label: Snapshots(path) for label, path in labelled(args.runs[comparing:]).items()}
    other = Snapshots(args.against) if args.against is not None else None
    plan = Plan(*(read_requests(args.config) if args.config else (DEFAULT, None)))
    if args.since is not None:
        plan = plan._replace(requests=[*plan.requests, replace(DEFAULT[0], target=args.since)])
    for run in runs.values():
        plan.steps(run)  # what cannot be asked for is told before anything is made
    if comparing:
        return compare(runs, plan, args.out or Path("comparison"), device, args.panels)
    for label, run in runs.items():
        out = run.path / "analysis" if args.out is None else args.out / label if len(runs) > 1 else args.out
        results = Results(out, chosen=args.out is not None)
        rows = analyse(run, plan.requests, plan.steps(run), out, device)
        if other is not None:
            rows += rows_against(run, other, plan.steps(run), device)
        write_tables(rows, results)
        page = report.write_run(run.path, run.config, learning_rates(run), rows, results, args.panels)
        print(printable(f"{len(rows):,} measures of {len({row['step'] for row in rows})} steps in {out}; open {page}"))


if __name__ == "__main__":
    command(main)
