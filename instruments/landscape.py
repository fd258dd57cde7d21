"""Loss along the straight line between two checkpoints (Goodfellow et al. 2015; Frankle et al. 2020).

The barrier is how far the loss rises above the straight line between its ends, at most: 0 where two runs lie in one valley.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from config import UserError
from hub.folders import resolve
from hub.llama import load_decoder, load_plain
from runtime.wrap import eval_mode


FORMULA = ("attention_n_heads", "attention_n_kv_heads", "norm_eps", "position_emb_theta")  # beside the shapes


class Point(NamedTuple):
    """A place on the line."""
    share: float  # of the second checkpoint: its weights times this, the first one's times the rest
    loss: float  # mean over the tokens, in nats


def loss_along(first: Path, second: Path, ids: Tensor, points: int, device: torch.device, batch: int = 8) -> Iterator[Point]:
    """The losses at `points` places from `first` to `second`, on token rows `ids` (rows, tokens). Raises UserError."""
    (cfg, start), (other, end) = (load_plain(resolve(path)) for path in (first, second))
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (start, end)]
    if shapes[0] != shapes[1] or any(getattr(cfg, name) != getattr(other, name) for name in FORMULA):
        raise UserError(f"{second}: is no model of the shape of {first}; there is no straight line between them")
    if ids.min() < 0 or ids.max() >= cfg.vocab_size or not 2 <= ids.shape[1] <= cfg.max_seq_len + 1:
        raise UserError(f"rows of {ids.shape[1]} tokens with ids up to {ids.max()}: do not fit a model of {cfg.max_seq_len} "
                        f"tokens and {cfg.vocab_size} ids")
    model = load_decoder(first).to(device)
    for share in (number / (points - 1) for number in range(points)):
        state = {name: torch.lerp(start[name], end[name], share).to(device) for name in start} if 0 < share < 1 else \
            {name: tensor.to(device) for name, tensor in (end if share else start).items()}
        model.load_state_dict(state, assign=True)  # never into what may be a map of the file
        yield Point(share, mean_loss(model, ids, device, batch))


def mean_loss(model: nn.Module, ids: Tensor, device: torch.device, batch: int) -> float:
    """Of all tokens but each row's first."""
    with torch.no_grad(), eval_mode(model, device):
        losses = [model(rows[:, :-1], rows[:, 1:]).double().item() * len(rows) for rows in ids.to(device).split(batch)]
    return sum(losses) / len(ids)


def barrier(points: list[Point]) -> float:
    """The largest loss above the straight line between the losses of both ends; at least 0, which it is there."""
    first, last = points[0].loss, points[-1].loss
    return max(loss - ((1 - share) * first + share * last) for share, loss in points)
