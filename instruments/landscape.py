"""Loss along straight lines: between two checkpoints (Goodfellow et al. 2015; Frankle et al. 2020), and around one.

The barrier is how far the loss rises above the straight line between its ends, at most: 0 where two runs lie in one valley.
Around a checkpoint the lines go along random directions (Li et al., arXiv 1712.09913) and along those that its run's weights
moved in most.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoint import step_folders
from config import UserError
from hub.folders import resolve
from hub.llama import load_decoder, load_plain
from runtime.wrap import eval_mode


FORMULA = ("attention_n_heads", "attention_n_kv_heads", "norm_eps", "position_emb_theta")  # beside the shapes


TRAJECTORY = 20  # checkpoints that principal directions are taken from, at most


class Point(NamedTuple):
    """A place on a line."""
    share: float  # of the second checkpoint, the rest is the first's; around one: of a direction as long as the weights
    loss: float  # mean over the tokens, in nats


def loss_along(first: Path, second: Path, ids: Tensor, points: int, device: torch.device, batch: int = 8) -> Iterator[Point]:
    """The losses at `points` places from `first` to `second`, on token rows `ids` (rows, tokens). Raises UserError."""
    (cfg, start), (other, end) = (load_plain(resolve(path)) for path in (first, second))
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (start, end)]
    if shapes[0] != shapes[1] or any(getattr(cfg, name) != getattr(other, name) for name in FORMULA):
        raise UserError(f"{second}: is no model of the shape of {first}; there is no straight line between them")
    check_rows(ids, cfg)
    model = load_decoder(first).to(device)
    for share in (number / (points - 1) for number in range(points)):
        state = {name: torch.lerp(start[name], end[name], share).to(device) for name in start} if 0 < share < 1 else \
            {name: tensor.to(device) for name, tensor in (end if share else start).items()}
        model.load_state_dict(state, assign=True)  # never into what may be a map of the file
        yield Point(share, mean_loss(model, ids, device, batch))


def loss_around(checkpoint: Path, ids: Tensor, count: int, reach: float, points: int, device: torch.device,
                batch: int = 8) -> Iterator[tuple[str, list[Point]]]:
    """(name, losses at `points` places from -reach to reach) of `count` random and up to `count` principal directions.

    Every direction is as long as the checkpoint's matrices are together, so that `reach` is a share of their norm.
    """
    folder = resolve(checkpoint)
    cfg, centre = load_plain(folder)
    check_rows(ids, cfg)
    model = load_decoder(folder).to(device)
    kinds = {"random": (random_direction(centre, seed) for seed in range(count)),
             "principal": principal_directions(folder, centre, count)}
    for kind, directions in kinds.items():
        for number, direction in enumerate(directions, 1):
            found = []
            for share in (reach * (2 * place / (points - 1) - 1) for place in range(points)):
                state = {name: torch.add(tensor, direction[name], alpha=share) if name in direction else tensor
                         for name, tensor in centre.items()}
                model.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, assign=True)
                found.append(Point(share, mean_loss(model, ids, device, batch)))
            yield f"{kind} {number}", found


def check_rows(ids: Tensor, cfg) -> None:
    if ids.min() < 0 or ids.max() >= cfg.vocab_size or not 2 <= ids.shape[1] <= cfg.max_seq_len + 1:
        raise UserError(f"rows of {ids.shape[1]} tokens with ids up to {ids.max()}: do not fit a model of {cfg.max_seq_len} "
                        f"tokens and {cfg.vocab_size} ids")


def random_direction(centre: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Gaussian, each row of each matrix as long as the weights' own (the filter normalisation of Li et al.); vectors stay."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, tensor in centre.items():
        if tensor.dim() == 2:
            drawn = torch.randn(tensor.shape, generator=generator)
            found[name] = drawn * (tensor.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True))
    return found


def principal_directions(folder: Path, centre: dict[str, Tensor], count: int) -> Iterator[dict[str, Tensor]]:
    """The leading principal components of the matrices' way over the run's checkpoints, as long as the matrices together.

    Fewer than `count` where the run has fewer checkpoints; of more than TRAJECTORY, evenly chosen ones.
    """
    folders = sorted(step_folders(folder.parent), key=lambda path: int(path.name.removeprefix("step_"))) \
        if folder.name.startswith("step_") else []
    chosen = sorted({round(n * (len(folders) - 1) / (TRAJECTORY - 1)) for n in range(TRAJECTORY)}) if folders else []
    states = [load_plain(folders[n])[1] for n in chosen]
    names = [name for name, tensor in centre.items() if tensor.dim() == 2 and all(
        name in state and state[name].shape == tensor.shape for state in states)]
    if len(states) < 2 or not names:
        return
    gram = torch.zeros(len(states), len(states), dtype=torch.float64)
    for name in names:  # one at a time: the states are maps of their files
        rows = torch.stack([state[name].flatten() for state in states]).double()
        rows -= rows.mean(0)
        gram += rows @ rows.T
    values, vectors = torch.linalg.eigh(gram)
    length = sum(centre[name].double().square().sum() for name in names).sqrt()
    for value, shares in zip(values.flip(0)[:count], vectors.T.flip(0)):  # the Gram matrix is centred, and so are its shares
        if value > 1e-9 * values[-1]:
            shares = shares * length / value.sqrt()
            yield {name: sum(state[name].double() * share for state, share in zip(states, shares)).float() for name in names}


def mean_loss(model: nn.Module, ids: Tensor, device: torch.device, batch: int) -> float:
    """Of all tokens but each row's first."""
    with torch.no_grad(), eval_mode(model, device):
        losses = [model(rows[:, :-1], rows[:, 1:]).double().item() * len(rows) for rows in ids.to(device).split(batch)]
    return sum(losses) / len(ids)


def barrier(points: list[Point]) -> float:
    """The largest loss above the straight line between the losses of both ends; at least 0, which it is there."""
    first, last = points[0].loss, points[-1].loss
    return max(loss - ((1 - share) * first + share * last) for share, loss in points)
