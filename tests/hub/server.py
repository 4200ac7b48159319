# SPDX-License-Identifier: Apache-2.0
"""A Hub on loopback, of the endpoints that huggingface_hub uses: real HTTP, kept in memory, faults on demand.

Written from what the client sends and reads. Commits are immutable trees by number; a branch names one.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_FROM = 10_000  # bytes; safetensors files are large whatever their size, as on the Hub
OWNER = {"name": "user", "type": "user", "orgs": []}


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, branch: str, tree: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{message}{len(self.messages)}".encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]


@dataclass
class Faults:
    """What goes wrong: how many of the next requests of a kind are cut off, and after how many bytes.

    stall: "upload" or "download", of which one is held back at its half until the client is gone.
    """

    uploads: int = 0
    commits: int = 0
    downloads: int = 0
    stall: str = ""
    stalled: threading.Event = field(default_factory=threading.Event)


class Hub:
    """`tokens`: token -> repositories it may read of those that are private or gated; "write" may do all."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files, by SHA-256
        self.tokens: dict[str, set[str]] = {"write": set(), "read": set()}
        self.faults = Faults()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.unknown: list[str] = []
        self.lock = threading.RLock()
        hub = self

        class Bound(Handler):
            pass

        Bound.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def asked(self, method: str, pattern: str) -> list[tuple[str, str, dict[str, str]]]:
        return [request for request in self.requests if request[0] == method and re.search(pattern, request[1])]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.route()

    do_HEAD = do_POST = do_PUT = do_GET

    def route(self) -> None:
        self.path_only, query = urlsplit(self.path).path, urlsplit(self.path).query
        self.query = query
        self.hub.requests.append((self.command, self.path_only, dict(self.headers.items())))
        if (lfs := re.fullmatch(r"/lfs/(\w+)", self.path_only)) and self.command == "PUT":
            return self.put_object(lfs[1])
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, self.path_only)
            if found and self.command in method.split("|"):
                with nullcontext() if name == "resolve" else self.hub.lock:
                    return getattr(self, name)(**{k: v and unquote(v) for k, v in found.groupdict().items()})
        self.hub.unknown.append(f"{self.command} {self.path}")
        self.reply(404, {"error": "no such endpoint here"})

    # Answers

    def reply(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def cut(self) -> None:
        """The connection is gone."""
        self.close_connection = True
        self.connection.shutdown(2)

    # Who may

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def readable(self, repo: str) -> Repository | None:
        """The repository, or None once the refusal has been sent: as the Hub, 401 without a token, 404 with one."""
        if self.token is not None and self.token not in self.hub.tokens:
            self.reply(401, {"error": "Invalid"}, X_Error_Message="Invalid credentials in Authorization header")
            return None
        known = self.hub.repositories.get(repo)
        may = self.token == "write" or (self.token is not None and repo in self.hub.tokens[self.token])
        if known is None or (known.private and not may):
            self.refuse(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
            return None
        return known

    def ungated(self, repo: str, known: Repository) -> bool:
        may = self.token == "write" or (self.token is not None and repo in self.hub.tokens[self.token])
        if known.gated and not may:
            message = f"Access to model {repo} is restricted and you are not in the authorized list."
            self.refuse(401 if self.token is None else 403, "GatedRepo", message)
            return False
        return True

    def writable(self, repo: str) -> Repository | None:
        known = self.readable(repo)
        if known is not None and self.token != "write":
            if self.token is None:
                self.reply(401, {"error": "Invalid"}, X_Error_Message="Invalid username or password.")
            else:
                self.refuse(403, "Forbidden", "You do not have write access")
            return None
        return known

    def commit_of(self, known: Repository, revision: str | None) -> str | None:
        sha = known.resolve(revision or "main")
        if sha is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # Endpoints

    def whoami(self) -> None:
        if self.token not in self.hub.tokens:
            return self.reply(401, {"error": "Unauthorized"})
        self.reply(200, {**OWNER, "auth": {"accessToken": {"role": self.token}}})

    def create(self) -> None:
        if self.token != "write":
            status, message = (403, "Forbidden") if self.token in self.hub.tokens else (401, "Invalid credentials")
            return self.reply(status, {"error": message}, X_Error_Message=message)
        asked = json.loads(self.body)
        repo = f"{asked['organization'] or OWNER['name']}/{asked['name']}"
        if repo in self.hub.repositories:
            url = f"{self.hub.url}/{repo}"
            return self.reply(409, {"error": "You already created this model repo", "url": url})
        self.hub.repositories[repo] = Repository(private=asked.get("visibility") == "private")
        self.reply(200, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": "1"})

    def info(self, repo: str, revision: str | None = None) -> None:
        known = self.readable(repo)
        sha = known and self.commit_of(known, revision)
        if known and sha:
            siblings = [{"rfilename": path} for path in known.commits[sha]]
            facts = {"private": known.private, "gated": "manual" if known.gated else False, "tags": []}
            self.reply(200, {"_id": "1", "id": repo, "sha": sha, "siblings": siblings, **facts})

    def tree(self, repo: str, revision: str) -> None:
        known = self.readable(repo)
        sha = known and self.commit_of(known, revision)
        if known and sha:
            self.reply(200, [self.entry(path, data) for path, data in known.commits[sha].items()])

    def paths(self, repo: str, revision: str) -> None:
        known = self.readable(repo)
        sha = known and self.commit_of(known, revision)
        if known and sha:
            wanted = json.loads(self.body)["paths"]
            self.reply(200, [self.entry(p, known.commits[sha][p]) for p in wanted if p in known.commits[sha]])

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        facts: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
        if is_large(path, len(data)):
            facts["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
        return facts

    def branch(self, repo: str, branch: str) -> None:
        known = self.writable(repo)
        if known is not None:
            known.branches[branch] = known.branches["main"]
            self.reply(200, {})

    def validate(self) -> None:
        self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        known = self.writable(repo)
        sha = known and self.commit_of(known, revision)
        if known and sha:
            answer = []
            for file in json.loads(self.body)["files"]:
                mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
                there = known.commits[sha].get(file["path"])
                oid = None if there is None else sha256(there) if mode == "lfs" else blob_id(there)
                answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.reply(200, {"files": answer})

    def batch(self, repo: str) -> None:
        if self.writable(repo) is None:
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                verify = {"href": f"{self.hub.url}/verify/{repo}"}
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}, "verify": verify}
            objects.append(answer)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def put_object(self, oid: str) -> None:
        size = int(self.headers["Content-Length"])
        faults = self.hub.faults
        if faults.stall == "upload":
            self.rfile.read(size // 2)
            faults.stalled.set()
            while self.rfile.read(65536):  # the rest never matters: the client is killed meanwhile
                faults.stalled.wait(0.05)
            return self.cut()
        if faults.uploads > 0:
            faults.uploads -= 1
            self.rfile.read(size // 2)
            return self.cut()
        data = self.rfile.read(size)
        if len(data) != size or sha256(data) != oid:
            return self.reply(400, {"error": "not the announced content"})
        self.hub.objects[oid] = data
        self.reply(200, {})

    def verify(self, repo: str) -> None:
        asked = json.loads(self.body)
        there = self.hub.objects.get(asked["oid"])
        self.reply(200, {}) if there is not None and len(there) == asked["size"] else self.reply(404, {})

    def commit(self, repo: str, revision: str) -> None:
        known = self.writable(repo)
        sha = known and self.commit_of(known, revision)
        if not known or not sha:
            return
        if self.hub.faults.commits > 0:
            self.hub.faults.commits -= 1
            return self.cut()
        tree, message = dict(known.commits[sha]), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, sha):
                    return self.refuse(412, "Conflict", "A commit has happened since")
            elif line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.refuse(400, "Missing", f"{value['path']} was not uploaded")
                tree[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
            else:
                return self.refuse(400, "Unknown", line["key"])
        as_pull_request = "create_pr=1" in self.query
        target = f"refs/pr/{len(known.messages)}" if as_pull_request else revision
        made = known.commit(target, tree, message)
        pull = f"{self.hub.url}/{repo}/discussions/1" if as_pull_request else None
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{made}", "commitOid": made, "pullRequestUrl": pull}
        self.reply(200, {"success": True, **answer})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        known = self.readable(repo)
        sha = known and self.commit_of(known, revision)
        if not known or not sha or not self.ungated(repo, known):
            return
        if path not in known.commits[sha]:
            return self.reply(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        data = known.commits[sha][path]
        large = is_large(path, len(data))
        etag = sha256(data) if large else blob_id(data)
        headers = {"X_Repo_Commit": sha, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
        if large:
            headers |= {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if asked:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        faults = self.hub.faults
        if self.command == "GET" and large and (faults.downloads > 0 or faults.stall == "download"):
            faults.downloads -= 1
            self.send_response(206 if asked else 200)
            for name, value in {"Content-Length": str(len(data) - start), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.wfile.flush()
            if faults.stall:
                faults.stalled.set()
                self.rfile.read(1)  # comes when the client is gone
            return self.cut()
        self.reply(206 if asked else 200, data[start:], **headers)

    def nothing(self) -> None:
        self.reply(200, {})


def is_large(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".png")) or size >= LFS_FROM


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_id(data: bytes) -> str:
    """git's."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET|HEAD", "/api/telemetry/.*", "nothing"),
    ("GET", f"/api/models/{_REPO}", "info"),
    ("GET", f"/api/models/{_REPO}/revision/{_REVISION}", "info"),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}", "tree"),
    ("POST", f"/api/models/{_REPO}/paths-info/{_REVISION}", "paths"),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", "preupload"),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", "commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("POST", f"/verify/{_REPO}", "verify"),
    ("GET|HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
)
