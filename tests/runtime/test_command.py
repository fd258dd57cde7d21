"""The command line: one line for every mistake; tokens from a .env; nothing that a terminal would obey."""

import os

import pytest

from config import UserError
from runtime.command import Parser, check_torch, number, read_tokens
from runtime.log import printable


@pytest.mark.parametrize("words, told", [
    (["--tokens", "0"], "--tokens: 0 must be from 1 to 100"), (["--tokens", "many"], "--tokens: 'many' is not a whole number"),
    (["--share", "x"], "--share: 'x' is not a number"), (["mak"], "did you mean make?"),
    (["make", "--training.max_steps=10"], "options of the configuration have no dashes: training.max_steps=10"),
    ([], "required")])
def test_a_mistake_is_one_line_that_names_what_was_wrong_and_the_help(words, told):
    parser = Parser("What it does.", prog="thing.py")
    parser.add_argument("what", choices=["make", "show"])
    parser.add_argument("--tokens", type=number(int, 1, 100))
    parser.add_argument("--share", type=number(float, 0, 1))
    with pytest.raises(UserError) as caught:
        parser.parse_args(words)
    assert told in str(caught.value) and "(see python thing.py --help)" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["2.5.1+cpu", "1.13.0", "2.0"])
def test_a_torch_that_is_too_old_is_named_with_the_one_that_is_not(version):
    with pytest.raises(UserError, match=rf"torch {version.split('+')[0]}.* is older than 2\.6"):
        check_torch(version)


def test_newer_torches_are_taken():
    for version in ("2.6.0", "2.13.0+cpu", "2.15.0a0+git1234567", "3.0"):
        check_torch(version)


def test_tokens_come_from_a_file_beside_the_code_and_nothing_else_does(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "PATH_TO_EVIL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".env").write_text("# mine\nexport HF_TOKEN='hf_1'\nWANDB_API_KEY = w2 \nPATH_TO_EVIL=3\n\nnonsense\n")
    read_tokens(tmp_path / ".env")
    assert (os.environ["HF_TOKEN"], os.environ["WANDB_API_KEY"]) == ("hf_1", "w2") and "PATH_TO_EVIL" not in os.environ
    monkeypatch.setenv("HF_TOKEN", "set already")
    read_tokens(tmp_path / ".env")
    assert os.environ["HF_TOKEN"] == "set already"
    read_tokens(tmp_path / "absent")


def test_nothing_that_is_said_is_obeyed_by_a_terminal():
    assert printable("run\x1b[2J\x07 name\r\u202e") == r"run\x1b[2J\x07 name\r\u202e"
    assert printable("café 你好 ok") == "café 你好 ok"
