"""Uploads a run to the Hub, step by step, in a thread that can neither slow nor stop the training.

One repository a model, one branch a run; every kind of file is a commit of its own, titled and laid out as pico-train
does, so that pico-analyze finds it. What has been sent is read from the branch's own history, so each commit is made
once, whatever failed in between; evaluations made later go up too. A tag, step-N, is at the commit that holds a step's weights
and state, its manifest, the record so far and a model card. The token comes from the environment or the Hub's login, and is
never written.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from checkpoint import CheckpointError, read_manifest, step_folders
from config import CheckpointingConfig, load_config
from hub.card import model_card
from hub.client import Refused, with_retries
from hub.served import git_blob_id
from runtime.log import log
from runtime.manifest import MANIFEST
from runtime.run_folder import objects

COMMITS_PER_HOUR = 120  # the Hub allows about 128 a repository
RESULTS = "Saving Evaluation Results"


class Commit(NamedTuple):
    title: str
    files: dict[str, Path | bytes]  # path in the repository -> file here, or its content
    tag: str | None = None  # to put on it


def commits(run: Path, cfg: CheckpointingConfig) -> list[Commit]:
    """All commits that the run's files call for, oldest step first."""
    found = []
    folders = list(reversed(step_folders(run / cfg.checkpoints_dir)))
    for folder in folders:
        try:
            names = read_manifest(folder)
        except CheckpointError:
            continue
        step = int(folder.name[5:])
        if step == 0:
            found += [Commit("Saving Tokenizer -- Step 0", {n: folder / n for n in names if n.startswith("tokenizer")}),
                      Commit("Saving Training Config -- Step 0", {"training_config.yaml": run / "training_config.yaml"})]
        found += step_commits(run, folder, names, cfg, newest=folder == folders[-1])
        results = Path(cfg.evaluation.eval_results_dir) / f"step_{step}.json"
        if (run / results).is_file():
            found.append(Commit(f"{RESULTS} -- Step {step}", {f"eval_results/{results.name}": run / results}))
    return [commit for commit in found if commit.files]


def step_commits(run: Path, folder: Path, names: Iterable[str], cfg: CheckpointingConfig, newest: bool) -> list[Commit]:
    """The commits of one step folder, one a kind of file; the last has the manifest of all, and the step's tag.

    The snapshots of the newest step may still be on their way: until they are there, neither is due.
    """
    step = int(folder.name[5:])
    found = [Commit(f"Saving HF Model -- Step {step}", {n: folder / n for n in names if "/" not in n} | about(run, step)),
             Commit(f"Saving Fabric Checkpoint -- Step {step}",
                    {n: folder / n for n in names if n.startswith(f"{cfg.fabric_checkpoint_dir}/")})]
    for split in ("train", "val"):
        chosen = {f"learning_dynamics/{n.removeprefix(f'{cfg.learning_dynamics_dir}/')}": folder / n for n in names
                  if n.startswith(f"{cfg.learning_dynamics_dir}/{split}_")}
        found.append(Commit(f"Saving Learning Dynamics Data ({split}) -- Step {step}", chosen))
    found = [commit for commit in found if commit.files]
    snapshots = any(n.startswith(f"{cfg.learning_dynamics_dir}/") for n in names)
    if not any(n.startswith(f"{cfg.fabric_checkpoint_dir}/") for n in names):
        # a step of snapshots alone: its weights go with the first of them, that many such steps stay below the Hub's limit
        if newest and not snapshots:
            return []
        if len(found) > 1:
            weights = found.pop(0)
            found[0] = found[0]._replace(files=weights.files | found[0].files)
    if snapshots or cfg.learning_dynamics is None or not newest:
        last = found[-1]
        found[-1] = last._replace(files=last.files | {MANIFEST: folder / MANIFEST}, tag=f"step-{step}")
    return found


def about(run: Path, step: int) -> dict[str, bytes]:
    """The record as far as `step`, and the model card."""
    record = run / "metrics.jsonl"
    lines = objects(record.read_bytes()) if record.is_file() else []
    text = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
    return {"metrics.jsonl": text.encode(), "README.md": model_card(run, step).encode()}


class Uploader:
    """Sends the commits of a run. `sync` does so once; a thread does so whenever `kick`ed."""

    def __init__(self, run: Path, cfg: CheckpointingConfig, fresh: bool = False):
        from huggingface_hub import HfApi, utils
        utils.disable_progress_bars()
        self.run, self.cfg, self.api = run, cfg, HfApi()
        self.repo, self.branch = cfg.hf_checkpoint.repo_id, run.resolve().name
        self.sent: dict[str, str] | None = None  # {title: commit} on the branch; None: to be asked
        self.tags: dict[str, str] | None = None  # {tag: commit} of the repository
        self._fresh = fresh  # a run that has just begun, and can have sent nothing
        self._to_prepare = self._preparations()
        self.made = 0  # commits by this process
        self._times: deque[float] = deque(maxlen=COMMITS_PER_HOUR)
        self._kicked, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def kick(self) -> None:
        """There may be something new to send."""
        self._kicked.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def close(self, grace_seconds: float, stopped: Callable[[], int]) -> None:
        """Send what is left, for grace_seconds or until `stopped`; the rest goes up at the next start or by export.py upload."""
        self._closing.set()
        self.kick()
        end = time.monotonic() + grace_seconds
        while self._thread.is_alive() and time.monotonic() < end and not stopped():
            self._thread.join(timeout=0.2)
        if self._thread.is_alive():
            log.warning(f"some uploads are left; send them with: python export.py upload '{self.run}'")

    def _work(self) -> None:
        told = None
        while True:
            self._kicked.wait()
            self._kicked.clear()
            closing = self._closing.is_set()  # asked before the sync: what is there by now will be sent
            try:
                self.sync(math.inf)
            except Exception as error:  # whatever it is, training goes on
                found = str(error) if isinstance(error, Refused) else f"upload to {self.repo}: {type(error).__name__}: {error}"
                if found != told:  # once, not at every checkpoint
                    log.warning(f"{found}; tried again at every checkpoint, and by: python export.py upload '{self.run}'")
                    told = found
            if closing:
                return

    def sync(self, minutes: float) -> None:
        """Make every commit that is not on the branch yet; the Hub may be away for `minutes`. Raises HubError."""
        for commit in commits(self.run, self.cfg):
            with_retries(lambda: self._send(commit), f"upload to {self.repo}", minutes)

    def _send(self, commit: Commit) -> None:
        """Make a commit, unless a try whose answer got lost has made it, or its files have been pruned since; then its tag."""
        if self.sent is None:
            self.sent = self._on_branch()
        if not all(isinstance(file, bytes) or file.is_file() for file in commit.files.values()):
            return
        if commit.title not in self.sent or commit.title.startswith(RESULTS) and self._changed(commit):
            self._wait_for_turn()
            sent, self.sent = self.sent, None  # should the answer get lost, ask again what is there
            self.sent = sent | {commit.title: self._commit(commit)}
            self.made += 1
        if commit.tag is not None:
            self._put_tag(commit.tag, self.sent[commit.title])

    def _changed(self, commit: Commit) -> bool:
        """Whether the Hub holds other content than these files here."""
        there = {info.path: info.blob_id for info in self.api.get_paths_info(self.repo, list(commit.files), revision=self.branch)}
        return any(there.get(name) != git_blob_id(path.read_bytes()) for name, path in commit.files.items())

    def _put_tag(self, tag: str, commit: str) -> None:
        """Tag a commit; where another run of the repository has the tag, its own name goes before it."""
        if self.tags is None:
            self.tags = {found.name: found.target_commit for found in self.api.list_repo_refs(self.repo).tags}
        if self.tags.get(tag, commit) != commit:
            tag = f"{self.branch}-{tag}"
        if self.tags.get(tag) != commit:
            self.api.create_tag(self.repo, tag=tag, revision=commit, exist_ok=True)
            self.tags[tag] = commit

    def _on_branch(self) -> dict[str, str]:
        """{title: commit} of the branch; makes repository, branch and collection entry first, each once."""
        while self._to_prepare:
            self._to_prepare[0]()
            self._to_prepare.pop(0)
        found = {commit.title: commit.commit_id for commit in self.api.list_repo_commits(self.repo, revision=self.branch)}
        if self._fresh and (others := sum(title.startswith("Saving ") for title in found)):
            log.warning(f"upload to {self.repo}: branch {self.branch} holds {others} commits of an earlier run of this name, "
                        "which stay; delete the branch, or choose another checkpointing.run_name")
        self._fresh = False
        return found

    def _preparations(self) -> list[Callable[[], object]]:
        slug = self.cfg.hf_checkpoint.collection_slug
        steps = [self._add_owner, lambda: self.api.create_repo(self.repo, exist_ok=True),
                 lambda: self.api.create_branch(self.repo, branch=self.branch, exist_ok=True)]
        return steps + ([lambda: self.api.add_collection_item(slug, self.repo, "model", exists_ok=True)] if slug else [])

    def _add_owner(self) -> None:
        """A repository without an owner is the token's user's."""
        if "/" not in self.repo:
            self.repo = f"{self.api.whoami()['name']}/{self.repo}"
            log.info(f"uploads go to {self.repo}")

    def _commit(self, commit: Commit) -> str:
        from huggingface_hub import CommitOperationAdd
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file if isinstance(file, bytes) else str(file))
                      for name, file in commit.files.items()]
        return self.api.create_commit(self.repo, operations, commit_message=commit.title, revision=self.branch).oid

    def _wait_for_turn(self) -> None:
        if len(self._times) == COMMITS_PER_HOUR:
            time.sleep(max(0.0, self._times[0] + 3600 - time.monotonic()))
        self._times.append(time.monotonic())


def upload_run(run: Path) -> None:
    """Send what a run has not sent yet, as `python export.py upload RUN`. Raises UserError."""
    path = run / "training_config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{run}: not a run folder: it has no training_config.yaml")
    whole = load_config(path)
    cfg = whole.checkpointing
    if not cfg.hf_checkpoint.repo_id:
        raise CheckpointError(f"checkpointing.hf_checkpoint.repo_id: is empty in {path}; set it to owner/name")
    uploader = Uploader(run, cfg)
    uploader.sync(whole.data.dataset.patience_minutes)
    print(f"{uploader.made} commits made on {uploader.repo}, branch {uploader.branch}")
