"""ReLoRA's layer, merge, optimizer reset and schedules against DESIGN.md and FACTS.md, written out in float64."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from config import ConfigError, ModelConfig, ReLoRAConfig, config_from_dict
from hub.llama import plain_state
from instruments import faults
from model import PicoDecoder
from optim import make_optimizers
from relora import ReLoRALinear, apply_relora, merge_and_reinit, merge_due, relora_layers, reset_optimizer

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
    apply_relora(model, cfg.model.relora, 42, faults.layer_type(cfg.model.relora))
    optimizers = make_optimizers(model, cfg.training.optimization)
    return SimpleNamespace(cfg=cfg, model=model, optimizers=optimizers, ids=torch.randint(64, (8, 16)))


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
def test_the_plain_state_has_the_effective_weights(changes):
    lab = trained(**changes)
    state = lab.model.state_dict()
    plain = plain_state(state, lab.cfg.model)
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
    fresh.optimizers = make_optimizers(fresh.model, fresh.cfg.training.optimization)
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


def test_state_that_a_reset_cannot_prune_is_refused_and_named():
    """As that of a factored optimizer, of which `random` would prune nothing."""
    lab = trained(optimizer_reset={"mode": "random"})
    for state in lab.optimizers[0].state.values():
        state["row_var"] = torch.ones(3)
    with pytest.raises(ConfigError, match=r"'row_var' of layers.0.attention.q_proj.lora_A has the shape \(3,\)"):
        reset(lab)


# ---- when ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("F, W, warm, lora_only", list(itertools.product((1, 3, 5), (0, 4, 5, 7), (0, 5, 6), (False, True))))
def test_merges_are_due_as_designed(F, W, warm, lora_only):
    relora = ReLoRAConfig(["x"], F, warm_start_steps=warm, lora_only=lora_only)
    due = {k * F for k in range(1, 41) if k * F >= W and k * F > warm and not lora_only}
    assert [t for t in range(40) if merge_due(t, relora, W)] == [t for t in range(40) if t in due]
    assert not any(merge_due(t, None, W) for t in range(40))  # without ReLoRA
