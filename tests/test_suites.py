"""Suites of scales: arms with a base and a rate of their own, on the same rows, and their one figure at equal steps."""

import csv
import json
import math

import numpy as np
import pytest
import torch
import yaml

import lab
from config import ConfigError, load_config
from config.study import Job, Plan
from instruments import scales, verdict
from instruments.snapshots import Snapshots

pytestmark = pytest.mark.timeout(600)  # seconds, where it waits for a busy machine
SUITES = sorted((lab.ROOT / "config/suites").glob("*.yaml"))


def write(folder, **changes):
    """A suite of two widths with a base file each."""
    for name, width, rate in (("narrow", 16, 2e-2), ("wide", 32, 1e-2)):
        tree = lab.tiny_tree(folder / "corpora", folder / "unused", relora=False)
        tree["checkpointing"] |= {"run_name": None, "save_every_n_steps": 4}
        tree["checkpointing"]["learning_dynamics"] |= {"steps": "log", "max_rows": 12}
        tree["training"]["stop_at_step"] = 8
        tree["training"]["optimization"]["lr"] = rate
        tree["model"] |= {"d_model": width, "activation_hidden_dim": 2 * width}
        lab.write_config(folder / f"{name}.yaml", tree)
    suite = {"seeds": [1], "selection_rows": 4, "final_rows": 6,
             "arms": {name: {"base": f"{name}.yaml"} for name in ("narrow", "wide")}}
    return lab.write_config(folder / "suite.yaml", {key: value for key, value in (suite | changes).items() if value is not None})


# ---- what is to be run -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_arms_of_a_suite_share_all_but_their_shape_and_rate(path):
    plan = Plan(path)
    jobs = {arm: Job(arm, plan.rates(arm)[0], plan.study.seeds[0], True) for arm in plan.arms}
    configs = {arm: plan.config(job) for arm, job in jobs.items()}
    assert list(configs) == ["tiny", "small", "medium", "large"] and all(len(plan.rates(arm)) == 1 for arm in plan.arms)
    first = configs["tiny"]
    for cfg in configs.values():
        assert (cfg.data, cfg.evaluation, cfg.last_step) == (first.data, first.evaluation, first.last_step)
        assert cfg.model.max_seq_len == first.model.max_seq_len and cfg.model.relora is None
        assert [step for step in range(cfg.last_step + 1) if cfg.due(step).snapshot] == \
            [step for step in range(cfg.last_step + 1) if first.due(step).snapshot]
    widths = [cfg.model.d_model for cfg in configs.values()]
    assert widths == sorted(set(widths))


def test_the_pico_suite_is_made_of_the_presets_and_their_rates():
    plan = Plan(lab.ROOT / "config/suites/pico.yaml")
    for arm in plan.arms:
        preset = load_config(lab.ROOT / f"config/pico-decoder-{arm}.yaml")
        made = plan.config(Job(arm, plan.rates(arm)[0], 42, True))
        assert made.model == preset.model and plan.rates(arm) == [preset.training.optimization.lr]
        assert made.data.dataloader == preset.data.dataloader


def test_a_base_and_a_rate_come_from_the_arm_the_study_or_the_base_in_this_order(tmp_path):
    arms = {"own": {"base": "wide.yaml", "rates": [3e-2]}, "studys": [], "bases": {"base": "wide.yaml"}}
    plan = Plan(write(tmp_path, base="narrow.yaml", arms=arms))
    assert [plan.rates(arm) for arm in arms] == [[3e-2], [2e-2], [1e-2]]
    assert [plan.config(Job(arm, 1e-2, 1, True)).model.d_model for arm in arms] == [32, 16, 32]
    assert Plan(write(tmp_path, rates=[5e-3], arms={"a": {"base": "wide.yaml"}})).rates("a") == [5e-3]


@pytest.mark.parametrize("changes, complaint", [
    ({"arms": {"a": {"base": "wide.yaml"}, "b": []}}, "arms.b has none of its own"),
    ({"arms": {"a": {"base": "nowhere.yaml"}}}, "nowhere.yaml: cannot be read"),
    ({"rates": []}, "are empty"), ({"final_rows": 0}, "final_rows: 0 must be above 0")])
def test_a_suite_that_cannot_be_run_is_refused_in_one_line(tmp_path, changes, complaint):
    with pytest.raises(ConfigError) as error:
        Plan(write(tmp_path, **changes))
    assert complaint in str(error.value) and "\n" not in str(error.value)


# ---- a suite that is run ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    lab.make_dataset(folder / "corpora")
    path = write(folder)
    lab.run("study.py", path, "--jobs", 2, "--out", folder / "out", timeout=500)
    return folder / "out"


def runs_of(suite):
    return {path.parent.name: Snapshots(path) for path in suite.glob("*/final-*")}


def rows_of(suite, data, metric):
    """{arm: {step: mean}} of scales.csv."""
    found = {}
    for row in csv.DictReader(open(suite / "scales.csv")):
        if (row["data"], row["metric"]) == (data, metric):
            found.setdefault(row["arm"], {})[int(row["step"])] = float(row["mean"])
    return found


def test_all_arms_had_the_same_rows_at_the_same_steps(suite):
    narrow, wide = (runs_of(suite)[arm] for arm in ("narrow", "wide"))
    assert list(narrow.folders) == list(wide.folders) == [0, 1, 2, 4, 8]
    for step in narrow.folders:
        for split in ("train", "val"):
            assert torch.equal(narrow.input_ids(step, split), wide.input_ids(step, split))
    assert "All had the same rows before them at steps 0 and 8." in (suite / "study.html").read_text()


def test_the_measures_are_those_of_the_snapshots_by_numpy(suite):
    def per(matrix):
        p = np.linalg.svd(matrix.numpy().astype(np.float64), compute_uv=False)
        p = p[p > 0] / p.sum()
        return math.exp(-(p * np.log(p)).sum()) / min(matrix.shape)
    for arm, run in runs_of(suite).items():
        _, start = run.load(0, "val", "weights")
        for step in run.folders:
            _, weights = run.load(step, "val", "weights")
            assert rows_of(suite, "weights", "per")[arm][step] == pytest.approx(np.mean([*map(per, weights.values())]), rel=1e-5)
        changes = [weights[name] - start[name] for name in weights]
        expected = np.mean([per(change) * min(change.shape) for change in changes])
        assert rows_of(suite, scales.UPDATE, "effective_rank")[arm][8] == pytest.approx(expected, rel=1e-3)


def test_a_runs_activations_are_like_those_of_its_own_last_step_and_of_no_other_runs(suite):
    for metric in ("cka", "cka_debiased"):
        found = rows_of(suite, "activations", metric)
        assert all(found[arm][8] == pytest.approx(1) and found[arm][0] < 0.999 for arm in ("narrow", "wide"))
    x, y = (runs_of(suite)["wide"].load(step, "val", "activations")[1] for step in (2, 8))
    def cka(name):
        a, b = (each[name].double() - each[name].double().mean(0) for each in (x, y))
        return ((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())).item()
    assert rows_of(suite, "activations", "cka")["wide"][2] == pytest.approx(np.mean([cka(name) for name in x]), rel=1e-5)


def test_there_is_one_figure_a_line_an_arm_and_what_counts_is_on_the_rows_asked_for(suite):
    assert (suite / "figures/scales.png").stat().st_size > 20_000
    assert not list(suite.glob("figures/update_rank*"))
    tree = json.loads((suite / "study.json").read_text())
    assert [row["arm"] for row in tree["table"]] == ["narrow", "wide"] and all(row["loss"] > 0 for row in tree["table"])
    for arm in ("narrow", "wide"):
        final = json.loads(next((suite / arm).glob("*/eval_results/final.json")).read_text())
        assert final["val"]["rows"] == 6


def test_runs_with_other_rows_or_without_snapshots_are_told_apart(suite, tmp_path):
    found = scales.measured({arm: [run.path] for arm, run in runs_of(suite).items()} | {"none": [tmp_path]}, {})
    assert list(found) == ["narrow", "wide"] and scales.shared_steps(found) == [0, 1, 2, 4, 8]
    other = Snapshots(found["wide"].runs[0].path)
    other.input_ids = lambda step, split: torch.zeros(1, 1, dtype=torch.int64)
    assert "different rows before them at step 0" in scales.same_rows(found | {"wide": found["wide"]._replace(runs=[other])})
    del other.folders[4]
    assert scales.shared_steps(found | {"wide": found["wide"]._replace(runs=[other])}) == [0, 1, 2, 8]


def test_a_run_that_diverged_and_an_arm_without_snapshots_leave_the_others_their_figure(suite, tmp_path):
    results = [verdict.Result(arm, 1e-2, 1, True, loss, loss, runs_of(suite)[run].path if run else tmp_path, 1, 8, 1.0, 5)
               for arm, loss, run in (("a", 1.0, "narrow"), ("b", math.inf, "wide"), ("c", 2.0, None))]
    verdict.write("made-up", dict.fromkeys("abc", "a"), dict.fromkeys("abc", 1e-2), results, tmp_path / "out")
    arms = {row["arm"] for row in csv.DictReader(open(tmp_path / "out/scales.csv"))}
    assert arms == {"a"} and "src=" in (tmp_path / "out/study.html").read_text().split("At equal steps")[-1]


def test_the_commands_that_a_suite_names_are_those_of_its_comment():
    text = (lab.ROOT / "config/suites/pico.yaml").read_text()
    overrides = yaml.safe_load(text)["overrides"]
    folder = next(word.partition("=")[2] for word in overrides if word.startswith("data.dataset.name"))
    assert f"--out {folder}" in text and f"mv corpora/held-out/train {folder}/val" in text
