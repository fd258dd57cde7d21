"""The reference's faults, each by name: what it does, and that nothing of it is there where it is not asked for."""

import math

import pytest
import torch
from test_relora import LR, is_adapter, logits, make, merge, moments, reset, trained, update, values

from config import ReLoRAConfig
from instruments.faults import layer_type, merge_delay, undo_reset
from relora import ReLoRALinear, relora_layers


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


def test_a_late_merge_is_one_step_late():
    assert merge_delay(ReLoRAConfig(["x"], 5, reference_faults=["late_merge"])) == 1
    assert merge_delay(ReLoRAConfig(["x"], 5)) == merge_delay(None) == 0


def test_without_faults_the_layer_is_the_layer():
    late = ReLoRAConfig(["x"], 5, reference_faults=["late_merge"])
    assert layer_type(ReLoRAConfig(["x"], 5)) is layer_type(None) is layer_type(late) is ReLoRALinear


@pytest.mark.parametrize("faults", [[], ["kept_scaling"]])
def test_the_reference_leaves_the_moments_of_a_trainable_scaling_alone(faults):
    lab = trained(trainable_scaling=True, optimizer_reset={"mode": "zero"}, reference_faults=faults)
    merge(lab), reset(lab)
    for name, state in moments(lab).items():
        if name.endswith("scaling"):
            assert state["exp_avg"].any() == state["exp_avg_sq"].any() == bool(state["step"]) == bool(faults), name
        elif is_adapter(name):
            assert not state["exp_avg"].any() and not state["step"]


@pytest.mark.parametrize("faults", [[], ["pruned_apart"]])
def test_moments_pruned_apart_leave_first_moments_without_a_second(faults):
    lab = trained(optimizer_reset={"mode": "random", "ratio": 0.5}, reference_faults=faults)
    merge(lab), reset(lab)
    for name, state in moments(lab).items():
        if is_adapter(name):
            first, second = state["exp_avg"] != 0, state["exp_avg_sq"] != 0
            count = round(0.5 * first.numel())
            assert (~first).sum() >= count and (~second).sum() >= count
            assert bool((first & ~second).any()) == bool(faults), name
