"""Every command started twice at the same moment, twenty times: nothing lost, nothing left half made.

    python tests/twice.py                      # about 15 minutes on 2 cores
    python tests/twice.py trains --times 3

One of two may be refused, in one line; what is there afterwards is what one alone would have made.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import yaml  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import lab  # noqa: E402
from runtime.command import Parser  # noqa: E402

REFUSED = 2
PATIENCE = 300.0  # seconds
REPLAYED = (3, 7, 12)


def together(*words: object, other: tuple[object, ...] | None = None) -> list[int]:
    """The exit codes of a command and another, or itself, begun at one moment; none may be a traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(lab.FORKED_FROM)
    forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        told = [Path(folder) / str(number) for number in range(2)]
        for path in told:
            path.touch()
        copies = [context.Process(target=lab._copy, args=(str(path), lab.ROOT / said[0], list(map(str, said[1:])),
                                                          {**os.environ, **lab.ENV}))
                  for path, said in zip(told, (words, other or words))]
        for process in copies:
            process.start()
        for process in copies:
            process.join(PATIENCE)
            assert process.exitcode is not None, f"{words[0]}: not at an end in {PATIENCE} s"
        texts = [path.read_text() for path in told]
    for process, text in zip(copies, texts):
        assert process.exitcode in (0, REFUSED) and "Traceback" not in text, text[-3000:]
        assert process.exitcode == 0 or text.strip().splitlines()[-1].startswith("error: "), text[-3000:]
    codes = [process.exitcode for process in copies]
    assert 0 in codes, texts
    return codes


def half_made(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".staging" in path.name]


class Twice:
    """One folder; `model` is a run that is whole, and nothing happens to it."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, lab.Lab(folder, lab.make_dataset(folder / "data"))
        self.runs.train("model")
        lab.call("analyze.py", folder / "model", "--out", folder / "analysed")
        lab.call("export.py", "hf", folder / "model", folder / "exported")
        (folder / "text.txt").write_text("to be, or not to be: that is the question. " * 4000)

    def copied(self, number: int) -> Path:
        """A run of its own, equal to `model`."""
        path = self.folder / f"copy-{number}"
        shutil.copytree(self.folder / "model", path)
        return path

    def trains(self, number: int) -> list[int]:
        """One run by name: one trains it, the other is refused, or finds it at its end."""
        name = f"run-{number}"
        codes = together("train.py", self.runs.config(name))
        self.runs.same_end(name, "model")
        return codes

    def nameless(self, number: int) -> list[int]:
        """Two runs without a name, in the same second."""
        tree = lab.tiny_tree(self.runs.dataset, self.folder / f"runs-{number}")
        del tree["checkpointing"]["run_name"]
        codes = together("train.py", lab.write_config(self.folder / "nameless.yaml", tree))
        made = sorted((self.folder / f"runs-{number}").iterdir())
        assert codes == [0, 0] and len(made) == 2
        for run in made:
            assert lab.metrics(run) == self.runs.metrics("model") and half_made(run) == []
        return codes

    def texts(self, number: int) -> list[int]:
        """One data set."""
        out = self.folder / f"text-{number}"
        codes = together("shards.py", "text", self.folder / "text.txt", "--out", out, "--row-length", 33)
        assert sorted(codes) == [0, REFUSED]
        lab.call("shards.py", "verify", out)
        assert half_made(self.folder) == []
        return codes

    def analyses(self, number: int) -> list[int]:
        run = self.copied(number)
        codes = together("analyze.py", run)
        for path in (self.folder / "analysed").glob("*.csv"):
            assert (run / "analysis" / path.name).read_bytes() == path.read_bytes(), path.name
        return codes

    def evaluations(self, number: int) -> list[int]:
        run = self.copied(number)
        codes = together("evaluate.py", run, "evaluation.metrics=[val]")
        found = json.loads((run / "eval_results/step_20.json").read_text())
        assert found == json.loads((self.folder / "model/eval_results/step_20.json").read_text())
        return codes

    def exports(self, number: int) -> list[int]:
        out = self.folder / f"exported-{number}"
        codes = together("export.py", "hf", self.folder / "model", out)
        assert sorted(codes) == [0, REFUSED]
        found, expected = (load_file(path / "model.safetensors") for path in (out, self.folder / "exported"))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
        assert {path.name for path in out.iterdir()} == {path.name for path in (self.folder / "exported").iterdir()}
        return codes

    def replays(self, number: int) -> list[int]:
        """Of one run; the snapshots are those of one alone."""
        run, alone = self.copied(number), self.folder / "replayed"
        if not alone.exists():
            shutil.copytree(self.folder / "model", alone)
            lab.call("replay.py", alone, "--steps", ",".join(map(str, REPLAYED)))
        codes = together("replay.py", run, "--steps", ",".join(map(str, REPLAYED)))
        for step in REPLAYED:
            names = [path.relative_to(alone) for path in (alone / f"checkpoints/step_{step}").rglob("*.pt")]
            assert names and all((run / name).read_bytes() == (alone / name).read_bytes() for name in names)
        assert half_made(run) == []
        return codes

    def trains_and_replays(self, number: int) -> list[int]:
        """A run goes on while another command adds to it."""
        name = f"going-{number}"
        self.runs.train(name, "training.stop_at_step=10")
        codes = together("train.py", self.runs.config(name),
                         other=("replay.py", self.folder / name, "--steps", "3,7"))
        if codes[0] == REFUSED:
            self.runs.train(name)
        self.runs.same_end(name, "model")
        return codes

    def studies(self, number: int) -> list[int]:
        """One study: one runs it, the other is refused."""
        folder = self.folder / f"study-{number}"
        folder.mkdir()
        tree = lab.tiny_tree(self.runs.dataset, folder / "unused")
        tree["checkpointing"] |= {"learning_dynamics": None, "run_name": None}
        lab.write_config(folder / "base.yaml", tree)
        (folder / "two.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "rates": [1e-2], "seeds": [1], "selection_rows": 4,
                                                         "arms": {"a": [], "b": ["model.relora.r=2"]}}))
        codes = together("study.py", folder / "two.yaml", "--out", folder / "out")
        assert len((folder / "out/table.csv").read_text().splitlines()) == 3 and half_made(folder) == []
        return codes


CASES = ("trains", "nameless", "texts", "analyses", "evaluations", "exports", "replays", "trains_and_replays", "studies")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("cases", nargs="*", help=f"which of {', '.join(CASES)} (default: all)")
    parser.add_argument("--times", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        twice = Twice(Path(folder))
        for case in args.cases or CASES:
            begun, ends = time.monotonic(), Counter()
            method: Callable[[int], list[int]] = getattr(twice, case)
            for number in range(args.times):
                ends[" and ".join("refused" if code else "done" for code in sorted(method(number)))] += 1
                shutil.rmtree(Path(folder) / f"copy-{number}", ignore_errors=True)
            said = ", ".join(f"{count} x {end}" for end, count in ends.items())
            print(f"{case}: {said}; {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
