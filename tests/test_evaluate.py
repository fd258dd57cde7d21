"""Evaluation on held-out rows: torch's own cross-entropy, the metrics by hand, the same on any ranks."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lab
from config import config_from_dict
from data import TokenDataset
from evaluate import row_losses, rows_metrics
from export import load_decoder
from model import PicoDecoder
from relora import apply_relora, relora_layers

CPU = torch.device("cpu")
NO_SNAPSHOTS = "checkpointing.learning_dynamics=null"


@pytest.fixture(params=["full-rank", "relora"])
def model(request, dataset):
    cfg = config_from_dict(lab.tiny_tree(dataset, "runs", relora=request.param == "relora"))
    model = PicoDecoder(cfg.model)
    if cfg.model.relora:
        apply_relora(model, cfg.model.relora)
    for layer in relora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.train()  # dropout is on, and an evaluation must not see it


@pytest.fixture
def rows(dataset):
    return TokenDataset(dataset, "val").rows(0, 12)


def test_losses_are_torchs_cross_entropy_summed_over_each_row(model, rows):
    ids = torch.from_numpy(rows.astype("int64"))
    found = row_losses(model, rows, 5, CPU)
    with torch.no_grad():
        logits = model.double().eval()(ids[:, :-1]).double()
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(12, 16).sum(1)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_the_batch_size_does_not_matter(model, rows, size):
    np.testing.assert_allclose(row_losses(model, rows, size, CPU), row_losses(model, rows, 3, CPU), rtol=1e-6)


def test_an_evaluation_leaves_no_trace(model, rows):
    before = torch.get_rng_state()
    row_losses(model, rows, 5, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tokens", [2, 3, 16])
def test_rows_as_short_as_two_tokens_are_scored(model, rows, tokens):
    found = row_losses(model, rows[:, :tokens], 5, CPU)
    assert found.shape == (12,) and np.isfinite(found).all() and (found > 0).all()


def test_metrics_are_the_formulas_of_the_papers():
    """Two rows of 4 labels, of 1 and 3 nats a token: perplexity over tokens exp(2), by row (e + e^3) / 2."""
    found = rows_metrics(np.array([4.0, 12.0]), 4)
    expected = {"loss": 2.0, "perplexity": math.exp(2), "mean_row_perplexity": (math.e + math.exp(3)) / 2}
    assert found == pytest.approx(expected)


def test_one_bad_row_explodes_only_the_mean_over_rows():
    found = rows_metrics(np.array([10.0] * 9 + [300.0]), 10)
    assert found["perplexity"] == pytest.approx(math.exp(3.9))
    assert found["mean_row_perplexity"] == pytest.approx((9 * math.e + math.exp(30)) / 10)


def test_a_diverged_model_is_scored_without_overflow():
    assert all(math.isfinite(value) for value in rows_metrics(np.array([1e6, 1e6]), 4).values())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("key", ["eval/val_loss", "eval/val_mean_row_perplexity"])
def test_two_ranks_score_as_one_does(worlds, strategy, key):
    found, expected = worlds.metrics(strategy, key), worlds.metrics("single", key)
    assert list(found) == [0, 5, 10, 15, 20]
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-6)


def test_the_losses_of_a_run_are_those_of_the_checkpoint_and_kept_beside_it(worlds, rows):
    losses = row_losses(load_decoder(worlds.folder / "single/checkpoints/step_15"), rows, 4, CPU)
    assert worlds.metrics("single", "eval/val_loss")[15] == pytest.approx(losses.sum() / (12 * 16), rel=1e-5)
    kept = json.loads((worlds.folder / "single/eval_results/step_15.json").read_text())
    assert kept["val"]["loss"] == worlds.metrics("single", "eval/val_loss")[15]


@pytest.mark.parametrize(("words", "key", "fix"), [
    ([NO_SNAPSHOTS, "evaluation.metrics=[val]"], "evaluation.metrics", "null"),
    (["evaluation.metrics=null"], "checkpointing.learning_dynamics.eval_data", "null"),
    ([NO_SNAPSHOTS, "evaluation.metrics=[paloma]", "evaluation.paloma.dataset_name=no/folder/here"],
     "evaluation.paloma.dataset_name", "shards.py")], ids=["val", "eval_data", "paloma"])
def test_missing_evaluation_data_is_an_error_at_the_start(dataset, tmp_path, words, key, fix):
    without_val = tmp_path / "without_val"
    shutil.copytree(dataset / "train", without_val / "train")
    printed = lab.Lab(tmp_path, without_val).train("run", *words, code=2)
    assert printed.count("error: ") == 1 and key in printed and fix in printed and "Traceback" not in printed
    assert not list(tmp_path.rglob("step_*")), "nothing was trained"


def test_rows_longer_than_the_model_reads_are_cut(dataset, tmp_path):
    long = lab.make_dataset(tmp_path / "long", rows=2, row_length=40, val_rows=3)
    runs = lab.Lab(tmp_path, dataset)
    runs.train("run", "evaluation.metrics=[paloma]", f"evaluation.paloma.dataset_name={long}", "training.max_steps=1",
               f"checkpointing.learning_dynamics.eval_data={long}")
    expected = torch.from_numpy(TokenDataset(long, "val").rows(0, 3)[:, :17].astype("int64"))
    folder = tmp_path / "run/checkpoints/step_0"
    assert torch.equal(torch.load(folder / "learning_dynamics/val_data.pt")["input_ids"], expected)
    losses = row_losses(load_decoder(folder), expected.numpy(), 4, CPU)
    assert runs.metrics("run", "eval/paloma_loss")[0] == pytest.approx(losses.sum() / (3 * 16), rel=1e-5)
