"""The analysis of real runs: what it measures, keeps, draws and refuses."""

import csv
import json
import re
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from matplotlib import cbook

import analyze
import lab
from hub.llama import load_plain
from instruments import landscape, measuring, panels, plots, report
from instruments.record import training_record
from instruments.similarity import MEASURES
from instruments.snapshots import Snapshots
from model import PicoDecoder

DEMO = """
analysis_name: demo
metrics:
  - {metric_name: cka, target_checkpoint: 20, data_split: val, components: [{component_name: ov_circuit, data_type: activations,
     layer_suffixes: {output_layer: attention.o_proj, value_layer: attention.v_proj}, layers: [0, 1]}]}
  - {metric_name: pwcca, target_checkpoint: 20, data_split: val, components: [{component_name: ov_circuit, data_type: activations,
     layer_suffixes: {output_layer: attention.o_proj, value_layer: attention.v_proj}, layers: [0, 1]}]}
  - {metric_name: per, data_split: train, components: [{component_name: simple, data_type: gradients,
     layer_suffixes: swiglu.w_2, layers: [0, 1]}]}
  - {metric_name: norm, data_split: val, norm_type: nuclear, components: [{component_name: ov_circuit, data_type: weights,
     layer_suffixes: {output_layer: attention.o_proj, value_layer: attention.v_proj}, layers: [1]}]}
steps: {start: 0, end: 20, step: 10}
monitoring: {output_dir: analysis_results, save_to_wandb: false}
"""


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """A ReLoRA run of three merges and a full-rank run."""
    here = tmp_path_factory.mktemp("analyze")
    for name in ("relora", "full"):
        path = lab.write_config(here / f"{name}.yaml", lab.tiny_tree(dataset, here, name, relora=name == "relora"))
        lab.call("train.py", path, "checkpointing.learning_dynamics.optimizer_states=true")
    with open(here / "relora/metrics.jsonl", "a") as file:
        file.write('[]\n{"step": 21, "tr')  # what is no object, and as a run that is still writing leaves it
    lab.call("analyze.py", here / "relora")
    return here


def rows(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} in metrics.json")
    return json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)


def value(table, **wanted):
    found = [row for row in table if all(row[key] == v for key, v in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]["value"]


def snapshot(run, step, name, kind="weights", split="val"):
    return torch.load(run / f"checkpoints/step_{step}/learning_dynamics/{split}_{kind}.pt")[name].numpy().astype(np.float64)


def test_ranks_are_those_of_the_snapshots(runs):
    table, layer = rows(runs / "relora/analysis"), "layers.1.swiglu.w_2"
    for step in (5, 10, 20):
        start, now = snapshot(runs / "relora", 0, layer), snapshot(runs / "relora", step, layer)
        s = np.linalg.svd(now - start, compute_uv=False)
        p = s / s.sum()
        expected = np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum())
        where = {"step": step, "data": "updates since the start", "component": layer}
        assert value(table, **where, metric="effective_rank") == pytest.approx(expected, rel=1e-6)
        assert value(table, **where, metric="numerical_rank") == min(4 * step // 5, 32), "rank 4 a cycle"


def test_updates_since_the_last_snapshot_are_of_one_cycle(runs):
    table = rows(runs / "relora/analysis")
    for step in (10, 15, 20):
        assert value(table, step=step, data="updates since the last snapshot", component="layers.0.attention.o_proj",
                     metric="numerical_rank") == 4


def test_the_circuit_of_a_head_shares_the_values_of_its_group(runs):
    table = rows(runs / "relora/analysis")
    v, o = (snapshot(runs / "relora", 20, f"layers.0.attention.{n}_proj") for n in "vo")
    for head in range(4):  # 4 heads of size 8 in 2 groups
        matrix = o[:, head * 8:(head + 1) * 8] @ v[head // 2 * 8:(head // 2 + 1) * 8]
        assert value(table, step=20, data="weights", component=f"layers.0.ov_circuit.heads.{head}", metric="norm_nuclear") == \
            pytest.approx(np.linalg.norm(matrix, "nuc"), rel=1e-5)


def test_circuits_side_by_side_and_their_gradients_are_those_of_the_product(runs, tmp_path):
    """Autograd's gradients of both factors, moved along by hand; of activations what the heads write, side by side."""
    (tmp_path / "asked.yaml").write_text("metrics:\n" + "".join(
        f"  - {{metric_name: norm, norm_type: nuclear, data_split: val, components: [{{component_name: ov_circuit, data_type: {data}, "
        f"layer_suffixes: {CIRCUIT}, layers: [1]}}]}}\n" for data in ("weights", "activations", "gradients")) + "steps: [15]\n")
    lab.call("analyze.py", runs / "relora", "--config", tmp_path / "asked.yaml", "--out", tmp_path / "out")
    table, layer = rows(tmp_path / "out"), "layers.1.attention"
    v, o = (snapshot(runs / "relora", 15, f"{layer}.{n}_proj") for n in "vo")
    gv, go = (snapshot(runs / "relora", 15, f"{layer}.{n}_proj", "gradients") for n in "vo")
    seen = snapshot(runs / "relora", 15, f"{layer}.v_proj", "activations")
    of = {"weights": [], "activations": [], "gradients": []}
    for head in range(4):  # of size 8, in 2 groups
        mine, shared = slice(head * 8, head * 8 + 8), slice(head // 2 * 8, head // 2 * 8 + 8)
        of["weights"].append(o[:, mine] @ v[shared])
        of["activations"].append(seen[:, shared] @ o[:, mine].T)
        step = 1e-6  # the circuit's change along both gradients, by a difference quotient
        ahead, back = ((o[:, mine] + t * go[:, mine]) @ (v[shared] + t * gv[shared]) for t in (step, -step))
        of["gradients"].append((ahead - back) / (2 * step))
    for data, heads in of.items():
        for head, matrix in enumerate(heads):
            assert value(table, data=data, component=f"layers.1.ov_circuit.heads.{head}", metric="norm_nuclear") == \
                pytest.approx(np.linalg.norm(matrix, "nuc"), rel=1e-5)
        assert value(table, data=data, component="layers.1.ov_circuit", metric="norm_nuclear") == \
            pytest.approx(np.linalg.norm(np.concatenate(heads, 1), "nuc"), rel=1e-5)


def test_what_is_undefined_is_null_with_a_reason(runs):
    undefined = [row for row in rows(runs / "relora/analysis") if row["value"] is None]
    assert undefined and all(row["reason"] for row in undefined)
    assert any("too few" in row["reason"] for row in undefined if row["metric"] == "pwcca")


def test_a_second_call_measures_only_new_steps(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write_run", lambda *words: "no page")  # which takes seconds to draw
    def cached():
        return {p.name: p.stat().st_mtime_ns for p in (run / "analysis/cache").iterdir()}
    run, last = tmp_path / "relora", tmp_path / "step_20"
    shutil.copytree(runs / "relora", run, ignore=shutil.ignore_patterns("analysis"))
    shutil.move(run / "checkpoints/step_20", last)
    lab.call("analyze.py", run)
    before = cached()
    shutil.move(last, run / "checkpoints")
    lab.call("analyze.py", run)
    after = cached()
    assert before.items() <= after.items()
    new = Counter(name.split("-")[0] for name in after.keys() - before.keys())
    # of older steps only their similarities to the last one, which is another one now
    assert new == {"step_20": len(analyze.DEFAULT)} | {f"step_{step}": 2 for step in (0, 5, 10, 15)}
    assert rows(run / "analysis") == rows(runs / "relora/analysis")
    lab.call("analyze.py", run)
    assert cached() == after
    next((run / "analysis/cache").iterdir()).write_text("[{")  # as a full disk might leave it
    lab.call("analyze.py", run)
    assert rows(run / "analysis") == rows(runs / "relora/analysis")


def test_several_processes_measure_the_same(runs, tmp_path, monkeypatch):
    """And give back the threads that there were."""
    (tmp_path / "demo.yaml").write_text(DEMO)
    requests, _ = analyze.read_requests(tmp_path / "demo.yaml")
    run, threads = Snapshots(runs / "relora"), torch.get_num_threads()
    alone = measuring.analyse(run, requests, [10, 20], tmp_path / "alone")
    monkeypatch.setattr(measuring, "LARGE", 0)
    torch.set_num_threads(2)
    try:
        together = measuring.analyse(run, requests, [10, 20], tmp_path / "together")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert together == alone and len(alone) > 50


def test_a_yaml_file_of_pico_analyze_runs_unchanged(runs, tmp_path):
    (tmp_path / "demo.yaml").write_text(DEMO)
    lab.call("analyze.py", runs / "relora", "--config", tmp_path / "demo.yaml", "--out", tmp_path / "out")
    table = rows(tmp_path / "out")
    assert {row["step"] for row in table} == {0, 10, 20}
    measured = {row["metric"] for row in table} - {"spectrum"}
    assert measured == {"cka", "pwcca", "per", "norm_nuclear"}
    assert value(table, step=20, other_step=20, metric="cka", component="layers.1.ov_circuit.heads.3") == pytest.approx(1)
    gradient = snapshot(runs / "relora", 10, "layers.0.swiglu.w_2", "gradients", "train")
    s = np.linalg.svd(gradient, compute_uv=False)
    p = s / s.sum()
    assert value(table, step=10, metric="per", component="layers.0.swiglu.w_2") == \
        pytest.approx(np.exp(-(p * np.log(p + 1e-300)).sum()) / len(s), rel=1e-5)


REQUEST = """
metrics:
  - {{metric_name: {metric}, data_split: {split}, norm_type: Frobenius, components: [{{component_name: {component},
     data_type: {data}, layer_suffixes: {suffixes}, layers: [{layer}]}}]}}
steps: [0, 15]
"""
FEW = """
metrics:
  - {metric_name: numerical_rank, components: [{component_name: simple, data_type: updates, layer_suffixes: swiglu.w_2}]}
  - {metric_name: effective_rank, components: [{component_name: simple, data_type: weights, layer_suffixes: swiglu.w_2}]}
  - {metric_name: cka, components: [{component_name: simple, data_type: activations, layer_suffixes: swiglu.w_2}]}
  - {metric_name: pwcca, components: [{component_name: simple, data_type: activations, layer_suffixes: swiglu.w_2}]}
"""
ASKED = {"metric": "norm", "split": "val", "component": "simple", "data": "weights", "suffixes": "swiglu.w_2", "layer": 1}
CIRCUIT = "{value_layer: attention.v_proj, output_layer: attention.o_proj}"


@pytest.mark.parametrize("asked, reason", [
    ({}, None), ({"split": "absent"}, None), ({"data": "gradients", "split": "absent"}, "holds no such gradients"),
    ({"layer": 11}, "holds no such weights"), ({"suffixes": "swiglu.w_9"}, "holds no such weights"),
    ({"data": "updates", "metric": "cka"}, "use activations"), ({"data": "updates", "layer": 11}, "no such layer"),
    ({"data": "gradients", "component": "ov_circuit", "suffixes": CIRCUIT, "layer": 11}, "holds no such gradients")], ids=str)
def test_what_a_file_asks_for_and_is_not_there_is_told_with_a_reason(runs, tmp_path, asked, reason):
    (tmp_path / "asked.yaml").write_text(REQUEST.format(**ASKED | asked))
    lab.call("analyze.py", runs / "relora", "--config", tmp_path / "asked.yaml", "--out", tmp_path / "out")
    table = [row for row in rows(tmp_path / "out") if row["metric"] != "spectrum"]
    assert [row["step"] for row in table] == [0, 15]
    if reason is None:
        expected = np.linalg.norm(snapshot(runs / "relora", 15, "layers.1.swiglu.w_2"))
        assert table[1]["value"] == pytest.approx(expected, rel=1e-5) and table[1]["metric"] == "norm_frobenius"
    else:
        assert all(row["value"] is None and reason in row["reason"] for row in table)


def test_updates_between_any_two_steps_and_within_a_cycle(dataset, tmp_path):
    """A snapshot every 3 steps, merges every 5: rank 4 a cycle, whatever lies between two snapshots."""
    runs = lab.Lab(tmp_path, dataset)
    runs.train("run", "checkpointing.save_every_n_steps=3", "training.max_steps=12",
               "checkpointing.learning_dynamics.eval_data=null", "evaluation.metrics=null")
    (tmp_path / "few.yaml").write_text(FEW)  # a page of everything takes seconds to draw
    lab.call("analyze.py", tmp_path / "run", "--config", tmp_path / "few.yaml", "--since", 6)
    table, layer = rows(tmp_path / "run/analysis"), "layers.0.swiglu.w_2"

    def ranks(data):
        return {row["step"]: row["value"] for row in table if row["data"] == data and row["component"] == layer
                and row["metric"] == "numerical_rank"}
    assert ranks("updates within the cycle") == {0: 0, 3: 4, 6: 0, 9: 4, 12: 4}  # update 6 is a restart's, at learning rate 0
    assert ranks("updates since the start") == {3: 4, 6: 4, 9: 8, 12: 12}
    assert ranks("updates since step 6") == {9: 4, 12: 8}
    found = [snapshot(tmp_path / "run", step, layer, split="train") for step in (6, 12)]
    assert value(table, step=12, other_step=6, data="updates since step 6", component=layer, metric="norm_spectral") == \
        pytest.approx(np.linalg.norm(found[1] - found[0], 2), rel=1e-5)
    assert {row["split"] for row in table if row["data"] == "weights"} == {"train"}, "there is no other"


def test_tables_and_the_page_are_complete_and_self_contained(runs):
    out = runs / "relora/analysis"
    with open(out / "metrics.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == sum(row["metric"] != "spectrum" for row in rows(out))
    page = (out / "report.html").read_text()
    names = {path.stem for path in (out / "figures").glob("*.png")}
    assert {"training", "spectra", "layers_by_steps", "updates_since_the_start_effective_rank", "weights_gini", "activations_cka",
            "updates_within_the_cycle_overlap_out", "gradients_condition_number"} <= names and not list(out.glob("*.png"))
    with open(out / "figures/weights_gini.csv", newline="") as file:
        drawn = [(row["line"], row["step"], float(row["gini"])) for row in csv.DictReader(file) if row["layers"] == "swiglu.w_2"]
    table = rows(out)
    assert drawn == [(f"layer {n}", str(step), value(table, step=step, data="weights", metric="gini",
                                                     component=f"layers.{n}.swiglu.w_2")) for n in (0, 1)
                     for step in range(0, 21, 5)]
    assert page.count("data:image/png;base64,") == len(names)
    assert "http://" not in page and "https://" not in page and "src=\"/" not in page
    assert all((out / f"figures/{name}.png").read_bytes()[:4] == b"\x89PNG" for name in names)
    page = re.sub(r"base64,[^\"]*", "", page)
    assert "PER" not in page and "heat_per" not in page and "participation ratio" in page
    assert "the matrix is zero" in page, "why a value is undefined"


def test_seeds_of_an_arm_are_drawn_as_one_with_an_interval(dataset, tmp_path, said, monkeypatch):
    paths = []
    for number, (arm, words) in enumerate([("low", ()), ("low", ("training.seed=2",)), ("low", ("training.seed=3",)),
                                           ("high", ("training.optimization.lr=0.02",))]):
        config = lab.write_config(tmp_path / "c.yaml", lab.tiny_tree(dataset, tmp_path / arm, f"run-{number}"))
        lab.call("train.py", config, "training.stop_at_step=15", *words)
        paths.append(tmp_path / arm / f"run-{number}")
    (tmp_path / "asked.yaml").write_text(REQUEST.format(**ASKED))
    words = ("compare", *paths, "--config", tmp_path / "asked.yaml", "--out")
    lab.call("analyze.py", *words, tmp_path / "both")
    page, [table] = (tmp_path / "both/report.html").read_text(), (tmp_path / "both/figures").glob("weights*.csv")
    with open(table) as file:
        drawn = list(csv.DictReader(file))
    assert "Seeds" in page and {row["line"] for row in drawn} == {"low, 3 seeds", "run-3"}
    each = [row["value"] for row in rows(tmp_path / "both")
            if row["step"] == 15 and row["run"] != "run-3" and row["metric"] == "norm_frobenius"]
    last = next(row for row in drawn if row["line"] == "low, 3 seeds" and row["step"] == "15")
    assert len(each) == 3
    assert (float(last["least"]), float(last["largest"])) == pytest.approx((min(each), max(each)), rel=1e-6)
    curve = dict(plots.bands(training_record(path)["train/loss"] for path in paths[:3]))[15]
    losses = [lab.metrics(path)[15] for path in paths[:3]]
    assert curve.mean == pytest.approx(np.mean(losses))
    assert curve.high - curve.mean == pytest.approx(4.302653 * np.std(losses, ddof=1) / 3 ** 0.5, rel=1e-5)  # t of 2 degrees
    monkeypatch.setitem(sys.modules, "scipy", None)
    lab.call("analyze.py", *words, tmp_path / "without")
    assert any("does without intervals" in line for line in said) and (tmp_path / "without/report.html").is_file()


def test_a_copy_of_a_run_is_no_second_seed(runs, tmp_path):
    shutil.copytree(runs / "full", tmp_path / "copy")
    found = analyze.arms({"full": Snapshots(runs / "full"), "copy": Snapshots(tmp_path / "copy")})
    assert sorted(map(sorted, found.values())) == [["copy"], ["full"]]


def test_runs_are_compared(runs, tmp_path):
    (tmp_path / "few.yaml").write_text(FEW)
    words = ("--config", tmp_path / "few.yaml", "--out")
    lab.call("analyze.py", "compare", runs / "relora", runs / "full", *words, tmp_path / "both")
    assert "Runs compared: relora, full" in (tmp_path / "both/report.html").read_text()
    names = {path.stem for path in (tmp_path / "both/figures").glob("*.png")}
    assert {"loss", "updates_since_the_start_numerical_rank", "activations_cka"} <= names
    table = rows(tmp_path / "both")
    assert {row["run"] for row in table} == {"relora", "full"} and {"cka", "pwcca"} <= {row["metric"] for row in table}
    (tmp_path / "file").write_text("")
    printed = lab.call("analyze.py", "compare", runs / "relora", runs / "full", *words, tmp_path / "file/below", code=2)
    assert "cannot be written" in printed


def shown(kind, count, data="weights", metric="gini", **options):
    points = [(0, 1.0), (5, 2.0), (10, 4.0)]
    lines = [plots.Line(f"{kind} {n}", "k", points, [(value, value) for _, value in points]) for n in range(count)]
    return panels.Panels(data, metric, "label", {"swiglu.w_2": lines}, **options)


def test_many_layers_are_told_by_a_bar_and_many_runs_by_a_legend():
    plt = plots.pyplot()
    for kind, legends, axes in (("layer", 0, 2), ("run", 1, 1)):
        for figure in (panels.sheet(plt, shown(kind, 13)), panels.alone(plt, shown(kind, 13), "swiglu.w_2")):
            assert (len(figure.legends), len(figure.axes)) == (legends, axes)
            plt.close(figure)


def test_lines_end_with_their_cycle_and_bounds_stay_inside(runs):
    """Within a cycle; the cumulative update goes on over merges."""
    plt = plots.pyplot()
    for data, gaps in (("updates within the cycle", 1), ("updates since the start", 0)):
        bounds = {"swiglu.w_2": [(0, 4), (10, 50)]}
        figure = panels.alone(plt, shown("_run", 1, data, "numerical_rank", bounds=bounds, merges=(5,)), "swiglu.w_2")
        axis = figure.axes[0]
        assert np.isnan(axis.get_lines()[0].get_ydata()).sum() == gaps and axis.get_ylim()[1] > 50
        names = [text.get_text().strip() for text in figure.legends[0].get_texts()]
        assert names == ["_run 0", "rank times cycles, at most", "merge"] and figure.get_size_inches()[0] == panels.COLUMN
        plt.close(figure)


def test_ticks_are_powers_of_ten_and_names_are_no_formulas():
    plt = plots.pyplot()
    figure = panels.alone(plt, shown("$\\frac{$ x_$", 1, metric="condition_number"), "swiglu.w_2")
    figure.canvas.draw()  # parses all that is text
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    parsed = [cbook.is_math_text(tick) for tick in ticks if "10^{" in tick]
    assert parsed and all(parsed) and plt.rcParams["text.parse_math"]
    assert not cbook.is_math_text(figure.legends[0].get_texts()[0].get_text()), "a name, as it is"
    plt.close(figure)


def test_every_panel_can_be_had_alone_and_progress_is_said_without_a_terminal(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "TELL_SECONDS", 0)
    (tmp_path / "asked.yaml").write_text(REQUEST.format(**ASKED))
    printed = lab.call("analyze.py", runs / "full", "--config", tmp_path / "asked.yaml", "--panels", "--out", tmp_path / "out")
    found = {path.name for path in (tmp_path / "out/figures").glob("weights_norm_frobenius_swiglu*")}
    assert found == {f"weights_norm_frobenius_swiglu_w_2.{kind}" for kind in ("png", "svg", "csv")}
    assert "analysing" in printed and "1 of 2 (50%)" in printed


def test_what_a_stranger_put_into_a_run_is_not_believed_and_leads_nowhere(runs, tmp_path):
    """Forged rows under the very name that a cache has, formulas for spreadsheets, links, and names that are HTML."""
    name = "<img src=x onerror=alert(1)>$\\frac{$ _=1"
    run, mine = tmp_path / name, tmp_path / "mine"
    mine.mkdir()
    (mine / "weights.png").write_text("mine")
    (tmp_path / "asked.yaml").write_text(REQUEST.format(**ASKED))
    asked, out = ("--config", tmp_path / "asked.yaml"), tmp_path / "out"
    shutil.copytree(runs / "full", run, ignore=shutil.ignore_patterns("analysis"))
    lab.call("analyze.py", run, *asked, "--out", out)
    expected = rows(out)
    for cached in (out / "cache").iterdir():
        kept = json.loads(cached.read_text())
        for row in kept["rows"]:
            row |= {"component": "layers.0.../../../x", "value": 7.0, "reason": "=HYPERLINK(1)"}
        cached.write_text(json.dumps(kept))
    (out / "report.html").unlink()
    (out / "report.html").symlink_to(mine / "made")
    (out / ".writable").symlink_to(mine / "made")
    lab.call("analyze.py", run, *asked, "--out", out)
    assert rows(out) == expected and "onerror=alert(1)>" not in (out / "report.html").read_text()
    assert "HYPERLINK" not in (out / "metrics.csv").read_text()
    (run / "analysis").symlink_to(mine)
    assert "is a link to" in lab.call("analyze.py", run, *asked, code=2)
    printed = lab.call("analyze.py", "compare", run, runs / "full", *asked, "--out", tmp_path / "both")
    assert "is not kept there" in printed and "onerror=alert(1)>" not in (tmp_path / "both/report.html").read_text()
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"weights.png": "mine"}


BAD_CONFIG = {"d_model": ["x", 0, 33, 16 ** 6000], "attention_n_heads": [0, None, 3], "attention_n_kv_heads": [True, 3]}


@pytest.mark.parametrize("key", BAD_CONFIG)
def test_a_configuration_that_does_not_fit_is_one_line(runs, tmp_path, key):
    shutil.copytree(runs / "full", tmp_path / "run", ignore=shutil.ignore_patterns("analysis", "*.safetensors", "training_state"))
    path = tmp_path / "run/training_config.yaml"
    tree = yaml.safe_load(path.read_text())
    for value in BAD_CONFIG[key]:
        path.write_text(yaml.safe_dump(tree | {"model": tree["model"] | {key: value if value != 16 ** 6000 else 0}}).replace(
            f"{key}: 0", f"{key}: 0x1{'0' * 6000}" if value == 16 ** 6000 else f"{key}: 0"))
        assert "training_config.yaml: model: " in lab.call("analyze.py", tmp_path / "run", code=2)


@pytest.mark.parametrize("count", [1, 4])
def test_heads_that_the_snapshots_have_not_are_one_line(runs, tmp_path, count):
    shutil.copytree(runs / "full", tmp_path / "run", ignore=shutil.ignore_patterns("analysis", "*.safetensors", "training_state"))
    path = tmp_path / "run/training_config.yaml"
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(tree | {"model": tree["model"] | {"attention_n_kv_heads": count}}))
    assert "of other sizes than the heads of training_config.yaml" in lab.call("analyze.py", tmp_path / "run", code=2)


@pytest.mark.parametrize("name, tensor, said", [
    ("v_proj", torch.ones(2, 2, dtype=torch.complex64), "not matrices named layers.N"),
    ("v_proj", torch.ones(2, 2, dtype=torch.int64), "not matrices named layers.N"),
    ("v_proj", torch.ones(0, 3), "not matrices named layers.N"), ("v_proj", torch.ones(3), "not matrices named layers.N"),
    ("v_proj", torch.ones(1, 1).expand(10**6, 10**6), "larger than its bytes"), ("v_proj", torch.eye(2).to_sparse(), "not plain"),
    ("../../x", torch.ones(2, 2), "not matrices named layers.N"), ("<b>", torch.ones(2, 2), "not matrices named layers.N"),
    ("", torch.ones(2, 2), "not matrices named layers.N")], ids=lambda value: str(value)[:9])
def test_what_is_no_matrix_of_a_layer_is_refused(runs, tmp_path, name, tensor, said):
    copy = tmp_path / "run"
    shutil.copytree(runs / "full", copy, ignore=shutil.ignore_patterns("analysis", "*.safetensors", "training_state"))
    torch.save({f"layers.0.{name}": tensor}, copy / "checkpoints/step_0/learning_dynamics/val_weights.pt")
    assert said in lab.call("analyze.py", copy, code=2)


def test_each_cycle_is_held_against_the_one_before(runs):
    """By the angles between what both write, from the snapshots' own factors."""
    table, layer = rows(runs / "relora/analysis"), "layers.1.swiglu.w_2"
    for step, before in ((10, 5), (20, 15)):
        spans = [np.linalg.qr(snapshot(runs / "relora", s, f"{layer}.lora_B"))[0] for s in (step, before)]
        expected = (np.linalg.svd(spans[0].T @ spans[1], compute_uv=False) ** 2).mean()
        found = value(table, step=step, other_step=before, metric="overlap_out", component=layer)
        assert found == pytest.approx(expected, rel=1e-5)
    assert "no snapshot of an earlier cycle" in next(row["reason"] for row in table if row["metric"].startswith("overlap"))


def test_activations_are_held_against_another_runs(runs, tmp_path):
    (tmp_path / "asked.yaml").write_text(REQUEST.format(**ASKED))
    words = ("--config", tmp_path / "asked.yaml", "--out", tmp_path / "out", "--against")
    lab.call("analyze.py", runs / "relora", *words, runs / "full")
    table, layer = rows(tmp_path / "out"), "layers.0.attention.o_proj"
    x, y = (snapshot(runs / name, 15, layer, "activations") for name in ("relora", "full"))
    x, y = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert value(table, step=15, data="activations against another run", metric="cka", component=layer) == pytest.approx(expected)
    spans = []
    for name in ("relora", "full"):
        update = snapshot(runs / name, 15, layer) - snapshot(runs / name, 0, layer)
        spans.append(np.linalg.svd(update)[2][:4])  # r is 4, and the layer 32 wide
    assert value(table, step=15, data="updates against another run", metric="overlap_in", component=layer) == \
        pytest.approx((np.linalg.svd(spans[0] @ spans[1].T, compute_uv=False) ** 2).mean(), rel=1e-5)
    other = tmp_path / "other"
    shutil.copytree(runs / "full", other, ignore=shutil.ignore_patterns("analysis", "*.safetensors", "training_state"))
    path = other / "checkpoints/step_0/learning_dynamics/val_data.pt"
    torch.save({"input_ids": torch.zeros(12, 17, dtype=torch.int64)}, path)
    assert "is of other rows" in lab.call("analyze.py", runs / "relora", *words, other, code=2)
    path.write_bytes(b"damaged")
    assert "cannot be read" in lab.call("analyze.py", runs / "relora", *words, other, code=2)


def test_the_loss_along_a_line_meets_both_ends(runs, dataset, tmp_path):
    ends = [runs / "relora/checkpoints/step_20", runs / "full"]
    printed = lab.call("analyze.py", "path", *ends, "--points", 3, "--out", tmp_path / "path")
    with open(tmp_path / "path/path.csv", newline="") as file:
        found = [(float(row["share"]), float(row["loss"])) for row in csv.DictReader(file)]
    for end, (_, loss) in zip(("relora", "full"), (found[0], found[2])):
        assert loss == pytest.approx(dict(training_record(runs / end)["eval/val_loss"])[20], abs=1e-5)  # the same rows
    rise = max(0, found[1][1] - (found[0][1] + found[2][1]) / 2)
    assert [share for share, _ in found] == [0, 0.5, 1] and f"barrier {rise:.4f}" in printed
    again = lab.call("analyze.py", "path", *ends, "--points", 2, "--data", dataset, "--out", tmp_path / "path")
    assert f"loss {found[2][1]:.4f}" in again and "barrier 0.0000" in again
    assert "give two checkpoints" in lab.call("analyze.py", "path", *ends, ends[0], code=2)


def test_the_loss_around_a_checkpoint_is_that_of_its_moved_weights(runs, tmp_path):
    """Principal directions are those of NumPy's SVD of the run's weights; each loss that of a decoder given these."""
    run = runs / "relora"
    lab.call("analyze.py", "path", run, "--points", 3, "--directions", 2, "--reach", 0.1, "--out", tmp_path)
    with open(tmp_path / "path.csv", newline="") as file:
        found = {(row["direction"], float(row["share"])): float(row["loss"]) for row in csv.DictReader(file)}
    assert {name for name, _ in found} == {"random 1", "random 2", "principal 1", "principal 2"}
    states = [load_plain(folder)[1] for folder in sorted((run / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))]
    names = [name for name, tensor in states[-1].items() if tensor.dim() == 2]
    way = np.stack([np.concatenate([state[name].double().numpy().ravel() for name in names]) for state in states])
    axes, centre = np.linalg.svd(way - way.mean(0))[2], states[-1]
    rows = torch.load(run / "checkpoints/step_20/learning_dynamics/val_data.pt")["input_ids"]
    for number, axis in enumerate(axes[:2], 1):
        losses = []
        for share in (-0.1, 0.1):
            moved = torch.from_numpy(way[-1] + share * np.linalg.norm(way[-1]) * axis)
            pieces = dict(zip(names, moved.split([centre[name].numel() for name in names])))
            model = PicoDecoder(load_plain(run)[0])
            model.load_state_dict(centre | {name: piece.view_as(centre[name]).float() for name, piece in pieces.items()})
            losses.append(model(rows[:, :-1], rows[:, 1:]).item())
        ours = [found[f"principal {number}", share] for share in (-0.1, 0.1)]
        assert ours == pytest.approx(losses, abs=1e-5) or ours == pytest.approx(losses[::-1], abs=1e-5)  # a direction has two ends
    assert len({round(found[name, 0.0], 6) for name, _ in found}) == 1
    for number in (0, 1):
        drawn = landscape.random_direction(centre, number)
        assert all(torch.allclose(drawn[name].norm(dim=1), centre[name].norm(dim=1)) for name in names) and set(drawn) == set(names)


def test_what_there_is_to_ask_for_is_listed():
    printed = lab.call("analyze.py", "--list")
    assert all(f"  {name} " in printed and measure.definition in printed for name, measure in MEASURES.items())
    assert all(measure.definition for measure in MEASURES.values())
    assert "give a run folder" in lab.call("analyze.py", code=2)


def test_runs_of_one_name_are_told_apart(tmp_path):
    a, b, c = tmp_path / "a/demo", tmp_path / "b/demo", tmp_path / "c"
    assert analyze.labelled([a, c]) == {"demo": a, "c": c}
    assert analyze.labelled([a, b, c, a]) == {"a/demo": a, "b/demo": b, f"{tmp_path.name}/c": c}


def test_snapshots_hold_text_and_on_demand_the_optimizer_state(runs):
    folder = runs / "relora/checkpoints/step_10/learning_dynamics"
    data = torch.load(folder / "train_data.pt")
    assert data["text"] == [bytes(i for i in ids if i < 256).decode(errors="replace") for ids in data["input_ids"].tolist()]
    moments = torch.load(folder / "train_optimizer.pt")
    saved = torch.load(runs / "relora/checkpoints/step_10/training_state/checkpoint.pt")["optimizer"]
    name = "layers.0.swiglu.w_2.lora_B"
    assert torch.equal(moments[f"{name}.exp_avg"], saved[name]["exp_avg"]) and not any("q_proj" in key for key in moments)


@pytest.mark.parametrize("words, message", [
    (("nowhere",), "not a run folder"), (("compare", "nowhere"), "two runs"),
    *([] if torch.cuda.is_available() else [(("{runs}/relora", "--device", "cuda"), "there is no CUDA device")]),
    (("{runs}/relora", "--config", "{runs}/relora.yaml"), "not a pico-analyze configuration")])
def test_what_cannot_be_analysed_is_one_line(runs, words, message):
    printed = lab.call("analyze.py", *(word.format(runs=runs) for word in words), code=2)
    assert message in printed and "Traceback" not in printed
