"""Studies: what is run, what is refused, a study killed on the way, and the verdict on numbers made up."""

import csv
import json
import math
import os
import signal
import time

import pytest
import yaml
from scipy import stats

import lab
import study
from config import ConfigError
from config.study import Job, Plan
from instruments import verdict
from runtime.locks import RunLock

ARMS = {"full-rank": ["model.relora=null", "training.optimization.lr_scheduler=cosine_with_warmup"], "relora": []}
SMALL = {"base": "base.yaml", "rates": [5e-3, 1e-2], "seeds": [1, 2], "extend": 0, "selection_rows": 4, "arms": ARMS}


def write(folder, **changes):
    tree = lab.tiny_tree(folder / "corpora", folder / "unused")
    tree["checkpointing"] |= {"learning_dynamics": None, "run_name": None, "save_every_n_steps": 5}
    tree["training"]["stop_at_step"] = 10
    lab.write_config(folder / "base.yaml", tree)
    return lab.write_config(folder / "small.yaml", {key: value for key, value in (SMALL | changes).items() if value is not None})


def made_up(plan, losses):
    """{job: result} of runs that were never made: {(arm, rate, seed): loss}; seed 0 is the sweep's."""
    return {Job(arm, rate, seed, seed != 0): verdict.Result(arm, rate, seed, seed != 0, loss, loss, plan.out, 1000, 10, 1.0, 5)
            for (arm, rate, seed), loss in losses.items()}


# ---- what is to be run -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, complaint", [
    ({"arms": None}, "arms: names none"), ({"arms": {"../x": []}}, "cannot name a folder"),
    ({"arms": {"a": ["training.seed=3"]}}, "sets training.seed"), ({"arms": {"a": ["model.relora.rr=3"]}}, "did you mean model.relora.r"),
    ({"arms": {"a": {"rate": [1]}}}, "arms.a.rate: unknown key"), ({"seeds": []}, "seeds"), ({"seeds": [1, 1]}, "hold one twice"),
    ({"rates": [0.0]}, "above 0"), ({"sweep_seeds": [2]}, "among seeds too"), ({"reference": "lora"}, "no arm; there are full-rank"),
    ({"arms": {"a": {"against": "b"}}}, "arms.a.against: 'b' is no arm"),
    ({"vary": "rows"}, "seed, data"), ({"base": "nowhere.yaml"}, "cannot be read"), ({"bass": "x"}, "did you mean base"),
    ({"overrides": ["evaluation.metrics=null"]}, "must hold val"), ({"seed": 4}, "did you mean seeds")])
def test_a_study_that_cannot_be_run_is_refused_before_its_first_run(tmp_path, changes, complaint):
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError) as error:
        Plan(path)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_a_missing_study_names_those_that_there_are():
    with pytest.raises(ConfigError, match="smoke.yaml"):
        Plan(lab.ROOT / "config/studies/smook.yaml")


@pytest.mark.parametrize("path", sorted((lab.ROOT / "config/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_that_come_along_can_be_run(path):
    if path.stem != "base":
        assert len(Plan(path).arms) >= 2


def test_later_overrides_take_the_place_of_earlier_ones(tmp_path):
    plan = Plan(write(tmp_path, overrides=["training.stop_at_step=7"], arms={"a": ["training.stop_at_step=9"], "b": []}))
    assert [plan.config(Job(arm, 0.01, 1, True)).training.stop_at_step for arm in "ab"] == [9, 7]


def test_seeds_begin_at_rows_of_their_own_where_data_varies(tmp_path):
    plan = Plan(write(tmp_path, vary="data"))
    first = [plan.config(Job("relora", 0.01, seed, True)).data.dataloader.first_row for seed in (0, 1, 2)]
    assert first == [0, 80, 160]  # 10 steps of 8 rows each
    shorter = Plan(write(tmp_path, vary="data", arms=ARMS | {"short": ["training.stop_at_step=4"]}))
    assert [shorter.config(Job(arm, 0.01, 2, True)).data.dataloader.first_row for arm in shorter.arms] == [160] * 3  # paired
    assert Plan(write(tmp_path)).config(Job("relora", 0.01, 2, True)).data.dataloader.first_row == 0


def test_a_sweep_goes_on_beyond_its_edges_and_stops_where_it_is_told(tmp_path):
    plan = Plan(write(tmp_path, rates=[1.0, 2.0], extend=2, arms={"a": []}))
    losses = {("a", 1.0, 0): 3.0, ("a", 2.0, 0): 2.0}
    assert study.sweep_of(plan, "a", made_up(plan, losses)) == ([Job("a", 4.0, 0, False)], None)
    losses |= {("a", 4.0, 0): 1.5}
    assert study.sweep_of(plan, "a", made_up(plan, losses)) == ([Job("a", 8.0, 0, False)], None)
    assert study.sweep_of(plan, "a", made_up(plan, losses | {("a", 8.0, 0): 1.4})) == ([], 8.0)  # twice beyond is as far as it goes
    assert study.sweep_of(plan, "a", made_up(plan, losses | {("a", 8.0, 0): math.inf})) == ([], 4.0)  # diverged
    below = {("a", 1.0, 0): 2.0, ("a", 2.0, 0): 3.0}
    assert study.sweep_of(plan, "a", made_up(plan, below)) == ([Job("a", 0.5, 0, False)], None)


def test_what_is_wanted_follows_from_what_is_there(tmp_path):
    plan = Plan(write(tmp_path))
    jobs, later = study.wanted(plan, {})
    assert len(jobs) == 4 and later == 4 and not any(job.final for job in jobs)
    found = made_up(plan, {("relora", 5e-3, 0): 1.0, ("relora", 1e-2, 0): 2.0, ("relora", 5e-3, 2): 1.1})
    jobs, later = study.wanted(plan, found)
    assert [job for job in jobs if job.arm == "relora"] == [Job("relora", 5e-3, 1, True)] and later == 2


def test_where_there_is_one_rate_there_is_no_sweep(tmp_path):
    plan = Plan(write(tmp_path, rates=[1e-2]))
    assert study.sweep_of(plan, "relora", {}) == ([], 1e-2)
    assert study.wanted(plan, {}) == ([Job(arm, 1e-2, seed, True) for arm in ARMS for seed in (1, 2)], 0)


# ---- the verdict ---------------------------------------------------------------------------------------------------------

def test_the_table_is_what_scipy_says(tmp_path):
    plan = Plan(write(tmp_path, seeds=[1, 2, 3], rates=[1.0, 2.0, 4.0]))
    one, other = [1.50, 1.52, 1.47], [1.60, 1.61, 1.59]
    losses = {("full-rank", 2.0, seed): loss for seed, loss in zip((1, 2, 3), one)}
    losses |= {("relora", 4.0, seed): loss for seed, loss in zip((1, 2, 3), other)}
    losses |= {(arm, rate, 0): abs(rate - best) + 1 for arm, best in (("full-rank", 2.0), ("relora", 4.0)) for rate in (1.0, 2.0, 4.0)}
    results = list(made_up(plan, losses).values())
    text = verdict.write("made-up", dict.fromkeys(ARMS, "full-rank"), {"full-rank": 2.0, "relora": 4.0}, results, tmp_path / "out")
    rows = {row["arm"]: row for row in csv.DictReader(open(tmp_path / "out/table.csv"))}
    test = stats.ttest_rel(other, one)
    assert float(rows["relora"]["difference"]) == pytest.approx(sum(other) / 3 - sum(one) / 3)
    assert float(rows["relora"]["p"]) == pytest.approx(test.pvalue)
    assert float(rows["relora"]["difference_low"]) == pytest.approx(test.confidence_interval().low)
    assert rows["full-rank"]["difference"] == "" and rows["full-rank"]["at_edge"] == "False"
    assert rows["relora"]["at_edge"] == "True" and "best rate of relora is the last" in text
    tree = json.loads((tmp_path / "out/study.json").read_text())
    assert [row["arm"] for row in tree["table"]] == ["full-rank", "relora"] and len(tree["runs"]) == 12
    page = (tmp_path / "out/study.html").read_text()
    assert "full-rank" in page and "src=\"data:image/png" in page and "http" not in page.replace("http-equiv", "")


def test_an_arm_is_compared_with_the_one_it_names(tmp_path):
    arms = {"a": [], "b": [], "c": {"against": "b"}}
    plan = Plan(write(tmp_path, arms=arms))
    losses = {(arm, 1e-2, seed): place + seed for place, arm in enumerate(arms) for seed in (1, 2)}
    verdict.write("made-up", {arm: plan.against(arm) for arm in arms}, dict.fromkeys(arms, 1e-2), list(made_up(plan, losses).values()),
                  tmp_path / "out")
    rows = {row["arm"]: row for row in csv.DictReader(open(tmp_path / "out/table.csv"))}
    assert [(row["against"], row["difference"]) for row in rows.values()] == [("", ""), ("a", "1.0"), ("b", "1.0")]


def test_an_arm_that_diverged_is_told_and_compared_with_nothing(tmp_path):
    plan = Plan(write(tmp_path))
    losses = {(arm, 1e-2, seed): math.inf if arm == "relora" else 1.0 + seed for arm in ARMS for seed in (1, 2)}
    results = list(made_up(plan, losses).values())
    text = verdict.write("made-up", dict.fromkeys(ARMS, "full-rank"), dict.fromkeys(ARMS, 1e-2), results, tmp_path / "out")
    assert "inf" in next(line for line in text.splitlines() if line.startswith("relora"))


# ---- a study killed on the way -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    lab.make_dataset(folder / "corpora")
    return write(folder, seeds=[1], arms={"relora": []})


def table_of(folder):
    measured = ("seconds", "peak_bytes")
    return [{key: value for key, value in row.items() if key not in measured}
            for row in json.loads((folder / "study.json").read_text())["table"]]


def test_of_two_that_run_one_study_the_second_is_refused(tmp_path):
    plan = Plan(write(tmp_path), tmp_path / "out")
    plan.out.mkdir()
    other = RunLock(plan.out)
    other.acquire()
    with pytest.raises(ConfigError, match=rf"^--out: .*out is in use by process {os.getpid()} on .*, or choose another --out$"):
        study.run_all(plan, 1)
    other.release()
    assert list(plan.out.iterdir()) == []


@pytest.mark.timeout(600)
def test_a_study_killed_twice_ends_with_the_table_of_one_that_was_not(small):
    folder = small.parent
    out = lab.run("study.py", small, "--jobs", 2, "--out", folder / "whole", timeout=280)
    assert "3 runs made, 0 or more to come" in out and "open " in out
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = lab.start("study.py", small, "--jobs", 2, "--out", folder / "killed")
        made = len(list((folder / "killed").glob("*/*/study.json")))
        lab.wait_until(lambda: len(list((folder / "killed").glob("*/*/study.json"))) >= made + 1, timeout=120, pause=0.05)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == (75 if number == signal.SIGTERM else -number)
        time.sleep(1)  # until the runs, told by the system that their parent is gone, have let go of their folders
    lab.run("study.py", small, "--jobs", 2, "--out", folder / "killed", timeout=280)
    assert table_of(folder / "killed") == table_of(folder / "whole")
    row = table_of(folder / "whole")[0]
    assert row["tokens"] == 10 * 8 * 16 and row["trainable"] > 0 and row["loss"] > 0


def test_the_runs_of_another_study_are_not_taken_for_its_own(small):
    folder = small.parent
    lab.run("study.py", small, "--jobs", 2, "--out", folder / "whole", timeout=280)  # at once, where the test before has made it
    changed = small.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(yaml.safe_load(small.read_text()) | {"overrides": ["training.stop_at_step=8"]}))
    assert "of another study" in lab.call("study.py", changed, "--report", "--out", folder / "whole", code=2)
    assert "relora" in lab.call("study.py", small, "--report", "--out", folder / "whole")
