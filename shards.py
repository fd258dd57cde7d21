"""Make, check and show datasets of token shards (data.py says what they look like).

    python shards.py stdlib --out corpora/stdlib                   # Python's own library, as bytes; no network
    python shards.py text book.txt more.jsonl.gz folder --out corpora/books --tokenizer tokenizer.json
    python shards.py parquet folder --out corpora/dolma --tokenizer tokenizer.json
    python shards.py download pico-lm/pretokenized-dolma --shards 0:8 --out corpora/dolma-8
    python shards.py show corpora/dolma-8 --step 100 --batch-size 1024 # the very rows that an update trains on
    python shards.py verify corpora/dolma-8

Documents are put end to end, each closed by the end of text, and cut into rows; the last 5 % of the rows become `val`, unless
the files' names say splits, and the rows of each split are shuffled. hub/inputs.py says which files are read.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import config  # noqa: F401  # isort: skip  # before torch, whose threads it teaches to wait
import numpy as np
from tqdm import tqdm

from config import DatasetConfig, TokenizerConfig
from data import INDEX, DataError, TokenDataset, read_index, shard_entry, token_dtype, write_index
from hub import datasets, streaming
from hub.inputs import IDS, ROWS, TEXTS, Input, by_split, content_of, find_inputs
from hub.packing import TokenFile, Unbroken, entropies, write_shards, write_split  # noqa: F401 (some are for importers)
from hub.parquet import TOKENS, complete_sources, convert_parquet
from hub.text import read_documents, read_tokens
from hub.tokenizers import (TOKENIZER, ByteTokenizer, Tokenizer, check_tokenizer, describe_tokenizer, load_tokenizer,
                            save_tokenizer)
from runtime.command import Parser, command, number
from runtime.errors import FULL
from runtime.files import STAGING, NoRoom, fsync_folder, host_name, remove_tree, staging_name
from runtime.log import log, printable

OLMO_VOCABULARY = 50_304  # of the pretokenized Dolma's models
ROW_LENGTH, VAL_SHARE = 2_049, 0.05  # of packed documents, by default
STDLIB = "Python's standard library"


# ---- sources -------------------------------------------------------------------------------------------------

def make_stdlib(out: Path, row_length: int) -> None:
    """The running interpreter's standard library as bytes; a stable hash of each path decides its split."""
    root = Path(sysconfig.get_paths()["stdlib"])
    with contextlib.ExitStack() as stack:
        tokens = {split: stack.enter_context(TokenFile(out / f".{split}", np.dtype(np.uint16))) for split in ("train", "val")}
        for path in tqdm(sorted(root.rglob("*.py")), desc="reading the standard library", unit=" files"):
            name = path.relative_to(root).as_posix()
            if "site-packages" in name or "dist-packages" in name or not path.is_file():  # a system's link may lead nowhere
                continue
            content = path.read_bytes()
            try:
                content.decode("utf-8")
            except UnicodeDecodeError:
                continue
            held_out = hashlib.sha256(name.encode()).digest()[0] < 16  # one file in 16
            tokens["val" if held_out else "train"].add(np.frombuffer(content, np.uint8), [ByteTokenizer.eos])
        for split, found in tokens.items():
            write_split(out / split, found.rows(row_length), ByteTokenizer.vocab_size, STDLIB)


def make_packed(out: Path, splits: dict[str, list[Input]], fill: Callable[[TokenFile, list[Input]], None], vocab_size: int,
                row_length: int, val_share: float) -> None:
    """Rows of what `fill` adds for each split; without a split `val` the last val_share of the rows of `train` become it."""
    for split, inputs in splits.items():
        with TokenFile(out / f".{split}", token_dtype(vocab_size)) as tokens:
            fill(tokens, inputs)
            rows, source = tokens.rows(row_length), names_of(inputs)
            holds_out = val_share > 0 and split == "train" and "val" not in splits
            held_out = max(1, round(len(rows) * val_share)) if holds_out else 0
            if len(rows) <= held_out:
                raise DataError(f"{', '.join(str(item.path) for item in inputs[:3])}: {len(rows)} rows of {row_length} tokens "
                                f"are too few to train and hold out; give more text or a smaller --row-length")
            if left := tokens.count - len(rows) * row_length:
                log.info(f"{split}: the last {left} tokens, which fill no row, are left out")
            end = len(rows) - held_out
            write_split(out / split, rows.take(slice(end)), vocab_size, source)
            if held_out:
                write_split(out / "val", rows.take(slice(end, None)), vocab_size, source)


def names_of(inputs: list[Input], most: int = 20) -> str:
    names = ", ".join(item.path.name for item in inputs[:most])
    return names if len(inputs) <= most else f"{names} and {len(inputs) - most:,} more"


def make_rows(out: Path, splits: dict[str, list[Input]], column: str, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    """Token rows as they are: a shard from each file, in order."""
    for split, inputs in splits.items():
        (out / split).mkdir()
        shards, row_length = [], None
        for item in tqdm(inputs, desc=f"converting {split}", unit=" files"):
            target = out / split / f"shard-{len(shards):05d}.npy"
            made = convert_parquet(item.path, target, vocab_size, column)
            row_length = row_length or made.row_length
            if row_length != made.row_length:
                raise DataError(f"{item.path}: has rows of {made.row_length} ids, the files before it of {row_length}")
            if tokenizer is not None:
                check_tokenizer(tokenizer, vocab_size, int(np.load(target, mmap_mode="r").max()), str(item.path))
            shards.append(shard_entry(target, made.rows, made.sources))
        complete_sources(shards)
        source = ", ".join(sorted({item.path.parent.name for item in inputs}))
        write_index(out / split, shards, row_length, vocab_size, source)


def make_files(out: Path, args: argparse.Namespace) -> None:
    """A dataset from what a person has: token rows as they are, texts through the tokenizer."""
    column = args.column or (TOKENS if args.command == "parquet" else "text")
    inputs = find_inputs(args.files, column)
    kinds = {content_of(item, column) for item in inputs}
    if len(kinds) > 1:
        raise DataError(f"{args.files[0]}: {' and '.join(sorted(kinds))} do not go into one dataset; make one of each")
    kind = kinds.pop()
    if kind == TEXTS and args.command == "parquet" and (other := next((item for item in inputs if item.kind != "table"), None)):
        raise DataError(f"{other.path}: is no parquet file; use shards.py text")
    splits = by_split(inputs, args.subset, args.split, only_named=args.command == "parquet" or kind != TEXTS)
    unknown = kind != TEXTS and not args.tokenizer
    for name, idle in (("row_length", kind == ROWS), ("val_share", kind == ROWS or "val" in splits), ("eos", unknown),
                       ("special_tokens", unknown)):
        if idle and getattr(args, name) is not None:
            raise DataError(f"--{name.replace('_', '-')}: does nothing for {kind}{' with a split val' * ('val' in splits)}"
                            f"{' of no --tokenizer' * unknown}; leave it out")
    tokenizer = None if unknown else tokenizer_of(out, args)
    vocab_size = args.vocab_size or (tokenizer.vocab_size if tokenizer else OLMO_VOCABULARY if kind == ROWS else None)
    if vocab_size is None:
        raise DataError(f"{inputs[0].path}: does not say of which vocabulary it is; give its --tokenizer, or the --vocab-size")
    if tokenizer and vocab_size < tokenizer.vocab_size:
        raise DataError(f"--vocab-size: {vocab_size} is below the tokenizer's {tokenizer.vocab_size}")
    if kind == ROWS:
        make_rows(out, splits, column, vocab_size, tokenizer)
        return

    def fill(tokens: TokenFile, found: list[Input]) -> None:
        try:
            if kind == TEXTS:
                tokens.add_documents(read_documents(found, column), tokenizer)
        except Unbroken as error:
            raise DataError(f"{names_of(found, 3)}: {error}") from None
        for item in found if kind == IDS else []:
            for ids in read_tokens(item.path, tokenizer.vocab_size if tokenizer else vocab_size):
                tokens.add(ids)
    val_share = VAL_SHARE if args.val_share is None else args.val_share
    make_packed(out, splits, fill, vocab_size, args.row_length or ROW_LENGTH, val_share)


def tokenizer_of(out: Path, args: argparse.Namespace) -> Tokenizer:
    """The tokenizer that was asked for, or bytes; said, and kept with the dataset."""
    if args.tokenizer and not (args.tokenizer / TOKENIZER if args.tokenizer.is_dir() else args.tokenizer).is_file():
        raise DataError(f"{args.tokenizer}: no such tokenizer.json")
    split_special = None if args.special_tokens is None else args.special_tokens == "text"
    tokenizer = load_tokenizer(args.tokenizer or out, args.eos, split_special)
    log.info(f"tokenizer: {tokenizer.path}, {describe_tokenizer(tokenizer)}")
    save_tokenizer(tokenizer, out)
    return tokenizer


def make(out: Path, write: Callable[[Path], None]) -> None:
    """Have `write` make a dataset beside its final name, and rename it when all of it is on the disk."""
    if out.exists():
        raise DataError(f"{out}: is already there; choose another --out, or delete it first")
    staged = out.with_name(staging_name(out.name))
    try:
        remove_leftovers(out)
        staged.mkdir(parents=True)
        write(staged)
        for folder in (*(path for path in staged.iterdir() if path.is_dir()), staged):
            fsync_folder(folder)
        os.rename(staged, out)
    except OSError as error:
        why = "another process has made it meanwhile" if out.is_dir() else f"cannot be made ({error.strerror or error})"
        raise (NoRoom if error.errno in FULL else DataError)(f"{out}: {why}") from None
    finally:
        remove_tree(staged)
    with contextlib.suppress(OSError):  # it is there all the same
        fsync_folder(out.parent)


def remove_leftovers(out: Path) -> None:
    """What a killed process of this machine left half made."""
    for leftover in [] if os.name != "posix" else out.parent.glob(f"{STAGING}{glob.escape(out.name)}@{host_name()}-*"):
        try:
            os.kill(int(leftover.name.rpartition("-")[2]), 0)  # asks only whether it lives
        except ProcessLookupError:
            remove_tree(leftover)
        except (OSError, ValueError):
            pass


def is_made(out: Path, row_length: int) -> bool:
    """Whether the standard library is there, whole, in such rows. Raises DataError where a part of a dataset is."""
    if not out.exists():
        return False
    try:
        found = [TokenDataset(out, split) for split in ("train", "val")]
        verify(out)
    except DataError as error:
        raise DataError(f"{out}: is already there, but not whole ({error}); choose another --out, or delete it first") from None
    return all(split.index["source"] == STDLIB and split.row_length == row_length for split in found)


# ---- looking -------------------------------------------------------------------------------------------------

def verify(folder: Path) -> int:
    """Check every shard below `folder` against its index, checksums and ids included; returns the rows read."""
    splits = [path.parent for path in sorted(folder.glob(f"**/{INDEX}"))]
    if not splits:
        raise DataError(f"{folder}: no {INDEX} below it; give the folder of a dataset")
    total = 0
    for split in splits:
        dataset = TokenDataset(split.parent, split.name)
        for i, entry in enumerate(tqdm(dataset.index["shards"], desc=printable(f"verifying {split}"), unit=" shards")):
            dataset.shard(i)  # compares the checksum
            dataset.rows(int(dataset.starts[i]), entry["rows"])
        total += len(dataset)
    return total


def show(args: argparse.Namespace) -> None:
    """Print the rows of one update, decoded: all of them, or one rank's micro-batches."""
    if args.rank is not None and args.rank >= args.world:
        raise DataError(f"--rank: {args.rank} is none of {args.world} ranks; give --world too")
    cfg = DatasetConfig(name=args.dataset, prefetch_shards=0, revision=args.revision, subset=args.subset)
    dataset = streaming.open_rows(cfg, args.vocab_size, args.batch_size)
    dataset.advance(args.step)
    micro = args.micro_batch_size or max(1, args.batch_size // args.world)
    if args.batch_size % (micro * args.world):
        raise DataError(f"--micro-batch-size: {micro} rows x {args.world} ranks do not divide {args.batch_size}")
    rows = dataset.batch(args.step, args.batch_size)
    streamed = isinstance(dataset, streaming.StreamedDataset)
    tokenizer = load_tokenizer(datasets.tokenizer_home(args.tokenizer, cfg) if streamed else dataset.folder.parent)
    fits = rows.max() < tokenizer.vocab_size <= dataset.vocab_size
    print(f"{dataset.folder}, fingerprint {dataset.fingerprint}: update {args.step + 1} trains on rows "
          f"{args.step * args.batch_size:,} to {(args.step + 1) * args.batch_size - 1:,}, epoch "
          f"{dataset.epoch(args.step, args.batch_size) + 1}")
    for number_in_batch, row in enumerate(rows):
        index = number_in_batch // micro  # of the micro-batch in the global batch
        if args.rank in (None, index % args.world):
            text = tokenizer.decode(row.tolist()) if fits else row.tolist()
            print(f"row {args.step * args.batch_size + number_in_batch}, rank {index % args.world}: {text!r}"[:args.width])
    dataset.close()


def describe(folder: Path) -> None:
    for path in sorted(folder.glob(f"*/{INDEX}")):
        index = read_index(path.parent)
        rows = sum(shard["rows"] for shard in index["shards"])
        print(f"{path.parent}: {rows:,} rows of {index['row_length']} tokens in {len(index['shards'])} shard(s), "
              f"{rows * index['row_length']:,} tokens, vocabulary {index['vocab_size']:,}")
        if index.get("entropy"):
            print(f"{'':{len(str(path.parent))}}  entropy in nats a token: unigram {index['entropy']['unigram']:.2f}, "
                  f"bigram {index['entropy']['bigram']:.2f}")


# ---- the command -----------------------------------------------------------------------------------------------

def parse() -> argparse.Namespace:
    parser, count, length = Parser(__doc__), number(int, 1, 2 ** 31 - 1), number(int, 2, 2 ** 24)
    commands = parser.add_subparsers(dest="command", required=True)
    stdlib = commands.add_parser("stdlib", help="the interpreter's standard library, as bytes")
    text = commands.add_parser("text", help="text, JSON, CSV, parquet with texts; files or folders")
    parquet = commands.add_parser("parquet", help="tables of token rows, such as pretokenized-dolma, or of texts")
    stdlib.add_argument("--row-length", type=length, default=129, help="max_seq_len + 1 of the model (default: 129)")
    for made in (stdlib, text, parquet):
        made.add_argument("--out", type=Path, required=True, help="the dataset's folder, such as corpora/NAME")
    for reader in (text, parquet):
        reader.add_argument("files", type=Path, nargs="+", help="files in the order of the rows, or folders of them")
        reader.add_argument("--column", "--text-column", help="of JSON, CSV and tables (default: text; of parquet: input_ids)")
        reader.add_argument("--split", help="only files of this split (where no name tells it, those without); all: train on all")
        reader.add_argument("--subset", help="only files of this subset, such as gpt2/train-00000-of-00001.parquet's gpt2")
        reader.add_argument("--tokenizer", type=Path, help="a tokenizer.json, or its folder, to use and keep; none: bytes")
        reader.add_argument("--eos", help="the token that ends a text (default: what the tokenizer's files say; '': none)")
        reader.add_argument("--special-tokens", choices=["ids", "text"],
                            help="what <|endoftext|> and the like are where a text spells them out (default: ids)")
        reader.add_argument("--vocab-size", type=count, help="the model's (default: the tokenizer's, or 50304 for token rows)")
        reader.add_argument("--row-length", type=length, help="max_seq_len + 1 of the model (default: 2049)")
        reader.add_argument("--val-share", type=number(float, 0, 0.99), help="share of the rows held out (default: 0.05)")
    fetched = commands.add_parser("download", help="shards of a Hub dataset into a folder of your own")
    fetched.add_argument("name", help="owner/name on the Hub")
    fetched.add_argument("--shards", default="0:1", help="first:end, such as 0:8 (default: 0:1)")
    fetched.add_argument("--split", default="train", help="of the files SPLIT-NNNNN-of-NNNNN.parquet (default: train)")
    fetched.add_argument("--out", type=Path, required=True)
    shown = commands.add_parser("show", help="the rows that an update trains on, decoded")
    shown.add_argument("dataset", help="a dataset folder, or owner/name on the Hub")
    shown.add_argument("--step", type=number(int, 0, 2 ** 40), required=True, help="updates before it: 0 is the first")
    shown.add_argument("--batch-size", type=count, default=1024, help="global batch size (default: 1024)")
    shown.add_argument("--rank", type=number(int, 0, 2 ** 20), help="only this rank's rows")
    shown.add_argument("--world", type=count, default=1, help="number of ranks (default: 1)")
    shown.add_argument("--micro-batch-size", type=count, help="rows a forward (default: batch size / world)")
    shown.add_argument("--width", type=count, default=200, help="characters a row (default: 200)")
    for remote in (fetched, shown):
        remote.add_argument("--vocab-size", type=count, default=OLMO_VOCABULARY, help="ids must be below (default: 50304)")
        remote.add_argument("--revision", help="a commit or branch (default: main)")
        remote.add_argument("--subset", help="which, where a Hub dataset holds several")
        remote.add_argument("--tokenizer", default=TokenizerConfig.name, help="a folder or Hub model with tokenizer.json")
    commands.add_parser("verify", help="check every shard of a dataset").add_argument("folder", type=Path)
    return parser.parse_args()


def fetch_dataset(args: argparse.Namespace) -> None:
    cfg = DatasetConfig(name=args.name, revision=args.revision, subset=args.subset)
    source = datasets.find(args.name, args.split, cfg)
    first, _, end = args.shards.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end) <= len(source.files)):
        raise DataError(f"--shards: {args.shards!r} is not first:end within 0:{len(source.files)}")
    if (args.out / args.split).exists():
        raise DataError(f"{args.out / args.split}: is already there; choose another --out, or delete it first")
    datasets.download(source, range(int(first), int(end)), args.out, cfg, args.vocab_size)
    datasets.fetch_tokenizer(args.tokenizer, args.out)


def main() -> None:
    args = parse()
    if args.command == "verify":
        print(f"{args.folder}: {verify(args.folder):,} rows are as the index says")
        return
    if args.command == "show":
        return show(args)
    if args.command == "download":
        fetch_dataset(args)
    elif args.command != "stdlib":
        make(args.out, lambda staged: make_files(staged, args))
    elif is_made(args.out, args.row_length):
        print(f"{args.out} is already there")
    else:
        make(args.out, lambda staged: make_stdlib(staged, args.row_length))
    describe(args.out)


if __name__ == "__main__":
    command(main)
