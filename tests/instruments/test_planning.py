"""What `train.py --plan` says, beside what then comes."""

from __future__ import annotations

import re

import pytest
from tokenizers import Tokenizer, models

import lab
from config import config_from_dict
from instruments import planning

REAL = """
import train
from runtime import dist, machine
from runtime.command import command

def main():
    train.main()
    print(f"peak of rank {dist.rank()}: {machine.peak_memory()}", flush=True)

if __name__ == "__main__":
    command(main)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A run whose tensors outweigh torch itself."""
    folder = tmp_path_factory.mktemp("wide")
    dataset = lab.make_dataset(folder / "data", rows=64, row_length=257, vocab=4096)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(4096)}, unk_token="w0")).save(str(dataset / "tokenizer.json"))
    tree = lab.tiny_tree(dataset, folder)
    tree["model"] |= {"d_model": 256, "n_layers": 4, "vocab_size": 4096, "max_seq_len": 256, "activation_hidden_dim": 1024}
    tree["model"]["relora"]["lora_dropout"] = 0.0
    tree["training"]["max_steps"], tree["training"]["optimization"]["lr_scheduler"] = 10, "constant_with_warmup"
    tree["training"]["optimization"]["gradient_accumulation_steps"] = 2
    tree["monitoring"]["logging"]["log_every_n_steps"] = 2
    tree["checkpointing"] |= {"save_every_n_steps": 4, "keep_training_states": 2}
    return folder, tree


def told(text, what):
    return float(re.search(what, text)[1].replace(",", ""))


@pytest.mark.parametrize("relora, ranks", [(True, 2), (False, 0)])
def test_a_plan_is_within_15_percent_of_what_comes(wide, relora, ranks):
    folder, tree = wide
    name = f"{'relora' if relora else 'full'}-{ranks}"
    tree = {**tree, "model": {k: v for k, v in tree["model"].items() if relora or k != "relora"},
            "checkpointing": {**tree["checkpointing"], "run_name": name}}
    config, script = lab.write_config(folder / f"{name}.yaml", tree), folder / "real.py"
    script.write_text(REAL)
    plan = lab.run("train.py", config, "--plan", ranks=ranks)
    assert not (folder / name).exists()
    real = lab.run(script, config, ranks=ranks)
    peaks = [int(peak) for peak in re.findall(r"peak of rank \d+: (\d+)", real)]
    assert told(plan, r"memory +([\d.]+) GB") * 1e9 == pytest.approx(max(peaks), rel=0.15)
    files = [path for path in (folder / name).rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in {path.stat().st_ino: path for path in files}.values())
    assert told(plan, r"disk +([\d.]+) GB") * 1e9 == pytest.approx(written, rel=0.15)
    assert f"10 steps of {8 * 256:,} tokens: {80 * 256:,} tokens" in plan
    parameters, trained = re.search(r"([\d,]+) parameters, ([\d,]+) trainable", real).groups()
    assert f"parameters   {parameters}, of which {trained} train: " in plan


def test_every_kind_of_file_is_counted_as_often_as_it_is_written(wide):
    cfg = config_from_dict(wide[1])
    model, parts = planning.nn.Linear(1, 1), planning.Parts(100, 10, 20)
    assert planning.disk(cfg, model, parts, {}) == {"weights": (4, 100), "training states": (2, 120), "record": (1, 1750)}
    assert planning.disk(cfg, model, parts, {}, first=8)["weights"] == (2, 100)


def test_a_run_that_does_not_fit_the_disk_or_the_memory_is_warned_of(wide, monkeypatch):
    cfg = config_from_dict(wide[1])
    state = planning.nn.Linear(1000, 1000)
    optimizers = [planning.torch.optim.AdamW(state.parameters())]
    cfg.checkpointing.learning_dynamics, cfg.checkpointing.keep_training_states = None, None
    assert list(planning.misfits(cfg, state, optimizers, 0)) == []
    monkeypatch.setattr(planning, "free_bytes", lambda folder: 30e6)
    monkeypatch.setattr(planning, "memory_bytes", lambda: 20_000_000)
    disk, memory = planning.misfits(cfg, state, optimizers, 0)
    assert "about 0.1 GB (4 x weights 4.0 MB, 4 x training states 12.0 MB" in disk and "keep_training_states=2, a larger" in disk
    assert "take 0.0 GB, and this machine has 0.0 GB of memory" in memory
