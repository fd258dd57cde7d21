"""ReLoRA: train low-rank factors, merge them into frozen weights, restart (Lialin et al., arXiv 2307.05695).

A targeted linear layer computes  y = x W' + s (dropout(x) A') B'  with W (out, in) frozen, A (r, in), B (out, r)
and s = lora_alpha / r. Every reset_frequency updates, s B A is added to W, A is drawn anew, B becomes 0, and
Adam's moments of both are pruned: each cycle adds another rank-r update, so their sum may have any rank.

    apply_relora(model, cfg.model.relora)          # in place, before wrapping
    merge_and_reinit(model, seed=42, step=2000)    # the function that the model computes does not change
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, ConfigError, ReLoRAConfig
from runtime import dist, kernels

HEAD = "de_embedding_proj"  # never adapted: the chunked loss reads its weight directly
ADAPTER_NAMES = ("lora_A", "lora_B", "scaling")


def derive_seed(*place: int | str) -> int:
    """A 63-bit seed from the run's seed and a place in it, such as (42, step, layer name)."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest(), "big") >> 1


def kaiming_uniform(shape: Iterable[int], seed: int) -> Tensor:
    """torch's default initialisation of a linear layer (a = sqrt 5), the same on every rank and device."""
    empty = torch.empty(tuple(shape))
    return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))


class ReLoRALinear(nn.Module):
    """A linear layer without bias, adapted. `name` is its place in the model: draws depend on it."""

    def __init__(self, linear: nn.Linear, cfg: ReLoRAConfig, name: str, seed: int):
        super().__init__()
        self.cfg, self.name, self.fast = cfg, name, isinstance(linear, kernels.Linear)
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
        self.masters: list[Tensor] | None = None  # of the fault undone_reset: what comes back at the next update
        if not (cfg.has_initial_weights and "dead_adapters" in cfg.reference_faults):
            self.reinitialise(seed, step=0)
        if not cfg.has_initial_weights:  # with W = 0 and B = 0 every gradient would be 0: an exact saddle
            dist.assign_(self.lora_B, kaiming_uniform(self.lora_B.shape, derive_seed(seed, 0, name, "lora_B")))

    @property
    def scale(self) -> float | Tensor:
        """s, the one that forward and merge share."""
        return self.cfg.lora_alpha / self.cfg.r if self.scaling is None else dist.replicated(self.scaling).tanh()

    def forward(self, x: Tensor) -> Tensor:
        if self.fast and self.weight is not None and not (self.training and self.cfg.lora_dropout):
            return kernels.effective_linear(x, self.weight, self.lora_A, self.lora_B, self.scale)
        dropped = F.dropout(x, self.cfg.lora_dropout, self.training)
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scale
        return update if self.weight is None else F.linear(x, self.weight) + update

    @torch.no_grad()
    def update(self) -> Tensor:
        """s B A (out, in) as forward applies it, sharded like W under FSDP2."""
        return (self.lora_B @ dist.replicated(self.lora_A)) * self.scale

    def restart(self, seed: int, step: int) -> None:
        """`reinitialise`, or with the fault undone_reset only for the gradient of the next update: see undo_reset."""
        if "undone_reset" in self.cfg.reference_faults:
            self.masters = [p.detach().clone() for p in self.adapters()]
        self.reinitialise(seed, step)

    def adapters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name in ADAPTER_NAMES]

    @torch.no_grad()
    def reinitialise(self, seed: int, step: int) -> None:
        """Draw A from (seed, step, name), set B to 0 and the trainable scaling to 1."""
        dist.assign_(self.lora_A, kaiming_uniform(self.lora_A.shape, derive_seed(seed, step, self.name)))
        self.lora_B.zero_()
        if self.scaling is not None:
            self.scaling.fill_(1.0)


def relora_layers(model: nn.Module) -> dict[str, ReLoRALinear]:
    return {m.name: m for m in model.modules() if isinstance(m, ReLoRALinear)}


def apply_relora(model: nn.Module, cfg: ReLoRAConfig, seed: int = 42) -> None:
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
            setattr(model.get_submodule(parent), leaf, ReLoRALinear(model.get_submodule(name), cfg, name, seed))


# ---- merge and reset ---------------------------------------------------------------------------------------

def merge_due(step: int, cfg: Config) -> bool:
    """Whether adapters merge after `step` updates, before the next: where the jagged schedule restarts.

    (In a warm start longer than a cycle the schedule restarts too, without anything to merge.)
    """
    relora = cfg.model.relora
    if relora is None or relora.lora_only:
        return False
    if "late_merge" in relora.reference_faults:
        step -= 1
    return (step > 0 and step % relora.reset_frequency == 0 and step > relora.warm_start_steps
            and step >= cfg.training.optimization.lr_warmup_steps)


@torch.no_grad()
def merge_and_reinit(model: nn.Module, *, seed: int, step: int) -> float:
    """Add every adapter to its frozen weight and start it anew, in place; returns the norm of what was added.

    In float32 and with the scale that forward uses, so the model computes what it did before. Raises ValueError
    for a model without frozen weights to merge into.
    """
    total = 0.0
    for layer in relora_layers(model).values():
        if layer.weight is None:
            raise ValueError("lora_only layers have no weight to merge into")
        update = layer.update()
        if "unscaled_merge" in layer.cfg.reference_faults:
            update = update / layer.scale
        layer.weight.add_(update)
        total += dist.full_tensor(update.square().sum()).item()
        layer.restart(seed, step)
    return math.sqrt(total)


def repeat_reset(model: nn.Module, seed: int, step: int) -> None:
    """After a resume between a merge and its update: what `undo_reset` has yet to undo."""
    for layer in relora_layers(model).values():
        if "undone_reset" in layer.cfg.reference_faults:
            layer.restart(seed, step)


@torch.no_grad()
def undo_reset(model: nn.Module) -> None:
    """The reference's third fault (under ZeRO-2 with bf16): call it before the update that follows a merge.

    Its fresh factors were copies. The gradient was taken at them, but the update was applied to the old float32 masters,
    which then overwrote the copies.
    """
    for layer in relora_layers(model).values():
        if layer.masters is not None:
            for parameter, master in zip(layer.adapters(), layer.masters):
                parameter.copy_(master)
            layer.masters = None


@torch.no_grad()
def reset_optimizer(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module, *, seed: int, step: int) -> float:
    """Prune the optimizers' state of every adapter as cfg.optimizer_reset says; returns the share that is now 0.

    All state tensors of a parameter are pruned at the same places: B = 0 gives A no gradient at first, so a first
    moment whose second moment was pruned would be divided by eps alone. Adam's `step` becomes 0 too, or its bias
    correction would make the next update 1 / sqrt(1 - beta2) too large.
    """
    optimizers = list(optimizers)
    zeros = entries = 0
    for layer in relora_layers(model).values():
        reset, keep_step = layer.cfg.optimizer_reset, "kept_adam_step" in layer.cfg.reference_faults
        for leaf, parameter in layer.named_parameters():
            states = [o.state[parameter] for o in optimizers if parameter in o.state]
            values = [v for state in states for v in state.values() if isinstance(v, Tensor)]
            moments = [v for v in values if v.shape == parameter.shape]  # the others are Adam's step
            if reset.mode != "none":
                kept = kept_places([dist.full_tensor(v) for v in moments], reset.mode, reset.ratio,
                                   derive_seed(seed, step, layer.name, leaf))
                for value in moments:
                    value.mul_(dist.shard_like(kept, value))
                for value in values:
                    if value.dim() == 0 and not keep_step:
                        value.zero_()
            zeros += sum(int((dist.full_tensor(v) == 0).sum()) for v in moments)
            entries += sum(v.numel() for v in moments)
    return zeros / max(1, entries)


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


def merged_state(state: dict[str, Tensor], cfg: ReLoRAConfig | None) -> dict[str, Tensor]:
    """The plain decoder's state dict from a full one with adapters: every weight is the effective W + s B A."""
    plain = {k: v for k, v in state.items() if k.rpartition(".")[2] not in ADAPTER_NAMES}
    for key, B in state.items():
        prefix, _, leaf = key.rpartition(".")
        if leaf == "lora_B":
            scaling = state.get(f"{prefix}.scaling")
            scale = cfg.lora_alpha / cfg.r if scaling is None else scaling.float().tanh()
            update = (B @ state[f"{prefix}.lora_A"]) * scale
            base = state.get(f"{prefix}.weight")
            plain[f"{prefix}.weight"] = update if base is None else base + update
    return plain


# ---- learning-rate schedules -------------------------------------------------------------------------------

def learning_rate_multiplier(step: int, cfg: Config) -> float:
    """What update `step` (counted from 0) multiplies the learning rate by: a pure function of the step."""
    o, horizon = cfg.training.optimization, cfg.training.max_steps
    warmup, floor = o.lr_warmup_steps, o.min_lr_ratio
    if step < warmup:
        return step / warmup
    span = max(1, horizon - warmup)

    def cosine(at: int) -> float:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (at - warmup) / span))

    if o.lr_scheduler == "constant_with_warmup":
        return 1.0
    if o.lr_scheduler == "linear_with_warmup":
        return max(0.0, (horizon - step) / span)
    if o.lr_scheduler == "relora_jagged_cosine":
        frequency, restart = cfg.model.relora.reset_frequency, o.restart_warmup_steps
        since = step % frequency
        if step >= frequency and since < restart:  # climb from 0 to where the cosine will be by then
            return since / restart * cosine(step - since + restart)
    return cosine(step)
