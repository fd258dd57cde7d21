"""Snapshots of learning dynamics: the numbers that autograd and a hand-written forward give, on any ranks."""

import copy
import errno
import gc
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

import lab
from checkpoint import extend, read_manifest, torch_writer, verify
from config import ConfigError, LearningDynamicsConfig, config_from_dict
from data import TokenDataset
from hub.llama import plain_state
from instruments import snapshots
from model import PicoDecoder
from relora import apply_relora, relora_layers
from runtime import kernels

SUFFIXES = ["attention.v_proj", "attention.o_proj", "swiglu.w_2"]
LAYERS = [f"layers.{i}.{suffix}" for i in range(2) for suffix in SUFFIXES]
KINDS = ("full-rank", "relora", "trainable_scaling", "lora_only")


def make(kind, dataset):
    """(model, its config, its plain merged copy in float64, token rows)."""
    words = [f"model.relora.{kind}=true"] if kind in ("trainable_scaling", "lora_only") else []
    cfg = config_from_dict(lab.tiny_tree(dataset, "runs", relora=kind != "full-rank"), words)
    model = PicoDecoder(cfg.model)
    if cfg.model.relora:
        apply_relora(model, cfg.model.relora)
    for layer in relora_layers(model).values():  # as in the middle of a cycle
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        if layer.scaling is not None:
            torch.nn.init.uniform_(layer.scaling, 0.2, 0.9)
    plain = PicoDecoder(cfg.model)
    plain.load_state_dict(plain_state(model.state_dict(), cfg.model))
    return model, cfg, plain, TokenDataset(dataset).rows(0, 7)


@pytest.fixture(params=KINDS)
def made(request, dataset):
    return make(request.param, dataset)


def snapshot(model, rows, **options):
    options = LearningDynamicsConfig(layer_suffixes=SUFFIXES, **options)
    return snapshots.snapshot(model, rows, options, torch.device("cpu"))


def ids_of(rows):
    return torch.from_numpy(rows.astype("int64"))


def gradients_of(model, rows):
    """Autograd's gradients of the mean loss, with dropout off; `.grad` stays as it is."""
    ids = ids_of(rows)
    model = copy.deepcopy(model).eval().requires_grad_(True)
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def outputs_of(plain, ids):
    """{layer: output (B, T, out)} of a plain decoder, written anew in float64: no hooks, no modules."""
    cfg, w = plain.cfg, {name: tensor.double() for name, tensor in plain.state_dict().items()}
    B, T = ids.shape
    H, K, size = cfg.attention_n_heads, cfg.attention_n_kv_heads, cfg.d_model // cfg.attention_n_heads

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * w[f"{name}.weight"]

    def heads(x, count):
        return x.view(B, T, count, size).transpose(1, 2)

    def rotate(x):
        angles = torch.arange(T)[:, None] * cfg.position_emb_theta ** (-torch.arange(0, size, 2).double() / size)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    found, x = {}, w["embedding_proj.weight"][ids]
    for i in range(cfg.n_layers):
        name = f"layers.{i}"
        h = norm(x, f"{name}.attention_norm")
        q, k, v = (h @ w[f"{name}.attention.{leaf}_proj.weight"].T for leaf in "qkv")
        found[f"{name}.attention.v_proj"] = v
        q, k, v = rotate(heads(q, H)), *(t.repeat_interleave(H // K, 1) for t in (rotate(heads(k, K)), heads(v, K)))
        scores = (q @ k.transpose(-1, -2) / size ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        found[f"{name}.attention.entropy"] = torch.special.entr(scores.softmax(-1)).sum(-1).transpose(1, 2)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        found[f"{name}.attention.o_proj"] = y @ w[f"{name}.attention.o_proj.weight"].T
        x = x + found[f"{name}.attention.o_proj"]
        h = norm(x, f"{name}.swiglu_norm")
        gate, up = (h @ w[f"{name}.swiglu.{leaf}.weight"].T for leaf in ("w_0", "w_1"))
        found[f"{name}.swiglu.w_2"] = (gate * gate.sigmoid() * up) @ w[f"{name}.swiglu.w_2.weight"].T
        found[f"{name}.residual"] = x = x + found[f"{name}.swiglu.w_2"]
    return found


def assert_close(found, expected, relative):
    assert (found - expected).abs().max() <= relative * expected.abs().max()


# ---- the numbers ---------------------------------------------------------------------------------------------

def test_gradients_are_those_of_the_merged_unfrozen_model(made):
    model, _, plain, rows = made
    found, expected = snapshot(model, rows)["gradients"], gradients_of(plain, rows)
    for name in LAYERS:
        assert_close(found[name], expected[f"{name}.weight"], 1e-5)
        assert found[name].abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS[1:])
def test_gradients_of_the_factors_are_autograds_own(kind, dataset):
    model, _, _, rows = make(kind, dataset)
    found, expected = snapshot(model, rows)["gradients"], gradients_of(model, rows)
    for name in LAYERS:
        for leaf in ("lora_A", "lora_B"):
            assert_close(found[f"{name}.{leaf}"], expected[f"{name}.{leaf}"], 1e-5)


def test_weights_are_the_effective_ones_with_their_parts_beside(made):
    model, cfg, plain, rows = made
    found, state = snapshot(model, rows)["weights"], model.state_dict()
    for name in LAYERS:
        torch.testing.assert_close(found[name], plain.state_dict()[f"{name}.weight"])
        parts = {"base": "weight", "lora_A": "lora_A", "lora_B": "lora_B"} if cfg.model.relora else {}
        present = {part: leaf for part, leaf in parts.items() if f"{name}.{leaf}" in state}
        assert {key.removeprefix(f"{name}.") for key in found if key.startswith(f"{name}.")} == set(present)
        assert all(torch.equal(found[f"{name}.{part}"], state[f"{name}.{leaf}"]) for part, leaf in present.items())


@pytest.mark.parametrize("position", [-1, 5])
def test_activations_are_those_of_a_forward_by_hand(made, position):
    model, _, plain, rows = made
    found = snapshot(model, rows, sequence_idx=position)["activations"]
    expected = outputs_of(plain, ids_of(rows)[:, :-1])
    assert list(found) == LAYERS
    for name in LAYERS:
        assert_close(found[name], expected[name][:, position], 1e-5)


def test_several_positions_are_rows_of_each_example_in_turn(made):
    model, _, _, rows = made
    found = snapshot(model, rows, sequence_idx=[3, -1, 0])["activations"]
    for name in LAYERS:
        alone = [snapshot(model, rows, sequence_idx=position)["activations"][name] for position in (3, -1, 0)]
        assert torch.equal(found[name], torch.stack(alone, 1).flatten(0, 1))


def test_the_residual_stream_and_the_entropy_of_attention_are_those_by_hand(dataset):
    model, cfg, plain, rows = make("relora", dataset)
    options = LearningDynamicsConfig(layer_suffixes=["residual", "attention.entropy", "swiglu.w_2"], sequence_idx=[0, 5])
    found = snapshots.snapshot(model, rows, options, torch.device("cpu"))
    assert set(found["activations"]) == set(snapshots.widths(model, options.layer_suffixes))
    assert not any("residual" in name or "entropy" in name for kind in ("weights", "gradients") for name in found[kind])
    expected = outputs_of(plain, ids_of(rows)[:, :-1])
    for name in (f"layers.{layer}.{kind}" for layer in range(cfg.model.n_layers) for kind in ("residual", "attention.entropy")):
        kept = found["activations"][name].unflatten(0, (len(rows), 2))
        assert_close(kept, expected[name][:, [0, 5]], 1e-5)
        assert kept[:, 1].abs().max() > 0.1 and (kept[:, 0].abs().max() == 0) == ("entropy" in name)  # the first sees itself alone


def test_the_entropy_of_another_attention_is_refused(dataset, monkeypatch):
    model, _, _, rows = make("full-rank", dataset)
    monkeypatch.setattr(kernels, "causal_attention", lambda q, k, v, real=kernels.causal_attention: real(2 * q, k, v))
    with pytest.raises(ConfigError, match="attention.entropy is of softmax"):
        snapshots.snapshot(model, rows, LearningDynamicsConfig(layer_suffixes=["attention.entropy"]), torch.device("cpu"))


@pytest.mark.parametrize("size", [1, 3])
def test_the_size_of_the_sub_batches_does_not_matter(made, size):
    model, _, _, rows = made
    some, whole = snapshot(model, rows, batch_size=size), snapshot(model, rows, batch_size=7)
    for kind in ("activations", "gradients", "weights"):
        assert some[kind].keys() == whole[kind].keys()
        for name in whole[kind]:
            torch.testing.assert_close(some[kind][name], whole[kind][name], atol=1e-6, rtol=1e-6)
    assert torch.equal(some["data"]["input_ids"], ids_of(rows))


def living_tensors() -> dict[int, torch.Tensor]:
    gc.collect()
    return {id(thing): thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)}


@pytest.mark.parametrize("training", [True, False])
def test_a_snapshot_leaves_no_trace(made, training):
    model, _, _, rows = made
    model.train(training)
    ids = ids_of(rows)
    model(ids[:, :-1], ids[:, 1:]).backward()
    grads = {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    snapshot(model, rows)
    before = living_tensors()  # kept alive here, so that no number is given out twice
    snapshot(model, rows)
    assert living_tensors().keys() <= before.keys()
    assert torch.equal(torch.get_rng_state(), random)
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for name, p in model.named_parameters():
        assert p.grad is None if grads[name] is None else torch.equal(p.grad, grads[name])
    assert not any(module._forward_hooks for module in model.modules())


# ---- the files of a run --------------------------------------------------------------------------------------

def load(worlds, name, step, split, kind):
    return torch.load(worlds.folder / name / f"checkpoints/step_{step}/learning_dynamics/{split}_{kind}.pt")


@pytest.mark.parametrize(("split", "examples"), [("train", 8), ("val", 12)])
def test_files_are_as_pico_analyze_reads_them(worlds, split, examples):
    outs = {"attention.v_proj": (16, 32), "attention.o_proj": (32, 32), "swiglu.w_2": (32, 64)}
    activations, weights, gradients = (load(worlds, "single", 10, split, kind)
                                       for kind in ("activations", "weights", "gradients"))
    assert sorted(activations) == sorted(LAYERS)
    for name in LAYERS:
        shape = outs[name.split(".", 2)[2]]
        assert activations[name].shape == (examples, shape[0])
        assert weights[name].shape == gradients[name].shape == shape
    tensors = [*activations.items(), *weights.items(), *gradients.items()]
    assert all(name.startswith("layers.") and t.dtype == torch.float32 and t.isfinite().all() for name, t in tensors)


def test_the_weights_of_both_splits_take_their_room_once(worlds, tmp_path, monkeypatch):
    """Two names of one file; what a copy, pruning and the manifest see are whole files, as where there are no links."""
    step = worlds.folder / "single/checkpoints/step_10"
    folder = step / "learning_dynamics"
    names = ["train_weights.pt", "val_weights.pt"]
    assert (folder / names[0]).samefile(folder / names[1]) and (folder / names[0]).stat().st_nlink == 2
    assert not (folder / "train_gradients.pt").samefile(folder / "val_gradients.pt")
    verify(step)
    shutil.copytree(step, tmp_path / "step_10")
    verify(tmp_path / "step_10")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    extend(tmp_path / "step_10", {f"again/{name}": torch_writer(torch.load(folder / name)) for name in names})
    entries = read_manifest(tmp_path / "step_10")
    assert len({entries[f"again/{name}"]["sha256"] for name in names}) == 1
    assert not (tmp_path / "step_10/again" / names[0]).samefile(tmp_path / "step_10/again" / names[1])
    assert not list((tmp_path / "step_10").rglob(".staging-*"))


@pytest.mark.parametrize("step", [0, 10])
def test_the_train_snapshot_is_taken_on_the_batch_that_comes_next(worlds, dataset, step):
    train, val = (load(worlds, "single", step, split, "data")["input_ids"] for split in ("train", "val"))
    assert torch.equal(train, ids_of(TokenDataset(dataset).rows(step * 8, 8)))
    assert torch.equal(val, ids_of(TokenDataset(dataset, "val").rows(0, 12)))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("split", ["train", "val"])  # val: three sub-batches, which two ranks cannot share evenly
def test_two_ranks_take_the_snapshot_of_one(worlds, strategy, split):
    for step in (0, 5):
        for kind in ("activations", "weights", "gradients", "data"):
            found, expected = load(worlds, strategy, step, split, kind), load(worlds, "single", step, split, kind)
            assert list(found) == list(expected)
            assert found.pop("text", None) == expected.pop("text", None)
            for name in expected:
                assert_close(found[name], expected[name], 1e-5)


def test_a_snapshot_keeps_its_position_of_each_row_and_no_others(dataset):
    """A view of a layer's output would keep all of it alive: 128 positions for one."""
    model, cfg, _, rows = make("full-rank", dataset)
    found = snapshot(model, rows, sequence_idx=3)["activations"]
    for tensor in found.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
