"""Schedules and optimizers against the formulas of FACTS.md, written out."""

import math

import pytest
import torch
from torch import nn

from config import Config, ConfigError, OptimizationConfig, ReLoRAConfig
from model import PicoDecoder
from optim import OPTIMIZERS, SCHEDULES, learning_rate_multiplier, make_optimizers
from relora import merge_due


def schedule(W=0, T=1000, R=0, F=100, m=0.1, kind="relora_jagged_cosine", decay=0.2):
    cfg = Config()
    cfg.model.relora = ReLoRAConfig(["x"], F)
    o = cfg.training.optimization
    cfg.training.max_steps, o.lr_scheduler, o.lr_warmup_steps, o.restart_warmup_steps, o.min_lr_ratio = T, kind, W, R, m
    o.decay_share = decay
    return cfg


def multiplier(step, cfg):
    return learning_rate_multiplier(step, cfg.training, cfg.model.relora)


RUNS = [(100, 20, 200, 0.1), (0, 10, 150, 0.1), (200, 50, 200, 0.05), (7, 1, 13, 1.0), (250, 40, 100, 0.3),
        (1000, 20, 200, 0.1), (1500, 20, 200, 0.1), (30, 200, 200, 0.1), (30, 350, 200, 0.1), (999, 5, 333, 0.1)]


@pytest.mark.parametrize("W, R, F, m", RUNS)  # warm-up, restart warm-up, reset frequency, floor
def test_every_step_of_every_schedule_is_the_published_formula(W, R, F, m):
    T = 1000

    def c(p):
        return m + (1 - m) * 0.5 * (1 + math.cos(math.pi * p))

    def p(t):
        return (t - W) / max(1, T - W)

    for t in range(T + 1):
        k, u = divmod(t, F)
        after = {"linear_with_warmup": max(0, (T - t) / max(1, T - W)), "cosine_with_warmup": c(p(t)),
                 "constant_with_warmup": 1,
                 "relora_jagged_cosine": u / max(1, R) * c(p(k * F + R)) if t >= F and u < R else c(p(t))}
        for kind, expected in after.items():
            got = multiplier(t, schedule(W, T, R, F, m, kind))
            assert got == pytest.approx(t / max(1, W) if t < W else expected, abs=1e-12), (kind, t)


@pytest.mark.parametrize("kind, t, expected", [
    *((kind, t, t / 100) for kind in ("linear_with_warmup", "relora_jagged_cosine") for t in (0, 1, 50, 99, 100)),
    ("linear_with_warmup", 600, 0.5), ("linear_with_warmup", 1100, 0.0), ("linear_with_warmup", 1200, 0.0),
    *(("relora_jagged_cosine", t, expected) for t, expected in (
        (599, 0.5514137), (600, 0), (610, 0.2608721), (619, 0.4956571), (620, 0.5217443))),  # c(.499), 0 ... c(.52)
    ("cosine_with_warmup", 600, 0.55), ("cosine_with_warmup", 1100, 0.1), ("constant_with_warmup", 1099, 1.0)])
def test_values_at_the_boundaries(kind, t, expected):
    assert multiplier(t, schedule(100, 1100, 20, 200, 0.1, kind)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("W, R, F, m", RUNS)
def test_the_jagged_schedule_is_zero_exactly_at_the_start_and_at_merges(W, R, F, m):
    cfg = schedule(W, 1000, R, F, m)
    zero = {t for t in range(1000) if multiplier(t, cfg) == 0}
    assert zero - {0} == {t for t in range(1000) if merge_due(t, cfg.model.relora, W)} and (0 in zero) == (W > 0)


@pytest.mark.parametrize("W, T, m, decay", [(100, 1000, 0.1, 0.2), (0, 1000, 0.0, 0.5), (10, 1000, 0.3, 0.0),
                                            (10, 1000, 0.0, 1.0),
                                            (3, 7, 0.1, 0.3)])
def test_wsd_is_constant_and_then_falls_to_its_floor(W, T, m, decay):
    D = round(decay * T)
    for t in range(T + 5):
        fall = 1 - (1 - m) * min(max(0, t - (T - D)), D) / D if D else 1
        found = multiplier(t, schedule(W, T, m=m, kind="wsd", decay=decay))
        assert found == pytest.approx(t / W if t < W else fall, abs=1e-12), t


def test_names_that_no_table_holds_are_refused_not_guessed():
    cfg = Config()
    cfg.training.optimization.lr_scheduler = "cosine"
    with pytest.raises(ConfigError, match="lr_scheduler: 'cosine' is none of linear_with_warmup"):
        multiplier(5000, cfg)
    cfg.training.optimization.optimizer = "lion"
    with pytest.raises(ConfigError, match="optimizer: 'lion' is none of adamw"):
        make_optimizers(torch.nn.Linear(2, 2), cfg.training.optimization)


def test_every_choice_of_the_configuration_stands_in_a_table():
    from typing import get_args, get_type_hints

    from config import OptimizationConfig
    hints = get_type_hints(OptimizationConfig)
    assert set(get_args(hints["optimizer"])) == set(OPTIMIZERS) and set(get_args(hints["lr_scheduler"])) == set(SCHEDULES)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_an_optimizer_takes_every_trainable_parameter_once(name):
    cfg = Config()
    cfg.model.d_model, cfg.model.n_layers, cfg.model.vocab_size, cfg.model.activation_hidden_dim = 24, 2, 64, 32
    cfg.training.optimization.optimizer = name
    model = PicoDecoder(cfg.model)
    model.output_norm.weight.requires_grad_(False)
    taken = [p for o in make_optimizers(model, cfg.training.optimization) for group in o.param_groups for p in group["params"]]
    assert len(taken) == len(set(taken)) and set(taken) == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no muon here")
def test_muon_skips_an_update_on_the_device_and_otherwise_is_torchs():
    cfg = OptimizationConfig(optimizer="muon", lr=0.1)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 4, bias=False)]), "head": nn.Linear(4, 2)})
    weight, plain = model["layers"][0].weight, nn.Parameter(model["layers"][0].weight.detach().clone())
    ours = next(o for o in make_optimizers(model, cfg) if isinstance(o, torch.optim.Muon))
    theirs = torch.optim.Muon([plain], lr=0.1, weight_decay=cfg.weight_decay, momentum=cfg.momentum,
                              adjust_lr_fn="match_rms_adamw")
    for bad in (1.0, 0.0, 1.0, 0.0):  # also the first
        gradient = torch.randn(4, 6)
        weight.grad, ours.found_inf = gradient * (float("nan") if bad else 1.0), torch.tensor(bad)
        ours.step()
        if not bad:
            plain.grad = gradient
            theirs.step()
        assert torch.equal(weight, plain)
        expected = theirs.state[plain].get("momentum_buffer", torch.zeros(4, 6))
        assert torch.equal(ours.state[weight]["momentum_buffer"], expected)
