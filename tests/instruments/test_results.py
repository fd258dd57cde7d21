"""The folder of an analysis, where somebody else has been before: what is written, deleted and believed there."""

import csv
import hashlib
import io
import json
import os

import pytest

from config import UserError
from instruments.results import LIST, Cache, Results, own_key, table_text


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """A place of this test's own for the user's key."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def write(folder, *files, chosen=True):
    results = Results(folder, chosen)
    for name in files:
        results.write(name, f"new {name}")
    results.finish()


def test_only_what_was_written_is_deleted(tmp_path, said):
    (tmp_path / "holiday.png").write_text("mine")
    write(tmp_path, "report.html", "figures/a.png", "figures/b.png")
    (tmp_path / "figures/c.png").write_text("mine")
    write(tmp_path, "report.html", "figures/a.png")
    assert names(tmp_path) == ["figures/a.png", "figures/c.png", "holiday.png", "report.html", LIST] and said == []


def test_what_somebody_has_changed_is_kept(tmp_path, said):
    write(tmp_path, "report.html", "figures/a.png", "figures/b.png")
    for name in ("report.html", "figures/b.png"):
        (tmp_path / name).write_text("edited by hand")
    write(tmp_path, "report.html")
    assert names(tmp_path) == ["figures/b.png", "report.html", "report.html.aside-1", LIST]
    assert (tmp_path / "report.html.aside-1").read_text() == "edited by hand" and "kept as report.html.aside-1" in said[0]


@pytest.mark.parametrize("listed", [{"../mine.txt": None}, {"mine.txt": "0"}, {"figures/../../mine.txt": None}, ["mine.txt"], 5,
                                    {"/etc/passwd": "0"}, {"mine.txt": 5}, {"mine.txt": ["0"]}, "[" * 100_000, "{"],
                         ids=lambda listed: str(listed)[:20])
def test_a_list_that_somebody_planted_deletes_nothing(tmp_path, listed):
    out = tmp_path / "out"
    out.mkdir()
    for folder in (tmp_path, out):
        (folder / "mine.txt").write_text("mine")
    (out / LIST).write_text(listed if isinstance(listed, str) else json.dumps(listed))
    write(out, "report.html")
    assert names(tmp_path) == ["mine.txt", "out/mine.txt", "out/report.html", f"out/{LIST}"]


def test_links_lead_nowhere(tmp_path, said):
    """Of the files, the list, the folder of figures and, unless the user named it, the folder itself."""
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.mkdir()
    (mine / "a.png").write_text("mine")
    (mine / "b.png").write_text("mine")
    out.mkdir()
    for name in ("report.html", LIST, "dangling.html"):
        os.symlink(mine / ("a.png" if name != "dangling.html" else "made"), out / name)
    write(out, "report.html", "dangling.html")
    assert (out / "report.html").read_text() == "new report.html" and not (out / LIST).is_symlink()
    assert len(said) == 2
    os.symlink(mine, out / "figures")
    with pytest.raises(UserError, match="is a link to"):
        write(out, "figures/a.png")
    (out / LIST).write_text(json.dumps({"figures/b.png": hashlib.sha256(b"mine").hexdigest()}))
    write(out)
    os.symlink(mine, tmp_path / "analysis")
    with pytest.raises(UserError, match="is a link to .* give a folder with --out"):
        write(tmp_path / "analysis", "b.png", chosen=False)
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"a.png": "mine", "b.png": "mine"}
    write(tmp_path / "analysis", "c.png", chosen=True)
    assert (mine / "c.png").read_text() == "new c.png"


# ---- what was measured before ------------------------------------------------------------------------------------------

ROWS = [{"step": 1, "value": 0.1 + 0.2, "reason": None}, {"step": 1, "value": [1.0, 1e-300], "reason": "x"}]


def test_rows_come_back_as_they_were_and_only_for_what_they_were_measured_from(tmp_path):
    Cache(tmp_path).write("step_1.json", "source", ROWS)
    assert Cache(tmp_path).read("step_1.json", "source") == ROWS
    assert Cache(tmp_path).read("step_1.json", "another") is None and Cache(tmp_path).read("step_2.json", "source") is None


def forgeries(kept):
    """A file as strangers might write it: the values changed, the rows alone, the seal of other rows, other types."""
    yield from ({**kept, "rows": [{**ROWS[0], "value": 7.0}]}, {**kept, "rows": []}, ROWS, {"rows": ROWS}, {**kept, "seal": 5},
                {**kept, "seal": "\u00e9"}, {**kept, "seal": ""}, [], 5, None, {"rows": None, "seal": None})


def test_rows_that_this_user_did_not_measure_are_not_believed(tmp_path, monkeypatch):
    path = tmp_path / "cache/step_1.json"
    Cache(tmp_path).write(path.name, "source", ROWS)
    kept = path.read_text()
    texts = [*map(json.dumps, forgeries(json.loads(kept))), "", "{", "[" * 100_000, "1" * 5000, "NaN", "\0", kept[:-9]]
    for text in texts:
        path.write_text(text)
        assert Cache(tmp_path).read(path.name, "source") is None, text[:80]
    path.write_bytes(b"\xff")
    assert Cache(tmp_path).read(path.name, "source") is None
    path.write_text(kept)
    assert Cache(tmp_path).read(path.name, "source") == ROWS
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another home"))
    assert Cache(tmp_path).read(path.name, "source") is None, "sealed by another user"


def test_a_cache_that_is_a_link_is_not_used_and_said(tmp_path, said):
    mine = tmp_path / "mine"
    mine.mkdir()
    for folder, link in ((tmp_path / "a", tmp_path / "a/cache"), (tmp_path / "b", tmp_path / "b")):
        link.parent.mkdir(exist_ok=True)
        os.symlink(mine, link)
        Cache(folder).write("step_1.json", "source", ROWS)
    assert list(mine.iterdir()) == [] and len(said) == 2 and "is not kept there" in said[0]


def test_the_key_is_the_users_alone_and_stays(tmp_path, monkeypatch, said):
    key = own_key()
    assert len(key) == 32 and own_key() == key
    path = next((tmp_path.parent.parent / os.environ["XDG_CACHE_HOME"]).rglob("analysis.key"))
    assert path.stat().st_mode & 0o077 == 0
    path.write_bytes(b"torn")
    assert len(own_key()) == 32 != own_key()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert own_key() is None and "every analysis measures anew" in said[-1]
    Cache(tmp_path).write("step_1.json", "source", ROWS)
    assert Cache(tmp_path).read("step_1.json", "source") is None


# ---- tables ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\uff1d1", "a\x1b[31m"])
def test_no_cell_is_a_formula_or_moves_a_terminal(text):
    table = table_text(["run", "value"], [[text, -0.5], ["fine", None]])
    first, last = list(csv.reader(io.StringIO(table)))[1:]
    assert first[1] == "-0.5" and last == ["fine", ""] and first[0].isprintable()
    assert first[0][0] == "'" or first[0][0] in "\\a"
