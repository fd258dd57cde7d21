"""A micro-batch's forward and backward as a CUDA graph: one call starts what would be thousands of kernels.

A small model's kernels end sooner than a host can start the next, and ReLoRA has more of them than full-rank training. A
graph repeats kernels, not Python: what the model's code decides anew at each call, it would do as it did when the graph was
recorded. So there is none for a model that computes two losses of one batch under one seed, and no more of it once a
number, a flag or a word that a module holds has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from runtime import dist
from runtime.log import log
from runtime.wrap import is_compiled

WARM_UPS = 3  # before recording, for what is compiled or chosen in a first call
WITHOUT = "training without, slower (training.cuda_graph=false says so at once)"

Work = Callable[[Tensor], Tensor]  # rows (micro, T + 1) -> their share of an update's mean loss, its gradients added to `grad`


def renewed(graph: Graph | bool | None, wanted: bool | None, work: Work, model: nn.Module,
            batch: list[tuple[int, Tensor]]) -> Graph | bool:
    """`graph` if it was recorded for such a batch, else a new one; False on several ranks, and where there can be none."""
    rows, parts = batch[0][1], len(batch)
    if graph is False or graph and graph.fits(rows, parts):
        return graph
    wanted = is_compiled(model) if wanted is None else wanted
    if not wanted or rows.device.type != "cuda" or dist.world_size() > 1:
        return False
    generator = torch.cuda.default_generators[rows.device.index]
    state = generator.clone_state()
    try:
        return Graph(work, model, rows, parts)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.warning(f"no CUDA graph can be made of the model ({str(error).splitlines()[0]}): {WITHOUT}")
        generator.graphsafe_set_state(state)  # a recording that failed leaves it waiting for one (torch 2.11)
        model.zero_grad(set_to_none=True)
        return False


class Graph:
    """Called as graph(rows, number of the micro-batch in its update); gradients are in `grad` then, added up.

    For as many micro-batches an update, of as many rows, as it was recorded with.
    """

    def __init__(self, work: Work, model: nn.Module, rows: Tensor, parts: int):
        self.work, self.model, self.rows = work, model, rows.clone()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.values, self.parts = _values(model), parts
        self._warm_up()
        pool = torch.cuda.graph_pool_handle()
        self.first = self._record(pool)  # writes the gradients
        self.gradients = [p.grad for p in self.parameters]
        self.more = self._record(pool) if parts > 1 else None  # adds to them
        model.zero_grad(set_to_none=True)

    def _warm_up(self) -> None:
        """On a stream of its own, as recording will be. Raises RuntimeError where the code does something else each time."""
        seed, losses, side = torch.initial_seed(), [], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                torch.manual_seed(seed)
                losses.append(self.work(self.rows).item())
                self.model.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(side)
        torch.manual_seed(seed)
        if len(set(losses)) > 1 and losses[0] == losses[0]:
            raise RuntimeError(f"it computes {losses[0]} and then {losses[-1]} of the same rows and seed")
        if (changed := self._changed()) is not None:
            raise RuntimeError(f"each call changes {changed}")

    def _record(self, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # the loader's thread may be at work
            loss = self.work(self.rows)
        return graph, loss

    def fits(self, rows: Tensor, parts: int) -> bool:
        return self.rows.shape == rows.shape and self.parts == parts

    def _changed(self) -> str | None:
        """The first value that is not what it was, by name."""
        now = _values(self.model)
        return next((name for name in now | self.values if now.get(name) != self.values.get(name)), None)

    def __call__(self, rows: Tensor, number: int) -> Tensor:
        if number == 0 and self.first and (changed := self._changed()) is not None:
            log.warning(f"{changed} of the model has changed, which its CUDA graph does not know: {WITHOUT}")
            self.first = self.more = self.gradients = None
        if self.first is None:
            return self.work(rows)
        graph, loss = self.more if number else self.first
        self.rows.copy_(rows)
        graph.replay()
        if number == 0:
            for parameter, gradient in zip(self.parameters, self.gradients):
                parameter.grad = gradient
        return loss


def _values(model: nn.Module) -> dict[str, Any]:
    """What modules hold that Python's code may decide by."""
    return {f"{name}.{key}": value for name, module in model.named_modules() for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str))}
