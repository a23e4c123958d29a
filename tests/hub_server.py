"""A small hub on this machine: the part of the hub's protocol that huggingface_hub and datasets use here.

It keeps repositories of models and data sets in memory, with branches and commits, private ones behind a token, and
every request's path, so that a test can say what was asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_ThisIsTheTokenOfTheTests"
USER = "someone"
KINDS = ("models", "datasets", "spaces")


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by commit the files by their paths

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Put files on top of a branch's; the new commit."""
        before = self.branches.get(branch, "")
        now = {**self.commits.get(before, {}), **files}
        digest = hashlib.sha1(f"{before} {branch}".encode())
        for path, data in sorted(now.items()):
            digest.update(f"{path} {hashlib.sha1(data).hexdigest()}".encode())
        self.branches[branch] = digest.hexdigest()
        self.commits[self.branches[branch]] = now
        return self.branches[branch]


class Hub:
    """What the server has."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.moved: dict[str, str] = {}  # today's names of repositories of models by their former ones
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.endpoint = ""

    def add(self, name: str, files: dict[str, bytes], kind: str = "models", private: bool = False) -> Repository:
        found = self.repositories[kind, name] = Repository(private)
        found.commit("main", files)
        return found

    def files(self, name: str, branch: str = "main", kind: str = "models") -> dict[str, bytes]:
        found = self.repositories[kind, name]
        return found.commits[found.branches[branch]]


@contextmanager
def serving():
    """A hub that answers at `hub.endpoint` within the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _is_private(wanted: dict) -> bool:
    """As the versions of huggingface_hub say it."""
    return bool(wanted.get("private")) or wanted.get("visibility") == "private"


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        path = [unquote(part) for part in urlsplit(self.path).path.split("/") if part]
        self.hub.requests.append(f"{self.command} /{'/'.join(path)}")
        if body:
            self.hub.bodies.append(body)
        try:
            self._route(path, body)
        except Refused as error:
            self._send(
                json.dumps({"error": error.message}).encode(),
                error.status,
                {"X-Error-Code": error.code, "X-Error-Message": error.message},
            )

    def _route(self, path: list[str], body: bytes) -> None:
        at = 2 if path[:2] == ["api", "models"] else 0
        if path[at : at + 1] and path[at] in self.hub.moved:
            where = "/".join([*path[:at], self.hub.moved[path[at]], *path[at + 1 :]])
            query = urlsplit(self.path).query
            return self._send(b"", 307, {"Location": f"/{where}" + (f"?{query}" if query else "")})
        if not path:
            self._send(b"a hub")
        elif path == ["api", "whoami-v2"]:
            self._require_token()
            self._json({"name": USER, "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        elif path == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif path == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif path[0] == "api" and len(path) > 2 and path[1] in KINDS:
            self._api(path[1], path[2:], body)
        elif "resolve" in path:
            self._resolve(path)
        else:
            raise Refused(404, "", "Sorry, we can't find the page you are looking for.")

    # -- writing -------------------------------------------------------------------------------------------------

    def _create(self, wanted: dict) -> None:
        self._require_token()
        owner = wanted.get("organization") or USER
        if owner != USER:
            raise Refused(403, "", f"You don't have the rights to create a model under the namespace {owner}")
        name = f"{owner}/{wanted['name']}"
        kind = f"{wanted.get('type', 'model')}s"
        if (kind, name) in self.hub.repositories:
            return self._json({"error": "You already created this repo", "url": self._url(kind, name)}, 409)
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, kind, _is_private(wanted))
        self._json({"url": self._url(kind, name), "name": name, "id": name})

    def _api(self, kind: str, rest: list[str], body: bytes) -> None:
        name, rest = self._split(kind, rest)
        found = self._repository(kind, name)
        what = rest[0] if rest else ""
        if what == "branch":
            self._require_token()
            if rest[1] in found.branches:
                return self._json({"error": "Reference already exists"}, 409)
            start = json.loads(body or b"{}").get("startingPoint") or "main"
            found.branches[rest[1]] = self._sha(found, start)
            return self._json({})
        if what == "preupload":
            self._require_token()
            self._sha(found, rest[1])
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self._json({"files": [{**f, "shouldIgnore": False} for f in files]})
        if what == "commit":
            return self._commit(kind, name, found, rest[1], body)
        if what == "paths-info":
            files = found.commits[self._sha(found, rest[1])]
            return self._json(self._entries(files, json.loads(body)["paths"]))
        if what == "tree":
            files = found.commits[self._sha(found, rest[1])]
            return self._json(self._tree(files, "/".join(rest[2:]), "recursive=true" in self.path.lower()))
        if what in ("", "revision"):
            sha = self._sha(found, rest[1] if rest else "main")
            files = [{"rfilename": path} for path in sorted(found.commits[sha])]
            return self._json(
                {"_id": "0", "id": name, "sha": sha, "siblings": files, "private": found.private, "tags": []}
            )
        raise Refused(404, "", f"no {what} here")

    def _commit(self, kind: str, name: str, found: Repository, branch: str, body: bytes) -> None:
        self._require_token()
        self._sha(found, branch)
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        sha = found.commit(branch, files)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self._url(kind, name)}/commit/{sha}"})

    # -- reading -------------------------------------------------------------------------------------------------

    def _resolve(self, path: list[str]) -> None:
        at = path.index("resolve")
        kind, name = ("datasets", path[1:at]) if path[0] == "datasets" else ("models", path[:at])
        found = self._repository(kind, "/".join(name))
        sha = self._sha(found, path[at + 1])
        data = found.commits[sha].get("/".join(path[at + 2 :]))
        if data is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if (wanted := self.headers.get("Range")) and self.command == "GET":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            return self._send(part, 206, headers)
        self._send(data, 200, headers)

    @staticmethod
    def _entries(files: dict[str, bytes], paths: list[str]) -> list[dict]:
        entries = []
        for path in paths:
            if path in files:
                data = files[path]
                entries.append({"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()})
            elif any(other.startswith(f"{path}/") for other in files):
                entries.append({"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()})
        return entries

    def _tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        below = [path.removeprefix(prefix) for path in files if path.startswith(prefix)]
        if folder and not below:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        parts = {"/".join(path.split("/")[:n]) for path in below for n in range(1, path.count("/") + 2)}
        return self._entries(files, [prefix + part for part in sorted(parts) if recursive or "/" not in part])

    # -- what all of them ask ------------------------------------------------------------------------------------

    def _split(self, kind: str, parts: list[str]) -> tuple[str, list[str]]:
        """A repository's name, which may have no owner, and what follows it."""
        single = len(parts) == 1 or (kind, parts[0]) in self.hub.repositories
        return (parts[0], parts[1:]) if single else ("/".join(parts[:2]), parts[2:])

    def _repository(self, kind: str, name: str) -> Repository:
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.private and not self._has_token()):
            if not self._has_token():  # the hub does not tell which of the two it is
                raise Refused(401, "RepoNotFound", "Repository not found")
            raise Refused(404, "RepoNotFound", "Repository not found")
        return found

    def _sha(self, found: Repository, revision: str) -> str:
        sha = found.branches.get(revision, revision)
        if sha not in found.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _require_token(self) -> None:
        if not self._has_token():
            raise Refused(401, "", "Invalid username or password.")

    def _url(self, kind: str, name: str) -> str:
        return f"{self.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{name}"

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
