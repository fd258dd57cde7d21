"""tests/versions.py on this environment and a few tests made for it; the page that it writes."""

import re
import sys

import lab
import versions
from runtime.command import OLDEST_TORCH

TESTS = """
import pytest

@pytest.mark.parametrize("number", [1, 2, 3])
def test_sound(number):
    pass

def test_wrong():
    assert False

def test_not_here():
    pytest.skip("not here")
"""


def test_an_environment_is_told_by_what_its_tests_say(tmp_path):
    (tmp_path / "test_made.py").write_text(TESTS)
    row = versions.attempt(sys.executable, [str(tmp_path / "test_made.py")])
    assert (row["passed"], row["failed"], row["skipped"], row["remarks"]) == ("3", "1", "1", "`test_wrong`")
    assert row["Python"] == sys.version.split()[0]


def test_what_cannot_be_had_or_imported_is_a_remark(tmp_path):
    assert versions.install("0.1/2.6/2", tmp_path) == "no python0.1 on the machine"
    (tmp_path / "python").write_text("#!/bin/sh\necho 'ImportError: no libfoo.so' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    assert versions.attempt(tmp_path / "python", []) == {"remarks": "cannot be imported: ImportError: no libfoo.so"}


def test_a_row_takes_the_place_of_the_one_of_the_same_versions_in_their_order():
    text = ""
    for words in ("3.11.7 2.10.0 2.1.0 3", "3.9 2.6 1.26 -", "3.11.7 2.8.0 2.1.0 4", "3.11.9 2.10.1+cpu 2.4.0 5",
                  "3.11.7 2.10.0 1.26.4 6"):
        row = dict(zip(versions.COLUMNS, words.split(), strict=False))
        text = versions.page(text, row | {"remarks": "a | b"}, "2.6")
    rows = versions.rows_of(text)
    assert [(row["Python"], row["torch"], row["passed"]) for row in rows] == [
        ("3.9", "2.6", "-"), ("3.11.7", "2.8.0", "4"), ("3.11.7", "2.10.0", "6"), ("3.11.9", "2.10.1+cpu", "5")]
    assert rows[0]["remarks"] == "a / b" and text.count("# Versions") == 1


def test_the_ends_of_what_is_promised_are_tried_and_stand_in_one_place_each():
    tried = [[tuple(map(int, part.split("."))) for part in name.split("/")] for name in versions.COMBINATIONS]
    needed = (lab.ROOT / "requirements.txt").read_text()
    torch = re.search(r"^torch==(\d+)\.(\d+)", needed, re.MULTILINE)
    numpy = re.search(r"^numpy>=(\d+)\.(\d+)", needed, re.MULTILINE)
    assert min(torch for _, torch, _ in tried) == OLDEST_TORCH and max(tried)[0] > (3, 11)
    assert tuple(map(int, torch.groups())) in [torch for _, torch, _ in tried]
    assert tuple(map(int, numpy.groups())) in [numpy for _, _, numpy in tried] and (2,) in [numpy for _, _, numpy in tried]
    assert f"Python {'.'.join(map(str, min(tried)[0]))} or newer" in (lab.ROOT / "README.md").read_text()
