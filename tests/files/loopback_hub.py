"""A hub of our own on loopback: what huggingface_hub asks of one, and a record of who asked for what."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

MAIN = "a" * 40  # the commit of the branch main
OLD = "b" * 40  # that of the tag v1
GATED = {"x-error-code": "GatedRepo", "x-error-message": "Access is restricted"}


class Hub:
    """Repositories by kind and name, each a folder; `gated` ones hand no file to strangers."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Path] = {}
        self.gated: set[str] = set()
        self.down = False
        self.asked: list[str] = []
        self.fetched: list[str] = []
        self.made: list[dict[str, object]] = []
        self.committed: dict[str, list[dict[str, object]]] = {}

    def add(self, name: str, folder: Path, kind: str = "models") -> None:
        self.repos[kind, name] = folder


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"POST {path}")
        if "Bearer hf_right" not in self.headers.get("authorization", ""):
            return self._send(401, b"{}", {"x-error-message": "Invalid user token"})
        if path == "/api/repos/create":
            values = json.loads(body)
            self.hub.made.append(values)
            return self._json({"url": f"http://{self.headers['host']}/mila/{values['name']}"})
        if "/preupload/" in path:
            files = [{**f, "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self._json({"files": files})
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            repo = path.split("/api/models/")[1].split("/commit/")[0]
            self.hub.committed.setdefault(repo, []).extend(lines)
            return self._json(
                {"commitUrl": f"https://huggingface.co/{repo}/commit/{MAIN}", "commitOid": MAIN}
            )
        return self._json({})

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        if self.hub.down:
            return self._send(503, b"")
        if path.startswith("/api/whoami"):
            return self._json({"name": "mila", "type": "user", "orgs": [], "auth": {}})
        for (kind, name), folder in self.hub.repos.items():
            api, files = (
                f"/api/{kind}/{name}",
                f"{'datasets/' * (kind == 'datasets')}{name}/resolve/",
            )
            if path == api or path.startswith(f"{api}/"):
                return self._about(path.removeprefix(api).strip("/"), name, folder)
            if path.startswith(f"/{files}"):
                revision, _, file = path.removeprefix(f"/{files}").partition("/")
                return self._file(name, folder, revision, file, body)
        return self._send(404, b"{}", {"x-error-code": "RepoNotFound"})

    def _about(self, rest: str, name: str, folder: Path) -> None:
        revision = rest.partition("/")[2] or "main"
        commit = {"main": MAIN, MAIN: MAIN, "v1": OLD, OLD: OLD}.get(revision.split("/")[0])
        if commit is None:
            return self._send(404, b"{}", {"x-error-code": "RevisionNotFound"})
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        if rest.startswith("tree/"):
            rows = [
                {
                    "type": "file",
                    "path": p.relative_to(folder).as_posix(),
                    "size": p.stat().st_size,
                    "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                }
                for p in files
            ]
            return self._json(rows)
        names = [{"rfilename": p.relative_to(folder).as_posix()} for p in files]
        return self._json({"id": name, "sha": commit, "siblings": names, "private": False})

    def _file(self, name: str, folder: Path, revision: str, file: str, body: bool) -> None:
        path = folder / file
        if name in self.hub.gated:
            return self._send(403, b"{}", GATED)
        if not path.is_file():
            return self._send(404, b"{}", {"x-error-code": "EntryNotFound"})
        data = path.read_bytes()
        if body:
            self.hub.fetched.append(file)
        commit = {"main": MAIN, "v1": OLD}.get(revision, revision)
        etag = hashlib.sha1(data).hexdigest()
        return self._send(200, data, {"etag": f'"{etag}"', "x-repo-commit": commit}, body)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"content-type": "application/json"})

    def _send(
        self, code: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True
    ) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """A hub, and its address for HF_ENDPOINT."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
