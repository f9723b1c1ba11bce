"""A Hub on 127.0.0.1: enough of its API for the real client to create, commit, list and download, with faults.

Revisions are complete trees, so a commit happens or does not. Nothing here is imitated from the client's side:
digests are computed from the bytes that arrived, and LFS objects whose bytes do not have their name are refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIX = (".safetensors", ".png")
ENDPOINTS = ("create", "info", "validate", "preupload", "batch", "put", "commit", "tree", "branch", "resolve")
UPLOAD = ("create", "info", "validate", "preupload", "batch", "put", "commit")


@dataclass
class Revision:
    oid: str
    files: dict[str, bytes]
    title: str


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    revisions: dict[str, Revision] = field(default_factory=dict)
    pulls: int = 0


@dataclass
class Fault:
    """What happens to requests of one endpoint instead of, before or after their handling."""

    endpoint: str
    kind: str
    """A status code, or ``cut`` (before handling), ``cut-after`` (handled, answer lost), ``hang``, ``drip``."""
    times: int = 10**9
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""


class Loopback:
    """The server and its state. Use as a context manager; ``url`` is the endpoint."""

    def __init__(self, token: str = "", hang: float = 3.0) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.token, self.hang = token, hang
        self.released = threading.Event()
        """Ends every hanging request before its time."""
        self.lock = threading.RLock()
        self.on_request: Callable[[int, str, str], None] | None = None
        """Called with the request's number, its endpoint, and ``before`` or ``after`` its handling."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Loopback:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def head(self, repo_id: str, branch: str = "main") -> Revision | None:
        repository = self.repositories.get(repo_id)
        return repository and repository.revisions[repository.branches[branch]]

    def put_revision(self, repo_id: str, files: dict[str, bytes], branch: str = "main", title: str = "") -> str:
        """A new revision with exactly these files."""
        repository = self.repositories.setdefault(repo_id, Repository())
        held = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
        oid = hashlib.sha1(f"{repo_id}{len(repository.revisions)}{held}".encode()).hexdigest()  # other bytes, other id
        repository.revisions[oid] = Revision(oid, dict(files), title)
        repository.branches[branch] = oid
        repository.branches.setdefault("main", oid)
        return oid

    def fault_for(self, endpoint: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.endpoint == endpoint and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


def git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    routes = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/.*)?", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "put"),
        ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *_: object) -> None:
        """Silence."""

    def _serve(self) -> None:
        hub: Loopback = self.server.hub  # type: ignore[attr-defined]
        split = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(split.query).items()}
        found = [
            (name, match) for method, pattern, name in self.routes
            if method == self.command and (match := re.fullmatch(pattern, split.path))
        ]
        name, match = found[0] if found else ("unknown", None)
        with hub.lock:
            hub.requests.append(name)
            number = len(hub.requests)
            hub.tokens.add((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if hub.on_request:
            hub.on_request(number, name, "before")
        self.fault = hub.fault_for(name)
        if self.fault and self._misbehave(self.fault, hub):
            return
        try:
            data = self._body()
            if hub.token and name != "put" and self.headers.get("Authorization") != f"Bearer {hub.token}":
                raise _Refusal(401, "", "Invalid credentials in Authorization header")
            if match is None:
                raise _Refusal(404, "", f"no route for {self.command} {split.path}")
            with hub.lock:
                status, headers, payload = getattr(self, f"_{name}")(hub, data, **{
                    key: unquote(value) for key, value in match.groupdict().items() if value is not None
                })
        except _Refusal as refusal:
            status, payload = refusal.status, json.dumps({"error": refusal.message}).encode()
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
        if hub.on_request:
            hub.on_request(number, name, "after")
        if self.fault and self.fault.kind == "cut-after":
            self._cut()
            return
        self._answer(status, headers, payload)

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _misbehave(self, fault: Fault, hub: Loopback) -> bool:
        """True when the request is over."""
        if fault.kind == "cut":
            self._cut()
        elif fault.kind == "hang":
            hub.released.wait(hub.hang)
            self._cut()
        elif fault.kind.isdigit():
            self._body()
            self._answer(int(fault.kind), dict(fault.headers), fault.body.encode())
        else:
            return False
        return True

    def _cut(self) -> None:
        """End the connection with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.wfile = self.rfile = _Nowhere()  # type: ignore[assignment]

    def _answer(self, status: int, headers: dict[str, str], payload: bytes) -> None:
        try:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(payload)), "Content-Type": "application/json"} | {
                key: value for key, value in headers.items() if value
            }).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if self.fault and self.fault.kind == "drip":
                step = max(1, len(payload) // 8)
                for start in range(0, len(payload), step):
                    self.wfile.write(payload[start : start + step])
                    self.wfile.flush()
                    time.sleep(0.05)
            else:
                self.wfile.write(payload)
        except OSError:
            self.close_connection = True

    # ---- what the Hub does ------------------------------------------------------------------------------------------

    def _repository(self, hub: Loopback, repo: str) -> Repository:
        if repo not in hub.repositories:
            raise _Refusal(404, "RepoNotFound", "Repository not found")
        return hub.repositories[repo]

    def _revision(self, hub: Loopback, repo: str, revision: str) -> Revision:
        repository = self._repository(hub, repo)
        oid = repository.branches.get(revision, revision)
        if oid not in repository.revisions:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository.revisions[oid]

    def _json(self, value: object, status: int = 200) -> tuple[int, dict[str, str], bytes]:
        return status, {}, json.dumps(value).encode()

    def _create(self, hub: Loopback, data: bytes) -> tuple:
        asked = json.loads(data)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        answer = {"url": f"{hub.url}/{repo}", "id": repo}
        if repo in hub.repositories:
            return self._json(answer | {"error": "You already created this model repo"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        hub.repositories[repo] = Repository(private=private)
        hub.put_revision(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, title="initial commit")
        return self._json(answer)

    def _validate(self, hub: Loopback, data: bytes) -> tuple:
        content = json.loads(data)["content"]
        good = content.startswith("---\n") and "\n---\n" in content[4:]
        errors = [] if good else [{"message": "no metadata"}]
        return self._json({"errors": errors, "warnings": []}, 200 if good else 400)

    def _info(self, hub: Loopback, data: bytes, repo: str, revision: str = "main") -> tuple:
        found = self._revision(hub, repo, revision)
        return self._json({
            "id": repo, "modelId": repo, "sha": found.oid, "private": hub.repositories[repo].private, "tags": [],
            "siblings": [{"rfilename": name} for name in sorted(found.files)],
        })

    def _tree(self, hub: Loopback, data: bytes, repo: str, revision: str) -> tuple:
        entries = []
        for name, content in sorted(self._revision(hub, repo, revision).files.items()):
            entry: dict = {"type": "file", "path": name, "size": len(content), "oid": git_digest(content)}
            if name.endswith(LFS_SUFFIX):
                entry["lfs"] = {
                    "oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130,
                }
            entries.append(entry)
        return self._json(entries)

    def _branch(self, hub: Loopback, data: bytes, repo: str, revision: str) -> tuple:
        repository = self._repository(hub, repo)
        if revision in repository.branches:
            raise _Refusal(409, "", "Reference already exists")
        repository.branches[revision] = repository.branches["main"]
        return self._json({})

    def _preupload(self, hub: Loopback, data: bytes, repo: str, revision: str) -> tuple:
        held = self._revision(hub, repo, revision).files
        return self._json({"files": [{
            "path": item["path"], "shouldIgnore": False,
            "uploadMode": "lfs" if item["path"].endswith(LFS_SUFFIX) else "regular",
            "oid": _remote_oid(item["path"], held),
        } for item in json.loads(data)["files"]]})

    def _batch(self, hub: Loopback, data: bytes, repo: str) -> tuple:
        self._repository(hub, repo)
        objects = []
        for item in json.loads(data)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in hub.objects:
                entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}", "header": {}}}
            objects.append(entry)
        return self._json({"transfer": "basic", "objects": objects})

    def _put(self, hub: Loopback, data: bytes, oid: str) -> tuple:
        if hashlib.sha256(data).hexdigest() != oid:
            raise _Refusal(400, "", "content does not match its digest")
        hub.objects[oid] = data
        return self._json({})

    def _commit(self, hub: Loopback, data: bytes, repo: str, revision: str) -> tuple:
        head = self._revision(hub, repo, revision)
        lines = [json.loads(line) for line in data.splitlines()]
        header = lines[0]["value"]
        pull = self.query.get("create_pr") == "1"
        if header.get("parentCommit") not in (None, head.oid) and not pull:
            raise _Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.objects:
                    raise _Refusal(400, "", "LFS object missing")
                files[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        repository = hub.repositories[repo]
        repository.pulls += pull
        branch = f"refs/pr/{repository.pulls}" if pull else revision
        oid = hub.put_revision(repo, files, branch, header["summary"])
        answer = {"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid}
        if pull:
            answer["pullRequestUrl"] = f"{hub.url}/{repo}/discussions/{repository.pulls}"
        return self._json(answer)

    def _resolve(self, hub: Loopback, data: bytes, repo: str, revision: str, path: str) -> tuple:
        found = self._revision(hub, repo, revision)
        if path not in found.files:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        content = found.files[path]
        etag = hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIX) else git_digest(content)
        return 200, {
            "ETag": f'"{etag}"', "X-Repo-Commit": found.oid, "Content-Length": str(len(content)),
            "Content-Type": "application/octet-stream",
        }, content


def _remote_oid(path: str, held: dict[str, bytes]) -> str | None:
    if path not in held:
        return None
    content = held[path]
    return hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIX) else git_digest(content)


class _Nowhere:
    """Stands for the streams of a connection that was cut."""

    closed = False

    def read(self, *_: object) -> bytes:
        return b""

    readline = read

    def write(self, data: bytes) -> int:
        return len(data)

    def flush(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is open."""
