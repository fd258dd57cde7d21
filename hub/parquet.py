"""Reads parquet files of token rows, the layout of pico-lm/pretokenized-dolma and -paloma: a column input_ids."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DataError, token_dtype
from runtime.files import require_room, reserve


class Converted(NamedTuple):
    """What one parquet file held."""
    rows: int
    row_length: int
    sources: list[str] | None  # of each row, where the file has a column `source`, as Paloma's do


def convert_parquet(path: Path, target: Path, vocab_size: int) -> Converted:
    """Write the `input_ids` of a parquet file as one shard.

    Takes int32 and int64 lists, large and fixed-size lists, any number of row groups, and holds one batch of rows
    at a time. Raises DataError naming file, row and reason.
    """
    import pyarrow as arrow
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet
    try:
        with parquet.ParquetFile(path) as file:
            total, names = file.metadata.num_rows, file.schema_arrow.names
            if "input_ids" not in names or total == 0:
                raise DataError(f"{path}: has no rows with a column input_ids")
            out, done, row_length = None, 0, 0
            for batch in file.iter_batches(batch_size=1024, columns=["input_ids"]):
                column = batch.column(0)
                if not arrow.types.is_integer(getattr(column.type, "value_type", arrow.null())):
                    raise DataError(f"{path}: input_ids is {column.type}, not lists of whole numbers")
                if column.null_count or column.flatten().null_count:
                    bad = next(i for i, row in enumerate(column.to_pylist()) if row is None or None in row)
                    raise DataError(f"{path}: row {done + bad} is or holds a null")
                lengths = compute.list_value_length(column).to_numpy()
                if out is None:
                    row_length = int(lengths[0])
                    if row_length < 2:
                        raise DataError(f"{path}: row 0 has {row_length} ids; a row holds an input and its label at least")
                    dtype = token_dtype(vocab_size)
                    require_room(target, total * row_length * dtype.itemsize, str(path))
                    out = np.lib.format.open_memmap(target, "w+", dtype, (total, row_length))
                    reserve(target, str(path))
                if (wrong := lengths != row_length).any():
                    bad = int(np.argmax(wrong))
                    raise DataError(f"{path}: row {done + bad} has {lengths[bad]} ids, the first has {row_length}")
                ids = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), row_length)
                if ids.min() < 0 or ids.max() >= vocab_size:
                    bad = int(np.argmax(((ids < 0) | (ids >= vocab_size)).any(axis=1)))
                    raise DataError(f"{path}: row {done + bad} holds ids from {ids[bad].min()} to {ids[bad].max()}, "
                                    f"outside the vocabulary of {vocab_size}")
                out[done:done + len(ids)] = ids
                done += len(ids)
            out.flush()
            sources = file.read(columns=["source"]).column(0).to_pylist() if "source" in names else None
    except (OSError, arrow.ArrowException, TypeError) as error:
        raise DataError(f"{path}: not a parquet file of token rows ({error})") from None
    return Converted(total, row_length, sources)


def records(path: Path) -> list[dict]:
    """Every row of a small parquet file as a dict."""
    import pyarrow.parquet as arrow_parquet
    return arrow_parquet.read_table(path).to_pylist()


def write_rows(path: Path, rows: np.ndarray) -> None:
    """Token rows (N, row_length) as a parquet file in the layout that convert_parquet reads."""
    import pyarrow as arrow
    import pyarrow.parquet as arrow_parquet
    column = arrow.FixedSizeListArray.from_arrays(arrow.array(rows.astype(np.int32).ravel()), rows.shape[1])
    arrow_parquet.write_table(arrow.table({"input_ids": column.cast(arrow.list_(arrow.int32()))}), path)
