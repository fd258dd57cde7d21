"""The course and the glossary: every function that they name is there, and what they show is small and can be typed."""

import ast
import codeop
import functools
import re
import shlex

import pytest

import lab
from instruments.similarity import MEASURES

COURSE = lab.ROOT / "docs/course"
LESSONS = sorted(COURSE.glob("[1-9]*.md"))
PAGES = [*LESSONS, COURSE / "README.md", lab.ROOT / "docs/glossary.md"]
ROOMS = ("config", "runtime", "hub", "instruments")
SOURCES = [*lab.ROOT.glob("*.py"), *(path for room in ROOMS for path in (lab.ROOT / room).glob("*.py"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
FIGURE = re.compile(r"!\[.*?\]\((.*?)\)")


@functools.cache
def definitions():
    """{name, and Class.name: the files that define it} of functions, classes and methods of the project."""
    found = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.setdefault(node.name, set()).add(path.relative_to(lab.ROOT).as_posix())
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    names = [inner.name] if isinstance(inner, ast.FunctionDef) else [inner.target.id] if isinstance(
                        inner, ast.AnnAssign) else []
                    for name in names:
                        found.setdefault(f"{node.name}.{name}", set()).add(path.relative_to(lab.ROOT).as_posix())
    return found


def lines_to_open(page):
    """(file, or None; name) of what the section "Lines to open" of a lesson names in backticks."""
    section = page.read_text().split("## Lines to open")[1].split("\n## ")[0]
    return re.findall(r"`([\w./]+)`", section)


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)
def test_the_lines_to_open_are_there(page):
    known, names = definitions(), lines_to_open(page)
    assert len(names) >= 4
    for name in names:
        is_file = name.endswith((".py", ".yaml"))
        assert (lab.ROOT / name).exists() if is_file else name in known, f"{page.name}: {name}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.exists()], ids=lambda page: page.stem)
def test_links_and_figures_are_there_and_small(page):
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
    for figure in FIGURE.findall(text):
        assert (page.parent / figure).stat().st_size < 60_000, figure


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)
def test_blocks_can_be_typed_into_a_plain_interpreter(page):
    """No blank line inside what is indented, one behind it: an interpreter before 3.13 takes what is pasted line by line."""
    for language, block in BLOCK.findall(page.read_text()):
        if language != "python":
            continue
        waiting = []
        for line in [*block.splitlines(), ""]:
            waiting.append(line)
            if codeop.compile_command("\n".join(waiting), symbol="single") is not None:
                waiting = []
        assert not waiting, "\n".join(waiting)


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)
def test_blocks_and_figures_fit_a_page(page):
    """Code within 100 columns; figures drawn 5 inches wide, so that their letters are read on 400 pixels too."""
    text = page.read_text()
    lines = [line for language, block in BLOCK.findall(text) for line in block.splitlines() if language != "text"]
    assert [line for line in lines if len(line) > 100] == []
    drawn = re.findall(r"figsize=\((\S+), ", text)
    assert set(drawn) <= {"5"} and len(drawn) == len(FIGURE.findall(text)) == text.count(".savefig(")
    for figure in FIGURE.findall(text):
        assert int.from_bytes((page.parent / figure).read_bytes()[16:20], "big") == 500, figure  # a PNG's width


def test_the_teachers_list_of_what_breaks_has_the_lessons_figures():
    section = (COURSE / "README.md").read_text().split("## What they break")[1].split("\n## ")[0]
    broken = re.findall(r"(?m)^- \*\*(\d).* What comes: (.*)$", section)
    assert {lesson for lesson, _ in broken} == {page.stem[0] for page in LESSONS}
    for lesson, comes in broken:
        shown = "\n".join(body for kind, body in BLOCK.findall(LESSONS[int(lesson) - 1].read_text()) if kind == "text")
        numbers = re.findall(r"\d+\.\d+|\de-\d+|\d\de[+-]\d+|\d{2,}%?", comes)
        assert numbers and [number for number in numbers if number not in shown] == [], lesson


def test_the_glossary_names_functions_that_are_there():
    entries = [line.split(" | ") for line in (lab.ROOT / "docs/glossary.md").read_text().splitlines() if line.startswith("| ")]
    entries = [entry for entry in entries if entry[0] not in ("| word", "| ---")]
    assert len(entries) > 50 and len({entry[0] for entry in entries}) == len(entries)
    for word, _, where in entries:
        names = re.findall(r"`([\w.]+)`", where)
        assert names and all(name in definitions() for name in names), f"{word}: {names}"


COMPUTING = set("CPU CPUs CSV GB GPU GPUs MB MPS PNG PaLM PyTorch SLURM SVG WSL YAML JSON SHA".split())  # no words of the field


def help_texts():
    """What README and --help say, without code: docstrings and the help of arguments."""
    yield re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", (lab.ROOT / "README.md").read_text(), flags=re.S)
    for path in lab.ROOT.glob("*.py"):
        tree = ast.parse(path.read_text())
        yield ast.get_docstring(tree) or ""
        helps = [keyword.value for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords
                 if keyword.arg == "help"]
        yield from (node.value for one in helps for node in ast.walk(one) if isinstance(node, ast.Constant))


def test_readme_and_help_use_no_term_that_the_glossary_has_not():
    """Terms are words with a capital inside; those in capitals alone may also be a placeholder that the commands take."""
    glossary = (lab.ROOT / "docs/glossary.md").read_text().lower()
    known = COMPUTING | {name for name in definitions() if name[0].isupper()} | set("NAME OUT RUN FILE STUDY SPLIT NNNNN".split())
    known |= {"OPTIMIZERS", "SCHEDULES", "ARM"}
    found = {word for text in help_texts() for word in re.findall(r"\b[A-Z][A-Za-z]*[A-Z][A-Za-z0-9]*\b", text)}
    assert len(found) > 20 and sorted(word for word in found - known if word.lower() not in glossary) == []


def test_the_glossary_has_every_measure():
    """By its label in the figures."""
    words = (lab.ROOT / "docs/glossary.md").read_text().lower()
    for name, measure in MEASURES.items():
        assert measure.label.lower() in words or name.removeprefix("norm_") in words or name == "norm_inf", name


def test_the_readmes_commands_run(tmp_path):
    """On text of one's own and after a run, as they are typed, but shorter; without the Hub, and what test_analyze.py draws."""
    sections = dict(re.findall(r"(?ms)^#+ (Your own text|After a run).*?^```\n(.*?)^```", (lab.ROOT / "README.md").read_text()))
    (tmp_path / "book.txt").write_text("\n".join(path.read_text() for path in PAGES))
    short, few = "training.max_steps=2", ["data.dataloader.batch_size=4", "checkpointing.learning_dynamics.max_rows=16",
                                          f"checkpointing.runs_dir={tmp_path}/runs"]
    done = []

    def type_in(section, **more):
        for line in section.replace("\\\n", " ").splitlines():
            command, *words = shlex.split(line, comments=True)[1:]
            words = [re.sub(r"(^|=)(book.txt|corpora/|runs/|OUT)", rf"\1{tmp_path}/\2", word.replace("..40", "..9")) for word in words]
            if not {"verify", "import"} & set(words) and (command not in ("bench.py", "analyze.py") or "path" in words):
                lab.forked(command, *words, *more.get(command, []))
                done.append(command)

    type_in(sections["Your own text"], **{"train.py": [short, *few], "sample.py": ["--tokens", 4]})
    demo = [lab.ROOT / "config/demo.yaml", f"data.dataset.name={tmp_path}/corpora/book", "training.fabric.num_devices=1", *few]
    lab.forked("train.py", *demo, "checkpointing.run_name=demo", "training.max_steps=9", "checkpointing.save_every_n_steps=9")
    for name, more in {"full": ["model.relora=null", "training.optimization.lr_scheduler=cosine_with_warmup"], "relora": []}.items():
        lab.forked("train.py", *demo, f"checkpointing.run_name={name}", short, *more)
    type_in(sections["After a run"], **{"sample.py": ["--tokens", 4], "analyze.py": ["--out", tmp_path / "path"]})
    assert len(done) == 8 and (tmp_path / "OUT/model.safetensors").exists()
    assert (tmp_path / "runs/demo/checkpoints/step_7/manifest.json").exists()
