"""Whether the Hub serves what a run has written: every file of a revision beside the manifest that lies in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from config import UserError
from hub.client import HubError, with_retries
from runtime.manifest import MANIFEST


def git_blob_id(content: bytes) -> str:
    """What git, and so the Hub, calls this content of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def verify_served(repo: str, revision: str, minutes: float, download: bool = False) -> tuple[int, list[str]]:
    """(files that are as their manifest says, what is wrong with each other), of `repo` at `revision`, a tag such as step-3000.

    Large files are compared by the SHA-256 that the Hub keeps of them; small ones, and with `download` all, are fetched. Raises
    HubError, also where the revision holds no manifest.
    """
    from huggingface_hub import HfApi, hf_hub_download
    api, what = HfApi(), f"{repo} at {revision}"

    def fetch(name: str) -> Path:
        return Path(with_retries(lambda: hf_hub_download(repo, name, revision=revision), what, minutes))
    infos = {info.path: info for info in with_retries(lambda: list(api.list_repo_tree(repo, revision=revision, recursive=True)),
                                                      what, minutes)}
    if MANIFEST not in infos:
        raise HubError(f"{what}: holds no {MANIFEST}; only steps that this lab uploaded can be verified")
    try:
        entries = json.loads(fetch(MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{what}: {MANIFEST} makes no sense ({error})") from None
    right, wrong = 0, []
    for name, (size, sha256) in sorted(expected.items()):
        info = infos.get(name)
        if info is None:
            wrong.append(f"{name} is not there")
            continue
        found = info.lfs.sha256 if info.lfs is not None and not download else hashlib.sha256(fetch(name).read_bytes()).hexdigest()
        if (info.size, found) == (size, sha256):
            right += 1
        else:
            wrong.append(f"{name} has {info.size} bytes, sha256 {found[:12]}..., and the manifest says {size}, {sha256[:12]}...")
    return right, wrong
