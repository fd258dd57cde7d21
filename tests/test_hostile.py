"""Bad input of every kind, through the real commands: one line that names the fix, exit code 2, nothing written.

Most cases run in this process (lab.call), some as a user's shell would start them. `tried` counts what was refused.
"""

import base64
import collections
import copy
import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import lab
from checkpoint import CheckpointError, read_manifest
from config import config_from_dict, flat, to_dict
from runtime import files
from shards import write_shards

tried = collections.Counter()
FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def contents(folder):
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refuse(folder, command, *words, real=False, says=""):
    """The command refuses its input with one line and exit code 2, and leaves `folder` as it is."""
    before = contents(folder)
    printed = (lab.run if real else lab.call)(command, *words, code=2)
    errors = [line for line in printed.splitlines() if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in printed and says in errors[0], printed
    assert len(errors[0]) < 1000 and contents(folder) == before
    tried[f"{command}{', as a process' if real else ''}: exit code 2"] += 1


@pytest.fixture(scope="module", autouse=True)
def tell():
    yield
    for what, count in sorted(tried.items()):
        print(f"{what}: {count}")


@pytest.fixture
def tree(tmp_path, dataset):
    return lab.tiny_tree(dataset, tmp_path / "runs")


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset):
    """A finished run of 2 steps, whose vocabulary holds all bytes."""
    runs = lab.Lab(tmp_path_factory.mktemp("run"), dataset)
    runs.train("run", "training.max_steps=2", "checkpointing.save_every_n_steps=2", "model.vocab_size=260")
    return runs.folder / "run"


# ---- configurations ------------------------------------------------------------------------------------------------

WRONG = {bool: ["yes please", 3, [True]], int: ["many", 1.5, [1], {"a": 1}, True, -7],
         float: ["fast", [0.1], {}, ".nan", "-.inf"], str: [["a"], {"b": 2}],  # anything else that is plain is a text
         list: ["attention", 5, {"a": 1}], type(None): [{"no": {"such": "key"}}]}
FINE = {("sequence_idx", -7), ("lora_alpha", 1.5), ("hang_timeout_minutes", 1.5), ("patience_minutes", 1.5),
        ("upload_grace_seconds", 1.5)}
ALL = to_dict(config_from_dict({"model": {"relora": {"target_modules": ["a"], "reset_frequency": 5}}}))
CASES = [(key, wrong) for key, value in flat(ALL).items() for wrong in WRONG[type(value)]
         if (key.rpartition(".")[2], repr(wrong)) not in {(leaf, repr(value)) for leaf, value in FINE}]


def test_a_wrong_value_of_any_option_is_refused(tmp_path, tree):
    """Every option with a value of a wrong type or sign, as YAML."""
    random.Random(0).shuffle(CASES)
    for number, (key, wrong) in enumerate(CASES[:200]):
        bad = copy.deepcopy(tree)
        node = bad
        *parents, leaf = key.split(".")
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        if "relora" in parents:
            node = bad["model"]["relora"] if parents[-1] == "relora" else node
        node[leaf] = wrong
        path = lab.write_config(tmp_path / "bad.yaml", bad)
        refuse(tmp_path, "train.py", path, real=number < 4, says=leaf)


@pytest.mark.parametrize("text", ["", "- a\n- b", "5", "model: [", "model: 5", "a: &a [*a]", "{1: 2}", "\t",
                                  "model: {d_model: 1e999}", "model: {null: 1}", "? [1]\n: 2",
                                  "!!python/object/apply:os.system ['touch hacked']", "\x00"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    path, real = tmp_path / "bad.yaml", len(text) < 12
    path.write_text(text)
    refuse(tmp_path, "train.py", path, f"checkpointing.runs_dir={tmp_path}/runs", "data.dataset.name=no/such", *OFFLINE,
           real=real)


OFFLINE = ("data.dataset.patience_minutes=0.001", "data.dataset.cache_dir=nowhere/hub")


@FEW
@given(word=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_any_words_for_overrides_are_refused(tmp_path_factory, dataset, word):
    folder = tmp_path_factory.getbasetemp() / "words"
    folder.mkdir(exist_ok=True)
    path = lab.write_config(folder / "good.yaml", lab.tiny_tree(dataset, folder / "runs"))
    refuse(folder, "train.py", path, f"model.{word}" if word.startswith("-") or not word else word)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/x", "a\\b", "a\nb"])
def test_a_run_cannot_be_named_out_of_its_folder(tmp_path, tree, name):
    path = lab.write_config(tmp_path / "bad.yaml", tree)
    refuse(tmp_path, "train.py", path, f"checkpointing.run_name={json.dumps(name)}", says="run_name")


@pytest.mark.parametrize("words", [("model.relora.target_modules=[nothing]",), ("data.dataloader.batch_size=7",),
                                   ("checkpointing.learning_dynamics.layer_suffixes=[de_embedding_proj]",),
                                   ("model.max_seq_len=15",), ("model.vocab_size=10",), ("training.start_from=nowhere",),
                                   ("evaluation.metrics=[blimp]", "evaluation.blimp.dataset_name=tests"),
                                   ("data.dataset.name=tests",), ("training.micro_batch_size=3",),
                                   *((f"checkpointing.{key}={json.dumps(value)}",) for key, value in (
                                       ("fabric_checkpoint_dir", "."), ("fabric_checkpoint_dir", "../ts"),
                                       ("checkpoints_dir", "/abs"), ("fabric_checkpoint_dir", ""),
                                       ("learning_dynamics_dir", "training_state"), ("learning_dynamics_dir", "a:b"),
                                       ("fabric_checkpoint_filename", "../../x.pt"),
                                       ("evaluation.eval_results_dir", "x/y"), ("run_name", "x" * 300), ("run_name", "\ud800"),
                                       ("learning_dynamics.sequence_idx", 16), ("learning_dynamics.sequence_idx", -17),
                                       ("learning_dynamics.sequence_idx", []), ("learning_dynamics.sequence_idx", [0, 16]),
                                       ("learning_dynamics.layer_suffixes", []))),
                                   ("data.dataset.name=" + "x" * 300,), ("training.start_from=" + "x" * 300,),
                                   (f"training.seed={2 ** 70}",), ("model.relora.lora_alpha=1e300",), ("model.relora.r=1e11",),
                                   ("model.d_model=1e12",), ("model.n_layers=1e9",), ("evaluation.paloma.max_length=1",),
                                   ("training.hang_timeout_minutes=1e300",)], ids=lambda words: words[0][:60])
def test_what_does_not_fit_together_is_refused_before_anything_is_written(tmp_path, tree, words):
    refuse(tmp_path, "train.py", lab.write_config(tmp_path / "bad.yaml", tree), *words)


# ---- datasets ------------------------------------------------------------------------------------------------------------

HOSTILE_NAMES = ["../out.npy", "/etc/passwd", "..", "", "sub/../../out.npy", "a\0b", 5, None, ["x"]]
HOSTILE_INDEX = [
    *({"shards": [{"file": name, "rows": 96, "sha256": "x"}]} for name in HOSTILE_NAMES),
    *({"shards": [{"file": "shard-00000.npy", "rows": rows, "sha256": "x"}]} for rows in (0, -1, "96", None, 1.5, 10**30, 97)),
    *({key: value} for key in ("row_length", "vocab_size", "dtype", "shards") for value in (None, -1, "x", [], {}, 10**30)),
    {"shards": [5]}, {"shards": {"0": 1}}, {"dtype": "object"}, {"dtype": "float32"}]


@pytest.mark.parametrize("change", HOSTILE_INDEX, ids=lambda change: str(change)[:60])
def test_a_hostile_index_is_refused(tmp_path, dataset, change):
    shutil.copytree(dataset, tmp_path / "set")
    path = tmp_path / "set/train/index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    config = lab.write_config(tmp_path / "c.yaml", lab.tiny_tree(tmp_path / "set", tmp_path / "runs"))
    refuse(tmp_path, "train.py", config, real=change in HOSTILE_INDEX[:3])
    refuse(tmp_path, "shards.py", "verify", tmp_path / "set")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"shards": ' * 500, b"5"], ids=repr)
def test_an_index_that_is_not_one_is_refused(tmp_path, dataset, content):
    shutil.copytree(dataset, tmp_path / "set")
    (tmp_path / "set/train/index.json").write_bytes(content)
    refuse(tmp_path, "train.py", lab.write_config(tmp_path / "c.yaml", lab.tiny_tree(tmp_path / "set", tmp_path / "runs")))


@FEW
@given(seed=st.integers(0, 10**6))
def test_a_shard_with_any_change_is_refused(tmp_path_factory, dataset, seed):
    """Bytes flipped, cut or added anywhere in the first shard of the training data."""
    rng, folder = random.Random(seed), tmp_path_factory.getbasetemp() / "shard"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(dataset, folder / "set")
    path = folder / "set/train/shard-00000.npy"
    raw = bytearray(path.read_bytes())
    how = rng.choice(["flip", "cut", "add"])
    if how == "flip":
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw[:rng.randrange(len(raw))] if how == "cut" else raw + b"x" * (how == "add"))
    refuse(folder, "train.py", lab.write_config(folder / "c.yaml", lab.tiny_tree(folder / "set", folder / "runs")))


@pytest.mark.parametrize("texts, words", [
    ({"a.txt": b""}, ()), ({"a.txt": b"\xff\xfe\x00"}, ()), ({"a.txt": b"short"}, ()), ({"a.jsonl": b"{}"}, ()),
    ({"a.jsonl": b'{"text": 5}'}, ()), ({"a.jsonl": b"[1]"}, ()), ({"a.jsonl": b'{"text": "\\ud800"}'}, ()), ({}, ()),
    ({"a.txt": b"text " * 99}, ("--row-length", "1")), ({"a.txt": b"text " * 99}, ("--row-length", "-5")),
    ({"a.txt": b"text " * 99}, ("--val-share", "1")), ({"a.txt": b"text " * 99}, ("--tokenizer", "nowhere.json")),
    ({"a.txt": b"text " * 99}, ("--vocab-size", "5")), ({"a.txt": b"text " * 99}, ("--vocab-size", "3000000000")),
    ({"a.txt": b"text " * 99}, ("--val-share", "nan"))],
    ids=lambda value: str(value)[:40])
def test_a_corpus_without_anything_to_learn_is_refused_and_leaves_nothing(tmp_path, texts, words):
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    sources = [tmp_path / name for name in texts] or [tmp_path / "missing.txt"]
    refuse(tmp_path, "shards.py", "text", *sources, "--out", tmp_path / "made", *words)


def test_what_is_there_is_not_overwritten(tmp_path, run):
    (tmp_path / "a.txt").write_text("text " * 999)
    (tmp_path / "made").mkdir()
    refuse(tmp_path, "shards.py", "text", tmp_path / "a.txt", "--out", tmp_path / "made", real=True, says="already there")
    refuse(tmp_path, "export.py", "hf", run, tmp_path / "made", real=True, says="already there")
    refuse(tmp_path, "export.py", "import", run / "checkpoints/step_2", tmp_path / "made", says="already there")


@pytest.mark.parametrize("rows, length", [(1, 17), (1, 2), (3, 2)])
def test_a_single_row_and_a_sequence_of_one_are_enough(tmp_path, rows, length):
    for split in ("train", "val"):
        write_shards(tmp_path / "set" / split, np.ones((rows, length), np.int64), 64, "made for a test")
    runs = lab.Lab(tmp_path, tmp_path / "set")
    runs.train("run", f"model.max_seq_len={length - 1}")
    assert list(runs.metrics("run")) == list(range(1, 21))


# ---- checkpoints, models, tokenizers, prompts ------------------------------------------------------------------------------

class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bomb(path, marker):
    path.write_bytes(pickle.dumps({"step": Bomb(marker)}))


def test_pickled_code_in_a_checkpoint_is_never_executed(tmp_path, run):
    """In a training state with a manifest that fits, in a snapshot, and in a published model."""
    shutil.copytree(run, tmp_path / "run")
    step, marker = tmp_path / "run/checkpoints/step_2", tmp_path / "executed"
    for name in ("training_state/checkpoint.pt", "learning_dynamics/val_weights.pt"):
        bomb(step / name, marker)
    refuse(tmp_path / "run", "analyze.py", tmp_path / "run", "--out", tmp_path / "out", says="cannot be read")
    manifest = json.loads((step / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        entry |= {"size": (step / name).stat().st_size, "sha256": files.sha256(step / name)}
    (step / "manifest.json").write_text(json.dumps(manifest))
    config = tmp_path / "run/training_config.yaml"
    words = (f"checkpointing.runs_dir={tmp_path}", "training.max_steps=3")
    printed = lab.call("train.py", config, *words, code=2)
    assert "cannot be read" in printed and not marker.exists() and "Traceback" not in printed
    (tmp_path / "published").mkdir()
    (tmp_path / "published/config.json").write_text(json.dumps({"model_type": "pico_decoder"}))
    bomb(tmp_path / "published/pytorch_model.bin", marker)
    refuse(tmp_path, "export.py", "import", tmp_path / "published", tmp_path / "made")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", "..\\x", "C:\\x", "C:x", "\\\\host\\x"])
def test_a_manifest_cannot_point_out_of_its_folder(tmp_path, name):
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {name: {"size": 1, "sha256": "x"}}}))
    with pytest.raises(CheckpointError, match="outside"):
        read_manifest(tmp_path)


LLAMA = (b'{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": %s, "vocab_size": 260, '
         b'"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": %s}')


@pytest.mark.parametrize("file, content", [
    *(("config.json", text) for text in (b"", b"[]", b"{}", b'{"hidden_size": "x"}', b"\xff", b'{"hidden_size": 1e400}',
                                         b"[" * 200_000, b'{"rope_parameters": [1]}', b'{"rope_parameters": "x"}',
                                         LLAMA % (b"1000000000", b"16"), LLAMA % (b"2", b"1099511627776"))),
    *(("model.safetensors", raw) for raw in (b"", b"\x08" * 7, b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{}")),
    *(("tokenizer.json", raw) for raw in (b"", b"{}", b"[]", b"null", b'{"model": {"type": "BPE"}}', b"\xff\xfe"))],
    ids=lambda value: str(value)[:30])
def test_a_damaged_model_folder_is_refused(tmp_path, run, file, content):
    shutil.copytree(run / "checkpoints/step_2", tmp_path / "model")
    (tmp_path / "model" / file).write_bytes(content)
    refuse(tmp_path, "sample.py", tmp_path / "model", real=content == b"")
    refuse(tmp_path, "export.py", "hf", tmp_path / "model", tmp_path / "out")
    refuse(tmp_path, "evaluate.py", tmp_path / "model", "evaluation.metrics=[paloma]",
           f"evaluation.paloma.dataset_name={tmp_path}")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04cut", pickle.dumps([1, 2]), pickle.dumps({"a": 5}), pickle.dumps({5: 5})])
def test_weights_that_are_none_are_not_imported(tmp_path, content):
    (tmp_path / "published").mkdir()
    (tmp_path / "published/config.json").write_text(
        '{"model_type": "pico_decoder", "d_model": 32, "n_layers": 1, "vocab_size": 64}')
    (tmp_path / "published/pytorch_model.bin").write_bytes(content)
    refuse(tmp_path, "export.py", "import", tmp_path / "published", tmp_path / "made")


MOMENTS = {"step": torch.zeros(()), "exp_avg": torch.zeros(260, 32), "exp_avg_sq": torch.zeros(260, 32)}
SUMS = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("change", [
    {"optimizer": None}, {"config": {}}, {"step": "2"}, {"progress": 5}, {"step": 2 ** 2000}, {"model": {5: 5}},
    {"model": {"a": 5}}, {"data": {}}, {"optimizer": {"embedding_proj.weight": []}}, {"metrics_bytes": -1},
    *({"optimizer": {"embedding_proj.weight": MOMENTS | wrong}} for wrong in (
        {"exp_avg": torch.zeros(3)},  # a fused optimizer writes past its end
        {"exp_avg": torch.zeros(32).expand(260, 32)}, {"step": torch.zeros(3)}, {"exp_avg_sq": None})),
    *({"progress": {"sums": sums, "reset_count": 0, "merged_at": None}}
      for sums in (5, SUMS[1:], [*SUMS[:2], 1e300, *SUMS[3:]]))],
    ids=lambda change: str(change)[:60])
def test_a_training_state_of_other_contents_is_refused(tmp_path, run, change):
    shutil.copytree(run, tmp_path / "run")
    step = tmp_path / "run/checkpoints/step_2"
    path = step / "training_state/checkpoint.pt"
    torch.save(torch.load(path) | change, path)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"]["training_state/checkpoint.pt"] = {"size": path.stat().st_size, "sha256": files.sha256(path)}
    (step / "manifest.json").write_text(json.dumps(manifest))
    printed = lab.call("train.py", run / "training_config.yaml", f"checkpointing.runs_dir={tmp_path}",
                       "training.max_steps=3", code=2)
    assert printed.count("error: ") == 1 and "Traceback" not in printed


@pytest.mark.parametrize("value", [[1.0], {"layers.0.x": 5}, {"odd": torch.ones(2, 2)}, {"layers.0.x": torch.ones(2)}], ids=str)
def test_a_snapshot_of_other_contents_is_refused(tmp_path, run, value):
    shutil.copytree(run, tmp_path / "run")
    torch.save(value, tmp_path / "run/checkpoints/step_2/learning_dynamics/val_weights.pt")
    printed = lab.call("analyze.py", tmp_path / "run", "--out", tmp_path / "out", code=2)
    assert "val_weights.pt: not matrices" in printed and "Traceback" not in printed


@pytest.mark.parametrize("change", [{"entropy": 5}, {"entropy": {"unigram": "x"}}, {"entropy": {"unigram": 1.0}},
                                    {"entropy": {"unigram": 1.0, "bigram": float("nan")}}, {"shards": "nested"}], ids=str)
def test_an_index_of_other_contents_is_refused(tmp_path, dataset, change):
    shutil.copytree(dataset, tmp_path / "set")
    index = tmp_path / "set/train/index.json"
    index.write_text("[" * 200_000 if change == {"shards": "nested"} else json.dumps(json.loads(index.read_text()) | change))
    refuse(tmp_path, "train.py", lab.write_config(tmp_path / "a.yaml", lab.tiny_tree(tmp_path / "set", tmp_path / "runs")))


@pytest.mark.parametrize("line", [
    "5", "[]", '{"UID": 1, "linguistics_term": "t", "sentence_good": "a", "sentence_bad": "b"}', ""])
def test_pairs_that_are_none_are_refused(tmp_path, tree, line):
    (tmp_path / "blimp").mkdir()
    (tmp_path / "blimp/a.jsonl").write_text(line)
    refuse(tmp_path, "train.py", lab.write_config(tmp_path / "a.yaml", tree), "evaluation.metrics=[blimp]",
           f"evaluation.blimp.dataset_name={tmp_path / 'blimp'}", says="dataset_name")


@FEW
@given(prompt=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60), tokens=st.integers(-3, 20))
def test_any_prompt_is_continued_or_refused(run, prompt, tokens):
    room = 16 - len(prompt.encode())
    words = ("sample.py", run, f"--prompt={prompt}", f"--tokens={tokens}")
    if room > 0 and tokens > 0:
        assert prompt in lab.call(*words)
        tried["sample.py: exit code 0"] += 1
    else:
        refuse(run, *words)


@pytest.mark.parametrize("words", [("--temperature", "nan"), ("--temperature", "-1"), ("--top-k", "0"), ("--seed", "-1"),
                                   ("--samples", "0"), ("--tokens", "x"), ("--temperature", "inf"), ("--temperature", "1e-320"),
                                   ("--seed", "9" * 20), ("--prompt", "a\udcff")], ids=lambda words: ascii(" ".join(words)))
def test_options_out_of_range_are_refused(run, words):
    refuse(run, "sample.py", run, *words, real=words[1] in ("nan", "x"))


@pytest.mark.parametrize("command", ["sample.py", "evaluate.py", "analyze.py"])
@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_what_is_no_run_is_refused(tmp_path, command, kind):
    target = tmp_path / "target"
    {"missing": lambda: None, "empty": target.mkdir, "file": lambda: target.write_text("x")}[kind]()
    refuse(tmp_path, command, target, real=kind == "missing")


@pytest.mark.parametrize("text", ["", "5", "metrics: 5", "metrics: [5]", "metrics: [{metric_name: nonsense, components: [{}]}]",
                                  "steps: {start: 0}\nmetrics: []", "[", "steps: {start: 5, end: 1, step: 0}\nmetrics: []"])
def test_an_analysis_that_makes_no_sense_is_refused(tmp_path, run, text):
    (tmp_path / "a.yaml").write_text(text)
    refuse(tmp_path, "analyze.py", run, "--config", tmp_path / "a.yaml", "--out", tmp_path / "out")


# ---- secrets -----------------------------------------------------------------------------------------------------------

def test_a_token_is_written_nowhere(tmp_path, dataset, monkeypatch):
    """An upload to a hub on loopback that refuses every third request: the token is in the requests' headers alone."""
    from fake_hub import Hub
    token = "hf_" + base64.b32encode(os.urandom(20)).decode()
    monkeypatch.setenv("HF_TOKEN", token)
    calls = iter(range(10**6))
    with Hub() as hub:
        hub.faults.append(lambda line: 500 if next(calls) % 3 == 2 else None)
        runs = lab.Lab(tmp_path, dataset)
        printed = lab.forked("train.py", runs.config("secret"), "training.max_steps=2", "checkpointing.save_to_hf=true",
                             "checkpointing.hf_checkpoint.repo_id=me/model", "monitoring.save_to_wandb=true",
                             "checkpointing.upload_grace_seconds=3",
                             env={**hub.env(tmp_path), "HF_TOKEN": token, "HF_DEBUG": "0"})
        sent = repr((hub.commits, hub.lfs, hub.requests, hub.repos))
    assert "upload" in printed and token in repr(hub.tokens)
    assert token not in printed and token not in sent
    assert [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()] == []
    assert torch.load(tmp_path / "secret/checkpoints/step_2/training_state/checkpoint.pt")["step"] == 2
    assert yaml.safe_load((tmp_path / "secret/training_config.yaml").read_text())["checkpointing"]["save_to_hf"] is True
