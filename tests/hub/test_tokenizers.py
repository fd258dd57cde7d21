"""Tokenizers as people bring them: against the library and transformers, read from the same files."""

import json
import os
import random

import pytest
import tokenizers
import zoo
from transformers import AutoTokenizer

import lab
from data import DataError
from hub.tokenizers import (ByteTokenizer, JsonTokenizer, StreamDecoder, check_tokenizer, load_tokenizer, require_eos,
                            save_tokenizer)

DEEPSEEK = "<\uff5cend\u2581of\u2581sentence\uff5c>"
TEXTS = ["The quick brown fox", "", zoo.TEXT, "\U0001f30d\u4e16\u754c \U0001f468\u200d\U0001f469 caf\u00e9", "  two  blanks ",
         "it's 12345, x",
         "\ufffd in it \ufffd", "\n\n\n\ttab"]
PLAIN = ["", "plain", "Gr\u00fc\u00dfe, \u4e16\u754c \U0001f30d\n\ttabs  and  spaces", "\0\x7f", "<|endoftext|"]


@pytest.mark.parametrize("text", PLAIN)
def test_bytes_round_trip_with_the_end_of_a_text_outside_of_them(tmp_path, text):
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, ByteTokenizer) and (tokenizer.vocab_size, tokenizer.eos) == (257, 256)
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text) + [tokenizer.eos]) == text


def test_bytes_that_are_no_text_decode_to_replacement_characters():
    assert ByteTokenizer().decode([0x61, 0xFF, 256, 0x62]) == "a\ufffdb"


def tiny_bpe(folder):
    """A byte-level BPE whose special tokens come first, as the library numbers them: eos 0, pad 1."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False,
                                             special_tokens=["<|endoftext|>", "<|padding|>"])
    inner.train_from_iterator(["plain tabs and spaces"] * 9, trainer)
    inner.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("source, expected", [("made", (270, 0, 1)), ("real", (50280, 50279, 1))])
def test_a_tokenizer_json_round_trips_and_says_its_special_tokens(tmp_path, source, expected):
    folder = tiny_bpe(tmp_path) if source == "made" else lab.SHARED / "tokenizer"
    if not folder.exists():
        pytest.skip("no real tokenizer here")
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, JsonTokenizer) and (tokenizer.vocab_size, tokenizer.eos, tokenizer.pad) == expected
    for text in PLAIN:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(0 <= i < expected[0] for i in ids)
        assert tokenizer.eos not in ids


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": 3}'])
def test_a_broken_tokenizer_json_is_an_error_naming_it(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def write(folder, special):
    made = zoo.gpt2(end=special[0])
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    return made


# ---- what is left in the file ----------------------------------------------------------------------------------

@pytest.mark.parametrize("spoil", [
    lambda made: made.enable_truncation(4), lambda made: made.enable_truncation(3, direction="left"),
    lambda made: made.enable_padding(length=64), lambda made: made.enable_padding(pad_to_multiple_of=8),
    lambda made: setattr(made.model, "dropout", 0.9)], ids="truncation left padding multiple dropout".split())
def test_what_its_last_user_left_in_the_file_is_not_obeyed(tmp_path, spoil):
    made = zoo.gpt2()
    expected = [made.encode(text).ids for text in TEXTS]
    spoil(made)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.encode(text) for text in TEXTS] == expected
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == expected


def test_the_vocabulary_ends_with_the_largest_id(tmp_path):
    model = tokenizers.models.WordLevel({"a": 0, "b": 7, "</s>": 300}, "a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == 301
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


# ---- the end of a text -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("special, files, expected, source", [
    ([zoo.END], {}, zoo.END, "by its name"), (["</s>"], {}, "</s>", "by its name"), (["[EOS]"], {}, "[EOS]", "by its name"),
    ([DEEPSEEK, "<s>"], {}, DEEPSEEK, "by its name"), (["<s>", "<fin>"], {}, None, ""),
    ([zoo.END, "<fin>"], {"tokenizer_config.json": {"eos_token": "<fin>"}}, "<fin>", "tokenizer_config.json"),
    ([zoo.END, "<fin>"], {"tokenizer_config.json": {"eos_token": {"content": "<fin>", "lstrip": False}}}, "<fin>",
     "tokenizer_config.json"),
    ([zoo.END, "<fin>"], {"special_tokens_map.json": {"eos_token": "<fin>"}}, "<fin>", "special_tokens_map.json"),
    ([zoo.END, "<fin>"], {"tokenizer_config.json": {"eos_token": "<absent>"}, "special_tokens_map.json": {"eos_token": "<fin>"}},
     "<fin>", "special_tokens_map.json"),
    ([zoo.END, "<fin>"], {"generation_config.json": {"eos_token_id": "fin"}}, "<fin>", "generation_config.json"),
    ([zoo.END, "<fin>"], {"generation_config.json": {"eos_token_id": ["fin", 0]}}, "<fin>", "generation_config.json"),
    ([zoo.END], {"generation_config.json": {"eos_token_id": 2}}, zoo.END, "by its name"),  # an ordinary token
    ([zoo.END], {"tokenizer_config.json": {"eos_token": None}}, None, "tokenizer_config.json")], ids=str)
def test_the_end_of_a_text_is_asked_of_the_files_beside_and_then_of_its_name(tmp_path, special, files, expected, source):
    made = write(tmp_path, special)
    for name, content in files.items():
        if "eos_token_id" in content:
            ids = content["eos_token_id"]
            ids = [made.token_to_id("<fin>") if i == "fin" else i for i in (ids if isinstance(ids, list) else [ids])]
            content = {"eos_token_id": ids if len(ids) > 1 else ids[0]}
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.text_of(tokenizer.eos), tokenizer.eos_source) == (expected, source)
    if expected is None:
        with pytest.raises(DataError, match="--eos.*such as " + special[0].replace("|", r"\|")):
            require_eos(tokenizer, "the documents would be joined")
    else:
        assert require_eos(tokenizer, "") == made.token_to_id(expected)


def test_the_end_that_is_asked_for_is_taken_or_refused_with_what_there_is(tmp_path):
    write(tmp_path, ["<s>", zoo.END])
    assert load_tokenizer(tmp_path, "<s>").text_of(load_tokenizer(tmp_path, "<s>").eos) == "<s>"
    assert load_tokenizer(tmp_path, "").eos is None
    with pytest.raises(DataError, match=r"'<fin>'; its special tokens are: .*<s>"):
        load_tokenizer(tmp_path, "<fin>")
    with pytest.raises(DataError, match="bytes end a text with"):
        load_tokenizer(tmp_path / "empty", "<s>")


@pytest.mark.parametrize("content", ["{", "\xff", "[" * 100_000, '["<s>"]'])
def test_a_broken_file_beside_is_named(tmp_path, content):
    write(tmp_path, [zoo.END])
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match="tokenizer_config.json: cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("prefix", ["##", "#####", "a"])
def test_a_file_that_would_abort_the_library_or_make_it_panic_is_refused(tmp_path, prefix):
    """Cut in the middle of a letter, a merge without the prefix ends the whole process."""
    vocab = {"a": 0, "\u4e16": 1, "a\u4e16": 2}
    made = json.loads(zoo.gpt2().to_str())
    made["model"] |= {"vocab": vocab, "merges": [["a", "\u4e16"]], "continuing_subword_prefix": prefix}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(DataError, match="merges without its continuing_subword_prefix"):
        load_tokenizer(tmp_path)
    made["model"] |= {"vocab": {"a": 0, f"{prefix}b": 1, "ab": 2}, "merges": [["a", f"{prefix}b"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    assert load_tokenizer(tmp_path).vocab_size > 2


def test_a_text_that_its_words_cannot_say_is_one_line(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="tokenizer.json: cannot encode 'b'"):
        load_tokenizer(tmp_path).encode("b")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    if name != "tokenizer.json":
        write(tmp_path, [zoo.END])
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: .*is no file"):
        load_tokenizer(tmp_path)


# ---- special tokens in a text ----------------------------------------------------------------------------------

@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama2", "words", "bytes"])
def test_a_spelt_out_end_of_text_is_what_was_chosen_here_and_in_transformers(tmp_path, family, split):
    if family != "bytes":
        zoo.save(family, tmp_path)
    chosen = load_tokenizer(tmp_path, split_special=split)
    end = chosen.text_of(chosen.eos)
    text = f"a story {end} another {end}"
    assert chosen.encode(text).count(chosen.eos) == (0 if split else 2)
    assert chosen.encode_batch([text])[0].tolist() == chosen.encode(text)
    assert end in chosen.decode(chosen.encode(text)) if split and family in ("gpt2", "bytes") else True
    kept = tmp_path / "kept"
    kept.mkdir()
    save_tokenizer(chosen, kept)
    again = load_tokenizer(kept)
    assert (again.encode(text), again.eos, again.split_special) == (chosen.encode(text), chosen.eos, split)
    if family == "bytes":
        assert [path.name for path in kept.iterdir()] == ["tokenizer_config.json"] * split
    else:
        theirs = AutoTokenizer.from_pretrained(kept)
        assert theirs(text, add_special_tokens=False)["input_ids"] == again.encode(text) and theirs.eos_token_id == again.eos
        assert set(theirs(text)) == {"input_ids", "attention_mask"}


# ---- what fits -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("vocab_size, largest, fits",
                         [(400, 399, True), (50304, 399, True), (399, 300, False), (50304, 400, False),
                                                       (400, 3, True)])
def test_a_tokenizer_that_cannot_have_made_the_rows_is_refused(tmp_path, vocab_size, largest, fits):
    zoo.save("gpt2", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 400
    if fits:
        check_tokenizer(tokenizer, vocab_size, largest, "corpora/x")
    else:
        with pytest.raises(DataError, match=r"tokenizer.json: has 400 ids and cannot have made corpora/x"):
            check_tokenizer(tokenizer, vocab_size, largest, "corpora/x")


# ---- text as it comes ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", [*zoo.ZOO, "bytes"])
def test_pieces_of_text_are_joined_what_the_tokenizer_shows_of_the_whole(tmp_path, family):
    if family != "bytes":
        zoo.save(family, tmp_path)
    tokenizer, rng = load_tokenizer(tmp_path), random.Random(0)
    drawn = [[rng.randrange(tokenizer.vocab_size) for _ in range(60)] for _ in range(20)]  # no text at all
    for ids in [*map(tokenizer.encode, TEXTS), *drawn]:
        for at in {0, 1, len(ids) // 2, len(ids)}:
            decoder = StreamDecoder(tokenizer, ids[:at])
            pieces = [decoder.feed(token) for token in ids[at:]]
            pieces.append(decoder.finish())
            before = tokenizer.decode(ids[:at])
            whole = tokenizer.decode(ids)
            if whole.startswith(before):  # not where the prompt ends within a character
                assert before + "".join(pieces) == whole
            if ids in drawn[:1] or not at:
                assert "\ufffd" not in "".join(pieces[:-1]) or "\ufffd" in whole


@pytest.mark.parametrize("family, prompt, expected", [("llama2", "the brown", " fox"), ("unigram", "the brown", " fox"),
                                                      ("gpt2", "the brown", " fox"), ("bert", "the brown", " fox")])
def test_a_continuation_keeps_the_blank_before_it(tmp_path, family, prompt, expected):
    tokenizer = load_tokenizer(tmp_path) if zoo.save(family, tmp_path) else None
    context, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + expected)
    decoder = StreamDecoder(tokenizer, context)
    assert whole[:len(context)] == context
    assert "".join([*map(decoder.feed, whole[len(context):]), decoder.finish()]) == expected


def test_a_character_is_shown_when_its_last_byte_has_come(tmp_path):
    zoo.save("llama2", tmp_path)
    for tokenizer in (ByteTokenizer(), JsonTokenizer(tmp_path / "tokenizer.json")):
        decoder, text = StreamDecoder(tokenizer), "a\U0001f30db\u4e16"
        pieces = [decoder.feed(token) for token in tokenizer.encode(text)]
        assert [piece for piece in pieces if piece] in (["a", "\U0001f30d", "b", "\u4e16"], ["a", "\U0001f30db"])
        assert "".join([*pieces, decoder.finish()]) == text
