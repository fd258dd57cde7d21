"""From snapshots to rows: what a request asks for at each step, measured by several processes, or before."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from instruments import components, measures, similarity
from instruments.components import (AGAINST, AGAINST_UPDATES, IN_CYCLE, AnalysisError, Component, Request, Row, bases,
                                    cycle_before, factors, matrices, target_of, updates)
from instruments.measures import SINGLE
from instruments.results import Cache
from instruments.similarity import OVERLAPS, PAIRED, leading, of_pair, of_updates
from instruments.snapshots import Snapshots
from runtime.log import log, printable

FIELDS = ("step", "other_step", "split", "data", "component", "metric", "value", "reason")  # other: compared with, or since
TELL_SECONDS = 30.0
BATCH = 1 << 22  # entries of matrices whose spectra are computed together: bounds the memory
CPU = torch.device("cpu")
LARGE = 100e6  # bytes of snapshots from which on the seconds are worth it that further processes take to start


def steps_read(run: Snapshots, step: int, request: Request) -> list[int]:
    """The snapshots that a request looks at for one step."""
    if request.data == "updates":
        before = cycle_before(run, step, request) if set(request.metrics) & set(OVERLAPS) else None
        return [step, *bases(run, step, request).values(), *([] if before is None else [before])]
    return [step, *([target_of(run, request)] if set(request.metrics) & set(PAIRED) else [])]


def rows_of_step(run: Snapshots, step: int, request: Request, device: torch.device = CPU) -> list[Row]:
    """What a request asks for at one step, as rows of FIELDS; where there is nothing to measure, a row that says so."""
    single, paired = ([m for m in request.metrics if m in kind] for kind in (SINGLE, PAIRED))
    rows: list[Row] = []
    if request.data == "updates":
        if paired:
            return [empty_row(step, request, "compares representations of examples: use activations")]
        for labels, base, deltas in updates(run, step, request):
            here = {"step": step, "other_step": base, "split": request.split, "data": labels[0]}
            found = single_rows(deltas, single, here, device) if single else []
            rows += [row | {"data": label} for label in labels for row in found]
        if set(request.metrics) & set(OVERLAPS):
            rows += overlap_rows(run, step, request)
        return rows or [empty_row(step, request, "there is no such layer, or no snapshot to count from")]
    split, _ = run.load(step, request.split, request.data)
    here = {"step": step, "other_step": None, "split": split, "data": request.data}
    if single:
        rows += single_rows(matrices(run, step, request), single, here, device)
    if paired:
        rows += paired_rows(run, step, request, paired, here, device)
    return rows or [empty_row(step, request, f"the snapshot holds no such {request.data}")]


def empty_row(step: int, request: Request, reason: str) -> Row:
    what = "ov_circuit" if request.circuit else ", ".join(request.suffixes) or "every layer"
    return dict(zip(FIELDS, (step, None, request.split, request.data, what, ", ".join(request.metrics), None, reason)))


def single_rows(found: Iterable[Component], metrics: list[str], here: Row, device: torch.device) -> list[Row]:
    """Rows of single-matrix measures; matrices of one shape share a batched SVD, of BATCH entries at most."""
    def measure(batch: list[Component]) -> list[Row]:
        entries = [component.entries.to(device) for component in batch]
        spectra = measures.singular_values(torch.stack(entries)) if batch[0].spectrum is None else \
            [component.spectrum for component in batch]
        return [row for component, matrix, values in zip(batch, entries, spectra)
                for row in component_rows(component, matrix, values, metrics, here)]
    return [row for batch in batches(found) for row in measure(batch)]


def batches(found: Iterable[Component]) -> Iterator[list[Component]]:
    """Components of one shape, a few at a time, those whose spectrum is known apart."""
    waiting: dict[tuple, list[Component]] = {}
    for component in found:
        batch = waiting.setdefault((component.entries.shape, component.spectrum is None), [])
        batch.append(component)
        if (len(batch) + 1) * component.entries.numel() > BATCH:
            yield batch[:]
            batch.clear()
    yield from (batch for batch in waiting.values() if batch)


def component_rows(component: Component, entries: Tensor, values: Tensor, metrics: list[str], here: Row) -> list[Row]:
    found = measures.of_matrix(entries, values, component.noise, metrics)
    spectrum = [float(f"{v:.5g}") for v in values.tolist()] if values.isfinite().all() else None
    found["spectrum"] = spectrum, None if spectrum else "the matrix is not finite"
    return [here | {"component": component.name, "metric": metric, "value": value, "reason": reason}
            for metric, (value, reason) in found.items()]


def overlap_rows(run: Snapshots, step: int, request: Request) -> list[Row]:
    """Rows of how far a cycle's update so far writes to and reads from where the cycle before did."""
    metrics, before = [m for m in request.metrics if m in OVERLAPS], cycle_before(run, step, request)
    now = factors(run, step, request)
    if before is None or not now:
        reason = "there is no snapshot of an earlier cycle of ReLoRA"
        return [empty_row(step, replace(request, metrics=metrics), reason) | {"data": IN_CYCLE}]
    then = factors(run, before, request)
    here = {"step": step, "other_step": before, "split": request.split, "data": IN_CYCLE}
    return [here | {"component": name, "metric": metric, "value": value, "reason": reason} for name in now if name in then
            for metric, (value, reason) in of_updates(now[name], then[name], metrics).items()]


def paired_rows(run: Snapshots, step: int, request: Request, metrics: list[str], here: Row, device: torch.device) -> list[Row]:
    """Rows of measures of a component's examples at this step and at the target."""
    target = target_of(run, request)
    others = {c.name: c.entries for c in matrices(run, target, request)}
    return pairs(matrices(run, step, request), others, metrics, here | {"other_step": target},
                 f"the snapshot of step {target} holds no such layer", device)


def pairs(found: Iterable[Component], others: dict[str, Tensor], metrics: list[str], here: Row, why_not: str,
          device: torch.device) -> list[Row]:
    rows = []
    for component in found:
        other = others.get(component.name)
        values = dict.fromkeys(metrics, (None, why_not)) if other is None else \
            of_pair(component.entries.to(device), other.to(device), metrics)
        rows += [here | {"component": component.name, "metric": metric, "value": value, "reason": reason}
                 for metric, (value, reason) in values.items()]
    return rows


def rows_against(run: Snapshots, other: Snapshots, steps: Iterable[int], device: torch.device = CPU) -> list[Row]:
    """Rows of how alike two runs' activations are at the same steps, on the same rows, and their updates' directions.

    Raises AnalysisError.
    """
    request, rows = Request(list(PAIRED), "activations"), []
    common = [step for step in steps if step in other.folders]
    if not common:
        raise AnalysisError(f"{other.path}: has no snapshot at any of the steps of {run.path}; there are "
                            f"{', '.join(map(str, other.folders))}")
    for step in told(common, f"comparing with {other.path}"):
        if not torch.equal(run.input_ids(step, request.split), other.input_ids(step, request.split)):
            raise AnalysisError(f"{other.path}: its {request.split} snapshot of step {step} is of other rows than that of "
                                f"{run.path}; train both with the same checkpointing.learning_dynamics.eval_data")
        here = {"step": step, "other_step": step, "split": request.split, "data": AGAINST}
        others = {c.name: c.entries for c in matrices(other, step, request)}
        rows += pairs(matrices(run, step, request), others, list(PAIRED), here, f"{other.path.name} holds no such layer", device)
        rows += update_rows_against(run, other, step)
    return rows


def update_rows_against(run: Snapshots, other: Snapshots, step: int) -> list[Row]:
    """Rows of how far the leading directions of two runs' cumulative updates overlap: as many as their adapters' r."""
    request = Request(list(OVERLAPS), "updates")
    here = {"step": step, "other_step": step, "split": request.split, "data": AGAINST_UPDATES}
    ranks = [relora["r"] for one in (run, other) if isinstance(relora := one.config["model"].get("relora"), dict)
             and type(relora.get("r")) is int]
    found = [{component.name: component.entries for _, base, deltas in updates(one, step, request) if base == min(one.folders)
              for component in deltas} for one in (run, other)]
    rows = []
    for name, update in found[0].items():
        theirs = found[1].get(name)
        if theirs is None or theirs.shape != update.shape:
            values = dict.fromkeys(OVERLAPS, (None, f"{other.path.name} holds no such layer of this shape"))
        else:
            count = min([*ranks, max(1, min(update.shape) // 8)])
            values = of_updates(leading(update, count), leading(theirs, count))
        rows += [here | {"component": name, "metric": metric, "value": value, "reason": reason}
                 for metric, (value, reason) in values.items()]
    return rows


def analyse(run: Snapshots, requests: list[Request], steps: Iterable[int], out: Path, device: torch.device = CPU) -> list[Row]:
    """Rows of all steps, measured now or, where nothing has changed since, before; these are kept in `out`/cache."""
    cache = Cache(out)
    fingerprints = {step: run.fingerprint(step) for step in run.folders}
    modules = (__file__, *(module.__file__ for module in (components, measures, similarity)))
    code = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in modules]
    asked: list[tuple[int, Request, str]] = []  # step, request, and the hash of all that its rows follow from
    for step, request in itertools.product(steps, requests):
        read = [(s, fingerprints[s]) for s in steps_read(run, step, request)]
        asked.append((step, request, hashlib.sha256(repr((code, request, read, device.type)).encode()).hexdigest()))
    names = [f"step_{step}-{source[:16]}.json" for step, _, source in asked]
    found = [cache.read(name, source) for name, (_, _, source) in zip(names, asked)]
    new = [number for number, kept in enumerate(found) if kept is None]
    work = measured(run, [asked[number][:2] for number in new], device)
    for number in told(new, f"analysing {run.path}"):
        found[number] = next(work)
        cache.write(names[number], asked[number][2], found[number])
    # what two requests ask for is told once
    return list({tuple(row[name] for name in FIELDS[:-2]): row for kept in found for row in kept}.values())


def told(items: list, what: str) -> Iterator:
    """The items, with a bar where there is a terminal, and else a line now and then."""
    said = time.monotonic()
    for number, item in enumerate(tqdm(items, desc=printable(what), disable=None)):
        if time.monotonic() - said > TELL_SECONDS and not sys.stderr.isatty():
            log.info(f"{what}: {number} of {len(items)} ({number / len(items):.0%})")
            said = time.monotonic()
        yield item


def measured(run: Snapshots, jobs: list[tuple[int, Request]], device: torch.device) -> Iterator[list[Row]]:
    """rows_of_step of each (step, request) in order, by as many processes as torch may use threads.

    Sorting and LAPACK's spectra of one matrix gain little from a second thread, and beside other work lose much.
    """
    threads, work = torch.get_num_threads(), partial(rows_of_step, run, device=device)
    workers = min(threads, len(jobs)) if device == CPU and sum(run.size(step) for step in {s for s, _ in jobs}) > LARGE else 1
    torch.set_num_threads(1)
    try:
        if workers == 1:
            yield from (work(*job) for job in jobs)
        else:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _alone) as pool:
                yield from pool.map(work, *zip(*jobs))
    except BrokenProcessPool:
        raise AnalysisError(f"one of {workers} processes was ended from outside (out of memory?); OMP_NUM_THREADS=1 starts one "
                            "alone, and goes on where this ended") from None
    finally:
        torch.set_num_threads(threads)


def _alone() -> None:
    """A further process computes with one thread, and leaves Ctrl-C to the first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
