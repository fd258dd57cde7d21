"""Text from checkpoints, as a user asks for it."""

import time

import pytest
import torch

import lab
from config import ModelConfig
from hub.tokenizers import ByteTokenizer
from model import PicoDecoder
from sample import stream_text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a moment on bytes."""
    here = tmp_path_factory.mktemp("sample")
    (here / "text.txt").write_text("to be or not to be, that is the question; " * 200)
    lab.call("shards.py", "text", here / "text.txt", "--out", here / "data", "--row-length", 33)
    tree = lab.tiny_tree(here / "data", here / "runs")
    tree["model"] |= {"vocab_size": 300, "max_seq_len": 32}
    tree["training"]["max_steps"] = 10
    lab.call("train.py", lab.write_config(here / "c.yaml", tree))
    return here / "runs" / "run"


def texts(run, *words):
    return lab.call("sample.py", run, *words).split("---")[1:]


def test_prompts_are_continued_by_seed_and_count(run):
    words = ("--prompt", "to be", "--prompt", "or", "--tokens", 12, "--samples", 2)
    first, second = texts(run, *words), texts(run, *words)
    assert first == second and len(first) == 4
    assert all("to be" in text for text in first[:2]) and first[0].splitlines()[1] != first[1].splitlines()[1]


def test_ids_beyond_the_tokenizer_are_never_drawn():
    torch.manual_seed(0)
    model = PicoDecoder(ModelConfig(d_model=16, n_layers=1, vocab_size=300, max_seq_len=64, attention_n_heads=2,
                                    attention_n_kv_heads=1, activation_hidden_dim=16))
    with torch.no_grad():
        model.de_embedding_proj.weight[257:] = model.de_embedding_proj.weight[:43] * 100  # what would else be drawn most
    drawn = torch.cat(list(model.stream(torch.zeros(64, 1, dtype=torch.int64), 40, 1.0, None, 0, 257)), 1)
    assert drawn.max() < 257
    assert torch.cat(list(model.stream(torch.zeros(64, 1, dtype=torch.int64), 40, 1.0, None, 0)), 1).max() >= 257


def test_streamed_pieces_are_whole_characters_that_add_up():
    class Fixed:
        """A model that says what it is told, byte by byte."""
        cfg = ModelConfig(max_seq_len=64)

        def stream(self, start, count, *_):
            yield from (torch.tensor([[b]]) for b in [*"naïve — ☕".encode(), ByteTokenizer.eos, 65])
    pieces = list(stream_text(Fixed(), ByteTokenizer(), "x", 50, 1.0, None, 0, torch.device("cpu")))
    assert "".join(pieces) == "naïve — ☕" and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("words, key", [(("--tokens", 0), "--tokens"), (("--temperature", "-1"), "--temperature"),
                                        (("--prompt", "x" * 400), "--prompt"), (("--top-k", 0), "--top-k")])
def test_what_cannot_be_is_one_line(run, words, key):
    printed = lab.call("sample.py", run, *words, code=2)
    assert f"error: {key}" in printed and "Traceback" not in printed


def test_a_run_that_is_not_there_is_looked_for_beside_it(tmp_path):
    (tmp_path / "demo").mkdir()
    assert f"did you mean {tmp_path}/demo?" in lab.call("sample.py", tmp_path / "demmo", code=2)
    assert f"did you mean {tmp_path}/demo?" in lab.call("analyze.py", tmp_path / "demmo", code=2)
    assert "did you mean compare?" in lab.call("analyze.py", "compre", tmp_path / "a", tmp_path / "b", code=2)
    printed = lab.call("train.py", "config/demo.yaml", "--training.max_steps=10", code=2)
    assert "options of the configuration have no dashes: training.max_steps=10" in printed and printed.count("\n") == 1


def test_the_cache_makes_generation_at_least_five_times_faster_and_no_other(capsys):
    torch.manual_seed(0)
    model = PicoDecoder(ModelConfig(d_model=96, n_layers=12, vocab_size=512, max_seq_len=600, activation_hidden_dim=384)).eval()
    tokens = torch.randint(512, (1, 8))
    stream, with_cache, without = model.stream(tokens, 512, temperature=0), 0.0, 0.0
    for _ in range(16):  # in turns: 32 tokens with the cache, and 32 times one without, at the length between
        start = time.process_time()  # of this process, whatever else runs beside it
        more = [next(stream) for _ in range(32)]
        with_cache, middle = with_cache + time.process_time() - start, tokens.size(1) + 16
        tokens = torch.cat([tokens, *more], 1)
        with torch.no_grad():
            start = time.process_time()
            model(tokens[:, :middle])
            without += 32 * (time.process_time() - start)
    with torch.no_grad():
        assert torch.equal(model(tokens[:, :-1])[:, 7:].argmax(-1), tokens[:, 8:]), "each is what all before it make likeliest"
    with capsys.disabled():
        print(f"\n512 tokens: {with_cache:.2f} s with the cache, {without:.2f} s without, {without / with_cache:.1f} times")
    assert without >= 5 * with_cache
