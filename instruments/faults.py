"""The known faults of the reference ReLoRA, each by name, to reproduce published numbers and to study the difference.

    dead_adapters    A and B both begin at 0, so their gradients are exactly 0 until the first restart
    unscaled_merge   forward adds s B A, the merge B A: the loss jumps at every merge
    undone_reset     restarted factors live for one gradient; then the old ones come back (ZeRO-2 with bf16)
    late_merge       merges come one step after the schedule's restart
    kept_adam_step   Adam's step is not set back with its moments
    kept_scaling     the moments of a trainable scaling are not reset with the factors'
    pruned_apart     `random` draws the places that it prunes for each moment by itself

They are subclasses of the layer and hooks around the step; `model.relora.reference_faults` names those that train.py puts in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from config import ReLoRAConfig
from relora import ReLoRALinear, relora_layers


class DeadAdapters(ReLoRALinear):
    def initialise(self, seed: int) -> None:
        if not self.cfg.has_initial_weights:  # where B is drawn, the adapters were alive
            super().initialise(seed)


class UnscaledMerge(ReLoRALinear):
    def merged_delta(self) -> Tensor:
        return self.delta_weight() / self.scale


class UndoneReset(ReLoRALinear):
    """The fresh factors were copies: the gradient was taken at them, but the update went to the old float32 masters."""
    masters: list[Tensor] | None = None  # what comes back at the next update

    def restart(self, seed: int, step: int) -> None:
        self.masters = [p.detach().clone() for p in self.factors().values()]
        super().restart(seed, step)


class KeptAdamStep(ReLoRALinear):
    resets_adam_step = False


class KeptScaling(ReLoRALinear):
    resets = ("lora_A", "lora_B")


class PrunedApart(ReLoRALinear):
    prunes_apart = True


LAYERS = {"dead_adapters": DeadAdapters, "unscaled_merge": UnscaledMerge, "undone_reset": UndoneReset,
          "kept_adam_step": KeptAdamStep, "kept_scaling": KeptScaling, "pruned_apart": PrunedApart}


def layer_type(cfg: ReLoRAConfig | None) -> type[ReLoRALinear]:
    """The layer with the faults that are asked for; the layer itself where none is."""
    chosen = tuple(LAYERS[name] for name in (cfg.reference_faults if cfg else ()) if name in LAYERS)
    return type("FaultyReLoRALinear", chosen, {}) if len(chosen) > 1 else chosen[0] if chosen else ReLoRALinear


def merge_delay(cfg: ReLoRAConfig | None) -> int:
    """Steps by which merges come late."""
    return int(cfg is not None and "late_merge" in cfg.reference_faults)


@torch.no_grad()
def undo_reset(model: nn.Module, *_: Any) -> None:
    """Give back what the latest restart replaced: before the update that follows it, or before its checkpoint."""
    for layer in relora_layers(model).values():
        for parameter, master in zip(layer.factors().values(), getattr(layer, "masters", None) or ()):
            parameter.copy_(master)
        if isinstance(layer, UndoneReset):
            layer.masters = None


def install(model: nn.Module, optimizers: list[torch.optim.Optimizer], cfg: ReLoRAConfig) -> None:
    """Hook into the step what `undone_reset` does."""
    if "undone_reset" in cfg.reference_faults:
        optimizers[0].register_step_pre_hook(lambda *_: undo_reset(model))


def repeat_reset(model: nn.Module, seed: int, step: int) -> None:
    """After a resume between a merge and its update: what `undo_reset` has yet to undo."""
    for layer in relora_layers(model).values():
        if isinstance(layer, UndoneReset):
            layer.restart(seed, step)
