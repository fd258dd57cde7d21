"""Model folders on disk: our writer beside the library's, and what strangers put into a folder."""

import io
import json
import os
import pickle
import random
import shutil
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lab
from checkpoint import CheckpointError, Writer, publish
from hub.folders import DTYPES, MOST_JSON, read_folder, read_json, read_weights, resolve, weight_files, write_safetensors
from runtime.files import sha256


def tensors_of_every_kind():
    made = {}
    for dtype in DTYPES:
        for shape in ((3, 5), (), (0, 4), (7,)):
            values = torch.randn(shape) if dtype.is_floating_point else torch.randint(0, 2, shape)
            made[f"{len(made) % 3}.{dtype}.{shape}"] = values.to(dtype)
    return made | {'layers."\\\u2028\u00fc\x01': torch.randn(4), "turned": torch.randn(4, 6).T}


@pytest.mark.parametrize("count", [0, 1, 7, None])
def test_the_bytes_are_those_of_the_library(tmp_path, count):
    tensors = dict(list(tensors_of_every_kind().items())[:count])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    ours = io.BytesIO()
    write_safetensors(ours, tensors)
    assert ours.getvalue() == (tmp_path / "theirs").read_bytes()
    (tmp_path / "ours").write_bytes(ours.getvalue())
    again = load_file(tmp_path / "ours")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_weights_are_as_readable_as_other_files_and_the_manifest_counts_what_was_handed_over(tmp_path, umask):
    before = os.umask(umask)
    try:
        publish(tmp_path / "made", {"model.safetensors": Writer(lambda file: write_safetensors(file, {"a": torch.randn(300)})),
                                    "config.json": Writer(lambda file: file.write(b"{}"))})
    finally:
        os.umask(before)
    weights = tmp_path / "made/model.safetensors"
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "made").iterdir()} == {0o666 & ~umask}
    entry = json.loads((tmp_path / "made/manifest.json").read_text())["files"]["model.safetensors"]
    assert entry == {"size": weights.stat().st_size, "sha256": sha256(weights)}


# ---- weights in one file or several -----------------------------------------------------------------------------

PARTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(2)}


def in_parts(folder, kind, names=("1", "2"), index=None):
    """A folder whose weights are in two files of a kind, with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    stem, ending = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[kind]
    files = [f"{stem}-{name}.{ending}" for name in names]
    for file, keys in zip(files, ("a", "bc")):
        part = {key: PARTS[key] for key in keys}
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
    told = {"weight_map": {key: files[key != "a"] for key in PARTS}} if index is None else index
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files_are_joined(tmp_path, kind):
    found = read_folder(in_parts(tmp_path / "made", kind))[1]
    assert found.keys() == PARTS.keys() and all(torch.equal(found[name], PARTS[name]) for name in PARTS)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_of_any_age_is_read(tmp_path, zipped):
    torch.save(PARTS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (tmp_path / "config.json").write_text("{}")
    assert all(torch.equal(tensor, PARTS[name]) for name, tensor in read_folder(tmp_path)[1].items())


def test_of_several_kinds_the_one_is_taken_that_transformers_takes_and_said(tmp_path, said):
    folder = in_parts(in_parts(tmp_path, "bin"), "safetensors")
    torch.save(PARTS, folder / "pytorch_model.bin")
    assert [path.name for path in weight_files(folder)] == ["model-1.safetensors", "model-2.safetensors"]
    assert said == [f"{folder}: holds model.safetensors.index.json and pytorch_model.bin and pytorch_model.bin.index.json; the "
                    "first is read"]
    save_file(PARTS, folder / "model.safetensors")
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]


@pytest.mark.parametrize("index", [
    {"weight_map": {"a": "../model-1.safetensors"}}, {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": ".."}},
    {"weight_map": {"a": "config.json"}}, {"weight_map": {"a": "absent.safetensors"}}, {"weight_map": {"a": 5}},
    {"weight_map": {"a": ["model-1.safetensors"]}}, {"weight_map": {}}, {"weight_map": []}, {}, [], 7,
    {"weight_map": {"a": "C:\\model-1.safetensors"}}, {"weight_map": {"a": "\x1b[2Jx.safetensors"}}], ids=str)
def test_an_index_that_points_elsewhere_is_refused(tmp_path, index):
    folder = in_parts(tmp_path / "made", "safetensors", index=index)
    shutil.copy(folder / "model-1.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="index.json") as error:
        read_folder(folder)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_the_same_tensor_in_two_files_is_refused(tmp_path):
    folder = in_parts(tmp_path / "made", "safetensors")
    save_file(PARTS, folder / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="model-2.safetensors: holds a, as another"):
        read_folder(folder)


# ---- bombs --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b'{"n": ' + b"9" * 6000 + b"}", b"[]", b"",
                                     b"\xff\xfe{}", b"nu"], ids=lambda content: str(content[:6]))
def test_json_that_is_too_deep_long_or_none_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.json: ") as error:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_json_of_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(MOST_JSON + 1)
    with pytest.raises(CheckpointError, match="more than such a file has"):
        read_json(tmp_path / "config.json")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("content", [
    {"a": torch.zeros(1).expand(1 << 40)}, {"a": torch.eye(3).to_sparse()}, {"a": torch.zeros(2, device="meta")}, {"a": 5},
    {5: torch.zeros(1)}, [torch.zeros(1)], torch.zeros(1), {"a": {"b": torch.zeros(1)}},
    {"a": torch.zeros(2, dtype=torch.complex64)}, {"a": Evil()}],
    ids="expanded sparse meta number key list tensor nested complex code".split())
def test_a_bin_of_anything_but_plain_tensors_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin: ") as error:
        read_weights(tmp_path / "pytorch_model.bin")
    assert "\n" not in str(error.value) and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_damaged_weights_are_read_or_refused_in_one_line(tmp_path, kind):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.bin")
    torch.save(PARTS, path, _use_new_zipfile_serialization=kind == "zip")
    if kind == "safetensors":
        save_file(PARTS, path)
    whole, made = path.read_bytes(), random.Random(0)
    for _ in range(300):
        spoilt = bytearray(whole)
        for _ in range(made.choice([1, 4])):
            spoilt[made.randrange(len(spoilt))] = made.randrange(256)
        path.write_bytes(spoilt[:made.choice([len(spoilt), made.randrange(len(spoilt))])])
        try:
            read_weights(path)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(path) in str(error)


@pytest.mark.parametrize("header", [
    b"{", b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}', b"[" * 1000,
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,4]}}'])
def test_a_header_that_lies_is_refused(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read"):
        read_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_file_is_not_waited_for(tmp_path, name):
    for other in {"config.json", "model.safetensors"} - {name}:
        (tmp_path / other).write_text("{}")
    os.mkfifo(tmp_path / name)  # to open it would wait for a writer
    with pytest.raises(CheckpointError):
        read_folder(tmp_path)
    with pytest.raises(CheckpointError):
        read_folder(resolve(tmp_path))


def test_a_pickle_under_the_name_of_weights_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(CheckpointError, match=name):
            read_weights(tmp_path / name)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("changes, says", [
    ({"num_hidden_layers": 10_000}, "missing"), ({"num_hidden_layers": 10 ** 9}, "n_layers"), ({"hidden_size": 2 ** 20}, "not")])
def test_a_config_of_a_giant_is_refused_before_it_is_built(tmp_path, changes, says):
    llama = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64,
             "num_attention_heads": 4, "max_position_embeddings": 16}
    save_file(PARTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(llama | changes))
    assert says in lab.call("sample.py", tmp_path, code=2)
