"""Uploads to a Hub on loopback with the real client: every commit once, titled and laid out as pico-train's, whatever fails."""

import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import lab
from config import config_from_dict
from fake_hub import Hub
from hub import uploads

KINDS = {"Saving HF Model": {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                             "generation_config.json", "metrics.jsonl", "README.md"},
         "Saving Fabric Checkpoint": {"training_state/checkpoint.pt"},
         "Saving Evaluation Results": None,
         "Saving Learning Dynamics Data (train)": {f"learning_dynamics/train_{k}.pt" for k in
                                                   ("activations", "weights", "gradients", "data")},
         "Saving Learning Dynamics Data (val)": {f"learning_dynamics/val_{k}.pt" for k in
                                                 ("activations", "weights", "gradients", "data")} | {"manifest.json"}}


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def config(dataset, tmp_path, **checkpointing):
    tree = lab.tiny_tree(dataset, tmp_path / "runs", "run")
    tree["training"]["stop_at_step"] = 3
    tree["checkpointing"] |= {"save_every_n_steps": 3} | checkpointing
    return lab.write_config(tmp_path / "c.yaml", tree)


def sending(**more):
    return {"save_to_hf": True, "hf_checkpoint": {"repo_id": "lab/model", "collection_slug": "lab/pico-1234"}} | more


def expected_titles():
    steps = [f"{kind} -- Step {step}" for step in (0, 3) for kind in KINDS]
    return sorted(["initial commit", "Saving Tokenizer -- Step 0", "Saving Training Config -- Step 0", *steps])


TIMED = """
from runtime.command import command
import threading, time
import train
from hub import uploads
from runtime import dist
spent = 0.0

def timed(function):
    def call(*args, **options):
        global spent
        begun = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            if threading.current_thread() is threading.main_thread():
                spent += time.perf_counter() - begun
    return call

for name, function in list(vars(uploads.Uploader).items()):
    if callable(function) and name not in ("__init__", "_work"):
        setattr(uploads.Uploader, name, timed(function))
loop = train.loop

def measured(*args):
    global spent
    spent, begun = 0.0, time.perf_counter()
    loop(*args)
    print(f"uploads took {spent / (time.perf_counter() - begun):.6f} of the training thread")

train.loop = measured
command(train.main)
"""


def test_every_commit_is_made_once_although_every_seventh_request_fails(dataset, tmp_path, hub):
    (tmp_path / "off").mkdir()
    lab.call("train.py", config(dataset, tmp_path / "off"))
    turn, hub.retry_after = itertools.count(1), 0
    hub.faults = [lambda line: 503 if not line.startswith("AFTER") and next(turn) % 7 == 0 else None,
                  lambda line: "drop" if line == "AFTER Saving HF Model -- Step 3" else None]
    env = {**hub.env(tmp_path / "hf"), "HF_TOKEN": "hf_secret_of_this_test"}
    (tmp_path / "timed.py").write_text(TIMED)
    printed = lab.forked(tmp_path / "timed.py", config(dataset, tmp_path, **sending()), env=env)
    assert float(re.search(r"uploads took (\S+) of the training thread", printed)[1]) <= 0.01
    lab.forked("export.py", "upload", tmp_path / "runs" / "run", env=env)  # nothing is left, or what is
    made = hub.commits["models/lab/model", "run"]
    assert sorted(commit["title"] for commit in made) == expected_titles()
    for commit in made:
        kind = commit["title"].split(" -- ")[0]
        if KINDS.get(kind):
            assert set(commit["files"]) == KINDS[kind], kind
    run = tmp_path / "runs" / "run"
    by_title = {commit["title"]: commit["files"] for commit in made}
    snapshot = run / "checkpoints" / "step_3" / "learning_dynamics" / "val_gradients.pt"
    assert by_title["Saving Learning Dynamics Data (val) -- Step 3"]["learning_dynamics/val_gradients.pt"] == \
        snapshot.read_bytes()
    assert by_title["Saving Training Config -- Step 0"].keys() == {"training_config.yaml"}
    assert hub.collections.keys() == {"lab/pico-1234"} and set(hub.collections["lab/pico-1234"]) == {"lab/model"}
    assert lab.metrics(run) == lab.metrics(tmp_path / "off" / "runs" / "run")
    written = [p.read_bytes() for p in run.rglob("*") if p.is_file()] + [data for c in made for data in c["files"].values()]
    assert not any(b"hf_secret_of_this_test" in data for data in written)


def test_a_hub_that_is_away_does_not_disturb_training_and_the_rest_goes_up_later(dataset, tmp_path, hub):
    hub.faults = [lambda line: 500]
    env = hub.env(tmp_path / "hf")
    printed = lab.forked("train.py", config(dataset, tmp_path, **sending()), "checkpointing.upload_grace_seconds=1", env=env)
    assert "python export.py upload" in printed
    assert json.loads((tmp_path / "runs" / "run" / "exit.json").read_text())["code"] == 0
    hub.faults = []
    printed = lab.forked("export.py", "upload", tmp_path / "runs" / "run", env=env)
    assert f"{len(expected_titles()) - 1} commits made" in printed
    assert sorted(commit["title"] for commit in hub.commits["models/lab/model", "run"]) == expected_titles()


def test_what_a_hub_that_was_away_did_not_take_goes_up_at_the_next_start(dataset, tmp_path, hub):
    words, env = sending(upload_grace_seconds=0.5), hub.env(tmp_path / "hf")
    hub.faults = [lambda line: 500]
    lab.forked("train.py", config(dataset, tmp_path, **words), env=env)
    assert not hub.commits
    hub.faults = []
    lab.forked("train.py", config(dataset, tmp_path, **sending()), env=env)  # trained already
    assert sorted(commit["title"] for commit in hub.commits["models/lab/model", "run"]) == expected_titles()
    shutil.rmtree(tmp_path / "runs/run")
    printed = lab.forked("train.py", config(dataset, tmp_path, **sending()), "training.seed=1", env=env)
    assert f"branch run holds {len(expected_titles()) - 1} commits of an earlier run of this name" in printed


def test_a_repository_without_an_owner_is_the_token_s_user_s(dataset, tmp_path, hub):
    """As in the published presets; the owner is known when there is something to upload."""
    env = hub.env(tmp_path / "hf") | {"HF_TOKEN": "hf_of_this_test"}
    cfg = config(dataset, tmp_path, **sending(hf_checkpoint={"repo_id": "model"}))
    printed = lab.forked("train.py", cfg, env=env)
    assert "uploads go to lab/model" in printed
    assert sorted(commit["title"] for commit in hub.commits["models/lab/model", "run"]) == expected_titles()
    assert "0 commits made on lab/model, branch run" in lab.forked("export.py", "upload", tmp_path / "runs/run", env=env)


def test_a_token_that_the_hub_refuses_is_told_once_and_stops_nothing(dataset, tmp_path, hub):
    hub.faults = [lambda line: (401, "", "Invalid credentials in Authorization header")]
    env = hub.env(tmp_path / "hf") | {"HF_TOKEN": "hf_of_this_test"}
    printed = lab.forked("train.py", config(dataset, tmp_path, **sending()), env=env)
    fix = "log in with `hf auth login`, or set HF_TOKEN"
    told = [line for line in printed.splitlines() if line.startswith("warning: upload to lab/model: ")]
    assert len(told) == 1 and "Invalid credentials" in told[0] and fix in told[0]
    assert len(hub.requests) <= 10, "two for each of at most five times that there was something new"
    assert json.loads((tmp_path / "runs/run/exit.json").read_text())["code"] == 0
    assert told[0].removeprefix("warning: ") in (tmp_path / "runs/run/logs/train.log").read_text()
    printed = lab.forked("export.py", "upload", tmp_path / "runs/run", env=env, code=2)
    assert printed.count("error: ") == 1 and "Invalid credentials" in printed and fix in printed
    without = lab.forked("export.py", "upload", tmp_path / "runs/run", env=hub.env(tmp_path / "none"), code=2)
    assert fix in without


def test_no_more_commits_are_made_in_an_hour_than_the_hub_allows(dataset, tmp_path, monkeypatch):
    slept, clock = [], iter(range(0, 600, 100))
    monkeypatch.setattr(uploads, "COMMITS_PER_HOUR", 2)
    monkeypatch.setattr(uploads, "time", SimpleNamespace(sleep=slept.append, monotonic=lambda: next(clock)))
    cfg = config_from_dict(lab.tiny_tree(dataset, tmp_path) | {"checkpointing": sending(run_name="run")}).checkpointing
    uploader = uploads.Uploader(tmp_path, cfg)
    monkeypatch.chdir(tmp_path)
    assert uploads.Uploader(Path("."), cfg).branch == tmp_path.name, "however the folder is written"
    for _ in range(3):
        uploader._wait_for_turn()
    assert slept == [3400], "the third comes 200 s after the first, and waits until that is an hour ago"


def test_save_to_hf_without_a_repository_is_refused(dataset, tmp_path):
    printed = lab.call("train.py", config(dataset, tmp_path, save_to_hf=True), code=2)
    assert "checkpointing.hf_checkpoint.repo_id" in printed


# ---- tags, and what the Hub serves --------------------------------------------------------------------------------------

@pytest.fixture
def uploaded(dataset, tmp_path, hub):
    """A run of three steps with a dense snapshot at step 1, on the Hub."""
    env = hub.env(tmp_path / "hf")
    words = ("checkpointing.learning_dynamics.steps=[1]",)
    lab.forked("train.py", config(dataset, tmp_path, **sending()), *words, env=env)
    return tmp_path / "runs/run", env


def verify(hub, env, revision, *words, code=0):
    return lab.forked("export.py", "verify", "lab/model", "--revision", revision, *words, env=env, code=code)


def test_every_step_has_a_tag_that_serves_what_the_run_wrote(uploaded, hub):
    run, env = uploaded
    assert {tag for _, tag in hub.tags} == {"step-0", "step-1", "step-3"}
    for step in (0, 1, 3):
        served = hub.at("models/lab/model", f"step-{step}")
        assert served["model.safetensors"] == (run / f"checkpoints/step_{step}/model.safetensors").read_bytes()
    assert "files are what the run wrote" in verify(hub, env, "step-3") and "files are" in verify(hub, env, "step-1", "--download")
    card = hub.at("models/lab/model", "step-3")["README.md"].decode()
    assert 'revision="step-3"' in card and "val loss" in card and "rank 4, alpha 8" in card and card.startswith("---\n")
    for step in (0, 1, 3):
        record = [json.loads(line) for line in hub.at("models/lab/model", f"step-{step}")["metrics.jsonl"].splitlines()]
        assert [line for line in record if "train/loss" in line] == [
            line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if "train/loss" in line and line["step"] <= step]


def dense(dataset, tmp_path, hub, last, *words):
    """Titles of the commits of a run of `last` steps whose every step has a snapshot, and but the ends no training state."""
    words = (f"training.max_steps={last}", "training.stop_at_step=null", f"checkpointing.save_every_n_steps={last}",
             f"checkpointing.learning_dynamics.steps={list(range(1, last))}".replace(" ", ""), "evaluation.metrics=null",
             "checkpointing.learning_dynamics.max_rows=2", *words)
    lab.forked("train.py", config(dataset, tmp_path, **sending()), *words, env=hub.env(tmp_path / "hf"))
    assert {tag for _, tag in hub.tags} == {f"step-{step}" for step in range(last + 1)}
    return [commit["title"] for commit in hub.commits["models/lab/model", "run"]]


def test_a_dense_step_is_a_commit_for_each_of_its_splits(dataset, tmp_path, hub):
    titles = dense(dataset, tmp_path, hub, 3)
    kinds = [title for title in titles if title.endswith(" -- Step 2")]
    assert sorted(kinds) == [f"Saving Learning Dynamics Data ({split}) -- Step 2" for split in ("train", "val")]
    served = hub.at("models/lab/model", "step-2")
    assert {"model.safetensors", "learning_dynamics/train_weights.pt", "learning_dynamics/val_weights.pt"} <= served.keys()


def test_sixty_dense_steps_stay_below_the_hubs_limit(dataset, tmp_path, hub):
    titles = dense(dataset, tmp_path, hub, 61, "checkpointing.learning_dynamics.eval_data=null")
    assert len(titles) == 1 + 2 + 3 + 60 + 3 < uploads.COMMITS_PER_HOUR
    assert "learning_dynamics/train_weights.pt" in hub.at("models/lab/model", "step-60")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "training_state/checkpoint.pt"])
def test_one_flipped_byte_on_the_hub_is_found(uploaded, hub, name):
    run, env = uploaded
    for commit in hub.commits["models/lab/model", "run"]:
        if commit["title"].endswith("Step 3") and name in commit["files"]:
            spoilt = bytearray(commit["files"][name])
            spoilt[len(spoilt) // 2] ^= 1
            commit["files"][name] = bytes(spoilt)
    out = verify(hub, env, "step-3", code=2)
    assert "1 of" in out and name in out and "step-3" in out
    assert "files are what the run wrote" in verify(hub, env, "step-0")


def test_a_revision_without_a_manifest_cannot_be_verified(uploaded, hub):
    hub.repos["models/lab/other"] = {"model.safetensors": b"x"}
    out = lab.forked("export.py", "verify", "lab/other", "--revision", "main", env=uploaded[1], code=2)
    assert "holds no manifest.json" in out


def test_a_tag_of_another_run_is_left_to_it(dataset, tmp_path, uploaded, hub):
    before = dict(hub.tags)
    words = ("checkpointing.run_name=second",)
    lab.forked("train.py", config(dataset, tmp_path, **sending()), *words, env=uploaded[1])
    assert {tag: to for (_, tag), to in hub.tags.items() if not tag.startswith("second")} == {t: to for (_, t), to in before.items()}
    assert {tag for _, tag in hub.tags} >= {"second-step-0", "second-step-3"}


def test_an_evaluation_made_later_goes_up_too(uploaded, hub):
    run, env = uploaded
    results = run / "eval_results/step_3.json"
    results.write_text(json.dumps(json.loads(results.read_text()) | {"blimp": {"accuracy": 0.5}}))
    assert "1 commits made" in lab.forked("export.py", "upload", run, env=env)
    assert b"blimp" in hub.at("models/lab/model", "run")["eval_results/step_3.json"]
    assert "0 commits made" in lab.forked("export.py", "upload", run, env=env)
