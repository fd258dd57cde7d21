"""The notebook is run as Jupyter runs it, from its own folder; the committed file holds no outputs."""

import ast
import base64
import os
import re

import nbclient
import nbformat
import pytest

import lab

FOLDER = lab.ROOT / "notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
STEPS = 10
PNG = b"\x89PNG\r\n"

pytestmark = pytest.mark.timeout(600)  # seconds, where it waits for a busy machine


def repository(folder):
    """The repository in a folder of its own, so that what a notebook writes is not the user's; outputs excepted."""
    for path in lab.ROOT.iterdir():
        if path.name not in ("runs", "corpora", "notebooks") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    (folder / "notebooks").mkdir()
    return folder


def executed(book, folder, cells=None):
    """A notebook's code cells (or the first few) after a run with `folder` as the kernel's working directory."""
    book = nbformat.read(book, as_version=4)
    book.cells = [cell for cell in book.cells if cell.cell_type == "code"][:cells]
    client = nbclient.NotebookClient(book, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    env = {"STEPS": str(STEPS), "OMP_NUM_THREADS": "1"}
    client.execute(env=os.environ | env)
    return book.cells


def texts(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def pictures(cell):
    return [base64.b64decode(output["data"]["image/png"]) for output in cell.outputs if "image/png" in output.get("data", {})]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    folder = repository(tmp_path_factory.mktemp("book"))
    return executed(FOLDER / "first.ipynb", folder / "notebooks")


def test_training_is_plotted_and_ends(cells):
    train = cells[2]
    (picture,) = pictures(train)  # one display, updated as the run goes
    assert picture.startswith(PNG) and len(picture) > 10_000
    loss = float(re.search(r"val loss ([\d.]+) nats a byte after 10 updates", texts(train))[1])
    assert 2 < loss < 5  # 5.5 is chance among 257


def test_the_merge_changes_the_factors_and_not_the_function(cells):
    (picture,) = pictures(cells[3])
    assert len(picture) > 30_000
    found = re.search(r"^([\d,]+) entries of B are not 0 before, 0 after; the logits change by (\S+) of the", texts(cells[3]))
    assert int(found[1].replace(",", "")) > 1000 and float(found[2]) < 1e-5


def test_it_writes_shows_ranks_and_exports(cells):
    sample, rank, export = cells[4:]
    assert texts(sample).startswith("def ") and "---\nimport " in texts(sample) and len(texts(sample)) > 60
    assert len(pictures(rank)) == 1
    assert "model.safetensors" in texts(export) and "['LlamaForCausalLM']" in texts(export)
    assert texts(export).endswith("the same logits: True\n")


def test_nothing_is_said_on_stderr_or_left_open(cells):
    assert [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"] == []


def test_it_begins_from_the_root_too(tmp_path):
    (first,) = executed(FOLDER / "first.ipynb", repository(tmp_path), cells=1)
    assert first.outputs == []


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs_and_each_cell_has_its_sentence(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert path.stat().st_size < 20_000 and path.read_text().isascii()
    kinds = [cell.cell_type for cell in book.cells]
    assert kinds == ["markdown", "code"] * len(code)
    for cell in code:
        assert max(map(len, cell.source.splitlines())) <= 130
        ast.parse(cell.source.replace("%matplotlib", "# %matplotlib"))
    assert not re.search(r"/(home|tmp|root|Users)/", path.read_text())
