"""A small Hugging Face Hub on loopback: the endpoints that the real client calls, with faults on demand.

Start it with `with Hub() as hub:` and point HF_ENDPOINT at hub.url. Faults are functions (request line -> action)
in hub.faults; an action is None, a status such as 503, (status, code, message) as the Hub says why, "truncate", "lie" (other
bytes), or "drop" (close at once).
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Action = int | str | tuple[int, str, str] | None


class Hub:
    """Repositories {"datasets/owner/name": {path: bytes}}, one revision each, and the requests that came."""

    def __init__(self, latency: float = 0.0, port: int = 0):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.latency, self.retry_after = latency, 1
        self.faults: list[Callable[[str], Action]] = []
        self.requests: list[str] = []
        self.tokens: set[str] = set()  # that came in headers
        self.commits: dict[tuple[str, str], list[dict]] = {}  # (repo, branch) -> [{"title", "files": {path: bytes}}]
        self.tags: dict[tuple[str, str], str] = {}  # (repo, tag) -> commit
        self.lfs: dict[str, bytes] = {}
        self.collections: dict[str, list[str]] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.faults = [lambda line: "drop"]  # of connections that are still open
        self.server.shutdown()
        self.server.server_close()  # may be called again

    def revision(self, repo: str, files: dict[str, bytes] | None = None) -> str:
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in (files or self.repos[repo]).items())
        return hashlib.sha1(repr((repo, content)).encode()).hexdigest()

    def at(self, repo: str, revision: str) -> dict[str, bytes]:
        """The files of a repository at a tag, a branch or a commit; of one without commits those that were put there."""
        commit = self.tags.get((repo, revision), revision)
        for (owner, branch), made in self.commits.items():
            for number, _ in enumerate(made):
                if owner == repo and (commit == f"{branch}-{number}" or commit == branch and number == len(made) - 1):
                    return {path: data for one in made[:number + 1] for path, data in one["files"].items()}
        return self.repos[repo]

    def env(self, home: object) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
                "HF_HUB_DISABLE_TELEMETRY": "1"}

    def fetched(self, pattern: str) -> list[str]:
        """The paths below resolve/ that were downloaded, in order, if `pattern` is in them."""
        return [line.split("/resolve/")[1].split("/", 1)[1] for line in self.requests
                if line.startswith("GET") and "/resolve/" in line and pattern in line]

    def action(self, line: str) -> Action:
        return next((a for a in (fault(line) for fault in self.faults) if a is not None), None)


def once(match: str, action: Action, times: int = 1) -> Callable[[str], Action]:
    """A fault for the first `times` requests that hold `match`."""
    left = [times]

    def fault(line: str) -> Action:
        if match in line and left[0] > 0:
            left[0] -= 1
            return action
        return None
    return fault


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)  # close alone leaves the client waiting: rfile still holds the socket

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {self.path}"
        self.hub.requests.append(line)
        self.hub.tokens.add(str(self.headers.get("Authorization")))
        time.sleep(self.hub.latency)
        action = self.hub.action(line)
        if action == "drop":
            return self._drop()
        if isinstance(action, tuple):
            status, code, message = action
            return self._answer(status, b"{}", {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))
        if isinstance(action, int):
            return self._answer(action, b"busy", {"Retry-After": str(self.hub.retry_after)} if action in (429, 503) else {})
        path = urllib.parse.unquote(self.path.split("?")[0])
        if path.startswith("/lfs/"):
            self.hub.lfs[path.removeprefix("/lfs/")] = body
            return self._answer(200)
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(body)["objects"]]
            for o in objects:
                if o["oid"] not in self.hub.lfs:  # what is there already need not come again
                    o["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}
            return self._json({"transfer": "basic", "objects": objects})
        if path.startswith("/api/"):
            return self._api(path.removeprefix("/api/"), body)
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        repo = repo if repo.startswith("datasets/") else f"models/{repo}"
        revision, _, name = rest.partition("/")
        return self._file(repo, name, action, self.hub.at(repo, revision) if repo in self.hub.repos else {})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _missing(self, code: str) -> None:
        self._answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not on this small hub"})

    def _api(self, path: str, body: bytes) -> None:
        if path == "repos/create":
            asked = json.loads(body)
            self.hub.repos.setdefault(f"models/{asked.get('organization') or 'lab'}/{asked['name']}", {})
            return self._json({"url": f"{self.hub.url}/{asked.get('organization') or 'lab'}/{asked['name']}"})
        if path == "validate-yaml":  # of a model card
            return self._json({"errors": [], "warnings": []})
        if path == "whoami-v2":
            return self._json({"type": "user", "name": "lab", "fullname": "A lab", "orgs": []})
        kind, owner, name, *rest = path.split("/")
        if kind == "collections":
            self.hub.collections.setdefault(f"{owner}/{name}", []).append(json.loads(body)["item"]["id"])
            return self._json({"slug": f"{owner}/{name}", "title": name, "owner": {"name": owner}, "items": [],
                               "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "private": False,
                               "theme": "blue", "upvotes": 0})
        repo = f"{kind}/{owner}/{name}"
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        files = self.hub.at(repo, rest[1]) if rest[:1] in (["paths-info"], ["tree"]) else self.hub.repos[repo]
        if rest[:1] == ["refs"]:
            tags = {tag: commit for (of, tag), commit in self.hub.tags.items() if of == repo}
            return self._json({"branches": [], "converts": [], "tags": [
                {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": commit} for tag, commit in tags.items()]})
        if rest[:1] == ["tag"]:
            self.hub.tags[repo, json.loads(body)["tag"]] = rest[1]
            return self._json({})
        if rest[:1] == ["paths-info"]:
            asked = urllib.parse.parse_qs(body.decode()).get("paths", []) if body[:1] != b"{" else json.loads(body)["paths"]
            return self._json([self._info(p, files[p]) for p in asked if p in files])
        if rest[:1] == ["tree"]:
            return self._json([self._info(p, data) for p, data in sorted(files.items())])
        if rest[:1] == ["branch"]:
            if (repo, rest[1]) in self.hub.commits:
                return self._answer(409, b"{}")
            self.hub.commits[repo, rest[1]] = [{"title": "initial commit", "files": {}}]
            return self._json({})
        if rest[:1] == ["preupload"]:
            return self._json({"files": [{"path": f["path"], "shouldIgnore": False, "oid": None, "uploadMode":
                                          "lfs" if f["path"].endswith((".pt", ".safetensors")) else "regular"}
                                         for f in json.loads(body)["files"]]})
        if rest[:1] == ["commits"]:
            return self._json([{"id": f"{rest[1]}-{i}", "title": c["title"], "message": "", "date": "2026-01-01T00:00:00.000Z",
                                "authors": []} for i, c in enumerate(self.hub.commits[repo, rest[1]])])
        if rest[:1] == ["commit"]:
            return self._commit(repo, rest[1], [json.loads(line) for line in body.decode().splitlines()])
        self._json({"id": f"{owner}/{name}", "sha": self.hub.revision(repo), "private": False, "tags": [],
                    "downloads": 0, "likes": 0, "siblings": [{"rfilename": p} for p in sorted(files)]})

    def _commit(self, repo: str, branch: str, lines: list[dict]) -> None:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        title = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        self.hub.commits[repo, branch].append({"title": title, "files": files})
        if self.hub.action(f"AFTER {title}") == "drop":  # the commit was made, but its answer is lost
            return self._drop()
        commit = f"{branch}-{len(self.hub.commits[repo, branch]) - 1}"
        url = f"{self.hub.url}/{repo.removeprefix('models/')}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "hookOutput": "", "pullRequestUrl": None})

    @staticmethod
    def _info(path: str, data: bytes) -> dict:
        digest, blob = hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        large = not path.endswith((".json", ".jsonl", ".yaml", ".md"))
        return {"type": "file", "path": path, "size": len(data), "oid": digest[:40] if large else blob} | (
            {"lfs": {"oid": digest, "size": len(data), "pointerSize": 100}} if large else {})

    def _file(self, repo: str, path: str, action: Action, files: dict[str, bytes]) -> None:
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        if path not in files:
            return self._missing("EntryNotFound")
        data = files[path]
        digest = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": self.hub.revision(repo, files), "X-Linked-Size": str(len(data)),
                   "X-Linked-Etag": f'"{digest}"', "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if action == "lie":
            body = bytes(reversed(body))
        headers["Content-Length"] = str(len(body))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            if action == "truncate":
                self.wfile.write(body[:len(body) // 2])
                return self._drop()
            self.wfile.write(body)
