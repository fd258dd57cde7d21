"""ReLoRA's layer, merge, optimizer reset and schedules against DESIGN.md and FACTS.md, written out in float64."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from config import Config, ConfigError, ModelConfig, ReLoRAConfig, config_from_dict
from model import PicoDecoder
from relora import (
    ReLoRALinear,
    apply_relora,
    learning_rate_multiplier,
    merge_and_reinit,
    merge_due,
    merged_state,
    relora_layers,
    reset_optimizer,
    undo_reset,
)
from runtime.wrap import make_optimizers

LR = 1e-2
TARGETS = [f"{a}.{b}" for a, names in (("attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
                                       ("swiglu", ("w_0", "w_1", "w_2"))) for b in names]
RESETS = [{"mode": "zero"}, {"mode": "random", "ratio": 0.9}, {"mode": "magnitude", "ratio": 0.7}, {"mode": "none"}]


def make(optimizer="adamw", **relora):
    """A 2-layer GQA decoder with adapters, its configuration, and its optimizers."""
    cfg = config_from_dict({
        "model": {"d_model": 32, "n_layers": 2, "vocab_size": 64, "max_seq_len": 16, "attention_n_heads": 4,
                  "attention_n_kv_heads": 2, "activation_hidden_dim": 64,
                  "relora": {"target_modules": ["attention", "swiglu"], "reset_frequency": 5, "r": 4, "lora_alpha": 12,
                             "lora_dropout": 0.0} | relora},
        "training": {"optimization": {"optimizer": optimizer, "lr": LR}}})
    torch.manual_seed(0)
    model = PicoDecoder(cfg.model)
    apply_relora(model, cfg.model.relora, seed=42)
    return SimpleNamespace(cfg=cfg, model=model, optimizers=make_optimizers(model, cfg), ids=torch.randint(64, (8, 16)))


def update(lab, n=1):
    """n optimizer steps; returns each parameter's last gradient, and leaves none."""
    for _ in range(n):
        lab.model(lab.ids[:, :-1], lab.ids[:, 1:]).backward()
        gradients = {name: p.grad for name, p in lab.model.named_parameters()}
        for optimizer in lab.optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return gradients


def merge(lab, step=5):
    return merge_and_reinit(lab.model, seed=42, step=step)


def reset(lab, step=5):
    return reset_optimizer(lab.optimizers, lab.model, seed=42, step=step)


def trained(updates=5, **options):
    lab = make(**options)
    update(lab, updates)
    return lab


@torch.no_grad()
def logits(lab):
    return lab.model(lab.ids)


def values(lab):
    return {n: p.detach().clone() for n, p in lab.model.named_parameters()}


def moments(lab):
    """{parameter: {key: copy}} of all optimizers' state."""
    names = {id(p): n for n, p in lab.model.named_parameters()}
    return {names[id(p)]: {k: v.clone() for k, v in state.items()}
            for optimizer in lab.optimizers for p, state in optimizer.state.items()}


def is_adapter(name):
    return name.endswith(("lora_A", "lora_B", "scaling"))


def single(linear=None, r=4, **changes):
    return ReLoRALinear(linear or nn.Linear(12, 20, bias=False), ReLoRAConfig(["x"], 5, r=r, **changes), "x", seed=42)


# ---- the layer and its places --------------------------------------------------------------------------------

@pytest.mark.parametrize("D, count, trainable", [(96, 11_682_144, 10_060_128), (384, 66_192_768, 40_240_512)])
def test_published_sizes(D, count, trainable):
    with torch.device("meta"):
        model = PicoDecoder(ModelConfig(d_model=D, activation_hidden_dim=4 * D))
    apply_relora(model, ReLoRAConfig(["attention", "swiglu"], 2000, r=16))
    assert (model.num_parameters(), model.num_parameters(trainable_only=True)) == (count, trainable)


@pytest.mark.parametrize("changes, scale", [({"lora_alpha": 32}, 8.0), ({"lora_alpha": 1}, 0.25),
                                            ({"trainable_scaling": True}, math.tanh(0.3)), ({"lora_only": True}, 8.0)])
def test_forward_is_the_formula(changes, scale):
    layer, x = single(**changes).eval(), torch.randn(3, 5, 12)
    nn.init.normal_(layer.lora_B)
    if changes.get("trainable_scaling"):
        nn.init.constant_(layer.scaling, 0.3)
    A, B = layer.lora_A.double(), layer.lora_B.double()
    W = torch.zeros(20, 12) if changes.get("lora_only") else layer.weight
    expected = x.double() @ W.double().T + scale * (x.double() @ A.T) @ B.T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_on_the_adapters_input_only():
    layer, x = single(nn.Linear(12, 12, bias=False), r=12, lora_alpha=12, lora_dropout=0.25), torch.ones(200, 12)
    nn.init.eye_(layer.lora_A), nn.init.eye_(layer.lora_B)  # the adapter's output is its dropped input
    base = x @ layer.weight.T
    dropped = layer.train()(x) - base
    gone = dropped.abs() < 1e-5
    torch.testing.assert_close(dropped[~gone], torch.full_like(dropped[~gone], 4 / 3), rtol=0, atol=1e-5)
    assert 0.2 < gone.float().mean() < 0.3
    torch.testing.assert_close(layer.eval()(x) - base, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes, weight", [({}, "kept"), ({"keep_original_weights": False}, "zero"),
                                             ({"lora_only": True}, "absent")])
def test_initialisation(changes, weight):
    linear = nn.Linear(12, 400, bias=False)
    layer = single(linear, r=100, **changes)
    assert 0.98 / 12 ** 0.5 < layer.lora_A.abs().max() <= 1 / 12 ** 0.5  # Kaiming-uniform with a = sqrt 5
    if weight == "kept":
        assert torch.equal(layer.weight, linear.weight) and (layer.lora_B == 0).all()
    else:  # B = 0 would be a saddle
        assert layer.weight is None if weight == "absent" else (layer.weight == 0).all()
        assert 0.98 / 10 < layer.lora_B.abs().max() <= 1 / 10


def test_draws_follow_from_seed_step_and_name_alone():
    def drawn(seed, step=0, target="attention", entropy=0):
        lab = make(target_modules=[target])
        torch.manual_seed(entropy)
        torch.rand(entropy)
        model = PicoDecoder(lab.cfg.model)
        rng = torch.get_rng_state()
        apply_relora(model, lab.cfg.model.relora, seed)
        if step:
            merge_and_reinit(model, seed=seed, step=step)
        assert torch.equal(rng, torch.get_rng_state())
        return {name: layer.lora_A for name, layer in relora_layers(model).items()}
    for step in (0, 5):
        first, again = drawn(1, step), drawn(1, step, target="q_proj", entropy=7)
        assert len(again) == 2 and all(torch.equal(first[name], again[name]) for name in again)
    draws = [*drawn(1).values(), *drawn(2).values(), *drawn(1, 5).values(), *drawn(1, 10).values()]
    assert len({tuple(A[0, :4].tolist()) for A in draws}) == len(draws) == 4 * 8


@pytest.mark.parametrize("targets, layers, leaves", [
    (["attention", "swiglu"], (0, 1), TARGETS), (["proj"], (0, 1), TARGETS[:4]), (["1.swiglu"], (1,), TARGETS[4:]),
    (["attention.v_proj", "w_2"], (0, 1), [TARGETS[2], TARGETS[6]])])
def test_targets_match_by_substring(targets, layers, leaves):
    names = [f"layers.{i}.{n}" for i in layers for n in leaves]
    model = make(target_modules=targets).model
    assert list(relora_layers(model)) == names == [n for n, m in model.named_modules() if isinstance(m, ReLoRALinear)]


@pytest.mark.parametrize("targets, named", [(["attention", "swigloo"], "swigloo"), (["norm"], "norm"),
                                            (["de_embedding_proj"], "de_embedding_proj"), (["embedding"], "embedding")])
def test_a_target_that_matches_nothing_is_refused_and_the_head_is_nothing(targets, named):
    with pytest.raises(ConfigError, match=f"target_modules.*'{named}'"):
        make(target_modules=targets)


@pytest.mark.parametrize("changes, leaves", [
    ({}, ("weight", "lora_A", "lora_B")), ({"trainable_scaling": True}, ("weight", "lora_A", "lora_B", "scaling")),
    ({"lora_only": True}, ("lora_A", "lora_B"))])
def test_state_dict_keys_and_what_trains(changes, leaves):
    model = make(**changes).model
    adapted = {f"layers.{i}.{n}.{leaf}" for i in range(2) for n in TARGETS for leaf in leaves}
    others = {f"layers.{i}.{n}_norm.weight" for i in range(2) for n in ("attention", "swiglu")}
    others |= {"embedding_proj.weight", "output_norm.weight", "de_embedding_proj.weight"}
    assert set(model.state_dict()) == adapted | others
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in adapted if n.endswith(".weight")}
    if "scaling" in leaves:
        assert model.layers[0].swiglu.w_1.scaling.tolist() == [1.0]


# ---- merge ---------------------------------------------------------------------------------------------------

MERGES = [{}, {"trainable_scaling": True}, {"lora_alpha": 1.5}, {"r": 7, "lora_alpha": 32}, {"lora_dropout": 0.3},
          {"keep_original_weights": False}]


@pytest.mark.parametrize("changes", MERGES)
def test_a_merge_changes_weights_but_no_logits(changes):
    lab = trained(**changes)
    lab.model.eval()
    old, before = values(lab), logits(lab)
    norm = merge(lab)
    new, after = values(lab), logits(lab)
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    added = [(new[f"{n}.weight"] - old[f"{n}.weight"]).double().norm().item() for n in relora_layers(lab.model)]
    assert len(added) == 14 and min(added) > 0.05 and norm == pytest.approx(math.hypot(*added), rel=1e-4)


@pytest.mark.parametrize("changes", MERGES)
def test_a_merge_starts_adapters_anew_in_place_and_touches_nothing_else(changes):
    lab = trained(**changes)
    places, old = [(id(p), p.data_ptr()) for p in lab.model.parameters()], values(lab)
    merge(lab)
    new = values(lab)
    assert places == [(id(p), p.data_ptr()) for p in lab.model.parameters()]
    for name in relora_layers(lab.model):
        A = new.pop(f"{name}.lora_A")
        assert 0.9 < A.abs().max() * A.size(1) ** 0.5 <= 1 and (A != old[f"{name}.lora_A"]).all()
        assert not new.pop(f"{name}.lora_B").any() and new.pop(f"{name}.scaling", 1) == 1
        assert (new.pop(f"{name}.weight") != old[f"{name}.weight"]).any()
    assert len(new) == 7 and all(torch.equal(value, old[n]) for n, value in new.items())
    once = values(lab)
    assert merge(lab) == 0 and all(torch.equal(value, once[n]) for n, value in values(lab).items())  # B = 0


def test_lora_only_has_nothing_to_merge_into():
    with pytest.raises(ValueError, match="lora_only"):
        merge(make(lora_only=True))


@pytest.mark.parametrize("changes", [{}, {"trainable_scaling": True}, {"lora_only": True, "lora_alpha": 1},
                                     {"keep_original_weights": False}])
def test_the_merged_state_is_the_effective_weight(changes):
    lab = trained(**changes)
    state = lab.model.state_dict()
    plain = merged_state(state, lab.cfg.model.relora)
    whole = PicoDecoder(lab.cfg.model)
    whole.load_state_dict(plain)  # strict: the names of a plain decoder
    assert (whole(lab.ids) - logits(lab)).abs().max() < 1e-4
    for name in relora_layers(lab.model):
        A, B = state[f"{name}.lora_A"].double(), state[f"{name}.lora_B"].double()
        W = state[f"{name}.weight"].double() if f"{name}.weight" in state else 0
        s = changes.get("lora_alpha", 12) / 4
        s = state[f"{name}.scaling"].double().tanh() if "trainable_scaling" in changes else s
        torch.testing.assert_close(plain[f"{name}.weight"].double(), W + s * (B @ A), rtol=1e-5, atol=1e-7)


# ---- what learns, and when -----------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"trainable_scaling": True}, {"keep_original_weights": False}])
def test_every_adapter_learns_from_the_start_and_after_a_merge(changes):
    lab = make(**changes)
    for cycle in range(3):
        first, second = update(lab), update(lab)
        for name in relora_layers(lab.model):
            assert first[f"{name}.lora_B"].any() and second[f"{name}.lora_B"].any(), name
            assert second[f"{name}.lora_A"].any(), name
            assert first[f"{name}.lora_A"].any() == (cycle == 0 and "keep_original_weights" in changes)  # B = 0
        merge(lab, step=2 * cycle + 2), reset(lab)


def test_only_adapters_and_untargeted_parameters_change_between_merges():
    lab = make(target_modules=["attention"])
    for _ in range(2):
        before = values(lab)
        update(lab, 3)
        same = {n for n, value in values(lab).items() if torch.equal(value, before[n])}
        assert same == {f"layers.{i}.{n}.weight" for i in range(2) for n in TARGETS[:4]}
        merge(lab), reset(lab)


# ---- the reference's faults, each by name --------------------------------------------------------------------

@pytest.mark.parametrize("faults", [[], ["dead_adapters"]])
def test_dead_adapters(faults):
    lab = make(reference_faults=faults, trainable_scaling=True)
    for _ in range(3):
        gradients = update(lab)
    alive = {name for name, g in gradients.items() if is_adapter(name) and g.any()}
    assert (len(alive) == 0) if faults else (len(alive) == 3 * 14)
    merge(lab)  # the first reset wakes them
    assert all(g.any() for name, g in update(lab).items() if name.endswith("lora_B"))


@pytest.mark.parametrize("fault", ["unscaled_merge", "undone_reset"])
@pytest.mark.parametrize("scaling", [False, True])
def test_faulty_merges_change_the_logits(fault, scaling):
    lab = trained(reference_faults=[fault], trainable_scaling=scaling)
    old, before = values(lab), logits(lab)
    merge(lab)
    if fault == "undone_reset":
        torch.testing.assert_close(logits(lab), before, rtol=1e-4, atol=1e-5)  # as long as the fresh copies are there
        undo_reset(lab.model)
    assert (logits(lab) - before).abs().max() > 0.01 * before.abs().max()
    for name in relora_layers(lab.model):
        A, B = (old[f"{name}.lora_{x}"].double() for x in "AB")
        scale = math.tanh(old[f"{name}.scaling"]) if scaling else 3
        added = B @ A * (1 if fault == "unscaled_merge" else scale)
        now = {n: p.detach() for n, p in lab.model.get_submodule(name).named_parameters()}
        torch.testing.assert_close(now["weight"].double(), old[f"{name}.weight"].double() + added, rtol=1e-5, atol=1e-6)
        assert torch.equal(now["lora_A"], old[f"{name}.lora_A"]) == (fault == "undone_reset")
        assert torch.equal(now["lora_B"], old[f"{name}.lora_B"]) == (fault == "undone_reset")


def test_an_undone_reset_applies_the_gradient_of_fresh_factors_to_the_old_ones():
    """B wakes up at the update after the first merge, A at the one after that: as in the published runs."""
    lab = make(reference_faults=["dead_adapters", "undone_reset", "unscaled_merge", "late_merge", "kept_adam_step"])
    update(lab, 2)
    merge(lab)
    fresh = values(lab)
    lab.model(lab.ids[:, :-1], lab.ids[:, 1:]).backward()
    undo_reset(lab.model)
    for name, p in lab.model.named_parameters():
        if name.endswith("lora_B"):
            assert p.grad.any() and not p.any()
        if name.endswith("lora_A"):
            assert fresh[name].any() and not p.any() and not p.grad.any()
    for optimizer in lab.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    now = values(lab)
    assert all(now[name].any() == name.endswith("lora_B") for name in now if is_adapter(name))
    gradients = update(lab)
    assert all(g.any() for name, g in gradients.items() if name.endswith("lora_A"))


@pytest.mark.parametrize("faults, size", [([], LR), (["kept_adam_step"], LR * 0.1 / 0.001 ** 0.5)])
def test_a_kept_adam_step_makes_the_first_update_three_times_too_large(faults, size):
    lab = trained(optimizer="adam", reference_faults=faults, optimizer_reset={"mode": "zero"})
    for p, state in lab.optimizers[0].state.items():
        state["step"].fill_(100_000)  # late in a run, where bias correction has faded
    merge(lab), reset(lab)
    gradients = update(lab)
    for name, B in values(lab).items():
        if name.endswith("lora_B"):
            moved = B.abs()[gradients[name].abs() > 1e-4]  # far above eps
            assert len(moved) and (moved - size).abs().max() < 0.01 * size


# ---- the optimizer's reset -----------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
@pytest.mark.parametrize("mode", RESETS, ids=lambda m: m["mode"])
def test_a_reset_zeroes_exactly_its_share_and_nothing_else(optimizer, mode):
    lab = trained(optimizer=optimizer, optimizer_reset=mode, trainable_scaling=True)
    before = moments(lab)
    share = reset(lab)
    zeros = entries = 0
    for name, new in moments(lab).items():
        old = before[name]
        if not is_adapter(name) or mode["mode"] == "none":
            assert all(torch.equal(new[key], old[key]) for key in old)
            entries += sum(v.numel() for v in old.values() if v.dim()) if is_adapter(name) else 0
            continue
        assert new.get("step", 0) == 0
        big = {key: value for key, value in new.items() if key != "step"}
        gone = next(iter(big.values())) == 0
        pruned = gone.numel() if mode["mode"] == "zero" else round(mode["ratio"] * gone.numel())
        for key, value in big.items():
            assert (old[key] != 0).all() and gone.sum() == pruned
            assert torch.equal(value == 0, gone) and torch.equal(value[~gone], old[key][~gone])
        first = next(v for k, v in old.items() if k != "step").abs()
        if mode["mode"] == "magnitude" and not gone.all():
            assert first[~gone].min() >= first[gone].max()
        zeros, entries = zeros + pruned * len(big), entries + gone.numel() * len(big)
    assert entries > 4000 and share == zeros / entries


def test_random_places_follow_from_seed_step_and_name():
    def places(step):
        lab = trained(optimizer_reset={"mode": "random", "ratio": 0.5})
        torch.rand(step)
        reset(lab, step)
        return {n: state["exp_avg"] == 0 for n, state in moments(lab).items() if is_adapter(n)}
    first, again, other = places(5), places(5), places(10)
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first)
    assert not torch.equal(first["layers.0.swiglu.w_0.lora_A"], first["layers.1.swiglu.w_0.lora_A"])


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
def test_after_a_full_reset_the_next_update_is_a_fresh_optimizers(optimizer):
    lab = trained(optimizer=optimizer, optimizer_reset={"mode": "zero"})
    merge(lab), reset(lab)
    fresh = copy.deepcopy(lab)
    fresh.optimizers = make_optimizers(fresh.model, fresh.cfg)
    update(lab), update(fresh)
    expected = values(fresh)
    for name, value in values(lab).items():
        if is_adapter(name):
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", [{"mode": "random"}, {"mode": "random", "ratio": 0.5}, *RESETS[:1], *RESETS[2:3]])
@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_updates_after_a_reset_stay_bounded(mode, optimizer):
    lab = trained(10, optimizer=optimizer, optimizer_reset=mode)
    for _ in range(2):
        merge(lab), reset(lab)
        for _ in range(3):  # a moment that outlived its second moment would be divided by eps alone
            before = values(lab)
            update(lab)
            assert max((p - before[n]).abs().max() for n, p in values(lab).items()) < 5 * LR


# ---- when, and how fast --------------------------------------------------------------------------------------

def schedule(W=0, T=1000, R=0, F=100, m=0.1, kind="relora_jagged_cosine", **relora):
    cfg = Config()
    cfg.model.relora = ReLoRAConfig(["x"], F, **relora)
    o = cfg.training.optimization
    cfg.training.max_steps, o.lr_scheduler, o.lr_warmup_steps, o.restart_warmup_steps, o.min_lr_ratio = T, kind, W, R, m
    return cfg


@pytest.mark.parametrize("F, W, warm, lora_only, late", list(itertools.product(
    (1, 3, 5), (0, 4, 5, 7), (0, 5, 6), (False, True), (False, True))))
def test_merges_are_due_as_designed(F, W, warm, lora_only, late):
    cfg = schedule(W, 40, F=F, warm_start_steps=warm, lora_only=lora_only,
                   reference_faults=["late_merge"] if late else [])
    due = {k * F for k in range(1, 41) if k * F >= W and k * F > warm and not lora_only}
    assert [t for t in range(40) if merge_due(t, cfg)] == [t for t in range(40) if t - late in due]
    assert not any(merge_due(t, Config()) for t in range(40))  # without ReLoRA


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
            got = learning_rate_multiplier(t, schedule(W, T, R, F, m, kind))
            assert got == pytest.approx(t / max(1, W) if t < W else expected, abs=1e-12), (kind, t)


@pytest.mark.parametrize("kind, t, expected", [
    *((kind, t, t / 100) for kind in ("linear_with_warmup", "relora_jagged_cosine") for t in (0, 1, 50, 99, 100)),
    ("linear_with_warmup", 600, 0.5), ("linear_with_warmup", 1100, 0.0), ("linear_with_warmup", 1200, 0.0),
    *(("relora_jagged_cosine", t, expected) for t, expected in (
        (599, 0.5514137), (600, 0), (610, 0.2608721), (619, 0.4956571), (620, 0.5217443))),  # c(.499), 0 ... c(.52)
    ("cosine_with_warmup", 600, 0.55), ("cosine_with_warmup", 1100, 0.1), ("constant_with_warmup", 1099, 1.0)])
def test_values_at_the_boundaries(kind, t, expected):
    assert learning_rate_multiplier(t, schedule(100, 1100, 20, 200, 0.1, kind)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("W, R, F, m", RUNS)
def test_the_jagged_schedule_is_zero_exactly_at_the_start_and_at_merges(W, R, F, m):
    cfg = schedule(W, 1000, R, F, m)
    zero = {t for t in range(1000) if learning_rate_multiplier(t, cfg) == 0}
    assert zero - {0} == {t for t in range(1000) if merge_due(t, cfg)} and (0 in zero) == (W > 0)
