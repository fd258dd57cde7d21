"""What every command shares: its words read strictly, its errors told in one line with the exit code that fits."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from config import UserError
from runtime import dist
from runtime.errors import BAD_DISK, BAD_PATH, FULL, Ending
from runtime.log import printable, start_logging

SECOND_THOUGHT_SECONDS = 3.0
OLDEST_TORCH = (2, 6)  # earlier ones have no nn.utils.get_total_norm
TOKENS = ("HF_TOKEN", "WANDB_API_KEY")  # secrets, which no file of a run ever holds


class Parser(argparse.ArgumentParser):
    """An argument parser for a module's docstring, whose errors are one line with the fix, as all of ours are."""

    def __init__(self, description: str | None = None, **options: Any):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> None:
        message = message.removeprefix("argument ")
        if dashed := re.search(r"unrecognized arguments:.* --?(\w+\.[\w.]+=\S*)", f"{message} "):
            message += f"; options of the configuration have no dashes: {dashed[1]}"
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = difflib.get_close_matches(choice[1], re.findall(r"[\w.-]+", choice[2]), n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{message} (see python {self.prog} --help)")


def number(kind: type, least: float, most: float) -> Callable[[str], Any]:
    """What reads an argument as an int or a float from `least` to `most`."""
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} must be from {least} to {most}")
        return value
    return read


def read_tokens(path: Path) -> None:
    """Take HF_TOKEN and WANDB_API_KEY from a .env, in lines NAME=value with or without `export`; what is set already stays."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and name.strip() in TOKENS:
            os.environ.setdefault(name.strip(), value.strip().strip("\"'"))


def check_torch(version: str) -> None:
    """Raise UserError where torch is older than what this is written for."""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
        raise UserError(f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}, the oldest that this works with; "
                        "pip install -r requirements.txt")


def describe_os_error(error: OSError) -> tuple[int, str]:
    """(exit code, a line with the fix); raises what is no disk's fault and no path's."""
    name = str(error.filename or "a file")[:200]
    if error.errno in FULL:
        return 1, f"{name}: the disk is full; free some room"
    if error.errno in BAD_PATH:
        return 2, f"{name}: {error.strerror}; give another path"
    if error.errno in BAD_DISK:
        return 1, f"{name}: {error.strerror}; look after the disk, and start again"
    raise error


def command(main: Callable[[], int | None]) -> None:
    """Run a command's `main`: what the user can fix is one line, and exit code 2."""
    try:
        start_logging()
        check_torch(torch.__version__)
        read_tokens(Path(__file__).parent.parent / ".env")
        sys.exit(main() or 0)
    except Ending as error:  # all ranks end together
        if dist.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except UserError as error:
        code, words = error.exit_code, str(error)
    except OSError as error:
        code, words = describe_os_error(error)
    except UnicodeEncodeError as error:
        code, words = 2, f"{error.object[:40]!r}: is not text that can be written ({error.reason})"
    except RecursionError:
        code, words = 2, "the input is nested too deeply to be read"
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.rank():  # most often rank 0 met the same, and its end has torchrun end us before we repeat it
        time.sleep(SECOND_THOUGHT_SECONDS)
    told = printable(" ".join(words.split())[:900])
    print(f"error: {f'rank {dist.rank()}: ' if dist.rank() else ''}{told}", file=sys.stderr, flush=True)
    sys.exit(code)
