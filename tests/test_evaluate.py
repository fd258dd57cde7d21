"""Evaluation on held-out rows: torch's own cross-entropy, the metrics by hand, the same on any ranks."""

import io
import json
import math
import random
import shutil
import zipfile

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
import torch.nn.functional as F

import lab
from checkpoint import publish
from config import BlimpConfig, ConfigError, ModelConfig, config_from_dict
from data import TokenDataset
from evaluate import bits_per_byte, evaluate_blimp, row_losses, rows_metrics
from fake_hub import Hub
from hub.llama import load_decoder, writers
from hub.tokenizers import ByteTokenizer, load_tokenizer, text_bytes
from instruments.blimp import Pair, load_pairs
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


@pytest.mark.parametrize("words", [("evaluation.metrics=[paloma]", "evaluation.paloma.dataset_name={other}"),
                                   ("checkpointing.learning_dynamics.eval_data={other}",)])
def test_rows_of_another_vocabulary_are_refused_at_the_start(dataset, tmp_path, words):
    other = lab.make_dataset(tmp_path / "other", rows=2, vocab=300)
    printed = lab.Lab(tmp_path, dataset).train("run", *(word.format(other=other) for word in words), code=2)
    assert "holds ids up to 299, and the model knows 64" in printed and not (tmp_path / "run").exists()


def test_a_later_evaluation_keeps_the_results_of_the_first(worlds, tmp_path):
    worlds.copy("single", "twice", 20)
    kept = worlds.folder / "twice/eval_results/step_20.json"
    before = json.loads(kept.read_text())
    lab.call("evaluate.py", worlds.folder / "twice", "evaluation.metrics=[paloma]",
             f"evaluation.paloma.dataset_name={worlds.dataset}")
    after = json.loads(kept.read_text())
    assert after["val"] == before["val"] and after["paloma"]["loss"] == pytest.approx(before["val"]["loss"], rel=1e-6)


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


# ---- against transformers ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A decoder with a real tokenizer's vocabulary as a folder that transformers loads: (folder, model of ours, theirs)."""
    from transformers import AutoModelForCausalLM
    folder = tmp_path_factory.mktemp("exported")
    (folder / "words").mkdir()
    source = lab.SHARED / "tokenizer" / "tokenizer.json"
    (folder / "words" / "tokenizer.json").write_bytes(source.read_bytes() if source.exists() else word_tokenizer())
    vocab = load_tokenizer(folder / "words").vocab_size
    torch.manual_seed(0)
    cfg = ModelConfig(d_model=48, n_layers=2, vocab_size=vocab, max_seq_len=2048, attention_n_heads=6,
                      attention_n_kv_heads=2, activation_hidden_dim=64)
    publish(folder / "model", writers(PicoDecoder(cfg).state_dict(), cfg, folder / "words"))
    return folder / "model", load_decoder(folder / "model"), AutoModelForCausalLM.from_pretrained(folder / "model")


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = "the cat cats sees see dogs dog . <|endoftext|> [UNK]".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode()


def made_pairs(count=60):
    made = random.Random(0)
    words = "the cat cats sees see dogs dog".split()

    def sentence():
        return " ".join(made.choices(words, k=made.randint(1, 12))) + "."
    return [Pair(f"uid_{i % 3}", f"term_{i % 2}", sentence(), sentence()) for i in range(count)] + \
        [Pair("uid_0", "term_0", "the cat.", "the cat.")]  # a tie


@pytest.mark.parametrize("with_start", [False, True])
def test_blimp_agrees_with_transformers_pair_by_pair(exported, with_start):
    from transformers import AutoTokenizer
    folder, ours, theirs = exported
    zipped = lab.SHARED / "blimp" / "BLiMP.zip"
    pairs = made_pairs() + (load_pairs(BlimpConfig(str(zipped), samples_per_set=4)) if zipped.exists() else [])
    tokenizer, words = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    start = tokenizer.eos if with_start else None

    @torch.no_grad()
    def log_probability(text):
        ids = torch.tensor([([start] if with_start else []) + words(text, add_special_tokens=False).input_ids])
        log_p = theirs(ids).logits.double().log_softmax(-1)
        return log_p[0, :-1].gather(1, ids[0, 1:, None]).sum().item()
    margins = [log_probability(p.good) - log_probability(p.bad) for p in pairs]
    result = evaluate_blimp(ours, pairs, tokenizer, start, 4, CPU)
    assert result["start_token"] == start and result["pairs"] == len(pairs)
    clear = [abs(margin) > 1e-4 or p.good == p.bad for margin, p in zip(margins, pairs)]
    assert all(clear), "the pairs were meant to be decided"
    for key, field in (("by_uid", "uid"), ("by_term", "term")):
        for name, accuracy in result[key].items():
            hits = [margin > 0 for margin, p in zip(margins, pairs) if getattr(p, field) == name]
            assert accuracy == pytest.approx(sum(hits) / len(hits)), name
    assert result["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))


def test_row_losses_agree_with_transformers(exported):
    _, ours, theirs = exported
    sample = lab.SHARED / "pretokenized-paloma-sample" / "data" / "val-00000-of-00001.parquet"
    if sample.exists():
        rows = np.array(arrow.parquet.read_table(sample)["input_ids"].to_pylist()[:3])
    else:
        rows = np.random.default_rng(0).integers(ours.cfg.vocab_size, size=(3, 2048))
    got = row_losses(ours, rows.astype(np.uint16), 2, CPU) / (rows.shape[1] - 1)
    with torch.no_grad():
        want = [theirs(input_ids=ids[None], labels=ids[None]).loss.item() for ids in torch.from_numpy(rows)]
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_blimp_reads_folders_and_zips_and_chooses_by_glob(tmp_path):
    (tmp_path / "blimp").mkdir()
    with zipfile.ZipFile(tmp_path / "blimp.zip", "w") as archive:
        for uid in ("alpha", "beta_1", "beta_2"):
            text = "\n".join(json.dumps({"UID": uid, "linguistics_term": "t", "sentence_good": f"good {i}",
                                         "sentence_bad": f"bad {i}"}) for i in range(5))
            archive.writestr(f"data/{uid}.jsonl", text)
            archive.writestr(f"__MACOSX/data/._{uid}.jsonl", b"\x00\xff")
            (tmp_path / "blimp" / f"{uid}.jsonl").write_text(text)
    for name in ("blimp", "blimp.zip"):
        found = load_pairs(BlimpConfig(str(tmp_path / name), metric_uids=["beta*"], samples_per_set=2))
        assert [(p.uid, p.good) for p in found] == [(u, f"good {i}") for u in ("beta_1", "beta_2") for i in (0, 1)]
    with pytest.raises(ConfigError, match="metric_uids"):
        load_pairs(BlimpConfig(str(tmp_path / "blimp"), metric_uids=["gamma"]))
    (tmp_path / "bad.zip").write_text("no zip")
    with pytest.raises(ConfigError, match="evaluation.blimp.dataset_name"):
        load_pairs(BlimpConfig(str(tmp_path / "bad.zip")))


def records(uid="alpha", count=3):
    return [{"UID": uid, "linguistics_term": "t", "field": "syntax", "sentence_good": f"good\u2028 \x85{i}.", "pair_id": i,
             "sentence_bad": f"bad {i}."} for i in range(count)]


def as_lines(found, start=b"", end="\n"):
    return start + end.join(json.dumps(record, ensure_ascii=False) for record in found).encode()


def write_parquet(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrow.parquet.write_table(arrow.Table.from_pylist(found), path)


@pytest.mark.parametrize("kind", ["hub", "converted", "file", "lines", "bom", "crlf"])
def test_blimp_is_read_from_any_copy_of_it(tmp_path, kind):
    """As a clone of the Hub's repository, its own conversion, or files of either kind; U+2028 is text and no end of line."""
    expected = [(uid, f"good\u2028 \x85{i}.") for uid in ("alpha", "beta") for i in range(3)]
    path, both = tmp_path / "blimp", records("alpha") + records("beta")
    if kind in ("hub", "converted"):
        for uid in ("alpha", "beta"):
            name = f"{uid}/train-00000-of-00001.parquet" if kind == "hub" else f"{uid}/train/0000.parquet"
            write_parquet(path / name, records(uid))
        (path / "README.md").write_text("# BLiMP")
    elif kind == "file":
        path = tmp_path / "all.parquet"
        write_parquet(path, both)
    else:
        path = tmp_path / "all.jsonl"
        path.write_bytes(as_lines(both, *{"lines": (), "bom": (b"\xef\xbb\xbf",), "crlf": (b"", "\r\n")}[kind]))
    assert [(p.uid, p.good) for p in load_pairs(BlimpConfig(str(path)))] == expected


def test_of_two_kinds_of_files_one_is_read_and_said(tmp_path, said):
    write_parquet(tmp_path / "a.parquet", records("alpha"))
    (tmp_path / "a.jsonl").write_bytes(as_lines(records("alpha")))
    assert len(load_pairs(BlimpConfig(str(tmp_path)))) == 3
    assert said == [f"{tmp_path}: holds .parquet and .jsonl files; the .parquet are read"]


def test_blimp_that_cannot_be_read_is_one_line(tmp_path):
    def zipped(name, content):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", content)
        return tmp_path / name
    (tmp_path / "two").mkdir()
    for name in ("two/1.zip", "two/2.zip"):
        zipped(name, as_lines(records()))
    bomb = zipped("bomb.zip", b" " * 1000)
    bomb.write_bytes(bomb.read_bytes().replace((1000).to_bytes(4, "little"), (3 << 30).to_bytes(4, "little")))
    secret = zipped("secret.zip", as_lines(records()))
    data = bytearray(secret.read_bytes())
    data[6] |= 1  # encrypted, say both headers
    data[data.index(b"PK\x01\x02") + 8] |= 1
    secret.write_bytes(data)
    for name, content in (("deep", b"[" * 100_000), ("list", b"[1]"), ("number", b"5"), ("short", b'{"UID": "a"}'),
                          ("numbers", b'{"UID": 1, "linguistics_term": "t", "sentence_good": "a", "sentence_bad": "b"}'),
                          ("latin", b"\xff\xfe"), ("empty", b"")):
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    write_parquet(tmp_path / "columns.parquet", [{"text": "a"}])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    for path in [tmp_path / "two", *(p for p in tmp_path.iterdir() if p.is_file())]:
        with pytest.raises(ConfigError, match="evaluation.blimp.dataset_name: .*cannot be read") as error:
            load_pairs(BlimpConfig(str(path)))
        assert "\n" not in str(error.value) and len(str(error.value)) < 700, path


def pairs_of_length(lengths):
    return [Pair("uid", "term", "x" * length, "y" * length) for length in lengths]


@pytest.mark.parametrize("start", [None, 256])
def test_sentences_longer_than_the_model_are_cut_counted_and_said(dataset, said, start):
    model = PicoDecoder(ModelConfig(d_model=16, n_layers=1, vocab_size=257, max_seq_len=8, attention_n_heads=2,
                                    attention_n_kv_heads=1, activation_hidden_dim=16))
    fits = 9 if start is None else 8  # labels of 8 inputs; the start token is an input
    result = evaluate_blimp(model, pairs_of_length([fits, fits + 1, fits + 9, 1]), load_tokenizer(dataset), start, 4, CPU)
    assert (result["cut"], result["pairs"]) == (4, 4)
    assert said == ["4 of 8 BLiMP sentences are cut to the 9 tokens that the model reads"]
    said.clear()
    result = evaluate_blimp(model, pairs_of_length([fits, 1]), load_tokenizer(dataset), start, 4, CPU)
    assert result["cut"] == 0 and said == []


@pytest.mark.parametrize("words, refused", [([], True), (["evaluation.blimp.metric_uids=[short]"], False)])
def test_a_model_that_reads_too_little_of_blimp_is_told_so_at_the_start(dataset, tmp_path, words, refused):
    path = tmp_path / "blimp.jsonl"
    pairs = [{"UID": uid, "linguistics_term": "t", "sentence_good": "a" * length, "sentence_bad": "b" * length}
             for uid, length in (("short", 17), ("long", 40))]
    path.write_text("\n".join(map(json.dumps, pairs)))
    runs = lab.Lab(tmp_path, dataset)
    printed = runs.train("run", "evaluation.metrics=[blimp]", f"evaluation.blimp.dataset_name={path}", "training.max_steps=1",
                         "model.vocab_size=257", NO_SNAPSHOTS, *words, code=2 if refused else 0)
    if refused:
        assert "evaluation.metrics: 50% of BLiMP's sentences have more than the 17 tokens" in printed
        assert not (tmp_path / "run").exists()
    else:
        assert json.loads((tmp_path / "run/eval_results/step_1.json").read_text())["blimp"]["cut"] == 0


def test_paloma_and_blimp_come_from_the_hub_and_are_scored_by_source_on_any_ranks(exported, tmp_path):
    folder, _, theirs = exported
    rows = np.random.default_rng(0).integers(8, size=(7, 13))
    sources = ["c4", "wiki", "c4", "wiki", "c4", "books", "c4"]
    table, buffer = arrow.table({"input_ids": rows.tolist(), "source": sources}), io.BytesIO()
    arrow.parquet.write_table(table, buffer)
    pairs = made_pairs(20)
    texts = {uid: "\n".join(json.dumps({"UID": uid, "linguistics_term": p.term, "sentence_good": p.good, "sentence_bad": p.bad})
                            for p in pairs if p.uid == uid) for uid in ("uid_0", "uid_1", "uid_2")}
    ids = torch.from_numpy(rows)
    with torch.no_grad():
        losses = np.array([theirs(input_ids=row[None], labels=row[None]).loss.item() for row in ids])
    with Hub() as hub:
        hub.repos["datasets/lab/paloma"] = {"data/val-00000-of-00001.parquet": buffer.getvalue()}
        hub.repos["datasets/lab/blimp"] = {f"{uid}.jsonl": text.encode() for uid, text in texts.items()}
        for ranks in (0, 2):
            out = tmp_path / f"{ranks}.json"
            lab.forked("evaluate.py", folder, "--out", out, "evaluation.metrics=[paloma,blimp]",
                       "evaluation.paloma.dataset_name=lab/paloma", "evaluation.paloma.batch_size=2",
                       "evaluation.blimp.dataset_name=lab/blimp", "evaluation.blimp.start_token=eos",
                       f"data.dataset.cache_dir={tmp_path / f'cache-{ranks}'}", ranks=ranks, env=hub.env(tmp_path / "hf"))
    alone, together = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (0, 2))
    assert together == alone
    found = alone["paloma"]
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert found["mean_row_perplexity"] == pytest.approx(np.exp(losses).mean(), rel=1e-4)
    for source in ("c4", "wiki", "books"):
        of = losses[[s == source for s in sources]]
        assert found["by_source"][source]["perplexity"] == pytest.approx(math.exp(of.mean()), rel=1e-4)
        assert found["by_source"][source]["mean_row_perplexity"] == pytest.approx(np.exp(of).mean(), rel=1e-4)
    ours, tokenizer = load_decoder(folder), load_tokenizer(folder)
    assert alone["blimp"]["start_token"] == tokenizer.eos and alone["blimp"]["pairs"] == len(pairs)
    assert alone["blimp"]["accuracy"] == evaluate_blimp(ours, pairs, tokenizer, tokenizer.eos, 4, CPU)["accuracy"]


def test_the_command_agrees_with_training_from_any_number_of_ranks(dataset, tmp_path):
    path = lab.write_config(tmp_path / "c.yaml", lab.tiny_tree(dataset, tmp_path / "runs"))
    lab.call("train.py", path, "training.max_steps=3", "checkpointing.checkpoints_dir=saved",
             "checkpointing.evaluation.eval_results_dir=scores")
    run = tmp_path / "runs" / "run"
    trained = json.loads((run / "scores" / "step_3.json").read_text())["val"]
    (run / "scores" / "step_3.json").unlink()
    lab.call("evaluate.py", run)
    assert json.loads((run / "scores" / "step_3.json").read_text())["val"]["loss"] == pytest.approx(trained["loss"], abs=1e-6)
    for ranks in (0, 2):
        lab.forked("evaluate.py", run, "--out", tmp_path / f"{ranks}.json", ranks=ranks)
        found = json.loads((tmp_path / f"{ranks}.json").read_text())["val"]
        assert found["rows"] == trained["rows"] and found["loss"] == pytest.approx(trained["loss"], abs=1e-6)


def test_bits_a_byte_count_the_text_and_not_the_tokens(tmp_path):
    """Bytes by counting, a tokenizer of pieces by the text that it was given; special tokens have none."""
    rows = np.array([[10, 65, 66, 256, 67], [256, 0xC3, 0xA9, 10, 10]])
    assert text_bytes(ByteTokenizer(), rows) == 3 + 4
    texts = ["The quick brown fox jumps over the lazy dog", "Sphinx of black quartz, judge my vow na\u00efvely"]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer, inner.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    inner.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for text in texts:
        ids = tokenizer.encode(text)
        first = len(tokenizer.decode(ids[:1]).encode())
        assert text_bytes(tokenizer, np.array([[*ids, tokenizer.eos]])) == len(text.encode()) - first
    assert bits_per_byte(np.array([8.0, 4.0]), 6)["bits_per_byte"] == pytest.approx(2 / math.log(2)) and bits_per_byte(rows, 0) == {}


def test_val_of_bytes_says_bits_a_byte(dataset, tmp_path):
    found = lab.Lab(tmp_path, dataset)
    out = found.train("run", "training.stop_at_step=1", "checkpointing.learning_dynamics=null")
    loss, bits = (found.metrics("run", f"eval/val_{key}")[0] for key in ("loss", "bits_per_byte"))
    assert bits == pytest.approx(loss / math.log(2)) and "bits a byte" in out  # every label is a byte
