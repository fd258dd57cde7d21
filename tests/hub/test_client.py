"""What the Hub answers, met by the real client: what is tried again, what is not, and what a user reads."""

import json
import logging
import time

import numpy as np
import pytest

import lab
from config import ConfigError
from fake_hub import Hub, once
from hub import client
from shards import write_shards

ASK = """
import json, sys, time
from huggingface_hub import hf_hub_download
from hub.client import HubError, Refused, fetch_folder, with_retries
from runtime.log import start_logging

start_logging()
told = {}
for kind, name in json.loads(sys.argv[1]):
    begun = time.monotonic()
    try:
        fetch_folder(name, kind, ["*.json"], float(sys.argv[2]))
        outcome = ["had", ""]
    except HubError as error:
        outcome = [type(error).__name__, str(error)]
    told[name] = [*outcome, time.monotonic() - begun]
print("TOLD", json.dumps(told))
"""
ANSWERS = {  # name: (answer, what a user reads)
    "lab/gated": ((403, "GatedRepo", "Access to dataset lab/gated is restricted"),
                  ["is gated", "restricted", "request access at {url}/lab/gated", "hf auth login"]),
    "lab/absent": ((401, "RepoNotFound", "Repository not found"), ["no such repository", "check the name", "HF_TOKEN"]),
    "lab/token": ((401, "", "Invalid credentials in Authorization header"),
                  ["Invalid credentials", "`hf auth login`, or set HF_TOKEN"]),
    "lab/forbidden": ((403, "", "You need the role read"), ["may not do this", "You need the role read", "/settings/tokens"]),
    "lab/revision": ((404, "RevisionNotFound", "Invalid rev id: main"), ["no such revision", "Invalid rev id"]),
    "lab/closed": ((451, "", "Unavailable for legal reasons"), ["451"]),
    "no name!": (None, ["no name!"]),
    "lab/busy": ((503, "", "the Hub is busy"), ["gave up after 0.05 minutes", "busy", "data.dataset.patience_minutes"]),
    "lab/limited": ((429, "", "rate limit"), ["gave up after 0.05 minutes"]),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{name: [class, message, seconds]} of one process that asked for everything, and the Hub that it asked."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "ask.py").write_text(ASK)
    with Hub() as hub:
        hub.retry_after = 0
        hub.repos["models/lab/plain"] = {"a.json": b"{}"}
        hub.faults = [lambda line, name=name, answer=answer: answer if f"/{name}" in line else None
                      for name, (answer, _) in ANSWERS.items() if answer]
        names = [["model", "lab/plain"], *(["model", name] for name in ANSWERS)]
        printed = lab.forked(folder / "ask.py", json.dumps(names), 0.05, env=hub.env(folder / "hf"))
    return json.loads(printed.split("TOLD ")[1].splitlines()[0]), hub, printed


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_told_with_its_reason_and_fix_and_is_not_asked_for_again_where_that_cannot_help(answers, name):
    told, hub, _ = answers
    kind, message, seconds = told[name]
    for words in ANSWERS[name][1]:
        assert words.format(url=hub.url) in message, message
    assert "\n" not in message and "Client Error." not in message
    if name in ("lab/busy", "lab/limited"):
        assert kind == "HubError" and 1 < seconds < 20
    else:
        assert kind == "Refused" and seconds < 3
        assert sum(f"/{name}" in line for line in hub.requests) <= 2  # snapshot_download itself asks for two things
    assert told["lab/plain"][0] == "had"


def test_retries_are_told_by_the_one_voice(answers):
    printed = answers[2]
    assert "warning: lab/busy: " in printed and "trying again in 1 s" in printed


def test_without_any_network_nobody_waits_for_the_whole_patience(monkeypatch):
    """The Hub has never answered: most often there is no network, and a cluster's hour would be lost."""
    monkeypatch.setattr(client, "_answered", False)
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(client, "UNREACHED_MINUTES", 0.005)
    begun = time.monotonic()
    with pytest.raises(client.HubError, match="gave up after 0.005 minutes .*unreachable") as caught:
        client.with_retries(once_more(OSError("unreachable"), 1000), "data", minutes=60)
    assert time.monotonic() - begun < 5 and not isinstance(caught.value, client.Refused)


def once_more(error, times):
    """An action that fails so many times."""
    left = [times]

    def action():
        if left[0]:
            left[0] -= 1
            raise error
        return "done"
    return action


@pytest.mark.parametrize("error", [OSError(104, "Connection reset by peer"), OSError(28, "No space left on device"),
                                   RuntimeError("a passing fault of the client"), ValueError("half an answer")])
def test_what_may_pass_is_tried_again(error, monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    assert client.with_retries(once_more(error, 3), "data", minutes=1) == "done"


@pytest.mark.parametrize("error, kind", [(PermissionError(13, "Permission denied", "/cache"), client.Refused),
                                         (ConfigError("ours"), ConfigError), (TypeError("a fault of ours"), TypeError)])
def test_what_will_not_pass_is_raised_at_once(error, kind):
    begun = time.monotonic()
    with pytest.raises(kind):
        client.with_retries(once_more(error, 1), "data", minutes=60)
    assert time.monotonic() - begun < 0.5


def test_what_reaches_a_terminal_or_a_log_is_one_line_and_signs_no_link():
    error = OSError("403 Client Error. (Request ID: x)\n\n\x1b[31mno\x07 https://cdn.example/a?X-Signature=secret&b=1 'there'\nmore")
    assert client.first_line(error) == "\\x1b[31mno\\x07 https://cdn.example/a 'there'"
    assert client.first_line(ValueError()) == "ValueError"


def test_the_same_complaint_is_not_repeated_for_hours(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.04)
    records, handler = [], logging.Handler()
    handler.emit = records.append
    client.node_log.addHandler(handler)
    try:
        assert client.with_retries(once_more(OSError("away"), 12), "data", minutes=1) == "done"
    finally:
        client.node_log.removeHandler(handler)
    assert len(records) == 3 and "every" in records[-1].getMessage()  # 0.01, 0.02, 0.04 s


def test_one_passing_fault_of_each_kind_costs_no_download(tmp_path):
    """503, a dropped connection, a truncated file: the tokenizer comes all the same, whole."""
    (tmp_path / "ask.py").write_text(ASK)
    with Hub() as hub:
        hub.repos["models/lab/words"] = {"tokenizer.json": b'{"a": "' + b"x" * 5000 + b'"}'}
        hub.retry_after = 0
        hub.faults = [once("GET /api/models/lab/words", 503), once("GET /api/models/lab/words", "drop"),
                      once("GET /lab/words/resolve", "truncate"), once("GET /lab/words/resolve", "drop")]
        printed = lab.forked(tmp_path / "ask.py", json.dumps([["model", "lab/words"]]), 1, env=hub.env(tmp_path / "hf"))
    assert json.loads(printed.split("TOLD ")[1].splitlines()[0])["lab/words"][0] == "had"


GATED = (403, "GatedRepo", "Access to lab/closed is restricted")
COMMANDS = {  # what asks the Hub, and the key that its error names
    "dataset": (["train.py", "CONFIG", "data.dataset.name=lab/closed"], "data.dataset.name: "),
    "tokenizer": (["train.py", "CONFIG", "data.tokenizer.name=lab/closed", "data.dataset.name=SET"], "data.tokenizer.name: "),
    "blimp": (["train.py", "CONFIG", "evaluation.metrics=[blimp]", "evaluation.blimp.dataset_name=lab/closed"],
              "evaluation.blimp.dataset_name: "),
    "paloma": (["train.py", "CONFIG", "evaluation.metrics=[paloma]", "evaluation.paloma.dataset_name=lab/closed"],
               "evaluation.paloma.dataset_name: "),
    "import": (["export.py", "import", "lab/closed", "OUT"], ""),
    "download": (["shards.py", "download", "lab/closed", "--out", "OUT"], ""),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_every_download_is_tried_again_alike_and_refused_alike(dataset, tmp_path, what):
    words, key = COMMANDS[what]
    write_shards(tmp_path / "set/train", np.random.default_rng(0).integers(300, size=(16, 17)), 300, "a test")
    tree = lab.tiny_tree(dataset, tmp_path / "runs")
    tree["data"]["dataset"] |= {"cache_dir": str(tmp_path / "cache"), "patience_minutes": 0.5}
    tree["model"]["vocab_size"] = 300
    given = {"CONFIG": lab.write_config(tmp_path / "c.yaml", tree), "OUT": tmp_path / "out"}
    words = [given.get(word, word.replace("SET", str(tmp_path / "set"))) for word in words]
    with Hub() as hub:
        hub.retry_after = 0
        hub.faults = [once("/lab/closed", "drop", 1), once("/lab/closed", (502, "", "bad gateway"), 1),
                      lambda line: GATED if "/lab/closed" in line else None]
        printed = lab.forked(*words, env=hub.env(tmp_path / "hf"), code=2)
    kind = "" if what in ("tokenizer", "import") else "datasets/"
    assert f"error: {key}" in printed and printed.count("error: ") == 1 and "Traceback" not in printed
    assert "is restricted" in printed and f"request access at {hub.url}/{kind}lab/closed" in printed
    assert "warning: lab/closed: " in printed and "trying again in 1 s" in printed
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()
