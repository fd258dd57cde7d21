"""The course is run: every Python and shell block of docs/course, in order, in a folder like the repository's root.

    make course                # the small setting, as in `make test`
    make course SCALE=full     # the full one; its figures are put into docs/course/figures

A document's blocks share one namespace, as they do for who types them. What they write goes into a folder of its own.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs/course/figures"
os.environ.setdefault("SCALE", "quick")
WRITTEN = {"runs", "corpora"}  # what a lesson makes; all else is the repository's


def run_shell(example) -> None:
    """A shell block, with the interpreter of the tests as `python`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(["bash", "-euc", example.parsed], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    print(done.stdout + done.stderr)
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def begin(namespace: dict) -> None:
    folder = Path(tempfile.mkdtemp())
    for path in ROOT.iterdir():
        if path.name not in WRITTEN and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    namespace["_threads"] = torch.get_num_threads()
    torch.set_num_threads(1 if os.environ["SCALE"] == "quick" else namespace["_threads"])
    os.chdir(folder)


def end(namespace: dict) -> None:
    folder = Path.cwd()
    os.chdir(ROOT)
    torch.set_num_threads(namespace["_threads"])
    if os.environ["SCALE"] == "full":
        for figure in folder.glob("runs/figures/*.png"):
            with Image.open(figure) as picture:  # 64 colours: a third of the bytes, and no difference to the eye
                picture.convert("RGB").quantize(64).save(FIGURES / figure.name, optimize=True)
    shutil.rmtree(folder)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser(language="bash", evaluator=run_shell)],
    path=str(ROOT / "docs/course"), pattern="[1-9]*.md", setup=begin, teardown=end).pytest()
