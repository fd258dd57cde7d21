"""Tokenizers: bytes, or a Hugging Face tokenizer.json as people bring it; kept with what they made, fitting it, and shown.

    tokenizer = load_tokenizer("corpora/books")    # the folder's tokenizer.json, or bytes
    tokenizer.decode(tokenizer.encode("a text"))
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import DataError, token_dtype
from runtime.files import read_object, write_text

END_OF_TEXT = "<|endoftext|>"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
USUAL_NAMES = {"eos": (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]", "<EOS>",
                       "<\uff5cend\u2581of\u2581sentence\uff5c>"),  # where no file says so; the last is DeepSeek's
               "pad": ("<|padding|>", "<pad>", "<|pad|>", "[PAD]")}


MOST_GROWTH, OTHER_GROWTH = 1000, {"Precompiled": 40}  # characters of one: more is a bomb


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, and 256 for the end of a text: the tokenizer of a folder without one."""
    path, vocab_size, eos, pad, eos_source, special = "bytes", 257, 256, 256, "bytes", {256: END_OF_TEXT}

    def __init__(self, split_special: bool = False):
        self.split_special = split_special  # whether END_OF_TEXT in a text is spelt out, instead of ending it

    def text_of(self, token: int | None) -> str | None:
        return self.special.get(token)

    def encode(self, text: str) -> list[int]:
        first, *others = [text] if self.split_special else text.split(END_OF_TEXT)
        return [*first.encode("utf-8"), *(i for part in others for i in (self.eos, *part.encode("utf-8")))]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.uint16) if END_OF_TEXT in text else
                np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A Hugging Face tokenizer.json, and what the files beside it say of the tokens that end and pad a text.

    `eos` names the end of text instead; "" is none. With `split_special` special tokens that a text spells out are ordinary
    text. Truncation, padding and sampling left in the file are not obeyed."""

    def __init__(self, path: Path, eos: str | None = None, split_special: bool | None = None):
        import tokenizers
        self.path, config = path, optional_object(path.with_name(TOKENIZER_CONFIG))
        check_model(path)
        try:
            self.inner = tokenizers.Tokenizer.from_file(str(path))
            self.inner.no_truncation()
            self.inner.no_padding()
            for name in {"dropout", "alpha"} & set(dir(self.inner.model)):
                setattr(self.inner.model, name, None)
            self.vocab_size = 1 + max(self.inner.get_vocab().values())  # ids may have gaps
        except BaseException as error:  # the library raises bare Exception, and its panics are not even that
            if not is_the_librarys(error):
                raise
            raise DataError(f"{path}: not a tokenizer.json ({error})") from None
        self.special = {i: token.content for i, token in self.inner.get_added_tokens_decoder().items() if token.special}
        (self.eos, self.eos_source), (self.pad, _) = self._find("eos", config, eos), self._find("pad", config)
        if eos and self.eos is None:
            raise DataError(f"{path}: has no token {eos!r}; its special tokens are: {' '.join(self.special.values())}")
        if self.eos is not None and self.eos not in self.special:  # a text may spell it out, and no decoded text shows it
            self.special[self.eos] = self.text_of(self.eos)
            self.inner.add_special_tokens([tokenizers.AddedToken(self.special[self.eos], normalized=False)])
        self.split_special = config.get("split_special_tokens") is True if split_special is None else split_special
        self.inner.encode_special_tokens = self.split_special  # the library's name for spelling them out

    def _find(self, role: str, config: dict[str, Any], asked: str | None = None) -> tuple[int | None, str]:
        """(id, which file says so) of the token in the role "eos" or "pad"."""
        if asked is not None:
            return self.inner.token_to_id(asked), "as asked for"
        for name in (TOKENIZER_CONFIG, "special_tokens_map.json"):
            said = (config if name == TOKENIZER_CONFIG else optional_object(self.path.with_name(name))).get(f"{role}_token", "")
            if said is None:  # it says that there is none
                return None, name
            if (token := self.inner.token_to_id(str(said.get("content", "") if isinstance(said, dict) else said))) is not None:
                return token, name
        ids = optional_object(self.path.with_name("generation_config.json")).get(f"{role}_token_id")
        for token in ids if isinstance(ids, list) else [ids]:
            if isinstance(token, int) and token in self.special:  # transformers writes 2 for lack of anything better
                return token, "generation_config.json"
        return next(((i, "by its name") for i in map(self.inner.token_to_id, USUAL_NAMES[role]) if i is not None), (None, ""))

    def text_of(self, token: int | None) -> str | None:
        return None if token is None else self.inner.id_to_token(token)

    def encode(self, text: str) -> list[int]:
        try:
            return self.inner.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if not is_the_librarys(error):
                raise
            raise DataError(f"{self.path}: cannot encode {text[:40]!r} ({error})") from None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        dtype = token_dtype(self.vocab_size)
        code = {2: "H", 4: "I"}[dtype.itemsize]  # numpy takes twice as long to read a list
        encoded = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.frombuffer(array(code, one.ids), dtype) for one in encoded]

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)


Tokenizer = ByteTokenizer | JsonTokenizer


def text_bytes(tokenizer: Tokenizer, rows: np.ndarray) -> int:
    """UTF-8 bytes of the text that the labels of token rows (rows, tokens) stand for; special tokens are none.

    Exact for bytes; where a row of pieces ends inside a character, that counts as 3.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return int((rows[:, 1:] < 256).sum())
    def size(ids: np.ndarray) -> int:
        return len(tokenizer.decode(ids.tolist()).encode("utf-8", errors="replace"))
    return sum(size(row) - size(row[:1]) for row in rows)


def is_the_librarys(error: BaseException) -> bool:
    """Whether an error is of the tokenizers library: one of Python's kind, or a panic."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def growth(steps: Any) -> float:
    """How many characters a normalizer or a decoder may make of one."""
    if not isinstance(steps, (dict, list)):
        return 1
    if isinstance(steps, list):
        return math.prod(map(growth, steps))
    if steps.get("type") == "Replace":
        pattern = steps.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        return max(1, len(str(steps.get("content"))) / max(1, len(str(replaced or ""))))
    return OTHER_GROWTH.get(str(steps.get("type")), 1) * math.prod(growth(steps.get(key)) for key in ("normalizers", "decoders"))


def check_model(path: Path) -> None:
    """Refuse what the library would not survive: steps that make a gigabyte of a word, and merges that lack the file's
    continuing_subword_prefix, which it cuts blindly, so that it may abort the process."""
    try:
        found = optional_object(path)
        for part in ("normalizer", "decoder"):
            if (most := growth(found.get(part))) > MOST_GROWTH:
                raise DataError(f"its {part} makes {most:.3g} characters of one")
    except DataError as error:
        raise DataError(f"{path}: not a tokenizer.json ({error})") from None
    model = found.get("model")
    prefix, merges = (model.get("continuing_subword_prefix"), model.get("merges")) if isinstance(model, dict) else (None, None)
    if isinstance(prefix, str) and isinstance(merges, list):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        if not all(isinstance(pair, list) and pair and str(pair[-1]).startswith(prefix) for pair in pairs):
            raise DataError(f"{path}: has merges without its continuing_subword_prefix {prefix[:40]!r}; it is damaged")


def optional_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} where there is none."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); mend or remove it") from None


def load_tokenizer(folder: str | Path, eos: str | None = None, split_special: bool | None = None) -> Tokenizer:
    """The tokenizer of a dataset or checkpoint folder, or a tokenizer.json itself; bytes for a folder that has none.
    `eos` (data.tokenizer.eos) and `split_special` are as above; None for what the files say."""
    path = Path(folder) if Path(folder).is_file() else Path(folder) / TOKENIZER
    if path.exists():
        return JsonTokenizer(path, eos, split_special)
    if eos not in (None, END_OF_TEXT):
        raise DataError(f"{folder}: bytes end a text with {END_OF_TEXT}, not with {eos!r}; give a tokenizer.json that has it")
    said = optional_object(path.with_name(TOKENIZER_CONFIG)).get("split_special_tokens") is True
    return ByteTokenizer(said if split_special is None else split_special)


# ---- kept, fitting, shown --------------------------------------------------------------------------------------

def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer_config.json that tells load_tokenizer, and transformers, what was chosen."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"], "split_special_tokens": tokenizer.split_special,
            "eos_token": tokenizer.text_of(tokenizer.eos), "pad_token": tokenizer.text_of(tokenizer.pad)}


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Put a tokenizer into a folder of ours, where load_tokenizer finds the same one; plain bytes need no file."""
    if isinstance(tokenizer, JsonTokenizer):
        write_text(folder / TOKENIZER, tokenizer.path.read_bytes().decode("utf-8"))
    if isinstance(tokenizer, JsonTokenizer) or tokenizer.split_special:
        write_text(folder / TOKENIZER_CONFIG, json.dumps(tokenizer_config(tokenizer), indent=1) + "\n")


def describe_tokenizer(tokenizer: Tokenizer) -> str:
    """How a tokenizer will be used, for people to check."""
    eos, spelt = tokenizer.eos, "ordinary text" if tokenizer.split_special else "that token"
    end = "no end of text" if eos is None else f"end of text {tokenizer.text_of(eos)} (id {eos}, {tokenizer.eos_source})"
    return f"{tokenizer.vocab_size:,} ids, {end}; where a text spells out a special token, it is {spelt}"


def require_eos(tokenizer: Tokenizer, why: str) -> int:
    """The id that ends a text. Raises DataError, saying why it is needed, where it is not known."""
    if tokenizer.eos is None:
        raise DataError(f"{tokenizer.path}: names no end of text, and {why}; name one of its tokens with "
                        f"data.tokenizer.eos (shards.py: --eos), such as {' '.join(tokenizer.special.values()) or '</s>'}")
    return tokenizer.eos


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, largest: int, rows: str) -> None:
    """Refuse a tokenizer that cannot have made `rows` of ids up to `largest` from a vocabulary of `vocab_size`."""
    if not largest < tokenizer.vocab_size <= vocab_size:
        raise DataError(f"{tokenizer.path}: has {tokenizer.vocab_size:,} ids and cannot have made {rows}, which holds ids up to "
                        f"{largest:,} of a vocabulary of {vocab_size:,}; give the tokenizer.json that did")


class StreamDecoder:
    """The text of tokens as they come: joined, the pieces that `feed` and `finish` return are what follows `context` in
    the text of all. What may still change is held back: a character that misses bytes, and a run of byte tokens."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self.tokenizer, self.ids = tokenizer, list(context)
        self.shown = tokenizer.decode(self.ids)

    def feed(self, token: int) -> str:
        self.ids.append(token)
        if token in self.tokenizer.special or re.fullmatch("<0x[0-9A-F]{2}>", self.tokenizer.text_of(token) or ""):
            return ""
        return self._show(self.tokenizer.decode(self.ids).rstrip("\ufffd"))

    def finish(self) -> str:
        return self._show(self.tokenizer.decode(self.ids))

    def _show(self, whole: str) -> str:
        if not whole.startswith(self.shown):
            return ""
        start, self.shown = len(self.shown), whole
        return whole[start:]
