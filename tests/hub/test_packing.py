"""Documents cut, encoded and packed: against the library's own encoding of the whole, and numpy."""

import random

import numpy as np
import pytest
import zoo

import lab
from data import DataError
from hub import packing
from hub.packing import TokenFile, cut, encode
from hub.tokenizers import ByteTokenizer, load_tokenizer

SHORT = 400  # characters of a piece here, so that a small text has many


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(packing, "PIECE", SHORT)
    monkeypatch.setattr(packing, "CONTEXT", 96)
    monkeypatch.setattr(packing, "BATCH", 3 * SHORT)


def chunks(text, seed, most=1000):
    """A document in pieces of any length, as a file is read."""
    rng, at = random.Random(seed), 0
    while at < len(text):
        size = rng.choice([1, 7, most])
        yield text[at:at + size], False
        at += size
    yield "", True


def mixed(seed, length=30_000):
    """Bits of every kind of text: blanks in runs, line ends, other scripts, special tokens, words without an end."""
    rng = random.Random(seed)
    bits = [*zoo.TEXT.split(" "), zoo.TEXT, " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u2028", "\u00a0", " .", ".\n", "...\n\n",
            "x" * 50,
            "e\u0301", "\u4e16\u754c\uff0c" * 9, zoo.END, "<mask>", " <mask> ", "<0x41>", "</s>", "brown fox", "12345", "'", "'s",
            "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\ufffd", "\ufeff", "\0"]
    text = ""
    while len(text) < length:
        text += rng.choice(bits) + rng.choice(["", " ", " "])
    return text


def tokenizer_of(family, folder):
    if family in zoo.ZOO:
        zoo.save(family, folder)
    return load_tokenizer(lab.SHARED / "tokenizer" if family == "real" else folder)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", [*zoo.ZOO, "bytes", "real"])
def test_a_document_that_is_cut_has_the_ids_of_the_whole(tmp_path, short, family, seed):
    if family == "real" and not (lab.SHARED / "tokenizer").exists():
        pytest.skip("no real tokenizer here")
    tokenizer, text = tokenizer_of(family, tmp_path), mixed(seed)
    expected = list(tokenizer.inner.encode(text, add_special_tokens=False).ids if family != "bytes" else tokenizer.encode(text))
    parts = list(cut(chunks(text, seed), tokenizer))
    assert len(parts) > 30 and max(len(part.text) for part in parts) < 10 * SHORT
    found = [ids for ids, _ in encode(chunks(text, seed), tokenizer)]
    assert np.concatenate(found).tolist() == expected


@pytest.mark.parametrize("text", ["x" * 9000, " " * 9000, "\n" * 9000, "\u4e16" * 9000, "ab" * 4500, "!" * 9000, ""], ids=repr)
@pytest.mark.parametrize("family", ["gpt2", "llama2", "unigram", "bert", "llama3"])
def test_what_has_no_place_to_cut_is_encoded_whole(tmp_path, short, family, text):
    whole = zoo.save(family, tmp_path)
    found = [ids for ids, _ in encode(chunks(text, 0), load_tokenizer(tmp_path))]
    assert np.concatenate(found).tolist() == whole.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", ["unigram", "gpt2", "llama2", "llama3", "bert", "words"])
def test_lines_without_a_blank_are_words_where_the_tokenizer_says_so(tmp_path, short, family, seed):
    """To a Metaspace they are one word, in which rounding decides between 3 33 and 33 3."""
    text = "".join(random.Random(seed).choices(["fox", "333", "22", "\n", "\n", "the", "]}", "over", "ooo", "eee"], k=4000))
    tokenizer = tokenizer_of(family, tmp_path)
    found = [ids for ids, _ in encode([(text, True)], tokenizer)]
    assert np.concatenate(found).tolist() == tokenizer.encode(text)


def pieces_of(texts):
    return [piece for text in texts for piece in ((text[:3], False), (text[3:], True))]


@pytest.mark.parametrize("seed", range(3))
def test_documents_are_closed_once_and_packed_in_order(tmp_path, short, seed):
    rng = random.Random(seed)
    texts = [mixed(seed * 100 + n, length=rng.choice([1, 50, 3000])) for n in range(30)] + ["", f"told{zoo.END}", zoo.END, "x"]
    expected = []
    for ids in map(ByteTokenizer().encode, texts):
        expected += ids + [256] * (ids[-1:] != [256])
    with TokenFile(tmp_path / "tokens", np.dtype(np.uint16)) as tokens:
        assert tokens.add_documents(pieces_of(texts), ByteTokenizer()) == len(texts)
        rows = tokens.rows(17)
        assert tokens.count == len(expected) and rows.shape == (len(expected) // 17, 17)
        array = np.array(expected, np.uint16)[:len(rows) * 17].reshape(-1, 17)
        order = np.random.default_rng(seed).permutation(len(rows))
        for chosen in (slice(None), slice(3, 40), slice(len(rows) - 2, None), slice(5, 5)):
            np.testing.assert_array_equal(rows[chosen], array[chosen])
            np.testing.assert_array_equal(rows.take(order)[chosen], array[order][chosen])
            np.testing.assert_array_equal(rows.take(slice(9, None)).take(order[:0])[chosen], array[:0])
    assert list(tmp_path.iterdir()) == []


def test_documents_are_not_joined_unasked(tmp_path):
    made = zoo.gpt2(end="<fin>")
    made.save(str(tmp_path / "tokenizer.json"))
    with TokenFile(tmp_path / "one", np.dtype(np.uint16)) as tokens:
        assert tokens.add_documents(pieces_of(["only one of them"]), load_tokenizer(tmp_path)) == 1
        assert tokens.count == len(made.encode("only one of them").ids)
        with pytest.raises(DataError, match="the documents would be joined.*--eos.*<fin>"):
            tokens.add_documents(pieces_of(["one", "two"]), load_tokenizer(tmp_path))
    with TokenFile(tmp_path / "two", np.dtype(np.uint16)) as tokens:
        assert tokens.add_documents(pieces_of(["one", "two"]), load_tokenizer(tmp_path, "")) == 2
        assert tokens.rows(tokens.count)[:].tolist() == [made.encode("one").ids + made.encode("two").ids]


def test_an_error_in_a_text_ends_the_encoding(tmp_path, short):
    def broken():
        yield from chunks(mixed(0), 0)
        raise DataError("broken")
    with TokenFile(tmp_path / "tokens", np.dtype(np.uint16)) as tokens, pytest.raises(DataError, match="broken"):
        tokens.add_documents(broken(), ByteTokenizer())
