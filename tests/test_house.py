"""The house: what may import what, how long things are, and the six edits that people make first."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import lab

ROOMS = ("config", "runtime", "hub", "instruments")
CORE = ("model", "relora", "optim", "data", "checkpoint")
COMMANDS = ("shards", "evaluate", "sample", "analyze", "export", "bench", "replay", "study")
MAY_IMPORT = {  # a room or a module of the core: what of this project it may import
    "config": {"config"}, "runtime": {"config", "runtime"},
    "model": {"config", "runtime"}, "relora": {"config", "runtime"}, "optim": {"config", "runtime", "relora"},
    "data": {"config", "runtime"}, "checkpoint": {"config", "runtime"},
    "hub": {"config", "runtime", "hub", *CORE}, "instruments": {"config", "runtime", "hub", "instruments", *CORE},
    "train": {*ROOMS, *CORE, "evaluate"},
}
EXCEPTIONS = {"instruments/timing.py": {"train", "evaluate", "optim", "shards"}}  # measures the commands themselves


def sources():
    return [*lab.ROOT.glob("*.py"), *(path for room in ROOMS for path in (lab.ROOT / room).glob("*.py"))]


def imports(path):
    """The modules and rooms of this project that a file imports, wherever it does."""
    names = {p.stem for p in lab.ROOT.glob("*.py")} | set(ROOMS)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found & names


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(lab.ROOT).as_posix())
def test_imports_point_down(path):
    name = path.relative_to(lab.ROOT).as_posix()
    place = path.parent.name if path.parent != lab.ROOT else path.stem
    if place in COMMANDS:
        return  # they stand on top
    assert imports(path) <= MAY_IMPORT[place] | EXCEPTIONS.get(name, set()), name


def test_the_root_is_a_handful_of_modules():
    assert len(list(lab.ROOT.glob("*.py"))) <= 14


def test_a_folder_that_takes_other_peoples_files_has_no_modules_name():
    """A data/__init__.py would be imported in place of data.py, and executed."""
    names = {path.stem for path in sources()} | set(ROOMS) | set(sys.stdlib_module_names)
    text = "".join(path.read_text() for path in sources()) + (lab.ROOT / "README.md").read_text()
    assert not {"corpora", "runs"} & names and "corpora/" in text


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(lab.ROOT).as_posix())
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= (420 if path.name == "train.py" else 350)
    assert max(map(len, text.splitlines()), default=0) <= 130 and text.isascii()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("name", ["train", *COMMANDS])
def test_every_command_begins_with_the_configuration(name):
    """It refuses folders that would win an import, and says how threads wait before torch starts them."""
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
             for node in ast.parse((lab.ROOT / f"{name}.py").read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert next(found for found in names if found.split(".")[0] not in sys.stdlib_module_names) == "config"
    code = f"import os, sys; sys.argv = ['x']; import {name}; print(os.environ['GOMP_SPINCOUNT'])"
    for given, expected in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        env = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
        if name == "sample":  # one stands for all: a start takes seconds
            out = subprocess.run([sys.executable, "-c", code], cwd=lab.ROOT, env=env, text=True, capture_output=True, timeout=60)
            assert out.stdout.strip() == expected, out.stderr


def test_the_paper_is_under_two_hundred_lines():
    assert len((lab.ROOT / "relora.py").read_text().splitlines()) < 200


@pytest.mark.parametrize("name", ["data", "model", "sample"])
def test_a_folder_that_would_win_an_import_is_refused_before_it_is_run(tmp_path, name):
    copy = edited(tmp_path / "copy", {})
    (copy / name).mkdir()
    (copy / name / "__init__.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    for command in ("train.py", "shards.py", "sample.py", "evaluate.py", "analyze.py", "export.py"):
        done = subprocess.run([sys.executable, command, "--help"], cwd=copy, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {copy / name}/: a folder with an __init__.py would ")
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "executed").exists()


# ---- the six edits ---------------------------------------------------------------------------------------------

LION = '''
class Lion(torch.optim.Optimizer):
    def __init__(self, parameters, lr, betas):
        super().__init__(parameters, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(group["lr"] * torch.lerp(p.grad, m, group["betas"][0]).sign())
                m.lerp_(p.grad, 1 - group["betas"][1])


OPTIMIZERS: dict'''
TOP1 = '''
class Top1(ValLoss):
    """The share of tokens that the model thinks likeliest, on the val split."""

    def __call__(self, model):
        def hits(number):
            ids = to_device(self.rows[number:number + 1], self.device)
            with torch.no_grad(), eval_mode(model, self.device):
                return float((model(ids[:, :-1]).argmax(-1) == ids[:, 1:]).float().mean())
        share = float(np.mean(map_over_ranks(len(self.rows), hits, "top1")))
        return {"accuracy": share}, f"top1 accuracy {share:.2%}"


EVALUATORS: dict'''
EDITS = {  # what is edited: {file: [(old, new), ...]}, and the words of the run
    "a new part in the model": ({"model.py": [
        ("        self.q_proj = Linear", "        self.q_norm = RMSNorm(self.head_dim, cfg.norm_eps)\n        self.k_norm = "
                                       "RMSNorm(self.head_dim, cfg.norm_eps)\n        self.q_proj = Linear"),
        ("rotate(self.q_proj(x).view(B, T, self.heads, -1), cos",
         "rotate(self.q_norm(self.q_proj(x).view(B, T, self.heads, -1)), cos"),
        ("rotate(self.k_proj(x).view(B, T, self.kv_heads, -1), cos",
         "rotate(self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, -1)), cos")]}, []),
    "another formula": ({"model.py": [("F.silu(self.w_0(x))", "F.gelu(self.w_0(x))")]}, []),
    "an optimizer": ({"optim.py": [("\nOPTIMIZERS: dict", LION),
                                   ('"muon": muon,', '"muon": muon,\n    "lion": lambda params, cfg: [Lion(params.values(), '
                                                     'cfg.lr, cfg.betas)],')],
                      "config/__init__.py": [('"sgd", "muon"]', '"sgd", "muon", "lion"]')]},
                     ["training.optimization.optimizer=lion", "training.optimization.lr=1e-3"]),
    "a schedule": ({"optim.py": [('"wsd": wsd,', '"wsd": wsd,\n    "inverse_sqrt": lambda step, span: '
                                                 '(max(1, span.warmup) / max(1, step)) ** 0.5,')],
                    "config/__init__.py": [('"wsd"]', '"wsd", "inverse_sqrt"]')]},
                   ["training.optimization.lr_scheduler=inverse_sqrt"]),
    "a low-rank variant": ({"relora.py": [("(torch.zeros(cfg.r, self.in_features, device=device))",
                                           "(torch.zeros(cfg.r, self.in_features, device=device), False)")]}, []),
    "an evaluation": ({"evaluate.py": [("\nEVALUATORS: dict", TOP1), ('"val": ValLoss,', '"val": ValLoss, "top1": Top1,')],
                       "config/__init__.py": [('"val", "paloma", "blimp"]', '"val", "top1", "paloma", "blimp"]')]},
                      ["evaluation.metrics=[val,top1]"]),
    "a measure": ({"instruments/measures.py": [
        ("\nSINGLE: dict", "\ndef nuclear_over_spectral(matrix: Matrix) -> float:\n    return "
                           "(matrix.spectrum.sum() / matrix.spectrum.max()).item()\n\n\nSINGLE: dict"),
        ('"norm_inf": ', '"nuclear_over_spectral": Measure(nuclear_over_spectral, "nuclear over spectral"),\n'
                         '    "norm_inf": ')]}, []),
}
IN_TURN = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    print("$", *words, flush=True)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        print(f"-> {end.code}", flush=True)
"""


def edited(folder, edits):
    """A copy of the project with some edits made in it."""
    for path in sources():
        target = folder / path.relative_to(lab.ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name, changes in edits.items():
        text = (folder / name).read_text()
        for old, new in changes:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        (folder / name).write_text(text)
    (folder / "in_turn.py").write_text(IN_TURN)
    return folder


def in_turn(folder, *commands):
    """What each of the commands prints in the copy, and how it ends; all of them in one process."""
    done = subprocess.run([sys.executable, "in_turn.py", json.dumps([[str(word) for word in words] for words in commands])],
                          cwd=folder, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [part.rpartition("-> ")[::2] for part in done.stdout.split("$ ")[1:]], done.stderr


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_works_through_every_command_or_is_refused_loudly(dataset, tmp_path, what):
    edits, words = EDITS[what]
    assert len([name for name in edits if not name.startswith("config/")]) <= 2
    copy, runs = edited(tmp_path / "copy", edits), tmp_path / "runs"
    configs = {name: lab.write_config(tmp_path / f"{name}.yaml", lab.tiny_tree(dataset, runs, name))
               for name in ("whole", "halved")}
    train = [["train.py", configs["whole"], "training.stop_at_step=12", *words],
             ["train.py", configs["halved"], "training.stop_at_step=7", *words],
             ["train.py", configs["halved"], "training.stop_at_step=12", *words]]
    others = [["sample.py", runs / "whole", "--prompt", "1", "--tokens", 4], ["evaluate.py", runs / "whole"],
              ["analyze.py", runs / "whole"], ["export.py", "hf", runs / "whole", tmp_path / "exported"]]
    told, errors = in_turn(copy, *train, *others)
    codes = [int(code) for _, code in told]
    no_llama = what in ("a new part in the model", "another formula")
    assert codes == [0] * 6 + [2 if no_llama else 0], told[-1][0] + errors[-3000:]
    assert "resumed at step 7" in told[2][0]
    losses = lab.metrics(runs / "whole")
    assert lab.metrics(runs / "halved") == losses and losses[12] < losses[1]
    state = [lab.Lab(runs, dataset).state(name, 12) for name in ("whole", "halved")]
    assert all((state[0]["model"][name] == tensor).all() for name, tensor in state[1]["model"].items())
    if no_llama:
        assert "the model is no Llama to other programs" in told[0][0]
        reason = "q_norm.weight" if "part" in what else "logits differ"
        assert reason in errors and len([line for line in errors.splitlines() if line.startswith("error: ")]) == 1
    if what == "an optimizer":
        assert any("momentum" in values for values in state[0]["optimizer"].values())
    if what == "a low-rank variant":
        assert not any(name.endswith("lora_A") for name in state[0]["optimizer"])
    if what == "an evaluation":
        assert "top1 accuracy" in told[4][0] and "eval/top1_accuracy" in (runs / "whole/metrics.jsonl").read_text()
    if what == "a measure":
        assert "nuclear_over_spectral" in (runs / "whole/analysis/metrics.csv").read_text()


def test_a_run_of_unedited_code_says_so_when_edited_code_reads_it(dataset, tmp_path):
    """And a layer whose merge would not be what its forward adds is refused before anything is trained."""
    plain, runs = edited(tmp_path / "plain", {}), tmp_path / "runs"
    config = lab.write_config(tmp_path / "run.yaml", lab.tiny_tree(dataset, runs))
    told, errors = in_turn(plain, ["train.py", config, "training.stop_at_step=3"])
    assert told[0][1].strip() == "0" and "no Llama" not in told[0][0]
    gelu = edited(tmp_path / "gelu", EDITS["another formula"][0])
    told, errors = in_turn(gelu, ["sample.py", runs / "run", "--prompt", "1", "--tokens", 2])
    assert "model.py as it is now computes something else" in told[0][0]
    bent = edited(tmp_path / "bent", {"relora.py": [("return update if self.weight is None else F.linear(x, self.weight)",
                                                     "return F.linear(x, self.weight) + update.tanh() -  update"),
                                                    ("if self.fast and", "if False and")]})
    told, errors = in_turn(bent, ["train.py", config, "checkpointing.run_name=bent"])
    assert told[0][1].strip() == "2" and "forward and effective_weight() differ" in errors and not (runs / "bent").exists()


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/faults.md"])
def test_every_test_that_a_page_names_is_there(page):
    tests = {path.name: path.read_text() for path in (lab.ROOT / "tests").rglob("test_*.py")}
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(tests.values()), re.MULTILINE))
    named = re.findall(r"`(test_\w+(?:\.py)?)`", (lab.ROOT / page).read_text())
    assert len(named) > 10 and set(named) <= defined | tests.keys(), set(named) - defined - tests.keys()
