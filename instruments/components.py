"""What there is to measure in the snapshots of a run: layers, the heads of OV circuits, and updates between two steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import UserError
from instruments import measures
from instruments.snapshots import Snapshots

AGAINST = "activations against another run"  # at the same step
AGAINST_UPDATES = "updates against another run"
IN_CYCLE = "updates within the cycle"
KINDS = ("weights", "activations", "gradients", "updates")
Row = dict[str, Any]  # of the table of measures: see FIELDS in analyze.py


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
    target: int | None = None  # the step to compare with (None: the last), or that updates are counted from (None: several)


class Component(NamedTuple):
    """A matrix of a snapshot."""
    name: str
    entries: Tensor  # (m, n)
    spectrum: Tensor | None = None  # where there is a shorter way to it than through the entries
    noise: float = 0.0  # singular values up to this may be rounding


def layer_of(component: str) -> int:
    return int(component.split(".")[1])


def matrices(run: Snapshots, step: int, request: Request) -> Iterator[Component]:
    """What a request asks for at one step, one after another; of updates the effective weights."""
    kind = "weights" if request.data == "updates" else request.data
    _, tensors = run.load(step, request.split, kind)
    if request.circuit:
        yield from _circuits(run, step, request, tensors)
        return
    for name, tensor in tensors.items():
        adapter = name.rpartition(".")[2] in ("lora_A", "lora_B", "base")
        fits = any(name.endswith(s) for s in request.suffixes) if request.suffixes else not adapter
        if fits and (request.layers is None or layer_of(name) in request.layers):
            yield Component(name, tensor)


def _circuits(run: Snapshots, step: int, request: Request, tensors: dict[str, Tensor]) -> Iterator[Component]:
    """The OV circuit of each head, and those of a layer's heads side by side.

    Of weights W_O,h W_V,k (D, D); of activations the head's values through W_O,h (examples, D); of gradients the direction
    that the circuit takes where both follow theirs, G_O,h W_V,k + W_O,h G_V,k (D, D).
    """
    m = run.config["model"]
    heads, groups = m["attention_n_heads"], m["attention_n_heads"] // m["attention_n_kv_heads"]
    size, (_, weights) = m["d_model"] // heads, run.load(step, request.split, "weights")
    value, output = request.suffixes or ("attention.v_proj", "attention.o_proj")
    for name in [n for n in tensors if n.endswith(value)]:
        layer, outputs, here = layer_of(name), name.removesuffix(value) + output, tensors[name]
        o_proj, v_proj, at_output = weights.get(outputs), weights.get(name), tensors.get(outputs)
        wanted = request.layers is None or layer in request.layers
        if not wanted or o_proj is None or request.data == "gradients" and (v_proj is None or at_output is None):
            continue
        kv_width, counted = size * m["attention_n_kv_heads"], here.shape[1 if request.data == "activations" else 0]
        alike = request.data != "gradients" or v_proj.shape == here.shape and o_proj.shape == at_output.shape
        if not (o_proj.shape[1] == m["d_model"] and counted == kv_width and alike):
            raise AnalysisError(f"{run.path}: the snapshot of step {step} holds {name} and {outputs} of other sizes than the "
                                "heads of training_config.yaml; one of the two is of another model")
        found = []
        for head in range(heads):
            mine, shared = slice(head * size, (head + 1) * size), slice(head // groups * size, (head // groups + 1) * size)
            if request.data == "activations":
                left, right = here[:, shared], o_proj[:, mine].T
            elif request.data == "gradients":
                left = torch.cat([at_output[:, mine], o_proj[:, mine]], 1)
                right = torch.cat([v_proj[shared], here[shared]])
            else:
                left, right = o_proj[:, mine], here[shared]
            low_rank = left.shape[1] <= min(left.shape[0], right.shape[1])
            found.append(left @ right)
            yield Component(f"layers.{layer}.ov_circuit.heads.{head}", found[-1],
                            measures.singular_values_of_product(left, right) if low_rank else None)
        yield Component(f"layers.{layer}.ov_circuit", torch.cat(found, 1))


# ---- cycles of ReLoRA -------------------------------------------------------------------------------------------------

def factors(run: Snapshots, step: int, request: Request) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (B, A)} of the layers that a request asks for; empty for full-rank runs."""
    _, weights = run.load(step, request.split, "weights")
    return {m.name: (weights[f"{m.name}.lora_B"], weights[f"{m.name}.lora_A"]) for m in matrices(run, step, request)
            if f"{m.name}.lora_B" in weights and f"{m.name}.lora_A" in weights}


def cycle_before(run: Snapshots, step: int, request: Request) -> int | None:
    """The latest snapshot of an earlier cycle: one whose frozen base is another. None: there is none."""
    def base_at(at: int) -> Tensor | None:
        _, weights = run.load(at, request.split, "weights")
        return next((tensor for name, tensor in weights.items() if name.endswith(".base")), None)
    base = base_at(step)
    for earlier in sorted((s for s in run.folders if s < step), reverse=True) if base is not None else ():
        other = base_at(earlier)
        if other is None or other.shape != base.shape or not torch.equal(other, base):
            return earlier if other is not None else None
    return None


# ---- updates ----------------------------------------------------------------------------------------------------

def bases(run: Snapshots, step: int, request: Request) -> dict[str, int]:
    """The snapshots that the updates of a step are counted from."""
    if request.target is not None:
        return {f"updates since step {request.target}": target_of(run, request)} if request.target < step else {}
    before = [s for s in run.folders if s < step]
    return {"updates since the start": before[0], "updates since the last snapshot": before[-1]} if before else {}


def target_of(run: Snapshots, request: Request) -> int:
    target = max(run.folders) if request.target is None else request.target
    if target not in run.folders:
        raise AnalysisError(f"step {target} has no snapshot in {run.path}; there are {', '.join(map(str, run.folders))}")
    return target


def updates(run: Snapshots, step: int, request: Request) -> Iterator[tuple[list[str], int | None, Iterator[Component]]]:
    """(labels, base step, differences of effective weights); what rounding of the two leaves is told with each."""
    def difference(now: Component, before: Tensor) -> Component:
        noise = measures.EPSILON * (now.entries.norm() + before.norm()).item()
        return Component(now.name, now.entries - before, noise=noise)
    found = bases(run, step, request)
    for base in dict.fromkeys(found.values()):
        old = {m.name: m.entries for m in matrices(run, base, request)}
        labels = [label for label, other in found.items() if other == base]
        yield labels, base, (difference(m, old[m.name]) for m in matrices(run, step, request) if m.name in old)
    if request.target is None and not request.circuit:
        _, weights = run.load(step, request.split, "weights")
        yield [IN_CYCLE], None, (difference(m, weights[f"{m.name}.base"])
                                                   for m in matrices(run, step, request) if f"{m.name}.base" in weights)
