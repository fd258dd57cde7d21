"""Lesson 1, solutions: who reads what; rows with two texts; bytes a token."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data import BatchLoader, TokenDataset
from hub.packing import write_shards

# ---- exercise 1 --------------------------------------------------------------------------------------------------

def rows_of(step, rank, world, batch, micro):
    """Numbers of the rows that a rank reads in an update, in order."""
    accumulation = batch // (world * micro)
    starts = [step * batch + (a * world + rank) * micro for a in range(accumulation)]
    return [start + i for start in starts for i in range(micro)]


@pytest.mark.parametrize("world, micro", [(1, 8), (2, 4), (4, 2), (4, 1)])
def test_rows_of_is_what_the_loader_reads(tmp_path, world, micro):
    write_shards(tmp_path / "train", np.arange(64).repeat(3).reshape(64, 3), 64, "a test")  # row n holds n three times
    rows = TokenDataset(tmp_path, "train")
    for rank in range(world):
        with BatchLoader(rows, 3, micro, 8 // (world * micro), rank, world, torch.device("cpu")) as batches:
            read = torch.cat([part[:, 0] for _, part in batches.next(10)]).tolist()
        assert read == rows_of(3, rank, world, 8, micro)


# ---- exercise 2 --------------------------------------------------------------------------------------------------

def ends_of_text(rows, eos):
    """(share of the rows that hold an end of text, mean number of tokens behind the first one there)."""
    found = rows == eos
    holders = found.any(axis=1)
    behind = rows.shape[1] - 1 - found[holders].argmax(axis=1)
    return holders.mean(), behind.mean()


def test_ends_of_text():
    rows = np.array([[1, 2, 9, 3], [1, 2, 3, 4], [9, 1, 9, 2], [1, 2, 3, 9]])
    assert ends_of_text(rows, 9) == (0.75, (1 + 3 + 0) / 3)


# ---- exercise 3 --------------------------------------------------------------------------------------------------

def train_bpe(text, size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def unigram_bits_per_byte(ids, bytes_of_text):
    counts = np.unique(np.asarray(ids), return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum()) / math.log(2) * len(ids) / bytes_of_text


def test_longer_tokens_have_a_lower_unigram_entropy_a_byte():
    """Because a token of several bytes has part of their order in it. The model has to learn the rest all the same."""
    text = "".join(path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    size = len(text.encode())
    ids = train_bpe(text, 512).encode(text).ids
    assert 1.5 < size / len(ids) < 4
    assert unigram_bits_per_byte(ids, size) < 0.8 * unigram_bits_per_byte(list(text.encode()), size)
