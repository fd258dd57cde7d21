"""The record of a run, as curves: what a damaged or a foreign one leaves of them."""

import pytest

from instruments.record import fork_of, training_record

LINE = '{"step": 1, "train/loss": 2.5, "name": "x", "on": true, "none": null, "by": {"a": 1}}\n'


def test_numbers_become_curves_and_a_line_that_is_being_written_is_left_out(tmp_path, said):
    (tmp_path / "metrics.jsonl").write_text(LINE + LINE.replace("1", "2") + '{"step": 3, "tr')
    record = training_record(tmp_path)
    assert record["train/loss"] == [(1, 2.5), (2, 2.5)] and list(record) == ["train/loss"] and record["tokens"] == []
    assert said == []
    (tmp_path / "metrics.jsonl").write_text(LINE.rstrip())
    assert training_record(tmp_path)["train/loss"] == [(1, 2.5)]
    assert training_record(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("line", ["5", "[]", "null", '"text"', "{}", '{"step": "1"}', '{"step": 1.5}', '{"step": true}', "", "{",
                                  "[" * 100_000, "1" * 5000, '{"step": ' + "9" * 400 + "}", "\0\0\0", "\ufffd"],
                         ids=lambda line: line[:12])
def test_a_line_that_is_no_object_is_one_sentence(tmp_path, said, line):
    (tmp_path / "metrics.jsonl").write_text(LINE + f"{line}\n" + LINE)
    assert training_record(tmp_path)["train/loss"] == [(1, 2.5)] * 2
    assert said == [f"{tmp_path}/metrics.jsonl: line 2 is no JSON object with a step, and is left out"]


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "9" * 400, '"2.5"', "[1]", "true"], ids=lambda s: s[:12])
def test_what_is_no_number_is_not_drawn(tmp_path, value):
    (tmp_path / "metrics.jsonl").write_text(LINE + f'{{"step": 2, "train/loss": {value}}}\n')
    assert training_record(tmp_path)["train/loss"] == [(1, 2.5)]


def test_a_record_that_is_no_text_or_no_file_is_said(tmp_path, said):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    assert training_record(tmp_path) == {} and "the figures do without it" in said[0]
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    assert training_record(tmp_path) == {} and len(said) == 2


def test_a_fork_is_told_in_a_sentence(tmp_path, said):
    assert fork_of(tmp_path) == ""
    (tmp_path / "fork.json").write_text('{"from": "/runs/whole", "step": 10, '
                                        '"changes": {"training.optimization.lr": [0.01, 0.005]}}')
    assert fork_of(tmp_path) == " Forked from whole at step 10; changed: training.optimization.lr 0.01 -> 0.005."
    (tmp_path / "fork.json").write_text('{"from": "/runs/whole", "step": 10, "changes": {}}')
    assert fork_of(tmp_path).endswith("changed: nothing.") and said == []


@pytest.mark.parametrize("content", ["", "5", "{}", '{"from": 5, "step": 1, "changes": {}}',
                                     '{"from": "x", "step": 1, "changes": [1]}',
                                     '{"from": "x", "step": 1, "changes": {"a": 5}}'])
def test_a_fork_file_that_tells_nothing_of_the_kind_is_one_sentence(tmp_path, said, content):
    (tmp_path / "fork.json").write_text(content)
    assert fork_of(tmp_path) == "" and len(said) == 1
