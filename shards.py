"""Make, check and show datasets of token shards (data.py says what they look like).

    python shards.py stdlib --out data/stdlib                      # Python's own library, as bytes; no network
    python shards.py text book.txt more.jsonl --out data/books --tokenizer tokenizer.json
    python shards.py parquet data/train-*.parquet --out data/dolma --tokenizer tokenizer.json
    python shards.py download pico-lm/pretokenized-dolma --shards 0:8 --out data/dolma-8
    python shards.py show data/dolma-8 --step 100 --batch-size 1024 # the very rows that an update trains on
    python shards.py verify data/dolma-8
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from config import DatasetConfig
from data import (INDEX, ByteTokenizer, DataError, TokenDataset, Tokenizer, load_tokenizer, read_index, shard_entry, token_dtype,
                  write_index)
from hub import datasets, streaming
from hub.parquet import convert_parquet
from runtime.command import Parser, command
from runtime.files import require_room

SHARD_ROWS = 20_480  # rows of a shard, as in the pretokenized Dolma
SHUFFLE_SEED = 0  # of the rows of a made dataset; the training order is then the order on disk


# ---- writing -------------------------------------------------------------------------------------------------

def write_shards(folder: Path, rows: np.ndarray, vocab_size: int, source: str, **extra: Any) -> None:
    """Write rows (N, row_length) as one split's folder of shards with its index."""
    folder.mkdir(parents=True)
    require_room(folder, rows.size * token_dtype(vocab_size).itemsize, str(folder))
    shards = []
    for start in range(0, len(rows), SHARD_ROWS):
        path = folder / f"shard-{len(shards):05d}.npy"
        np.save(path, rows[start:start + SHARD_ROWS].astype(token_dtype(vocab_size)))
        shards.append(shard_entry(path, len(rows[start:start + SHARD_ROWS])))
    write_index(folder, shards, rows.shape[1], vocab_size, source, **extra)


def pack(documents: Iterable[list[int]], row_length: int, eos: int | None, vocab_size: int) -> np.ndarray:
    """Documents end to end, each closed by `eos`, cut into rows (N, row_length); the last, short one is dropped."""
    ending = [] if eos is None else [eos]
    stream = np.concatenate([np.array([], dtype=token_dtype(vocab_size)),
                             *(np.array(ids + ending, dtype=token_dtype(vocab_size)) for ids in documents)])
    count = len(stream) // row_length
    return stream[:count * row_length].reshape(count, row_length)


def shuffled(rows: np.ndarray) -> np.ndarray:
    return rows[np.random.default_rng(SHUFFLE_SEED).permutation(len(rows))]


def entropies(rows: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Nats a token that a perfect unigram and a perfect bigram model of these rows would need."""
    pairs = np.zeros(vocab_size * vocab_size, dtype=np.int64)
    flat = rows[:, :-1].astype(np.int64) * vocab_size + rows[:, 1:]
    pairs += np.bincount(flat.ravel(), minlength=len(pairs))
    joint = _entropy(pairs)
    first = _entropy(pairs.reshape(vocab_size, vocab_size).sum(1))
    return {"unigram": _entropy(np.bincount(rows.ravel(), minlength=vocab_size)), "bigram": joint - first}


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


# ---- sources -------------------------------------------------------------------------------------------------

def make_stdlib(out: Path, row_length: int) -> None:
    """The running interpreter's standard library as bytes; a stable hash of each path decides its split."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, list[list[int]]] = {"train": [], "val": []}
    for path in tqdm(sorted(root.rglob("*.py")), desc="reading the standard library", unit=" files"):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or "dist-packages" in name:
            continue
        content = path.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        held_out = hashlib.sha256(name.encode()).digest()[0] < 16  # one file in 16
        texts["val" if held_out else "train"].append(list(content))
    for split, documents in texts.items():
        rows = pack(documents, row_length, ByteTokenizer.eos, ByteTokenizer.vocab_size)
        write_shards(out / split, shuffled(rows), ByteTokenizer.vocab_size, "Python's standard library",
                     entropy=entropies(rows, ByteTokenizer.vocab_size))


def read_documents(files: list[Path]) -> Iterator[str]:
    """A text file is a document; in a .jsonl file each line's "text" is one."""
    for path in files:
        try:
            if path.suffix == ".jsonl":
                with open(path, encoding="utf-8") as lines:
                    for number, line in enumerate(lines, 1):
                        if line.strip():
                            yield _text_of(json.loads(line), path, number)
            else:
                yield path.read_bytes().decode("utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _text_of(record: Any, path: Path, number: int) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f'{path}: line {number} is not an object with a "text" of whole characters')
    return text


def make_text(out: Path, files: list[Path], tokenizer: Tokenizer, vocab_size: int, row_length: int,
              val_share: float) -> None:
    """Tokenized documents; the last val_share of the rows, before they are shuffled, become `val`."""
    documents = (tokenizer.encode(text) for text in tqdm(read_documents(files), desc="tokenizing", unit=" documents"))
    rows = pack(documents, row_length, tokenizer.eos, vocab_size)
    held_out = max(1, round(len(rows) * val_share)) if val_share else 0
    if len(rows) <= held_out:
        raise DataError(f"{', '.join(map(str, files))}: {len(rows)} rows of {row_length} tokens are too few to train "
                        f"and hold out; give more text or a smaller --row-length")
    source = ", ".join(path.name for path in files)
    small = vocab_size <= 1024
    for split, part in (("train", rows[:len(rows) - held_out]), ("val", rows[len(rows) - held_out:])):
        if len(part):
            extra = {"entropy": entropies(part, vocab_size)} if small else {}
            write_shards(out / split, shuffled(part), vocab_size, source, **extra)


def make_parquet(out: Path, files: list[Path], vocab_size: int) -> None:
    """A shard from each file; files named val-... go to the split val, all others to train."""
    shards: dict[str, list[dict]] = {}
    row_lengths: dict[str, int] = {}
    for path in tqdm(files, desc="converting", unit=" files"):
        split = "val" if path.name.startswith("val-") else "train"
        (out / split).mkdir(parents=True, exist_ok=True)
        target = out / split / f"shard-{len(shards.setdefault(split, [])):05d}.npy"
        made = convert_parquet(path, target, vocab_size)
        if row_lengths.setdefault(split, made.row_length) != made.row_length:
            raise DataError(f"{path}: has rows of {made.row_length} ids, the files before it of {row_lengths[split]}")
        shards[split].append(shard_entry(target, made.rows, made.sources))
    for split, entries in shards.items():
        write_index(out / split, entries, row_lengths[split], vocab_size, ", ".join(sorted({f.parent.name for f in files})))


def verify(folder: Path) -> int:
    """Check every shard below `folder` against its index, checksums and ids included; returns the rows read."""
    splits = [path.parent for path in sorted(folder.glob(f"**/{INDEX}"))]
    if not splits:
        raise DataError(f"{folder}: no {INDEX} below it; give the folder of a dataset")
    total = 0
    for split in splits:
        dataset = TokenDataset(split.parent, split.name)
        for number, entry in enumerate(tqdm(dataset.index["shards"], desc=f"verifying {split}", unit=" shards")):
            dataset.shard(number)  # compares the checksum
            dataset.rows(int(dataset.starts[number]), entry["rows"])
        total += len(dataset)
    return total


# ---- the command -----------------------------------------------------------------------------------------------

def show(args: argparse.Namespace) -> None:
    """Print the rows of one update, decoded: all of them, or one rank's micro-batches."""
    for name, value, least in (("batch-size", args.batch_size, 1), ("world", args.world, 1), ("step", args.step, 0),
                               ("width", args.width, 1), ("micro-batch-size", args.micro_batch_size or 1, 1)):
        if value < least:
            raise DataError(f"--{name}: {value} must be at least {least}")
    if args.rank is not None and not 0 <= args.rank < args.world:
        raise DataError(f"--rank: {args.rank} is none of {args.world} ranks; give --world too")
    cfg = DatasetConfig(name=args.dataset, prefetch_shards=0, revision=args.revision)
    if Path(args.dataset).exists():
        dataset = TokenDataset(args.dataset)
    else:
        dataset = streaming.StreamedDataset(datasets.find(args.dataset, "train", cfg), cfg, args.vocab_size or 50304,
                                         args.batch_size)
        dataset.advance(args.step)
    micro = args.micro_batch_size or max(1, args.batch_size // args.world)
    if args.batch_size % (micro * args.world):
        raise DataError(f"--micro-batch-size: {micro} rows x {args.world} ranks do not divide {args.batch_size}")
    rows = dataset.batch(args.step, args.batch_size)
    tokenizer = load_tokenizer(dataset.folder.parent)
    print(f"{dataset.folder}, fingerprint {dataset.fingerprint}: update {args.step + 1} trains on rows "
          f"{args.step * args.batch_size:,} to {(args.step + 1) * args.batch_size - 1:,}, epoch "
          f"{dataset.epoch(args.step, args.batch_size) + 1}")
    for number, row in enumerate(rows):
        index = number // micro  # of the micro-batch in the global batch
        if args.rank in (None, index % args.world):
            text = tokenizer.decode(row.tolist()) if tokenizer.vocab_size >= 0.9 * dataset.vocab_size else row.tolist()
            print(f"row {args.step * args.batch_size + number}, rank {index % args.world}: {text!r}"[:args.width])
    dataset.close()


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    stdlib = commands.add_parser("stdlib", help="the interpreter's standard library, as bytes")
    text = commands.add_parser("text", help="text and jsonl files")
    parquet = commands.add_parser("parquet", help="files in the layout of pretokenized-dolma")
    for made in (stdlib, text, parquet):
        made.add_argument("--out", type=Path, required=True, help="the dataset's folder, such as data/NAME")
    for reader in (text, parquet):
        reader.add_argument("files", type=Path, nargs="+", help="in the order of the rows")
        reader.add_argument("--tokenizer", type=Path, help="a tokenizer.json, or its folder, to use and keep; none: bytes")
        reader.add_argument("--vocab-size", type=int, help="the model's (default: 50304 for parquet, else the tokenizer's)")
    for packed, length in ((stdlib, 129), (text, 2049)):
        packed.add_argument("--row-length", type=int, default=length,
                            help=f"max_seq_len + 1 of the model to train (default: {length})")
    text.add_argument("--val-share", type=float, default=0.05, help="share of the rows held out (default: 0.05)")
    fetched = commands.add_parser("download", help="shards of a Hub dataset into a folder of your own")
    fetched.add_argument("name", help="owner/name on the Hub")
    fetched.add_argument("--shards", default="0:1", help="first:end, such as 0:8 (default: 0:1)")
    fetched.add_argument("--split", default="train", help="of the files SPLIT-NNNNN-of-NNNNN.parquet (default: train)")
    fetched.add_argument("--out", type=Path, required=True)
    fetched.add_argument("--tokenizer", default="allenai/OLMo-7B-0724-hf", help="a folder or Hub model with tokenizer.json")
    shown = commands.add_parser("show", help="the rows that an update trains on, decoded")
    shown.add_argument("dataset", help="a dataset folder, or owner/name on the Hub")
    shown.add_argument("--step", type=int, required=True, help="updates before it: 0 is the first")
    shown.add_argument("--batch-size", type=int, default=1024, help="global batch size (default: 1024)")
    shown.add_argument("--rank", type=int, help="only this rank's rows")
    shown.add_argument("--world", type=int, default=1, help="number of ranks (default: 1)")
    shown.add_argument("--micro-batch-size", type=int, help="rows a forward (default: batch size / world)")
    shown.add_argument("--width", type=int, default=200, help="characters a row (default: 200)")
    for remote in (fetched, shown):
        remote.add_argument("--vocab-size", type=int, help="ids must be below (default: 50304)")
        remote.add_argument("--revision", help="a commit or branch (default: main)")
    commands.add_parser("verify", help="check every shard of a dataset").add_argument("folder", type=Path)
    return parser.parse_args()


def make(args: argparse.Namespace) -> None:
    """Make the dataset beside its final name, then rename it."""
    if args.out.exists():
        raise DataError(f"{args.out}: is already there; choose another --out, or delete it first")
    if getattr(args, "row_length", 2) < 2:
        raise DataError(f"--row-length: {args.row_length} is too short; a row holds at least one input and its label")
    if not 0 < (getattr(args, "vocab_size", None) or 1) < 2 ** 31:
        raise DataError(f"--vocab-size: {args.vocab_size} is not from 1 to {2 ** 31 - 1}")
    if not 0 <= getattr(args, "val_share", 0) < 1:
        raise DataError(f"--val-share: {args.val_share} is not a share from 0 up to, but not including, 1")
    staged = args.out.with_name(f".staging-{args.out.name}")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        if getattr(args, "tokenizer", None) is not None:
            given = args.tokenizer / "tokenizer.json" if args.tokenizer.is_dir() else args.tokenizer
            if not given.is_file():
                raise DataError(f"{given}: no such tokenizer.json")
            shutil.copy(given, staged / "tokenizer.json")
        tokenizer = load_tokenizer(staged)
        if args.command == "text" and (args.vocab_size or tokenizer.vocab_size) < tokenizer.vocab_size:
            raise DataError(f"--vocab-size: {args.vocab_size} is below the tokenizer's {tokenizer.vocab_size}")
        if args.command == "stdlib":
            make_stdlib(staged, args.row_length)
        elif args.command == "text":
            make_text(staged, args.files, tokenizer, args.vocab_size or tokenizer.vocab_size, args.row_length,
                      args.val_share)
        else:
            make_parquet(staged, args.files, args.vocab_size or 50304)
        os.rename(staged, args.out)
    except OSError as error:
        raise DataError(f"{args.out}: cannot be made ({error})") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def fetch_dataset(args: argparse.Namespace) -> None:
    cfg = DatasetConfig(name=args.name, revision=args.revision)
    source = datasets.find(args.name, args.split, cfg)
    first, _, end = args.shards.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end) <= len(source.files)):
        raise DataError(f"--shards: {args.shards!r} is not first:end within 0:{len(source.files)}")
    if (args.out / args.split).exists():
        raise DataError(f"{args.out / args.split}: is already there; choose another --out, or delete it first")
    datasets.download(source, range(int(first), int(end)), args.out, cfg, args.vocab_size or 50304)
    datasets.fetch_tokenizer(args.tokenizer, args.out)


def made_with(folder: Path) -> int | None:
    return read_index(folder / "train")["row_length"] if (folder / "train" / INDEX).exists() else None


def describe(folder: Path) -> None:
    for path in sorted(folder.glob(f"*/{INDEX}")):
        index = read_index(path.parent)
        rows = sum(shard["rows"] for shard in index["shards"])
        print(f"{path.parent}: {rows:,} rows of {index['row_length']} tokens in {len(index['shards'])} shard(s), "
              f"{rows * index['row_length']:,} tokens, vocabulary {index['vocab_size']:,}")
        if "entropy" in index:
            print(f"{'':{len(str(path.parent))}}  entropy in nats a token: unigram {index['entropy']['unigram']:.2f}, "
                  f"bigram {index['entropy']['bigram']:.2f}")


def main() -> None:
    args = parse()
    if args.command == "verify":
        print(f"{args.folder}: {verify(args.folder):,} rows are as the index says")
        return
    if args.command == "show":
        return show(args)
    if args.command == "download":
        fetch_dataset(args)
    elif args.command == "stdlib" and args.out.exists() and made_with(args.out) == args.row_length:
        print(f"{args.out} is already there")
    else:
        make(args)
    describe(args.out)


if __name__ == "__main__":
    command(main)
