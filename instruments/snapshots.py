"""Learning-dynamics snapshots: activations, weights and gradients of chosen layers on a fixed batch.

For every layer whose name ends in one of `layer_suffixes`: its output at one position of each example (or at several: rows
are then examples x positions), its effective weight W + s B A, and the gradient of the mean loss with respect to that
effective weight. The gradient is the outer product of the layer's input and the gradient of its output, dL/dW = dY' X, so
it is full rank and exists whether or not W is frozen, without a second model. ReLoRA layers add their factors (with
gradients) and their frozen base. Of blocks the residual stream and the entropy of attention can be kept too.

Everything is float32, measured in eval mode (no dropout, no autocast), and leaves the model, its gradients and the
random state as they were. The keys and shapes are those that pico-analyze reads:

    {"activations": {"layers.0.attention.v_proj": (examples, out)}, "weights": {...: (out, in)}, "gradients": {...}, ...}

`Snapshots` reads those of a run back.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import CheckpointError, Writer, gather_state, read_manifest, step_folders, torch_writer
from config import CheckpointingConfig, ConfigError, LearningDynamicsConfig
from config.reading import read_yaml, show, yaml_text
from data import to_device
from hub.tokenizers import Tokenizer
from model import PicoDecoder, rotate
from relora import HEAD, ReLoRALinear
from runtime import dist, signals
from runtime.files import did_you_mean
from runtime.tensors import read_tensors
from runtime.wrap import eval_mode


STREAM, ENTROPY = BESIDE = ("residual", "attention.entropy")  # what is kept of a block beside its linear layers
ATTENDED = 1e-3  # relative difference of attention's output, as we compute it, that rounding explains


def chosen_layers(model: nn.Module, suffixes: list[str]) -> dict[str, nn.Module]:
    """The linear layers of the blocks whose names end in one of `suffixes`. Raises ConfigError where one matches none."""
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, (nn.Linear, ReLoRALinear)) and name != HEAD}  # which the chunked loss never calls
    for suffix in suffixes:
        if suffix not in BESIDE and not any(name.endswith(suffix) for name in layers):
            ends = sorted({name.split(".", 2)[-1] for name in layers} | set(BESIDE))
            raise ConfigError(f"checkpointing.learning_dynamics.layer_suffixes: {suffix!r} matches no layer of a block; there "
                              f"are {', '.join(ends)}")
    return {name: module for name, module in layers.items() if any(name.endswith(s) for s in suffixes)}


def widths(model: PicoDecoder, suffixes: list[str]) -> dict[str, int]:
    """{name: numbers of one example at one position} of all activations that are kept."""
    blocks = {STREAM: model.cfg.d_model, ENTROPY: model.cfg.attention_n_heads}
    return {name: layer.out_features for name, layer in chosen_layers(model, suffixes).items()} | {
        f"layers.{i}.{name}": width for name, width in blocks.items() if name in suffixes for i in range(len(model.layers))}


def attention_entropy(model: PicoDecoder, number: int, seen: dict[str, tuple[Tensor, Tensor]], positions: list[int]) -> Tensor:
    """Entropy in nats of what each head attends to, (B, positions, H): -sum p log p, p = softmax(q k' / sqrt(head_dim)).

    From what a block's layers were seen to compute. Raises ConfigError where its attention is not this formula.
    """
    name, cfg = f"layers.{number}.attention", model.cfg
    size = cfg.d_model // cfg.attention_n_heads
    q, k, v = (seen[f"{name}.{part}_proj"][1].detach().float().unflatten(2, (-1, size)) for part in "qkv")
    T, groups = q.size(1), cfg.attention_n_heads // cfg.attention_n_kv_heads
    cos, sin, at = model.rope_cos[:T], model.rope_sin[:T], torch.tensor(positions, device=q.device) % T
    q, k = rotate(q, cos, sin)[:, at], rotate(k, cos, sin).repeat_interleave(groups, dim=2)
    scores = torch.einsum("bphd,bthd->bpht", q, k) / size ** 0.5  # (B, P, H, T)
    scores = scores.masked_fill(torch.arange(T, device=q.device) > at[:, None, None], -torch.inf)
    p = scores.softmax(-1)
    y = torch.einsum("bpht,bthd->bphd", p, v.repeat_interleave(groups, dim=2)).flatten(2)
    computed = seen[f"{name}.o_proj"][0].detach().float()[:, at]
    if not torch.allclose(y, computed, rtol=0, atol=ATTENDED * computed.abs().max().item()):
        raise ConfigError(f"checkpointing.learning_dynamics.layer_suffixes: {ENTROPY} is of softmax(q k' / sqrt(head_dim)), and "
                          "this model.py computes something else; leave it out, or change snapshots.attention_entropy too")
    return torch.special.entr(p).sum(-1)


@contextlib.contextmanager
def taps(layers: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While it lasts, {layer name: (input, output)} of the latest forward."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (inputs[0], output)
        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _examples(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, float]]:
    """This rank's sub-batches, contiguous over the ranks, each with its share of the mean loss.

    Every rank gets equally many, since under FSDP2 all must run forward together: surplus ones weigh 0.
    """
    pieces = [rows[i:i + size] for i in range(0, len(rows), size)]
    each = -(-len(pieces) // dist.world_size())
    for number in range(dist.rank() * each, (dist.rank() + 1) * each):
        piece = pieces[number] if number < len(pieces) else pieces[0]
        yield piece, (len(piece) / len(rows) if number < len(pieces) else 0.0)


def snapshot(model: nn.Module, rows: np.ndarray, cfg: LearningDynamicsConfig,
             device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Snapshot of an unwrapped (or FSDP2-sharded) model on token rows (examples, tokens), in their order.

    Returns, on rank 0's CPU, {"activations", "weights", "gradients", "data"}; examples are spread over the ranks,
    activations gathered in order and gradients summed. Every rank must call it.
    """
    rows = rows[:cfg.max_rows]
    layers = chosen_layers(model, cfg.layer_suffixes)
    tapped, activations = layers | _beside(model, cfg.layer_suffixes), {name: [] for name in widths(model, cfg.layer_suffixes)}
    gradients = {name: torch.zeros(m.out_features, m.in_features, device=device) for name, m in layers.items()}
    # not compiled, also since the outputs of compiled layers would not be part of the graph
    with eval_mode(model, device), taps(tapped) as seen:
        batches = list(_examples(rows, cfg.batch_size))
        for piece, share in tqdm(batches, desc="snapshot", leave=False, disable=None if dist.rank() == 0 else True):
            signals.stop_point()
            ids = to_device(piece, device)
            loss = model(ids[:, :-1], ids[:, 1:])
            outputs = torch.autograd.grad(loss, [seen[name][1] for name in layers]) if layers else ()
            for (name, (x, y)), dy in zip(((n, seen[n]) for n in layers), outputs):
                gradients[name].addmm_(dy.flatten(0, 1).float().T, x.detach().flatten(0, 1).float(), alpha=share)
            for name in activations if share else ():
                activations[name].append(_looked_at(model, name, seen, cfg.sequence_idx))
            seen.clear()
    result = {"activations": _gathered(activations), "weights": {}, "gradients": {},
              "data": {"input_ids": torch.from_numpy(rows.astype(np.int64))}}
    for name, layer in layers.items():
        _add_weights(result, name, layer, dist.all_reduce_sum(gradients[name]).cpu())
    return result


def _beside(model: PicoDecoder, suffixes: list[str]) -> dict[str, nn.Module]:
    """The modules whose inputs and outputs tell what is kept beside linear layers."""
    found: dict[str, nn.Module] = {}
    for number, block in enumerate(model.layers):
        if STREAM in suffixes:
            found[f"layers.{number}.{STREAM}"] = block
        if ENTROPY in suffixes:
            found |= {f"layers.{number}.attention.{part}_proj": getattr(block.attention, f"{part}_proj") for part in "qkvo"}
    return found


def _looked_at(model: PicoDecoder, name: str, seen: dict[str, tuple[Tensor, Tensor]], where: int | list[int]) -> Tensor:
    """(examples, width) of a layer, or (examples x positions, width), on the CPU."""
    if name.endswith(ENTROPY):
        entropies = attention_entropy(model, int(name.split(".")[1]), seen, where if isinstance(where, list) else [where])
        return entropies.flatten(0, 1).cpu()
    y = seen[name][1].detach()[:, where]  # copied below: a view would keep all positions alive
    return (y.flatten(0, 1) if isinstance(where, list) else y).to("cpu", torch.float32, copy=True)


def _gathered(activations: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    parts = dist.all_gather_object({name: torch.cat(pieces) for name, pieces in activations.items() if pieces})
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in activations}


def _add_weights(result: dict[str, dict[str, Tensor]], name: str, layer: nn.Module, gradient: Tensor) -> None:
    """Effective weight and gradient under the layer's name; for ReLoRA layers the factors and the base beside them.

    With W_eff = W + s B A the chain rule gives dL/dB = s dL/dW_eff A' and dL/dA = s B' dL/dW_eff.
    """
    def host(tensor: Tensor) -> Tensor:
        return dist.full_tensor(tensor.detach()).float().cpu().clone()

    weights, gradients = result["weights"], result["gradients"]
    gradients[name] = gradient
    if not isinstance(layer, ReLoRALinear):
        weights[name] = host(layer.weight)
        return
    A, B, weights[name] = host(layer.lora_A), host(layer.lora_B), host(layer.effective_weight())
    scale = layer.scale if isinstance(layer.scale, float) else host(layer.scale)
    weights |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
    if layer.weight is not None:
        weights[f"{name}.base"] = host(layer.weight)
    gradients |= {f"{name}.lora_A": scale * (B.T @ gradient), f"{name}.lora_B": scale * (gradient @ A.T)}


def writers(model: nn.Module, optimizers: list[torch.optim.Optimizer], rows: dict[str, np.ndarray | None],
            options: CheckpointingConfig, tokenizer: Tokenizer, device: torch.device) -> dict[str, Writer]:
    """The files of the snapshots of each {split: rows} that has rows; on rank 0, none elsewhere. Every rank must call it."""
    found, cfg = {}, options.learning_dynamics
    for split, split_rows in rows.items():
        if split_rows is not None:
            kinds = snapshot(model, split_rows, cfg, device)
            kinds["data"]["text"] = [tokenizer.decode(row) for row in kinds["data"]["input_ids"].tolist()]
            kinds["weights"] = next((found[key] for key in found if key.endswith("_weights")), kinds["weights"])  # held once
            found |= {f"{split}_{kind}": tensors for kind, tensors in kinds.items()}
    if cfg.optimizer_states:
        found["train_optimizer"] = optimizer_states(gather_state(model, optimizers)["optimizer"], cfg.layer_suffixes)
    where = options.learning_dynamics_dir
    return {f"{where}/{name}.pt": torch_writer(value) for name, value in found.items()} if dist.rank() == 0 else {}


def optimizer_states(state: dict[str, dict], suffixes: list[str]) -> dict[str, Tensor]:
    """{parameter.key: tensor} of the chosen layers, such as layers.0.swiglu.w_2.lora_A.exp_avg, from gathered states."""
    return {f"{name.removesuffix('.weight')}.{key}": value for name, values in state.items()
            if any(name.rpartition(".")[0].endswith(suffix) for suffix in suffixes) for key, value in values.items()}


# ---- reading them back -------------------------------------------------------------------------------------------------

def _is_matrix(name: Any, tensor: Any) -> bool:
    """Whether it is a layer's: names end up in tables, pages and file names."""
    return (isinstance(name, str) and re.fullmatch(r"layers\.\d{1,6}(\.\w+)+", name, re.ASCII) is not None
            and isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.is_floating_point()
            and tensor.dim() == 2 and tensor.nbytes > 0)


def _check_model(model: dict[str, Any]) -> None:
    """Raises ConfigError where the sizes that OV circuits are cut by are not there or do not fit."""
    sizes = [model[key] for key in ("d_model", "attention_n_heads", "attention_n_kv_heads")]
    if not all(type(size) is int and 0 < size < 1 << 20 for size in sizes) or sizes[0] % sizes[1] or sizes[1] % sizes[2]:
        raise ConfigError(f"model: d_model, attention_n_heads and attention_n_kv_heads are {', '.join(map(show, sizes))}; each "
                          "must be a number that the one after it divides")


class Snapshots:
    """The snapshots in a run folder, and the run's configuration. Raises CheckpointError where there are none."""

    def __init__(self, run: Path):
        self.path = run
        try:
            self.config = read_yaml(yaml_text(run / "training_config.yaml"), plain=False)
            options = self.config["checkpointing"]
            self.dynamics, checkpoints = options["learning_dynamics_dir"], run / options["checkpoints_dir"]
            run / self.dynamics  # a text
            _check_model(self.config["model"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{run}: not a run folder ({error}){did_you_mean(run)}") from None
        except (ConfigError, RecursionError) as error:
            raise CheckpointError(f"{run}/training_config.yaml: {error}") from None
        self.folders = {int(f.name[5:]): f for f in reversed(step_folders(checkpoints)) if (f / self.dynamics).is_dir()}
        if not self.folders:
            raise CheckpointError(f"{run}: holds no snapshots; train with checkpointing.learning_dynamics")

    def load(self, step: int, split: str, kind: str) -> tuple[str, dict[str, Tensor]]:
        """(split, {layer name: tensor}); weights do not depend on the split, so either's will do."""
        for name in (split, "train", "val") if kind == "weights" else (split,):
            path = self.folders[step] / self.dynamics / f"{name}_{kind}.pt"
            if path.exists():
                tensors = read_tensors(path)
                if not isinstance(tensors, dict) or not all(map(_is_matrix, tensors, tensors.values())):
                    raise CheckpointError(f"{path}: not matrices named layers.N....")
                return name, tensors
        return split, {}

    def input_ids(self, step: int, split: str) -> Tensor:
        """The token rows (examples, tokens) that a step's snapshot was taken on. Raises CheckpointError."""
        path = self.folders[step] / self.dynamics / f"{split}_data.pt"
        data = read_tensors(path)
        ids = data.get("input_ids") if isinstance(data, dict) else None
        if not (isinstance(ids, Tensor) and ids.dim() == 2 and ids.dtype == torch.int64 and ids.nbytes):
            raise CheckpointError(f"{path}: cannot be read (holds no rows of token ids)")
        return ids

    def size(self, step: int) -> int:
        """Bytes of a step's files."""
        return sum(path.stat().st_size for path in (self.folders[step] / self.dynamics).iterdir())

    def fingerprint(self, step: int) -> str:
        """Of the snapshot's files, from the manifest."""
        try:
            entries = read_manifest(self.folders[step])
        except CheckpointError:  # a run copied without its manifests: go by size and time
            entries = {p.name: {"sha256": f"{p.stat().st_size}:{p.stat().st_mtime_ns}"}
                       for p in (self.folders[step] / self.dynamics).iterdir()}
        listed = sorted((Path(n).name, e["sha256"]) for n, e in entries.items() if Path(n).parent.name in (self.dynamics, ""))
        return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
