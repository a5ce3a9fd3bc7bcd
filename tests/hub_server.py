"""A hub of models and data sets on this machine, for the clients that people have: what `HF_ENDPOINT` names, and its cache.

Clients read both variables when they are imported, so this module sets them before any test imports one. Until a test starts
the server nobody answers, and the hub of the world is never asked.
"""

import atexit
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    ADDRESS = free.getsockname()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{ADDRESS[1]}"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hub-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ.pop("HF_TOKEN", None)
RESOLVE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?(?:/(.*))?")


@dataclass
class Hub:
    """What the server holds, what it was asked, and how it misbehaves.

    Attributes:
        commits: `{repository: {commit: {path: content}}}`, the last commit being that of `main`; names of data sets begin
            with `datasets/`.
        asked: (method, path, range) of every request.
        refuse: status by repository, of all requests about it.
        busy: requests that are answered with 429 before others are answered, by repository.
        cut: bytes after which a transfer breaks off, by path, once.
    """

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)
    busy: Counter = field(default_factory=Counter)
    cut: dict[str, int] = field(default_factory=dict)

    def push(self, repository: str, files: Mapping[str, bytes]) -> str:
        """A new commit of a repository, with these files alone; its id is returned."""
        known = self.commits.setdefault(repository, {})
        commit = hashlib.sha1(f"{repository}{len(known)}".encode()).hexdigest()
        known[commit] = dict(files)
        return commit

    def files(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        known = self.commits[repository]
        commit = list(known)[-1] if revision == "main" else revision
        return (commit, known[commit]) if commit in known else None

    def downloads(self) -> list[tuple[str, str, str]]:
        """Requests for the content of files."""
        return [each for each in self.asked if each[0] == "GET" and "/resolve/" in each[1]]


class _Answer(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        match, about = RESOLVE.fullmatch(path), API.fullmatch(path)
        if match:
            kind, name, revision, file = match.groups()
        elif about:
            kind, name, what, revision, file = about.groups()
        else:
            return self._fail(404)
        repository = f"datasets/{name}" if kind == "datasets" else name
        if self.hub.busy[repository] > 0:
            self.hub.busy[repository] -= 1
            return self._fail(429, RetryAfter="0")
        if status := self.hub.refuse.get(repository):
            return self._fail(status, {401: "GatedRepo", 403: "GatedRepo"}.get(status, ""))
        if repository not in self.hub.commits:
            return self._fail(404, "RepoNotFound")
        found = self.hub.files(repository, revision or "main")
        if found is None:
            return self._fail(404, "RevisionNotFound")
        if match:
            return self._file(*found, file)
        commit, files = found
        entries = _entries(files)
        if what == "tree":
            if file and file not in entries:
                return self._fail(404, "EntryNotFound")
            inside = {path: entry for path, entry in entries.items() if path.startswith(f"{file}/" if file else "")}
            if "recursive=true" not in self.path.lower():
                inside = {path: entry for path, entry in inside.items() if os.path.dirname(path) == (file or "")}
            return self._json(list(inside.values()))
        if what == "paths-info":
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            return self._json([entries[path] for path in asked if path in entries])
        return self._json(
            {"id": name, "sha": commit, "private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0,
             "siblings": [{"rfilename": path} for path in files]}
        )  # fmt: skip

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def _file(self, commit: str, files: Mapping[str, bytes], path: str) -> None:
        if path not in files:
            return self._fail(404, "EntryNotFound", XRepoCommit=commit)
        content, start = files[path], 0
        if asked := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in self.hub.cut:
            self.wfile.write(content[start : self.hub.cut.pop(path)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def _fail(self, status: int, code: str = "", **headers: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        for name, value in headers.items():
            self.send_header(re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name), value)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entries(files: Mapping[str, bytes]) -> dict[str, dict]:
    """What the hub says of each file, and of the folders that hold them."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents if str(folder) != "."}
    found = {path: {"type": "directory", "path": path, "size": 0, "oid": "0"} for path in folders}
    for path, content in files.items():
        found[path] = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    return found


@contextmanager
def serving() -> Iterator[Hub]:
    """The hub, while the block lasts; what clients had of it stays in their cache."""
    from huggingface_hub.utils import close_session  # not above: it reads where the hub is

    hub = Hub()
    server = ThreadingHTTPServer(ADDRESS, type("Answer", (_Answer,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        close_session()  # of the client, which would keep its connections
        server.shutdown()
        server.server_close()
        thread.join()
