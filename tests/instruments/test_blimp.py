"""BLiMP as people have it: a zip, a folder of jsonl, a copy of the Hub's parquet; read alike."""

import json
import zipfile

import pyarrow as arrow
import pyarrow.parquet
import pytest

from config import BlimpConfig, ConfigError
from instruments.blimp import load_pairs

RECORDS = {uid: [{"UID": uid, "linguistics_term": "agreement", "sentence_good": f"good {uid} {n}", "sentence_bad": f"bad {n}"}
                 for n in range(3)] for uid in ("alpha", "beta")}


def lines(records):
    return "".join(f"{json.dumps(record)}\n" for record in records)


def as_jsonl(folder):
    (folder / "data").mkdir(parents=True)
    for uid, records in RECORDS.items():
        (folder / "data" / f"{uid}.jsonl").write_text(lines(records))


def as_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        for uid, records in RECORDS.items():
            archive.writestr(f"data/{uid}.jsonl", lines(records))
            archive.writestr(f"__MACOSX/data/._{uid}.jsonl", b"\x00\xff")


def as_folder_of_a_zip(folder):
    folder.mkdir()
    as_zip(folder / "BLiMP.zip")


def as_parquet(folder):
    """The Hub's layout: a folder a paradigm, a column more, and the README beside."""
    for uid, records in RECORDS.items():
        (folder / uid).mkdir(parents=True)
        rows = [record | {"pair_id": number} for number, record in enumerate(records)]
        arrow.parquet.write_table(arrow.Table.from_pylist(rows), folder / uid / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text("BLiMP")


@pytest.mark.parametrize("make", [as_jsonl, as_zip, as_folder_of_a_zip, as_parquet])
def test_every_form_of_it_gives_the_same_pairs(tmp_path, make):
    make(tmp_path / "blimp")
    pairs = load_pairs(BlimpConfig(str(tmp_path / "blimp")))
    assert [(pair.uid, pair.good, pair.bad) for pair in pairs] == [
        (uid, f"good {uid} {n}", f"bad {n}") for uid in RECORDS for n in range(3)]
    assert len(load_pairs(BlimpConfig(str(tmp_path / "blimp"), metric_uids=["b*"], samples_per_set=2))) == 2


def test_a_mistyped_name_is_told_at_once(tmp_path):
    as_zip(tmp_path / "BLiMP.zip")
    with pytest.raises(ConfigError, match="evaluation.blimp.dataset_name: .*did you mean .*/BLiMP.zip?"):
        load_pairs(BlimpConfig(str(tmp_path / "BLIMP.zip")))
