"""The fast part of the tests with other versions of Python, torch and numpy; what came of it becomes docs/versions.md.

    make versions                                      # all that is below; killed, it goes on from where it was
    python tests/versions.py --only 3.11/2.8           # those of them whose name begins so
    python tests/versions.py --with env/bin/python     # an environment that is there already, one more row

Each combination has an environment of its own in the temporary folder, deleted after use. pip takes torch as it is set up to:
without an index of CPU builds (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL) that is up to 3 GB to download, and 7 on the disk, for each.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/versions.md"
FOLDER = Path(tempfile.gettempdir()) / "pico-versions"
COMBINATIONS = (  # Python/torch/numpy: every torch on one Python, then the ends of the range on the others
    "3.11/2.6/1.26", "3.11/2.7/2", "3.11/2.8/2", "3.11/2.9/2", "3.11/2.10/1.26", "3.11/2.11/2", "3.11/2.13/1.26", "3.11/2.13/2",
    "3.11/2.15/2", "3.10/2.6/1.26", "3.10/2.13/2", "3.12/2.6/1.26", "3.12/2.13/2", "3.13/2.13/2", "3.14/2.13/2")
FAST = ("test_model.py", "test_relora.py", "test_optim.py", "test_config.py", "test_checkpoint.py", "test_data.py",
        "test_shards.py", "runtime/test_command.py", "runtime/test_machine.py", "runtime/test_tensors.py",
        "runtime/test_kernels.py", "hub/test_parquet.py", "hub/test_llama.py", "instruments/test_measures.py",
        "test_train.py::test_two_ranks_train_as_one_does", "test_train.py::test_one_process_goes_on_from_a_checkpoint_of_two")
COLUMNS = ("Python", "torch", "numpy", "passed", "failed", "skipped", "remarks", "tried")
HEAD = """# Versions

What the fast part of the tests (models, ReLoRA, optimizers, options, checkpoints, data, exports, two ranks as one) says of
other versions than those that all tests run with. `make versions` writes this page; `tests/versions.py` names the combinations.

`requirements.txt` names one torch, not a range: of a range pip takes the newest, with whatever CUDA that one wants, and a run of
months should not meet another torch because it was installed again. To use any other of this table, install it over that one,
as in `pip install torch==2.8.0`. What a version cannot do is refused in one sentence at the start: a torch before {oldest},
`muon` before 2.9, `fsdp` and `hsdp` on CPUs before 2.8 (`test_train.py`). Beside numpy 1.26 pyarrow must be below 26.

"""
VERSIONS = "import sys, torch, numpy; print('.'.join(map(str, sys.version_info[:3])), torch.__version__, numpy.__version__)"


def install(name: str, folder: Path) -> str:
    """Make the environment of a combination in `folder`; why that cannot be done, or nothing."""
    python, torch, numpy = name.split("/")
    found = shutil.which(f"python{python}")
    if found is None:
        return f"no python{python} on the machine"
    others = [line for file in ("requirements.txt", "requirements-dev.txt") for line in (ROOT / file).read_text().splitlines()
              if not line.startswith(("-r", "torch", "numpy", "#"))]
    others += ["pyarrow<26"] * numpy.startswith("1.")  # later ones want numpy 2, and do not tell pip
    (folder / "wanted.txt").write_text("\n".join([f"torch=={torch}.*", f"numpy=={numpy}.*", *others]))
    for words in ([found, "-m", "venv", folder / "env"],
                  [folder / "env/bin/python", "-m", "pip", "install", "--quiet", "--no-cache-dir", "-r", folder / "wanted.txt"]):
        done = subprocess.run(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            lines = done.stdout.splitlines() or ["no word"]
            return f"cannot be installed: {next((line for line in lines if line.startswith('ERROR')), lines[-1])[:150]}"
    return ""


def attempt(python: Path, tests: Sequence[str]) -> dict[str, str]:
    """The row of an environment: run the tests with its interpreter."""
    asked = subprocess.run([python, "-c", VERSIONS], text=True, capture_output=True)
    if asked.returncode:
        return {"remarks": f"cannot be imported: {(asked.stderr.strip() or 'no word').splitlines()[-1][:150]}"}
    row = dict(zip(COLUMNS, asked.stdout.split(), strict=False))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([python, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", f"--junitxml={report}", *tests],
                       cwd=ROOT / "tests", env=os.environ | {"OMP_NUM_THREADS": "1"})
        if not report.exists():
            return row | {"remarks": "the tests cannot be started"}
        suite = ElementTree.parse(report).getroot().find("testsuite")
    total, skipped, *bad = (int(suite.get(name)) for name in ("tests", "skipped", "failures", "errors"))
    names = [case.get("name") for case in suite if case.find("failure") is not None or case.find("error") is not None]
    remarks = ", ".join(f"`{name}`" for name in names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)
    return row | {"passed": str(total - sum(bad) - skipped), "failed": str(sum(bad)), "skipped": str(skipped), "remarks": remarks}


def rows_of(text: str) -> list[dict[str, str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    return [dict(zip(COLUMNS, map(str.strip, cells), strict=True)) for cells in lines]


def page(old: str, new: dict[str, str], oldest: str) -> str:
    """The page with a row put in, in place of the one of the same versions."""
    def place(row: dict[str, str]) -> list[list[int]]:
        return [[int(number) for number in re.findall(r"\d+", row[name])[:length]] for name, length in zip(COLUMNS, (2, 2, 1))]
    new = dict.fromkeys(COLUMNS, "-") | new | {"tried": datetime.date.today().isoformat()}
    new["remarks"] = new["remarks"].replace("|", "/") or "-"
    rows = sorted([row for row in rows_of(old) if place(row) != place(new)] + [new], key=place)
    table = [COLUMNS, ["---"] * len(COLUMNS), *([row[name] for name in COLUMNS] for row in rows)]
    return HEAD.format(oldest=oldest) + "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from runtime.command import OLDEST_TORCH, Parser
    parser = Parser(__doc__)
    parser.add_argument("--only", default="", metavar="PYTHON/TORCH/NUMPY")
    parser.add_argument("--with", dest="python", type=Path, metavar="INTERPRETER")
    args = parser.parse_args()
    wanted = ["-"] if args.python else [name for name in COMBINATIONS if name.startswith(args.only)]
    told = FOLDER / "done.json"
    done = json.loads(told.read_text()) if told.exists() else []
    if set(wanted) <= set(done):  # all of them were tried: anew
        done = [name for name in done if name not in wanted]
    FOLDER.mkdir(exist_ok=True)
    if not args.python:
        shutil.rmtree(FOLDER / "env", ignore_errors=True)  # what a killed one has left
    for name in [name for name in wanted if name not in done]:
        print(f"{args.python or name} ...", flush=True)
        row = {} if args.python else dict(zip(COLUMNS, name.split("/"), strict=False))
        problem = "" if args.python else install(name, FOLDER)
        row |= {"remarks": problem} if problem else attempt((args.python or FOLDER / "env/bin/python").absolute(), FAST)
        PAGE.write_text(page(PAGE.read_text() if PAGE.exists() else "", row, ".".join(map(str, OLDEST_TORCH))))
        print(", ".join(f"{row.get(key, '-')} {key}" for key in COLUMNS[:7]), flush=True)
        if not args.python:
            told.write_text(json.dumps(done := [*done, name]))
            shutil.rmtree(FOLDER / "env", ignore_errors=True)


if __name__ == "__main__":
    main()
