import pytest
import torch

import lab


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return lab.make_dataset(tmp_path_factory.mktemp("data") / "tiny")
