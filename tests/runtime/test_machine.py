"""One look at the machine: devices, launchers, compilers. There is no GPU here: torch is asked in its stead."""

import json
import os
import sys
import warnings

import pytest
import torch

import lab
from config import UserError
from runtime import machine
from runtime.errors import TrainingError


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count, capability, built): a machine with GPUs, as torch tells of them."""
    def make(count=1, capability=(9, 0), built=("sm_80", "sm_90", "compute_90")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
    return make


def test_each_rank_takes_its_own_gpu_and_a_cpu_where_there_is_none(monkeypatch, gpus):
    assert machine.pick_device("cuda") == torch.device("cpu")
    gpus(2)
    for rank, name in ((0, "cuda:0"), (1, "cuda:1")):
        for key, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "a",
                           "MASTER_PORT": 1}.items():
            monkeypatch.setenv(key, str(value))
        assert machine.pick_device("auto") == torch.device(name)
    assert machine.pick_device("cpu") == torch.device("cpu")


def test_more_processes_than_gpus_are_refused_with_both_remedies(monkeypatch, gpus):
    gpus(1)
    for key, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "a",
                       "MASTER_PORT": 1}.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(UserError, match="2 processes here, and this machine has 1 GPU; .*--nproc_per_node=1.*accelerator=cpu"):
        machine.pick_device()
    assert machine.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("capability, built, fits", [
    ((7, 0), ["sm_75", "sm_80", "sm_90"], False), ((6, 1), ["sm_75", "compute_75"], False), ((7, 5), ["sm_75"], True),
    ((8, 6), ["sm_80"], True), ((8, 0), ["sm_86"], False), ((9, 0), ["sm_90a"], True), ((12, 0), ["sm_90"], False),
    ((12, 0), ["sm_90", "compute_90"], True), ((10, 3), ["sm_100"], True), ((9, 0), [], False),
    ((9, 0), ["gfx90a"], True)])
def test_a_gpu_that_this_torch_has_no_kernels_for_is_refused(gpus, capability, built, fits):
    assert machine.has_kernels(capability, built) == fits
    gpus(1, capability, built)
    if not fits:
        told = rf"Tesla V100, of compute capability {capability[0]}\.{capability[1]}.*accelerator=cpu"
        with pytest.raises(UserError, match=told):
            machine.pick_device()


def test_a_gpu_that_is_refused_is_told_of_in_one_line_not_in_torchs_ten(monkeypatch, gpus):
    gpus(1, (7, 0), ["sm_75"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: warnings.warn("ten lines") or (7, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="capability 7.0"):
            machine.pick_device()


@pytest.mark.parametrize("capability, wanted, chosen", [((7, 5), "bf16-mixed", "32-true"), ((8, 0), "bf16-mixed", "bf16-mixed"),
                                                        ((7, 5), "32-true", "32-true")])
def test_bf16_that_is_only_emulated_is_not_taken(gpus, capability, wanted, chosen):
    gpus(1, capability)
    assert machine.choose_precision(wanted, torch.device("cuda", 0)) == chosen


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """The function that makes a PATH of these programs alone; Python's headers are there."""
    def make(*names):
        for name in names:
            (tmp_path / name).touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return make


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the compiler has other names")
def test_without_a_compiler_nothing_is_compiled_and_it_says_what_to_install(programs, monkeypatch, caplog):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    programs("gcc", "g++")
    assert machine.choose_compile(True, cpu) and machine.choose_compile(None, cuda) and not machine.choose_compile(None, cpu)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(machine.log, "propagate", True)
    assert not machine.choose_compile(None, cuda) and "a C compiler (gcc)" in caplog.text
    assert not machine.choose_compile(True, cpu) and "a C++ compiler (g++)" in caplog.text
    caplog.clear()
    assert not machine.choose_compile(False, cuda) and not caplog.text


@pytest.mark.parametrize("there, env, fine", [
    (["cc"], {}, []), (["gcc"], {}, ["cuda"]), (["clang"], {}, ["cuda"]), (["g++"], {}, ["cpu"]),
    (["gcc", "g++"], {"CC": "icc", "CXX": "g++ -m64"}, []), (["mine"], {"CC": "mine", "CXX": "mine"}, ["cuda", "cpu"])], ids=str)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the compiler has other names")
def test_the_compiler_is_looked_for_as_torch_will(programs, monkeypatch, said, there, env, fine):
    """Each of these that is not fine is a hundred lines once the run's folder has been made: Triton knows no cc."""
    programs(*there)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert [kind for kind in ("cuda", "cpu") if machine.choose_compile(True, torch.device(kind))] == fine
    assert ("CC is 'icc', which names no program" in "".join(said)) == ("icc" in env.values())


@pytest.mark.parametrize("env, told", [
    ({"RANK": "0"}, "RANK is set, and WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK is set, and LOCAL_RANK not"),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "srun started 2 copies"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 copies")], ids=["RANK alone", "no LOCAL_RANK", "srun", "mpirun"])
def test_a_launcher_that_tells_too_little_is_refused_in_one_sentence(dataset, tmp_path, env, told):
    path = lab.write_config(tmp_path / "run.yaml", lab.tiny_tree(dataset, tmp_path))
    printed = lab.run("train.py", path, env=env, code=2)
    assert told in printed and "Traceback" not in printed and not (tmp_path / "run").exists()


def test_a_single_python_inside_an_allocation_trains(dataset, tmp_path):
    path = lab.write_config(tmp_path / "run.yaml", lab.tiny_tree(dataset, tmp_path))
    env = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    lab.run("train.py", path, "training.stop_at_step=1", env=env)
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 0 and "RANK" not in os.environ


def test_an_operation_without_a_repeatable_form_is_named_with_the_option():
    pooled, places = torch.nn.functional.max_pool2d(torch.randn(1, 1, 4, 4), 2, return_indices=True)
    torch.use_deterministic_algorithms(True)
    try:
        told = r"max_unpooling2d\w+ is used.*set training.deterministic=false"
        with pytest.raises(TrainingError, match=told), machine.advice(1):
            torch.nn.functional.max_unpool2d(pooled, places, 2)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device, deterministic, expected", [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)])
def test_only_a_gpu_is_asked_to_repeat_itself(device, deterministic, expected):
    try:
        machine.prepare(torch.device(device), False, deterministic)
        assert torch.are_deterministic_algorithms_enabled() == expected
    finally:
        torch.use_deterministic_algorithms(False)
