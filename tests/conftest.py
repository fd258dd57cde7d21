import pytest
import torch

import lab

torch.set_num_threads(1)  # threads only get in each other's way on tensors this small


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return lab.make_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def worlds(tmp_path_factory, dataset):
    """One run of 20 steps three ways: `single`, and on two ranks `ddp` and `fsdp`."""
    runs = lab.Lab(tmp_path_factory.mktemp("worlds"), dataset)
    runs.train("single")
    for strategy in ("ddp", "fsdp"):
        runs.train(strategy, f"training.strategy={strategy}", lab.HALF, ranks=2)
    return runs
