"""A sample of what faults.py and power.py try in full: calls to the disk that fail once, mounts with a habit, power cuts."""

from __future__ import annotations

import re
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


def test_what_a_power_cut_leaves_is_whole_or_not_taken_and_nothing_synced_is_lost():
    done = subprocess.run([sys.executable, lab.ROOT / "tests/power.py", "train", "--every", "59", "--states", "2"],
                          capture_output=True, text=True, timeout=400, check=False)
    looked_at = re.findall(r"^train, (?:ext4|strict): \d+ operations, (\d+) states; (?:\d+ looked at, 2 fine|2 fine, )",
                           done.stdout, re.MULTILINE)
    assert done.returncode == 0 and len(looked_at) == 2 and min(map(int, looked_at)) > 9, done.stdout + done.stderr
