"""What turns gradients into updates: optimizers, and learning-rate schedules as pure functions of the step.

One of your own is a function here, its entry in OPTIMIZERS or SCHEDULES, and its name among the choices in config/.

    optimizers = make_optimizers(model, cfg.training.optimization)
    learning_rate_multiplier(step, cfg.training, cfg.model.relora)     # times optimization.lr
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from config import ConfigError, OptimizationConfig, ReLoRAConfig, TrainingConfig
from runtime import dist

Parameters = dict[str, nn.Parameter]


# ---- learning-rate schedules -------------------------------------------------------------------------------

class Span(NamedTuple):
    """What a schedule needs to know besides the step. Every schedule first climbs linearly over `warmup` steps."""
    warmup: int
    horizon: int  # steps of the whole schedule, max_steps
    floor: float  # min_lr_ratio
    cycle: int  # steps between merges
    restart: int  # steps of the climb after a merge
    decay: int  # steps of wsd's fall


def linear_with_warmup(step: int, span: Span) -> float:
    """To 0 at the horizon."""
    return max(0.0, (span.horizon - step) / max(1, span.horizon - span.warmup))


def constant_with_warmup(step: int, span: Span) -> float:
    return 1.0


def cosine_with_warmup(step: int, span: Span) -> float:
    """Half a cosine, to the floor at the horizon."""
    angle = math.pi * (step - span.warmup) / max(1, span.horizon - span.warmup)
    return span.floor + (1 - span.floor) * 0.5 * (1 + math.cos(angle))


def relora_jagged_cosine(step: int, span: Span) -> float:
    """The cosine; after each merge a climb from 0 to where the cosine will be by then (Lialin et al., arXiv 2307.05695)."""
    since = step % span.cycle
    if step >= span.cycle and since < span.restart:
        return since / span.restart * cosine_with_warmup(step - since + span.restart, span)
    return cosine_with_warmup(step, span)


def wsd(step: int, span: Span) -> float:
    """Warm-up, stable, decay: constant, then linearly to the floor at the horizon (Hu et al., arXiv 2404.06395)."""
    left = min(max(0, span.horizon - step), span.decay) / span.decay if span.decay else 1.0
    return span.floor + (1 - span.floor) * left


SCHEDULES: dict[str, Callable[[int, Span], float]] = {
    "linear_with_warmup": linear_with_warmup, "constant_with_warmup": constant_with_warmup,
    "cosine_with_warmup": cosine_with_warmup, "relora_jagged_cosine": relora_jagged_cosine, "wsd": wsd,
}


def learning_rate_multiplier(step: int, cfg: TrainingConfig, relora: ReLoRAConfig | None = None) -> float:
    """What update `step` (counted from 0) multiplies the learning rate by: a pure function of the step."""
    options = cfg.optimization
    schedule = SCHEDULES.get(options.lr_scheduler)
    if schedule is None:
        raise ConfigError(f"training.optimization.lr_scheduler: {options.lr_scheduler!r} is none of {', '.join(SCHEDULES)}")
    if step < options.lr_warmup_steps:
        return step / options.lr_warmup_steps
    span = Span(options.lr_warmup_steps, cfg.max_steps, options.min_lr_ratio, relora.reset_frequency if relora else 0,
                options.restart_warmup_steps, round(options.decay_share * cfg.max_steps))
    return schedule(step, span)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, cfg: TrainingConfig,
                      relora: ReLoRAConfig | None) -> None:
    rate = cfg.optimization.lr * learning_rate_multiplier(step, cfg, relora)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


# ---- optimizers --------------------------------------------------------------------------------------------

def adamw(parameters: Parameters, cfg: OptimizationConfig) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(parameters.values(), betas=tuple(cfg.betas), **_common(parameters, cfg))]


def adam(parameters: Parameters, cfg: OptimizationConfig) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(parameters.values(), betas=tuple(cfg.betas), **_common(parameters, cfg))]


def sgd(parameters: Parameters, cfg: OptimizationConfig) -> list[torch.optim.Optimizer]:
    common = _common(parameters, cfg)
    common["fused"] &= not any(map(dist.is_sharded, parameters.values()))  # it knows no sharded tensors (torch 2.13)
    optimizer = torch.optim.SGD(parameters.values(), momentum=cfg.momentum, **common)
    if cfg.momentum:  # torch makes them, uninitialised, in the first update, which may be one that is skipped
        for parameter in parameters.values():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return [optimizer]


def muon(parameters: Parameters, cfg: OptimizationConfig) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the blocks' matrices, in bf16; AdamW for the rest."""
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"training.optimization.optimizer: muon needs torch 2.9, and this is {torch.__version__}; use adamw")
    matrices = {n: p for n, p in parameters.items() if p.dim() == 2 and n.startswith("layers.")}
    optimizers = adamw({n: p for n, p in parameters.items() if n not in matrices}, cfg)
    if matrices:  # match_rms_adamw: steps as large as AdamW's, so that one learning rate serves both
        optimizer = torch.optim.Muon(matrices.values(), lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum,
                                     adjust_lr_fn="match_rms_adamw")
        for matrix in matrices.values():
            optimizer.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        optimizer.register_step_pre_hook(_keep)
        optimizer.register_step_post_hook(_put_back)
        optimizer.defaults["fused"] = True  # it reads found_inf on the device, as fused ones do
        optimizers.append(optimizer)
    return optimizers


@torch.no_grad()
def _keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Before an update that may have to be skipped, of which only the device knows yet: what it will change."""
    tensors = [t for group in optimizer.param_groups for p in group["params"] for t in (p, optimizer.state[p]["momentum_buffer"])]
    optimizer.kept = [(t, t.clone()) for t in map(dist.local, tensors)]


@torch.no_grad()
def _put_back(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """After it: all as it was, where found_inf says so."""
    bad = getattr(optimizer, "found_inf", None)
    for tensor, before in optimizer.kept if bad is not None else ():
        tensor.copy_(torch.where(bad > 0, before, tensor))
    optimizer.kept = None


OPTIMIZERS: dict[str, Callable[[Parameters, OptimizationConfig], list[torch.optim.Optimizer]]] = {
    "adamw": adamw, "adam": adam, "sgd": sgd, "muon": muon,
}


def _common(parameters: Parameters, cfg: OptimizationConfig) -> dict[str, float | bool]:
    """Fused ones read on the device whether an update is to be skipped; MPS's do not."""
    on_mps = any(p.device.type == "mps" for p in parameters.values())
    return {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "fused": not on_mps}


def make_optimizers(model: nn.Module, cfg: OptimizationConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of the trainable parameters. Raises ConfigError for an unknown name."""
    if cfg.optimizer not in OPTIMIZERS:
        raise ConfigError(f"training.optimization.optimizer: {cfg.optimizer!r} is none of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[cfg.optimizer]({n: p for n, p in model.named_parameters() if p.requires_grad}, cfg)
