"""Where data come from: here, on the Hub, or neither, said at once; whole splits and tokenizers fetched into the cache."""

import io
import json
import re
import shutil

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest

import lab
from config import ConfigError, DataConfig, DatasetConfig, TokenizerConfig, UserError
from data import DataError, TokenDataset
from fake_hub import Hub, once
from hub import datasets, streaming
from hub.datasets import fetch_tokenizer, find_local, local_or_hub
from hub.tokenizers import JsonTokenizer
from shards import write_shards

WHOLE = """
import json, sys
from config import DatasetConfig
from data import TokenDataset
from hub.datasets import local_or_hub
from runtime.command import command

def main():
    for name, split in json.loads(sys.argv[1]):
        cfg = DatasetConfig(name="lab/other", cache_dir=sys.argv[2], revision="of lab/other", patience_minutes=0.05)
        rows = TokenDataset(local_or_hub(name, split, cfg, 64), split)
        print("ROWS", len(rows), rows.rows(0, len(rows)).sum(), rows.folder)

command(main)
"""


def table(rows, **columns):
    buffer = io.BytesIO()
    arrow.parquet.write_table(arrow.table({"input_ids": rows.tolist(), **columns}), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(64, size=(60, 9))


@pytest.fixture
def hub(rows):
    with Hub() as hub:
        hub.retry_after = 0
        hub.repos["datasets/lab/tiny"] = {f"data/{split}-{i:05d}-of-00003.parquet": table(rows[20 * i:20 * i + 20])
                                          for i in range(3) for split in ("train", "val")}
        yield hub


def whole(tmp_path, hub, *names, code=0, **env):
    """(rows, sum of the ids, folder) of each whole split, as a process has them; and what it printed."""
    (tmp_path / "whole.py").write_text(WHOLE)
    printed = lab.forked(tmp_path / "whole.py", json.dumps(names), tmp_path / "cache", code=code,
                         env=hub.env(tmp_path / "hf") | env)
    return [line.split()[1:] for line in printed.splitlines() if line.startswith("ROWS")], printed


# ---- here, on the Hub, or neither -----------------------------------------------------------------------------------

@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory with two datasets, one of them where an earlier version put it."""
    for name in ("corpora/stdlib", "corpora/pretokenized-dolma", "data/books"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name, meant", [
    ("corpora/stdlibb", "corpora/stdlib"), ("corpora/sdtlib", "corpora/stdlib"), ("./corpora/stdlb", "corpora/stdlib"),
    ("stdlib", "corpora/stdlib"), ("corpra/stdlib", "corpora/stdlib"), ("data/stdlib", "corpora/stdlib"),
    ("data/bokos", "data/books"), ("corpora\\stdlib", "corpora/stdlib"), ("corpora/stdlib/train/x", None),
    ("corpora/nothing", None), ("/nowhere/at/all", None), ("~/stdlib", "corpora/stdlib"), ("data/none", None)])
def test_a_name_that_is_neither_here_nor_on_the_hub_is_refused_with_what_was_meant(desk, name, meant):
    with pytest.raises(DataError) as caught:
        find_local(name)
    assert repr(name) in str(caught.value)
    assert (f"did you mean {meant}?" in str(caught.value)) if meant else ("shards.py" in str(caught.value))


@pytest.mark.parametrize("name", ["pico-lm/pretokenized-dolma", "nyu-mll/blimp", "corporate/stdlib-texts", "lab/books"])
def test_a_name_of_the_hub_stays_one_whatever_is_here_under_a_like_name(desk, name):
    assert find_local(name) is None


@pytest.mark.parametrize("name, owner, on_hub", [("gpt2", False, True), ("gpt2", True, False)])
def test_only_models_may_lack_an_owner(desk, name, owner, on_hub):
    if on_hub:
        assert find_local(name, owner) is None
    else:
        with pytest.raises(DataError):
            find_local(name, owner)


def test_what_an_earlier_version_made_is_found_where_it_put_it(desk, caplog, monkeypatch):
    monkeypatch.setattr(datasets.node_log.parent, "propagate", True)
    with caplog.at_level("INFO"):
        assert find_local("corpora/books").as_posix() == "data/books"
    assert "corpora/books: is not here; taking data/books" in caplog.text
    (desk / "data/hub").mkdir()
    cfg = DatasetConfig()
    assert datasets.cache_folder(cfg).as_posix() == "data/hub"
    (desk / "corpora/hub").mkdir()
    assert datasets.cache_folder(cfg).as_posix() == "corpora/hub"


def test_a_mistyped_folder_is_told_without_asking_the_hub(dataset, tmp_path, hub):
    tree = lab.tiny_tree(dataset, tmp_path / "runs")
    tree["data"]["dataset"]["name"] = f"{dataset}b"
    printed = lab.forked("train.py", lab.write_config(tmp_path / "c.yaml", tree), env=hub.env(tmp_path / "hf"), code=2)
    assert f"data.dataset.name: '{dataset}b' is neither here" in printed and f"did you mean {dataset}?" in printed
    assert not hub.requests and not (tmp_path / "runs").exists()


# ---- whole splits ----------------------------------------------------------------------------------------------------

def test_a_whole_split_comes_once_and_serves_offline(tmp_path, hub, rows):
    hub.faults = [once("train-00001", "truncate"), once("train-00002", 503)]
    (found,), _ = whole(tmp_path, hub, ("lab/tiny", "train"))
    assert found[:2] == ["60", str(rows.sum())]
    hub.requests.clear()
    (again,), _ = whole(tmp_path, hub, ("lab/tiny", "train"), HF_HUB_OFFLINE="1")
    assert again == found and not hub.requests
    assert not [path for path in (tmp_path / "cache").rglob("*") if "staging" in path.name]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_copy_that_lost_a_shard_is_made_whole_again(tmp_path, hub):
    (found,), _ = whole(tmp_path, hub, ("lab/tiny", "train"))
    next((tmp_path / "cache").glob("**/shard-00001.npy")).unlink()
    (again,), printed = whole(tmp_path, hub, ("lab/tiny", "train"))
    assert again == found and "shard-00001.npy: is missing; fetching it again" in printed


def test_what_is_here_serves_where_the_hub_cannot_be_reached(tmp_path, hub):
    (found,), _ = whole(tmp_path, hub, ("lab/tiny", "train"))
    hub.faults = [lambda line: 503]
    (again,), printed = whole(tmp_path, hub, ("lab/tiny", "train"))
    assert again == found and "taking what is here of it, revision" in printed
    hub.faults = [lambda line: (404, "RepoNotFound", "Repository not found")]  # which is an answer
    assert "no such repository" in whole(tmp_path, hub, ("lab/tiny", "train"), code=2)[1]


def test_the_other_splits_of_a_streamed_dataset_come_from_its_revision(tmp_path, hub, rows):
    """So that evaluation.metrics=[val] and eval_data=val work on a dataset of the Hub that has a val split."""
    tree = lab.tiny_tree("lab/tiny", tmp_path / "runs")
    tree["data"]["dataset"] |= {"cache_dir": str(tmp_path / "cache"), "patience_minutes": 0.1}
    tree["data"]["tokenizer"] = {"name": str(word_tokenizer(tmp_path / "words", 64))}
    tree["model"]["max_seq_len"] = 8
    path = lab.write_config(tmp_path / "c.yaml", tree)
    words = ("training.stop_at_step=2", "checkpointing.save_every_n_steps=2")
    printed = lab.forked("train.py", path, *words, env=hub.env(tmp_path / "hf"))
    assert "fetching its val split, 3 files" in printed and "val loss" in printed
    told = re.search(r"step 2: (val loss .*)", printed)[1]
    assert told in lab.forked("evaluate.py", tmp_path / "runs/run", env=hub.env(tmp_path / "hf"))
    revision = hub.revision("datasets/lab/tiny")
    for split in ("train", "val"):
        del hub.repos["datasets/lab/tiny"][f"data/{split}-00000-of-00003.parquet"]
    assert hub.revision("datasets/lab/tiny") != revision
    copy = tmp_path / f"cache/lab--tiny/{revision}"
    (found,), _ = whole(tmp_path, hub, (str(copy), "val"))
    assert found == ["60", str(rows.sum()), str(copy / "val")]


def test_sets_that_do_not_belong_together_are_not_joined(tmp_path, hub, rows):
    for subset in ("gpt2", "llama3"):
        order = rows if subset == "gpt2" else rows[::-1]
        hub.repos.setdefault("datasets/lab/sets", {})[f"{subset}/train-00000-of-00001.parquet"] = table(order)
    printed = whole(tmp_path, hub, ("lab/sets", "train"), code=2)[1]
    assert "its train files are of the subsets gpt2, llama3, which are not joined; choose one with data.dataset.subset" in printed
    chosen = ["shards.py", "download", "lab/sets", "--vocab-size", 64, "--tokenizer", word_tokenizer(tmp_path / "words", 64)]
    lab.forked(*chosen, "--subset", "llama3", "--out", tmp_path / "mine", env=hub.env(tmp_path / "hf"))
    assert (TokenDataset(tmp_path / "mine").rows(0, 60) == rows[::-1]).all()
    assert "--subset" in lab.forked(*chosen, "--subset", "x", "--out", tmp_path / "x", env=hub.env(tmp_path / "hf"), code=2)


def test_a_streamed_subset_is_its_own_data(tmp_path, hub, rows):
    """Another subset has another cache and another fingerprint; and what the Hub calls validation is val."""
    for number, subset in enumerate(("gpt2", "llama3")):
        for split in ("train", "validation"):
            name = f"{subset}/{split}-00000-of-00001-0123456789abcdef.parquet"
            hub.repos.setdefault("datasets/lab/sets", {})[name] = table(rows[::1 - 2 * number])
    tree = lab.tiny_tree("lab/sets", tmp_path / "runs")
    tree["data"]["dataset"] |= {"cache_dir": str(tmp_path / "cache"), "patience_minutes": 0.1, "subset": "gpt2"}
    tree["data"]["tokenizer"] = {"name": str(word_tokenizer(tmp_path / "words", 64))}
    tree["model"]["max_seq_len"] = 8
    path, env = lab.write_config(tmp_path / "c.yaml", tree), hub.env(tmp_path / "hf")
    words = ("training.stop_at_step=2", "checkpointing.save_every_n_steps=2")
    assert "val loss" in lab.forked("train.py", path, *words, env=env)
    printed = lab.forked("train.py", path, "data.dataset.subset=llama3", env=env, code=2)
    assert "holds other tokens than the checkpoint was trained on" in printed


# ---- tokenizers ------------------------------------------------------------------------------------------------------

def word_tokenizer(folder, count, **files):
    from tokenizers import Tokenizer, models
    folder.mkdir(exist_ok=True)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0")).save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def opened(tmp_path, vocab=500, tokenizer=None, largest=None, own=None):
    """A local dataset as a run opens it; its rows hold ids up to `largest`."""
    ids = np.random.default_rng(0).integers(largest or vocab, size=(70, 9))
    ids[0, 0] = (largest or vocab) - 1
    write_shards(tmp_path / "set/train", ids, vocab, "a test")
    if own:
        word_tokenizer(tmp_path / "set", own)
    data = DataConfig(DatasetConfig(str(tmp_path / "set"), str(tmp_path / "cache")))
    data.dataloader.batch_size = 4
    if tokenizer:
        data.tokenizer.name = str(tokenizer)
    before = sorted(tmp_path.rglob("set/**/*"))
    try:
        return streaming.open_dataset(data, lab_model(vocab), 0, None)
    finally:
        assert sorted(tmp_path.rglob("set/**/*")) == before, "nothing is ever written into a folder of the user's"


def lab_model(vocab):
    from config import ModelConfig
    return ModelConfig(max_seq_len=8, vocab_size=vocab)


def test_a_dataset_s_own_tokenizer_is_taken_and_a_folder_s_is_read_where_it_is(tmp_path):
    assert opened(tmp_path, own=500).tokenizer_folder == tmp_path / "set"
    shutil.rmtree(tmp_path / "set")
    named = word_tokenizer(tmp_path / "words", 480)
    found = opened(tmp_path, tokenizer=named, largest=480)
    assert found.tokenizer_folder == named and not (tmp_path / "cache").exists()
    shutil.rmtree(tmp_path / "set")
    assert opened(tmp_path, tokenizer=named / "tokenizer.json", largest=480).tokenizer_folder == named


def test_bytes_need_no_tokenizer(tmp_path):
    assert opened(tmp_path, vocab=257).tokenizer_folder == tmp_path / "set"


@pytest.mark.parametrize("case", [{"tokenizer": 501}, {"tokenizer": 400}, {"own": 499}])
def test_a_tokenizer_that_cannot_have_made_the_rows_is_refused(tmp_path, case):
    """It has more ids than their vocabulary, or they hold ids that it does not have."""
    if "tokenizer" in case:
        case = {"tokenizer": word_tokenizer(tmp_path / "words", case["tokenizer"])}
    with pytest.raises(ConfigError, match="data.tokenizer.name: .* cannot have made .*/set/train.*put the tokenizer.json"):
        opened(tmp_path, **case)


@pytest.mark.parametrize("count, fits", [(420, True), (200, False), (500, True)])
def test_the_default_tokenizer_is_a_guess_and_must_nearly_fill_the_vocabulary(tmp_path, monkeypatch, caplog, count, fits):
    """50,280 ids for 50,304; but hardly 200 for 500, though the rows hold none above 150. Said in any case."""
    monkeypatch.setattr(datasets.node_log.parent, "propagate", True)
    fetched = word_tokenizer(tmp_path / "words", count, special_tokens_map={"eos_token": "w1"}, tokenizer_config={}, other={})
    monkeypatch.setattr(datasets, "fetch_folder", lambda *_: fetched)  # the Hub's answer; the client is met elsewhere
    if not fits:
        with pytest.raises(ConfigError, match=f"{TokenizerConfig.name} has 200 ids and cannot have made"):
            opened(tmp_path, largest=150)
        return
    with caplog.at_level("INFO"):
        found = opened(tmp_path, largest=150)
    kept = found.tokenizer_folder
    assert kept == tmp_path / "cache/tokenizers" / TokenizerConfig.name.replace("/", "--")
    assert sorted(path.name for path in kept.iterdir()) == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert f"set has no tokenizer.json of its own; taking data.tokenizer.name, {TokenizerConfig.name} ({count} ids)" in caplog.text


def test_a_tokenizer_is_fetched_whole_with_what_lies_beside_it(tmp_path, hub):
    source = word_tokenizer(tmp_path / "words", 64, tokenizer_config={"eos_token": "w1"}, generation_config={"eos_token_id": 1})
    hub.repos["models/lab/words"] = {path.name: path.read_bytes() for path in source.iterdir()} | {"model.safetensors": b"big"}
    hub.repos["models/lab/none"] = {"config.json": b"{}"}
    script = tmp_path / "ask.py"
    script.write_text("import sys\nfrom pathlib import Path\nfrom hub.datasets import fetch_tokenizer\n"
                      "from runtime.command import command\n"
                      "command(lambda: fetch_tokenizer(sys.argv[1], Path(sys.argv[2]), 0.05))\n")
    hub.faults = [once("tokenizer.json", "truncate")]
    out, env = tmp_path / "kept", hub.env(tmp_path / "hf")
    lab.forked(script, "lab/words", out, env=env)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {p.name: p.read_bytes() for p in source.iterdir()}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in out.iterdir())
    assert JsonTokenizer(out / "tokenizer.json").vocab_size == 64
    assert not any("safetensors" in line for line in hub.requests)
    printed = lab.forked(script, "lab/none", tmp_path / "none", env=env, code=2)
    assert "lab/none: has no tokenizer.json" in printed and not (tmp_path / "none").exists()


def test_a_tokenizer_of_ours_is_not_put_over_another(tmp_path):
    source, out = word_tokenizer(tmp_path / "words", 64), word_tokenizer(tmp_path / "kept", 32)
    fetch_tokenizer(str(source), out)
    assert JsonTokenizer(out / "tokenizer.json").vocab_size == 32


def test_ranks_that_do_not_all_have_a_folder_say_so(tmp_path):
    (tmp_path / "ask.py").write_text(
        "import os, sys, torch\nfrom hub.datasets import locate\nfrom runtime import dist\nfrom runtime.command import command\n"
        "def main():\n"
        "    with dist.session(torch.device('cpu')):\n"
        "        locate(sys.argv[1 + (os.environ['RANK'] == '1')])\n"
        "command(main)\n")
    (tmp_path / "there").mkdir()
    printed = lab.forked(tmp_path / "ask.py", tmp_path / "there", tmp_path / "elsewhere", ranks=2, code=2)
    assert "is missing on ranks [1]; put it on every machine" in printed


def test_local_folders_are_taken_as_they_are(dataset):
    assert local_or_hub(str(dataset), "val", DatasetConfig(), 64) == dataset
    assert len(TokenDataset(local_or_hub(str(dataset), "val", DatasetConfig(), 64), "val")) == 12
    with pytest.raises(UserError):
        local_or_hub(f"{dataset}x", "val", DatasetConfig(), 64)
