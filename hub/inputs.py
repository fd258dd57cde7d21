"""What a person may point shards.py at: which files it is, what each holds, and which split each belongs to.

A kind is "text" (a file is a document), "json" (JSON Lines, or arrays of objects), "csv", "tsv", "table" (parquet or Arrow)
or "tokens" (nanoGPT's train.bin). Suffixes may be in capitals, and have .gz or .zst behind them; where they say nothing, the
content does. A folder is all files below it; of a `datasets.save_to_disk` folder those that it lists.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

from config.reading import show
from data import DataError
from hub.parquet import SPLITS, decompressed, open_table, split_of
from hub.tokenizers import optional_object
from runtime.files import require_file
from runtime.log import log

SUPPORTED = ("text in UTF-8; JSON Lines or arrays (.jsonl, .ndjson, .json), CSV and TSV; these also as .gz and .zst; parquet; "
             "a folder of such files, or of datasets.save_to_disk; nanoGPT's train.bin and val.bin")
KINDS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "table",
         ".arrow": "table", ".bin": "tokens"}
IN_FOLDERS = (("table", "tokens"), ("json", "csv", "tsv"), ("text",))  # README.md is no corpus where there is parquet
CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
BINARY = (b"%PDF", b"BZh", (20240520).to_bytes(4, "little"))  # what has no zero byte at its start; the last are llm.c's .bin
TEXTS, ROWS, IDS = "texts", "rows of token ids", "token ids"  # what a file gives
HEAD_BYTES = 1 << 16
ALL = "all"  # of --split: every file is training text, whatever its name


class Input(NamedTuple):
    path: Path
    name: str  # below what was given, as far as it tells subset and split
    kind: str


class Unsupported(DataError):
    """A file that holds nothing that is read here."""

    def __init__(self, path: Path, what: str = "is not UTF-8 text, nor anything else that is read here"):
        super().__init__(f"{path}: {what}; supported are {SUPPORTED}")


# ---- files -----------------------------------------------------------------------------------------------------

def find_inputs(given: list[Path], column: str) -> list[Input]:
    """The files that were given, and those in given folders, in order. Raises DataError that says what is supported."""
    files = [path.absolute() for path in given if not path.is_dir()]
    above = [path.parents[1] if path.stem.isdigit() else path.parent for path in files]  # train/0000.parquet
    base = os.path.commonpath(above) if above else ""
    found: list[Input] = []
    for path in given:
        found += _in_folder(path, column) if path.is_dir() else [
            Input(path, os.path.relpath(path.absolute(), base), kind_of(path, column))]
    for path, _, kind in found:
        if kind == "tokens" and path.with_name("meta.pkl").exists():
            raise DataError(f"{path.with_name('meta.pkl')}: the vocabulary of {path.name} is a pickle, which may run anything "
                            f"when it is opened, and is not; give the text itself")
    return found


def _in_folder(folder: Path, column: str) -> list[Input]:
    if saved := list(_saved(folder)):
        return saved
    found, others = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        try:
            if any(part.startswith(".") for part in name.parts):
                raise Unsupported(path)
            found.append(Input(path, name.as_posix(), kind_of(path, column)))
        except Unsupported:
            others.append(name.as_posix())
    kinds = next((kinds for kinds in IN_FOLDERS if any(item.kind in kinds for item in found)), ())
    others += [item.name for item in found if item.kind not in kinds]
    found = [item for item in found if item.kind in kinds]
    if not found:
        raise Unsupported(folder, "holds nothing that is read here")
    if others:
        log.info(f"{folder}: {len(found)} files are read as {' or '.join(kinds)}; {len(others)} others are left out: "
                 f"{', '.join(others[:5])}{' ...' if len(others) > 5 else ''}")
    return found


def _saved(folder: Path) -> Iterator[Input]:
    """The Arrow files of a `datasets.save_to_disk` folder, under names that tell the split."""
    yield from _files_of(folder)
    for split in _names(folder / "dataset_dict.json", optional_object(folder / "dataset_dict.json").get("splits")):
        yield from (item._replace(name=f"{split}/{item.path.name}") for item in _files_of(folder / split))


def _files_of(folder: Path) -> Iterator[Input]:
    """The Arrow files of one split."""
    state = optional_object(folder / "state.json") if (folder / "dataset_info.json").exists() else {}
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: selects rows of its files; save flatten_indices() of it")
    files = state.get("_data_files") or []
    listed = [file.get("filename") if isinstance(file, dict) else file for file in files] if isinstance(files, list) else files
    for name in _names(folder / "state.json", listed):
        yield Input(folder / name, f"{state.get('_split')}/{name}", "table")


def _names(path: Path, listed: Any) -> list[str]:
    """Names that a file lists of what lies beside it. Raises DataError for others."""
    wrong = [] if listed is None else [listed] if not isinstance(listed, list) else [
        name for name in listed if not isinstance(name, str) or PurePath(name).name != name or name in ("", "..")]
    if wrong:
        raise DataError(f"{path}: {show(wrong[0])} is not the name of something beside it; save the data set anew")
    return listed or []


def kind_of(path: Path, column: str) -> str:
    """What a file holds. Raises Unsupported for what is not read here, DataError for what cannot be read now."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] in ([".pkl"], [".pickle"]):
        raise Unsupported(path, "is a pickle, which may run anything when it is opened, and is not")
    if suffixes[-1:] in ([".gz"], [".zst"], [".zstd"]):
        suffixes.pop()
    kind = KINDS.get(suffixes[-1] if suffixes else "")
    try:
        require_file(path)
        with open(path, "rb") as raw:
            start = raw.read(HEAD_BYTES)
            raw.seek(0)
            head = unpacked(raw).read(HEAD_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if kind == "table" or start.startswith((b"PAR1", b"ARROW1")):
        return "table"
    if kind == "tokens" and head == start and not head.startswith(BINARY):
        return "tokens"
    if kind == "tokens" or b"\0" in head or head.startswith(BINARY):
        raise Unsupported(path)
    return kind or _kind_of_text(head.decode("utf-8", errors="replace").lstrip("\ufeff"), column)


def _kind_of_text(text: str, column: str) -> str:
    """JSON and tables are recognised, so that no braces are trained on."""
    if _begins_as_json(text):
        return "json"
    for delimiter, kind in ((",", "csv"), ("\t", "tsv")):
        names = [name.strip('"\r') for name in text.partition("\n")[0].split(delimiter)]
        if len(names) > 1 and column in names and all(re.fullmatch(r"[\w.-]*", name) for name in names):
            return kind
    return "text"


def _begins_as_json(text: str) -> bool:
    """Whether a head of a file is an object, or the first of several: a piece of a program may begin with braces too."""
    begin = re.match(r'\s*(\[\s*)?(?=\{\s*"(?:[^"\\]|\\.)*"\s*:)', text)
    if begin is None:
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text, begin.end())
    except json.JSONDecodeError as error:  # one that goes on behind the head fails at its end, or as a string without an end
        return error.pos > len(text) - 16 or error.msg.startswith("Unterminated")
    except (RecursionError, ValueError):  # too deep, or a number of more digits than Python reads
        return True  # refused where it is read
    return text[end:].lstrip()[:1] in (",", "]", "") if begin[1] else text[end:].lstrip()[:1] in ("{", "")


def unpacked(raw: BinaryIO) -> BinaryIO:
    """What an open file holds behind its compression, if it has one."""
    start = raw.read(4)
    raw.seek(0)
    codec = next((codec for magic, codec in CODECS.items() if start.startswith(magic)), None)
    return raw if codec is None else decompressed(raw, codec)


def content_of(item: Input, column: str) -> str:
    """What a file gives: texts to encode, rows of ids, or ids end to end."""
    if item.kind == "table":
        with open_table(item.path) as table:
            return ROWS if table.kind_of(column) == "tokens" else TEXTS
    return IDS if item.kind == "tokens" else TEXTS


# ---- splits ----------------------------------------------------------------------------------------------------

def by_split(inputs: list[Input], subset: str | None, split: str | None, only_named: bool) -> dict[str, list[Input]]:
    """{train, val or test: inputs}; `subset` and `split` choose.

    Names that tell no split: refused if `only_named`, unless no other tells the `split` that was chosen; else all is training
    text, but never together with what is named as held out, unless by split "all".
    """
    if split == ALL:
        return {"train": inputs}
    words = dict(SPLITS)
    if split is not None:  # a name of its own, such as train_sft
        words.setdefault(split.lower(), next((SPLITS[word] for word in SPLITS if split.lower().startswith(word)), "train"))
    told = _of_subset([(item, split_of(item.name, words)) for item in inputs], subset, only_named)
    splits: dict[str | None, list[Input]] = {}
    for item, where in told:
        splits.setdefault(where and where[1], []).append(item)
    if split is not None:
        wanted = words[split.lower()]
        chosen = splits.get(wanted) or splits.get(None)
        if not chosen:
            raise DataError(f"--split: {split!r} is none of {', '.join(sorted(filter(None, splits)))}")
        if len(chosen) < len(told):
            log.info(f"{len(told) - len(chosen)} of {len(told)} files are left out, not being named as of split {split}")
        return {wanted: chosen}
    nameless = splits.get(None, [])
    if nameless and only_named:
        raise DataError(f"{nameless[0].path}: its name tells no split, as train-00000-of-00001.parquet and "
                        f"default/train/0000.parquet do; say what it is with --split, or rename it")
    by_name = [item for item, where in told if where and where[1] != "train" and split_of(PurePath(item.name).name, words)]
    if by_name and not only_named and (nameless or "train" not in splits):
        raise DataError(f"{by_name[0].path}: is named as held out, but nothing beside it as train; choose with --split, "
                        f"or take everything as training text with --split {ALL}")
    return {"train": [item for item, _ in told]} if nameless else splits


def _of_subset(told: list, subset: str | None, only_one: bool) -> list:
    """Those of (input, (subset, split) or None) that belong to a subset; joining several as one would be a guess."""
    known = sorted({where[0] for _, where in told if where})
    if subset is None and only_one and len(known) > 1:
        raise DataError(f"--subset: choose one of {', '.join(known)}; they are not joined")
    if subset is not None and subset not in known:
        raise DataError(f"--subset: {subset!r} is none of {', '.join(known)}")
    chosen = [(item, where) for item, where in told if subset is None or where and where[0] == subset]
    if len(chosen) < len(told):
        log.info(f"{len(told) - len(chosen)} of {len(told)} files are left out, being of other subsets than {subset}")
    return chosen
