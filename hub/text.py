"""Documents from the files that inputs.py finds, in pieces: a gigabyte of text is never held at once.

Nothing in a text ends a line for us: CRLF, U+2028 and marks of byte order stay as they are, but for a byte-order mark that
begins a file, which is its encoding's. JSON and CSV give the texts of one column; null is no text, is left out and counted.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data import DataError
from hub.inputs import SUPPORTED, Input, unpacked
from hub.parquet import read_texts
from runtime.log import log

BLOCK_BYTES = 1 << 20
SPACE = re.compile(r"[ \t\r\n]*")  # JSON's
LONGEST = 1 << 26  # characters of a row or a JSON value: a quote that is never closed would swallow the file

Piece = tuple[str, bool]  # some text, and whether a document ends behind it
Advance = Callable[[int], Any]  # told of bytes of the file as they are read


def read_documents(inputs: list[Input], column: str) -> Iterator[Piece]:
    """The documents of files, one after the other, with a progress bar. Raises DataError naming file and place."""
    total = sum(item.path.stat().st_size for item in inputs)
    with tqdm(total=total, desc="tokenizing", unit="B", unit_scale=True) as bar:
        for item in inputs:
            if item.kind == "text":
                yield from ((text, False) for text in read_blocks(item.path, bar.update))
                yield "", True
            else:
                yield from _texts(item, column, bar.update)


def _texts(item: Input, column: str, advance: Advance) -> Iterator[Piece]:
    """Each row's text of a file of rows."""
    missing = 0
    for text, where in READERS[item.kind](item.path, column, advance):
        if text is None:
            missing += 1
            continue
        if len(text) > LONGEST:
            raise DataError(f"{item.path}: {where} has a text of more than {LONGEST:,} characters; break it up")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{item.path}: {where} has half a character in its text, which is no Unicode") from None
        yield text, True
    if missing:
        log.info(f"{item.path}: {missing} rows have no text ({column} is null) and are left out")


# ---- text --------------------------------------------------------------------------------------------------------

def read_blocks(path: Path, advance: Advance) -> Iterator[str]:
    """A UTF-8 file, unpacked, in pieces of whole characters."""
    decoder, read, done, begun = codecs.getincrementaldecoder("utf-8")(), 0, 0, False
    try:
        with open(path, "rb") as raw:
            file = unpacked(raw)
            while data := file.read(BLOCK_BYTES):
                done += len(data)
                text = decoder.decode(data)
                if not begun and text.startswith("\ufeff"):
                    log.info(f"{path}: the byte-order mark that begins it is left out")
                    begun, text = True, text[1:]
                begun = begun or text != ""
                advance(raw.tell() - read)
                read = raw.tell()
                yield text
            yield decoder.decode(b"", final=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text (after byte {done - len(error.object) + error.start}: "
                        f"{error.reason}); supported are {SUPPORTED}") from None


def read_lines(path: Path, advance: Advance) -> Iterator[str]:
    """Lines with their "\\n"; no other character ends one."""
    rest = ""
    for text in read_blocks(path, advance):
        *lines, rest = (rest + text).split("\n")
        yield from (line + "\n" for line in lines)
        if len(rest) > LONGEST:
            raise DataError(f"{path}: has a line of more than {LONGEST:,} characters; break it up, or give it as a text (.txt)")
    if rest:
        yield rest


# ---- rows --------------------------------------------------------------------------------------------------------

def read_json(path: Path, column: str, advance: Advance) -> Iterator[tuple[str | None, str]]:
    """(text, where) of the objects in JSON Lines, or in one array; they may span lines."""
    for value, line in json_values(path, advance):
        if not isinstance(value, dict) or not isinstance(value.get(column, 0), (str, type(None))):
            has = f"it has {', '.join(map(str, value))}; choose with --text-column" if isinstance(value, dict) else "it is none"
            raise DataError(f'{path}: line {line} is not an object with a text "{column}" ({has[:300]})')
        yield value[column], f"line {line}"


def json_values(path: Path, advance: Advance) -> Iterator[tuple[Any, int]]:
    """(value, line) of each value in a file, or of each element where it is one array; one is held at a time."""
    blocks, decode = read_blocks(path, advance), json.JSONDecoder(object_pairs_hook=_each_once).raw_decode
    text, at, line, ended, place = "", 0, 1, False, "start"
    while True:
        start = SPACE.match(text, at).end()
        line, at = line + text.count("\n", at, start), start
        mark = text[at:at + 1]
        if (place, mark) in (("start", "["), ("array", ","), ("array", "]")):
            place, at = "closed" if mark == "]" else "array", at + 1
            continue
        if ended and not mark and place != "array":
            return
        try:
            if mark and place == "closed":
                raise json.JSONDecodeError("something follows the array", text, at)
            value, end = decode(text, at)
        except json.JSONDecodeError as error:
            # a value that goes on in the next block fails at the end of this one, or as a string without an end
            if len(text) - at > LONGEST:
                raise DataError(f"{path}: line {line} begins a value of more than {LONGEST:,} characters; break it up") from None
            if not ended and (error.pos > len(text) - 16 or error.msg.startswith("Unterminated")):
                added = _take(blocks, len(text) - at)
                text, at, ended = text[at:] + added, 0, not added
                continue
            raise DataError(f"{path}: line {line + text.count(chr(10), at, error.pos)} is no JSON ({error.msg})") from None
        except (RecursionError, ValueError) as error:  # a number of more digits than Python reads
            what = "is nested too deeply" if isinstance(error, RecursionError) else f"cannot be used ({error})"
            raise DataError(f"{path}: line {line} {what}") from None
        place = "lines" if place == "start" else place
        yield value, line
        line, at = line + text.count("\n", at, end), end


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} is written twice in one object, and one of the two would be lost")
    return found


def _take(blocks: Iterator[str], least: int) -> str:
    """The next blocks, `least` characters or more if there are: a value that spans n of them is then read O(log n) times."""
    taken, size = [], 0
    while size <= least and (block := next(blocks, None)) is not None:
        taken.append(block)
        size += len(block)
    return "".join(taken)


def read_csv(path: Path, column: str, advance: Advance, delimiters: str = ",;") -> Iterator[tuple[str | None, str]]:
    """(text, where) of the rows of a table with a header."""
    csv.field_size_limit(LONGEST)
    lines, held = read_lines(path, advance), 0
    header = next(lines, "")
    try:
        tables = {delimiter: next(csv.reader([header], delimiter=delimiter), []) for delimiter in delimiters}
    except csv.Error as error:
        raise DataError(f"{path}: line 1 is no CSV ({error})") from None
    delimiter, columns = next(((by, names) for by, names in tables.items() if column in names), ("", []))
    if columns.count(column) > 1:
        raise DataError(f"{path}: its first line names the column {column} {columns.count(column)} times; rename all but one")
    if not columns:
        raise DataError(f"{path}: its first line names no column {column}; choose with --text-column: {header.strip()[:200]}")

    def counted() -> Iterator[str]:
        nonlocal held
        for line in lines:
            if (held := held + len(line)) > LONGEST:
                raise DataError(f"{path}: line {rows.line_num + 1} goes on with a row of more than {LONGEST:,} characters; is a "
                                "quote not closed?")
            yield line
    rows = csv.reader(counted(), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            held = 0
            if row and len(row) != len(columns):
                raise DataError(f"{path}: line {rows.line_num + 1} has {len(row)} fields, the header {len(columns)}")
            if row:
                yield row[columns.index(column)], f"line {rows.line_num + 1}"
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num + 1} is no CSV ({error})") from None


def read_tsv(path: Path, column: str, advance: Advance) -> Iterator[tuple[str | None, str]]:
    return read_csv(path, column, advance, "\t")


def read_table(path: Path, column: str, advance: Advance) -> Iterator[tuple[str | None, str]]:
    size, told = path.stat().st_size, 0
    for number, (text, share) in enumerate(read_texts(path, column)):
        advance(int(size * share) - told)
        told = int(size * share)
        yield text, f"row {number}"


READERS = {"json": read_json, "csv": read_csv, "tsv": read_tsv, "table": read_table}


# ---- tokens ------------------------------------------------------------------------------------------------------

def read_tokens(path: Path, vocab_size: int) -> Iterator[np.ndarray]:
    """The ids of nanoGPT's train.bin: uint16, and nothing else."""
    if path.stat().st_size % 2:
        raise DataError(f"{path}: has an odd number of bytes, so it is not made of uint16 ids")
    done = 0
    with open(path, "rb") as file:
        while len(ids := np.frombuffer(file.read(BLOCK_BYTES), "<u2")):
            if ids.max() >= vocab_size:
                bad = int(np.argmax(ids >= vocab_size))
                raise DataError(f"{path}: number {done + bad} is the id {ids[bad]}, outside the vocabulary of {vocab_size}")
            done += len(ids)
            yield ids
