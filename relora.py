"""ReLoRA: train low-rank factors, merge them into frozen weights, restart (Lialin et al., arXiv 2307.05695).

A targeted linear layer computes  y = x W' + s (dropout(x) A') B'  with W (out, in) frozen, A (r, in), B (out, r)
and s = lora_alpha / r. Every reset_frequency updates, s B A is added to W, A is drawn anew, B becomes 0, and
Adam's moments of both are pruned: each cycle adds another rank-r update, so their sum may have any rank.

    apply_relora(model, cfg.model.relora)          # in place, before wrapping
    merge_and_reinit(model, seed=42, step=2000)    # the function that the model computes does not change
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ConfigError, ReLoRAConfig
from runtime import cpu_kernels, dist, kernels

HEAD = "de_embedding_proj"  # never adapted: the chunked loss reads its weight directly
FACTORS = ("lora_A", "lora_B", "scaling")  # what trains in an adapted layer, and begins anew at a merge


def kaiming_uniform(shape: Iterable[int], seed: int) -> Tensor:
    """torch's default initialisation of a linear layer (a = sqrt 5), the same on every rank and device."""
    empty = torch.empty(tuple(shape))
    return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))


class ReLoRALinear(nn.Module):
    """A linear layer without bias, adapted. `name` is its place in the model: draws depend on it."""

    resets, resets_adam_step, prunes_apart = FACTORS, True, False  # at a merge; instruments/faults.py has it otherwise

    def __init__(self, linear: nn.Linear, cfg: ReLoRAConfig, name: str, seed: int):
        super().__init__()
        self.cfg, self.name, self.fast = cfg, name, isinstance(linear, cpu_kernels.Linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = None
        if not cfg.lora_only:
            initial = linear.weight.detach()
            weight = nn.Parameter(initial if cfg.has_initial_weights else torch.zeros_like(initial), requires_grad=False)
        self.register_parameter("weight", weight)
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.zeros(cfg.r, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, cfg.r, device=device))
        self.register_parameter("scaling", nn.Parameter(torch.ones(1, device=device)) if cfg.trainable_scaling else None)
        self.initialise(seed)

    def initialise(self, seed: int) -> None:
        """As after a merge; but where W is 0 or absent, B is drawn too: with B = 0 every gradient would be 0 for ever."""
        self.reinitialise(seed, step=0)
        if not self.cfg.has_initial_weights:
            dist.assign_(self.lora_B, kaiming_uniform(self.lora_B.shape, dist.derive_seed(seed, 0, self.name, "lora_B")))

    @torch.no_grad()
    def reinitialise(self, seed: int, step: int) -> None:
        """Draw A from (seed, step, name), set B to 0 and the trainable scaling to 1."""
        dist.assign_(self.lora_A, kaiming_uniform(self.lora_A.shape, dist.derive_seed(seed, step, self.name)))
        self.lora_B.zero_()
        if self.scaling is not None:
            self.scaling.fill_(1.0)

    @property
    def scale(self) -> float | Tensor:
        """s, the one that forward and merge share."""
        return self.cfg.lora_alpha / self.cfg.r if self.scaling is None else dist.replicated(self.scaling).tanh()

    def forward(self, x: Tensor) -> Tensor:
        if self.fast and self.weight is not None and not (self.training and self.cfg.lora_dropout):
            return kernels.effective_linear(x, self.weight, self.lora_A, self.lora_B, self.scale)
        dropped = F.dropout(x, self.cfg.lora_dropout, self.training)
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scale  # (..., in) -> (..., r) -> (..., out)
        return update if self.weight is None else F.linear(x, self.weight) + update

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """s B A (out, in) as forward applies it, sharded like W under FSDP2."""
        return (self.lora_B @ dist.replicated(self.lora_A)) * self.scale

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W + s B A (out, in): the weight of the plain layer that computes the same."""
        return self.delta_weight() if self.weight is None else self.weight + self.delta_weight()

    def factors(self) -> dict[str, nn.Parameter]:
        """What trains here and begins anew at a merge, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if name in FACTORS}

    def merged_delta(self) -> Tensor:
        """What a merge adds to W."""
        return self.delta_weight()

    def restart(self, seed: int, step: int) -> None:
        """Begin the next cycle."""
        self.reinitialise(seed, step)


def relora_layers(model: nn.Module) -> dict[str, ReLoRALinear]:
    return {m.name: m for m in model.modules() if isinstance(m, ReLoRALinear)}


def has_adapters(state: Iterable[str]) -> bool:
    """Whether a state dict (its names) is of a model with ReLoRA layers."""
    return any(name.rpartition(".")[2] in FACTORS for name in state)


def apply_relora(model: nn.Module, cfg: ReLoRAConfig, seed: int = 42, layer_type: type[ReLoRALinear] = ReLoRALinear) -> None:
    """Replace, in place, every nn.Linear whose name holds one of cfg.target_modules (the head never is).

    Raises ConfigError when a target matches nothing.
    """
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != HEAD]
    for target in cfg.target_modules:
        if not any(target in name for name in names):
            leaves = sorted({n.split(".", 2)[-1] for n in names})
            raise ConfigError(f"model.relora.target_modules: {target!r} matches no layer; there are {', '.join(leaves)}")
    for name in names:
        if any(target in name for target in cfg.target_modules):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer_type(model.get_submodule(name), cfg, name, seed))


# ---- merge and reset ---------------------------------------------------------------------------------------

def merge_due(step: int, cfg: ReLoRAConfig | None, lr_warmup_steps: int) -> bool:
    """Whether adapters merge after `step` updates, before the next: where the jagged schedule restarts."""
    return (cfg is not None and not cfg.lora_only and step > 0 and step % cfg.reset_frequency == 0
            and step > cfg.warm_start_steps and step >= lr_warmup_steps)


@torch.no_grad()
def merge_and_reinit(model: nn.Module, *, seed: int, step: int) -> float:
    """Add every adapter to its frozen weight, in float32, and start it anew, in place; returns the norm of what was added."""
    total = 0.0
    for layer in relora_layers(model).values():
        if layer.weight is None:
            raise ValueError("lora_only layers have no weight to merge into")
        delta = layer.merged_delta()
        layer.weight.add_(delta)
        total += dist.full_tensor(delta.square().sum()).item()
        layer.restart(seed, step)
    return math.sqrt(total)


@torch.no_grad()
def reset_optimizer(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module, *, seed: int, step: int) -> float:
    """Prune the optimizers' state of every adapter as cfg.optimizer_reset says; returns the share that is now 0.

    All state tensors of a parameter are pruned at the same places: B = 0 gives A no gradient at first, so a first
    moment whose second moment was pruned would be divided by eps alone. Adam's `step` becomes 0 too, or the next update
    would be (1 - beta1) / sqrt(1 - beta2) times as large, 3.16: that wants a rate lower by 1.41 and then gives a val loss
    0.01 to 0.02 lower, p 0.2 (docs/study.md). Raises ConfigError for state of another shape.
    """
    zeros, entries, optimizers = 0, 0, list(optimizers)
    for layer in relora_layers(model).values():
        reset = layer.cfg.optimizer_reset
        for leaf in layer.resets:
            states = [o.state[p] for o in optimizers if (p := layer.factors().get(leaf)) in o.state]
            values = [(key, v) for state in states for key, v in state.items() if isinstance(v, Tensor)]
            moments = [v for _, v in values if v.dim()]
            if reset.mode != "none":
                check_shapes(values, layer, leaf)
                whole = [dist.full_tensor(v).clone() for v in moments]
                for key, value in values:
                    if value.dim():
                        drawn = dist.derive_seed(seed, step, layer.name, leaf, *([key] if layer.prunes_apart else []))
                        value.mul_(dist.shard_like(kept_places(whole, reset.mode, reset.ratio, drawn), value))
                    elif layer.resets_adam_step:
                        value.zero_()
            zeros += sum(int((dist.full_tensor(v) == 0).sum()) for v in moments)
            entries += sum(v.numel() for v in moments)
    return zeros / max(1, entries)


def check_shapes(values: list[tuple[str, Tensor]], layer: ReLoRALinear, leaf: str) -> None:
    """Raise ConfigError for a state tensor that is neither of the parameter's shape, as moments are, nor a count of steps."""
    for key, value in values:
        if value.dim() and value.shape != getattr(layer, leaf).shape:
            raise ConfigError(f"model.relora.optimizer_reset.mode: the optimizer's {key!r} of {layer.name}.{leaf} has the shape "
                              f"{tuple(value.shape)}, and a reset knows no entries of it to prune; use mode none")


def kept_places(moments: list[Tensor], mode: str, ratio: float, seed: int) -> Tensor:
    """1 where a reset keeps the moments of a parameter and 0 in exactly round(ratio * numel) places.

    `random` drops any, `magnitude` those where the first moment is smallest, `zero` all.
    """
    first = moments[0] if moments else torch.zeros(0)
    order = (torch.randperm(first.numel(), generator=torch.Generator().manual_seed(seed)) if mode == "random"
             else first.flatten().abs().argsort())
    kept = torch.ones(first.numel(), device=first.device)
    kept[order[:first.numel() if mode == "zero" else round(ratio * first.numel())].to(first.device)] = 0
    return kept.view(first.shape)
