import atexit
import logging
import os
import re
import shutil
import tempfile

import pytest
import torch

import lab
from config import ModelConfig
from runtime.log import log

torch.set_num_threads(1)  # threads only get in each other's way on tensors this small


def pytest_addoption(parser):
    parser.addoption("--plain", action="store_true", help="turn the fast paths of kernels.py off by default")


def pytest_configure(config):
    """--plain changes a default, and so also what is in the configurations that tests give to processes."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # the user's may hold files that a killed process left half written
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if config.getoption("--plain"):
        names = list(ModelConfig.__dataclass_fields__)
        ModelConfig.__init__.__defaults__ = tuple(False if name == "fast_paths" else default for name, default in
                                                  zip(names, ModelConfig.__init__.__defaults__, strict=True))
        lab.FAST_PATHS = False


def pytest_collection_modifyitems(items):
    """What this torch has not is skipped. The files that take longest go first, or one worker is left with them at the end."""
    longest = ("test_guard", "test_streaming", "test_train", "test_hostile", "test_uploads", "test_resume", "test_bench")
    place = {name: number for number, name in enumerate(longest)}
    for word, there in (("fsdp", lab.shards), ("muon", lambda: hasattr(torch.optim, "Muon"))):  # refused on an older torch
        found = [item for item in items if word in re.split(r"\W", item.name.partition("[")[2])]
        if found and not there():
            for item in found:
                item.add_marker(pytest.mark.skip(reason=f"this torch has no {word} here"))
    items.sort(key=lambda item: place.get(item.path.stem, len(longest)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def said():
    """What is said by one rank from here on, line by line."""
    lines, handler, level = [], logging.Handler(), log.level
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return lab.make_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def worlds(tmp_path_factory, dataset):
    """One run of 20 steps three ways: `single`, and on two ranks `ddp` and `fsdp`."""
    runs = lab.Lab(tmp_path_factory.mktemp("worlds"), dataset)
    runs.train("single")
    for strategy in ("ddp", "fsdp") if lab.shards() else ("ddp",):
        runs.train(strategy, f"training.strategy={strategy}", lab.HALF, ranks=2)
    return runs
