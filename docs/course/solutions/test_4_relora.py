"""Lesson 4, solutions: ReLoRA in a line; moments of A alone; B alone."""

import pytest
import torch

import train
from config import load_config
from data import TokenDataset
from hub.packing import write_shards
from model import PicoDecoder
from relora import ReLoRALinear, apply_relora, merge_and_reinit, relora_layers, reset_optimizer

# ---- exercise 1 --------------------------------------------------------------------------------------------------

def relora_by_hand(W, factors, s):
    """W (out, in) after a cycle for each (A (r, in), B (out, r))."""
    return W + s * sum(B @ A for A, B in factors)


def test_updates_of_rank_r_add_up():
    W, x = torch.randn(16, 24, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    factors = [(torch.randn(3, 24, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)) for _ in range(7)]
    for cycles in range(1, 8):
        merged = relora_by_hand(W, factors[:cycles], 2)
        parts = x @ W.T + sum(2 * (x @ A.T) @ B.T for A, B in factors[:cycles])
        torch.testing.assert_close(x @ merged.T, parts)
        assert torch.linalg.matrix_rank(merged - W) == min(3 * cycles, 16)


# ---- exercise 2 --------------------------------------------------------------------------------------------------

CYCLE = 12


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder, ids = tmp_path_factory.mktemp("rows"), torch.arange(65 * 400).view(400, 65)
    write_shards(folder / "train", (ids * ids % 97).numpy(), 257, "a test")
    return TokenDataset(folder, "train")


def at_a_merge(rows, reset):
    """Share of B's entries that move with the gradient at the first update after a merge whose rate is above 0."""
    options = [f"model.relora.reset_frequency={CYCLE}", "training.optimization.lr_warmup_steps=4"]
    state = train.make_state(load_config("docs/course/course.yaml", options), torch.device("cpu"))

    def batch():
        return [(0, torch.from_numpy(rows.batch(state.step, 8)).long())]
    for _ in range(CYCLE):
        train.set_learning_rate(state.optimizers, state.step, state.cfg.training, state.cfg.model.relora)
        train.train_step(state, batch())
    merge_and_reinit(state.model, seed=42, step=state.step)
    reset(state)
    for _ in range(2):  # the first has rate 0
        train.set_learning_rate(state.optimizers, state.step, state.cfg.training, state.cfg.model.relora)
        loss = train.accumulate(state, batch())
        gradients = {name: layer.lora_B.grad.clone() for name, layer in relora_layers(state.model).items()}
        train.update(state, loss)
        state.step += 1
    layers = relora_layers(state.model).items()
    return torch.cat([(layer.lora_B * gradients[name] > 0).flatten() for name, layer in layers]).float().mean().item()


def reset_a_only(state):
    for layer in relora_layers(state.model).values():
        for moment in state.optimizers[0].state[layer.lora_A].values():
            moment.zero_()


def test_moments_of_b_that_stay_send_it_up_the_hill(rows):
    """B's old average points where the old B should have gone; the fresh one follows the gradients of two updates."""
    both = at_a_merge(rows, lambda state: reset_optimizer(state.optimizers, state.model, seed=42, step=state.step))
    alone = at_a_merge(rows, reset_a_only)
    assert both < 0.2 < alone


# ---- exercise 3 --------------------------------------------------------------------------------------------------

class FrozenA(ReLoRALinear):
    """A is drawn and stays: half the parameters. A cycle still adds r ranks, but in r directions of x drawn by chance."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lora_A.requires_grad_(False)


def test_frozen_a():
    cfg, ids = load_config("docs/course/course.yaml").model, torch.randint(0, 256, (2, 20))
    trained = {}
    for kind in (ReLoRALinear, FrozenA):
        model = PicoDecoder(cfg)
        apply_relora(model, cfg.relora, layer_type=kind)
        trained[kind] = sum(p.numel() for layer in relora_layers(model).values() for p in layer.parameters() if p.requires_grad)
    assert trained[FrozenA] == sum(layer.lora_B.numel() for layer in relora_layers(model).values()) < trained[ReLoRALinear]
    model(ids[:, :-1], ids[:, 1:]).backward()
    for layer in relora_layers(model).values():
        assert layer.lora_A.grad is None and layer.lora_B.grad.any()
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    with torch.no_grad():
        before = model(ids)
    old = {name: (layer.weight.clone(), layer.lora_A.clone()) for name, layer in relora_layers(model).items()}
    merge_and_reinit(model, seed=42, step=5)
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-5)
    for name, layer in relora_layers(model).items():
        W, A = old[name]
        assert torch.linalg.matrix_rank((layer.weight - W).double(), atol=1e-4) == cfg.relora.r
        assert not torch.equal(layer.lora_A, A)
