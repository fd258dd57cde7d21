"""A sample of what tests/faults.py tries in full: calls to the disk that fail once, and mounts with a habit."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

import lab

pytestmark = pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="preload.c needs a C compiler and Linux")


@pytest.mark.parametrize("words", [("sample", "verify", "--every", "19"), ("resume", "--every", "181"), ("train", "--mounts"),
                                   ("text", "--every", "211", "--error", "ENOSPC")], ids=" ".join)
def test_a_disk_that_fails_once_costs_a_line_and_no_work(words):
    done = subprocess.run([sys.executable, lab.ROOT / "tests/faults.py", *words], capture_output=True, text=True, timeout=400,
                          check=False)
    assert done.returncode == 0 and done.stdout.count(" fine") >= len([w for w in words if w.isalpha() and w.islower()]), done.stdout
