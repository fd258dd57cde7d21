"""Tables as people have them: parquet and Arrow files of token rows or of texts, and which split a file's name says.

Token rows have the layout of pico-lm/pretokenized-dolma and -paloma: a column of lists, input_ids.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data import DataError, token_dtype
from runtime.files import require_file, require_room, reserve
from runtime.log import node_log

TOKENS = "input_ids"
NO_SOURCE = "unknown"  # of a row, beside others that name theirs
SPLITS = {"train": "train", "training": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val",
          "test": "test"}
ENDINGS = r"(?:\.(?:txt|text|raw|tokens|jsonl?|ndjson|csv|tsv|parquet|arrow|bin|gz|zst|zstd))*"
BATCH_ROWS = 1024
LONGEST_ROW = 1 << 24  # ids
BATCH_VALUES = 1 << 24  # that are in memory at once, where rows are long
ARROW_FILE = b"ARROW1"  # begins one; a stream begins with its first message
MOST_GROWTH, SMALL = 1000, 1 << 28  # how far a file may unpack, and bytes that any may unpack to: few are many in a bomb


# ---- names -----------------------------------------------------------------------------------------------------

def split_of(path: str | PurePath, splits: Mapping[str, str] = SPLITS) -> tuple[str, str] | None:
    """(subset, split) that a path in a repository says, as the Hub and `datasets` write them; None where it says none.

    train-00000-of-00002.parquet, data/validation-00000-of-00001-0123456789abcdef.parquet, gpt2/train-00000-of-00009.parquet
    (subset gpt2), default/test/0000.parquet, c4-train.00000-of-01024.json.gz (subset c4), wiki.valid.tokens. `splits`
    are the words and what each stands for: train, val or test.
    """
    *folders, name = PurePath(path).parts
    words = "|".join(map(re.escape, sorted(splits, key=len, reverse=True)))
    found = re.fullmatch(rf"(?:(.+?)[-_.])?({words})(?:[-_.]\d+(?:-of-\d+)?(?:-[0-9a-f]{{8,}})?)?{ENDINGS}", name, re.IGNORECASE)
    if found is None and folders and folders[-1].lower() in splits:
        prefix, word = None, folders.pop()
    elif found is None:
        return None
    else:
        prefix, word = found.groups()
    subset = "/".join([*(folder for folder in folders if folder != "data"), *([prefix] if prefix else [])])
    return subset or "default", splits[word.lower()]


# ---- files ---------------------------------------------------------------------------------------------------------

class Table(NamedTuple):
    """An open parquet or Arrow file; batches(columns, rows at once) reads it."""
    path: Path
    schema: Any
    rows: int
    batches: Callable[[list[str], int], Iterator[Any]]

    def kind_of(self, column: str) -> str:
        """What a column holds: "tokens" or "text". Raises DataError that lists the columns."""
        import pyarrow.types as types
        kinds = {}
        for field in self.schema:
            inner = getattr(field.type, "value_type", None)
            if is_text(field.type):
                kinds[field.name] = "text"
            elif not types.is_dictionary(field.type) and inner is not None and types.is_integer(inner):
                kinds[field.name] = "tokens"
        if column not in self.schema.names:
            usable = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none of token lists or of text"
            raise DataError(f"{self.path}: has no column {column}; choose with --column: {usable}")
        if self.schema.names.count(column) > 1:
            raise DataError(f"{self.path}: has {self.schema.names.count(column)} columns {column}; rename all but one")
        if column not in kinds:
            raise DataError(f"{self.path}: {column} is {self.schema.field(column).type}, not lists of whole numbers, nor text")
        return kinds[column]


@contextlib.contextmanager
def open_table(path: Path) -> Iterator[Table]:
    """A parquet file, or an Arrow file or stream as `datasets` saves it. Raises DataError naming the file."""
    import pyarrow.parquet as parquet
    with contextlib.ExitStack() as stack:
        with refusing(path):
            require_file(path)
            file = stack.enter_context(open(path, "rb"))
            table = stack.enter_context(parquet.ParquetFile(file)) if file.read(4) == b"PAR1" else None
            if table is None:
                check_arrow(path, file)
            schema = open_arrow(file)[0] if table is None else table.schema_arrow
            rows = sum(map(len, open_arrow(file)[1])) if table is None else table.metadata.num_rows

        def unchecked(columns: list[str], at_once: int) -> Iterator[Any]:
            if table is not None:
                at_once = fitting(path, table.metadata, columns, at_once)
                texts = [name for name in columns if is_text(schema.field(name).type)]  # one that stands in many rows, once
                yield from parquet.ParquetFile(file, read_dictionary=texts).iter_batches(at_once, columns=columns)
                return
            for batch in open_arrow(file)[1]:
                for start in range(0, len(batch), at_once):
                    yield batch.select(columns).slice(start, at_once)

        def batches(columns: list[str], at_once: int) -> Iterator[Any]:
            done = 0
            with refusing(path):
                for batch in unchecked(columns, at_once):
                    if (done := done + len(batch)) <= rows:
                        yield batch
            if done != rows:
                raise DataError(f"{path}: says that it holds {rows:,} rows, and holds {done:,}; it is damaged")
        yield Table(path, schema, rows, batches)


def is_text(kind: Any) -> bool:
    import pyarrow.types as types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind)


def fitting(path: Path, metadata: Any, columns: list[str], at_once: int) -> int:
    """How many rows of a parquet file to read at once, `at_once` at most. Raises DataError for what no file of its size holds."""
    size, rows = path.stat().st_size, max(1, metadata.num_rows)
    chunks = [chunk for group in map(metadata.row_group, range(metadata.num_row_groups))
              for chunk in map(group.column, range(group.num_columns))
              if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns)]
    counted = sum(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
    values = {name: sum(chunk.num_values for chunk in chunks if chunk.path_in_schema == name)
              for name in {chunk.path_in_schema for chunk in chunks}}
    if counted != metadata.num_rows or any(count < metadata.num_rows for count in values.values()):
        raise DataError(f"{path}: says that it holds {metadata.num_rows:,} rows, and its parts do not; it is damaged")
    unpacked = sum(max(chunk.total_uncompressed_size, 4 * chunk.num_values) for chunk in chunks)
    if unpacked > max(SMALL, MOST_GROWTH * size):
        raise DataError(f"{path}: unpacks to {unpacked / 1e6:,.0f} MB from {size / 1e6:,.3f}; it is damaged, or a bomb")
    longest = max(values.values(), default=1) // rows
    if longest > LONGEST_ROW:
        raise DataError(f"{path}: has rows of some {longest:,} ids, and {LONGEST_ROW:,} are the most; cut them")
    return max(1, min(at_once, BATCH_VALUES // max(1, longest)))


def open_arrow(file: BinaryIO) -> tuple[Any, Iterator[Any]]:
    """(schema, record batches) of an Arrow stream or file, from its beginning."""
    import pyarrow as arrow
    file.seek(0)
    magic = file.read(6)
    file.seek(0)
    if magic != ARROW_FILE:
        stream = arrow.ipc.open_stream(file)
        return stream.schema, iter(stream)
    reader = arrow.ipc.open_file(file)
    return reader.schema, map(reader.get_batch, range(reader.num_record_batches))


def check_arrow(path: Path, file: BinaryIO) -> None:
    """Raise DataError for an Arrow stream or file that unpacks to what no file of its size holds."""
    import pyarrow as arrow
    file.seek(0)
    file.seek(8 if file.read(6) == ARROW_FILE else 0)
    size, held = sum(map(unpacked_bytes, arrow.ipc.MessageReader.open_stream(file))), path.stat().st_size
    if size > max(SMALL, MOST_GROWTH * held):
        raise DataError(f"{path}: unpacks to {size / 1e6:,.0f} MB from {held / 1e6:,.3f}; it is damaged, or a bomb")


def unpacked_bytes(message: Any) -> int:
    """What the buffers of an Arrow message say that they unpack to: each that is compressed begins with that number (Arrow's
    columnar format, "Compression"). Where they lie is in the message's head, a FlatBuffer, which pyarrow shows to nobody.
    """
    head, body = message.metadata.to_pybytes(), message.body

    def field(table: int, number: int) -> int | None:
        """Where a table's field stands."""
        entries = table - struct.unpack_from("<i", head, table)[0]
        at = 4 + 2 * number
        offset = struct.unpack_from("<H", head, entries + at)[0] if at < struct.unpack_from("<H", head, entries)[0] else 0
        return table + offset if offset else None

    def follow(place: int | None) -> int:
        return place + struct.unpack_from("<I", head, place)[0]
    batch = follow(field(follow(0), 2))
    batch = follow(field(batch, 1)) if message.type == "dictionary" else batch
    if body is None or message.type == "schema" or field(batch, 3) is None:
        return 0
    buffers = follow(field(batch, 2))
    places = struct.iter_unpack("<qq", head[buffers + 4:buffers + 4 + 16 * struct.unpack_from("<I", head, buffers)[0]])
    lengths = (struct.unpack("<q", body.slice(offset, 8).to_pybytes())[0] for offset, length in places if length > 8)
    return sum(max(length, 0) for length in lengths)


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """What pyarrow raises becomes a DataError that names the file."""
    import pyarrow as arrow
    try:
        yield
    except (OSError, TypeError, ValueError, struct.error, arrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet or Arrow ({' '.join(str(error).split())[:200]})") from None


def decompressed(file: BinaryIO, codec: str) -> BinaryIO:
    """A stream of what a "gzip" or "zstd" file holds, of one frame or several; Python has no zstd before 3.14."""
    import pyarrow as arrow
    return arrow.CompressedInputStream(arrow.PythonFile(file, "r"), codec)


# ---- token rows ------------------------------------------------------------------------------------------------------

class Converted(NamedTuple):
    """What one file held."""
    rows: int
    row_length: int
    sources: list[str] | None  # of each row, where the file has a column `source`, as Paloma's do


def convert_parquet(path: Path, target: Path, vocab_size: int, column: str = TOKENS) -> Converted:
    """Write the token rows of a parquet or Arrow file as one shard, synced.

    Takes int32 and int64 lists, large and fixed-size lists, any number of row groups, and holds one batch of rows
    at a time. A last row that is shorter than the others is left out, and said. Raises DataError naming file, row and
    reason.
    """
    dtype = token_dtype(vocab_size)
    with open_table(path) as table:
        if table.rows == 0 or table.kind_of(column) != "tokens":
            raise DataError(f"{path}: has no rows with a column {column} of token ids")
        out, done, row_length, total = None, 0, 0, table.rows
        for batch in table.batches([column], BATCH_ROWS):
            ids, lengths = token_lists(batch.column(0), path, done)
            if out is None:
                row_length = int(lengths[0])
                if row_length < 2:
                    raise DataError(f"{path}: row 0 has {row_length} ids; a row holds an input and its label at least")
                require_room(target, total * row_length * dtype.itemsize, str(path))
                out = np.lib.format.open_memmap(target, "w+", dtype, (total, row_length))
                reserve(target, str(path))
            if done + len(lengths) == total and total > 1 and lengths[-1] < row_length:
                node_log.info(f"{path}: its last row, of {lengths[-1]} ids where the others have {row_length}, is left out")
                ids, lengths, total = ids[:len(ids) - lengths[-1]], lengths[:-1], total - 1
            if (wrong := lengths != row_length).any():
                bad = int(np.argmax(wrong))
                raise DataError(f"{path}: row {done + bad} has {lengths[bad]} ids, the first has {row_length}")
            if not len(ids):
                break
            ids = ids.reshape(len(lengths), row_length)
            if ids.min() < 0 or ids.max() >= vocab_size:
                bad = int(np.argmax(((ids < 0) | (ids >= vocab_size)).any(axis=1)))
                raise DataError(f"{path}: row {done + bad} holds ids from {ids[bad].min()} to {ids[bad].max()}, "
                                f"outside the vocabulary of {vocab_size}")
            out[done:done + len(ids)] = ids
            done += len(ids)
        out.flush()
        sources = sources_of(table, path)
    with open(target, "r+b") as file:  # numpy pads the header, so that a number of rows can be changed
        np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": (total, row_length)})
        file.truncate(file.tell() + total * row_length * dtype.itemsize)
        os.fsync(file.fileno())
    return Converted(total, row_length, sources and sources[:total])


def token_lists(column: Any, path: Path, first: int) -> tuple[np.ndarray, np.ndarray]:
    """(all ids, the length of each row) of a batch whose first row is number `first`."""
    import pyarrow.compute as compute
    if column.null_count or column.flatten().null_count:
        bad = next(i for i, row in enumerate(column.to_pylist()) if row is None or None in row)
        raise DataError(f"{path}: row {first + bad} is or holds a null")
    return column.flatten().to_numpy(zero_copy_only=False), compute.list_value_length(column).to_numpy()


def sources_of(table: Table, path: Path) -> list[str] | None:
    """Where each row is from, if the file says so in a column `source` of text."""
    if "source" not in table.schema.names:
        return None
    if not is_text(table.schema.field("source").type):
        node_log.info(f"{path}: its column source holds no text and is left out")
        return None
    with refusing(path):
        sources = [source for batch in table.batches(["source"], BATCH_ROWS) for source in batch.column(0).to_pylist()]
    if missing := sources.count(None):
        node_log.info(f"{path}: {missing} of {len(sources)} rows have no source; they are called {NO_SOURCE}")
    return [NO_SOURCE if source is None else source for source in sources]


def complete_sources(shards: list[dict[str, Any]]) -> None:
    """Where some shards of a split say their rows' sources, have all say them: figures by source need every row's."""
    silent = [shard for shard in shards if "sources" not in shard]
    if silent and len(silent) < len(shards):
        rows = sum(shard["rows"] for shard in silent)
        node_log.info(f"{rows} rows in {len(silent)} of {len(shards)} files have no source; they are called {NO_SOURCE}")
        for shard in silent:
            shard["sources"] = [NO_SOURCE] * shard["rows"]


# ---- texts and records -------------------------------------------------------------------------------------------------

def read_texts(path: Path, column: str) -> Iterator[tuple[str | None, float]]:
    """(text or null, share of the file's rows read) of each row."""
    with open_table(path) as table:
        if table.kind_of(column) != "text":
            raise DataError(f"{path}: {column} holds token ids, not text; use shards.py parquet --column {column}")
        done = 0
        with refusing(path):
            for batch in table.batches([column], BATCH_ROWS // 8):
                for text in batch.column(0):  # one at a time: all together may be many times what the file holds
                    done += 1
                    yield text.as_py(), done / table.rows


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Every row of a parquet file as a dict."""
    with open_table(path) as table, refusing(path):
        for batch in table.batches(table.schema.names, BATCH_ROWS):
            for number in range(len(batch)):
                yield {name: column[number].as_py() for name, column in zip(table.schema.names, batch.columns)}


def write_rows(path: Path, rows: np.ndarray) -> None:
    """Token rows (N, row_length) as a parquet file in the layout that convert_parquet reads."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet
    column = arrow.FixedSizeListArray.from_arrays(arrow.array(rows.astype(np.int32).ravel()), rows.shape[1])
    parquet.write_table(arrow.table({TOKENS: column.cast(arrow.list_(arrow.int32()))}), path)
