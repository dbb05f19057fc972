"""A hub on this machine with one repository, as far as huggingface_hub asks one when it uploads and fetches."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "owner/name"
_REPOSITORY = f"/api/models/{NAME}"


class Hub(ThreadingHTTPServer):
    """Its repository: for each commit the files, and for each branch its commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.is_private: bool | None = None
        self.tokens: set[str] = set()
        self.fails_at_commit = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, branch: str, added: dict[str, bytes]) -> str:
        files = self.commits.get(self.branches.get(branch, ""), {}) | added
        listed = sorted((name, hashlib.sha1(content).hexdigest()) for name, content in files.items())
        oid = hashlib.sha1(f"{len(self.commits)} {listed}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.server.branches.get(revision, revision)
        files = self.server.commits.get(oid)
        if files is None:
            code = "RepoNotFound" if self.server.is_private is None else "RevisionNotFound"
            self._answer({"error": "not there"}, 404, X_Error_Code=code, X_Error_Message="not there")
            return None
        return oid, files

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/{NAME}/resolve/"):
            revision, _, name = path.removeprefix(f"/{NAME}/resolve/").partition("/")
            if (found := self._files(revision)) is not None:
                oid, files = found
                if name not in files:
                    return self._answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
                etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
                self._answer(files[name], ETag=etag, X_Repo_Commit=oid)
            return None
        if path == f"{_REPOSITORY}/refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
                for name, oid in self.server.branches.items()
            ]
            return self._answer({"branches": branches, "tags": [], "converts": []})
        if path.startswith(f"{_REPOSITORY}/tree/"):
            if (found := self._files(path.removeprefix(f"{_REPOSITORY}/tree/"))) is not None:
                self._answer(
                    [{"type": "file", "path": x, "size": len(y), "oid": "0" * 40} for x, y in found[1].items()]
                )
            return None
        if path == _REPOSITORY or path.startswith(f"{_REPOSITORY}/revision/"):
            revision = path.removeprefix(_REPOSITORY).removeprefix("/revision/") or "main"
            if (found := self._files(revision)) is not None:
                oid, files = found
                listed = [{"rfilename": name} for name in files]
                self._answer({"id": NAME, "sha": oid, "private": self.server.is_private, "siblings": listed})
            return None
        return self._answer({"error": path}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(str(self.headers.get("Authorization")))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.server.is_private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.server.commit("main", {".gitattributes": b""})
            return self._answer({"url": f"{self.server.url}/{NAME}"})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path.startswith(f"{_REPOSITORY}/branch/"):
            self.server.branches[path.removeprefix(f"{_REPOSITORY}/branch/")] = self.server.branches["main"]
            return self._answer({})
        if path.startswith(f"{_REPOSITORY}/preupload/"):
            asked = [entry["path"] for entry in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self._answer({"files": [{"path": name, **plain} for name in asked]})
        if path.startswith(f"{_REPOSITORY}/commit/"):
            if self.server.fails_at_commit:
                return self._answer({"error": "no space left"}, 413)
            entries = [json.loads(line) for line in body.splitlines()]
            added = {
                entry["value"]["path"]: base64.b64decode(entry["value"]["content"])
                for entry in entries
                if entry["key"] == "file"
            }
            oid = self.server.commit(path.removeprefix(f"{_REPOSITORY}/commit/"), added)
            return self._answer({"commitUrl": f"{self.server.url}/{NAME}/commit/{oid}", "commitOid": oid})
        return self._answer({"error": path}, 404)
