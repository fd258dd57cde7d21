"""Small tokenizers of every family that people bring, trained here, each put together as the real ones of its family are."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END = "<|endoftext|>"
TEXT = ("The quick brown fox jumps over the lazy dog, doesn't it? It's 1234567 times (at least) as quick as 42 others.\n\n"
        "def total(values):\n    return sum(values)  # of them all\n\tx = {'a': [1, 22, 333]}\r\n"
        "\u00dcber stra\u00dfe, na\u00efve caf\u00e9: \u4e16\u754c\u3002\u4f60\u597d\uff0c\u4e16\u754c "
        "\U0001f30d\U0001f468\u200d\U0001f469 e\u0301\u2028z   w\n")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def _bpe(vocab: int = 400, special: str = END, **options) -> tuple:
    return models.BPE(**options), trainers.BpeTrainer(vocab_size=vocab, special_tokens=[special], show_progress=False,
                                                      initial_alphabet=ALPHABET, limit_alphabet=1000)


def gpt2(prefix: bool = False, regex: bool = True, normalizer=None, end: str = END) -> Tokenizer:
    model, trainer = _bpe(special=end)
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    made.decoder, made.normalizer = decoders.ByteLevel(), normalizer or normalizers.Sequence([])
    made.train_from_iterator([TEXT] * 3, trainer)
    return made


def llama3() -> Tokenizer:
    model, trainer = _bpe(ignore_merges=True)
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([TEXT] * 3, trainer)
    return made


def llama2() -> Tokenizer:
    """SentencePiece's BPE: a space in front of every text, single bytes for what it does not know, no words."""
    letters = sorted(set(TEXT.replace(" ", "\u2581")) - set("\u4e16\u754c\U0001f30d\n"))
    merges = [("\u2581", "\u2581"), ("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "b"), ("r", "o"), ("o", "x"),
              ("\u2581", "f")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True,
                                byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<s>", "</s>"])
    return made


def unigram() -> Tokenizer:
    """SentencePiece's other model, as T5 and XLNet have it."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator([TEXT] * 9, trainers.UnigramTrainer(vocab_size=150, special_tokens=["</s>", "<unk>"],
                                                                 unk_token="<unk>", show_progress=False))
    return made


def bert() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator([TEXT] * 9, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"],
                                                                   show_progress=False))
    return made


def words() -> Tokenizer:
    known = dict.fromkeys(["<unk>", END, *TEXT.split()])
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def masked() -> Tokenizer:
    """An added token that takes the blanks around it, one in the middle of words, and one with a blank in it."""
    made = gpt2()
    made.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    made.add_tokens([AddedToken("brown fox"), AddedToken("ump")])
    return made


ZOO = {"gpt2": gpt2, "gpt2 with a space in front": lambda: gpt2(prefix=True), "gpt2 of whole lines": lambda: gpt2(regex=False),
       "olmo": lambda: gpt2(normalizer=normalizers.NFC()), "llama3": llama3, "llama2": llama2, "unigram": unigram, "bert": bert,
       "words": words, "masked": masked}


def save(name: str, folder: Path) -> Tokenizer:
    """The tokenizer of a family, as folder/tokenizer.json."""
    ZOO[name]().save(str(folder / "tokenizer.json"))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))  # whose scores are rounded
