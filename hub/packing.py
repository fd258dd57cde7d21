"""Texts into shards: cut where it changes no token, encoded on all cores, packed end to end in a file, cut into rows.

A document of any length is encoded in pieces. A cut is tried between two words, then at other ends of words, and is made only
where the tokenizer itself shows that it is one: the text before it has the same ids with and without what follows. The
next piece is encoded with a little of the text before it, whose ids are dropped: so what a tokenizer does at the beginning
of a text (a space in front, say) happens there only.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import DataError, shard_entry, token_dtype, write_index
from hub.tokenizers import ByteTokenizer, Tokenizer, require_eos
from runtime.files import require_room, write_file

PIECE = 1 << 15  # characters: many pieces in a batch keep many cores busy
BATCH = 1 << 20  # characters encoded at once: 100 bytes of memory a token, some 300,000 tokens
AHEAD = 2  # batches being encoded
CONTEXT = 256  # characters on either side of a cut that are looked at
CUTS = [re.compile(pattern) for pattern in (r"(?<=\w) (?=\w)", r"(?<=\S)\s", r"(?<=\w)[^\w\s]")]
ANYWHERE = re.compile(r"(?s:.)")  # where tokens are bytes
TRIES = 8  # of each kind of place
LONGEST_WORD = 1 << 23  # characters: a tokenizer takes 100 bytes of memory for each of what it is given at once


SHARD_ROWS = 20_480  # rows of a shard, as in the pretokenized Dolma
BLOCK_ROWS = 2_048  # rows in memory at once
SHUFFLE_SEED = 0  # of the rows of a made dataset; the training order is then the order on disk
ENTROPY_VOCABULARY = 1_024  # the largest whose pairs are counted


# ---- encoding --------------------------------------------------------------------------------------------------

class Unbroken(DataError):
    """A text that nowhere can be cut."""


class Part(NamedTuple):
    """A piece of a document for the tokenizer."""
    text: str
    skip: int  # of its first ids, which belong to the text before it
    ends: bool  # whether its document does


def cut(pieces: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[Part]:
    """(text, whether its document ends) as parts of about PIECE characters, whose ids joined are the document's."""
    held, start, context, skip, least = "", 0, "", 0, PIECE
    for text, ends in pieces:
        held, start = held[start:] + text, 0
        while len(held) - start > least + CONTEXT:
            place, ids = find_cut(held, start + least - PIECE // 2, start + least, tokenizer)
            if place is None:  # no word ends here; a longer piece is looked at
                if least > LONGEST_WORD:
                    raise Unbroken(f"{least:,} characters from {held[start:start + 40]!r} on hold no end of a word; break them "
                                   "up, or leave them out")
                least *= 2
                continue
            yield Part(context + held[start:place], skip, False)
            context, skip, start, least = held[place - CONTEXT:place], ids, place, PIECE
        if ends:
            yield Part(context + held[start:], skip, True)
            held, start, context, skip, least = "", 0, "", 0, PIECE


def find_cut(text: str, first: int, end: int, tokenizer: Tokenizer) -> tuple[int | None, int]:
    """(a place from `first` to `end` where a cut changes no token, the number of ids of the CONTEXT before it)."""
    for pattern in (*CUTS, ANYWHERE) if isinstance(tokenizer, ByteTokenizer) else CUTS:
        for _, found in zip(range(TRIES), pattern.finditer(text, first, end)):
            place = found.start()
            before, after = text[place - CONTEXT:place], text[place:place + CONTEXT]
            if starts_alike(tokenizer.encode, before, after) and ends_word(tokenizer, before, after):
                return place, len(tokenizer.encode(before))
    return None, 0


def starts_alike(split: Callable[[str], list], before: str, after: str) -> bool:
    parts = split(before)
    return split(before + after)[:len(parts)] == parts


def ends_word(tokenizer: Tokenizer, before: str, after: str) -> bool:
    """Whether the tokenizer's own words end between two texts. BPE needs no such place: its merges are exact and local; but
    the sums of a unigram model are not, and of two splits with one sum, 3 33 and 33 3, rounding at the word's start decides.
    """
    inner = getattr(tokenizer, "inner", None)
    if inner is None or inner.pre_tokenizer is None or type(inner.model).__name__ == "BPE":
        return True
    normalize = inner.normalizer.normalize_str if inner.normalizer else str
    return starts_alike(lambda text: [word for word, _ in inner.pre_tokenizer.pre_tokenize_str(normalize(text))], before, after)


def encode(pieces: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, bool]]:
    """(ids, whether a document ends behind them) of the documents' parts, in order; encoded ahead, on all cores."""
    def ids_of(parts: list[Part]) -> list[tuple[np.ndarray, bool]]:
        found = tokenizer.encode_batch([part.text for part in parts])
        return [(ids[part.skip:], part.ends) for ids, part in zip(found, parts)]

    waiting: deque = deque()
    with ThreadPoolExecutor(AHEAD) as pool:
        try:
            for parts in batches(cut(pieces, tokenizer)):
                waiting.append(pool.submit(ids_of, parts))
                if len(waiting) > AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


# ---- rows ------------------------------------------------------------------------------------------------------

class TokenFile:
    """Ids end to end in a file of its own, which is not memory; `rows` cuts them."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype, self.count = path, dtype, 0
        self.written, self.read = open(path, "xb", buffering=1 << 20), open(path, "rb", buffering=0)

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, *_: Any) -> None:
        """What it held is in the dataset by now."""
        self.read.close()
        self.path.unlink()
        self.written.close()

    def add(self, *ids: Sequence[int] | np.ndarray) -> None:
        for some in ids:
            self.written.write(np.ascontiguousarray(some, self.dtype))
            self.count += len(some)

    def add_documents(self, pieces: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> int:
        """Encode documents and close each by the end of text, unless it closes itself; their number.

        Raises DataError where a second one would be joined to the first, for want of an end that was asked for.
        """
        documents, last = 0, None
        joined = tokenizer.eos is None and tokenizer.eos_source == "as asked for"
        for ids, ends in encode(pieces, tokenizer):
            if documents and tokenizer.eos is None and not joined:
                require_eos(tokenizer, "the documents would be joined")
            self.add(ids)
            last = ids[-1] if len(ids) else last
            if ends and tokenizer.eos is not None and last != tokenizer.eos:
                self.add([tokenizer.eos])
            documents, last = documents + ends, None if ends else last
        return documents

    def rows(self, row_length: int) -> Rows:
        """All whole rows, in order."""
        self.written.flush()
        return Rows(self, row_length, np.arange(self.count // row_length))


class Rows:
    """Rows of a TokenFile: an array (N, row_length) of which a slice is read when it is asked for."""

    def __init__(self, tokens: TokenFile, row_length: int, order: np.ndarray):
        self.tokens, self.row_length, self.order = tokens, row_length, order

    def __len__(self) -> int:
        return len(self.order)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.order), self.row_length

    def take(self, chosen: np.ndarray | slice) -> Rows:
        return Rows(self.tokens, self.row_length, self.order[chosen])

    def __getitem__(self, part: slice) -> np.ndarray:
        order = self.order[part]
        out = np.empty((len(order), self.row_length), self.tokens.dtype)
        in_turn = bool(len(order)) and bool((np.diff(order) == 1).all())
        for target, number in [(out, order[0])] if in_turn else zip(out, order):
            self.tokens.read.seek(int(number) * self.row_length * out.itemsize)
            if self.tokens.read.readinto(target) != target.nbytes:
                raise OSError(f"{self.tokens.path}: has lost rows")
        return out


# ---- writing -------------------------------------------------------------------------------------------------

def write_shards(folder: Path, rows: np.ndarray | Rows, vocab_size: int, source: str, **extra: Any) -> None:
    """Write rows (N, row_length) as one split's folder of shards with its index, all of it synced."""
    folder.mkdir(parents=True)
    dtype, (count, row_length) = token_dtype(vocab_size), rows.shape
    require_room(folder, count * row_length * dtype.itemsize, str(folder))
    shards = []
    for start in range(0, count, SHARD_ROWS):
        path, end = folder / f"shard-{len(shards):05d}.npy", min(start + SHARD_ROWS, count)
        write_file(path, lambda file: _write_rows(file, rows, start, end, dtype))
        shards.append(shard_entry(path, end - start))
    write_index(folder, shards, row_length, vocab_size, source, **extra)


def _write_rows(file: Any, rows: np.ndarray | Rows, start: int, end: int, dtype: np.dtype) -> None:
    """What np.save writes, without holding it all."""
    shape = (end - start, rows.shape[1])
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    for first in range(start, end, BLOCK_ROWS):
        file.write(np.ascontiguousarray(rows[first:min(first + BLOCK_ROWS, end)], dtype))


def entropies(rows: np.ndarray | Rows, vocab_size: int) -> dict[str, float]:
    """Nats a token that a perfect unigram and a perfect bigram model of these rows would need."""
    pairs = np.zeros(vocab_size * vocab_size, dtype=np.int64)
    singles = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start:start + BLOCK_ROWS]
        flat = block[:, :-1].astype(np.int64) * vocab_size + block[:, 1:]
        pairs += np.bincount(flat.ravel(), minlength=len(pairs))
        singles += np.bincount(block.ravel(), minlength=vocab_size)
    return {"unigram": _entropy(singles), "bigram": _entropy(pairs) - _entropy(pairs.reshape(vocab_size, vocab_size).sum(1))}


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def write_split(folder: Path, rows: Rows, vocab_size: int, source: str) -> None:
    """Write packed rows, shuffled, and with their entropies where the vocabulary is small."""
    extra = {"entropy": entropies(rows, vocab_size)} if vocab_size <= ENTROPY_VOCABULARY else {}
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(rows))
    write_shards(folder, rows.take(order), vocab_size, source, **extra)
