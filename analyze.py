"""Analyse the learning dynamics of runs: ranks, spectra, sparsity, norms and similarities over steps and layers.

    python analyze.py runs/demo                          # everything, into runs/demo/analysis: JSON, CSV, PNG, report.html
    python analyze.py runs/tiny --config demo.yaml       # a YAML file of pico-analyze, unchanged
    python analyze.py compare runs/full runs/relora      # several runs over steps, tokens and time

Weights, activations and gradients come from the snapshots (dynamics.py). `updates` are differences of effective weights
between two snapshots: since the first one (does the cumulative update's rank grow across merges?) and since the one
before. The OV circuit of a head is W_O W_V (Elhage et al. 2021), heads of a group sharing W_V. A measure that is undefined is
null with its reason. What has been measured is kept in analysis/cache, so a second call only does new steps.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

import dist
import measures
import report
from checkpoint import CheckpointError, read_manifest, step_folders, write_text
from config import UserError

PAIRED = {"cka": measures.cka, "pwcca": measures.pwcca}
SINGLE = ("per", "effective_rank", "numerical_rank", "condition_number", "gini", "hoyer", "norm_frobenius", "norm_nuclear",
          "norm_spectral", "norm_inf")
KINDS = ("weights", "activations", "gradients", "updates")
FIELDS = ("step", "split", "data", "component", "metric", "value", "reason")


class AnalysisError(UserError):
    """A run or a request that cannot be analysed."""


@dataclass
class Request:
    """What to measure: metrics of a kind of data of some layers."""
    metrics: list[str]
    data: str  # one of KINDS
    split: str = "val"
    circuit: bool = False  # the OV circuit's heads instead of single layers
    suffixes: list[str] = field(default_factory=list)  # of layer names; empty: all. For circuits: value, output
    layers: list[int] | None = None  # None: all
    target: int | None = None  # the step to compare with; None: the last


DEFAULT = [
    Request(list(SINGLE), "weights"), Request(list(SINGLE), "gradients", "train"), Request(list(SINGLE), "activations"),
    Request(list(SINGLE), "updates"), Request(list(PAIRED), "activations"),
    Request(["effective_rank", "per", "norm_nuclear"], "weights", circuit=True),
]


# ---- snapshots -------------------------------------------------------------------------------------------------------

class Run:
    """The snapshots of a run folder."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.config = yaml.safe_load((path / "training_config.yaml").read_text(encoding="utf-8"))
            options = self.config["checkpointing"]
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise AnalysisError(f"{path}: not a run folder ({error})") from None
        self.dynamics = options["learning_dynamics_dir"]
        self.folders = {int(f.name[5:]): f for f in reversed(step_folders(path / options["checkpoints_dir"]))
                        if (f / self.dynamics).is_dir()}
        if not self.folders:
            raise AnalysisError(f"{path}: holds no snapshots; train with checkpointing.learning_dynamics")

    def load(self, step: int, split: str, kind: str) -> dict[str, Tensor]:
        """{layer name: tensor}, or nothing where the run took no such snapshot."""
        path = self.folders[step] / self.dynamics / f"{split}_{kind}.pt"
        if not path.exists():
            return {}
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise AnalysisError(f"{path}: cannot be read ({str(error).splitlines()[0][:200]})") from None

    def fingerprint(self, step: int) -> str:
        """Of the snapshot's files, from the manifest."""
        try:
            entries = read_manifest(self.folders[step])
        except CheckpointError:  # a run copied without its manifests: go by size and time
            entries = {p.name: {"sha256": f"{p.stat().st_size}:{p.stat().st_mtime_ns}"}
                       for p in (self.folders[step] / self.dynamics).iterdir()}
        listed = sorted((n, e["sha256"]) for n, e in entries.items() if n.endswith(".pt") and "training" not in n)
        return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]

    def components(self, step: int, request: Request) -> dict[str, Tensor]:
        """{name: matrix} of what a request asks for at one step."""
        kind = "weights" if request.data == "updates" else request.data
        tensors = self.load(step, request.split, kind)
        if request.circuit:
            return dict(self._circuits(step, request, tensors))
        return {name: t for name, t in tensors.items() if self._chosen(name, request)}

    @staticmethod
    def _chosen(name: str, request: Request) -> bool:
        adapter = name.rpartition(".")[2] in ("lora_A", "lora_B", "base")
        layer = int(name.split(".")[1])
        fits = any(name.endswith(s) for s in request.suffixes) if request.suffixes else not adapter
        return fits and (request.layers is None or layer in request.layers)

    def _circuits(self, step: int, request: Request, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Heads of the OV circuit: W_O,h W_V,k (D, D), or the head's activations through W_O,h (examples, D)."""
        m = self.config["model"]
        heads, groups = m["attention_n_heads"], m["attention_n_heads"] // m["attention_n_kv_heads"]
        size, weights = m["d_model"] // heads, self.load(step, request.split, "weights")
        value, output = request.suffixes or ("attention.v_proj", "attention.o_proj")
        for name in [n for n in tensors if n.endswith(value)]:
            layer = int(name.split(".")[1])
            o_proj = weights.get(name.removesuffix(value) + output)
            if o_proj is None or not (request.layers is None or layer in request.layers):
                continue
            for head in range(heads):
                kv = slice(head // groups * size, (head // groups + 1) * size)
                o = o_proj[:, head * size:(head + 1) * size]
                matrix = tensors[name][:, kv] @ o.T if request.data == "activations" else o @ tensors[name][kv]
                yield f"layers.{layer}.ov_circuit.heads.{head}", matrix


# ---- measuring -------------------------------------------------------------------------------------------------------

def bases(run: Run, step: int) -> dict[str, int]:
    """The snapshots that the updates of a step are counted from."""
    before = [s for s in run.folders if s < step]
    return {"since the start": before[0], "since the last snapshot": before[-1]} if before else {}


def target_of(run: Run, request: Request) -> int:
    target = max(run.folders) if request.target is None else request.target
    if target not in run.folders:
        raise AnalysisError(f"target_checkpoint: step {target} has no snapshot in {run.path}; there are "
                            f"{', '.join(map(str, run.folders))}")
    return target


def steps_read(run: Run, step: int, request: Request) -> list[int]:
    """The snapshots that a request looks at for one step."""
    others = list(bases(run, step).values()) if request.data == "updates" else []
    return [step, *others, *([target_of(run, request)] if set(request.metrics) & set(PAIRED) else [])]


def measure(run: Run, step: int, request: Request) -> list[dict[str, Any]]:
    """What a request asks for at one step, as rows of FIELDS."""
    single, paired = ([m for m in request.metrics if m in kind] for kind in (SINGLE, PAIRED))
    if request.data != "updates":
        now = run.components(step, request)
        return (_single(now, single, step, request.split, request.data) if single else []) + _paired(run, step, request, paired)
    rows, now = [], run.components(step, request)
    for label, base in bases(run, step).items():
        before = run.components(base, request)
        delta = {name: now[name] - before[name] for name in now if name in before}
        rows += _single(delta, single, step, request.split, f"updates {label}")
    return rows


def _single(matrices: dict[str, Tensor], metrics: list[str], step: int, split: str, data: str) -> list[dict[str, Any]]:
    """Rows of single-matrix measures; matrices of one shape share a batched SVD."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, matrix in matrices.items():
        by_shape.setdefault(tuple(matrix.shape), []).append(name)
    spectra = {}
    for names in by_shape.values():
        batch = measures.singular_values(torch.stack([matrices[n] for n in names]))
        spectra |= dict(zip(names, batch))
    rows = []
    for name, matrix in matrices.items():
        found = measures.of_matrix(matrix, spectra[name])
        reasons = found.get("undefined", {})
        rows += [_row(step, split, data, name, metric, found[metric], reasons.get(metric)) for metric in metrics]
        spectrum = [float(f"{v:.5g}") for v in spectra[name].tolist()] if spectra[name].isfinite().all() else None
        rows.append(_row(step, split, data, name, "spectrum", spectrum, None if spectrum else "the matrix is not finite"))
    return rows


def _paired(run: Run, step: int, request: Request, metrics: list[str]) -> list[dict[str, Any]]:
    target, rows = target_of(run, request), []
    here, there = run.components(step, request), run.components(target, request)
    for metric in metrics:
        for name in here:
            value, reason = None, None
            try:
                value = PAIRED[metric](here[name], there[name])
            except measures.Undefined as why:
                reason = str(why)
            rows.append(_row(step, request.split, request.data, name, f"{metric} to step {target}", value, reason))
    return rows


def _row(step: int, split: str, data: str, component: str, metric: str, value: Any, reason: str | None) -> dict[str, Any]:
    return dict(zip(FIELDS, (step, split, data, component, metric, value, reason)))


def analyse(run: Run, requests: list[Request], steps: list[int], out: Path) -> list[dict[str, Any]]:
    """Rows of all steps, measured or from the cache; where that cannot be written, they are measured each time."""
    rows = []
    fingerprints = {step: run.fingerprint(step) for step in run.folders}
    for step in tqdm(steps, desc=f"analysing {run.path}", unit=" steps", disable=None):
        for request in requests:
            read = [(s, fingerprints[s]) for s in steps_read(run, step, request)]
            key = hashlib.sha256(repr((request, read)).encode()).hexdigest()[:16]
            cached = out / "cache" / f"step_{step}-{key}.json"
            if cached.exists():
                rows += json.loads(cached.read_text(encoding="utf-8"))
                continue
            fresh = measure(run, step, request)
            with contextlib.suppress(OSError):
                cached.parent.mkdir(parents=True, exist_ok=True)
                write_text(cached, json.dumps(fresh, allow_nan=False))
            rows += fresh
    return rows


# ---- pico-analyze's YAML ----------------------------------------------------------------------------------------------

def read_requests(path: Path) -> tuple[list[Request], range | None]:
    """(requests, steps) of a pico-analyze configuration. Raises AnalysisError naming what it does not know."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        steps = tree.get("steps")
        requests = [_request(metric, component) for metric in tree["metrics"] for component in metric["components"]]
        chosen = range(steps["start"], steps["end"] + 1, steps["step"]) if steps else None
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise AnalysisError(f"{path}: not a pico-analyze configuration ({error})") from None
    return requests, chosen


def _request(metric: dict, component: dict) -> Request:
    name, suffixes = metric["metric_name"], component["layer_suffixes"]
    if name == "norm":
        name = f"norm_{metric['norm_type']}"
    known = (*SINGLE, *PAIRED)
    if name not in known or component["component_name"] not in ("simple", "ov_circuit") or component["data_type"] not in KINDS:
        raise AnalysisError(f"metric {name!r} of {component['component_name']!r} {component['data_type']!r} is not known; "
                            f"metrics are {', '.join(known)}")
    circuit = component["component_name"] == "ov_circuit"
    listed = [suffixes["value_layer"], suffixes["output_layer"]] if circuit else [suffixes] if isinstance(suffixes, str) \
        else list(suffixes)
    return Request([name], component["data_type"], metric.get("data_split", "val"), circuit, listed, component.get("layers"),
                   metric.get("target_checkpoint"))


# ---- the command -------------------------------------------------------------------------------------------------------

def write_tables(rows: list[dict[str, Any]], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "metrics.json", json.dumps(rows, allow_nan=False) + "\n")
    with open(out / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(row for row in rows if row["metric"] != "spectrum")


def analyse_run(path: Path, config: Path | None, out: Path | None) -> None:
    run = Run(path)
    requests, wanted = read_requests(config) if config else (DEFAULT, None)
    steps = [step for step in run.folders if wanted is None or step in wanted]
    if not steps:
        raise AnalysisError(f"{path}: none of the wanted steps has a snapshot; there are {', '.join(map(str, run.folders))}")
    out = out or path / "analysis"
    try:
        rows = analyse(run, requests, steps, out)
        write_tables(rows, out)
        page = report.write_run(path, rows, out)
    except OSError as error:
        raise AnalysisError(f"{out}: cannot be written ({error.strerror}); give another folder with --out") from None
    print(f"{len(rows):,} measures of {len(steps)} steps in {out}; open {page}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder; or `compare` and several")
    parser.add_argument("--config", type=Path, help="a YAML file of pico-analyze (default: all measures of all layers)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: RUN/analysis, or comparison)")
    args = parser.parse_args()
    if str(args.runs[0]) == "compare":
        if len(args.runs) < 3:
            raise AnalysisError("compare: give two runs or more")
        out, runs = args.out or Path("comparison"), labelled(args.runs[1:])
        tables = {}
        for label, path in runs.items():
            run = Run(path)
            tables[label] = analyse(run, DEFAULT, list(run.folders), path / "analysis")
        print(f"open {report.write_comparison(runs, tables, out)}")
        return
    for label, path in labelled(args.runs).items():
        analyse_run(path, args.config, args.out and (args.out / label if len(args.runs) > 1 else args.out))


def labelled(paths: list[Path]) -> dict[str, Path]:
    """Each run by its folder's name, or by as much of its path as tells it from the others."""
    paths = list(dict.fromkeys(path.resolve() for path in paths))
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-length:]).lstrip("/") for path in paths]
        if len(set(labels)) == len(paths):
            break
    return dict(zip(labels, paths))


if __name__ == "__main__":
    dist.command(main)
