"""The endpoints of the Hub that publishing and loading a model use, on a local port, with the files in memory.

Speaks what `huggingface_hub` speaks: create, preupload, LFS batch, upload and verify, commit, model info, tree,
resolve. Anything else is a 404, so that a test fails if the client starts to need more.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_local"
USER = "tester"


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"").hexdigest()])


@dataclass
class LocalHub:
    """State of the server: `repositories` by name, `blobs` by SHA-256, and requests it did not understand."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    ROUTES = {
        "GET": [
            (r"/api/whoami-v2", "whoami"),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/.*)?", "tree"),
            (r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ],
        "POST": [
            (r"/api/repos/create", "create"),
            (r"/api/validate-yaml", "validate_yaml"),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
            (r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
            (r"/lfs/verify", "lfs_verify"),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ],
        "PUT": [(r"/lfs/upload/(?P<oid>[0-9a-f]{64})", "lfs_upload")],
    }

    def do_GET(self) -> None:
        self._dispatch("GET")

    def do_HEAD(self) -> None:
        self._dispatch("GET")

    def do_POST(self) -> None:
        self._dispatch("POST")

    def do_PUT(self) -> None:
        self._dispatch("PUT")

    def log_message(self, *_: object) -> None:
        """Requests are not printed: the base class writes each to stderr."""

    def _dispatch(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, name in self.ROUTES[method]:
            if match := re.fullmatch(pattern, path):
                return getattr(self, f"_{name}")(body, **match.groupdict())
        self.hub.unknown.append(f"{self.command} {path}")
        self._answer(404, {"error": "Not Found"})

    def _answer(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repository(self, repo: str, *, write: bool = False) -> Repository | None:
        found = self.hub.repositories.get(repo)
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or (found.private and not authorized):
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif write and not authorized:
            self._answer(401, {"error": "Invalid username or password."})
        else:
            return found
        return None

    def _whoami(self, body: bytes) -> None:
        self._answer(200, {"type": "user", "name": USER, "orgs": []})

    def _create(self, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        request = json.loads(body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", "url": self._url(name)})
        self.hub.repositories[name] = Repository(private=request.get("visibility") == "private")
        self._answer(200, {"url": self._url(name), "name": name, "id": name})

    def _url(self, name: str) -> str:
        return f"{self.hub.endpoint}/{name}"

    def _validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self._answer(200, {"errors": errors, "warnings": []})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self._repository(repo, write=True) is None:
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin", ".pt")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _lfs_batch(self, body: bytes, repo: str) -> None:
        if self._repository(repo, write=True) is None:
            return
        objects = []
        for entry in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.endpoint}/lfs/upload/{entry['oid']}"},
                "verify": {"href": f"{self.hub.endpoint}/lfs/verify"},
            }
            objects.append(entry if entry["oid"] in self.hub.blobs else {**entry, "actions": actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "contents do not have this oid"})
        self.hub.blobs[oid] = body
        self._answer(200, {})

    def _lfs_verify(self, body: bytes) -> None:
        entry = json.loads(body)
        held = self.hub.blobs.get(entry["oid"])
        self._answer(200 if held is not None and len(held) == entry["size"] else 404, {})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._repository(repo, write=True)
        if repository is None:
            return
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.blobs[value["oid"]]
                repository.large.add(value["path"])
            elif operation["key"] != "header":
                return self._answer(400, {"error": f"operation {operation['key']} is not known here"})
        oid = hashlib.sha1(body + repository.commits[-1].encode()).hexdigest()
        repository.commits.append(oid)
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self._url(repo)}/commit/{oid}"})

    def _info(self, body: bytes, repo: str, revision: str | None) -> None:
        repository = self._repository(repo)
        if repository is not None:
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            info = {"_id": repo, "id": repo, "modelId": repo, "sha": repository.commits[-1], "siblings": siblings}
            self._answer(200, {**info, "private": repository.private, "tags": [], "downloads": 0, "likes": 0})

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        if repository is not None:
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in sorted(repository.files.items())
            ]
            self._answer(200, entries)

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        repository = self._repository(repo)
        if repository is None:
            return
        commit = {"X-Repo-Commit": repository.commits[-1]}
        data = repository.files.get(path)
        if data is None:
            return self._answer(404, {"error": "Entry not found"}, {**commit, "X-Error-Code": "EntryNotFound"})
        digest = hashlib.sha256 if path in repository.large else hashlib.sha1
        self._answer(200, data, {**commit, "ETag": f'"{digest(data).hexdigest()}"'})


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A running server; give its `endpoint` to a process as HF_ENDPOINT."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
