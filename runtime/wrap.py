"""How a model is wrapped for training: compiled, under DDP or FSDP2, or bare. The only place that knows which of them it is.

train.py keeps the bare model for saving, and trains through `parallelize`'s.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from config import Config, ConfigError, TrainingConfig, check_strategy
from runtime import dist, kernels
from runtime.machine import choose_compile


SHARDED = ("fsdp", "hsdp")
SUMS = "set_force_sum_reduction_for_comms"  # FSDP2's method (torch 2.8) by which it sums and divides, and asks for no mean


def check_sharding(cfg: Config, device: torch.device) -> None:
    """Raise ConfigError for what torch cannot do on these ranks, or would do wrongly.

    Up to torch 2.8 gloo's reduce-scatter, which CPUs use, gives the sum where it is asked for the mean, and says nothing.
    """
    strategy = cfg.training.strategy
    check_strategy(cfg, dist.world_size())
    if strategy in SHARDED and device.type == "cpu" and dist.world_size() > 1:
        from torch.distributed.fsdp import FSDPModule
        if not hasattr(FSDPModule, SUMS):
            raise ConfigError(f"training.strategy: {strategy} on CPUs needs torch 2.8, and this is {torch.__version__}, "
                              "whose gradients would be as many times too large as there are ranks; use ddp")


def parallelize(model: nn.Module, blocks: Iterable[nn.Module], cfg: TrainingConfig, device: torch.device) -> nn.Module:
    """What to train through: the model itself, DDP around it, or FSDP2 in it; `blocks`, its layers, compiled where asked.

    FSDP2 (HSDP: inside of each machine) shards each block as a group; the rest stays with the root, whose forward needs the
    whole head weight for the chunked loss.
    """
    if choose_compile(cfg.compile, device):
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # what is looked at in float32 is meant to be exact
        for block in blocks:
            block.compile()
        kernels.compile_loss()
    if dist.world_size() == 1:
        return model
    if cfg.strategy not in SHARDED:
        # the buffers are tables of positions; torch >= 2.13 calls this option forward_sync_buffers, and warns
        parameters = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                       gradient_as_bucket_view=True, **{buffers: False})
    from torch.distributed.device_mesh import init_device_mesh  # here, for what does not shard starts sooner without
    from torch.distributed.fsdp import fully_shard
    world, local = dist.world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size()))
    if cfg.strategy == "hsdp" and local < world:  # as many whole copies as machines, each sharded inside of its own
        mesh = init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (world,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if device.type == "cpu":  # see check_sharding
        for part in filter(_has_fsdp, model.modules()):
            getattr(part, SUMS)(True)
    return model


def _has_fsdp(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")  # an FSDPModule


def wrapping(wrapped: nn.Module) -> str:
    """The name of what `parallelize` has done."""
    if isinstance(wrapped, DistributedDataParallel):
        return "DDP"
    if not _has_fsdp(wrapped):
        return "no wrapping"
    mesh = next(wrapped.parameters()).device_mesh
    return "FSDP2" if mesh.ndim == 1 else f"FSDP2 inside of {mesh.size(0)} machines, which hold a copy each"


def gradient_sync(wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Let ranks exchange gradients on the last micro-batch of an update only."""
    if _has_fsdp(wrapped):
        wrapped.set_requires_gradient_sync(last)
    elif isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def is_compiled(model: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in model.modules())


def _uncompiled(model: nn.Module) -> contextlib.AbstractContextManager:
    """Inside, compiled blocks run as they are written: rows of another length would have them compiled again, for any."""
    if is_compiled(model):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()  # set_stance imports all of the compiler, which takes seconds


@contextlib.contextmanager
def eval_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, a model is looked at: eval mode, float32, not compiled. Afterwards it is as it was, ready to train."""
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False), _uncompiled(model):
            yield
    finally:
        model.train(was_training)
        reshard(model)


def reshard(model: nn.Module) -> None:
    """After a forward outside of training FSDP2's root stays whole; touch no parameters before this."""
    if _has_fsdp(model):
        model.reshard()
