"""Files of torch.save from a stranger: one sentence, at once, and no more memory than the file has bytes."""

import os
import pickle
import resource
import struct
import zipfile

import pytest
import torch

from checkpoint import CheckpointError
from hub.folders import read_weights
from runtime.tensors import FEW, read_tensors


def rewritten(path, change, **options):
    """The archive at `path` with its entries as `change`({name: bytes}) has them; options of ZipFile.writestr."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in change(entries).items():
            archive.writestr(name, data, **options)


def pickled(path, change):
    rewritten(path, lambda entries: {name: change(data) if name.endswith("data.pkl") else data for name, data in entries.items()})


def saved(path, value=None):
    torch.save({"a": torch.arange(64.0)} if value is None else value, path)
    return path


def strided(path):
    saved(path, {"a": torch.zeros(1).expand(1 << 20, 1 << 20)})


def shared(path):
    one = torch.zeros(1 << 14)
    saved(path, {f"p{number}": one for number in range(1000)})


def claims(path):
    """A tensor of 2^40 numbers, of which 64 are there."""
    many = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
    pickled(saved(path), lambda data: data.replace(b"K@", many))


def bomb(path):
    """Zeros that take a thousandth in the archive: in what is pickled, and in a tensor."""
    rewritten(saved(path), lambda entries: {name: data + bytes(1 << 24) for name, data in entries.items()},
              compress_type=zipfile.ZIP_DEFLATED)


def climbs(path):
    rewritten(saved(path), lambda entries: entries | {"../climbed": b"x"})


def overlaps(path):
    """Many entries of the directory that are the same bytes of the file."""
    saved(path, {"a": torch.zeros(1 << 16)})
    data = path.read_bytes()
    end = data.rindex(b"PK\5\6")
    size, start = struct.unpack("<II", data[end + 12:end + 20])
    entries = data[start:start + size]
    path.write_bytes(data[:start] + entries * 9 + struct.pack("<IHHHHIIH", 0x06054b50, 0, 0, *[entries.count(b"PK\1\2") * 9] * 2,
                                                              len(entries) * 9, start, 0))


def nested(path):
    pickled(saved(path), lambda data: b"\x80\x02" + b"]" * 10 ** 5 + b"a" * (10 ** 5 - 1) + b".")


def laughs(path):
    """Lists of ten times the list before, 30 times: a few bytes, 10^30 things."""
    value: list = [0]
    for _ in range(30):
        value = [value] * 10
    saved(path, {"a": value})


def huge_number(path):
    saved(path, {"step": 2 ** 2000})


def huge_text(path):
    """A text that claims 2^62 bytes."""
    pickled(saved(path), lambda data: b"\x80\x02\x8d" + struct.pack("<Q", 1 << 62) + b"x.")


def executes(path):
    class Call:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "executed"),)
    saved(path, {"a": Call()})


def old_format(path):
    path.write_bytes(pickle.dumps({"a": 1}) + b"\0" * 99)


HOSTILE = [strided, shared, claims, bomb, climbs, overlaps, nested, laughs, huge_number, huge_text, executes, old_format]


@pytest.mark.parametrize("make", [*HOSTILE, os.mkfifo, os.mkdir], ids=lambda make: make.__name__)
def test_a_hostile_file_of_tensors_is_refused(tmp_path, make):
    path = tmp_path / "pytorch_model.bin"
    make(path)
    before, memory = sorted(tmp_path.parent.rglob("*")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_tensors, read_weights):
        with pytest.raises(CheckpointError) as refused:
            read(path)
        assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value) and len(str(refused.value)) < 600
    assert sorted(tmp_path.parent.rglob("*")) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # KB


def test_what_is_honest_is_read(tmp_path):
    tied = torch.randn(50, 8)
    value = {"a": tied, "b": tied, "empty": torch.zeros(0, 4), "turned": torch.randn(4, 6).T, "step": 2 ** 63,
             "names": ["x"] * FEW}
    found = read_tensors(saved(tmp_path / "a.pt", value))
    assert all(torch.equal(found[key], value[key]) for key in ("a", "b", "empty", "turned"))
    assert found["step"] == 2 ** 63 and found["names"] == value["names"]
    torch.save({"a": tied}, tmp_path / "b.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "b.bin")["a"], tied)
