"""Checkpoints: whole or not there, verified, pruned without harm, and the same state back bit for bit."""

import hashlib
import io
import json
import os
import re
import shutil
import threading

import numpy as np
import pytest
import torch

import checkpoint
import lab
from checkpoint import CheckpointError, Saver, Writer, extend, find_resumable, holds, publish, torch_writer, verify
from config import CheckpointingConfig, config_from_dict
from model import PicoDecoder
from optim import make_optimizers
from relora import apply_relora
from runtime.files import Unreadable, write_file

STATE = "training_state/checkpoint.pt"
MANIFEST = "manifest.json"
CFG = CheckpointingConfig()


def files(number):
    """What a checkpoint holds, in small: each file's bytes depend on `number`."""
    return {STATE: torch_writer({"step": number, "model": {"w": torch.full((64,), float(number))}, "config": {}}),
            "config.json": Writer(lambda file: file.write(json.dumps({"n": number}).encode())),
            "learning_dynamics/train_weights.pt": torch_writer({"layers.0": torch.arange(number + 50)})}


def saver(run, **options):
    return Saver(CheckpointingConfig(**options), run)


@pytest.fixture
def steps(tmp_path):
    """Complete checkpoints of steps 0, 9 and 10: by name 9 would be the newest."""
    keeper = saver(tmp_path)
    for number in (0, 9, 10):
        keeper.save(number, files(number))
    keeper.wait()
    return keeper.folder


def found_in(checkpoints, cfg=CFG):
    return find_resumable(checkpoints, cfg)


def bytes_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- publishing ----------------------------------------------------------------------------------------------

def test_a_manifest_lists_every_file_as_it_is(steps):
    content = bytes_below(steps / "step_9")
    listed = json.loads(content.pop(MANIFEST))["files"]
    assert listed == {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                      for name, data in content.items()}
    assert set(listed) == set(files(9))
    assert (steps / "latest").read_text() == "step_10\n"


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    seen = []

    def late(file):
        seen.append(sorted(p.name for p in tmp_path.glob("step_*")))
        file.write(b"late")

    publish(tmp_path / "step_1", {**files(1), "late.txt": Writer(late)})
    assert seen == [[]]
    assert set(bytes_below(tmp_path)) >= {"step_1/late.txt", "step_1/manifest.json"}


@pytest.mark.parametrize("error, told", [(OSError(28, "No space left on device"), CheckpointError),
                                         (ValueError("bad"), ValueError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_write_that_fails_leaves_the_older_ones_as_they_are(steps, error, told):
    def fail(file):
        file.write(b"half")
        raise error

    before = {name: data for name, data in bytes_below(steps).items()}
    for name in ("step_11", "step_10"):  # a new one, and one that is there
        with pytest.raises(told):
            publish(steps / name, {**files(11), "fails": Writer(fail)})
    assert bytes_below(steps) == before, "the leftovers are gone, all else is untouched"
    assert found_in(steps) == (steps / "step_10", [])


def test_a_checkpoint_in_the_way_is_kept_aside_unless_the_new_one_holds_all_that_it_did(steps):
    before = bytes_below(steps / "step_9")
    publish(steps / "step_9", {STATE: files(12)[STATE]})
    verify(steps / "step_9")
    assert bytes_below(steps / "step_9.aside-1") == before
    publish(steps / "step_9", files(13))
    verify(steps / "step_9")
    assert sorted(path.name for path in steps.iterdir()) == ["latest", "step_0", "step_10", "step_9", "step_9.aside-1"]


def test_a_checkpoint_that_only_missed_its_renaming_is_completed(steps):
    (steps / "step_10").rename(steps / ".staging-step_10")
    assert found_in(steps) == (steps / "step_10", [])
    shutil.copytree(steps / "step_9", steps / ".staging-step_11")
    (steps / ".staging-step_11/config.json").write_text("half")
    assert found_in(steps) == (steps / "step_10", [])
    assert list(steps.glob(".staging*")) == []


def test_files_are_added_to_a_checkpoint_which_stays_what_it_was_until_they_are_there(steps):
    before = bytes_below(steps / "step_10")

    def fails(file):
        raise OSError(5, "Input/output error")
    with pytest.raises(CheckpointError, match="step_10 cannot be added to: .*Input/output error"):
        extend(steps / "step_10", {"learning_dynamics/more.pt": torch_writer({"x": torch.zeros(3)}), "fails": Writer(fails)})
    verify(steps / "step_10")
    assert {name: data for name, data in bytes_below(steps / "step_10").items() if name in before} == before
    extend(steps / "step_10", {"learning_dynamics/more.pt": torch_writer({"x": torch.ones(3)})})
    assert verify(steps / "step_10").keys() == before.keys() - {MANIFEST} | {"learning_dynamics/more.pt"}
    assert torch.load(steps / "step_10/learning_dynamics/more.pt")["x"].tolist() == [1, 1, 1]
    assert list(steps.rglob(".staging*")) == [] and holds(steps / "step_10", "learning_dynamics")


def test_a_planted_link_is_not_written_through(tmp_path):
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "link", lambda file: file.write(b"ours"))
    assert (tmp_path / "theirs").read_text() == "precious"


def test_what_is_hashed_is_what_was_handed_over_and_files_are_for_all_to_read(tmp_path):
    entry = write_file(tmp_path / "new", lambda file: [file.write(b"ab"), file.write(memoryview(b"cd"))])
    assert entry == {"size": 4, "sha256": hashlib.sha256(b"abcd").hexdigest()} and (tmp_path / "new").read_bytes() == b"abcd"
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~mask


# ---- disks that fail while they are read -----------------------------------------------------------------------

@pytest.fixture
def bad_disk(monkeypatch):
    """bad_disk(path, times): so many openings of this file fail with an I/O error."""
    left = {}

    def opened(path, *args, real=io.open, **options):
        if left.get(str(path), 0) > 0:
            left[str(path)] -= 1
            raise OSError(5, "Input/output error", str(path))
        return real(path, *args, **options)
    lab.open_by(opened, monkeypatch)
    monkeypatch.setattr("runtime.files.PAUSES", (0.01, 0.01))
    return lambda path, times: left.update({str(path): times})


@pytest.mark.parametrize("name", [MANIFEST, STATE])
def test_an_error_that_passes_is_tried_again(steps, bad_disk, name):
    bad_disk(steps / "step_10" / name, 2)
    assert found_in(steps) == (steps / "step_10", [])


def test_an_error_in_looking_for_the_folder_is_tried_again_and_named(tmp_path, caplog):
    (tmp_path / CFG.checkpoints_dir).mkdir()
    (failing := saver(tmp_path)).save(10 ** 299, {})  # a name too long for a file system
    failing.wait()
    name = rf"/\S*step_{10 ** 299}\S*: File name too long"  # Python 3.14 finds nothing there, and fails at the folder beside it
    assert re.search(name + "; trying again", caplog.text)
    assert type(failing.error) is CheckpointError and re.search(name, str(failing.error))


@pytest.mark.parametrize("name", [MANIFEST, STATE])
def test_what_the_disk_does_not_give_is_never_taken_for_damage(steps, bad_disk, name):
    before = bytes_below(steps)
    bad_disk(steps / "step_10" / name, 99)
    found, complaints = found_in(steps)
    assert found == steps / "step_9" and len(complaints) == 1
    assert f"step_10/{name}: cannot be read (Input/output error)" in complaints[0]
    for number in (9, 0):
        bad_disk(steps / f"step_{number}" / name, 99)
    with pytest.raises(Unreadable, match=f"step_10/{name}: cannot be read"):
        found_in(steps)
    bad_disk(steps / "step_10" / name, 0), bad_disk(steps / "step_9" / name, 0), bad_disk(steps / "step_0" / name, 0)
    assert {n: d for n, d in bytes_below(steps).items() if n != "latest"} == {n: d for n, d in before.items() if n != "latest"}


# ---- finding -------------------------------------------------------------------------------------------------

def replace(old, new):
    return lambda data: data.replace(old, new)


DAMAGE = {  # what happens to a file's bytes; None: it goes
    "a flipped bit": (STATE, lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:]),
    "a truncated file": (STATE, lambda data: data[:-1]), "a missing file": (STATE, None),
    "no manifest": (MANIFEST, None), "half a manifest": (MANIFEST, lambda data: data[:len(data) // 2]),
    "an entry that climbs": (MANIFEST, replace(b"config.json", b"../step_9/config.json")),
    "an absolute entry": (MANIFEST, replace(b"config.json", b"/etc/hostname")),
    "an entry without a size": (MANIFEST, replace(b'"size"', b'"length"'))}


def damage(folder, what="a flipped bit"):
    name, change = DAMAGE[what]
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if change is not None:
        assert change(data) != data
        (folder / name).write_bytes(change(data))
    return name


@pytest.mark.parametrize("what", DAMAGE)
def test_the_newest_sound_checkpoint_is_found_and_a_damaged_one_kept(steps, what):
    named = damage(steps / "step_10", what)
    before = bytes_below(steps / "step_10")
    with pytest.raises(CheckpointError, match=named):
        verify(steps / "step_10")
    newest, complaints = found_in(steps)
    assert newest == steps / "step_9"
    assert len(complaints) == 1 and "step_10" in complaints[0] and named in complaints[0]
    assert bytes_below(steps / "step_10.aside-1") == before and not (steps / "step_10").exists()
    assert found_in(steps) == (steps / "step_9", [])


def test_an_empty_folder_is_no_checkpoint(steps):
    (steps / "step_11").mkdir()
    newest, complaints = found_in(steps)
    assert newest == steps / "step_10"
    assert len(complaints) == 1 and "step_11" in complaints[0] and MANIFEST in complaints[0]


def test_latest_names_a_step_that_is_there_after_the_newest_was_kept_aside(steps):
    damage(steps / "step_10")
    found_in(steps)
    assert (steps / "latest").read_text() == "step_9\n"


def test_nothing_is_found_where_nothing_is_sound(steps, tmp_path):
    for number in (0, 9, 10):
        damage(steps / f"step_{number}")
    newest, complaints = found_in(steps)
    assert newest is None and len(complaints) == 3
    assert found_in(tmp_path / "nowhere") == (None, [])


# ---- pruning -------------------------------------------------------------------------------------------------

def test_old_training_states_are_pruned_and_nothing_else(tmp_path):
    keeper = saver(tmp_path, keep_training_states=2)
    for number in (0, 5, 10, 15):
        keeper.save(number, files(number))
    keeper.wait()
    for number in (0, 5, 10, 15):
        folder = tmp_path / f"checkpoints/step_{number}"
        verify(folder)
        expected = set(files(number)) - ({STATE} if number < 10 else set()) | {MANIFEST}
        assert set(bytes_below(folder)) == expected
    damage(tmp_path / "checkpoints/step_15")
    assert found_in(tmp_path / "checkpoints")[0] == tmp_path / "checkpoints/step_10"


def test_pruning_passes_over_a_damaged_folder(tmp_path):
    keeper = saver(tmp_path, keep_training_states=1)
    keeper.save(0, files(0))
    keeper.wait()
    damage(tmp_path / "checkpoints/step_0", "half a manifest")
    keeper.save(5, files(5))
    keeper.wait()  # an old folder's damage is no reason to stop a run
    assert found_in(tmp_path / "checkpoints")[0] == tmp_path / "checkpoints/step_5"


# ---- the saver's thread --------------------------------------------------------------------------------------

def test_an_error_in_the_thread_is_kept_until_the_next_write(tmp_path):
    def fail(file):
        raise OSError(5, "Input/output error")

    keeper = saver(tmp_path)
    keeper.save(0, {"fails": Writer(fail)})
    keeper.wait()
    assert re.search("step_0 cannot be written: .*Input/output error", str(keeper.error))
    keeper.save(5, files(5))
    keeper.wait()
    assert keeper.error is None
    assert found_in(tmp_path / "checkpoints") == (tmp_path / "checkpoints/step_5", [])


# ---- the state -----------------------------------------------------------------------------------------------

def trained(dataset, optimizer, seed, updates):
    """A ReLoRA model and its optimizers after some updates."""
    cfg = config_from_dict(lab.tiny_tree(dataset, "runs"), [f"training.optimization.optimizer={optimizer}",
                                                            "model.relora.trainable_scaling=true"])
    torch.manual_seed(seed)
    model = PicoDecoder(cfg.model)
    apply_relora(model, cfg.model.relora, seed)
    optimizers = make_optimizers(model, cfg.training.optimization)
    for _ in range(updates):
        update(model, optimizers)
    return model, optimizers


def update(model, optimizers):
    ids = torch.from_numpy(np.random.default_rng(5).integers(64, size=(2, 17)))
    model.eval()(ids[:, :-1], ids[:, 1:]).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def all_tensors(model, optimizers):
    states = [value for o in optimizers for values in o.state.values() for value in values.values()]
    return [*model.state_dict().values(), *(torch.as_tensor(value) for value in states)]


def same(some, others):
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_comes_back_bit_for_bit_and_goes_on_alike(dataset, tmp_path, optimizer):
    one = trained(dataset, optimizer, seed=1, updates=3)
    state = {"step": 3, "config": {}, "progress": {}, "data": {"fingerprint": ""}, "metrics_bytes": 0,
             **checkpoint.gather_state(*one)}
    torch.save(state, tmp_path / "state.pt")
    other = trained(dataset, optimizer, seed=2, updates=0)
    state = checkpoint.read_state(tmp_path / "state.pt")
    checkpoint.load_model_state(other[0], state["model"], tmp_path)
    checkpoint.load_optimizer_state(*other, state["optimizer"])
    assert same(all_tensors(*one), all_tensors(*other))
    update(*one), update(*other)
    assert same(all_tensors(*one), all_tensors(*other))


def test_what_is_on_disk_is_as_of_the_save_however_training_goes_on(dataset, tmp_path):
    model, optimizers = trained(dataset, "adamw", seed=1, updates=2)
    before = [tensor.clone() for tensor in all_tensors(model, optimizers)]
    go, keeper = threading.Event(), saver(tmp_path)
    state = checkpoint.gather_state(model, optimizers)
    keeper.save(2, {"waits": Writer(lambda file: file.write(str(go.wait(20)).encode())), STATE: torch_writer(state)})
    update(model, optimizers)
    assert not same(before, all_tensors(model, optimizers))
    go.set()
    keeper.wait()
    saved = torch.load(tmp_path / "checkpoints/step_2" / STATE)
    values = [value for values in saved["optimizer"].values() for value in values.values()]
    assert same(before, [*saved["model"].values(), *values])


def test_weights_that_do_not_fit_are_named(dataset):
    model, _ = trained(dataset, "adamw", seed=1, updates=0)
    state = dict(model.state_dict())
    del state["output_norm.weight"]
    state |= {"layers.9.extra": torch.zeros(1), "layers.0.attention.q_proj.lora_A": torch.zeros(2, 32)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_model_state(model, state, "some/step_5")
    for words in ("some/step_5", "output_norm.weight is missing", "layers.9.extra is unexpected",
                  "layers.0.attention.q_proj.lora_A is (2, 32), not (4, 32)"):
        assert words in str(caught.value)


class Code:
    """Unpickling it calls open(marker, "w")."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_pickled_code_is_refused_and_never_run(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "checkpoint.pt"
    torch.save({"step": 1, "model": {}, "config": Code(marker)}, path)
    with pytest.raises(CheckpointError, match="checkpoint.pt"):
        checkpoint.read_state(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)["config"].close()
    assert marker.exists(), "the code would have run"


@pytest.mark.parametrize("content", [b"", b"no zip", {"model": {}}, [1]], ids=["empty", "noise", "keys", "list"])
def test_a_file_that_is_no_training_state_is_refused_by_name(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match="checkpoint.pt"):
        checkpoint.read_state(path)


def test_of_two_that_publish_one_folder_anew_the_second_is_refused_and_takes_nothing(tmp_path):
    folder = tmp_path / "out"

    def late(file):
        folder.mkdir()  # by the other, while this one is being written
        (folder / "a").write_bytes(b"mine")
        file.write(b"late")
    with pytest.raises(CheckpointError, match="out cannot be written: .*another process has made it meanwhile"):
        publish(folder, {"a": Writer(late, 4)}, anew=True)
    assert (folder / "a").read_bytes() == b"mine" and list(tmp_path.iterdir()) == [folder]
